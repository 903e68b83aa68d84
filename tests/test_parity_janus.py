"""Janus-Pro against numbers from the published classes: integers exact, floats within 1e-4 absolute and relative
(float32, CPU). Then what a golden number cannot say: rows, caches, files.

PARITY_DIR=folder replaces tests/golden (folder/janus/{config.json, weights.safetensors, cases.safetensors}, any sizes).
A case that the folder lacks is skipped."""
import dataclasses
import json
import os
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import data
import vision_encoder
from image_tokenizer import VQConfig
from model_janus import CONFIGS, IGNORE, Janus, JanusConfig, Marks, left_pad
from text_tokenizer import load_tokenizer
from vision_encoder import CLIPConfig, letterbox_pixels

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "janus")
TOLERANCE = 1e-4

@lru_cache(maxsize=None)
def golden():
    """-> config.json, cases, and the model with the golden weights."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        g = json.load(f)
    official, s, v = g["official"], g["siglip"], g["vq"]
    llm, head = official["language_config"], official["gen_head_config"]["params"]
    assert v["encoder_ch_mult"] == v["decoder_ch_mult"] and official["aligner_config"]["params"]["depth"] == 2
    c = JanusConfig(
        vocab_size=llm["vocab_size"], hidden_size=llm["hidden_size"], intermediate_size=llm["intermediate_size"],
        num_layers=llm["num_hidden_layers"], num_heads=llm["num_attention_heads"],
        num_kv_heads=llm["num_key_value_heads"], rope_theta=llm["rope_theta"], rms_norm_eps=llm["rms_norm_eps"],
        siglip=CLIPConfig(width=s["width"], layers=s["layers"], heads=s["heads"], skip_last=0, eps=1e-6,
                          mlp_width=s["width"] * s["mlp_ratio"], image_size=s["image_size"], patch=s["patch_size"]),
        gen_vision_model=VQConfig(ch=v["ch"], ch_mult=tuple(v["encoder_ch_mult"]), num_res_blocks=v["num_res_blocks"],
                                  z_channels=v["z_channels"], codebook_size=v["codebook_size"],
                                  code_width=v["codebook_embed_dim"]),
        code_width=official["gen_aligner_config"]["params"]["input_dim"], head_width=head["image_token_embed"],
        image_size=v["image_size"], cfg=g["sampling"]["cfg_weight"])
    model = Janus.load_published(os.path.join(GOLDEN, "weights.safetensors"), c)
    t = g["tokens"]
    model.marks = Marks(t["bos"], t["eos"], t["pad"], t["begin_of_image"], t["end_of_image"], t["image_placeholder"],
                        None, None)
    return g, load_file(os.path.join(GOLDEN, "cases.safetensors")), model

def case(name):
    """{name without its prefix: tensor}, config.json and the model as RecA trains it; skips where there is no such."""
    g, cases, model = golden()
    found = {k[len(name) + 1:]: t for k, t in cases.items() if k.startswith(name + ".")}
    if not found:
        pytest.skip(f"no case {name} in {GOLDEN}")
    model.trainable_parameters("reca")
    model.zero_grad(set_to_none=True)
    return found, g, model

def compare(*rows):
    """(name, ours, golden): floats within the tolerance, whole numbers equal."""
    table, good = [], True
    for name, got, want in rows:
        got, want = torch.as_tensor(got).detach(), torch.as_tensor(want)
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        if want.is_floating_point():
            ok = torch.allclose(got.double(), want.double(), rtol=TOLERANCE, atol=TOLERANCE)
        else:
            ok = torch.equal(got.long(), want.long())
        good &= ok
        worst = (got.double() - want.double()).abs().max()
        table.append(f"{name:40s} {'OK' if ok else 'NOT OK':6s} max difference {worst:.3g}")
    if os.environ.get("PARITY_VERBOSE"):
        print("\n" + "\n".join(table))
    assert good, "\n" + "\n".join(table)

def no_pads(ids):
    return torch.zeros(len(ids), dtype=torch.long)

def check_gradients(name, loss, g, model, want):
    loss.backward()
    grads, names = dict(model.named_parameters()), g["grad_names"][name]
    compare(*[(key, grads[key].grad.norm(), norm) for key, norm in zip(names, want, strict=True)])
    assert all(p.grad is None for key, p in grads.items() if key.startswith(("vision_model.", "gen_vision_model.")))

# ---------------------------------------------------------------------------------------------------------------------
# parts

@torch.no_grad()
def test_image_tokenizer():
    e, _, model = case("vq.encode")
    d, vq = case("vq.decode")[0], model.gen_vision_model
    encoded, codes = vq.encoder(e["in"]), vq.encode(e["in"])
    grid = codes.shape[1:]
    quant = F.embedding(codes, vq.codebook()).permute(0, 3, 1, 2)
    compare(("encoder", encoded, e["encoder_out"]), ("prequant", vq.quant_conv(encoded), e["prequant"]),
            ("ids", codes.flatten(1), e["ids"]), ("quant", quant, e["quant"]),
            ("recon", vq.decode(codes), d["recon"]), ("decode", vq.decode(d["ids"].unflatten(1, grid)), d["out"]))

@torch.no_grad()
def test_vision():
    s, _, model = case("siglip")
    tower = model.vision_model["vision_tower"]
    patches = tower.patch_embed["proj"](s["in"]).flatten(2).transpose(1, 2)
    features = tower(s["in"])
    compare(("patches", patches, s["patch_embed"]),
            ("block 0", tower.blocks[0](patches + tower.pos_embed), s["block0"]),
            ("features", features, s["out"]), ("understand", model.understand(s["in"]), s["out"]),
            ("aligner", model.see(features), case("aligner")[0]["out"]))
    pixels = torch.randint(0, 256, s["in"].shape, dtype=torch.uint8)
    compare(("bytes", model.see(pixels=pixels), model.see(tower(pixels / 127.5 - 1))))

def test_preprocessing():
    cases, _, model = case("prep")
    size = model.config.siglip.image_size
    for name in ("wide", "tall"):
        image = Image.fromarray(cases[f"{name}.u8"].numpy())
        compare((name, letterbox_pixels(image, size), cases[f"{name}.pixel_values"]))
        if size == model.config.image_size:
            assert torch.equal(model.preprocess(image, "i2t"), model.preprocess(image, "answer"))
            compare((name, model.preprocess(image, "answer"), cases[f"{name}.pixel_values"]))

@torch.no_grad()
def test_language_model():
    g, _, model = case("gen")
    compare(("codes", model.embed_codes(g["ids"]), g["embeds"]))
    t, lm = case("llm.text")[0], model.language_model
    hidden = lm(model.embed(t["ids"]), no_pads(t["ids"]))
    compare(("hidden", hidden, t["hidden"]), ("logits", lm.lm_head(hidden), t["logits"]),
            ("last three", lm(model.embed(t["ids"]), no_pads(t["ids"]), keep=3), t["hidden"][:, -3:]))
    t = case("llm.padded")[0]
    mask = t["attention_mask"].bool()
    logits = lm.lm_head(lm(model.embed(t["ids"]), (~mask).sum(1)))
    compare(("left-padded", logits[mask], t["logits"][mask]))

@torch.no_grad()
def test_understanding():
    t, _, model = case("und")
    mask, lm = t["attention_mask"].bool(), model.language_model
    pads = (~mask).sum(1)
    x = model.embed(t["ids"], model.see(model.understand(t["pixel_values"][:, 0])))
    compare(("slots", t["ids"] == model.marks.slot, t["images_seq_mask"]), ("embeddings", x, t["inputs_embeds"]),
            ("logits", lm.lm_head(lm(x, pads))[mask], t["logits"][mask]))
    steps = t["greedy_ids"].shape[1]
    written = model.write(x, pads, steps)
    ended = (written == model.marks.eos).cumsum(1).cumsum(1) > 1
    compare(("greedy", written, t["greedy_ids"][:, :written.shape[1]].masked_fill(ended, model.marks.eos)))

# ---------------------------------------------------------------------------------------------------------------------
# losses

def i2t(t, model):
    features = model.understand(t["pixel_values"][:, 0])
    return model.i2t_loss(t["ids"], no_pads(t["ids"]), F.pad(t["labels"][:, 1:], (0, 1), value=IGNORE), features)

def test_image_to_text_loss():
    t, g, model = case("i2t")
    loss = i2t(t, model)
    compare(("loss", loss, t["loss"]))
    check_gradients("i2t", loss, g, model, t["grad_norms"])

def dropped(model, ids, mask):
    return torch.where(mask.bool()[:, None], model.without_condition(ids, no_pads(ids)), ids)

def logits_of(model, codes, ids, features=None):
    x = torch.cat([model.embed(ids, model.see(features)), model.embed_codes(codes[:, :-1])], 1)
    hidden = model.language_model(x, no_pads(ids), keep=codes.shape[1])
    return model.gen_head["vision_head"](model.before_head(hidden))

def test_text_to_image_loss():
    t, g, model = case("t2i")
    ids, codes = t["prompt_ids"], t["vq_ids"]
    loss = model.t2i_loss(codes, ids, no_pads(ids))
    compare(("logits", logits_of(model, codes, ids), t["logits"]), ("loss", loss, t["loss"]),
            ("dropped", model.t2i_loss(codes, dropped(model, ids, t["drop_mask"]), no_pads(ids)), t["loss_with_drop"]))
    check_gradients("t2i", loss, g, model, t["grad_norms"])

def test_reca_loss():
    t, g, model = case("reca")
    ids = t["prompt_ids"]
    given = model.precompute(t["gen_image"]) | {"features": model.understand(t["und_image"])}
    loss = model.reca_loss(ids=ids, pads=no_pads(ids), **given)
    drop = model.reca_loss(ids=dropped(model, ids, t["drop_mask"]), pads=no_pads(ids), **given)
    compare(("codes", given["codes"], t["vq_ids"]), ("loss", loss, t["loss"]), ("dropped", drop, t["loss_with_drop"]),
            ("context", model.embed(ids, model.see(given["features"])), t["context_embeds"]),
            ("logits", logits_of(model, given["codes"], ids, given["features"]), t["logits"]),
            ("total", loss + i2t(case("i2t")[0], model), t["total_loss"]))
    check_gradients("reca", loss, g, model, t["grad_norms"])

# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def test_sampling():
    t, g, model = case("sample")
    ids, trace, cfg = t["prompt_ids"], [], g["sampling"]["cfg_weight"]
    both = torch.cat([ids, model.without_condition(ids, no_pads(ids))])
    with torch.no_grad():
        context = model.embed(both)

    def sample(u, **how):
        return model.sample(context, no_pads(both), u, cfg, **how)
    sample(t["uniform"], forced=t["forced_ids"], trace=trace)
    codes = sample(t["uniform"], temperature=g["sampling"]["temperature"])
    image = model.gen_vision_model.decode(codes.unflatten(1, (t["image"].shape[2] // model.stride, -1)))
    compare(("guided logits", torch.stack(trace, 1), t["forced_guided_logits"]),
            ("greedy", sample(t["uniform"], temperature=0), t["greedy_ids"]), ("drawn", codes, t["cdf_ids"]),
            ("image", image, t["image"]))
    off = (data.to_uint8(image).astype(int) - t["image_u8"].numpy()).__abs__()
    assert off.max() <= 1  # the published code cuts to whole numbers, ours rounds

@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_cache_changes_nothing(cfg):
    """Every step against a pass over the whole row, and rows that are padded against the same rows alone."""
    model = tiny()
    rows = [model.draw_ids("t2i", {"caption": caption}) for caption in ("a star", "two blue circles and a red square")]
    ids, pads = left_pad(rows, max(map(len, rows)))
    assert pads[0] > 0 == pads[1]
    if cfg != 1:
        ids, pads = torch.cat([ids, model.without_condition(ids, pads)]), pads.repeat(2)
    u, trace = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)), []
    codes = model.sample(model.embed(ids), pads, u, cfg, temperature=0, trace=trace)
    with torch.no_grad():
        for i in range(9):
            drawn = model.embed_codes(codes[:, :i]).repeat(len(ids) // 2, 1, 1)
            hidden = model.language_model(torch.cat([model.embed(ids), drawn], 1), pads)[:, -1]
            logits = model.gen_head["vision_head"](model.before_head(hidden))
            logits = logits if cfg == 1 else logits[2:] + cfg * (logits[:2] - logits[2:])
            torch.testing.assert_close(trace[i], logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(logits.argmax(-1), codes[:, i])
    alone = torch.tensor(rows[:1])
    both = torch.cat([alone, model.without_condition(alone, no_pads(alone))]) if cfg != 1 else alone
    assert torch.equal(model.sample(model.embed(both), no_pads(both), u[:1], cfg, temperature=0), codes[:1])

def test_a_step_computes_one_code(monkeypatch):
    """576 codes cost 576 passes over one token; the memory of the cache is taken once."""
    model, widths, pointers = tiny(), [], set()
    layer = model.language_model.model.layers[0]
    forward = layer.forward

    def watched(x, cos, sin, plan, past, keep):
        widths.append(tuple(x.shape[:2]))
        pointers.add(past.untyped_storage().data_ptr())
        return forward(x, cos, sin, plan, past, keep)
    monkeypatch.setattr(layer, "forward", watched)
    model.generate(["a star", "a circle"], cfg=2.0)
    assert widths[0][1] > 1 and widths[1:] == [(4, 1)] * 8 and len(pointers) == 1

def test_draws_follow_the_probabilities():
    model, n = tiny(), 4000
    ids = torch.tensor([model.draw_ids("t2i", {"caption": "a star"})])
    trace, u = [], (torch.arange(n)[:, None] + 0.5) / n
    codes = model.sample(model.embed(ids).expand(n, -1, -1), no_pads(u), u, trace=trace)[:, 0]
    share, p = codes.bincount(minlength=2048) / n, trace[0][0].softmax(-1)
    assert (share - p).abs().max() <= 1 / n + 1e-6
    ends = model.sample(model.embed(ids).expand(2, -1, -1), no_pads(u[:2]), torch.tensor([[0.0], [1 - 2 ** -24]]))
    assert ends[:, 0].tolist() == [0, 2047]

# ---------------------------------------------------------------------------------------------------------------------
# rows and text

@lru_cache(maxsize=None)
def tiny():
    torch.manual_seed(0)
    model = Janus(CONFIGS["tiny"], load_tokenizer("tiny")).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    return model

def spelled(model, ids):
    """Ids -> text, slots left out."""
    return model.tokenizer.decode([i for i in ids if i not in (model.marks.slot, IGNORE)])

def test_rows():
    """The published template, with the tiny tokenizer's names of the special tokens: im_start is both roles."""
    model = tiny()
    start, image, bos = "<|im_start|>", "<|vision_start|>", "<|endoftext|>"
    seen = f"{start}: {image}<|vision_end|>\n"
    draw, end = model.draw_ids, f"\n\n{start}:"
    assert spelled(model, draw("t2i", {"caption": " a star "})) == f"{bos}{start}: a star{end}{image}"
    row = draw("recon", {"prompt": "Describe it."})
    assert spelled(model, row) == f"{bos}{seen}Describe it.{end}{image}" and row.count(model.marks.slot) == 9
    assert spelled(model, draw("edit", {"instruction": "Make it red."})) == f"{bos}{seen}Make it red.{end}{image}"
    nothing = draw("recon", {"prompt": "Describe it.", "drop": True})
    assert nothing == [model.marks.bos, *[model.marks.pad] * (len(row) - 2), model.marks.begin]
    assert draw("uncond", {"caption": "", "drop": True})[0] == model.marks.bos
    for part, text in (("t2i", "caption"), ("recon", "prompt")):
        long = draw(part, {text: "star " * 99}, 30)
        assert len(long) == 30 + 11 * (part == "recon") and spelled(model, long).endswith("star" + end + image)
    dialogue = {"turns": [("what?", "a star"), ("where? ", " here ")]}
    ids, labels = model.dialogue_ids("i2t", dialogue)
    assert spelled(model, ids) == f"{bos}{seen}what?{end} a star<|im_end|>{start}: where?{end} here<|im_end|>"
    assert spelled(model, labels) == " a star<|im_end|> here<|im_end|>"
    assert spelled(model, model.dialogue_ids("text", dialogue)[0]).startswith(f"{bos}{start}: what?{end} a star")
    named = dataclasses.replace(model.config, system="Be kind.")
    with torch.device("meta"):
        assert spelled(model, Janus(named, model.tokenizer).opening()) == f"{bos}Be kind.\n\n"
    with pytest.raises(ValueError, match="text tokenizer without <｜begin.*--text-tokenizer"):
        Janus(dataclasses.replace(model.config, tokens=CONFIGS["janus-pro-1b"].tokens), model.tokenizer)

