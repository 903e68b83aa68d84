"""OpenUni's autoencoder, DC-AE, against numbers from the published implementation.

PARITY_DIR=folder replaces tests/golden (folder/openuni/{config.json, weights.safetensors, cases.safetensors}, any
sizes)."""
import gzip
import json
import os
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import load_strict
from image_tokenizer import TOKENIZERS, DCAutoencoder, DCAutoencoderConfig, relu_attention

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(os.environ.get("PARITY_DIR", os.path.join(HERE, "golden")), "openuni")
TIGHT = 1e-5  # factor on max|reference|

@lru_cache(maxsize=None)
def golden():
    """-> (cases, DC-AE with the golden weights)."""
    for name in ("config.json", "cases.safetensors", "weights.safetensors"):
        if not os.path.exists(os.path.join(GOLDEN, name)):
            pytest.skip(f"{os.path.join(GOLDEN, name)} is not there")
    with open(os.path.join(GOLDEN, "config.json")) as f:
        v = json.load(f)["vae"]
    model = DCAutoencoder(DCAutoencoderConfig(
        widths=tuple(v["encoder_block_out_channels"]), encoder_blocks=tuple(v["encoder_layers_per_block"]),
        decoder_blocks=tuple(v["decoder_layers_per_block"]),
        attention_from=v["encoder_block_types"].index("EfficientViTBlock"), head_dim=v["attention_head_dim"],
        z_channels=v["latent_channels"], scale=v["scaling_factor"]))
    weights = load_file(os.path.join(GOLDEN, "weights.safetensors"))
    load_strict(model, {k[4:]: t for k, t in weights.items() if k.startswith("vae.")}, GOLDEN)
    return load_file(os.path.join(GOLDEN, "cases.safetensors")), model.eval()

def compare(rows, cases):
    """rows: {name of the golden tensor: ours}; |a - b| <= TIGHT * max|b|."""
    table, good = [], True
    for name, got in rows.items():
        want = cases[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = ((got - want).abs().max() / want.abs().max()).item()
        good &= error <= TIGHT  # nan fails
        table.append(f"{name:24s} relative difference {error:.2e}, allowed {TIGHT:.0e}")
    print("\n".join(table))
    assert good, "\n" + "\n".join(table)

@torch.no_grad()
def test_encode():
    cases, model = golden()
    images, rows = cases["vae.encode.in"], {}
    x = model.encoder.conv_in(images)
    for i, stage in enumerate(model.encoder.down_blocks):
        x = rows[f"vae.encode.down{i}"] = stage(x)
    compare(rows | {"vae.encode.out": model.encoder(images), "vae.encode.scaled": model.encode(images)}, cases)
    assert model.stride == images.shape[-1] // cases["vae.encode.out"].shape[-1]

@torch.no_grad()
def test_decode():
    cases, model = golden()
    z = cases["vae.decode.in"]
    given = z.clone()
    compare({"vae.decode.out": model.decoder(z), "vae.decode.from_scaled": model.decode(z)}, cases)
    assert torch.equal(z, given), "decode changed its argument"

@torch.no_grad()
def test_sides_and_neighbors():
    """Pictures of other proportions, alone or among others; sides that do not fit are told."""
    _, model = golden()
    s = model.stride
    x = torch.rand(3, 3, 2 * s, 5 * s, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = model.encode(x)
    assert z.shape == (3, model.config.z_channels, 2, 5) and model.decode(z).shape == x.shape
    assert torch.allclose(z[1:2], model.encode(x[1:2]), atol=1e-5)
    with pytest.raises(ValueError, match=f"{s}x{s + 1} pixels.*multiples of {s}"):
        model.encode(torch.zeros(1, 3, s, s + 1))
    with pytest.raises(ValueError, match=f"at least {s}"):
        model.encode(torch.zeros(1, 3, s - 1, s))

def test_linear_attention_is_the_quadratic_one():
    """Weights relu(q) . relu(k), normalized over the keys; a query that fits no key gets zeros; in float32 inside."""
    q, k, v = torch.randn(3, 2, 4, 50, 8, generator=torch.Generator().manual_seed(0)).unbind()
    q[0, 0, 0] = -1.0
    weight = q.double().relu() @ k.double().relu().transpose(-1, -2)
    want = weight / (weight.sum(-1, keepdim=True) + 1e-15) @ v.double()
    got = relu_attention(q, k, v)
    assert torch.allclose(got.double(), want, atol=1e-5) and torch.equal(got[0, 0, 0], torch.zeros(8))
    half = [t.bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        got = relu_attention(*half)
    assert got.dtype == torch.bfloat16 and torch.equal(got, relu_attention(*(t.float() for t in half)).bfloat16())

def test_keys():
    """The published keys and shapes, 312 M parameters."""
    with torch.device("meta"):
        model = DCAutoencoder(TOKENIZERS["dc-ae-f32c32"])
    with gzip.open(os.path.join(HERE, "golden", "keys", "dc-ae-f32c32.keys.json.gz")) as f:
        want = json.load(f)
    assert {k: list(t.shape) for k, t in model.state_dict().items()} == want
    assert sum(p.numel() for p in model.parameters()) == 312_250_275 and model.stride == 32
