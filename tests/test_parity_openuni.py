"""OpenUni against numbers from the published implementation: every stage at the tolerance at which two correct float32
programs agree. (Its autoencoder: test_parity_openuni_vae.py.)

PARITY_DIR=folder replaces tests/golden (folder/openuni/{config.json, weights.safetensors, weights_sana15.safetensors,
cases.safetensors}, any sizes)."""
import gzip
import json
import math
import os
from dataclasses import asdict
from functools import lru_cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import checkpoint
import model_openuni
import vision_encoder
from image_tokenizer import DCAutoencoderConfig
from model_openuni import CONFIGS, OpenUni, OpenUniConfig, Sana, SanaConfig, sampling_sigmas
from text_tokenizer import load_tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "openuni")
TIGHT, SAMPLER = 2e-5, 1e-4  # factors on max|reference|

def sana_config(s):
    assert s["in_channels"] == s["out_channels"] and s["patch_size"] == 1
    assert s["num_attention_heads"] * s["attention_head_dim"] == s["cross_attention_dim"]
    return SanaConfig(width=s["cross_attention_dim"], layers=s["num_layers"], heads=s["num_attention_heads"],
                      cross_heads=s["num_cross_attention_heads"], mlp_ratio=s["mlp_ratio"],
                      caption_channels=s["caption_channels"], qk_norm=bool(s["qk_norm"]))