def test_rows_are_what_the_whole_text_gives(tmp_path):
    """The published template, encoded at once by a tokenizer of DeepSeek's kind, against our pieces."""
    with open(os.path.join(HERE, "golden", "staged_tokenizer.json")) as f:
        (tmp_path / "tokenizer.json").write_text(json.dumps(json.load(f)["tokenizer"]))
    tokenizer, published = load_tokenizer(tmp_path), CONFIGS["janus-pro-1b"]
    c = dataclasses.replace(CONFIGS["tiny"], tokens=published.tokens, system=published.system)
    with torch.device("meta"):
        model = Janus(c, tokenizer)
    picture = "<begin_of_image>" + "<image_placeholder>" * 9 + "<end_of_image>"

    def same(ids, text):
        assert ids == tokenizer.encode("<｜begin▁of▁sentence｜>" + text)
    ask, end = "\n\n<|Assistant|>:", "<｜end▁of▁sentence｜>"
    same(model.draw_ids("t2i", {"caption": "Two cats, (1 red)."}), f"<|User|>: Two cats, (1 red).{ask}<begin_of_image>")
    same(model.draw_ids("recon", {"prompt": "Describe it."}), f"<|User|>: {picture}\nDescribe it.{ask}<begin_of_image>")
    same(model.opening() + model.ask("What?", True), f"{c.system}\n\n<|User|>: {picture}\nWhat?{ask}")
    turns = {"turns": [("What is it?", "A cat."), ("\nWhere? ", "It's\nhere.")]}
    for part, shown in (("i2t", picture + "\n"), ("text", "")):
        first, second = f"<|User|>: {shown}What is it?{ask} A cat.{end}", f"<|User|>: Where?{ask} It's\nhere.{end}"
        same(model.dialogue_ids(part, turns)[0], f"{c.system}\n\n{first}{second}")

