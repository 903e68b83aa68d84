"""Image tokenizers against numbers of the published implementations, and the training of the tiny ones.

PARITY_DIR=folder replaces tests/golden (folder/{harmon,bagel,showo}, any sizes); a case that the folder lacks is
skipped by name."""
import gzip
import itertools
import json
import math
import os
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import data
import image_tokenizer
import shape_world
from checkpoint import load_strict, read_weights, write_safetensors
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig, LFQConfig, LFQTokenizer, TokenizerStage

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.environ.get("PARITY_DIR", os.path.join(HERE, "golden"))

@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    yield

def build(name, **changes):
    c = replace(TOKENIZERS[name], **changes)
    return (LFQTokenizer if isinstance(c, LFQConfig) else Autoencoder)(c)

def pictures(n=2, h=48, w=48, seed=0):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1

TINY = sorted(n for n in TOKENIZERS if n.startswith("tiny"))
# Small, but with everything the published ones have: two levels, attention in a level, both 1x1 convolutions, 3x3
# convolutions and GroupNorm.
SMALL_KL = AutoencoderConfig(ch=16, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, resolution=32,
                             encoder_attn_resolutions=(16,), groups=8)
SMALL_LFQ = LFQConfig(ch=16, encoder_ch_mult=(1, 2), encoder_res_blocks=(1, 2), decoder_ch_mult=(1, 1),
                      decoder_res_blocks=(2, 1), bits=5, groups=8)
SMALL_DC = image_tokenizer.DCAutoencoderConfig(widths=(32, 32, 64), encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1),
                                               attention_from=2, z_channels=8)

# ---------------------------------------------------------------------------------------------------------------------
# golden numbers, published keys

def golden(model, file="cases.safetensors"):
    """config.json and the tensors of golden/<model>; skips by name where they are not."""
    for name in ("config.json", file):
        if not os.path.exists(os.path.join(GOLDEN, model, name)):
            pytest.skip(f"{os.path.join(GOLDEN, model, name)} is not there")
    with open(os.path.join(GOLDEN, model, "config.json")) as f:
        return json.load(f), load_file(os.path.join(GOLDEN, model, file))

def compare(rows, cases, tolerance):
    """rows: (name of the golden tensor, ours). Float: |a - b| <= tolerance * max(1, max|b|); integers: equal."""
    table, bad = [], 0
    for name, got in rows:
        if name not in cases:
            pytest.skip(f"no tensor {name} in {GOLDEN}")
        want = cases[name]
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
        error = (got.double() - want.double()).abs().max().item()
        limit = tolerance * max(1.0, want.abs().max().item()) if want.is_floating_point() else 0.0
        verdict = "OK" if error <= limit else "NOT OK"
        table.append(f"{name:32s} {verdict:7s} difference {error:.2e}  tolerance {limit:.2e}")
        bad += not error <= limit
    print("\n".join(table))
    assert not bad, "\n" + "\n".join(table)

@torch.no_grad()
def test_golden_kl():
    config, weights = golden("harmon", "weights.safetensors")
    _, cases = golden("harmon")
    v = dict(config["vae"])
    m = Autoencoder(AutoencoderConfig(z_channels=v.pop("embed_dim"), scale=config["vae_scale"],
                                      **{k: tuple(x) if isinstance(x, list) else x for k, x in v.items()}))
    load_strict(m, {k[4:]: t for k, t in weights.items() if k.startswith("vae.")})
    if "vae.encode.in.image" not in cases:
        pytest.skip(f"no case vae.encode in {GOLDEN}/harmon")
    images, latents = cases["vae.encode.in.image"], cases["vae.decode.in.latents"]
    given = latents.clone()
    compare([("vae.encode.out.encoder", m.encoder(images)), ("vae.encode.out.moments", m.moments(images)),
             ("vae.encode.out.latents", m.encode(images).permute(0, 2, 3, 1)),
             ("vae.decode.out.image", m.decode(latents.permute(0, 3, 1, 2)))], cases, 3e-6)
    assert torch.equal(latents, given), "decode changed its argument"
    assert m.stride == config["mar"]["vae_stride"]