@lru_cache(maxsize=None)
def golden():
    """-> (config.json, cases, model with the golden weights)."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors", "weights_sana15.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        config = json.load(f)
    (v, l), n, a = (config["lmm"][k] for k in ("vision_config", "llm_config")), config["connector"], config["vae"]
    vit = vision_encoder.CLIPConfig(
        width=v["hidden_size"], layers=v["num_hidden_layers"], heads=v["num_attention_heads"], skip_last=0,
        mlp_width=v["intermediate_size"], image_size=v["image_size"], patch=v["patch_size"], eps=v["layer_norm_eps"])
    vae = DCAutoencoderConfig(
        widths=tuple(a["encoder_block_out_channels"]), encoder_blocks=tuple(a["encoder_layers_per_block"]),
        decoder_blocks=tuple(a["decoder_layers_per_block"]), head_dim=a["attention_head_dim"],
        attention_from=a["encoder_block_types"].index("EfficientViTBlock"), z_channels=a["latent_channels"],
        scale=a["scaling_factor"])
    c = OpenUniConfig(
        vocab_size=l["vocab_size"], hidden_size=l["hidden_size"], intermediate_size=l["intermediate_size"],
        num_layers=l["num_hidden_layers"], num_heads=l["num_attention_heads"], num_kv_heads=l["num_key_value_heads"],
        rope_theta=l["rope_theta"], rms_norm_eps=l["rms_norm_eps"], vit=vit, queries=config["num_queries"],
        connector_layers=n["num_hidden_layers"], connector_heads=n["num_attention_heads"],
        connector_mlp=n["intermediate_size"], sana=sana_config(config["transformer"]), vae=vae,
        image_size=config["image_size"])
    model = OpenUni.load_published(os.path.join(GOLDEN, "weights.safetensors"), c)
    t = config["tokens"]
    model.marks = (None, None, t["IMG_START"], t["IMG_END"], t["IMG_CONTEXT"])
    return config, load_file(os.path.join(GOLDEN, "cases.safetensors")), model

def case(name):
    """Tensors of one case without their prefix, config.json and the model as RecA trains it; skips by name where the
    folder lacks the case."""
    config, cases, model = golden()
    g = {k[len(name) + 1:]: v for k, v in cases.items() if k.startswith(name + ".")}
    if not g:
        pytest.skip(f"no case {name} in {GOLDEN}")
    model.trainable_parameters("reca")
    model.zero_grad(set_to_none=True)
    return g, config, model

def compare(*rows, factor=TIGHT):
    """(name, ours, golden): |a - b| <= factor * max|b|, or equal where they are whole numbers."""
    table, good = [], True
    for name, got, want in rows:
        got, want = torch.as_tensor(got).detach(), torch.as_tensor(want)
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        allowed = factor * want.abs().max().item() if want.is_floating_point() else 0
        worst = (got.double() - want.double()).abs().max().item()
        good &= worst <= allowed  # nan fails
        table.append(f"{name:40s} difference {worst:.3g}, allowed {allowed:.3g}")
    if os.environ.get("PARITY_VERBOSE"):
        print("\n" + "\n".join(table))
    assert good, "\n" + "\n".join(table)

def left_padded(ids, mask):
    """Published rows, padded on either side -> ours, and the number of pads in each."""
    real = [row[keep] for row, keep in zip(ids, mask.bool())]
    pads = torch.tensor([ids.shape[1] - len(row) for row in real])
    return torch.stack([torch.cat([row.new_zeros(n), row]) for n, row in zip(pads.tolist(), real)]), pads

def hidden_of(module):
    """A list that gets what `module` returns."""
    outs = []
    module.register_forward_hook(lambda m, a, out: outs.append(out[0] if isinstance(out, tuple) else out))
    return outs

# ---------------------------------------------------------------------------------------------------------------------
# parts

@torch.no_grad()
def test_vision():
    g, _, model = case("vit")
    vit = model.lmm.vision_model
    x = vit.embeddings(g["in"])
    embeddings = x
    for layer in vit.encoder["layers"]:
        x = layer(x)
    folded = model.fold(vit(g["in"]))
    compare(("vit.embeddings", embeddings, g["embeddings"]), ("vit.out", x, g["out"]),
            ("vit.pixel_shuffle", folded, g["pixel_shuffle"]),
            ("vit.projected", model.lmm.mlp1(folded), g["projected"]))

@torch.no_grad()
def test_what_internvl_sees(monkeypatch):
    g, _, model = case("semantic")
    seen = []
    vit = model.lmm.vision_model.forward
    monkeypatch.setattr(model.lmm.vision_model, "forward", lambda x: seen.append(x) or vit(x))
    features = model.see(g["in"])
    compare(("semantic.vit_input", seen[0], g["vit_input"]), ("semantic.features", features, g["features"]))
    assert model.seen == g["features"].shape[1]
    model.trainable_parameters("reca")
    made = model.precompute(g["in"])
    compare(("precompute", made["features"], g["features"]))

@torch.no_grad()
def test_language_model():
    g, _, model = case("llm.text")
    lm = model.lmm.language_model
    hidden, past = lm(model.embed(g["ids"]), torch.zeros(len(g["ids"]), dtype=torch.long))
    compare(("llm.text.logits", lm.lm_head(hidden), g["logits"]))
    at, pads = g["ids"].shape[1] // 2, torch.zeros(len(g["ids"]), dtype=torch.long)
    past = lm(model.embed(g["ids"][:, :at]), pads, keep=1)[1]
    compare(("in two pieces", lm.lm_head(lm(model.embed(g["ids"][:, at:]), pads, past)[0]), g["logits"][:, at:]))
    cache = model_openuni.Cache(lm, len(pads), g["ids"].shape[1] + 3)
    memory = [layer.data_ptr() for layer in cache.layers]
    pieces = [lm(model.embed(part), pads, cache=cache)[0] for part in (g["ids"][:, :at], *g["ids"][:, at:].split(1, 1))]
    compare(("one by one", lm.lm_head(torch.cat(pieces, 1)), g["logits"]))
    assert [layer.data_ptr() for layer in cache.layers] == memory and cache.used == g["ids"].shape[1]

@torch.no_grad()
def test_understanding():
    """With an image in the prompt, rows padded on the left."""
    g, _, model = case("und")
    ids, pads = left_padded(g["ids"], g["attention_mask"])
    lm, mask = model.lmm.language_model, g["attention_mask"].bool()
    features = model.lmm.mlp1(model.fold(model.lmm.vision_model(g["pixel_values"])))
    logits = lm.lm_head(lm(model.embed(ids, features), pads)[0])
    compare(("und.logits", logits[mask], g["logits"][mask]))

@torch.no_grad()
def test_connector():
    g, _, model = case("connector")
    first = model.connector.layers[0](g["in"])
    x = g["in"]
    for layer in model.connector.layers:
        x = layer(x)
    compare(("connector.layer0", first, g["layer0"]), ("connector.out", x, g["out"]),
            ("llm2dit.out", model.connect(g["in"]), golden()[1]["llm2dit.out"]))

@torch.no_grad()
def test_sana():
    g, _, model = case("dit")
    dit = model.transformer
    e, time = dit.time(g["timestep"])
    block, mixed, outs = dit.transformer_blocks[0], [], []
    join = block.attn1.join
    block.attn1.join = lambda x: mixed.append(join(x)) or mixed[-1]
    hook = block.register_forward_hook(lambda m, a, out: outs.append(out))
    v = dit(g["in"], g["timestep"], g["prompt_embeds"])
    del block.attn1.join
    hook.remove()
    compare(("dit.time_embed6", time, g["time_embed6"]), ("dit.embedded_timestep", e, g["embedded_timestep"]),
            ("dit.caption", dit.read(g["prompt_embeds"]), g["caption"]),
            ("dit.block0.attn1", mixed[0], g["block0.attn1"]),
            ("dit.block0.out", outs[0], g["block0.out"]), ("dit.out", v, g["out"]))

@torch.no_grad()
def test_the_other_sana():
    """With q and k normalized, or without, whatever the first one does not do; and on a grid that is no square."""
    g, config, _ = case("sana15")
    dit = Sana(sana_config(config["s15"]), config["s15"]["in_channels"], 4)
    weights = load_file(os.path.join(GOLDEN, "weights_sana15.safetensors"))
    checkpoint.load_strict(dit, {k.removeprefix("transformer."): t for k, t in weights.items()})
    assert bool(config["s15"]["qk_norm"]) != bool(config["transformer"]["qk_norm"])
    compare(("sana15.out", dit(g["in"], g["timestep"], g["prompt_embeds"]), g["out"]),
            factor=SAMPLER)

def test_small_numbers_in_norms():
    """Which golden numbers hardly see: 1e-6, but for these."""
    with torch.device("meta"):
        model = OpenUni(CONFIGS["openuni-l-1024"])
    for name, module in model.named_modules():
        if hasattr(module, "eps") and not name.startswith("vae."):
            last = name.split(".")[-1]
            assert module.eps == (1e-5 if last in ("norm_q", "norm_k", "caption_norm", "0") else 1e-6), name

def test_times():
    g, _, model = case("sched")
    u = torch.arange(1000, dtype=torch.float64).add(0.5).div(1000).float()
    t, sigma = model.flow_time(u)
    sigmas = sampling_sigmas(20, CONFIGS["openuni-b-512"].shift)
    compare(("sched.train_timesteps", t, g["train_timesteps"]),
            ("sched.train_sigmas", sigma.flatten(), g["train_sigmas"]),
            ("sched.test20_sigmas", torch.tensor(sigmas), g["test20_sigmas"]),
            ("sched.test20_timesteps", torch.tensor([int(1000 * s) for s in sigmas[:-1]]), g["test20_timesteps"]),
            factor=1e-6)

# ---------------------------------------------------------------------------------------------------------------------
# losses

def gradients(config, model):
    own = dict(model.named_parameters())
    assert all((p.grad is not None) == (not name.startswith(("lmm.", "vae."))) for name, p in own.items())
    return torch.stack([own[name].grad.norm() for name in config["grad_names"]])

def rows_of(model, g):
    """-> ids, pads of ours, and the rotary positions of prompt and queries in the published order."""
    mask = torch.cat([g["attention_mask"], torch.ones(len(g["ids"]), model.config.queries, dtype=torch.long)], 1)
    return *left_padded(g["ids"], g["attention_mask"]), (mask.cumsum(1) - 1).clamp(min=0)

@pytest.fixture
def stages(monkeypatch):
    """What the losses make on the way: {name: tensors in the order of the calls}."""
    def watch(model):
        made = {}
        for owner, name in ((model, "condition"), (model, "connect"), (model.transformer, "forward"), (model, "embed")):
            def call(*args, own=getattr(owner, name), name=name, **more):
                made[name] = own(*args, **more)
                made[name + ".in"] = args
                return made[name]
            monkeypatch.setattr(owner, name, call)
        return made
    return watch

def test_text_to_image_loss(stages):
    g, config, model = case("t2i")
    ids, pads, positions = rows_of(model, g)
    compare(("t2i.position_ids", positions, g["position_ids"]))
    t, sigma = model.flow_time(g["u"])
    latents, made = model.precompute(g["pixel_values"])["latents"], stages(model)
    loss = model.t2i_loss(latents, ids, pads, g["noise"], g["u"])
    loss.backward()
    compare(("t2i.latents", latents, g["latents"]), ("t2i.query_hidden", made["connect.in"][0], g["query_hidden"]),
            ("t2i.prompt_embeds", made["condition"], g["prompt_embeds"]), ("t2i.timesteps", t, g["timesteps"]),
            ("t2i.sigmas", sigma.flatten(), g["sigmas"]), ("t2i.noisy", made["forward.in"][0], g["noisy"]),
            ("t2i.pred", made["forward"], g["pred"]), ("t2i.loss", loss, g["loss"]),
            ("t2i.grad_norms", gradients(config, model), g["grad_norms"]))

def test_reca_loss(stages):
    """The source is the target; the queries learn through the frozen language model, which gets no gradient."""
    g, config, model = case("reca")
    ids, pads, positions = rows_of(model, g)
    compare(("reca.position_ids", positions, g["position_ids"]))
    made, stage = model.precompute(g["pixel_values"]), stages(model)
    loss = model.reca_loss(made["latents"], ids, pads, g["noise"], g["u"], made["features"])
    loss.backward()
    real = g["attention_mask"].bool()
    compare(("reca.vit_embeds", made["features"], g["vit_embeds"]),
            ("reca.inputs_embeds", stage["embed"][real], g["inputs_embeds"][real]),
            ("reca.query_hidden", stage["connect.in"][0], g["query_hidden"]),
            ("reca.prompt_embeds", stage["condition"], g["prompt_embeds"]), ("reca.loss", loss, g["loss"]),
            ("reca.grad_norms", gradients(config, model), g["grad_norms"]))

@pytest.mark.parametrize("stage", ["base", "reca"])
def test_prompt_and_queries_at_once_are_the_same(stage):
    """The prompt is read without a graph, to save work; and InternVL3 learns nothing from drawing, in base, too."""
    g, config, model = case("reca")
    ids, pads, _ = rows_of(model, g)
    made, found = model.precompute(g["pixel_values"]), []
    model.trainable_parameters(stage)

    def at_once(ids, pads, features):
        queries = model.meta_queries.expand(len(ids), -1, -1)
        x = torch.cat([model.embed(ids, features), queries], 1)
        return model.connect(model.lmm.language_model(x, pads, keep=model.config.queries)[0])
    try:
        for model.condition in (model.condition, at_once):
            model.zero_grad(set_to_none=True)
            model.reca_loss(made["latents"], ids, pads, g["noise"], g["u"], made["features"]).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    finally:
        del model.condition
    assert not any(name.startswith("lmm.") for name in found[0])
    assert all(name in found[1] for name in found[0])
    both = [torch.cat([grads[name].flatten() for name in found[0]]) for grads in found]
    assert (both[0] - both[1]).norm() < TIGHT * both[1].norm()

def test_in_base_sana_reads_the_words_of_a_caption_too():
    """Half of the loss is the queries', half that of the prompt's own hidden states; a wider batch changes neither."""
    g, config, model = case("t2i")
    ids, pads, _ = rows_of(model, g)
    flow = model.precompute(g["pixel_values"])["latents"], g["noise"], g["u"]
    queries = model.t2i_loss(flow[0], ids, pads, *flow[1:])
    caption, words = model.condition(ids, pads, words=True)
    alone = model.condition(ids[-1:, pads[-1]:], 0 * pads[-1:], words=True)  # without a neighbor that is longer
    assert words.shape[1] == model.config.max_prompt and int(pads[-1]) > 0
    torch.testing.assert_close(alone, (caption[-1:], words[-1:]), rtol=1e-4, atol=1e-5)
    hidden = model.lmm.language_model(model.embed(ids), pads)[0]
    expected = torch.zeros(len(ids), model.config.max_prompt, hidden.shape[2])
    for row, own, n in zip(expected, hidden, pads):
        row[len(row) - len(own) + n:] = own[n:]
    torch.testing.assert_close(words, model.connect(expected))
    model.trainable_parameters("base")
    loss = model.t2i_loss(flow[0], ids, pads, *flow[1:])
    torch.testing.assert_close(loss, (queries + model.flow_loss(words, *flow)) / 2)
    loss.backward()
    assert model.meta_queries.grad.norm() > 0 and all(p.grad is None for p in model.lmm.parameters())

# ---------------------------------------------------------------------------------------------------------------------
# the sampler

def test_sampler(monkeypatch):
    g, config, model = case("sample")
    ids, pads = left_padded(g["ids"], g["attention_mask"])
    s, zs, times = config["sampling"], [], []
    step, forward = model_openuni.solver_step, model.transformer.forward
    monkeypatch.setattr(model_openuni, "solver_step", lambda *a: zs.append(step(*a)) or zs[-1])
    monkeypatch.setattr(model.transformer, "forward", lambda z, t, x: times.append(t[0]) or forward(z, t, x))
    with torch.no_grad():
        z = model.sample(model.condition(ids, pads), g["latents"], s["cfg_scale"], s["num_steps"])
        image = model.decode_latents(z)
    sigmas = torch.tensor(sampling_sigmas(s["num_steps"], config["scheduler"]["test"]["flow_shift"]))
    compare(("sample.timesteps", torch.stack(times).long(), g["timesteps"]), ("sample.sigmas", sigmas, g["sigmas"]),
            ("sample.step_latents", torch.stack(zs), g["step_latents"]), ("sample.image", image, g["image"]),
            factor=SAMPLER)
    levels = torch.from_numpy(vision_encoder.to_uint8(image)).permute(0, 3, 1, 2).int() - g["image_u8"].int()
    assert levels.abs().max() <= 1

def test_solver_is_exact_where_the_image_is_a_line_in_log_snr():
    """Of second order: between the first step and the last it makes no error then, at any spacing."""
    def image(sigma):
        return 3.0 + 0.5 * (math.log(1 - sigma) - math.log(sigma))
    sigmas = sampling_sigmas(9, 3.0)
    for last, now, after in zip(sigmas, sigmas[1:], sigmas[2:-1]):
        fine = torch.linspace(math.log(1 / now - 1), math.log(1 / after - 1), 4001, dtype=torch.float64)
        # z / sigma changes by the integral of e^lambda * image
        area = torch.trapezoid(fine.exp() * (3.0 + 0.5 * fine), fine)
        z = torch.tensor(1.0, dtype=torch.float64)
        want = after * (z / now + area)
        got = model_openuni.solver_step(z, image(now), image(last), (last, now, after))
        first = model_openuni.solver_step(z, image(now), None, (last, now, after))
        assert abs(got - want) < 0.3 * abs(first - want)

# ---------------------------------------------------------------------------------------------------------------------
# the text interface, on a tiny model from scratch

@lru_cache(maxsize=None)
def small():
    torch.manual_seed(0)
    return OpenUni(CONFIGS["tiny"], load_tokenizer("tiny")).eval()

def row(part, **sample):
    """Ids of the row of one sample, without padding."""
    out = small().collate(part, [sample], [torch.Generator()], torch.Generator(), 0)
    return out["ids"][0, out["pads"][0]:].tolist()

TURN, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|>" + 9 * "<|image_pad|>" + "<|vision_end|>\n"

def test_prompts():
    """<img> (here <|vision_start|>) ends every request for a picture; a request that is too long loses its own end, a
    caption, as published, that of the row."""
    encode, c = small().tokenizer.encode, CONFIGS["tiny"]
    empty = TURN + "{}Generate an image." + ANSWER + "<|vision_start|>"
    assert row("t2i", caption=" a red star ") == encode(f"{TURN}Generate an image: a red star{ANSWER}<|vision_start|>")
    assert row("uncond", drop=True) == row("t2i", caption="x", drop=True) == encode(empty.format(""))
    for part, name in (("recon", "prompt"), ("edit", "instruction")):
        assert row(part, **{name: "Make it red."}) == encode(f"{TURN}{IMAGE}Make it red.{ANSWER}<|vision_start|>")
        assert row(part, **{name: "x"}, drop=True) == encode(empty.format(IMAGE))
        long = row(part, **{name: "red " * 200})
        end = encode(ANSWER + "<|vision_start|>")
        assert len(long) == c.max_prompt + 11 and long[-len(end):] == end and long[:14] == encode(TURN + IMAGE)[:14]
    assert row("t2i", caption="red " * 200) == encode(f"{TURN}Generate an image: {'red ' * 200}")[:c.max_prompt]

def test_dialogues(monkeypatch):
    encode, turns = small().tokenizer.encode, [("Why?", "red"), ("What?", "two")]
    said = f"Why?{ANSWER}red<|im_end|>\n{TURN}What?{ANSWER}two<|im_end|>\n"
    assert row("i2t", turns=turns) == encode(TURN + IMAGE + said) and row("text", turns=turns) == encode(TURN + said)
    monkeypatch.setattr(small().config, "system", "be red")
    assert row("text", turns=turns) == encode(f"<|im_start|>system\nbe red<|im_end|>\n{TURN}{said}")
    assert row("recon", prompt="Why?")[:3] == encode(TURN)[:3]  # requests for pictures have none

def test_edits_see_the_source_and_draw_the_target(monkeypatch):
    model, got = small(), {}
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    monkeypatch.setattr(model, "reca_loss", lambda **tensors: got.update(tensors) or torch.zeros(()))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    batch = model.collate("edit", [{"instruction": "More."}] * 2, generators, torch.Generator())
    for stage in ("reca", "base"):
        model.trainable_parameters(stage)
        source, target = model.precompute(images), model.precompute(-images)
        model({"edit": batch | target | {f"source_{k}": v for k, v in source.items()}})
        model.trainable_parameters("reca")
        assert torch.equal(got["latents"], target["latents"]) and torch.equal(got["noise"], batch["noise"])
        error = (got["features"] - model.precompute(images)["features"]).abs().max()
        assert error <= 1e-2 * (stage == "base")  # where pixels are rounded to bytes
    drawn = [torch.Generator().manual_seed(i) for i in range(2)]  # a sample draws its time, then its noise
    assert batch["u"].tolist() == [torch.rand((), generator=g).item() for g in drawn]
    assert torch.equal(batch["noise"], torch.stack([torch.randn(16, 3, 3, generator=g) for g in drawn]))

def test_preprocessing():
    """Drawings are of a square from the middle, questions about all of the picture."""
    image = Image.new("RGB", (96, 48), "white")
    image.paste("black", (0, 0, 24, 48))
    assert small().preprocess(image, "recon").min() == 1 and small().preprocess(image, "answer")[:, :, :10].max() == -1
    assert small().preprocess(image, "t2i").shape == (3, 48, 48)

# ---------------------------------------------------------------------------------------------------------------------
# published files

PARTS = {"vit": "lmm.vision_model.", "llm": "lmm.language_model.", "mlp1": "lmm.mlp1.", "connector": "connector.",
         "projector": "projector.", "queries": "meta_queries", "dit": "transformer.", "vae": "vae."}
MILLIONS = {"openuni-b-512": (304, 630, 4.5, 52.4, 2.07, 0.23, 592, 312),
            "openuni-l-512": (304, 1776, 8.7, 222, 3.54, 0.39, 1604, 312),
            "openuni-l-1024": (304, 1776, 8.7, 222, 3.54, 0.39, 1605, 312)}

@pytest.mark.parametrize("size", MILLIONS)
def test_keys_and_numbers_of_parameters(size):
    with torch.device("meta"):
        model = OpenUni(CONFIGS[size])
    with gzip.open(os.path.join(HERE, "golden", "keys", f"{size}.keys.json.gz")) as f:
        want = json.load(f)
    state = model.state_dict()
    assert {k: list(t.shape) for k, t in state.items()} == want
    for (part, prefix), millions in zip(PARTS.items(), MILLIONS[size]):
        n = sum(t.numel() for k, t in state.items() if k.startswith(prefix)) / 1e6
        assert abs(n - millions) <= 0.011 * millions, (part, n)
    trained = {name for name, _ in model.trainable_parameters("reca")}
    assert trained == {k for k in state if not k.startswith(("lmm.", "vae."))}
    assert model.seen == 256 and model.stride == 32 and model.marks == (0, 1, 2, 3, 4)

def files(folder, weights, **parts):
    """Writes {name: prefixes} of golden weights, where there is but one prefix without it -> {name: path}."""
    out = {}
    for name, prefixes in parts.items():
        state = {k: t for k, t in weights.items() if k.startswith(tuple(prefixes))}
        if len(prefixes) == 1:
            state = {k.removeprefix(prefixes[0]): t for k, t in state.items()}
        out[name] = str(folder / f"{name}.safetensors")
        save_file(state, out[name])
    return out

def test_published_files_lie_over_each_other(tmp_path, capsys):
    """OpenUni's file lacks what it did not train, and RecA's lies over it; what is nowhere, or does not fit, is told in
    one line."""
    _, _, model = golden()
    weights, own = load_file(os.path.join(GOLDEN, "weights.safetensors")), ("meta_queries", "connector.", "projector.")
    path = files(tmp_path, weights, first=own, sana=["transformer."], internvl=["lmm."], dcae=["vae."])
    reca = {k: t + 1 for k, t in weights.items() if k.startswith((*own, "transformer."))}
    path["reca"] = str(tmp_path / "reca.pth")
    torch.save({"state_dict": reca}, path["reca"])
    frozen = dict(config=model.config, vision_path=path["internvl"], tokenizer_path=path["dcae"])

    def load(first, *rest):
        capsys.readouterr()
        return OpenUni.load_published(path[first], **frozen, rest=[path[name] for name in rest]).state_dict()
    got = load("first", "sana")
    assert got.keys() == weights.keys() and all(torch.equal(t, got[k]) for k, t in weights.items())
    n = sum(k.startswith("transformer.") for k in weights)
    assert f"{path['sana']}: {n} of {n} tensors (transformer)" in capsys.readouterr().err
    got = load("reca", "first", "sana")
    assert all(torch.equal(reca.get(k, t), got[k]) for k, t in weights.items())
    said = capsys.readouterr().err
    assert f"{path['first']}: 0 of " in said and f"{path['sana']}: 0 of {n} tensors" in said and "state_dict" in said
    with pytest.raises(ValueError, match=r"first.safetensors: no transformer\.\* .*SANA's .*--rest-ckpt$"):
        load("first")
    frozen["vision_path"] = None
    with pytest.raises(ValueError, match=r"reca.pth: no lmm\.\* .*InternVL3's folder with --vision-ckpt$"):
        load("reca")
    load("reca", "internvl")
    frozen["vision_path"] = path["internvl"]
    save_file({k: t for k, t in load_file(path["sana"]).items() if k != "proj_out.bias"}, path["sana"])
    with pytest.raises(ValueError, match=r"^[^;]*sana.safetensors: .* 1 missing\), first missing transformer.proj_out"):
        load("first", "sana")

def test_files_reach_the_model_from_the_command_line(tmp_path, monkeypatch):
    """Those of --rest-ckpt as well, but for models whose --ckpt leaves nothing out."""
    _, _, model = golden()
    weights = load_file(os.path.join(GOLDEN, "weights.safetensors"))
    path = files(tmp_path, weights, first=["meta_queries", "connector.", "projector."], sana=["transformer."],
                 internvl=["lmm."], dcae=["vae."])
    monkeypatch.setitem(CONFIGS, "golden", model.config)
    monkeypatch.setattr(checkpoint, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(model.config, "tokens", CONFIGS["tiny"].tokens)
    got = checkpoint.load_model("openuni", path["first"], "golden", path["dcae"], "tiny", vision_ckpt=path["internvl"],
                                rest=[path["sana"]])
    assert all(torch.equal(t, weights[k]) for k, t in got.state_dict().items())
    with pytest.raises(ValueError, match="^--rest-ckpt x: the --ckpt of --arch mar leaves nothing out"):
        checkpoint.load_model("mar", path["first"], "harmon-0.5b", None, "tiny", rest=["x"])

def test_a_run_folder_of_a_published_size_says_which_autoencoder():
    """Two kinds fit into the field: the one whose fields these are."""
    for name in ("tiny", "openuni-b-512"):
        again = checkpoint.from_dict(OpenUniConfig, json.loads(json.dumps(asdict(CONFIGS[name]))))
        assert again == CONFIGS[name] and type(again.vae) is type(CONFIGS[name].vae)
    for vae in (3, None, {"z_channels": 16}):
        with pytest.raises(ValueError, match="config.json: DCAutoencoderConfig"):
            checkpoint.from_dict(OpenUniConfig, json.loads(json.dumps(asdict(CONFIGS["tiny"]))) | {"vae": vae})