SAMPLES = {"recon": [{"prompt": "Describe it."}, {"prompt": "What is there in this picture, in every detail?"}],
           "t2i": [{"caption": "a star"}, {"caption": "two blue circles above a red square", "drop": True}],
           "edit": [{"instruction": "Make it red."}, {"instruction": "Remove it."}],
           "i2t": [{"question": "What?", "answer": "a star"}, {"question": "How many?", "answer": "two large stars"}],
           "text": [{"question": "What is red and blue?", "answer": "purple"}, {"question": "1?", "answer": "2"}]}

def batch_of(model, stage, rows=slice(None)):
    model.trainable_parameters(stage)
    images = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own, source = model.precompute(images[:2]), model.precompute(images[2:])
    batch = {}
    for part, samples in SAMPLES.items():
        samples = samples[rows]
        batch[part] = model.collate(part, samples, [torch.Generator()] * len(samples), None)
        if part != "text":
            batch[part] |= {name: t[rows] for name, t in own.items()}
        if part == "edit":
            batch[part] |= {f"source_{name}": t[rows] for name, t in source.items()}
    return batch

@pytest.mark.parametrize("stage", ["base", "reca"])
def test_a_row_does_not_depend_on_its_neighbors(stage):
    """Pads are invisible: the mean over two rows is the sum of each alone over the count of both."""
    model = tiny()
    both, halves = batch_of(model, stage), [batch_of(model, stage, slice(i, i + 1)) for i in range(2)]
    for part, loss in model(both).items():
        shares = [model({part: half[part] | {"count": both[part]["count"]}})[part] for half in halves]
        torch.testing.assert_close(sum(shares), loss)
    assert both["t2i"]["pads"].max() > 0 and both["i2t"]["pads"].max() > 0

