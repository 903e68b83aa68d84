"""The loop: exact resume, N processes = one, errors in one line, what a run leaves behind. On the tiny models,
freshly initialised."""
import argparse
import contextlib
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from helpers import run
from PIL import Image
from processes import ROOT, Launch, torchrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import custom_kernels.pick
import data
import shape_world
import train

ARCHS = [arch for arch in checkpoint.architectures() if "base" in checkpoint.model_file(arch).RECIPES["tiny"]]
SMALL = ["--batch", "8", "--pool", "32", "--eval-n", "0", "--log-every", "1", "--steps", "4", "--warmup", "2",
         "--device", "cpu", "--threads", "1"]

def made(*argv, stage=None):
    """args, the model and the batches of a command."""
    args, _ = train.parse_args([*argv])
    torch.manual_seed(args.seed)
    model = train.build(args)
    model.trainable_parameters(stage or args.stage)
    return args, model, data.Batches(args, model)

def losses(folder):
    rows = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    timed = ("ms", "images_per_s", "step", "mfu")
    return {r["step"]: {k: v for k, v in r.items() if k not in timed} for r in rows if "loss" in r}

def python(*argv, **more):
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=400, **more)

@pytest.mark.parametrize("arch", ARCHS)
def test_resume_is_exact_after_a_signal(arch, tmp_path, monkeypatch, capsys):
    common = ["--arch", arch, "--stage", "base", *SMALL, "--gemm", "mkl"]  # auto may choose otherwise
    assert run(*common, out=tmp_path / "whole") == 0
    true_rate = train.learning_rate

    def rate(args, step, lr):
        if step == 1:
            # arrives during the second step: the step is finished, saved, and the run ends
            os.kill(os.getpid(), signal.SIGTERM)
        return true_rate(args, step, lr)
    monkeypatch.setattr(train, "learning_rate", rate)
    assert run(*common, out=tmp_path / "cut") == 128 + signal.SIGTERM
    assert f"--resume {tmp_path / 'cut'}" in capsys.readouterr().out
    monkeypatch.undo()
    assert run("--resume", str(tmp_path / "cut"), out=tmp_path / "cut") == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")  # bit for bit, gradient norms too
    a, b = (torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("cut", "whole"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in b["model"])

@pytest.mark.parametrize("arch", ARCHS)
def test_two_processes_equal_one_and_resume(arch, tmp_path):
    mix = ["--mix", "t2i=1", "i2t=1", "edit=0.5", "text=0.5", "words=0.5"]
    common = ["--arch", arch, "--stage", "base", *SMALL, "--lr", "1e-4", "--muon-lr", "0.002",
              "--batch", "16", *mix, "--preview", str(4 * (arch == "mar")), "--gemm", "mkl"]  # auto may differ
    two = Launch(2, *common, "--out", tmp_path / "two")
    run(*common, out=tmp_path / "one")
    assert two.wait()[0] == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for step in one:
        for k in one[step]:
            a, b = one[step][k], two[step][k]
            assert abs(a - b) <= 1e-5 * max(1, abs(a)), (step, k, a, b)
    if arch != "mar":
        return
    sheets = [np.asarray(Image.open(tmp_path / name / "before_after.png")).astype(int) for name in ("one", "two")]
    half = len(sheets[0]) // 2  # drawn before the first step, by one process and by two
    assert sheets[0].shape == sheets[1].shape and np.abs(sheets[0] - sheets[1])[:half].max() <= 2
    # stop a two-process run after step 2 and let two processes go on: the same numbers, bit for bit
    torchrun(2, *common, "--out", tmp_path / "cut", "--stop-after", "2", "--preview", "0")
    torchrun(2, "--resume", tmp_path / "cut", "--stop-after", "0")
    assert losses(tmp_path / "cut") == two

def test_reca_run_leaves_everything_and_learns(tmp_path, monkeypatch):
    few = functools.partial(train.evaluate.score_all, reconstructions=16)
    monkeypatch.setattr(train.evaluate, "score_all", few)
    if not os.path.isdir(checkpoint.default_weights("mar", "base")):
        pytest.skip("weights/mar-base is not there")
    assert run("--arch", "mar", *SMALL, "--eval-n", "6", "--ema", "0.9", "--cfg", "2.5", out=tmp_path / "r") == 0
    files = set(os.listdir(tmp_path / "r"))
    assert files == {"model.safetensors", "config.json", "checkpoint.pt", "log.jsonl", "loss.png", "before_after.png",
                     "result.json", "run.lock", "checkpoint.pt.sha256", "report.html"}
    meta = json.load(open(tmp_path / "r" / "config.json"))
    assert 0 <= meta["scores_before"]["generation"]["score"] <= 1 and meta["scores_after"]["generation"]["n"] == 6
    model = checkpoint.load_model("mar", str(tmp_path / "r"))
    assert not model.training and model.config.cfg == 2.5  # --cfg stays with the weights
    base = checkpoint.load_model("mar", checkpoint.default_weights("mar", "base"))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, base.state_dict()[k])]
    assert changed and not any(k.startswith("vae.") for k in changed)  # the frozen autoencoder stays to the bit

