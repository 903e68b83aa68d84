"""Harmon against numbers from the published implementation: every stage at the tolerance at which two correct float32 programs agree.

PARITY_DIR=folder replaces tests/golden (folder/harmon/{config.json, weights.safetensors, cases.safetensors}, any sizes)."""
import json
import os
import re
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from custom_kernels import add_noise
from image_tokenizer import AutoencoderConfig, load_strict
from model_mar import IGNORE, IMAGE, Harmon, HarmonConfig, Qwen2, kept_steps, noise_process, tables_on

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "harmon")
WHOLE, SINGLE, ROWS = (2e-5, None), (3e-6, None), (1e-4, 1e-3)  # factor on max(1, max|b|); per element: 1e-3 + 1e-4 |b|


@lru_cache(maxsize=None)
def golden():
    """-> (config.json, cases, model with the golden weights in eval mode)."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        config = json.load(f)
    cases = load_file(os.path.join(GOLDEN, "cases.safetensors"))
    v, l, m = config["vae"], config["llm"], config["mar"]
    model = Harmon(HarmonConfig(
        vocab_size=l["vocab_size"], hidden_size=l["hidden_size"], intermediate_size=l["intermediate_size"], num_layers=l["num_hidden_layers"],
        num_heads=l["num_attention_heads"], num_kv_heads=l["num_key_value_heads"], rope_theta=l["rope_theta"], rms_norm_eps=l["rms_norm_eps"],
        encoder_dim=m["encoder_embed_dim"], encoder_depth=m["encoder_depth"], encoder_heads=m["encoder_num_heads"], decoder_dim=m["decoder_embed_dim"],
        decoder_depth=m["decoder_depth"], decoder_heads=m["decoder_num_heads"], mlp_ratio=m["mlp_ratio"], buffer_size=m["buffer_size"],
        native_grid=m["img_size"] // m["vae_stride"] // m["patch_size"], patch_size=m["patch_size"], class_num=m["class_num"], dropout=m["attn_dropout"],
        diffloss_depth=m["diffloss_d"], diffloss_width=m["diffloss_w"], diffusion_batch_mul=m["diffusion_batch_mul"],
        num_sampling_steps=m["num_sampling_steps"], image_size=m["img_size"], mask_ratio_min=m["mask_ratio_min"], grad_scale=config["grad_scale"],
        vae=AutoencoderConfig(ch=v["ch"], ch_mult=tuple(v["ch_mult"]), num_res_blocks=v["num_res_blocks"], z_channels=v["embed_dim"], resolution=v["resolution"],
                              encoder_attn_resolutions=tuple(v["encoder_attn_resolutions"]), decoder_attn_resolutions=tuple(v["decoder_attn_resolutions"]),
                              scale=config["vae_scale"])))
    load_strict(model, load_file(os.path.join(GOLDEN, "weights.safetensors")), "golden weights")
    model.trainable_parameters("reca")
    return config, cases, model.eval()


def case(name):
    """Inputs, outputs (as dicts) and the model; skips by name where the folder lacks the case."""
    config, cases, model = golden()
    take = lambda kind: {k[len(f"{name}.{kind}."):]: v for k, v in cases.items() if k.startswith(f"{name}.{kind}.")}
    if not take("in") and not take("out"):
        pytest.skip(f"no case {name} in {GOLDEN}")
    return take("in"), take("out"), model


class Report:
    """Collects comparisons and fails with the whole table."""

    def __init__(self):
        self.lines, self.good = [], True

    def close(self, name, got, want, tolerance):
        got, want = torch.as_tensor(got).detach().double(), torch.as_tensor(want).double()
        factor, absolute = tolerance
        if got.shape != want.shape:
            self.add(name, False, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            return
        allowed = absolute + factor * want.abs() if absolute else torch.full_like(want, factor * max(1.0, want.abs().max().item()))
        difference = (got - want).abs()
        worst = (difference / allowed).argmax() if want.numel() else 0
        ok = bool((difference <= allowed).all())  # nan fails
        self.add(name, ok, f"max difference {difference.flatten()[worst].item():.3g}, allowed {allowed.flatten()[worst].item():.3g}" if want.numel() else "empty")

    def equal(self, name, got, want):
        self.add(name, got.shape == want.shape and bool((got == want).all()), f"{got.flatten()[:8].tolist()} / {want.flatten()[:8].tolist()}")

    def add(self, name, ok, text):
        self.good &= ok
        self.lines.append(f"{name:60s} {'OK' if ok else 'NOT OK':6s} {text}")

    def done(self):
        if os.environ.get("PARITY_VERBOSE"):
            print("\n" + "\n".join(self.lines))
        assert self.good, "\n" + "\n".join(self.lines)


def left(mask, *tensors):
    """Right-padded rows (B, W) with their mask -> the same rows left-padded, and the number of pads."""
    pads = (mask == 0).sum(1)
    index = (torch.arange(mask.shape[1]) - pads[:, None]) % mask.shape[1]
    return [t.gather(1, index) for t in tensors] + [pads]


def right(x, pads):
    """Left-padded rows (B, W, ...) -> right-padded, zeros at the pads, as the golden numbers have them."""
    W = x.shape[1]
    rows = torch.stack([row.roll(-int(p), 0) for row, p in zip(x, pads)])
    valid = torch.arange(W) < (W - pads[:, None])
    return rows * valid.view(*valid.shape, *[1] * (x.ndim - 2))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def check_gradients(report, name, grads, out):
    for key, want in out.items():
        if key.startswith("gradnorm."):
            report.close(f"{name}.{key}", grads[key[9:]].norm(), want, WHOLE)
        elif key.startswith("grad."):
            report.close(f"{name}.{key}", grads[key[5:]], want, WHOLE)


def generation_inputs(model, given):
    """The golden randomness covers all tokens in raster order; ours only the masked ones, in the order of `order`."""
    latents = model.precompute(given["image"])["latents"]
    b, L = given["orders"].shape
    M = model.config.diffusion_batch_mul
    k = int(torch.ceil(L * given["mask_rate"]))
    masked = given["orders"][:, :k]
    t = given["t"].view(M, b, L).transpose(0, 1).gather(2, masked[:, None].expand(-1, M, -1))
    noise = given["noise"].view(M, b, L, -1).transpose(0, 1)
    noise = noise.gather(2, masked[:, None, :, None].expand(-1, M, -1, noise.shape[-1]))
    ids, pads = left(given["attention_mask"], given["input_ids"])
    return dict(latents=latents, ids=ids, pads=pads, order=given["orders"], t=t, noise=noise), masked


def record(monkeypatch, target, name):
    """Lets target.name run as before and keeps (args, result) of every call."""
    calls, original = [], getattr(target, name)

    def wrapped(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    monkeypatch.setattr(target, name, wrapped)
    return calls


def raster(z, visible, masked):
    """Decoder output in the order [visible, masked] -> raster order."""
    order = torch.cat([visible, masked], 1)[..., None].expand_as(z)
    return torch.empty_like(z).scatter(1, order, z)


# ----------------------------------------------------------------------------------------------------------------------
# single modules


def test_vae():
    given, out, model = case("vae.encode")
    report = Report()
    with torch.no_grad():
        report.close("vae.encode.encoder", model.vae.encoder(given["image"]), out["encoder"], SINGLE)
        report.close("vae.encode.moments", model.vae.moments(given["image"]), out["moments"], SINGLE)
    report.close("vae.encode.latents", model.precompute(given["image"])["latents"], out["latents"], SINGLE)
    given, out, model = case("vae.decode")
    before = given["latents"].clone()
    report.close("vae.decode.image", model.decode_latents(given["latents"]), out["image"], SINGLE)
    report.equal("vae.decode leaves its argument alone", given["latents"], before)
    report.done()


@pytest.mark.parametrize("name", ["visual", "visual_native", "visual_rect", "visual_masked"])
def test_visual(name):
    given, out, model = case(name)
    visible = None
    if "mask" in given:
        V = int((given["mask"] == 0).sum(1)[0])
        visible = given["mask"].argsort(dim=1, stable=True)[:, :V]
    report = Report()
    with torch.no_grad():
        x, z = model.visual_features(given["latents"], visible)
    report.close(f"{name}.x_enc", x, out["x_enc"], SINGLE)
    report.close(f"{name}.z_enc", z, out["z_enc"], SINGLE)
    report.done()


def test_decoder():
    given, out, model = case("decoder")
    masks, _, _ = case("visual_masked")
    order, V = masks["mask"].argsort(dim=1, stable=True), given["x_enc"].shape[1] - model.config.buffer_size
    visible, masked = order[:, :V], order[:, V:].flip(1)  # any order of the masked tokens must do
    with torch.no_grad():
        z = model.mar.decode(given["x_enc"], visible, masked, masks["latents"].shape[1:3])
    report = Report()
    report.close("decoder.z", raster(z, visible, masked), out["z"], SINGLE)
    report.done()


def test_llm():
    given, out, model = case("llm")
    ids, pads = left(given["attention_mask"], given["input_ids"])
    with torch.no_grad():
        x = model.embed(ids)
        first = Qwen2.forward(_first_layer(model.llm), x, pads)[0]
        hidden, cache = model.llm(x, pads)
        logits = model.llm.lm_head(hidden)
        tail = model.llm(x, pads, keep=3)[0]
        split = model.llm(x[:, :5], pads)
        split = torch.cat([split[0], model.llm(x[:, 5:], pads, split[1])[0]], 1)
    report = Report()
    report.close("llm.hidden_after_layer1", right(first, pads), out["hidden_after_layer1"], SINGLE)
    report.close("llm.last_hidden", right(hidden, pads), out["last_hidden"], SINGLE)
    report.close("llm.logits", right(logits, pads), out["logits"], SINGLE)
    report.close("llm, last 3 positions only", tail, hidden[:, -3:], SINGLE)
    report.close("llm in two pieces with a cache", right(split, pads), out["last_hidden"], SINGLE)
    report.done()


def _first_layer(llm):
    """The decoder cut after its first layer, without the final norm."""
    cut = Qwen2.__new__(Qwen2)
    torch.nn.Module.__init__(cut)
    cut.config = replace(llm.config, num_layers=1)
    cut.model = torch.nn.ModuleDict({"layers": llm.model.layers[:1], "norm": torch.nn.Identity()})
    return cut


def test_diffloss():
    given, out, model = case("diffloss")
    loss = model.mar.diffloss
    report = Report()
    with torch.no_grad():
        x_t = add_noise(given["target"], given["noise"], given["t"], tables_on("", "cpu")[0])
        report.close("diffloss.x_t", x_t, out["x_t"], SINGLE)
        report.close("diffloss.net", loss.net(out["x_t"], given["t"], given["z"]), out["net"], SINGLE)
        report.close("diffloss.net, steps embedded from a table", loss.net(out["x_t"].repeat(30, 1), given["t"].repeat(30), given["z"].repeat(30, 1))[: len(x_t)],
                     out["net"], SINGLE)
        mse, vb = loss.loss_rows(given["z"][None], given["target"][None], given["t"][None, None], given["noise"][None, None])
    report.close("diffloss.mse_rows", mse, out["mse_rows"], WHOLE)
    report.close("diffloss.vb_rows", vb, out["vb_rows"], ROWS)
    report.close("diffloss.loss", ((mse + vb) * given["mask"]).sum() / given["mask"].sum(), out["loss"], ROWS)
    report.done()


def test_pstep100():
    given, out, model = case("pstep100")
    net, index = model.mar.diffloss.net, given["t_index"]
    report = Report()
    with torch.no_grad():
        predicted = net(given["x"], torch.tensor(tables_on("100", "cpu")[2])[index], given["z"])
        sample, mean, log_variance, x0 = model.mar.diffloss.step(predicted, given["x"], index, given["noise"], 0.8, "100")
    for name, got in (("mean", mean), ("log_variance", log_variance), ("pred_xstart", x0), ("sample_temp0.8", sample)):
        report.close(f"pstep100.{name}", got, out[name], WHOLE)
    report.done()


def test_dsample():
    given, out, model = case("dsample")
    noise, n = (given["init_noise"], given["step_noise"]), len(given["init_noise"])
    report = Report()
    report.close("dsample.cfg3_temp0.9", model.mar.diffloss.sample(given["z"], 0.9, 3.0, noise), out["cfg3_temp0.9"], WHOLE)
    noise = (noise[0], noise[1][:, :n])
    report.close("dsample.nocfg", model.mar.diffloss.sample(given["z"][:n], 1.0, 1.0, noise), out["nocfg"], WHOLE)
    report.done()


@pytest.mark.parametrize("name, spacing", [("train", ""), ("gen100", "100"), ("gen25", "25")])
def test_tables(name, spacing):
    _, cases, _ = golden()
    if f"tables.{name}.betas" not in cases:
        pytest.skip(f"no case tables.{name} in {GOLDEN}")
    report, tables = Report(), noise_process(spacing)
    for key, got in tables.items():
        want = cases[f"tables.{name}.{key}"]
        if key == "timestep_map":
            report.equal(f"tables.{name}.{key}", got, want)
        else:
            assert got.dtype == torch.float64
            report.close(f"tables.{name}.{key}", (got - want) / want.abs().clamp(min=1e-12), torch.zeros_like(want), (1e-12, 1e-9))
    report.done()


def test_generation_timestep_map():
    config, _, model = golden()
    assert kept_steps(model.config.num_sampling_steps) == config["gen_timestep_map"]


def test_schedule(monkeypatch):
    """The number of masked tokens before every sampler step, on a model that predicts nothing."""
    _, cases, model = golden()
    names = [k for k in cases if k.startswith("schedule.")]
    if not names:
        pytest.skip(f"no case schedule in {GOLDEN}")
    C, report = model.vae.config.z_channels, Report()
    for name in names:
        tokens, steps = (int(x) for x in re.match(r"schedule\.tokens(\d+)_iter(\d+)\.", name).groups())
        seen = []
        monkeypatch.setattr(model, "fuse", lambda latents, visible, pads, past=None: seen.append(tokens - visible.shape[1]))
        monkeypatch.setattr(model.mar, "decode", lambda x, visible, masked, grid: torch.zeros(1, tokens, 1))
        monkeypatch.setattr(model.mar.diffloss, "sample", lambda z, *a: torch.zeros(len(z), C))
        model.sample(torch.zeros(1, 2, model.config.hidden_size), torch.zeros(1, dtype=torch.long), (1, tokens), 1.0, steps)
        want = cases[name]
        if len(seen) < len(want):  # a step that predicts nothing is not run: the count before it is the one of the step after it
            report.add(name, len(want) - len(seen) == int((want[1:] == want[:-1]).sum()), "steps that predict nothing")
            want = torch.unique_consecutive(want)
        report.equal(name, torch.tensor(seen), want)
    report.done()


@pytest.mark.parametrize("name, how", [("und", "preprocess_pad"), ("recon", "preprocess_stretch")])
def test_preprocessing(name, how):
    given, out, _ = case(f"preproc.{name}")
    import data
    if not hasattr(data, how):
        pytest.skip(f"data.{how} is not there")
    image = Image.fromarray(given["image_uint8"].numpy())
    report = Report()
    report.close(f"preproc.{name}", getattr(data, how)(image, out["pixel_values"].shape[-1]), out["pixel_values"], SINGLE)
    report.done()


# ----------------------------------------------------------------------------------------------------------------------
# whole model: losses and gradients


@pytest.mark.parametrize("name", ["t2i", "recon"])
def test_generation(name, monkeypatch):
    given, out, model = case(name)
    inputs, masked = generation_inputs(model, given)
    llm, encodes = record(monkeypatch, model.llm, "forward"), record(monkeypatch, model.mar, "encode")
    fused, decodes = record(monkeypatch, model, "fuse"), record(monkeypatch, model.mar, "decode")
    rows = record(monkeypatch, model.mar.diffloss, "loss_rows")
    loss = (model.t2i_loss if name == "t2i" else model.reca_loss)(**inputs)
    report = Report()
    report.equal(f"{name}.mask", torch.zeros_like(out["mask"]).scatter(1, masked, 1.0), out["mask"])
    # the LLM reads our rows left-padded, [pads, context, image]; the golden rows are [context, pads, image]
    (embeds, pads), n = llm[0][0][:2], out["llm_last_hidden_image"].shape[1]
    W = embeds.shape[1] - n
    mask = torch.cat([torch.arange(W) < (W - pads[:, None]), torch.ones(len(pads), n, dtype=torch.bool)], 1)
    embeds = torch.cat([right(embeds[:, :W], pads), embeds[:, W:]], 1)
    want = out["llm_inputs_embeds"] * mask[..., None]
    report.equal(f"{name}.llm_attention_mask", mask.long(), out["llm_attention_mask"])
    report.close(f"{name}.llm_inputs_embeds", embeds, want, WHOLE)
    positions = (torch.arange(W + n) - pads[:, None]).clamp(min=0)
    positions = torch.cat([right(positions[:, :W], pads), positions[:, W:]], 1)
    report.equal(f"{name}.llm_position_ids", positions * mask, out["llm_position_ids"] * mask)
    report.close(f"{name}.llm_last_hidden_image", llm[0][2][0], out["llm_last_hidden_image"], WHOLE)
    report.close(f"{name}.x_enc_masked", encodes[-1][2], out["x_enc_masked"], WHOLE)
    report.close(f"{name}.x_enc_fused", fused[0][2], out["x_enc_fused"], WHOLE)
    report.close(f"{name}.z", raster(decodes[0][2], *decodes[0][0][1:3]), out["z"], WHOLE)
    b, M, k = inputs["t"].shape
    for key, got, tolerance in (("mse_rows", rows[0][2][0], WHOLE), ("vb_rows", rows[0][2][1], ROWS)):
        want = out[key].view(M, b, -1).transpose(0, 1).gather(2, masked[:, None].expand(-1, M, -1))
        report.close(f"{name}.{key}", got.view(b, M, k), want, tolerance)
    report.close(f"{name}.loss", loss, out["loss"], WHOLE)
    check_gradients(report, name, gradients(model, loss), out)
    report.done()


def test_recon_without_gradient_scale():
    _, out, model = case("recon_noscale")
    inputs, _ = generation_inputs(model, case("recon")[0])
    report = Report()
    check_gradients(report, "recon_noscale", gradients(model, model.reca_loss(**inputs, grad_scale=1.0)), out)
    report.done()


def test_understanding(monkeypatch):
    given, out, model = case("und")
    latents = model.precompute(given["image"])["latents"]
    labels = torch.cat([given["labels"][:, 1:], torch.full_like(given["labels"][:, :1], IGNORE)], 1)
    ids, labels, pads = left(given["attention_mask"], given["input_ids"], labels)
    report = Report()
    with torch.no_grad():
        clean = model.visual_features(latents)[1]
        hidden = model.llm(model.embed(ids, clean), pads)[0]
        logits = model.llm.lm_head(hidden)
    W = hidden.shape[1]
    report.close("und.z_enc", clean, out["z_enc"], WHOLE)
    report.equal("und.expanded_attention_mask", (torch.arange(W) < (W - pads[:, None])).long(), out["expanded_attention_mask"])
    report.close("und.last_hidden", right(hidden, pads), out["last_hidden"], WHOLE)
    report.close("und.logits", right(logits, pads), out["logits"], WHOLE)
    loss = model.i2t_loss(ids, pads, labels, latents)
    report.close("und.loss", loss, out["loss"], WHOLE)
    check_gradients(report, "und", gradients(model, loss), out)
    short = model.i2t_loss(ids, pads, labels[:, -14:], latents) if bool((labels[:, :-14] == IGNORE).all()) else loss
    report.close("und.loss, labels of the last positions only", short, out["loss"], WHOLE)
    prompt = given["input_ids"][0, : int((given["labels"][0] != IGNORE).float().argmax())].tolist()
    with torch.no_grad():
        context, pads = model.context([prompt], latents[:1])
    report.equal("und.greedy_tokens", model.generate_tokens(context, pads, len(out["greedy_tokens"]))[0], out["greedy_tokens"])
    report.done()


# ----------------------------------------------------------------------------------------------------------------------
# samplers


def check_sampler(name, model, given, out, run, monkeypatch):
    """run(orders, noise) -> image; compares every step of the sampler."""
    steps = sum(k.startswith("init_noise.") for k in given)
    noise = [(given[f"init_noise.{k}"], given[f"step_noise.{k}"]) for k in range(steps)]
    fused, decodes, sampled = record(monkeypatch, model, "fuse"), record(monkeypatch, model.mar, "decode"), record(monkeypatch, model.mar.diffloss, "sample")
    encodes = record(monkeypatch, model.mar, "encode")
    image, report = run(given["orders"], noise), Report()
    encodes = encodes[-steps:]  # the first one may be the clean image
    report.add(f"{name}: number of steps", len(fused) == steps, f"{len(fused)}, expected {steps}")
    for k in range(min(steps, len(fused))):
        report.close(f"{name}.x_enc_masked.{k}", encodes[k][2], out[f"x_enc_masked.{k}"], WHOLE)
        report.close(f"{name}.x_enc_fused.{k}", fused[k][2], out[f"x_enc_fused.{k}"], WHOLE)
        report.close(f"{name}.z.{k}", raster(decodes[k][2], *decodes[k][0][1:3]), out[f"z.{k}"], WHOLE)
        report.close(f"{name}.sampled.{k}", sampled[k][2], out[f"sampled.{k}"], WHOLE)
    report.close(f"{name}.image", image, out["image"], WHOLE)
    report.done()


@pytest.mark.parametrize("name", ["sample_cfg", "sample_nocfg"])
def test_sampler(name, monkeypatch):
    given, out, model = case(name)
    p = golden()[0]["sampler_cases"][name]
    ids, pads = left(given["attention_mask"], given["input_ids"])
    run = lambda orders, noise: model.decode_latents(
        model.sample(model.embed(ids), pads, tuple(p["image_shape"]), p["cfg"], p["num_iter"], p["temperature"], orders=orders, noise=noise))
    check_sampler(name, model, given, out, run, monkeypatch)


def test_reconstruction_sampler(monkeypatch):
    given, out, model = case("recon_sample")
    p = golden()[0]["sampler_cases"]["recon_sample"]
    ids = given["cond_ids"].tolist()
    rows = [ids[:3] + [IMAGE] + ids[3:]] * len(given["image"])
    run = lambda orders, noise: model.sample_with_image(given["image"], rows, given["uncond_ids"].tolist(), p["cfg"], steps=p["num_iter"],
                                                        temperature=p["temperature"], orders=orders, noise=noise)
    check_sampler("recon_sample", model, given, out, run, monkeypatch)