@torch.no_grad()
def test_golden_flux():
    config, weights = golden("bagel", "ae.safetensors")
    _, cases = golden("bagel")
    a = config["vae_config"]
    m = Autoencoder(AutoencoderConfig(ch=a["ch"], ch_mult=tuple(a["ch_mult"]), num_res_blocks=a["num_res_blocks"],
                                      z_channels=a["z_channels"], resolution=a["resolution"],
                                      encoder_attn_resolutions=(), quant_conv=False, scale=a["scale_factor"],
                                      shift=a["shift_factor"]))
    load_strict(m, weights)
    if "vae.encode.in" not in cases:
        pytest.skip(f"no case vae in {GOLDEN}/bagel")
    compare([("vae.encode.moments", m.moments(cases["vae.encode.in"])),
             ("vae.encode.out", m.encode(cases["vae.encode.in"], cases["vae.encode.eps"])),
             ("vae.decode.out", m.decode(cases["vae.decode.in"]))], cases, 2e-5)
    assert m.stride == a["downsample"]

@torch.no_grad()
def test_golden_magvit():
    config, weights = golden("showo", "weights.safetensors")
    _, cases = golden("showo")
    c = config["magvitv2"]
    e, d = c["encoder"], c["decoder"]
    m = LFQTokenizer(LFQConfig(ch=e["ch"], encoder_ch_mult=tuple(e["ch_mult"]),
                               encoder_res_blocks=tuple(e["num_res_blocks"]), decoder_ch_mult=tuple(d["ch_mult"]),
                               decoder_res_blocks=tuple(d["num_res_blocks"]), bits=c["codebook_dim"]))
    signs, powers = m.quantize.embedding.clone(), m.quantize.power_vals.clone()
    load_strict(m, {k: t for k, t in weights.items() if k.split(".")[0] in ("encoder", "decoder", "quantize")})
    same = torch.equal(signs, m.quantize.embedding) and torch.equal(powers, m.quantize.power_vals)
    assert same, "buffers differ from the file's"
    if "vae.in.pixels" not in cases:
        pytest.skip(f"no case vae in {GOLDEN}/showo")
    given = {k[len("vae.in."):]: t for k, t in cases.items() if k.startswith("vae.in.")}
    z = m.features(given["pixels"])
    side = math.isqrt(given["decode_indices"].shape[1])
    square = given["decode_indices"].view(-1, side, side)
    commitment, _ = m.quantizer_losses(z)  # its entropy counts codes, the published one bits: no golden number for it
    compare([("vae.out.z", z), ("vae.out.rect_z", m.features(given["rect_pixels"])),
             ("vae.out.indices", m.encode(given["pixels"]).flatten(1)),
             ("vae.out.rect_indices", m.encode(given["rect_pixels"]).flatten(1)), ("vae.out.decoded", m.decode(square)),
             ("vae.out.codebook_entry", m.quantize.embedding[square].permute(0, 3, 1, 2)),
             ("vae.out.decoded_nonsquare", m.decode(given["nonsquare_indices"].view(-1, *c["nonsquare"]))),
             ("vae.out.quantizer_loss", commitment)], cases, 2e-5)

@pytest.mark.parametrize("name, file, prefix", [("kl16", "harmon-0.5b", "vae."), ("flux", "flux-ae", ""),
                                                ("magvitv2", "magvitv2", "")])
def test_keys(name, file, prefix):
    with torch.device("meta"):
        m = build(name)
    with gzip.open(os.path.join(HERE, "golden", "keys", f"{file}.keys.json.gz")) as f:
        want = {k[len(prefix):]: v for k, v in json.load(f).items() if k.startswith(prefix)}
    assert {k: list(t.shape) for k, t in m.state_dict().items()} == want
    whole = {"quantize.power_vals"} if name == "magvitv2" else set()
    assert {k for k, t in m.state_dict().items() if not t.is_floating_point()} == whole
    if name != "kl16":
        assert sum(p.numel() for p in m.parameters()) == {"flux": 83_819_683, "magvitv2": 95_387_004}[name]
    assert m.stride == {"kl16": 16, "flux": 8, "magvitv2": 16}[name]

# ---------------------------------------------------------------------------------------------------------------------
# encode, decode

