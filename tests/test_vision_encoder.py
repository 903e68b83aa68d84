"""Vision encoders against numbers of the published implementations: towers, and what is done to a picture before them.

PARITY_DIR=folder replaces tests/golden (folder/{bagel,showo}, any sizes); a case that the folder lacks is skipped by
name."""
import gzip
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from checkpoint import load_strict
from text_tokenizer import load_tokenizer
from vision_encoder import (
    VISION_ENCODERS,
    CLIPConfig,
    CLIPVision,
    SigLIPConfig,
    SigLIPNaViT,
    bagel_resize,
    bagel_size,
    caption_words,
    clip_pixels,
    grid_ids,
    magvit_pixels,
    patchify,
    square_pixels,
    to_pixels,
    words_loss,
)

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.environ.get("PARITY_DIR", os.path.join(HERE, "golden"))
SMALL_CLIP = CLIPConfig(width=24, layers=3, skip_last=1, heads=2, mlp_width=40, image_size=12, patch=4)
SMALL_SIGLIP = SigLIPConfig(width=24, layers=2, heads=2, mlp_width=40, patch=4, positions=5)

@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    yield

def golden(model, first):
    """config.json, weights and cases of golden/<model>; skips by name where a file or the tensor `first` is not
    there."""
    folder = os.path.join(GOLDEN, model)
    for name in ("config.json", "weights.safetensors", "cases.safetensors"):
        if not os.path.exists(os.path.join(folder, name)):
            pytest.skip(f"{os.path.join(folder, name)} is not there")
    cases = load_file(os.path.join(folder, "cases.safetensors"))
    if first not in cases:
        pytest.skip(f"no tensor {first} in {folder}")
    with open(os.path.join(folder, "config.json")) as f:
        return json.load(f), load_file(os.path.join(folder, "weights.safetensors")), cases