def test_real_images_from_a_tar(tmp_path):
    if not os.path.isdir(checkpoint.default_weights("mar", "base")):
        pytest.skip("weights/mar-base is not there")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for i in range(12):
            b = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(b, "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = b.tell()
            b.seek(0)
            tar.addfile(info, b)
    assert run("--arch", "mar", "--data", str(tmp_path / "photos.tar"), *SMALL, out=tmp_path / "r") == 0
    assert Image.open(tmp_path / "r" / "before_after.png").size[0] > 500

ERRORS = [
    (["--stage", "base", "--batch", "7", "--accum", "2"], r"--batch 7 .*--accum 2.*multiple of"),
    (["--resume", "no/such/run"], r"no/such/run: no checkpoint.pt"),
    (["--ckpt", "no/such/folder"], r"no/such/folder.*config.json"),
    (["--stage", "base", "--config", "harmon-9b"], r"harmon-9b.*tiny, harmon-0.5b, harmon-1.5b"),
    (["--data", "no/such/images", "--ckpt", "BASE"], r"no/such/images: no such"),
    (["--steps", "0"], r"--steps 0: must be from 1"),
    (["--config", "harmon-1.5b", "--ckpt", "x.pth"], r"--text-tokenizer"),
    (["--stage", "base", "--mix", "t2i=1", "edit=0.01"], r"--batch 8 gives 0 edit samples"),
    (["--t2i-weight", "0", "--mix", "t2i=1"], r"leave nothing to train on"),
    (["--stage", "base", "--mix", "t2i=0.75", "--accum", "8"], r"take a multiple of 32"),
    (["--log-every", "0"], r"--log-every 0: must be from 1"),
    (["--device", "tpu9"], r"--device tpu9: no such device"),
    (["--device", "meta"], r"--device meta: no such device"),
    (["--device", "cuda:99"], r"--device cuda:99: this torch \(.*\) sees \d+ of that kind"),
    (["--device", "mps:3"], r"--device mps:3: this torch \(.*\) sees \d+ of that kind"),
    (["--cfg", "0.5"], r"--cfg 0.5: must be from 1"),
    (["--stage", "tokenizer", "--cfg", "2"], r"--cfg is for models: here it would change nothing"),
]

@pytest.mark.parametrize("argv, message", ERRORS, ids=[m[1][:25] for m in ERRORS])
def test_one_line_errors(argv, message, tmp_path):
    argv = [os.path.join(ROOT, "weights", "mar-base") if a == "BASE" else a for a in argv]
    if "--data" in argv and not os.path.isdir(argv[-1]):
        pytest.skip("weights/mar-base is not there")
    with pytest.raises((ValueError, OSError)) as e:
        run("--arch", "mar", *([] if "--resume" in argv else SMALL[:-4]), *argv, out=tmp_path / "r")
    assert re.search(message, str(e.value)) and "\n" not in str(e.value)

def test_truncated_checkpoint_and_full_disk(tmp_path, monkeypatch):
    run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=tmp_path / "r")
    path = tmp_path / "r" / "checkpoint.pt"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="checkpoint.pt: its SHA-256 is not in"):
        run("--resume", str(tmp_path / "r"), out=tmp_path / "r")
    path.write_bytes(good)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda p: type("D", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"needs \d+\.\d MB and 0.0 MB are free"):
        run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", "--overwrite", out=tmp_path / "r")
    assert path.read_bytes() == good  # the last checkpoint is untouched