@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_tiny_shapes_and_size(name):
    m = build(name)
    assert m.stride == 16 and sum(p.numel() for p in m.parameters()) <= 0.6e6
    for h, w in ((48, 48), (32, 64)):
        codes = m.encode(pictures(2, h, w))
        assert codes.shape[-2:] == (h // 16, w // 16) and len(codes) == 2
        assert m.decode(codes).shape == (2, 3, h, w)
    # a picture's code does not depend on its neighbours in the batch
    x = pictures(3)
    assert torch.allclose(m.encode(x)[1:2].float(), m.encode(x[1:2]).float(), atol=1e-5)

@pytest.mark.parametrize("config", [SMALL_KL, SMALL_LFQ, *[TOKENIZERS[n] for n in TINY]],
                         ids=lambda c: f"{type(c).__name__}-{c.ch}")
def test_bad_images(config):
    m = (LFQTokenizer if isinstance(config, LFQConfig) else Autoencoder)(config)
    for shape in ((1, 1, 48, 48), (3, 48, 48), (1, 3, 48, m.stride - 1)):
        with pytest.raises(ValueError, match=re.escape(str(shape)) + f".*at least {m.stride}"):
            m.encode(torch.zeros(shape))

@pytest.mark.parametrize("config", [SMALL_KL, SMALL_LFQ, SMALL_DC], ids=lambda c: type(c).__name__)
@torch.no_grad()
def test_every_convolution_gets_channels_last(config, monkeypatch):
    """And what comes out is what it was without."""
    m = image_tokenizer.build(config)
    got, wanted = {}, {}
    for seen, way in ((wanted, torch.Tensor.contiguous), (got, image_tokenizer.channels_last)):
        monkeypatch.setattr(image_tokenizer, "channels_last", way)
        inputs = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
                 for layer in m.modules() if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3)]
        seen["z"] = m.encode(pictures())
        seen["image"] = m.decode(seen["z"].contiguous())
        seen["last"] = all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)
        for hook in hooks:
            hook.remove()
    assert got.pop("last") and not wanted.pop("last")
    assert all(torch.allclose(got[k].float(), wanted[k].float(), atol=1e-5) for k in got)

@torch.no_grad()
def test_posterior_sample_scale_and_shift():
    m = Autoencoder(replace(SMALL_KL, scale=0.5, shift=0.25))
    x, noise = pictures(2, 32, 32), torch.randn(2, 4, 16, 16)
    mean, logvar = m.moments(x).chunk(2, 1)
    assert torch.allclose(m.encode(x), (mean - 0.25) * 0.5, atol=1e-6)
    assert torch.allclose(m.encode(x, noise), (mean + noise * logvar.exp().sqrt() - 0.25) * 0.5, atol=1e-6)
    z = m.encode(x)
    given = z.clone()
    assert torch.allclose(m.decode(z), m.decoder(m.post_quant_conv(mean)), atol=1e-4) and torch.equal(z, given)

@torch.no_grad()
def test_lfq_codes_are_sign_patterns():
    m = LFQTokenizer(SMALL_LFQ)
    z = torch.full((1, 5, 1, 2), -1.0)
    z[0, 0, 0, 0] = 0.3  # channel 0 is the most significant bit
    z[0, 4, 0, 1] = 0.3
    z[0, 3, 0, 1] = 0.0  # zero counts as bit 0
    m.features = lambda images: z
    assert m.encode(None).tolist() == [[[16, 1]]] and m.encode(None).dtype == torch.int64
    for code in range(32):
        bits = [int(b) for b in f"{code:05b}"]
        assert m.quantize.embedding[code].tolist() == [2.0 * b - 1 for b in bits]
    seen = []
    m.decode_signs = lambda q: seen.append(q)
    m.decode(m.encode(None))
    assert torch.equal(seen[0], torch.where(z > 0, 1.0, -1.0))

# ---------------------------------------------------------------------------------------------------------------------
# training

def test_lfq_forward_is_decode_of_encode():
    m = LFQTokenizer(SMALL_LFQ)
    x = pictures(2, 16, 16)
    with torch.no_grad():
        assert torch.allclose(m(x)[0], m.decode(m.encode(x)), atol=1e-5)

def test_lfq_straight_through():
    """The gradient that reaches z is the one that reaches the signs, and it goes on into the first convolution of the
    encoder."""
    m = LFQTokenizer(SMALL_LFQ)
    kept = {}
    features, decode_signs = m.features, m.decode_signs
    m.features = lambda images: kept.setdefault("z", features(images))
    m.decode_signs = lambda q: decode_signs(kept.setdefault("q", q))
    recon, _, _ = m(pictures(2, 16, 16))
    kept["z"].retain_grad()
    kept["q"].retain_grad()
    recon.square().sum().backward()
    assert kept["q"].grad.abs().max() > 0 and torch.equal(kept["z"].grad, kept["q"].grad)
    assert torch.allclose(kept["q"].abs(), torch.ones(()), atol=1e-6)
    assert m.encoder.conv_in.weight.grad.abs().max() > 0