def compare(rows, cases, tolerance=2e-5):
    """rows: (name of the golden tensor, ours). Float: |a - b| <= tolerance * max(1, max|b|); integers: equal."""
    table, bad = [], 0
    for name, got in rows:
        want = cases[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = (got.double() - want.double()).abs().max().item()
        limit = tolerance * max(1.0, want.abs().max().item()) if want.is_floating_point() else 0.0
        verdict = "OK" if error <= limit else "NOT OK"
        table.append(f"{name:32s} {verdict:7s} difference {error:.2e}  tolerance {limit:.2e}")
        bad += not error <= limit
    print("\n".join(table))
    assert not bad, "\n" + "\n".join(table)

def outputs(modules):
    """Collects what the modules return, in the order in which they run."""
    kept = []

    def keep(module, args, out):
        kept.append(out)

    for module in modules:
        module.register_forward_hook(keep)
    return kept

def clip_of(config):
    c = config["clip_vision_config"]
    return CLIPVision(CLIPConfig(width=c["hidden_size"], layers=c["num_hidden_layers"],
                                 skip_last=-1 - config["clip_select_layer"], heads=c["num_attention_heads"],
                                 mlp_width=c["intermediate_size"], image_size=c["image_size"], patch=c["patch_size"],
                                 eps=c["layer_norm_eps"]))

# ---------------------------------------------------------------------------------------------------------------------
# golden numbers, published keys

@torch.no_grad()
def test_golden_clip():
    config, weights, cases = golden("showo", "clip.in.pixels")
    m = clip_of(config)
    load_strict(m, {k: t for k, t in weights.items() if k.startswith("vision_model.")})
    layers = m.vision_model["encoder"]["layers"]
    kept = outputs([m.vision_model["pre_layrnorm"], layers[-2]])
    features = m(cases["clip.in.pixels"])
    compare([("clip.out.hidden_first", kept[0]), ("clip.out.features", features),
             ("clip.out.hidden_last", layers[-1](kept[1]))], cases)
    assert m.num_tokens == config["clip_num_tokens"] == features.shape[1]

@torch.no_grad()
def test_golden_siglip():
    config, weights, cases = golden("bagel", "vit.img0")
    c = config["vit_config"]
    m = SigLIPNaViT(SigLIPConfig(width=c["hidden_size"], layers=c["num_hidden_layers"] + 1 + config["vit_select_layer"],
                                 heads=c["num_attention_heads"], mlp_width=c["intermediate_size"],
                                 patch=c["patch_size"], eps=c["layer_norm_eps"],
                                 positions=config["bagel_config"]["vit_max_num_patch_per_side"]))
    load_strict(m, {k[len("vit_model."):]: t for k, t in weights.items() if k.startswith("vit_model.")})
    layers, e = m.vision_model["encoder"]["layers"], m.vision_model["embeddings"]
    kept, rows = outputs(layers), []
    for i in range(len(cases["vit.seqlens"])):  # published: all pictures in one packed row. Ours: one after the other
        image = cases[f"vit.img{i}"]
        patches = patchify(image, c["patch_size"])
        ids = grid_ids(*(side // c["patch_size"] for side in image.shape[1:]), m.config.positions)
        rows.append((patches, ids, torch.tensor([len(patches)]), m(patches[None], ids)[0],
                     e["patch_embedding"](patches) + e["position_embedding"](ids)))
    names = ("vit.patches", "vit.position_ids", "vit.seqlens", "vit.out", "vit.embeddings.out")
    compare([*[(name, torch.cat(parts)) for name, parts in zip(names, zip(*rows))],
             *[(f"vit.layer{i}.out", torch.cat(kept[i::len(layers)], 1)[0]) for i in range(len(layers))]], cases)

def test_golden_preprocessing_showo():
    config, _, cases = golden("showo", "preproc.in.rgb")
    image, size = Image.fromarray(cases["preproc.in.rgb"].numpy()), config["magvitv2"]["resolution"]
    compare([("preproc.out.clip", clip_pixels(image, config["clip_vision_config"]["image_size"])),
             ("preproc.out.vq", magvit_pixels(image, size)),
             ("preproc.out.reca_square", square_pixels(image, size))], cases, 1e-6)

def test_golden_preprocessing_bagel():
    config, _, cases = golden("bagel", "transform.wh")
    sizes = [[bagel_size(w, h, *case) for w, h in cases["transform.wh"].tolist()]
             for case in cases["transform.cases"].tolist()]
    image = Image.fromarray(cases["transform.image_u8"].numpy())
    compare([("transform.new_wh", torch.tensor(sizes)),
             ("transform.image_out", to_pixels(bagel_resize(image, *config["transform_image_args"])))], cases, 1e-6)

@pytest.mark.parametrize("name, file, prefix", [("clip-vit-large-patch14-336", "clip-vit-large-patch14-336", ""),
                                                ("siglip-so400m-14-980", "bagel-7b-mot", "vit_model.")])
def test_keys(name, file, prefix):
    with torch.device("meta"):
        m = (CLIPVision if "clip" in name.split("-") else SigLIPNaViT)(VISION_ENCODERS[name])
    with gzip.open(os.path.join(HERE, "golden", "keys", f"{file}.keys.json.gz")) as f:
        want = {k[len(prefix):]: v for k, v in json.load(f).items() if k.startswith(prefix)}
    assert {k: list(t.shape) for k, t in m.state_dict().items()} == want

# ---------------------------------------------------------------------------------------------------------------------
# CLIP

@torch.no_grad()
def test_clip_reads_the_penultimate_layer():
    m = CLIPVision(SMALL_CLIP)
    x = torch.randn(2, 3, 12, 12)
    features = m(x)
    assert features.shape == (2, 9, 24)
    m.vision_model["encoder"]["layers"][2].mlp["fc2"].weight.fill_(float("nan"))
    m.vision_model["post_layernorm"].weight.fill_(float("nan"))
    assert torch.equal(m(x), features), "the last block or the final norm was used"
    x[1] = 0  # rows are independent; tokens are patches row by row
    assert torch.equal(m(x)[0], features[0]) and not torch.allclose(m(x)[1], features[1])
    e = m.vision_model["embeddings"]
    want = F.conv2d(x, e.patch_embedding.weight, stride=4)[:, :, 1, 2] + e.position_embedding.weight[1 + 5]
    assert torch.allclose(e(x)[:, 1 + 5], want, atol=1e-6)

def test_clip_wrong_size():
    with pytest.raises(ValueError, match=re.escape("(1, 3, 12, 16), expected (B, 3, 12, 12)")):
        CLIPVision(SMALL_CLIP)(torch.zeros(1, 3, 12, 16))

@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_tiny_parameters_all_learn(name):
    c = VISION_ENCODERS[name]
    x = torch.randn(2, 3, 48, 48)
    if name == "tiny-clip":
        m = CLIPVision(c)
        out = m(x)
    else:
        m = SigLIPNaViT(c)
        out = m(patchify(x, c.patch), grid_ids(3, 3, c.positions))
    assert out.shape == (2, 9, 128) and sum(p.numel() for p in m.parameters()) < 4e5
    (out * torch.randn(out.shape)).sum().backward()
    for k, p in m.named_parameters():
        assert p.grad is not None and (p.grad.abs().max() > 0 or k.endswith("k_proj.bias")), k

# ---------------------------------------------------------------------------------------------------------------------
# SigLIP

def test_siglip_pictures_see_only_themselves():
    m = SigLIPNaViT(SMALL_SIGLIP)
    ids = grid_ids(2, 3, 5)
    assert ids.tolist() == [0, 1, 2, 5, 6, 7] and grid_ids(5, 1, 5).tolist() == [0, 5, 10, 15, 20]
    patches = patchify(torch.randn(3, 3, 8, 12), 4).requires_grad_()
    out = m(patches, ids)
    assert torch.allclose(out[1:2], m(patches[1:2], ids), atol=1e-5)
    assert torch.equal(out, m(patches, ids.expand(3, -1)))
    out[1].sum().backward()
    assert (patches.grad.abs().amax(2) > 0).tolist() == [[False] * 6, [True] * 6, [False] * 6]

def test_patch_order_equals_a_convolution():
    """Inside a patch: row, column, channel. So the linear layer is SigLIP's original convolution with its weight
    permuted."""
    x, w = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 4)
    ours = patchify(x, 4) @ w.permute(0, 2, 3, 1).reshape(5, -1).T
    assert torch.allclose(ours, F.conv2d(x, w, stride=4).flatten(2).transpose(1, 2), atol=1e-4)
    assert torch.equal(patchify(x, 4)[1], patchify(x[1], 4))

def test_patch_and_grid_errors():
    with pytest.raises(ValueError, match="10x8 pixels.*4x4 patches.*multiples of 4"):
        patchify(torch.zeros(3, 10, 8), 4)
    with pytest.raises(ValueError, match="2x6 does not fit the 5x5"):
        grid_ids(2, 6, 5)

# ---------------------------------------------------------------------------------------------------------------------
# preprocessing

def ramp(w, h):
    """Every column of its own gray: resized and cropped pictures tell where they came from."""
    return Image.fromarray(np.repeat(np.tile(np.arange(w, dtype=np.uint8), (h, 1))[..., None], 3, 2))

def test_crops():
    x = to_pixels(ramp(19, 8), 0.0, 1 / 255)[0, 0].tolist()
    assert x == pytest.approx(list(range(19)))

    def gray(pixels, mean, std):
        return ((pixels[0, 0] * std + mean) * 255).round().tolist()

    # A margin of 11: CLIP leaves 5 on the left; the image tokenizer rounds 5.5 to 6. A margin of 9: 4 and 4.
    for width, clip, magvit in ((19, 5, 6), (17, 4, 4)):
        assert gray(clip_pixels(ramp(width, 8), 8), 0.48145466, 0.26862954) == list(range(clip, clip + 8))
        assert gray(magvit_pixels(ramp(width, 8), 8), 0.5, 0.5) == list(range(magvit, magvit + 8))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 17, 3), dtype=np.uint8))
    turned = noise.transpose(Image.Transpose.TRANSPOSE)
    for image, box in ((noise, (1, 0, 5, 4)), (turned, (0, 1, 4, 5))):  # 4 * 17/10 = 6.8 pixels: cut to 6
        small = image.resize((6, 4) if image.width > image.height else (4, 6), Image.Resampling.BICUBIC)
        assert torch.equal(magvit_pixels(image, 4), to_pixels(small.crop(box)))
    for w, h in ((31, 90), (90, 31), (64, 64), (3, 5)):
        for f in (clip_pixels, magvit_pixels, square_pixels):
            x = f(Image.new("L", (w, h), 128), 16)
            assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and x.is_contiguous()
    flat = magvit_pixels(Image.new("RGB", (20, 20), (255, 0, 51)), 4)
    assert torch.allclose(flat[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))

