"""Harmon against numbers from the published implementation: every stage at the tolerance at which two correct float32 programs agree.

PARITY_DIR=folder replaces tests/golden (folder/harmon/{config.json, weights.safetensors, cases.safetensors}, any sizes)."""
import json
import os
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from image_tokenizer import AutoencoderConfig, load_strict
from model_mar import IGNORE, Harmon, HarmonConfig

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


@pytest.mark.parametrize("name", ["t2i", "recon"])
def test_generation(name):
    given, out, model = case(name)
    inputs, masked = generation_inputs(model, given)
    report = Report()
    loss = (model.t2i_loss if name == "t2i" else model.reca_loss)(**inputs)
    report.close(f"{name}.loss", loss, out["loss"], WHOLE)
    check_gradients(report, name, gradients(model, loss), out)
    report.done()


def test_understanding():
    given, out, model = case("und")
    latents = model.precompute(given["image"])["latents"]
    labels = torch.cat([given["labels"][:, 1:], torch.full_like(given["labels"][:, :1], IGNORE)], 1)
    ids, labels, pads = left(given["attention_mask"], given["input_ids"], labels)
    report = Report()
    loss = model.i2t_loss(ids, pads, labels, latents)
    report.close("und.loss", loss, out["loss"], WHOLE)
    check_gradients(report, "und", gradients(model, loss), out)
    report.done()