def test_lfq_losses_against_brute_force():
    """Probabilities by softmax over both values of every bit, entropies by summation, one number at a time."""
    m = LFQTokenizer(replace(SMALL_LFQ, commitment_weight=0.45, entropy_weight=0.7))
    z = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def H(p):
        return -sum(x * math.log(x) for x in p)

    commitment, entropy = 0.0, 0.0
    for b, c, i, j in itertools.product(range(2), range(5), range(2), range(3)):
        v = z[b, c, i, j].item()
        e = [math.exp(-(v - 1) ** 2), math.exp(-(v + 1) ** 2)]
        entropy += H([e[0] / sum(e), e[1] / sum(e)]) / 12
        q = 1.0 if v > 0 else -1.0
        commitment += 0.3 * ((q - v) ** 2 + 0.5 * (q - v) ** 2) / 60
    got = m.quantizer_losses(z)
    assert got[0].item() == pytest.approx(commitment, rel=1e-5)
    # entropy of the mean distribution over all 32 codes
    mean = [0.0] * 32
    for b, i, j in itertools.product(range(2), range(2), range(3)):
        on = [1 / (1 + math.exp(-4 * v)) for v in z[b, :, i, j].tolist()]
        for code in range(32):
            mean[code] += math.prod(p if code >> (4 - c) & 1 else 1 - p for c, p in enumerate(on)) / 12
    assert got[1].item() == pytest.approx(0.7 * (entropy - H(mean)), rel=1e-4)
    # far from zero: no nan, and nothing pulls
    far = torch.full((1, 5, 1, 1), 40.0, requires_grad=True)
    m.quantizer_losses(far)[1].backward()
    assert torch.isfinite(far.grad).all()