def test_model_config_of_another_arch_is_refused(tmp_path):
    run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=tmp_path / "r")
    with pytest.raises(ValueError, match="holds a model of --arch mar"):
        checkpoint.load_model("ar", str(tmp_path / "r"))
    meta = json.load(open(tmp_path / "r" / "config.json"))
    meta["config"]["hidden_size"] += 16
    json.dump(meta, open(tmp_path / "r" / "config.json", "w"))
    with pytest.raises(ValueError, match="(?s)wrong shape|shape"):
        checkpoint.load_model("mar", str(tmp_path / "r"))

def test_batches_do_not_depend_on_the_split():
    args, model, one = made("--arch", "mar", "--stage", "base", "--batch", "8", "--pool", "32")
    whole = one.batch(3)
    halves = []
    for one.rank, one.world in ((0, 2), (1, 2)):
        halves.append(one.batch(3))
    one.rank, one.world = 0, 1
    for part in whole:
        for k in ("latents", "masked", "visible", "t", "noise"):
            if k in whole[part]:
                assert torch.equal(whole[part][k], torch.cat([h[part][k] for h in halves])), (part, k)
        if "count" in whole[part]:
            assert whole[part]["count"] == sum(h[part]["count"] for h in halves)
    assert not torch.equal(one.batch(4)["t2i"]["noise"], whole["t2i"]["noise"])

GRADIENTS = """
import os, sys, torch, train
arch, folder, *accums = sys.argv[1:]
for split in accums:  # of each process, "s" where they are sharded
    accum = split.rstrip("s")
    parts = ["t2i=1", "i2t=1", "text=1", "recon=1"]
    args, _ = train.parse_args(["--arch", arch, "--stage", "base", "--batch", "8", "--pool", "16", "--accum", accum,
                                "--device", "cpu", "--threads", "1", "--mix", *parts, "--overwrite", "--out",
                                f"{folder}/run{os.environ.get('WORLD_SIZE', 1)}", "--muon-lr", "0", "--clip", "0"]
                               + ["--shard"] * ("s" in split))
    run = train.Run(args, None)
    run.model.train()
    train.apply = lambda *args: None  # the gradients stay as they are
    totals, norm = train.train_step(run, 0, [run.batches.batch(0, m) for m in range(args.accum)])
    losses = torch.stack(list(totals.values()))
    if run.world > 1:
        train.dist.all_reduce(losses)
    found = {n: p.grad for n, p in run.named if p.grad is not None}
    found = {n: g.full_tensor() if run.sharded else g for n, g in found.items()}
    if run.rank == 0:
        torch.save((losses / run.world, found), f"{folder}/{run.world}x{split}.pt")
    run.log.close()
    del run  # and with it the lock
    if train.dist.is_initialized():
        train.dist.barrier()
        train.dist.init_process_group = lambda *args, **more: None  # once is enough
os._exit(0)
"""

@pytest.mark.parametrize("arch", ARCHS)
def test_processes_times_micro_batches_are_one(arch, tmp_path):
    """Losses are means over the tokens of the whole step, whatever process and micro-batch hold how many; also where
    each process holds a part of the weights alone."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    for launch in (Launch(1, arch, tmp_path, "1", "2", "4", script=script),
                   Launch(2, arch, tmp_path, "1", "2", "1s", "2s", script=script)):
        code, said = launch.wait()
        assert code == 0, said[-2000:]
    losses, found = torch.load(tmp_path / "1x1.pt")
    norm = torch.stack([g.norm() for g in found.values()]).norm()
    for name in ("1x2", "1x4", "2x1", "2x2", "2x1s", "2x2s"):
        other_losses, other = torch.load(tmp_path / f"{name}.pt")
        assert torch.allclose(losses, other_losses, rtol=1e-6, atol=0), name
        difference = torch.stack([(other[k] - g).norm() for k, g in found.items()]).norm()
        assert difference <= 1e-6 * norm, (name, difference / norm)

class NoDoubles(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in tree_leaves(out)), function
        return out

@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_on_the_device_is_in_double_precision(arch):
    """Apple's GPUs (--device mps) have none: training and drawing by plain PyTorch, in fp32."""
    _, model, batches = made("--arch", arch, "--stage", "base", "--muon-lr", "0.01", *SMALL)
    batch, own = batches.batch(0), [data.sample_generator(0, 0, 0, "picture")]
    model(batches.to_device(batch, {})), model.generate(["a star"], steps=2, generator=own)  # tables, on the CPU, once
    with NoDoubles():
        sum(model(batches.to_device(batch, {})).values()).backward()
        with torch.no_grad():
            picture = model.generate(["a star"], steps=2, generator=own)
            model.edit(picture, ["More."], steps=2, generator=own)
            model.answer(picture, ["What?"], max_new_tokens=3, generator=own)