def test_transparent_pictures_on_white():
    image = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    image.paste((200, 0, 0, 255), (0, 0, 16, 32))
    for other in (image, image.convert("LA").convert("RGBA")):
        x = np.asarray(bagel_resize(other, 32, 32, 16))
        assert x.shape == (32, 32, 3) and (x[:, 20:] == 255).all() and (x[:, 2] < 210).all()
    p = Image.new("P", (32, 32), 0)
    p.putpalette([7, 7, 7, 250, 0, 0])
    p.paste(1, (0, 0, 16, 32))
    p.info["transparency"] = 0
    x = np.asarray(bagel_resize(p, 32, 32, 16))
    assert (x[:, 20:] == 255).all() and (x[:, 2] == (250, 0, 0)).all()

def test_bagel_sizes():
    assert bagel_size(224, 100, 224, 224, 14) == (224, 98)  # RecA: long side exactly 224
    assert bagel_size(4000, 4000, 980, 224, 14) == (980, 980)
    assert bagel_size(100, 100, 1024, 512, 16) == (512, 512)
    # 49 times too many pixels: each side becomes 49 times shorter, not 7
    assert bagel_size(980, 980, 980, 224, 14, 14 * 14 * 100) == (14, 14)
    assert bagel_size(5000, 3, 1024, 512, 16) == (1024, 16)

