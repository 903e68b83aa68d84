"""BAGEL against numbers from the published implementation: every stage at the tolerance at which two correct float32
programs agree.

PARITY_DIR=folder replaces tests/golden (folder/bagel/{config.json, weights.safetensors, ae.safetensors,
cases.safetensors}, any sizes)."""
import gzip
import json
import math
import os
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

import model_diffusion
from image_tokenizer import AutoencoderConfig
from model_diffusion import CONFIGS, IGNORE, Bagel, BagelConfig, layout
from text_tokenizer import load_tokenizer
from vision_encoder import SigLIPConfig, bagel_resize, bagel_size, grid_ids, patchify, to_pixels

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "bagel")
TIGHT, SAMPLER = 2e-5, 1e-4  # factors on max(1, max|reference|)

@lru_cache(maxsize=None)
def golden():
    """-> (config.json, cases, model with the golden weights)."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors", "ae.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        config = json.load(f)
    l, v, a, b, s = (config[k] for k in ("llm_config", "vit_config", "vae_config", "bagel_config", "special_tokens"))
    c = BagelConfig(
        vocab_size=l["vocab_size"], hidden_size=l["hidden_size"], intermediate_size=l["intermediate_size"],
        num_layers=l["num_hidden_layers"], num_heads=l["num_attention_heads"], num_kv_heads=l["num_key_value_heads"],
        rope_theta=l["rope_theta"], rms_norm_eps=l["rms_norm_eps"],
        special=(s["bos_token_id"], s["eos_token_id"], s["start_of_image"], s["end_of_image"]),
        latent_patch_size=b["latent_patch_size"], max_latent_size=b["max_latent_size"],
        vit=SigLIPConfig(width=v["hidden_size"], layers=v["num_hidden_layers"] + 1 + config["vit_select_layer"],
                         heads=v["num_attention_heads"], mlp_width=v["intermediate_size"], patch=v["patch_size"],
                         positions=b["vit_max_num_patch_per_side"], eps=v["layer_norm_eps"]),
        vae=AutoencoderConfig(ch=a["ch"], ch_mult=tuple(a["ch_mult"]), num_res_blocks=a["num_res_blocks"],
                              z_channels=a["z_channels"], resolution=a["resolution"], encoder_attn_resolutions=(),
                              decoder_attn_resolutions=(), quant_conv=False, scale=a["scale_factor"],
                              shift=a["shift_factor"]))
    model = Bagel.load_published(os.path.join(GOLDEN, "weights.safetensors"), c, os.path.join(GOLDEN, "ae.safetensors"))
    return config, load_file(os.path.join(GOLDEN, "cases.safetensors")), model

def case(name):
    """Tensors of one case without their prefix, config.json and the model in its initial state; skips by name where the
    folder lacks the case."""
    config, cases, model = golden()
    g = {k[len(name) + 1:]: v for k, v in cases.items() if k.startswith(name + ".")}
    if not g:
        pytest.skip(f"no case {name} in {GOLDEN}")
    model.trainable_parameters("base")
    model.zero_grad(set_to_none=True)
    model.config.timestep_shift = config["train_timestep_shift"].get(name, 1.0)
    return g, config, model

def is_generation(name):
    return "_moe_gen" in name or name.split(".")[0] in ("vae2llm", "llm2vae", "time_embedder")

class Report:
    """Collects comparisons and fails with the whole table."""

    def __init__(self):
        self.lines, self.good = [], True

    def close(self, name, got, want, factor=TIGHT):
        got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).double()
        if got.shape != want.shape:
            return self.add(name, False, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        allowed = factor * max(1.0, want.abs().max().item())
        worst = (got - want).abs().max().item()
        self.add(name, worst <= allowed, f"max difference {worst:.3g}, allowed {allowed:.3g}")  # nan fails

    def equal(self, name, got, want):
        got, want = torch.as_tensor(got), torch.as_tensor(want)
        same = got.shape == want.shape and bool((got == want).all())
        self.add(name, same, f"{got.flatten()[:8].tolist()} / {want.flatten()[:8].tolist()}")

    def add(self, name, ok, text):
        self.good &= ok
        self.lines.append(f"{name:90s} {'OK' if ok else 'NOT OK':6s} {text}")

    def done(self):
        if os.environ.get("PARITY_VERBOSE"):
            print("\n" + "\n".join(self.lines))
        assert self.lines, "nothing was compared"
        assert self.good, "\n" + "\n".join(self.lines)

def latent_tokens(model, latents):
    """(..., C, H, W) -> (..., h*w, P); an odd row or column is cut off."""
    p = model.config.latent_patch_size
    return patchify(latents[..., :latents.shape[-2] // p * p, :latents.shape[-1] // p * p], p)

def segments(g, model):
    """The published packed batch -> our samples (lists of segments), and the published index of each of our tokens
    [understanding | generation]."""
    c, at, split, samples, understanding = model.config, 0, 0, [], []
    vae = g.get("packed_vae_token_indexes", torch.zeros(0)).tolist()
    vit = g.get("packed_vit_token_indexes", torch.zeros(0)).tolist()
    text = dict(zip(g["packed_text_indexes"].tolist(), g["packed_text_ids"].tolist()))
    lost = set(g.get("ce_loss_indexes", torch.zeros(0)).tolist())
    sizes = iter(g["patchified_vae_latent_shapes"].tolist() if vae else [])
    places = dict(zip(vit, g["packed_vit_position_ids"].tolist() if vit else []))
    for length in g["sample_lens"].tolist():
        end, sample = at + length, []
        while at < end:
            n, mode = g["split_lens"][split].item(), g["attn_modes"][split].item()
            if mode == 0:
                kind = "answer" if lost & set(range(at, at + n)) else "text"
                sample.append((kind, [text[i] for i in range(at + 1, at + n - 1)]))
            elif at + 1 in places:
                last = places[at + n - 2]
                sample.append(("vit", (last // c.vit.positions + 1, last % c.vit.positions + 1)))
            else:
                sample.append(("noise" if mode == 2 else "clean", tuple(next(sizes))))
            inner = [] if at + 1 in vae else list(range(at + 1, at + n - 1))
            # our images begin with both markers
            understanding += [at, *inner, at + n - 1] if mode == 0 else [at, at + n - 1, *inner]
            at, split = at + n, split + 1
        samples.append(sample)
    return samples, torch.tensor(understanding + vae)

def names_of(row):
    return [name for name in ("und", "gen") if name + "_pos" in row]

def side_by_side(c, samples):
    """The rows that `layout` makes of single samples, packed into one, as the published program trains."""
    rows, columns = [layout(c, [sample]) for sample in samples], {}
    keys = images = features = 0
    inverse = {"und": [], "gen": []}
    for row in rows:
        own = sum(row[name + "_pos"].shape[1] for name in names_of(row))
        place = row["order"][0].argsort() if "order" in row else torch.arange(own)  # key in memory of each token
        inverse["und"].append(place[:row["ids"].shape[1]] + keys)
        inverse["gen"].append(place[row["ids"].shape[1]:] + keys)
        for name in names_of(row):
            row[name + "_lo"], row[name + "_hi"] = row[name + "_lo"] + keys, row[name + "_hi"] + keys
        row["ids"] = row["ids"] + features * (row["ids"] >= c.vocab_size)
        row.setdefault("labels", torch.full_like(row["ids"], IGNORE))
        if "gen_image" in row:
            row["gen_image"] = row["gen_image"] + images
            images = int(row["gen_image"].max()) + 1
        keys, features = keys + own, features + row.get("vit_grid", torch.zeros(1, 0)).shape[1]
        for key in set(row) - {"order", "start", "rope"}:
            columns.setdefault(key, []).append(row[key])
    out = {key: torch.cat(parts, 1) for key, parts in columns.items()}
    if bool((out["labels"] == IGNORE).all()):
        del out["labels"]
    return {**out, "order": torch.cat(inverse["und"] + inverse["gen"]).argsort()[None]}

def dense_mask(row):
    """[understanding | generation] x the same, bool, of a packed row: the intervals, less the noisy images seen by what
    follows them, which is no interval any more (multi-turn editing)."""
    place, names = row["order"][0].argsort(), names_of(row)  # key in memory of each token
    k = torch.arange(len(place))
    seen = torch.cat([(k >= row[n + "_lo"][0][:, None]) & (k < row[n + "_hi"][0][:, None]) for n in names])
    noisy = row["gen_noisy"][0].bool() if "gen_noisy" in row else torch.zeros(0, dtype=torch.bool)
    for image in row["gen_image"][0][noisy].unique() if noisy.any() else ():
        keys = place[row["ids"].shape[1]:][row["gen_image"][0] == image]
        first, end = keys.min() - 2, keys.max() + 1  # with its two markers
        outside = (place < first) | (place >= end)
        seen[:, first:end] &= ~outside[:, None]
    return seen[:, place]

@pytest.fixture
def packed(monkeypatch):
    """packed(name): everything a loss needs, from the published batch: row (tensors of layout) and images; with the
    layout compared on the way. Where the mask is no interval, attention gets it dense; the model makes no such rows."""
    def attend(q, k, v, lo, hi, plan):
        if isinstance(plan, torch.Tensor):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=plan, enable_gqa=True)
        return attention(q, k, v, lo, hi, plan)

    attention = model_diffusion.attention

    def make(name):
        g, config, model = case(name)
        report = Report()
        samples, ours = segments(g, model)
        row = side_by_side(model.config, samples)
        position = torch.cat([row[n + "_pos"][0] for n in names_of(row)])
        report.equal(f"{name}.packed_position_ids", position, g["packed_position_ids"][ours])
        mask = dense_mask(row)
        report.equal(f"{name}.mask", mask, g["mask"][ours][:, ours].bool())
        if name == "multi":
            view, (und, gen) = model.view, mask[:, row["order"][0]].tensor_split([row["ids"].shape[1]])
            monkeypatch.setattr(model_diffusion, "attention", attend)
            monkeypatch.setattr(model, "view", lambda *a, **k: replace(view(*a, **k), plans=[und[None], gen[None]]))
        images = {}
        if "packed_vit_tokens" in g:
            report.equal(f"{name}.packed_vit_position_ids", row["vit_grid"][0], g["packed_vit_position_ids"])
            ids = g["packed_vit_position_ids"]
            images["features"] = see(model, g["packed_vit_tokens"], ids, g["vit_token_seqlens"])[None]
        if "padded_images" in g:
            report.equal(f"{name}.packed_latent_position_ids", row["gen_grid"][0], g["packed_latent_position_ids"])
            with torch.no_grad():
                latent = model.vae.encode(g["padded_images"], g["vae_eps"])  # unequal pictures on one gray canvas
            report.close(f"{name}.padded_latent", latent, g["padded_latent"])
            p, shapes = model.config.latent_patch_size, g["patchified_vae_latent_shapes"].tolist()
            tokens = [latent_tokens(model, x[:, :h * p, :w * p]) for x, (h, w) in zip(latent, shapes)]
            images["latents"] = torch.cat(tokens)[None]
            first = torch.tensor([0] + [h * w for h, w in shapes[:-1]]).cumsum(0)
            images["noise"], images["u"] = g["noise"][None], g["packed_timesteps"][first][None]
        return g, config, model, report, row, images, ours

    return make

def see(model, patches, ids, seqlens):
    """SigLIP features (N, width) of pictures of any sizes, side by side, each by itself."""
    pictures = zip(patches.split(seqlens.tolist()), ids.split(seqlens.tolist()))
    return torch.cat([model.vit_model(x[None], i)[0] for x, i in pictures])

def published_order(x, ours):
    """Rows of ours in the published sequence."""
    out = torch.empty_like(x)
    out[ours] = x
    return out

def norms(model, report, name, want, only=lambda n: True):
    own = dict(model.named_parameters())
    norm = lambda n: 0.0 if own[n].grad is None else own[n].grad.norm()
    for key, value in want.items():
        if key.startswith("grad_norm.") and only(key[10:]):
            report.close(f"{name}.{key}", norm(key[10:]), value)
        elif key.startswith("grad."):
            report.close(f"{name}.{key}", own[key[5:]].grad, value)
    return torch.stack([torch.as_tensor(norm(n)) for n in own]).norm()

# ---------------------------------------------------------------------------------------------------------------------
# parts

def test_autoencoder():
    g, _, model = case("vae")
    report = Report()
    with torch.no_grad():
        given = g["decode.in"].clone()
        report.close("vae.encode.moments", model.vae.moments(g["encode.in"]), g["encode.moments"])
        report.close("vae.encode.out", model.vae.encode(g["encode.in"], g["encode.eps"]), g["encode.out"])
        report.close("vae.decode.out", model.vae.decode(given), g["decode.out"])
        tokens = latent_tokens(model, given)
        grid = given.shape[2] // model.config.latent_patch_size, given.shape[3] // model.config.latent_patch_size
        report.close("vae.decode.out from tokens", model.decode_latents(tokens, grid), g["decode.out"])
        mean, logvar = model.vae.moments(g["encode.in"]).chunk(2, 1)
        moments = torch.cat([latent_tokens(model, mean), latent_tokens(model, logvar)], -1)
        latents = model.sample_latents(moments, latent_tokens(model, g["encode.eps"]))
        report.close("vae.encode.out as tokens", latents, latent_tokens(model, g["encode.out"]))
    report.equal("vae.decode.in untouched", given, g["decode.in"])
    report.done()

def test_vision():
    g, config, model = case("vit")
    report, outs, c = Report(), defaultdict(list), model.config
    pictures = [g["img0"], g["img1"]]
    patches = [patchify(x, c.vit.patch) for x in pictures]
    ids = [grid_ids(x.shape[1] // c.vit.patch, x.shape[2] // c.vit.patch, c.vit.positions) for x in pictures]
    seqlens = torch.tensor([len(x) for x in patches])
    report.equal("vit.patches", torch.cat(patches), g["patches"])
    report.equal("vit.position_ids", torch.cat(ids), g["position_ids"])
    report.equal("vit.seqlens", seqlens, g["seqlens"])
    hooks = [layer.register_forward_hook(lambda m, a, out, i=i: outs[f"layer{i}.out"].append(out[0]))
             for i, layer in enumerate(model.vit_model.vision_model["encoder"]["layers"])]
    with torch.no_grad():
        features = see(model, torch.cat(patches), torch.cat(ids), seqlens)
        outs = {name: torch.cat(out) for name, out in outs.items()}
        outs["out"], outs["connector.out"] = features, model.connector(features)
        outs["llm_in"] = outs["connector.out"] + model.vit_pos_embed(torch.cat(ids))
        for hook in hooks:
            hook.remove()
        own = model.see(g["img0"][None].clamp(-1, 1), (10_000, 1))[0]
        expected = model.vit_model(patchify(g["img0"][None].clamp(-1, 1), c.vit.patch), ids[0])
    for name, out in outs.items():
        if name in g:
            report.close(f"vit.{name}", out, g[name])
    report.close("vit features of a batch", own, expected)
    report.done()

def test_time_and_place():
    g, config, model = case("time")
    report = Report()
    report.close("time.sinusoid", model.time_embedder.features(g["t"]), g["sinusoid"])
    report.close("time.out", model.time_embedder(g["t"]), g["out"])
    weights = load_file(os.path.join(GOLDEN, "weights.safetensors"))
    for name in ("latent_pos_embed", "vit_pos_embed"):  # computed, not loaded
        report.close(name, getattr(model, name).pos_embed, weights[name + ".pos_embed"])
    g, _, model = case("latent")
    tokens = latent_tokens(model, g["in"][None])
    p = model.config.latent_patch_size
    ids = grid_ids(g["in"].shape[1] // p, g["in"].shape[2] // p, model.config.max_latent_size)
    report.equal("latent.patches", tokens[0], g["patches"])
    report.equal("latent.position_ids", ids, g["position_ids"])
    x = model.embed_latents(tokens, torch.tensor([[0.25]]), torch.zeros(1, len(ids), dtype=torch.long), ids[None])
    report.close("latent.llm_in", x[0], g["llm_in"])
    report.done()

def test_text():
    g, _, model = case("text")
    report, outs = Report(), []
    hooks = [layer.register_forward_hook(lambda m, a, out: outs.append(out[0][0][0]))
             for layer in model.language_model.model.layers]
    n = len(g["ids"])
    row = {"und_pos": torch.arange(n)[None], "und_lo": torch.zeros(1, n, dtype=torch.long),
           "und_hi": torch.arange(1, n + 1)[None]}
    with torch.no_grad():
        hidden, cache = model.language_model([model.embed(g["ids"][None])], model.view(row), keep=True)
    for hook in hooks:
        hook.remove()
    for i, out in enumerate(outs):
        report.close(f"text.layer{i}.out", out, g[f"layer{i}.out"])
    report.close("text.hidden", hidden[0][0], g["hidden"])
    report.close("text.logits", model.language_model.lm_head(hidden[0][0]), g["logits"])
    report.close("text.cache.k0", cache[0][0][0].transpose(0, 1), g["cache.k0"])
    report.close("text.cache.v0", cache[0][1][0].transpose(0, 1), g["cache.v0"])
    report.done()

# ---------------------------------------------------------------------------------------------------------------------
# losses

def test_understanding_loss(packed):
    g, _, model, report, row, images, ours = packed("und")
    places = g["ce_loss_indexes"]
    expected = torch.full((len(ours),), IGNORE).index_put((places,), g["packed_label_ids"])
    report.equal("und.labels", published_order(row["labels"][0], ours), expected)
    with torch.no_grad():
        und = model.embed(row["ids"], images["features"], row["vit_grid"])
        hidden = published_order(model.language_model([und], model.view(row))[0][0][0], ours)
        logits = model.language_model.lm_head(hidden[places])
    report.close("und.seq_in", published_order(und[0], ours), g["seq_in"])
    report.close("und.hidden", hidden, g["hidden"])
    report.close("und.logits", logits, g["logits"])
    report.close("und.ce", F.cross_entropy(logits, g["packed_label_ids"], reduction="none"), g["ce"])
    loss = model.i2t_loss(features=images["features"], **row)
    report.close("und.ce_mean", loss, g["ce_mean"])
    loss = model.i2t_loss(features=images["features"], count=torch.tensor(3.0), **row)
    report.close("und.ce_mean with count", loss, g["ce"].sum() / 3)
    report.done()

@pytest.mark.parametrize("name", ["t2i", "edit", "multi", "reca"])
def test_flow_forward(packed, name):
    """Every stored intermediate: input of the transformer, layers, hidden states of both experts, velocity."""
    g, _, model, report, row, images, ours = packed(name)
    x0, noise = images["latents"], images["noise"]
    layers = []
    hooks = [layer.register_forward_hook(lambda m, a, out: layers.append(torch.cat([x[0] for x in out[0]])))
             for layer in model.language_model.model.layers]
    with torch.no_grad():
        t = model.flow_time(images["u"])
        at = t.gather(1, row["gen_image"])[..., None]
        x_t = (1 - at) * x0 + at * noise
        und = model.embed(row["ids"], images.get("features"), row.get("vit_grid"))
        gen = model.embed_latents(x_t, t, row["gen_image"], row["gen_grid"])
        view = model.view(row)
        hidden = model.language_model([und, gen], view)[0]
        for hook in hooks:
            hook.remove()
        noisy = row["gen_noisy"][0].bool()
        v = model.velocity(und, x_t, t, row, view)[0, noisy]
    report.close(f"{name}.t", at[0, :, 0], g["t"])
    report.close(f"{name}.x_t", x_t[0], g["x_t"])
    report.close(f"{name}.seq_in", published_order(torch.cat([und[0], gen[0]]), ours), g["seq_in"])
    for i, out in enumerate(layers):
        if f"layer{i}.out" in g:
            report.close(f"{name}.layer{i}.out", published_order(out, ours), g[f"layer{i}.out"])
    report.close(f"{name}.hidden", published_order(torch.cat([h[0] for h in hidden]), ours), g["hidden"])
    report.close(f"{name}.v_pred", v, g["v_pred"])
    report.close(f"{name}.mse", (v - (noise - x0)[0, noisy]).square(), g["mse"])
    report.done()

@pytest.mark.parametrize("name", ["t2i", "edit", "multi"])
def test_flow_loss(packed, name):
    g, _, model, report, row, images, _ = packed(name)
    loss = model.t2i_loss(**images, **row)
    report.close(f"{name}.loss", loss, g["loss"])
    scaled = model.t2i_loss(**images, **row, count=torch.tensor(7.0))
    report.close(f"{name}.loss with count", scaled, g["mse"].mean(1).sum() / 7)
    if "grad_norm_total" in g:
        loss.backward()
        report.close(f"{name}.grad_norm_total", norms(model, report, name, g), g["grad_norm_total"])
    report.done()

def test_reca_loss(packed):
    """As RecA trains: the understanding stream detached; only the published set of parameters gets a gradient."""
    g, config, model, report, row, images, _ = packed("reca")
    trained = [n for n, _ in model.trainable_parameters("reca")]
    images["features"] = images["features"].detach()
    loss = model.reca_loss(**images, **row)
    loss.backward()
    report.close("reca.loss", loss, g["loss"])
    report.close("reca.grad_norm_total", norms(model, report, "reca", g), g["grad_norm_total"])
    moved = sorted(n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0)
    published = sorted(config["reca_params_with_gradient"])
    report.add("reca.params_with_gradient", moved == published, f"{len(moved)} / {len(published)}")
    report.add("reca.trainable_parameters", sorted(trained) == moved, f"{len(trained)} trained")
    report.done()

def test_reca_loss_through_the_understanding_stream(packed):
    """Without detaching, and with the understanding weights merely frozen: the gradients of the generation expert are
    those of the first, not of RecA."""
    g, config, model, report, row, images, _ = packed("reca")
    loose = {k[len("reca_nofreeze."):]: v for k, v in golden()[1].items() if k.startswith("reca_nofreeze.")}
    if not loose:
        pytest.skip(f"no case reca_nofreeze in {GOLDEN}")
    loss = model.reca_loss(**images, **row, context_grad=1.0)
    loss.backward()
    report.close("reca_nofreeze.loss", loss, g["loss"])
    total = norms(model, report, "reca_nofreeze", loose)
    report.close("reca_nofreeze.grad_norm_total", total, loose["grad_norm_total"])
    model.zero_grad(set_to_none=True)
    model.trainable_parameters("reca")
    model.reca_loss(**{**images, "features": images["features"].detach()}, **row, context_grad=1.0).backward()
    norms(model, report, "merely frozen", loose, is_generation)
    key = "grad_norm.language_model.model.layers.0.self_attn.k_norm_moe_gen.weight"
    assert key not in g or abs(g[key] - loose[key]) > 10 * TIGHT, "the two variants cannot be told apart in this set"
    report.done()

def test_packing_and_padding_agree(packed):
    """Samples in one packed row and in rows padded to the longest: the same loss, the same gradients."""
    g, _, model, report, row, images, _ = packed("reca")
    samples = segments(g, model)[0]
    model.trainable_parameters("reca")
    whole = model.reca_loss(**images, **row)
    whole.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    padded = layout(model.config, samples, pad_to=row["ids"].shape[1])

    def split(x, kind):
        """Images of a packed row -> a row for each sample, padded on the right."""
        sizes = [sum(s[1][0] * s[1][1] for s in sample if s[0] == kind) for sample in samples]
        return [part.flip(0) if kind == "noise" else part for part in x[0].split(sizes)]

    def rows(x):  # generation tokens are padded on the left
        return pad_sequence(split(x, "noise"), batch_first=True).flip(1)

    features = pad_sequence(split(images["features"], "vit"), batch_first=True)
    kwargs = dict(latents=rows(images["latents"]), noise=rows(images["noise"]), u=images["u"].T, features=features)
    loss = model.reca_loss(**kwargs, **padded)
    loss.backward()
    report.close("padded rows, loss", loss, whole)
    for n, p in model.named_parameters():
        if n in want:
            report.close(f"padded rows, {n}", p.grad, want[n])
    report.done()

# ---------------------------------------------------------------------------------------------------------------------
# inference

def natural(cache, h, w):
    """Keys or values that begin with an image (start, end, image tokens) in the published order: start, image, end."""
    return cache[:, [0, *range(2, h * w + 2), 1, *range(h * w + 2, cache.shape[1])]].transpose(0, 1)

def test_chat():
    g, config, model = case("chat")
    report, logits = Report(), []
    hook = model.language_model.lm_head.register_forward_hook(lambda m, a, out: logits.append(out))
    with torch.no_grad():
        report.equal("chat size", model.resized(g["image"][None], (10_000, 1), model.config.vit.patch)[0], g["image"])
        features, grid = model.see(g["image"][None], (10_000, 1))
        picture = model.context([[("vit", grid)]], features)
        report.close("chat.vit_cache.k0", natural(picture.kv[0][0][0], *grid), g["vit_cache.k0"])
        report.close("chat.vit_cache.v0", natural(picture.kv[0][1][0], *grid), g["vit_cache.v0"])
        question, short = [("vit", grid), ("text", g["prompt_ids"].tolist())], [("text", g["prompt_ids"].tolist()[:3])]
        cache = model.context([question], features)
        report.close("chat.prefill_cache.k_last", natural(cache.kv[-1][0][0], *grid), g["prefill_cache.k_last"])
        report.close("chat.prefill_cache.v_last", natural(cache.kv[-1][1][0], *grid), g["prefill_cache.v_last"])
        report.equal("chat.rope_after_prefill", cache.rope, g["rope_after_prefill"])
        ids = model.generate_tokens(cache, config["chat_max_length"])
        start = torch.tensor([model.config.special[0]])
        report.equal("chat.tokens", torch.cat([start, ids[0]])[:len(g["tokens"])], g["tokens"])
        report.close("chat.logits", torch.cat(logits)[:len(g["logits"])], g["logits"])
        logits.clear()
        batch = model.context([question, short, question], features.expand(3, -1, -1))  # rows padded on the left
        ids3 = model.generate_tokens(batch, config["chat_max_length"])
        several = torch.stack(logits)
        report.equal("chat.tokens in a batch", ids3[::2, :ids.shape[1]], ids.expand(2, -1))
        logits.clear()
        alone = model.generate_tokens(model.context([short]), ids3.shape[1])
        report.equal("chat.tokens of a padded row", ids3[1, :alone.shape[1]], alone[0])
        report.close("chat.logits of a padded row", several[:len(logits), 1], torch.cat(logits))
    hook.remove()
    report.done()

@pytest.fixture
def run_sampler(monkeypatch):
    def run(model, contexts, noise, grid, features=None, latents=None, **how):
        """-> final tokens, x before each step, velocity of each step (without the batch axis), the contexts' cache."""
        xs, vs, m = [], [], len(contexts)

        def velocity(context, x_t, *others):
            xs.append(x_t[:1])
            vs.append(Bagel.velocity(model, context, x_t, *others))
            return vs[-1]

        def guided(*velocities, **settings):
            vs[-1] = guide(*velocities, **settings)
            return vs[-1]

        guide = model_diffusion.guide
        with monkeypatch.context() as patch:
            patch.setattr(model, "velocity", velocity)
            patch.setattr(model_diffusion, "guide", guided)
            cache = model.context(contexts, *(x if x is None else x.expand(m, -1, -1) for x in (features, latents)))
            x = model.sample(cache, noise[None], grid, **how)
        return x[0], torch.cat(xs), torch.cat(vs), cache

    return run