def test_what_is_chosen_on_apples_gpus(tmp_path, monkeypatch):
    """fp32, plain PyTorch, nothing that is made for CUDA; and what a person asks of them beyond that is refused."""
    args, model, batches = made("--arch", "ar", "--stage", "base", *SMALL)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device, args.device, args.config, args.workers = torch.device("mps"), "mps", "large", None
    names = ("attention", "linear_cross_entropy", "diffusion_loss_rows", "flow_loss_rows")
    assert {custom_kernels.pick.choose(name, None, device) for name in names} == {"reference"}
    adamw, _ = train.make_optimizers(args, model, model.trainable_parameters("base"))
    assert not adamw.param_groups[0]["fused"] and checkpoint.dtype_of(args) is None and not train.machine_of(args).gpu
    run_of = types.SimpleNamespace(args=args, device=device, model=model, world=1, sharded=False)
    assert train.Run.wrapped(run_of) is model and data.worker_count(args, device) == 0  # which pin no memory

    def build(args, state, prepare):
        raise RuntimeError(prepare.__self__.dtype)
    monkeypatch.setattr(train, "build", build)
    common = ["--arch", "ar", "--stage", "base", *SMALL, "--device", "mps"]
    with pytest.raises(RuntimeError, match="torch.float32"):
        run(*common, out=tmp_path / "a")
    for more, world in ((["--dtype", "bf16"], 1), (["--compile", "on"], 1), ([], 2)):
        with pytest.raises(ValueError, match="^--device mps: fp32, not compiled, one process: [^\n]*$"):
            train.check_args(parse(*common, *more), world)
    for call in (checkpoint.check_device, functools.partial(checkpoint.load_model, "ar", None, None, None, None)):
        with pytest.raises(ValueError, match="^--device mps: fp32"):
            call("mps", torch.bfloat16)

@pytest.mark.parametrize("mix", ["i2t=1 --i2t-weight 1", "t2i=1 i2t=1 --i2t-weight 1", "recon=1 text=1"])
def test_parts_that_would_train_nothing_are_refused(mix, tmp_path):
    """Understanding is frozen there."""
    with pytest.raises(ValueError, match="^--mix: (i2t|text) would train nothing, .* in --stage reca: leave"):
        run("--arch", "diffusion", *SMALL, "--mix", *mix.split(), out=tmp_path / "r")

@pytest.mark.parametrize("arch", ARCHS)
def test_several_questions_about_a_picture_share_its_row(arch):
    """--questions: turns of one dialogue; every answer with its end is in the loss, at the place that predicts it."""
    _, model, batches = made("--arch", arch, "--stage", "base", *SMALL, "--questions", "3")
    rows = [batches.row("i2t", i, random.Random(i)) for i in range(8)]
    rows = [r for r in rows if "turns" in r]
    assert rows and all(len(r["turns"]) == 3 for r in rows)
    generators = [torch.Generator() for _ in rows]
    tensors = model.collate("i2t", rows, generators, torch.Generator(), 0)
    encode, showo, space = model.tokenizer.encode_ordinary, arch == "ar", " " * (arch in ("ar", "janus"))
    end = model.config.eos if showo else model.tokenizer.special["<|im_end|>"]
    for ids, labels, row in zip(tensors["ids"], tensors["labels"], rows):
        want = [i for _, answer in row["turns"] for i in [*encode(space + answer), end]]
        at = (labels != -100).nonzero().flatten()
        assert labels[at].tolist() == want
        where = at + len(ids) - len(labels) + (not showo)  # Show-o's labels are shifted in the loss
        assert ids[where].tolist() == want

