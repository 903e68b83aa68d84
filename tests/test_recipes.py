"""The recipes of published sizes against the tables of the releases: what a RecA run really gets, flag by flag. (That a
recipe holds flags of train.py only is a line of test_contract.py.)"""
import dataclasses
import math

import pytest
import torch

import checkpoint
import train

PARTS = ("recon", "i2t", "t2i")
# Of a GPU's micro-batch the samples of each part, how many make an optimizer step, on how many GPUs; then optimizer
# steps, those of the whole cosine (0: constant), those of the warm-up. The first two sizes take turns: of 4 micro-
# batches 2 have only pictures, 2 only questions; halves of both in all 4 are the same step.
SIZES = {
    ("mar", "harmon-0.5b"): ((48, 48, 0), 4, 8, 750, 12500, 125),
    ("mar", "harmon-1.5b"): ((24, 24, 0), 4, 8, 1250, 12500, 125),
    ("ar", "show-o-256"): ((2, 2, 1), 20, 1, 5000, 1000000, 1000),
    ("ar", "show-o-512"): ((2, 2, 1), 20, 1, 5000, 1000000, 1000),
    ("ar", "show-o-512-blur8"): ((2, 2, 1), 5, 1, 5000, 1000000, 1000),
    ("ar", "show-o-clip-256"): ((4, 4, 1), 5, 1, 5000, 10000, 1000),
    ("ar", "show-o-clip-512"): ((2, 2, 1), 5, 1, 5000, 1000000, 1000),
    ("diffusion", "bagel-7b-mot"): ((8, 0, 0), 1, 8, 1000, 0, 1000)}
COMMON = {  # AdamW, clipping (0: none), the share of dropped prompts, weights of the losses, averaging (0: none)
    "mar": dict(lr=1e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.02, clip=1.0, drop=0.1, i2t_weight=1.0,
                t2i_weight=0.0, ema=0.0),
    "ar": dict(lr=5e-7, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clip=0.0, drop=0.0, i2t_weight=1.0,
               t2i_weight=0.0, ema=0.0),
    "diffusion": dict(lr=4e-5, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, clip=1.0, drop=0.1, i2t_weight=0.0,
                      t2i_weight=0.0, ema=0.0)}

def arguments(arch, config, *more):
    return train.parse_args(["--arch", arch, "--config", config, "--device", "cpu", *more])[0]

def test_the_table_has_every_published_size():
    assert set(SIZES) == {(arch, config) for arch in COMMON for config in checkpoint.model_file(arch).CONFIGS
                          if config not in ("tiny", "middle")}  # middle: of another test

@pytest.mark.parametrize("arch, config", SIZES)
def test_reca_is_as_published(arch, config):
    micro, accum, gpus, steps, horizon, warmup = SIZES[arch, config]
    args = arguments(arch, config)
    assert {name: getattr(args, name) for name in COMMON[arch]} == COMMON[arch]
    assert (args.steps, args.warmup, args.accum, args.muon_lr) == (steps, warmup, accum, 0.0)
    assert (args.schedule, args.horizon) == (("cosine", horizon) if horizon else ("constant", 0))
    given = dict(zip(PARTS, micro))
    weights = dict(recon=1.0, i2t=args.i2t_weight, t2i=args.t2i_weight)
    assert set(args.mix) == {part for part in PARTS if given[part] and weights[part]}
    # captions have weight 0 and are left out, but stand in the recipe as they stand in the releases
    mix = args.mix | ({"t2i": arguments(arch, config, "--t2i-weight", "1").mix["t2i"]} if given["t2i"] else {})
    assert {part: args.batch * share for part, share in mix.items()} == pytest.approx(
        {part: n * accum * gpus for part, n in given.items() if n})
    train.check_args(args, gpus)

@pytest.mark.parametrize("arch, config", SIZES)
def test_captions_alone_take_the_same_settings(arch, config):
    """The control is ours. Its prompts are dropped as in base training, as guidance needs it."""
    args, reca = arguments(arch, config, "--stage", "sft"), arguments(arch, config)
    same = ("lr", "betas", "eps", "weight_decay", "clip", "batch", "accum", "steps", "horizon", "warmup", "schedule")
    assert [getattr(args, name) for name in same] == [getattr(reca, name) for name in same]
    assert (args.mix["t2i"], args.t2i_weight, args.drop, args.ema) == (1.0, 1.0, 0.1, 0.0)

@pytest.mark.parametrize("config", ["harmon-0.5b", "harmon-1.5b"])
def test_rates_of_runs_that_count_micro_batches(config):
    """An optimizer step has the rate of the last of its 4 micro-batches."""
    def published(i):
        if i < 500:
            return 1e-5 * (1e-5 + (1 - 1e-5) * i / 499)
        return 0.5e-5 * (1 + math.cos(math.pi * (i - 500) / 49500))
    measured = {250: 5.0101e-6, 1000: 9.99748e-6, 5000: 9.79746e-6}
    assert {i: published(i) for i in measured} == pytest.approx(measured, rel=1e-5)
    args = arguments("mar", config)
    for step in (0, 1, 62, 124, 125, 126, 400, args.steps - 1, 12499):
        assert train.learning_rate(args, step, args.lr) == pytest.approx(published(4 * step + 3), rel=5e-3, abs=1e-11)

def test_rates_of_runs_that_count_optimizer_steps():
    for (arch, config), (*_, horizon, warmup) in SIZES.items():
        if arch != "mar":
            args = arguments(arch, config)
            assert [train.learning_rate(args, step, 1.0) for step in (0, 250)] == [0.0, 0.25]
            end = 0.5 * (1 + math.cos(math.pi * 3999 / (horizon - warmup))) if horizon else 0.999
            assert train.learning_rate(args, args.steps - 1, 1.0) == pytest.approx(end)
    assert train.learning_rate(arguments("ar", "show-o-clip-256"), 5000, 1.0) == pytest.approx(0.587, abs=1e-3)

def test_the_two_bottlenecks_of_image_codes():
    """Half the size gives a quarter of the codes; blurred by 8 and enlarged again, a picture keeps all of them."""
    file = checkpoint.model_file("ar")
    for config, scale, back in (("show-o-512", 2, False), ("show-o-512-blur8", 8, True)):
        c = file.CONFIGS[config]
        assert (c.reca_down_scale, c.reca_resize_back, c.w_clip_vit) == (scale, back, False)
    for back, codes in ((False, 1), (True, 9)):
        model = file.Model(dataclasses.replace(file.CONFIGS["tiny"], w_clip_vit=False, reca_down_scale=3,
                                               reca_resize_back=back))
        assert model.understand(torch.zeros(1, 3, 48, 48))["small_codes"].shape == (1, codes)