def sampler_settings(s):
    """The published number of steps counts points in time, one more than passes."""
    return dict(steps=s["num_timesteps"] - 1, shift=s["timestep_shift"], cfg=s["cfg_text_scale"],
                cfg_image=s["cfg_img_scale"], interval=tuple(s["cfg_interval"]), renorm_min=s["cfg_renorm_min"])

def token_grid(latent, model):
    return latent.shape[-2] // model.config.latent_patch_size, latent.shape[-1] // model.config.latent_patch_size

def test_text_to_image_sampler(run_sampler):
    g, config, model = case("gen")
    report, s = Report(), sampler_settings(config["sampler"])
    grid, text = token_grid(g["latent"], model), ("text", g["prompt_ids"].tolist())
    for renorm in ("global", "channel", "text_channel"):
        x, xs, vs, _ = run_sampler(model, [[text], []], g["noise"], grid, renorm=renorm, **s)
        report.close(f"gen.{renorm}.x0", x, g[f"{renorm}.x0"], SAMPLER)
        report.close(f"gen.{renorm}.v", vs, g[f"{renorm}.v"], SAMPLER)
        if f"{renorm}.x_traj" in g:
            report.close(f"gen.{renorm}.x_traj", xs, g[f"{renorm}.x_traj"], SAMPLER)
    vs = run_sampler(model, [[text]], g["noise"], grid, **{**s, "cfg": 1.0})[2]
    report.close("gen.nocfg.v0", vs[0], g["nocfg.v0"], SAMPLER)
    clamp = config["sampler_clamp"]
    base = {**config[clamp["base"]], **{k: v for k, v in clamp.items() if not isinstance(v, dict)}}
    for name in ("clamp_weak", "clamp_min"):
        how = {"renorm": base["cfg_renorm_type"], **sampler_settings({**base, **clamp[name]})}
        vs = run_sampler(model, [[text], []], g["noise"], grid, **how)[2]
        report.close(f"gen.{name}.v", vs, g[f"{name}.v"], SAMPLER)
    with torch.no_grad():
        image = model.decode_latents(g["global.x0"][None], grid)
    report.close("gen.image", image, g["image"])
    u8 = ((image[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    apart = int((u8.int() - g["image_u8"].int()).abs().max())
    report.add("gen.image_u8", apart <= 1, "at most one gray level apart, where rounding decides")
    report.done()

def test_editing_sampler(run_sampler):
    g, config, model = case("genedit")
    report, c = Report(), model.config
    with torch.no_grad():
        latent = model.vae.encode(g["image_vae"][None], g["vae_eps"])
        clean, grid = latent_tokens(model, latent), token_grid(latent, model)
        vit = g["image_vit"].shape[1] // c.vit.patch, g["image_vit"].shape[2] // c.vit.patch
        features = model.vit_model(patchify(g["image_vit"][None], c.vit.patch), grid_ids(*vit, c.vit.positions))
    pictures, text = [("clean", grid), ("vit", vit)], ("text", g["prompt_ids"].tolist())
    first = model.context([[("clean", grid)]], None, clean)
    report.close("genedit.vae_cache.k0", natural(first.kv[0][0][0], *grid), g["vae_cache.k0"])
    report.close("genedit.vae_cache.v0", natural(first.kv[0][1][0], *grid), g["vae_cache.v0"])
    contexts = [[*pictures, text], pictures, [text]]
    for renorm in ("global", "text_channel"):
        how = {"renorm": renorm, **sampler_settings(config["sampler_edit"])}
        x, _, vs, cache = run_sampler(model, contexts, g["noise"], grid, features, clean, **how)
        report.close(f"genedit.{renorm}.x0", x, g[f"{renorm}.x0"], SAMPLER)
        report.close(f"genedit.{renorm}.v", vs, g[f"{renorm}.v"], SAMPLER)
    report.equal("genedit.rope", cache.rope, g["rope"])
    report.equal("genedit.kv_len", cache.kv[0][0].shape[2] - cache.start, g["kv_len"])
    report.done()

def test_reconstruction_sampler(run_sampler):
    g, config, model = case("recon")
    report, p = Report(), model.config.vit.patch
    h, w = g["image_vit"].shape[1] // p, g["image_vit"].shape[2] // p
    grid = token_grid(golden()[1]["gen.latent"], model)
    ids = grid_ids(h, w, model.config.vit.positions)
    features = model.vit_model(patchify(g["image_vit"][None], p), ids).detach()
    how = {**sampler_settings(config["sampler"]), "interval": (0.0, 1.0), "cfg_image": 1.0}
    contexts = [[("vit", (h, w)), ("text", g["prompt_ids"].tolist())], [("vit", (h, w))]]
    x, _, vs, _ = run_sampler(model, contexts, g["noise"], grid, features, **how)
    report.close("recon.x0", x, g["x0"], SAMPLER)
    report.close("recon.v", vs, g["v"], SAMPLER)
    report.done()

def test_preprocessing():
    g, config, _ = case("transform")
    report = Report()
    sizes = [[bagel_size(w, h, *limits) for w, h in g["wh"].tolist()] for limits in g["cases"].tolist()]
    report.equal("transform.new_wh", torch.tensor(sizes), g["new_wh"])
    picture = bagel_resize(Image.fromarray(g["image_u8"].numpy()), *config["transform_image_args"])
    report.close("transform.image_out", to_pixels(picture), g["image_out"])
    report.done()

# ---------------------------------------------------------------------------------------------------------------------
# the text interface, on a tiny model from scratch

class Words:
    """A stand-in for the text tokenizer: one id per word."""
    special = {"<|im_start|>": 60, "<|im_end|>": 61, "<|vision_start|>": 62, "<|vision_end|>": 63}

    def encode_ordinary(self, text):
        return [1 + sum(word.encode()) % 59 for word in text.split()]

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)

@lru_cache(maxsize=None)
def small():
    torch.manual_seed(0)
    model = Bagel(replace(CONFIGS["tiny"], vocab_size=64, num_layers=2, flow_steps=3), Words())
    torch.nn.init.normal_(model.llm2vae.weight, std=0.02)
    return model

def batch_of(model, part, n, cache):
    text = {"recon": {"prompt": "describe the image"}, "t2i": {"caption": "a red star and a circle"},
            "edit": {"instruction": "make it blue"}, "i2t": {"question": "what color is it", "answer": "red"},
            "text": {"question": "a red star what color", "answer": "red or not"}}[part]
    samples = [dict(text, drop=i == 1) for i in range(n)]
    for i, s in enumerate(samples):
        key = next(iter(text))
        s[key] = " ".join([s[key]] + ["x"] * i)  # rows of unequal length
    out = model.collate(part, samples, [torch.Generator().manual_seed(i) for i in range(n)], torch.Generator())
    for prefix in (["", "source_"] if part == "edit" else [""] if part != "text" else []):
        out.update({prefix + k: v[:n] if not prefix else v[:n].flip(0) for k, v in cache.items()})
    return out

def test_one_forward_for_all_parts():
    """Losses do not depend on how a batch is cut (DDP, accumulation), once `count` is the global one; and every
    parameter that trains gets a gradient."""
    model, images = small(), torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for stage, parts in (("base", ("t2i", "edit", "i2t", "text")), ("reca", ("recon", "t2i"))):
        named = model.trainable_parameters(stage)
        cache = model.precompute(images)
        batch = {part: batch_of(model, part, 4, cache) for part in parts}
        model.zero_grad(set_to_none=True)
        losses = model(batch)
        assert set(losses) == set(parts) and all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        assert not [n for n, p in named if p.grad is None], "trained, yet without gradient"
        assert not [n for n, p in model.named_parameters() if p.grad is not None and not p.requires_grad]
        for part in parts:
            whole, halves = batch[part], []
            counted = (whole["labels"] != IGNORE).sum() if "labels" in whole else whole["gen_noisy"].sum()
            assert whole["count"].shape == () and whole["count"].dtype == torch.float32 and whole["count"] == counted
            uncounted = model({part: {k: v for k, v in whole.items() if k != "count"}})[part]
            assert torch.equal(uncounted, losses[part]), part
            for rows in (slice(0, 2), slice(2, 4)):
                half = {k: v[rows] for k, v in whole.items() if k != "count"}
                halves.append(model({part: {**half, "count": counted / 2}})[part])
            assert abs(sum(halves) / 2 - losses[part]) < 1e-5, part

def test_forward_hands_each_part_its_own_images():
    """An edit reads the source (clean latents at time 0, features) and paints the target; a dropped text leaves no
    marker behind."""
    model, images = small(), torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    model.trainable_parameters("reca")
    batch, got = batch_of(model, "edit", 4, model.precompute(images)), {}
    model.t2i_loss = lambda **tensors: got.update(tensors) or torch.zeros(())
    try:
        model({"edit": batch})
    finally:
        del model.t2i_loss
    n = batch["noise"].shape[1] // 2
    assert torch.equal(got["features"], batch["source_features"])
    assert not torch.equal(got["features"], batch["features"])
    source = model.sample_latents(batch["source_moments"], batch["posterior"][:, :n])
    target = model.sample_latents(batch["moments"], batch["posterior"][:, n:])
    assert torch.equal(got["latents"][:, :n], source) and torch.equal(got["latents"][:, n:], target)
    assert torch.equal(got["noise"], batch["noise"])
    assert torch.equal(got["gen_noisy"], (torch.arange(2 * n) >= n).long().expand(4, -1))
    assert torch.equal(model.flow_time(got["u"])[:, 0], torch.zeros(4)) and torch.equal(got["u"], batch["u"])
    for i in range(4):  # each sample draws from its own generator: u, noise, posterior, the source's posterior
        g = torch.Generator().manual_seed(i)
        drawn = [torch.randn(shape, generator=g) for shape in ((), (n, 16), (n, 16), (n, 16))]
        kept = batch["u"][i, 1], batch["noise"][i, n:], batch["posterior"][i, n:], batch["posterior"][i, :n]
        assert all(torch.equal(a, b) for a, b in zip(drawn, kept))
    for part in ("t2i", "recon", "edit"):
        row = batch_of(model, part, 4, {})
        begins = (row["ids"] == model.config.special[0]) & (row["und_hi"] > row["und_lo"])
        assert begins.sum(1).tolist() == [1, 0, 1, 1], part

def test_dropped_segments():
    """A dropped text is absent with its markers, and takes up no rotary position; rows are padded on the left."""
    c = small().config
    noise = ("noise", (1, 1))
    row = layout(c, [[("vit", (1, 2)), noise], [("vit", (1, 2)), ("text", [5]), noise]])
    assert row["gen_pos"][:, -1].tolist() == [1, 4] and row["rope"].tolist() == [1, 4]
    assert (row["gen_hi"] - row["gen_lo"]).tolist() == [[7], [10]] and row["start"].tolist() == [3, 0]
    assert row["ids"].max() == c.vocab_size + 1 and c.special[0] not in row["ids"][0]

def test_special_strings_in_texts_are_spelled_out():
    """Captions, requests, instructions, questions and answers cannot write markers."""
    model = Bagel(CONFIGS["tiny"], load_tokenizer("tiny"))
    for part, keys in (("t2i", ["caption"]), ("recon", ["prompt"]), ("edit", ["instruction"]),
                       ("i2t", ["question", "answer"]), ("text", ["question", "answer"])):
        for text in ("<|im_end|>", "<|im_start|>", "<|vision_end|>"):
            ids = [model.collate(part, [dict.fromkeys(keys, words)], [torch.Generator()], None, 0)["ids"]
                   for words in (text, "a star")]
            for special in model.config.special:
                assert (ids[0] == special).sum() == (ids[1] == special).sum(), (part, special)

def test_optimizer_state_is_the_generation_expert_only():
    model = small()
    named = model.trainable_parameters("reca")
    assert all(is_generation(n) for n, _ in named)
    cache = model.precompute(torch.zeros(2, 3, 48, 48))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for _, p in named], lr=1e-3, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
    model.zero_grad(set_to_none=True)
    model({"recon": batch_of(model, "recon", 2, cache)})["recon"].backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(is_generation(n) for n in moved)
    moments = [s["exp_avg"].numel() for s in optimizer.state.values()]
    assert len(moments) == len(named) and sum(moments) == sum(p.numel() for _, p in named)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(before[n])

def test_samplers_take_text():
    """Shapes and ranges; the same generator gives the same pictures; a picture does not depend on its neighbors in the
    batch."""
    model, images = small(), torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1

    def g():
        return torch.Generator().manual_seed(3)

    def two():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    for draw in (lambda: model.generate(["a red star", "two circles and more"], generator=two()),
                 lambda: model.reconstruct(images, generator=two()),
                 lambda: model.edit(images, ["make it blue", "remove"], generator=two()),
                 lambda: model.generate(["a"], size=(32, 48), generator=g(), cfg=1.0)):
        out = draw()
        assert out.shape[1] == 3 and out.abs().max() <= 1 and torch.equal(out, draw())
    grid = (3, 3)
    noise = torch.randn(2, 9, 16, generator=g())
    contexts = [[("text", [3, 4])], [("text", [5, 6, 7, 8])], [], []]
    both = model.sample(model.context(contexts), noise, grid, cfg=3.0)
    alone = model.sample(model.context([contexts[0], []]), noise[:1], grid, cfg=3.0)
    assert torch.allclose(both[:1], alone, atol=1e-5)
    answers = model.answer(images, ["what", "how many are there"], max_new_tokens=3)
    assert len(answers) == 2 and all(isinstance(a, str) for a in answers)
    assert model.answer(images[1:], ["how many are there"], max_new_tokens=3) == answers[1:]

def test_thinking_adds_a_text():
    model = small()
    seen = []
    read, model.context = model.context, lambda samples, *a, **k: seen.append(samples) or read(samples, *a, **k)
    try:
        model.think = lambda samples, **k: Bagel.think(model, samples, max_new_tokens=2, **k)
        images = torch.zeros(1, 3, 48, 48)
        model.generate(["a star"], think=True, steps=1)
        model.edit(images, ["blue"], think=True, steps=1)
    finally:
        del model.context, model.think
    system = ("text", model.encode(model_diffusion.THINK_PAINT))
    star, blue = ("text", model.encode("a star")), ("text", model.encode("blue"))
    pictures = [("clean", (3, 3)), ("vit", (3, 3))]
    assert seen[0] == [[system, star]] and seen[1][1] == [system]
    assert seen[1][0][:2] == [system, star] and len(seen[1][0]) == 3
    assert seen[2] == [[system, *pictures, blue]] and seen[3][1:] == [[system, *pictures], [system, blue]]
    assert len(seen[3][0]) == 5

# ---------------------------------------------------------------------------------------------------------------------
# published files

def keys(name):
    with gzip.open(os.path.join(HERE, "golden", "keys", f"{name}.keys.json.gz"), "rt") as f:
        return {k: tuple(v) for k, v in json.load(f).items()}

def test_keys_of_bagel_7b_mot():
    """The published keys and shapes, 14.6 B parameters, of which RecA trains 6.54 B."""
    with torch.device("meta"):
        model = Bagel(CONFIGS["bagel-7b-mot"])
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert {k: v for k, v in state.items() if not k.startswith("vae.")} == keys("bagel-7b-mot")
    assert {k[4:]: v for k, v in state.items() if k.startswith("vae.")} == keys("flux-ae")
    total = sum(math.prod(v) for k, v in state.items() if not k.startswith("vae."))
    trained = sum(p.numel() for _, p in model.trainable_parameters("reca"))
    assert round(total / 1e9, 3) == 14.607 and round(trained / 1e9, 3) == 6.540

def test_keys_errors_are_tables(tmp_path):
    config, _, model = golden()
    weights, ae = load_file(os.path.join(GOLDEN, "weights.safetensors")), os.path.join(GOLDEN, "ae.safetensors")
    wrong = dict(weights)
    wrong["vae2llm.bias"], wrong["extra"] = wrong["vae2llm.bias"][:-1].clone(), torch.zeros(1)
    del wrong["llm2vae.bias"]
    save_file(wrong, str(tmp_path / "wrong.safetensors"))
    with pytest.raises(ValueError) as e:
        Bagel.load_published(str(tmp_path / "wrong.safetensors"), model.config, ae)
    assert all(s in str(e.value) for s in ("1 missing", "1 unexpected", "llm2vae.bias", "extra", "vae2llm.bias"))
    with pytest.raises(FileNotFoundError):
        Bagel.load_published(str(tmp_path), model.config, ae)
    (tmp_path / "ema.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match="ema.safetensors"):
        Bagel.load_published(str(tmp_path), model.config, ae)

def test_keys_load_into_the_wanted_dtype():
    _, _, model = golden()
    half = Bagel.load_published(os.path.join(GOLDEN, "weights.safetensors"), model.config,
                                os.path.join(GOLDEN, "ae.safetensors"), dtype=torch.bfloat16)
    kinds = defaultdict(set)
    for n, t in half.state_dict().items():
        kinds[n.startswith("vae.") or "pos_embed" in n].add(t.dtype)
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}
    noise = torch.zeros(1, 4, half.llm2vae.out_features)
    x = half.sample(half.context([[("text", [1, 2])], []]), noise, (2, 2), cfg=2.0, steps=2)
    assert torch.isfinite(x).all()