def test_learning_rate_schedule():
    args, _ = train.parse_args(["--steps", "110", "--warmup", "10", "--lr", "1"])
    assert train.learning_rate(args, 0, 1.0) == pytest.approx(0.1) and train.learning_rate(args, 9, 1.0) == 1.0
    assert train.learning_rate(args, 60, 1.0) == pytest.approx(0.5) and train.learning_rate(args, 109, 1.0) < 0.01

def test_tokenizer_stage_trains_and_calibrates(tmp_path):
    small = ["--steps", "12", "--pool", "64", "--batch", "16", "--eval-n", "8", "--log-every", "1", "--warmup", "2",
             "--device", "cpu", "--threads", "1"]
    assert run("--arch", "mar", "--stage", "tokenizer", *small, out=tmp_path / "t") == 0
    rows = losses(tmp_path / "t")
    assert rows[12]["images"] < 0.8 * rows[1]["images"]
    assert run("--arch", "mar", "--stage", "tokenizer", *small, "--ckpt", str(tmp_path / "t"), out=tmp_path / "u") == 0
    model = train.build(train.parse_args(["--stage", "base", "--tokenizer-ckpt", str(tmp_path / "t")])[0])
    z = model.precompute(data.to_float(shape_world.Scenes(256, seed=0).render()))["latents"]
    assert abs(z.std(correction=0) - 1) < 0.1