def test_what_a_loss_sees():
    model = tiny()
    batch = batch_of(model, "reca")
    recon, edit, t2i = batch["recon"], batch["edit"], batch["t2i"]
    other = {"features": recon["features"].flip(0)}
    assert model.reca_loss(**(recon | other)) != model.reca_loss(**recon)
    dropped = {"ids": model.without_condition(recon["ids"], recon["pads"])}
    assert model.reca_loss(**(recon | dropped | other)) == model.reca_loss(**(recon | dropped))
    plain = {name: t for name, t in edit.items() if not name.startswith("source_")}
    own = model.reca_loss(**(plain | {"features": edit["source_features"]}))
    assert model({"edit": edit})["edit"] == own != model.reca_loss(**plain)
    assert model({"t2i": t2i | other})["t2i"] == model({"t2i": t2i})["t2i"]
    # the codes are read from left to right: the last one is a label alone
    changed = recon["codes"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 2048
    with torch.no_grad():
        first, second = (logits_of(model, codes, recon["ids"], recon["features"])
                         for codes in (recon["codes"], changed))
    assert torch.equal(first, second)

def test_what_trains():
    model = tiny()
    for stage, frozen in (("base", {"gen_vision_model"}), ("reca", {"gen_vision_model", "vision_model"})):
        named = {name.split(".")[0] for name, _ in model.trainable_parameters(stage)}
        assert named == {name for name, _ in model.named_children()} - frozen
    with pytest.raises(ValueError, match="expected base, sft or reca"):
        model.trainable_parameters("pretrain")
    batch = {part: tensors for part, tensors in batch_of(model, "reca").items() if part == "recon"}
    model.zero_grad(set_to_none=True)
    model(batch)["recon"].backward()
    assert model.aligner.layers[0].weight.grad.any() and model.language_model.lm_head.weight.grad is None

def test_answers_end_and_steps_are_said(capsys, monkeypatch):
    model = tiny()
    eos, drawn = model.marks.eos, iter([[9, 5], [model.marks.eos, 6], [7, model.marks.eos], [7, 7]])
    monkeypatch.setattr(vision_encoder, "next_token", lambda *_: torch.tensor(next(drawn))[:, None])
    x = model.embed(torch.tensor([[1, 2, 3], [3, 2, 1]]))
    assert model.write(x, torch.zeros(2, dtype=torch.long), 9).tolist() == [[9, eos, eos], [5, 6, eos]]
    model.generate(["a"], steps=7)
    model.generate(["a"], steps=7)
    assert capsys.readouterr().err == "steps 7: this model draws one code a step, so it takes 9\n"
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        model.generate(["a"], size=50)

# ---------------------------------------------------------------------------------------------------------------------
# files

def test_files(tmp_path, capsys):
    """One file, safetensors or pickle, whole or in shards; SigLIP's pooling head is named and left out."""
    _, _, model = golden()
    state = {name: t.clone() for name, t in load_file(os.path.join(GOLDEN, "weights.safetensors")).items()}
    state["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    names = sorted(state)
    parts = {f"-0000{i + 1}-of-00002": {name: state[name] for name in names[i::2]} for i in range(2)}
    for kind, ending, write in (("model", "safetensors", save_file), ("pytorch_model", "bin", torch.save)):
        for pieces in ({"": state}, parts):
            folder = tmp_path / f"{kind}{len(pieces)}"
            folder.mkdir()
            for name, piece in pieces.items():
                write(piece, str(folder / f"{kind}{name}.{ending}"))
            table = {key: f"{kind}{name}.{ending}" for name, piece in pieces.items() for key in piece}
            if len(pieces) > 1:
                (folder / f"{kind}.{ending}.index.json").write_text(json.dumps({"weight_map": table}))
            capsys.readouterr()
            again = Janus.load_published(str(folder), model.config)
            left = sum("attn_pool" in name for name in state) + 1
            assert f"{left} of {len(state)} tensors are left out: .attn_pool., " in capsys.readouterr().err
            assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    half = Janus.load_published(str(tmp_path / "model1"), model.config, dtype=torch.bfloat16)
    assert half.aligner.layers[0].weight.dtype == torch.bfloat16
    assert half.gen_vision_model.quant_conv.weight.dtype == torch.float32
    for flag in ("tokenizer", "vision"):
        with pytest.raises(ValueError, match=f"--{flag}-ckpt x: leave it out, .*model1 is one file"):
            Janus.load_published(str(tmp_path / "model1"), model.config, **{f"{flag}_path": "x"})
    del state["aligner.layers.0.bias"]
    torch.save(state, tmp_path / "lacks.bin")
    with pytest.raises(ValueError, match="1 missing.*missing aligner.layers.0.bias"):
        Janus.load_published(str(tmp_path / "lacks.bin"), model.config)

def test_config_that_the_original_code_builds_from(tmp_path):
    g, _, model = golden()
    with open(model.save_published(str(tmp_path))[1]) as f:
        about = json.load(f)
    for name, want in g["official"].items():
        got = about[name]
        if "params" in want:
            given = {"model_name": "siglip_large_patch16_384"} if name == "vision_config" else {}
            assert got["params"] == want["params"] | given
            assert (got["cls"], got["model_type"]) == (want["cls"].replace("tiny", "16"), want["model_type"])
        elif isinstance(want, dict):
            shared = (want.keys() & got.keys()) - {"max_position_embeddings"}
            assert len(shared) > 6 and {k: got[k] for k in shared} == {k: want[k] for k in shared}

@pytest.mark.parametrize("size, trains, frozen", [("janus-pro-1b", 1701.1, 375.6), ("janus-pro-7b", 7032.2, 375.6)])
def test_published_sizes(size, trains, frozen):
    with torch.device("meta"):
        model = Janus(CONFIGS[size])
    named = [p.numel() for _, p in model.trainable_parameters("reca")]
    rest = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert sum(named) / 1e6 == pytest.approx(trains, abs=0.2) and rest / 1e6 == pytest.approx(frozen, abs=0.2)
    assert model.sampling_steps("generate") == model.seen == 576
    written = json.loads(json.dumps(dataclasses.asdict(CONFIGS[size])))
    assert checkpoint.from_dict(JanusConfig, written) == CONFIGS[size]