# ---------------------------------------------------------------------------------------------------------------------
# words

def test_caption_words():
    """Ids that the caption has, however often; a caption's own special strings are spelled out."""
    tokenizer = load_tokenizer("tiny")
    captions = ["a red star and a red circle", "", "<|im_end|>"]
    words = caption_words(tokenizer, captions)
    assert words.shape == (3, tokenizer.vocab_size) and words.dtype == torch.float32
    for row, caption in zip(words, captions):
        assert row.nonzero().flatten().tolist() == sorted(set(tokenizer.encode_ordinary(caption)))
    assert words.max() == 1 and words[2].sum() > 1 and words[2, tokenizer.encode("<|im_end|>")] == 0

def test_words_of_dense_captions_each_for_itself():
    g = torch.Generator().manual_seed(0)
    embeddings, seen = torch.randn(20, 8, generator=g), torch.randn(4, 3, 8, generator=g)
    words = torch.zeros(4, 20)
    words[:, 0] = 1  # in all captions, and words 9 to 19 in none: not asked for
    for i in range(4):
        words[i, [1 + i, 5 + i]] = 1
    like = 20 * (F.cosine_similarity(seen[:, :, None], embeddings[None, None], dim=-1).amax(1) - 0.3)[:, 1:9]
    want = -(words[:, 1:9] * F.logsigmoid(like) + (1 - words[:, 1:9]) * F.logsigmoid(-like)).mean()
    torch.testing.assert_close(words_loss(seen, words, embeddings), want)
    told = torch.zeros(4, 3, 20)  # pictures that hold, each word at a place of its own, what their captions say
    for i in range(4):
        told[i, 0, 1 + i] = told[i, 1, 5 + i] = told[i, 2, 0] = 1
    assert words_loss(told, words, torch.eye(20)) < 0.01
    assert words_loss(told[[1, 2, 3, 0]], words, torch.eye(20)) > 0.01
