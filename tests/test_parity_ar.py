"""Show-o against numbers from the published implementation: integers exact, floats within 1e-4 absolute (float32, CPU).

PARITY_DIR=folder replaces tests/golden (folder/showo/{config.json, weights.safetensors, cases.safetensors}, any sizes).
A case that the folder lacks is skipped."""
import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import types
from functools import lru_cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoint import load_strict
from custom_kernels.attention import interval_mask
from image_tokenizer import LFQConfig
from model_ar import (
    CONFIGS,
    IGNORE,
    Layout,
    ShowO,
    ShowOConfig,
    causal_layout,
    mask_codes,
    mask_ratio,
    mmu_prompt,
    pad_rows,
    reca_clip_layout,
    reca_prompt,
    reca_vq_layout,
    stack_rows,
    t2i_layout,
    t2i_prompt,
    with_bos,
)
from text_tokenizer import load_tokenizer
from vision_encoder import CLIPConfig, clip_pixels, magvit_pixels, square_pixels

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "showo")
TOLERANCE = 1e-4

@lru_cache(maxsize=None)
def golden():
    """-> config.json, cases."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        return json.load(f), load_file(os.path.join(GOLDEN, "cases.safetensors"))

@lru_cache(maxsize=None)
def model(clip):
    """The golden weights in the CLIP or the plain variant."""
    g, _ = golden()
    show, llm, vision = g["showo"], g["llm_config"], g["clip_vision_config"]
    encoder, decoder = g["magvitv2"]["encoder"], g["magvitv2"]["decoder"]
    c = ShowOConfig(
        hidden_size=llm["hidden_size"], num_layers=llm["num_hidden_layers"], num_heads=llm["num_attention_heads"],
        intermediate_size=llm["intermediate_size"], partial_rotary_factor=llm["partial_rotary_factor"],
        rope_theta=llm["rope_theta"], norm_eps=llm["layer_norm_eps"], text_vocab=show["llm_vocab_size"],
        eos=g["bos_eos_id"], num_special=show["num_new_special_tokens"], codebook_size=show["codebook_size"],
        image_size=g["magvitv2"]["resolution"],
        vq=LFQConfig(ch=encoder["ch"], bits=g["magvitv2"]["codebook_dim"],
                     encoder_ch_mult=tuple(encoder["ch_mult"]), encoder_res_blocks=tuple(encoder["num_res_blocks"]),
                     decoder_ch_mult=tuple(decoder["ch_mult"]), decoder_res_blocks=tuple(decoder["num_res_blocks"])),
        w_clip_vit=clip,
        clip=CLIPConfig(width=vision["hidden_size"], layers=vision["num_hidden_layers"],
                        skip_last=-1 - g["clip_select_layer"], heads=vision["num_attention_heads"],
                        mlp_width=vision["intermediate_size"], image_size=vision["image_size"],
                        patch=vision["patch_size"], eps=vision["layer_norm_eps"]),
        max_prompt=g["max_seq_length"] + 1,
        max_request=g["reca_clip_text_block_length"] if clip else g["max_seq_length"] + 3,
        reca_down_scale=g["reca_down_scale"], system_prompt="")
    m = ShowO(c)
    special = {name: g["special_ids"][f"<|{name}|>"] for name in ("pad", "soi", "eoi", "t2i", "mmu")}
    assert {name: getattr(c, name) for name in special} == special
    assert (c.image_offset, c.mask_id) == (show["image_token_offset"], show["mask_token_id"])
    assert c.vocab_size == show["vocab_size"] and m.side ** 2 == show["num_vq_tokens"]
    m.system_ids = [0] * (g["system_prompt_len"] if clip else 0)
    state = {}
    for k, t in load_file(os.path.join(GOLDEN, "weights.safetensors")).items():
        if k.startswith("vision_model."):
            state |= {f"clip.{k}": t} if clip else {}
        elif k.startswith("mm_projector."):
            state |= {k: t} if clip else {}
        else:
            state[k if k.startswith("showo.") else f"vq.{k}"] = t
    load_strict(m, state, "golden weights")
    m.trainable_parameters("reca")
    return m.eval()

def case(name, kind="out"):
    """{name without its prefix: tensor}; skips by name where the folder lacks the case."""
    found = {k[len(f"{name}.{kind}."):]: v for k, v in golden()[1].items() if k.startswith(f"{name}.{kind}.")}
    if not found:
        pytest.skip(f"no case {name}.{kind} in {GOLDEN}")
    return found

class Report:
    """Collects comparisons; done() fails with the whole table. Floats within 1e-4, everything else exactly."""

    def __init__(self):
        self.lines, self.good = [], True

    def check(self, name, got, want):
        got, want = torch.as_tensor(got).detach().cpu(), torch.as_tensor(want)
        exact = not want.is_floating_point()
        if got.shape != want.shape:
            ok, text = False, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        else:
            difference = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
            allowed = 0 if exact else TOLERANCE
            ok, text = difference <= allowed, f"max difference {difference:.3g}, allowed {allowed:g}"
        self.good &= ok
        self.lines.append(f"{name:60s} {'OK' if ok else 'NOT OK':6s} {text}")

    def done(self):
        if os.environ.get("PARITY_VERBOSE"):
            print("\n" + "\n".join(self.lines))
        assert self.good, "\n" + "\n".join(self.lines)

def lists(ids):
    """Rows padded with -1 -> lists."""
    return [[i for i in row if i >= 0] for row in ids.tolist()]

def lm_prompt(text, c, limit):
    """Text alone, as published: bos text eos, cut to `limit`; every id is a target."""
    return [*with_bos(text, c), c.eos][:limit]

def padded(rows, c, length=None):
    """Prompts (lists) -> ids (B, T) right-padded, lengths (B,)."""
    return pad_rows(rows, c.pad, length)

def read(x, layout):
    """A tensor in memory order (B, T, ...) in the order in which the row is read (all pads present)."""
    positions = layout.positions.expand(len(x), -1)
    assert (positions.sort(1).values == torch.arange(positions.shape[1])).all(), "positions are not 0..T-1"
    return x[torch.arange(len(x))[:, None], positions.argsort(1)]

def dense(layout, rows):
    """The mask as a matrix in the order in which rows are read: (B, 1, T, T) bool."""
    mask = interval_mask(layout.lo, layout.hi, layout.lo.shape[1])[:, 0].expand(rows, -1, -1)
    return read(read(mask, layout).transpose(1, 2), layout).transpose(1, 2)[:, None]

def target_ids(image, context, c):
    """Ids in memory order: eoi, image, soi, context."""
    column = torch.ones_like(image[:, :1])
    return torch.cat([column * c.eoi, image, column * c.soi, context], 1)

def split_t2i(rows, c, N):
    """Published t2i rows PAD.. text soi image eoi -> prompts as lists, image ids."""
    return [[i for i in row[:-N - 2] if i != c.pad] for row in rows.tolist()], rows[:, -N - 1:-1]

def gradients(m, loss):
    m.zero_grad()
    loss.backward()
    return {k: p.grad if p.grad is not None else torch.zeros_like(p) for k, p in m.named_parameters()}

def check_gradients(report, prefix, grads, out):
    """out: {"gradnorm.name" or "grad.name": value} below the prefix."""
    for key, want in out.items():
        kind, _, name = key[len(prefix):].partition(".") if key.startswith(prefix) else ("", "", "")
        if kind == "grad":
            report.check(key, grads[name], want)
        elif kind == "gradnorm":
            total = torch.stack([g.norm() for g in grads.values()]).norm()
            report.check(key, total if name == "__total__" else grads[name].norm(), want)

# ---------------------------------------------------------------------------------------------------------------------
# encoders and preprocessing

def test_image_tokenizer():
    given, out, r, vq = case("vae", "in"), case("vae"), Report(), model(False).vq
    g = golden()[0]["magvitv2"]
    z = vq.features(given["pixels"])
    signs = torch.where(z > 0, 1.0, -1.0)
    commitment, _ = vq.quantizer_losses(z)  # ours has another entropy loss than the published one
    codes, wide = (vq.encode(given[name]).flatten(1) for name in ("pixels", "rect_pixels"))
    for name, got in {"z": z, "z_q": signs, "quantizer_loss": commitment, "indices": codes,
                      "rect_z": vq.features(given["rect_pixels"]), "rect_indices": wide}.items():
        r.check(name, got, out[name])
    side = int(given["decode_indices"].shape[1] ** 0.5)
    codes = given["decode_indices"].unflatten(1, (side, side))
    r.check("codebook_entry", vq.quantize.embedding[codes].permute(0, 3, 1, 2), out["codebook_entry"])
    r.check("decoded", vq.decode(codes), out["decoded"])
    codes = given["nonsquare_indices"].unflatten(1, tuple(g["nonsquare"]))
    r.check("decoded_nonsquare", vq.decode(codes), out["decoded_nonsquare"])
    r.done()

def test_clip():
    given, out, r, m = case("clip", "in"), case("clip"), Report(), model(True)
    hidden, layers = [], m.clip.vision_model["encoder"]["layers"]
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))]
    features = m.clip(given["pixels"])
    hooks[0].remove()
    r.check("features", features, out["features"])
    r.check("hidden_first", hidden[0], out["hidden_first"])
    skip, m.clip.config.skip_last = m.clip.config.skip_last, 0
    r.check("hidden_last (without class token)", m.clip(given["pixels"]), out["hidden_last"][:, 1:])
    m.clip.config.skip_last = skip
    r.check("projected", m.project(features), out["projected"])
    r.done()

def test_preprocessing():
    given, out, r, c = case("preproc", "in"), case("preproc"), Report(), model(True).config
    image = Image.fromarray(given["rgb"].numpy())
    r.check("clip", clip_pixels(image, c.clip.image_size), out["clip"])
    r.check("vq", magvit_pixels(image, c.image_size), out["vq"])
    r.check("reca_square", square_pixels(image, c.image_size), out["reca_square"])
    for clip, purpose, name in ((False, "i2t", "vq"), (False, "answer", "vq"), (True, "t2i", "vq"),
                                (True, "recon", "reca_square"), (True, "edit", "reca_square"),
                                (True, "reconstruct", "reca_square")):
        r.check(f"preprocess {purpose}", model(clip).preprocess(image, purpose), out[name])
    # a picture that travels in [-1, 1] reaches CLIP with CLIP's own mean and deviation
    fed = []
    hook = model(True).clip.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    for purpose in ("i2t", "answer"):
        model(True).clip_features(model(True).preprocess(image, purpose)[None], chat=True)
        r.check(f"preprocess {purpose} (CLIP)", fed.pop()[0], out["clip"])
    hook.remove()
    r.done()

# ---------------------------------------------------------------------------------------------------------------------
# prompts, masks, masking

def test_prompts():
    given, out, r, c = case("prompt", "in"), case("prompt"), Report(), model(True).config
    texts, short, image = lists(given["text_ids"]), lists(given["short_text_ids"]), given["image_ids"]
    N, labels = image.shape[1], given["image_labels"]
    for name, prompts in (("t2i", [t2i_prompt(t, c) for t in texts]), ("t2i_gen", [t2i_prompt(t, c) for t in texts]),
                          ("t2i_dropped", [t2i_prompt(t, c, drop=True) for t in texts])):
        ids, n = padded(prompts, c, c.max_prompt)
        layout = t2i_layout(n, c.max_prompt, N, c.max_prompt)
        r.check(name, read(target_ids(image, ids, c), layout), out[f"{name}.ids"])
        if f"{name}.labels" in out:  # ours exist only where a loss is: soi, image, eoi
            soi, eoi = torch.full_like(labels[:, :1], c.soi), torch.full_like(labels[:, :1], c.eoi)
            r.check(f"{name} labels", torch.cat([soi, labels, eoi], 1), out[f"{name}.labels"][:, -N - 2:])
    length = out["lm.ids"].shape[1]
    rows = [lm_prompt(t, c, length) for t in texts]
    r.check("lm", pad_rows(rows, c.pad, length)[0], out["lm.ids"])
    r.check("lm labels", pad_rows(rows, IGNORE, length)[0], out["lm.labels"])
    msl = c.max_prompt - 1
    chats = [ids if len(ids) <= msl else [*ids[:msl - 1], c.eos] for ids in ([*with_bos(t, c), c.eos] for t in texts)]
    ids = pad_rows([mmu_prompt(chat, c) for chat in chats], c.pad, msl + 3)[0]
    r.check("mmu", torch.cat([ids[:, :2], image, ids[:, 2:]], 1), out["mmu.ids"])
    rows = [[IGNORE] * (3 + N) + chat for chat in chats]
    r.check("mmu labels", pad_rows(rows, IGNORE, msl + 3 + N)[0], out["mmu.labels"])
    prompts = [reca_prompt(t, c) for t in short]
    ids, n = padded(prompts, c, c.max_request)
    layout = reca_clip_layout(n, c.max_request, N, 0, c.max_request)  # before the features are inserted
    r.check("clip_recon", read(target_ids(image, ids, c), layout), out["clip_recon.ids"])
    r.check("clip_recon labels", labels, out["clip_recon.labels"][:, -N - 1:-1])
    p, codes = model(False).config, given["given_ids"]
    ids, n = padded(prompts, p, p.max_request)
    layout = reca_vq_layout(n, p.max_request, N, codes.shape[1], p.max_request)
    row = torch.cat([ids[:, :2], codes, ids[:, 2:]], 1)
    r.check("vq_recon", read(target_ids(image, row, p), layout), out["vq_recon.ids"])
    r.check("vq_recon labels", labels, out["vq_recon.labels"][:, -N - 1:-1])
    r.done()

def test_masks():
    out, given, r, c, p = case("mask"), case("prompt", "in"), Report(), model(True).config, model(False).config
    texts, short, N = lists(given["text_ids"]), lists(given["short_text_ids"]), given["image_ids"].shape[1]
    n = torch.tensor([len(t2i_prompt(t, c)) for t in texts])
    t2i = dense(t2i_layout(n, c.max_prompt, N, c.max_prompt), len(n))
    r.check("t2i", t2i, out["t2i"])
    r.check("t2i_re", t2i, out["t2i_re"])
    length = out["lm"].shape[-1]
    r.check("lm", dense(causal_layout(length), len(n)), out["lm"])
    r.check("mmu", dense(causal_layout(length, N + 3), len(n)), out["mmu"])
    g = golden()[0]
    A, S = g["clip_num_tokens"], g["system_prompt_len"]
    layout = causal_layout(out["mmu_vit"].shape[-1] - A, A=A, before=2 + S)
    r.check("mmu_vit", dense(layout, len(out["mmu_vit"])), out["mmu_vit"])
    n = torch.tensor([len(reca_prompt(t, p)) for t in short])
    layout = reca_vq_layout(n, p.max_request, N, given["given_ids"].shape[1], p.max_request)
    r.check("vq_recon", dense(layout, len(n)), out["vq_recon"])
    r.done()

def test_masking():
    given, out, r, c = case("masking", "in"), case("masking"), Report(), model(True).config
    r.check("cosine", mask_ratio(given["t"]), out["cosine"])
    r.check("mask_prob", mask_ratio(given["u"]), out["mask_prob"])
    ids, labels = mask_codes(given["image_tokens"] - c.image_offset, given["u"], given["r"], c)
    r.check("input_ids", ids, out["input_ids"])
    r.check("labels", labels, out["labels"])
    r.done()

def test_learning_rate():
    """The published schedule: its first step has rate 0, and its cosine ends at the last step."""
    import train
    given, out, r = case("lr", "in"), case("lr"), Report()
    for steps, want in out.items():
        args = types.SimpleNamespace(warmup=1000, warmup_from=0, schedule="cosine", steps=1500, horizon=int(steps))
        rates = [train.learning_rate(args, step, 1.0) for step in given["steps"].tolist()]
        r.check(f"max {steps}", torch.tensor(rates), want)
    r.done()

def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()

@pytest.mark.parametrize("name", [
    "t2i_256_demo", "t2i_512_demo", "t2i_512_train_plain", "t2i_512_train_clip", "t2i_256_train_clip", "reca_clip_512",
    "reca_clip_256", "reca_vq_512_resize256", "reca_vq_512_blur8", "mmu_vit_train_512"])
def test_full_size_layout(name):
    """Rows and masks of the published sizes, as hashes."""
    want = golden()[0].get("full_size_layout", {}).get(name)
    if want is None:
        pytest.skip(f"no full_size_layout.{name} in {GOLDEN}")
    c = CONFIGS["show-o-clip-512"]
    N, text = 256 if name.startswith(("t2i_256", "reca_clip_256")) else 1024, list(range(100, 140))
    image = (c.image_offset + 37 * torch.arange(N) % 8192)[None]
    ids = uncond = None
    if name.startswith("t2i"):
        limit = {"demo": 129, "plain": 382, "clip": 577}[name.split("_")[-1]]
        x, n = padded([t2i_prompt(text, c, limit)], c, limit)
        layout = t2i_layout(n, limit, N, limit)
        ids = read(target_ids(image, x, c), layout)
        x, n = padded([t2i_prompt([], c, limit)], c, limit)
        uncond = read(target_ids(image, x, c), t2i_layout(n, limit, N, limit))
    elif name.startswith("reca_clip"):
        x, n = padded([reca_prompt(text, c)], c, 128)
        layout = reca_clip_layout(n, 128, N, 576, 128)
        ids = read(target_ids(image, torch.cat([torch.full((1, 576), IGNORE), x], 1), c), layout)
    elif name.startswith("reca_vq"):
        G = 256 if "resize" in name else 1024
        x, n = padded([reca_prompt(text, c)], c, 384)
        layout = reca_vq_layout(n, 384, N, G, 384)
        codes = (c.image_offset + 11 * torch.arange(G) % 8192)[None]
        ids = read(target_ids(image, torch.cat([x[:, :2], codes, x[:, 2:]], 1), c), layout)
    else:
        layout = causal_layout(want["length"] - 576, A=576, before=30)
    mask = dense(layout, 1)[0, 0].numpy()
    assert list(mask.shape) == want["mask"]["shape"] and len(mask) == want["length"]
    for i, n in want["mask"]["rows"].items():
        assert int(mask[int(i)].sum()) == n, i
    assert int(mask.sum()) == want["mask"]["n_allowed"]
    assert sha(mask.sum(1).astype(np.int32)) == want["mask"]["row_sums_sha256"]
    assert sha(np.packbits(mask)) == want["mask"]["sha256_packbits"]
    if ids is not None:
        plain = ids[ids != IGNORE].numpy()
        assert want["ids_sha256"] in (sha(ids.numpy()), sha(plain)), "ids"
    if uncond is not None:
        assert sha(uncond.numpy()) == want["uncond_ids_sha256"], "uncond ids"
    if "first_nonpad" in want:
        assert int((ids[0] != c.pad).int().argmax()) == want["first_nonpad"]

# ---------------------------------------------------------------------------------------------------------------------
# backbone and losses

def test_backbone():
    given, out, r, m = case("lm", "in"), case("lm"), Report(), model(False)
    hidden = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0])) for layer in m.showo.model.layers]
    ids = given["input_ids"]
    layout = causal_layout(ids.shape[1])
    final = m.showo.model(m.embed(ids), layout)
    [h.remove() for h in hooks]
    r.check("allow", dense(layout, len(ids)), out["allow"])
    for i, h in enumerate(hidden):
        r.check(f"hidden_in.{i}", h, out[f"hidden_in.{i}"])
    r.check("final_norm", final, out["final_norm"])
    r.check("logits", m.logits(final), out["logits"])
    r.check("only what is read", m.showo.model(m.embed(ids), layout, slice(2, 5)), out["final_norm"][:, 2:5])
    r.done()

def train_inputs(m):
    """The batch of the case `train`: text-to-image and text-only parts, and their published rows."""
    given, c = case("train", "in"), m.config
    codes = m.precompute(given["pixels_t2i"])["codes"]
    ids, n = padded([t2i_prompt(t, c) for t in lists(given["text_t2i"])], c, c.max_prompt)
    length = c.max_prompt + codes.shape[1] + 2
    rows = [lm_prompt(t, c, length) for t in lists(given["text_lm"])]
    return given, {"t2i": {"codes": codes, "ids": ids, "lengths": n, "u": given["u"], "r": given["r"]},
                   "text": {"ids": pad_rows(rows, c.pad, length)[0], "labels": pad_rows(rows, IGNORE, length)[0]}}

def weighted(losses, stage):
    """The published sum of the losses of a stage, whose names for our parts are lm (text) and mmu (i2t)."""
    named = {"lm" if part == "text" else "mmu" if part == "i2t" else part: loss for part, loss in losses.items()}
    return sum(named[k] * w for k, w in golden()[0]["loss_coefficients"][stage].items())

def mmu_inputs(given, head, c):
    ids = torch.cat([head, given["mmu_ids"]], 1)
    return {"ids": ids, "labels": torch.cat([torch.full_like(head, IGNORE), given["mmu_labels"]], 1)}

def test_base_losses():
    r, m, out = Report(), model(False), case("train")
    given, batch = train_inputs(m)
    c, codes, N = m.config, batch["t2i"]["codes"], m.side ** 2
    head = torch.tensor([[c.mmu, c.soi, c.eoi]]).expand(len(given["mmu_ids"]), -1)
    batch["i2t"] = mmu_inputs(given, head, c) | {"codes": m.precompute(given["pixels_mmu"])["codes"]}
    image, labels = mask_codes(codes, given["u"], given["r"], c)
    x, layout = m.t2i_context(batch["t2i"]["ids"], batch["t2i"]["lengths"], N)
    text, look, a, b = batch["text"], batch["i2t"], len(codes), len(codes) + len(batch["text"]["ids"])
    t2i, lm, mmu = slice(0, a), slice(a, b), slice(b, None)
    mmu_ids = torch.cat([look["ids"][:, :2], look["codes"] + c.image_offset, look["ids"][:, 2:]], 1)
    lm_layout, mmu_layout = causal_layout(text["ids"].shape[1]), causal_layout(mmu_ids.shape[1], N + 3)
    r.check("input_ids t2i", read(target_ids(image, batch["t2i"]["ids"], c), layout), out["input_ids"][t2i])
    r.check("input_ids lm", text["ids"], out["input_ids"][lm])
    r.check("input_ids mmu", mmu_ids, out["input_ids"][mmu])
    r.check("labels t2i", labels, out["labels"][t2i][:, -N - 1:-1])
    r.check("labels lm", text["labels"], out["labels"][lm])
    r.check("labels mmu", look["labels"][:, 3:], out["labels"][mmu][:, N + 3:])
    for name, l, rows in (("t2i", layout, t2i), ("lm", lm_layout, lm), ("mmu", mmu_layout, mmu)):
        r.check(f"allow {name}", dense(l, len(out["allow"][rows])), out["allow"][rows])

    def logits(x, layout):
        return read(m.logits(m.showo.model(x, layout)), layout)

    r.check("logits t2i", logits(m.with_target(image, x), layout), out["logits"][t2i])
    r.check("logits lm", logits(m.embed(text["ids"]), lm_layout), out["logits"][lm])
    r.check("logits mmu", logits(m.embed(mmu_ids), mmu_layout), out["logits"][mmu])
    losses = m(batch)
    for ours, theirs in (("t2i", "t2i"), ("text", "lm"), ("i2t", "mmu")):
        r.check(f"loss_{theirs}", losses[ours], out[f"loss_{theirs}"])
    check_gradients(r, "", gradients(m, weighted(losses, "train")), out)
    r.done()

def clip_batch(m):
    """The case `train_clip`: text-to-image and text rows of `train`, image-to-text rows through CLIP."""
    given, c = case("train_clip", "in"), m.config
    mmu, soi, eoi = (torch.full_like(given["system_ids"][:, :1], i) for i in (c.mmu, c.soi, c.eoi))
    head = torch.cat([mmu, given["system_ids"], soi, eoi], 1)
    return train_inputs(m)[1] | {"i2t": mmu_inputs(given, head, c) | {"features": m.clip(given["clip_pixels"])}}

def test_base_losses_clip():
    r, m, out = Report(), model(True), case("train_clip")
    batch = clip_batch(m)
    look = batch["i2t"]
    r.check("mmu_text_ids", look["ids"], out["mmu_text_ids"])
    x, layout = m.mmu_context(look["ids"], features=look["features"])
    A = look["features"].shape[1]
    ours = torch.cat([torch.full((len(x), A), IGNORE), look["labels"]], 1)
    r.check("mmu_labels_full", read(ours, layout), out["mmu_labels_full"])
    r.check("logits_mmu", read(m.logits(m.showo.model(x, layout)), layout), out["logits_mmu"])
    losses = m(batch)
    for ours, theirs in (("t2i", "t2i"), ("text", "lm"), ("i2t", "mmu")):
        r.check(f"loss_{theirs}", losses[ours], out[f"loss_{theirs}"])
    check_gradients(r, "", gradients(m, weighted(losses, "train")), out)
    r.done()

def test_reca_clip():
    """The reconstruction loss, and its gradients in both conventions: none to the input row (published), or all."""
    r, m, given, out = Report(), model(True), case("reca_clip", "in"), case("reca_clip")
    c, fed = m.config, []
    hook = m.clip.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    frozen = m.precompute(given["pixels"])
    hook.remove()
    r.check("clip_input", fed[0], out["clip_input"])
    ids, n = padded([reca_prompt(t, c) for t in lists(given["text"])], c, c.max_request)
    image, labels = mask_codes(frozen["codes"], given["u"], given["r"], c)
    N = image.shape[1]
    context, layout = m.reca_context(ids, n, N, features=frozen["features"])
    x = m.with_target(image, context)
    blank = torch.full(frozen["features"].shape[:2], IGNORE)
    r.check("ids_with_-100", read(target_ids(image, torch.cat([blank, ids], 1), c), layout), out["ids_with_-100"])
    r.check("labels", labels, out["labels"][:, -N - 1:-1])
    r.check("allow", dense(layout, len(ids)), out["allow"])
    r.check("embeddings", read(x, layout), out["embeddings"])
    r.check("logits_image", m.logits(m.showo.model(x, layout, slice(1, N + 1))), out["logits_image"])
    tensors = {"ids": ids, "lengths": n, "u": given["u"], "r": given["r"], **frozen}
    loss = m.reca_loss(**tensors)
    r.check("loss_recon", loss, out["loss_recon"])
    check_gradients(r, "recon_only.", gradients(m, loss), out)
    check_gradients(r, "alt_grad_through_prefix.", gradients(m, m.reca_loss(**tensors, context_grad=1.0)), out)
    losses = m(clip_batch(m) | {"recon": tensors})
    total = weighted({part: loss for part, loss in losses.items() if part != "text"}, "reca")
    for name, got in (("loss_mmu", losses["i2t"]), ("loss_t2i", losses["t2i"]), ("loss_total", total)):
        r.check(name, got, out[name])
    check_gradients(r, "total.", gradients(m, total), out)
    r.done()

@pytest.mark.parametrize("name", ["resize", "resize_back"])
def test_reca_vq(name):
    r, m, given = Report(), model(False), case("reca_vq", "in")
    out = {k[len(name) + 1:]: v for k, v in case("reca_vq").items() if k.startswith(name + ".")}
    if not out:
        pytest.skip(f"no case reca_vq.out.{name} in {GOLDEN}")
    c = m.config
    c.reca_resize_back = name == "resize_back"
    fed, encode = [], m.vq.encode
    m.vq.encode = lambda images: fed.append(images) or encode(images)
    frozen = m.precompute(given["pixels"])
    del m.vq.encode
    r.check("understanding_pixels", fed[-1], out["understanding_pixels"])
    c.reca_resize_back = False
    texts = lists(given["text"])
    ids, n = padded([reca_prompt(t, c) for t in texts], c, c.max_request)
    image, labels = mask_codes(frozen["codes"], given["u"], given["r"], c)
    N = image.shape[1]
    context, layout = m.reca_context(ids, n, N, small_codes=frozen["small_codes"])
    row = torch.cat([ids[:, :2], frozen["small_codes"] + c.image_offset, ids[:, 2:]], 1)
    r.check("ids", read(target_ids(image, row, c), layout), out["ids"])
    r.check("labels", labels, out["labels"][:, -N - 1:-1])
    r.check("allow", dense(layout, len(ids)), out["allow"])
    hidden = m.showo.model(m.with_target(image, context), layout, slice(1, N + 1))
    r.check("logits_image", m.logits(hidden), out["logits_image"])
    loss = m.reca_loss(ids=ids, lengths=n, u=given["u"], r=given["r"], **frozen)
    r.check("loss_recon", loss, out["loss_recon"])
    check_gradients(r, "", gradients(m, loss), out)
    r.done()

# ---------------------------------------------------------------------------------------------------------------------
# samplers

@pytest.mark.parametrize("name", ["sample_cfg", "sample_nocfg", "sample_inpaint"])
def test_sampler(name):
    given, out, r, m = case(name, "in"), case(name), Report(), model(False)
    settings, c, N = golden()[0]["samples"][name], m.config, m.side ** 2
    prompts, image = split_t2i(given["input_ids"], c, N)
    if settings["guidance_scale"] > 0:
        prompts += split_t2i(given["uncond_ids"], c, N)[0]
    trace = []
    context = m.t2i_context(*padded(prompts, c), N)
    codes = m.sample(*context, image, settings["guidance_scale"], settings["timesteps"], settings["temperature"],
                     exponential=given["exponential"], gumbel_u=given["gumbel_u"], trace=trace)

    def stack(key):
        return torch.stack([t[key] for t in trace])

    r.check("step0_raw_logits", m.logits(trace[0]["hidden"]), out["step0_raw_logits"])
    r.check("temperature", torch.tensor([t["temperature"] for t in trace]), out["temperature"])
    r.check("mask_len", stack("masked").sum(2, keepdim=True), out["mask_len"].long())
    r.check("masking", stack("masked"), out["masking"])
    known = out["confidence"] > 1e30  # float max stands for "already known"
    r.check("confidence, known", stack("confidence") > 1e30, known)
    r.check("confidence", stack("confidence").masked_fill(known, 0), out["confidence"].masked_fill(known, 0))
    r.check("tokens", codes, out["tokens"])
    ids, n = padded([p for p in prompts[:len(image)]], c, c.max_prompt)
    layout = t2i_layout(n, c.max_prompt, N, c.max_prompt)
    image = (codes + c.image_offset).masked_fill(trace[-1]["masked"], c.mask_id)
    r.check("final_input_ids", read(target_ids(image, ids, c), layout), out["final_input_ids"])
    r.done()

@pytest.mark.parametrize("clip", [False, True])
def test_understanding(clip):
    """Greedy decoding with a cache, against the published tokens and against full forwards without a cache."""
    name = "mmu_clip" if clip else "mmu"
    given, out, r, m = case(name, "in"), case(name), Report(), model(clip)
    if clip:
        x, layout = m.mmu_context(given["text_ids"], features=m.clip(given["clip_pixels"]))
    else:
        ids, N = given["input_ids"], m.side ** 2
        codes = ids[:, 2:N + 2] - m.config.image_offset
        x, layout = m.mmu_context(torch.cat([ids[:, :2], ids[:, N + 2:]], 1), codes=codes)
    r.check("prompt_logits", read(m.logits(m.showo.model(x, layout)), layout), out["prompt_logits"])
    n, trace, logits = out["tokens"].numel(), [], m.logits
    m.logits = lambda hidden: trace.append(logits(hidden)) or trace[-1]
    tokens = m.write(x, layout, torch.tensor([x.shape[1]]), n)
    del m.logits
    r.check("tokens", tokens.flatten(), out["tokens"].flatten())
    plain = []
    for i in range(n):  # the new row of the mask copies the last one and adds itself
        logits = m.logits(m.showo.model(x, layout)[:, -1:])
        r.check(f"logits {i} without a cache", logits[:, 0], trace[i])
        new = logits.argmax(-1)
        plain.append(new)
        T = x.shape[1]
        x = torch.cat([x, m.embed(new)], 1)
        layout = Layout(*(torch.cat([t, torch.tensor([[v]])], 1) for t, v in zip(layout, (T, 0, T + 1))))
    r.check("tokens without a cache", torch.cat(plain, 1).flatten(), out["tokens"].flatten())
    r.done()

# ---------------------------------------------------------------------------------------------------------------------
# published keys

@pytest.mark.parametrize("name, config", [
    ("show-o", "show-o-256"), ("show-o-512x512", "show-o-512"), ("show-o-512x512-wo-llava-tuning", "show-o-512"),
    ("show-o-w-clip-vit", "show-o-clip-256"), ("show-o-w-clip-vit-512x512", "show-o-clip-512"),
    ("reca-show-o", "show-o-clip-256"), ("reca-show-o-512x512", "show-o-clip-512"),
    ("magvitv2", "show-o-256"), ("clip-vit-large-patch14-336.vision", "show-o-clip-512")])
def test_keys(name, config):
    """A published file has exactly the names and shapes of our modules."""
    with gzip.open(os.path.join(HERE, "golden", "keys", "showo.json.gz")) as f:
        stored = json.load(f)
    want = {k: tuple(v) for k, v in stored["keys"][stored["same_as"][name]].items()}
    with torch.device("meta"):
        state = ShowO(CONFIGS[config]).state_dict()
    prefix = {"magvitv2": "vq.", "clip-vit-large-patch14-336.vision": "clip."}.get(name, "")
    if prefix:
        got = {k.removeprefix(prefix): tuple(v.shape) for k, v in state.items() if k.startswith(prefix)}
    else:
        got = {k: tuple(v.shape) for k, v in state.items() if not k.startswith(("vq.", "clip."))}
    assert got == want

# ---------------------------------------------------------------------------------------------------------------------
# what no golden number covers

@lru_cache(maxsize=None)
def tiny():
    torch.manual_seed(0)
    return ShowO(CONFIGS["tiny"], load_tokenizer("tiny")).eval()

SAMPLES = {"recon": [{"prompt": "Describe it."}, {"prompt": "What do you see in the picture?"}],
           "edit": [{"instruction": "Make it blue."}, {"instruction": "Remove the large red star."}],
           "t2i": [{"caption": "a red circle"}, {"caption": "two small blue squares on a gray background"}],
           "i2t": [{"question": "What is it?", "answer": "red"},
                   {"question": "How many stars are there?", "answer": "two large stars"}],
           "text": [{"question": "a red star. What color is it?", "answer": "red"},
                    {"question": "What?", "answer": "no"}]}

def tiny_batch(stage, pad_to=None):
    m, g = tiny(), torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 48, 48, generator=g) * 2 - 1
    m.trainable_parameters(stage)
    frozen, source = m.precompute(images), m.precompute(images.flip(0))
    batch = {}
    for part, samples in SAMPLES.items():
        batch[part] = m.collate(part, samples, [g] * len(samples), None, pad_to)
        if part != "text":
            batch[part] |= frozen
        if part == "edit":
            batch[part] |= {f"source_{k}": v for k, v in source.items()}
    return batch

@pytest.mark.parametrize("stage", ["base", "reca"])
def test_pads_change_nothing_and_counts_add_up(stage):
    """Padding is invisible; the mean over a batch is the sum over its rows with a common count."""
    m, r = tiny(), Report()
    padded = tiny_batch(stage, pad_to=32)
    whole = m(padded)
    for part, tensors in tiny_batch(stage).items():
        assert tensors["ids"].shape[1] < padded[part]["ids"].shape[1] == 32
        count = tensors.pop("count")
        r.check(f"{part} with fewer pads", m({part: tensors})[part], whole[part])  # counts for itself
        rows = [m({part: {k: v[i:i + 1] for k, v in tensors.items()} | {"count": count}})[part] for i in range(2)]
        r.check(f"{part} by rows", sum(rows), whole[part])
    r.done()

def test_editing_is_reconstruction_of_another_picture():
    m, batch = tiny(), tiny_batch("reca")
    edit = batch["edit"]
    plain = {k: v for k, v in edit.items() if not k.startswith("source_")}
    same = plain | {f"source_{k}": edit[k] for k in ("features", "codes")}
    assert m({"edit": same})["edit"] == m.reca_loss(**plain)
    assert m({"edit": edit})["edit"] != m({"edit": same})["edit"]

def test_codes_do_not_depend_on_autocast():
    m, images = tiny(), torch.rand(16, 3, 48, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        assert (m.vq.encode(images).flatten(1) != m.precompute(images)["codes"]).any()  # or this test says nothing
        codes = m.precompute(images)["codes"]
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in m(tiny_batch("reca")).values())
        m.generate(["a"], generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes, m.precompute(images)["codes"])

def test_rows_that_have_ended():
    m = model(False)
    x, lengths = m.embed(torch.tensor([[1, 2, 3]]).expand(16, -1)), torch.full((16,), 3)
    bias = m.showo.lm_head.bias.detach().clone()
    with torch.no_grad():
        m.showo.lm_head.bias[m.config.eos] += bias.abs().max() + 4
        ids = m.write(x, causal_layout(3), lengths, 12, temperature=2.0,
                      generator=[torch.Generator().manual_seed(i) for i in range(16)])
        ended = (ids == m.config.eos).int().cummax(1).values
        assert ended[:, :-1].any() and not ended[:, 0].all() and torch.equal(ended.bool(), ids == m.config.eos)
        m.showo.lm_head.bias[m.config.eos] += 1e4
        assert m.write(x, causal_layout(3), lengths, 12).shape == (16, 1)
        m.showo.lm_head.bias.copy_(bias)

def test_what_trains():
    """In base training everything but the image tokenizer gets a gradient; afterwards the encoder is frozen as well."""
    m = tiny()
    names = [n for n, _ in m.trainable_parameters("base")]
    grads = gradients(m, sum(m(tiny_batch("base")).values()))
    assert {n for n, g in grads.items() if g.any()} == set(names) and not any(n.startswith("vq.") for n in names)
    inputs = ("mm_projector.0.weight", "showo.model.embed_tokens.weight")
    for part, reaches in (("recon", False), ("edit", True), ("i2t", True)):
        grads = gradients(m, m({part: tiny_batch("base")[part]})[part])
        assert all(bool(grads[n].any()) == reaches for n in inputs), part
    recon = tiny_batch("base")["recon"]
    grads, half = (gradients(m, m.reca_loss(**recon, context_grad=share)) for share in (1.0, 0.5))
    assert all(grads[n].any() and torch.allclose(half[n], grads[n] / 2) for n in inputs)
    assert torch.equal(half["showo.lm_head.weight"], grads["showo.lm_head.weight"])
    m.zero_grad(set_to_none=True)
    for stage in ("sft", "reca"):
        assert {n.split(".")[0] for n, p in m.trainable_parameters(stage)} == {"showo", "mm_projector"}
    assert m.no_decay("showo.lm_head.bias", None) and not m.no_decay("showo.model.final_layernorm.weight", None)
    with pytest.raises(ValueError, match="expected base, sft or reca"):
        m.trainable_parameters("pretrain")

def test_collate():
    m, c = tiny(), CONFIGS["tiny"]

    def decode(ids):
        return m.tokenizer.decode([i for i in ids if 0 <= i < c.text_vocab])

    def collate(part, samples, pad_to=None):
        return m.collate(part, samples, [torch.Generator().manual_seed(i) for i in range(len(samples))], None, pad_to)
    out = collate("i2t", SAMPLES["i2t"])
    assert out["ids"].shape == (2, 20) and collate("i2t", SAMPLES["i2t"], 40)["ids"].shape == (2, 40)
    assert out["ids"][0, :3].tolist() == [c.mmu, c.soi, c.eoi] and out["count"] == (out["labels"] != IGNORE).sum()
    assert decode(out["ids"][1].tolist()) == "Question: How many stars are there? Answer: two large stars<|endoftext|>"
    assert [decode(row) for row in out["labels"].tolist()] == [" red<|endoftext|>", " two large stars<|endoftext|>"]
    turns = collate("i2t", [{"turns": [("a?", "b"), ("c?", "d")]}])
    chat = "Question: a? Answer: b<|endoftext|>Question: c? Answer: d<|endoftext|>"
    assert decode(turns["ids"][0].tolist()) == chat
    assert decode(turns["labels"][0].tolist()) == " b<|endoftext|> d<|endoftext|>"
    out = collate("t2i", [{"caption": "a red circle", "drop": True}, {"caption": "star " * 99}])
    assert out["lengths"].tolist() == [3, c.max_prompt] and out["ids"][1, -1] == c.eos
    assert out["ids"][0, :4].tolist() == [c.t2i, c.eos, c.eos, c.pad]
    labels = mask_codes(torch.zeros(2, 9, dtype=torch.long), out["u"], out["r"], c)[1]
    assert out["count"] == (labels != IGNORE).sum() + 2 * 2
    empty = collate("uncond", [{}, {}])
    assert empty["ids"].tolist() == [[c.t2i, c.eos, c.eos, c.pad]] * 2 and torch.equal(empty["u"], out["u"])
    words = collate("words", [{"caption": "a red circle"}, {"caption": ""}])
    assert words.keys() == {"words"} and words["words"].sum(1).tolist() == [3, 0]
    out = collate("recon", SAMPLES["recon"])
    assert decode(out["ids"][0].tolist()) == "<|endoftext|>Question: \n Describe it. Answer:<|endoftext|>"
    out = collate("text", [{"question": "star " * 99, "answer": "no"}])
    assert out["ids"].shape == (1, c.max_dialogue + 3) and (out["labels"] == IGNORE).all() and out["count"] == 0
    # what people write is spelled out: no end of a text from inside
    for part, sample, ends in (("t2i", {"caption": "<|endoftext|>"}, 2), ("edit", {"instruction": "<|endoftext|>"}, 2),
                               ("i2t", {"question": "<|endoftext|>", "answer": "<|endoftext|>"}, 1)):
        ids = collate(part, [sample])["ids"]
        assert (ids == c.eos).sum() == ends and "<|endoftext|>" in decode([i for i in ids[0].tolist() if i != c.eos])
    # a request that is too long loses its own end in training; what is typed is refused: half of it says another thing
    cut = collate("edit", [{"instruction": "star " * 99}, {"instruction": "a star"}])
    assert cut["lengths"][0] == cut["ids"].shape[1] == c.max_request and cut["lengths"][1] < c.max_request
    assert decode(cut["ids"][0].tolist()).startswith("<|endoftext|>Question: \n star star")
    assert decode(cut["ids"][0].tolist()).endswith("star star Answer:<|endoftext|>")
    for call in (lambda: m.edit(torch.zeros(1, 3, 48, 48), ["star " * 99]),
                 lambda: m.reconstruct(torch.zeros(1, 3, 48, 48), "star " * 30)):
        with pytest.raises(ValueError, match="^[0-9]+ ids do not fit into 32: shorten the text"):
            call()
    with pytest.raises(ValueError, match="--text-tokenizer"):
        ShowO(dataclasses.replace(c, text_vocab=9, eos=8), m.tokenizer)

def test_samplers():
    """Same generator, same picture; rows do not depend on their neighbors in the batch; known codes stay."""
    m = tiny()

    def g():
        return torch.Generator().manual_seed(3)
    def two():
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = torch.rand(2, 3, 48, 48, generator=g()) * 2 - 1
    codes = m.vq.encode(images)
    for draw in (lambda: m.generate(["a red circle", "two blue stars on a white background"], generator=two()),
                 lambda: m.edit(images, ["Make it blue.", "Remove the star at the top."], cfg=1.0, generator=two()),
                 lambda: m.reconstruct(images, steps=3, generator=two())):
        assert torch.equal(draw(), draw()) and draw().shape == (2, 3, 48, 48) and draw().abs().max() <= 1
    assert m.generate(["a"], size=96, generator=g()).shape == (1, 3, 96, 96)
    assert m.generate(["a"], size=(48, 96), generator=g()).shape == (1, 3, 48, 96)
    for size in (50, (48, 50)):
        with pytest.raises(ValueError, match="multiple of"):
            m.generate(["a"], size=size)
    # a row next to a longer one is the row alone: with pads, with the unconditional half
    short = m.context(["a"], 9)
    both = stack_rows(short, m.context(["two blue stars on a white background"], 9))
    mask = torch.full((2, 9), m.config.mask_id)
    exponential = torch.rand(6, 2, 9, m.config.codebook_size, generator=g()) + 0.1
    gumbel_u = torch.rand(6, 2, 9, generator=g())
    one = m.sample(*short, mask[:1], 0.0, 6, exponential=exponential[:, :1], gumbel_u=gumbel_u[:, :1])
    assert torch.equal(one, m.sample(*both, mask, 0.0, 6, exponential=exponential, gumbel_u=gumbel_u)[:1])
    questions = ["Why?", "How many small red stars are there in this picture?"]
    assert m.answer(images, questions, 5) == [m.answer(images[i:i + 1], questions[i:i + 1], 5)[0] for i in range(2)]
    assert m.answer(None, questions, 5) == [m.answer(None, questions[i:i + 1], 5)[0] for i in range(2)]
    hole = torch.zeros(2, 1, 48, 48)
    hole[..., :16] = 1
    seen, given = [], []
    decode, paint = m.decode_codes, m.paint
    m.decode_codes = lambda codes: seen.append(codes) or codes
    m.paint = lambda context, image, **how: given.append(image) or paint(context, image, **how)
    sides = ("left", "right", "up", "down")
    try:
        m.inpaint(images, hole, ["a", "b"], generator=two())
        for side in sides:
            m.extrapolate(images, ["a", "b"], side, generator=two())
    finally:
        m.decode_codes, m.paint = decode, paint
    assert torch.equal(seen[0][:, :, 1:], codes[:, :, 1:])
    with pytest.raises(ValueError, match="side 'behind': expected one of left, right, up, down"):
        m.extrapolate(images, ["a", "b"], "behind")
    for side, image, grown in zip(sides, given[1:], seen[1:]):
        dim, flip = 2 if side in ("left", "right") else 1, side in ("left", "up")
        assert grown.numel() == 2 * 12 and (image == m.config.mask_id).sum() == 2 * 3
        assert torch.equal(grown.narrow(dim, 1 if flip else 0, 3), codes)  # what was there stays
        near, old = image.narrow(dim, 1 if flip else 0, 2), codes.narrow(dim, 0 if flip else 1, 2)
        assert torch.equal(near, old + m.config.image_offset)

@pytest.mark.parametrize("clip", [False, True])
def test_published_files(clip, tmp_path, monkeypatch):
    """Files in the published form load strictly; a CLIP file may hold its text tower."""
    m = model(clip)
    monkeypatch.setitem(CONFIGS, "golden", m.config)
    other = {"text_model.x": torch.zeros(1), "vision_model.embeddings.position_ids": torch.arange(3)}
    split = {"showo": {}, "vq": {}, "clip": other}
    for k, v in m.state_dict().items():
        kind, _, rest = k.partition(".")
        if kind in ("showo", "mm_projector"):
            kind, rest = "showo", k
        split[kind][rest] = v.clone()
    (tmp_path / "show-o").mkdir()
    torch.save(split["showo"], tmp_path / "show-o" / "pytorch_model.bin")
    save_file(split["vq"], tmp_path / "magvitv2.safetensors")
    save_file(split["clip"], tmp_path / "clip.safetensors")
    files = dict(config="golden", tokenizer_path=tmp_path / "magvitv2.safetensors",
                 vision_path=tmp_path / "clip.safetensors" if clip else None)
    loaded = ShowO.load_published(tmp_path / "show-o", **(files | {"config": m.config}))
    assert all(torch.equal(v, m.state_dict()[k]) for k, v in loaded.state_dict().items()) and not loaded.training
    half = ShowO.load_published(tmp_path / "show-o", **files, dtype=torch.bfloat16)
    assert half.showo.lm_head.weight.dtype == torch.bfloat16 and half.vq.encoder.conv_in.weight.dtype == torch.float32
    ids, lengths = padded([t2i_prompt([1, 2], m.config)], m.config)
    assert half.sample(*half.t2i_context(ids, lengths, 4), torch.full((1, 4), m.config.mask_id), 0.0, 2).shape == (1, 4)
    with pytest.raises(ValueError, match="--tokenizer-ckpt"):
        ShowO.load_published(tmp_path / "show-o", "golden")
    if clip:
        with pytest.raises(ValueError, match="--vision-ckpt"):
            ShowO.load_published(tmp_path / "show-o", "golden", tmp_path / "magvitv2.safetensors")
    else:
        with pytest.raises(ValueError, match="and no --vision-ckpt"):
            ShowO.load_published(tmp_path / "show-o", **(files | {"vision_path": tmp_path / "clip.safetensors"}))
    del split["showo"]["showo.lm_head.bias"]
    torch.save(split["showo"], tmp_path / "show-o" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="missing +showo.lm_head.bias"):
        ShowO.load_published(tmp_path / "show-o", **files)

@pytest.mark.parametrize("config", ["show-o-512", "show-o-clip-512"])
def test_published_size_runs_without_a_host_sync(config, monkeypatch):
    """On the meta device a question to the data (.item(), nonzero, a boolean index) is an error: a step has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no meta device
    c = dataclasses.replace(CONFIGS[config], num_layers=2)
    with torch.device("meta"):
        m = ShowO(c)
        m.system_ids = [0] * (28 if c.w_clip_vit else 0)
        m.trainable_parameters("reca")
        N = m.side ** 2

        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.long)

        def drawn(T):
            return {"ids": zeros(2, T), "lengths": zeros(2), "u": torch.zeros(2), "r": torch.zeros(2, N)} | picture
        picture = {"features": torch.zeros(2, 576, 1024)} if c.w_clip_vit else {"small_codes": zeros(2, N // 4)}
        picture["codes"] = zeros(2, N)
        dialogue = {"ids": zeros(2, 99), "labels": zeros(2, 99)}
        source = {f"source_{k}": v for k, v in picture.items()}
        batch = {"recon": drawn(c.max_request), "edit": drawn(c.max_request) | source, "t2i": drawn(c.max_prompt),
                 "i2t": dialogue | picture, "text": dialogue}
        losses = m(batch)
        sum(losses.values()).backward()
    assert {k: v.shape for k, v in losses.items()} == {k: torch.Size([]) for k in batch}