def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "f")
    checkpoint.write_text(path, "old")

    def fail(temporary):
        with open(temporary, "w") as f:
            f.write("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="untouched"):
        checkpoint.atomic(path, fail)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["f"]

def test_captions_stay_with_their_own_pictures(tmp_path):
    # a is no picture to train on: the order runs over the others
    for name, size, gray in (("a", (200, 10), 0), ("b", (48, 48), 60), ("c", (48, 48), 180)):
        Image.new("RGB", size, (gray,) * 3).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    for gb in ("8", "0"):  # cached, and encoded step by step
        _, model, batches = made("--arch", "mar", "--stage", "sft", *SMALL, "--i2t-weight", "0", "--data",
                                 str(tmp_path), "--cache-gb", gb)
        with torch.no_grad():
            b, c = (model.precompute(torch.full((1, 3, 48, 48), v / 127.5 - 1))["latents"] for v in (60, 180))
        said, collate = [], model.collate

        def listen(part, rows, *more):
            said.extend(row["caption"] for row in rows)
            return collate(part, rows, *more)
        model.collate = listen
        for step in range(3):
            said.clear()
            latents = batches.to_device(batches.batch(step), {})["t2i"]["latents"]
            seen = ["caption of " + "bc"[int((x - b).abs().mean() > (x - c).abs().mean())] for x in latents]
            assert seen == said and set(said) <= {"caption of b", "caption of c"}

def test_resume_takes_what_is_typed_now(tmp_path, monkeypatch):
    run("--arch", "mar", "--stage", "base", *SMALL, "--stop-after", "2", out=tmp_path / "r")
    seen, adamw = [], torch.optim.AdamW.step

    def step(self):
        seen.append(self.param_groups[0]["weight_decay"])
        adamw(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    typed = ["--stop-after", "0", "--weight-decay", "0.5", "--ema", "0.9"]
    assert run("--resume", str(tmp_path / "r"), *typed, out=tmp_path / "elsewhere") == 0
    assert seen == [0.5, 0.5] and (tmp_path / "elsewhere" / "model.safetensors").exists()
    assert not (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="--resume .*: that is a run of --arch mar, not ar"):
        train.parse_args(["--resume", str(tmp_path / "r"), "--arch", "ar"])

def parse(*argv):
    return train.parse_args([*argv])[0]

def test_own_images_get_plain_reca():
    for arch in ("mar", "ar", "diffusion"):
        plain, own = parse("--arch", arch, "--data", "photos"), parse("--arch", arch)
        assert set(plain.mix) == ({"recon"} if arch == "diffusion" else {"recon", "i2t"})
        assert plain.t2i_weight == 0 and "t2i" in own.mix

def test_muon_takes_the_matrices_inside_blocks():
    args, model, _ = made("--arch", "ar", "--stage", "base", *SMALL)
    named = model.trainable_parameters("base")
    adam, muon = train.make_optimizers(args, model, named)

    def names(optimizer):
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {n for n, p in named if id(p) in ids}
    assert not names(adam) & names(muon) and names(adam) | names(muon) == {n for n, _ in named}
    assert names(muon) >= {n for n, p in named if ".layers." in n and p.ndim == 2 and "embedding" not in n}
    assert {"showo.lm_head.weight", "showo.model.embed_tokens.weight"} <= names(adam)
    assert args.muon_lr == 0.02 and parse("--arch", "ar").muon_lr == 0  # RecA itself is AdamW, as published
    assert muon.param_groups[0]["weight_decay"] == 0.02
    assert parse("--arch", "diffusion", "--stage", "base").muon_decay == 0.1
    assert parse("--arch", "ar", "--stage", "sft", "--muon-decay", "0.1").muon_decay == 0.1

def test_tiny_diffusion_recipe_and_plain_reca():
    args = parse("--arch", "diffusion")
    assert args.mix == {"recon": 0.5, "t2i": 0.5, "edit": 0.25} and args.muon_lr == 0.005 and args.t2i_weight == 1.0
    assert parse("--arch", "diffusion", "--t2i-weight", "0").mix == {"recon": 0.5}  # published: reconstruction alone
    assert parse("--arch", "diffusion", "--mix", "recon=1").mix == {"recon": 1.0}
    published = parse("--arch", "diffusion", "--config", "bagel-7b-mot")
    assert published.mix == {"recon": 1.0} and published.muon_lr == 0 and published.eps == 1e-15

def test_tiny_ar_recipe_and_its_control():
    reca, sft = (parse("--arch", "ar", "--stage", stage) for stage in ("reca", "sft"))
    assert reca.mix == {"recon": 0.5, "t2i": 0.5} and sft.mix == {"t2i": 1.0}
    assert reca.t2i_weight == sft.t2i_weight == 1.0
    same = ("steps", "batch", "lr", "schedule", "warmup", "weight_decay")
    assert all(getattr(reca, k) == getattr(sft, k) for k in same) and reca.steps == 600
    plain = parse("--arch", "ar", "--i2t-weight", "1", "--t2i-weight", "0", "--mix", "recon=1", "i2t=1")
    assert plain.mix == {"recon": 1.0, "i2t": 1.0}

def test_features_are_dropped_only_without_captions_beside_them():
    for parts, drop in ((["recon=1"], True), (["recon=0.5", "t2i=0.5"], False)):
        batches = made("--arch", "diffusion", *SMALL, "--drop", "1", "--mix", *parts)[2]
        assert batches.row("recon", 0, random.Random(0))["drop"] == drop

def test_a_process_may_end_while_batches_are_being_made():
    """A thread inside torch used to abort it: "terminate called without an active exception"."""
    program = ("import torch, data\n"
               "def make(step): return [torch.randn(64, 64) @ torch.randn(64, 64) for _ in range(2000)][-1]\n"
               "next(data.prefetch(make, range(9)))")
    done = python("-c", program)
    assert done.returncode == 0, done.stderr[-500:]
    assert list(data.prefetch(lambda s: s * s, range(7))) == [s * s for s in range(7)]
    with pytest.raises(ZeroDivisionError):
        list(data.prefetch(lambda s: 1 / (2 - s), range(7)))

# ---------------------------------------------------------------------------------------------------------------------
# previews

class Drawer(torch.nn.Module):
    """Draws noise of its generators and the length of the prompt; negatives of what it is to reconstruct."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def generate(self, prompts, generator):
        self.rows.append(len(prompts))
        noise = torch.stack([torch.rand(3, 8, 8, generator=g) for g in generator])
        return noise * torch.tensor([len(prompt) / 40 for prompt in prompts])[:, None, None, None]

    def reconstruct(self, images, generator):
        self.rows.append(len(images))
        return -images

def preview(monkeypatch, world, prompts, **args):
    """-> pictures(run) with so many processes, which are called one after the other, and rows of each call."""
    given = argparse.Namespace(**dict(dict(stage="base", data=None, seed=3, config="tiny", preview=None), **args))
    given.preview_prompts = None if prompts is None else "typed"
    shares, results, rows = [], [], []

    def gather(out, mine):
        out[:] = shares if len(shares) == world else [mine] * world
        gathered.append(mine)
    monkeypatch.setattr(train.dist, "all_gather_object", gather)
    for again in range(2):  # first what each has to give, then with what the others gave
        gathered, results = [], []
        for rank in range(world):
            model = Drawer()
            source = types.SimpleNamespace(first_pictures=lambda n: shape_world.Scenes(min(n, 6), seed=1).render())
            run = types.SimpleNamespace(
                args=given, rank=rank, world=world, model=model, ema=None, named=[], dtype=torch.float32,
                device=torch.device("cpu"), batches=source,
                prompts=train.sample.DEFAULT_PROMPTS[:12] if prompts is None else prompts)
            results.append(train.pictures(run))
            rows.append(model.rows)
        shares = list(gathered)
    return results, rows

@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("args", [dict(), dict(preview=5), dict(stage="reca", data=["x"]), dict(stage="tokenizer"),
                                  dict(preview=2), dict(prompts=["a", "a red star", "b"], stage="reca", data=["x"])])
def test_a_preview_does_not_depend_on_the_number_of_processes(world, args, monkeypatch):
    args = dict(dict(prompts=None), **args)
    [(one, captions, source)], _ = preview(monkeypatch, 1, **args)
    many, rows = preview(monkeypatch, world, **args)
    wanted = args.get("preview") or (12 if args["prompts"] else 8 if args.get("stage") == "tokenizer" else 12)
    wanted = 6 if args.get("data") and not args["prompts"] else wanted  # there are no more pictures than that
    assert len(one) == len(captions) == wanted and (source is None) == (captions[0] != "")
    assert len({picture.tobytes() for picture in one}) == wanted  # also where a prompt comes twice
    for pictures, *about in many:
        assert (pictures == one).all() and about[0] == captions
    assert len({str(calls) for calls in rows}) == 1  # equally many calls and rows in each: sharded models keep step

def test_how_many_pictures_a_preview_has(monkeypatch):
    for config, n, calls in (("large", 0, []), ("tiny", 12, [12])):
        (result,), rows = preview(monkeypatch, 1, None, config=config)
        assert (result is None if n == 0 else len(result[0]) == n) and rows[0] == calls
    for config, calls in (("large", [4, 4, 1]), ("tiny", [9])):  # typed: at full size on a CPU, too, few at once
        (result,), rows = preview(monkeypatch, 1, None, config=config, preview=9)
        assert len(result[0]) == 9 and rows[0] == calls
    assert preview(monkeypatch, 1, None, preview=0) == ([None], [[], []])

def test_previews_of_a_run(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red star\n\n  ein gr\u00fcner Kreis \n")
    common = ["--arch", "ar", "--stage", "base", *SMALL, "--steps", "3", "--gemm", "mkl"]  # auto may choose otherwise
    prompts = ["--preview-prompts", str(tmp_path / "prompts.txt")]
    assert run(*common, "--preview", "3", "--preview-every", "2", *prompts, out=tmp_path / "a") == 0
    sizes = {name: Image.open(tmp_path / "a" / name).size for name in ("before_after.png", "preview-2.png")}
    assert sizes == {"before_after.png": (3 * 102 + 6, 2 * 128 + 6), "preview-2.png": (3 * 102 + 6, 128 + 6)}
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.remove(tmp_path / "b" / "before_after.png")
    assert run(*common, "--preview", "0", "--preview-every", "1", "--overwrite", out=tmp_path / "b") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")  # drawing changes nothing
    assert not [name for name in os.listdir(tmp_path / "b") if name.startswith(("preview", "before"))]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"gr\xfcn")
    for name, message in (("no.txt", "no such file of prompts"), ("empty.txt", "0 prompts, .*: expected one or more"),
                          ("latin.txt", "cannot be read as UTF-8"), ("", "a folder, expected a file of prompts")):
        with pytest.raises((ValueError, OSError), match=message) as e:
            run(*common, "--preview-prompts", str(tmp_path / name), out=tmp_path / "c")
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="2 prompts, --stage tokenizer: .* no such file where a tokenizer"):
        run(*common, "--stage", "tokenizer", "--mix", "images=1", *prompts, out=tmp_path / "c")

class Orders:
    """Stands in for CUDA's streams: `seen` has in order what is asked of them, by the stream's name."""

    def __init__(self, monkeypatch):
        self.seen, self.now = [], "step"
        true_to, orders = torch.Tensor.to, self

        def to(tensor, *args, **kwargs):
            if isinstance(args[0], torch.device):
                self.seen.append((self.now, "copy" if kwargs.get("non_blocking") else "copy, and wait for it"))
            return true_to(tensor, *args, **kwargs)

        class Stream(contextlib.nullcontext):
            name = "copies"

            def __enter__(self):
                orders.now = "copies"

            def __exit__(self, *_):
                orders.now = "step"

        main = types.SimpleNamespace(wait_stream=lambda other: self.seen.append((self.now, f"after {other.name}")))
        self.stream = Stream()
        monkeypatch.setattr(torch.Tensor, "to", to)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: self.seen.append(
            (self.now, "keep" if stream is main else "wrong stream")))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)

class Learner(torch.nn.Module):
    """Says that it computes."""

    def __init__(self, seen):
        super().__init__()
        self.seen, self.p = seen, torch.nn.Parameter(torch.ones(()))

    def forward(self, batch):
        self.seen.append(("step", "compute"))
        return {part: self.p * tensors["x"].sum() / tensors["count"] for part, tensors in batch.items()}

@pytest.mark.parametrize("accum", [1, 2])
def test_copies_to_a_gpu_pass_the_step_before(accum, monkeypatch):
    """Nothing is waited for between a step and the copies of the next one, so these run beside it; it waits for them
    itself, on the device; and their memory is kept until it has read them."""
    orders = Orders(monkeypatch)
    learner, device = Learner(orders.seen), torch.device("cpu")
    run_of = types.SimpleNamespace(
        args=train.parse_args(["--arch", "mar", *SMALL])[0], weights={"t2i": 1.0}, device=device, rank=0, world=1,
        dtype=torch.float32, forward=learner, model=learner, named=[*learner.named_parameters()], stream=orders.stream)
    run_of.batches = types.SimpleNamespace(to_device=functools.partial(data.Batches.to_device, run_of))
    monkeypatch.setattr(train, "apply", lambda *_: None)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.ones(()))  # where gradients already lie
    batch = {"t2i": {"x": torch.ones(2), "count": torch.tensor(2.0)}}
    for step in range(2):
        train.train_step(run_of, step, [batch] * accum)
    one = [("copies", "copy")] * 2 + [("step", "after copies")] + [("step", "keep")] * 2 + [("step", "compute")]
    assert orders.seen == ([("step", "copy")] + one * accum) * 2  # first the counts of the whole step

def test_elsewhere_copies_are_in_order(monkeypatch):
    orders, (_, _, batches) = Orders(monkeypatch), made("--arch", "mar", "--stage", "base", *SMALL)
    orders.seen.clear()
    batch = {"t2i": {"x": torch.ones(2), "count": torch.tensor(2.0)}}
    got = batches.to_device(batch, {})
    assert batches.stream is None and orders.seen == [("step", "copy")] * 2
    assert all(got["t2i"][k] is v for k, v in batch["t2i"].items())

def test_processes_wait_long_for_the_first(monkeypatch):
    called = []
    monkeypatch.setattr(train.dist, "init_process_group", lambda backend, **more: called.append((backend, more)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "broadcast_object_list", lambda values: called.append(values))
    threads = torch.get_num_threads()
    train.setup(argparse.Namespace(device="cpu", threads=threads, seed=0, shard=False, gemm="mkl", compile="off"))
    assert called.pop() == ["mkl"]  # what the first process chose goes to all
    assert [(name, more["timeout"].total_seconds()) for name, more in called] == [("gloo", 7200)]