def test_autoencoder_loss_against_brute_force():
    m = Autoencoder(replace(SMALL_KL, kl_weight=0.125))
    x = pictures(2, 32, 32)
    torch.manual_seed(3)
    loss, parts = image_tokenizer.tokenizer_loss(m, x)
    with torch.no_grad():
        mean, logvar = m.moments(x).chunk(2, 1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
        recon = m.decode(m.encode(x, noise))
        posterior = torch.distributions.Normal(mean, logvar.exp().sqrt())
        prior = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
        kl = torch.distributions.kl_divergence(posterior, prior).mean()
        want = {"l1": F.l1_loss(recon, x), "mse": F.mse_loss(recon, x), "kl": 0.125 * kl}
    assert set(parts) == set(want) and not any(p.requires_grad for p in parts.values())
    for k, v in want.items():
        assert parts[k].item() == pytest.approx(v.item(), rel=1e-4), k
    assert loss.item() == pytest.approx(sum(v.item() for v in want.values()), rel=1e-5)
    other, _ = image_tokenizer.tokenizer_loss(m, x)
    torch.manual_seed(3)
    same, _ = image_tokenizer.tokenizer_loss(m, x)
    assert same.item() == loss.item() != other.item()

def test_lfq_loss_weights():
    m = LFQTokenizer(replace(SMALL_LFQ, l1_weight=0.5, mse_weight=3.0))
    x = pictures(2, 16, 16)
    loss, parts = image_tokenizer.tokenizer_loss(m, x)
    with torch.no_grad():
        recon, commitment, entropy = m(x)
    want = {"l1": 0.5 * F.l1_loss(recon, x), "mse": 3 * F.mse_loss(recon, x), "commitment": commitment,
            "entropy": entropy}
    assert set(parts) == set(want) and all(parts[k].item() == pytest.approx(want[k].item(), rel=1e-5) for k in want)
    assert loss.item() == pytest.approx(sum(v.item() for v in want.values()), rel=1e-5)

@pytest.mark.parametrize("name", TINY)
def test_every_parameter_learns(name):
    """Nothing without a gradient (DistributedDataParallel would stop there), and a few steps on one batch lower the
    loss."""
    m = build(name)
    x = pictures(8).round(decimals=1)
    x[:, :, 8:30, 8:30] = torch.tensor([0.9, -0.8, 0.1]).view(3, 1, 1)
    optimizer = torch.optim.AdamW(m.parameters(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss, parts = image_tokenizer.tokenizer_loss(m, x)
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            for k, p in m.named_parameters():
                assert p.grad is not None and torch.isfinite(p.grad).all(), k
                assert p.grad.abs().max() > 0 or k.endswith("k.bias"), k  # a bias on all keys alike moves no softmax
        optimizer.step()
        losses.append((parts["l1"] + parts["mse"]).item())
    assert losses[-1] < 0.8 * losses[0], losses

@pytest.mark.parametrize("config", [replace(SMALL_KL, scale=1.0), TOKENIZERS["tiny-kl"]], ids=["small", "tiny"])
@torch.no_grad()
def test_calibrate_per_channel(config):
    m = Autoencoder(config)
    for p in m.quant_conv.parameters():  # something to correct
        p.add_(torch.randn(p.shape))
    x, keys = pictures(3, 32, 32), set(m.state_dict())
    mean, logvar = m.moments(x).chunk(2, 1)
    noise = torch.randn(mean.shape)
    before = m.decode(m.encode(x)), m.decode(m.encode(x, noise))
    image_tokenizer.calibrate(m, x)
    z = m.encode(x)
    assert torch.allclose(z.mean((0, 2, 3)), torch.zeros(len(z[0])), atol=1e-4)
    assert torch.allclose(z.std((0, 2, 3), correction=0), torch.ones(len(z[0])), atol=1e-4)
    for old, new in zip(before, (m.decode(z), m.decode(m.encode(x, noise)))):  # the sample too: its variance follows
        assert torch.allclose(old, new, atol=1e-3 * old.abs().max()), (old - new).abs().max()
    assert set(m.state_dict()) == keys and m.config == config

@torch.no_grad()
def test_calibrate_dead_latents():
    dead = Autoencoder(SMALL_KL)
    dead.quant_conv.weight[2] = 0
    with pytest.raises(ValueError, match="channel 2 is constant.*kl_weight"):
        image_tokenizer.calibrate(dead, pictures(4, 32, 32))

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizer stage

@pytest.mark.parametrize("name", TINY)
def test_stage_has_what_the_loop_asks_for(name):
    stage = TokenizerStage(name)
    x = stage.preprocess(Image.new("RGB", (90, 31), (255, 0, 51)), "recon")
    assert x.shape == (3, 48, 48) and torch.allclose(x[:, 5, 5], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)
    assert image_tokenizer.TINY_SIZE == shape_world.IMAGE_SIZE and stage.config == TOKENIZERS[name]
    images = data.to_float(shape_world.crowded_pictures(6, 0))
    encodings = stage.precompute(images)
    assert {k: (v.dtype, tuple(v.shape)) for k, v in encodings.items()} == {"images": (torch.uint8, (6, 3, 48, 48))}
    assert stage.collate("images", [{}] * 6, [None] * 6, None) == {}
    torch.manual_seed(3)  # the loop seeds every step, and a resumed run draws the same noise
    losses = stage({"images": encodings})
    torch.manual_seed(3)
    want, _ = image_tokenizer.tokenizer_loss(stage.tokenizer, images)
    assert set(losses) == {"images"} and losses["images"].item() == pytest.approx(want.item(), rel=1e-6)
    named = dict(stage.trainable_parameters("tokenizer"))
    assert len(named) == len(list(stage.parameters())) and all(p.requires_grad for p in named.values())
    assert {p.ndim for k, p in named.items() if stage.no_decay(k, p)} == {1} and stage.blocks() == []
    assert torch.equal(stage.reconstruct(images), stage.tokenizer.decode(stage.tokenizer.encode(images)))

@torch.no_grad()
def test_stage_finish():
    """Latents become standard; codes stay what they are."""
    images = data.to_float(shape_world.Scenes(64, seed=0).render())
    kl, lfq = TokenizerStage("tiny-kl"), TokenizerStage("tiny-lfq")
    before = {k: t.clone() for k, t in lfq.state_dict().items()}
    kl.finish(images)
    lfq.finish(images)
    assert torch.allclose(kl.tokenizer.encode(images).std((0, 2, 3), correction=0), torch.ones(16), atol=1e-3)
    assert all(torch.equal(t, before[k]) for k, t in lfq.state_dict().items())

def test_tiny_names():
    for name in TINY:
        assert image_tokenizer.tiny_name(replace(TOKENIZERS[name])) == name
    with pytest.raises(ValueError, match="bits=13.*--tokenizer-ckpt"):
        image_tokenizer.tiny_name(TOKENIZERS["magvitv2"])

@pytest.mark.parametrize("name", TINY)
def test_tiny_round_trip(name, tmp_path):
    m = build(name)
    write_safetensors(tmp_path / "model.safetensors", m.state_dict())
    torch.manual_seed(1)
    other = build(name)
    load_strict(other, read_weights(tmp_path), name)
    x = pictures(2)
    with torch.no_grad():
        z = m.encode(x)
        assert torch.equal(z, other.encode(x)) and torch.equal(m.decode(z), other.decode(z))
