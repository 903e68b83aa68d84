"""The loop: exact resume, N processes = one, errors in one line, what a run leaves behind. On the tiny models, freshly initialised."""
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import sample
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARCHS = [a for a in sample.ARCHS if os.path.isdir(os.path.join(ROOT, "weights", train.TOKENIZERS[a][0]))]
SMALL = ["--batch", "8", "--pool", "32", "--eval-n", "0", "--log-every", "1", "--steps", "4", "--warmup", "2", "--device", "cpu", "--threads", "1"]


def run(*argv, out):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    try:
        return train.main([*argv, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
        for s, h in handlers.items():
            signal.signal(s, h)


def losses(folder):
    rows = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    return {r["step"]: {k: v for k, v in r.items() if k not in ("ms", "images_per_s", "step", "mfu")} for r in rows if "loss" in r}


def torchrun(n, *argv):
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", os.path.join(ROOT, "train.py"), *argv],
                          cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("arch", ARCHS)
def test_resume_is_exact_after_a_signal(arch, tmp_path, monkeypatch, capsys):
    common = ["--arch", arch, "--stage", "base", *SMALL]
    assert run(*common, out=tmp_path / "whole") == 0
    true_rate = train.learning_rate

    def rate(args, step, lr):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # arrives during the second step: the step is finished, saved, and the run ends
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
    mix = ["--mix", "t2i=1", "i2t=1", "edit=0.5", "text=0.5", "align=0.5", "words=0.5"]
    common = ["--arch", arch, "--stage", "base", *SMALL, "--lr", "1e-4", "--muon-lr", "0.002", "--accum", "2", "--batch", "16", *mix]
    run(*common, out=tmp_path / "one")
    torchrun(2, *common, "--out", str(tmp_path / "two"))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    for step in one:
        for k in one[step]:
            assert abs(one[step][k] - two[step][k]) <= 1e-5 * max(1, abs(one[step][k])), (step, k, one[step][k], two[step][k])
    if arch != "mar":
        return
    # stop a two-process run after step 2 and let two processes go on: the same numbers, bit for bit
    torchrun(2, *common, "--out", str(tmp_path / "cut"), "--stop-after", "2")
    torchrun(2, "--resume", str(tmp_path / "cut"), "--stop-after", "0")
    assert losses(tmp_path / "cut") == two


def test_reca_run_leaves_everything_and_learns(tmp_path):
    if not os.path.isdir(sample.default_weights("mar", "base")):
        pytest.skip("weights/mar-base is not there")
    assert run("--arch", "mar", *SMALL, "--eval-n", "6", "--ema", "0.9", "--cfg", "2.5", out=tmp_path / "r") == 0
    files = set(os.listdir(tmp_path / "r"))
    assert {"model.safetensors", "config.json", "checkpoint.pt", "log.jsonl", "loss.png", "before_after.png", "run.json", "result.json"} <= files
    meta = json.load(open(tmp_path / "r" / "config.json"))
    assert 0 <= meta["scores_before"]["generation"]["score"] <= 1 and meta["scores_after"]["generation"]["n"] == 6
    model = sample.load_model("mar", str(tmp_path / "r"))
    assert not model.training and model.config.cfg == 2.5  # --cfg stays with the weights
    base = sample.load_model("mar", sample.default_weights("mar", "base"))
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, base.state_dict()[k])]
    assert changed and not any(k.startswith("vae.") for k in changed)  # the frozen autoencoder stays to the bit


def test_real_images_from_a_tar(tmp_path):
    if not os.path.isdir(sample.default_weights("mar", "base")):
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
    (["--steps", "0"], r"--steps 0: must be at least 1"),
    (["--templates", "100000"], r"--templates 100000: there are \d+"),
    (["--config", "harmon-1.5b", "--ckpt", "x.pth"], r"--text-tokenizer"),
    (["--stage", "sft", "--oracle-captions"], r"--oracle-captions .*--stage reca"),
    (["--stage", "base", "--mix", "t2i=1", "edit=0.01"], r"--batch 8 gives 0 edit samples"),
    (["--t2i-weight", "0", "--mix", "t2i=1"], r"leave nothing to train on"),
    (["--stage", "base", "--mix", "t2i=0.75", "--accum", "8"], r"take a multiple of 32"),
    (["--log-every", "0"], r"--log-every 0: must be at least 1"),
    (["--device", "tpu9"], r"--device tpu9: no such device"),
    (["--cfg", "0.5"], r"--cfg 0.5: guidance starts at 1"),
    (["--stage", "tokenizer", "--cfg", "2"], r"--cfg 2: a tokenizer has no guidance"),
]


@pytest.mark.parametrize("argv, message", ERRORS, ids=[m[1][:25] for m in ERRORS])
def test_one_line_errors(argv, message, tmp_path):
    argv = [os.path.join(ROOT, "weights", "mar-base") if a == "BASE" else a for a in argv]
    if "--data" in argv and not os.path.isdir(argv[-1]):
        pytest.skip("weights/mar-base is not there")
    with pytest.raises((ValueError, OSError)) as e:
        run("--arch", "mar", *SMALL[:-4], *argv, out=tmp_path / "r") if "--resume" not in argv else run("--arch", "mar", *argv, out=tmp_path / "r")
    assert re.search(message, str(e.value)) and "\n" not in str(e.value)


def test_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), "--ckpt", "no/such/folder", "--out", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: no/such/folder") and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "--no-such-flag"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr


def test_truncated_checkpoint_and_full_disk(tmp_path, monkeypatch):
    run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=tmp_path / "r")
    path = tmp_path / "r" / "checkpoint.pt"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match="truncated or not a checkpoint"):
        run("--resume", str(tmp_path / "r"), out=tmp_path / "r")
    path.write_bytes(good)
    monkeypatch.setattr(train.shutil, "disk_usage", lambda p: type("D", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"needs about .* GB and 0.0 GB are free"):
        run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=tmp_path / "r")
    assert path.read_bytes() == good  # the last checkpoint is untouched


def test_model_config_of_another_arch_is_refused(tmp_path):
    run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=tmp_path / "r")
    with pytest.raises(ValueError, match="holds a model of --arch mar"):
        sample.load_model("ar", str(tmp_path / "r"))
    meta = json.load(open(tmp_path / "r" / "config.json"))
    meta["config"]["hidden_size"] += 16
    json.dump(meta, open(tmp_path / "r" / "config.json", "w"))
    with pytest.raises(ValueError, match="(?s)wrong shape|shape"):
        sample.load_model("mar", str(tmp_path / "r"))


def test_batches_do_not_depend_on_the_split(tmp_path):
    args, _ = train.parse_args(["--arch", "mar", "--stage", "base", "--batch", "8", "--pool", "32"])
    model = train.build(args, "cpu")
    pools = train.Pools(args, model, "base", "cpu")
    whole = pools.batch(model, 3, 0, 0, 1)
    halves = [pools.batch(model, 3, 0, r, 2) for r in range(2)]
    for part in whole:
        for k in ("latents", "masked", "visible", "t", "noise"):
            if k in whole[part]:
                assert torch.equal(whole[part][k], torch.cat([h[part][k] for h in halves])), (part, k)
    assert not torch.equal(pools.batch(model, 4, 0, 0, 1)["t2i"]["noise"], whole["t2i"]["noise"])


def test_accumulation_is_the_mean_of_micro_batches(tmp_path):
    common = ["--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", "--accum", "2"]
    run(*common, out=tmp_path / "a")
    args, _ = train.parse_args([*common])
    torch.manual_seed(args.seed)
    model = train.build(args, "cpu")
    model.trainable_parameters("base")
    pools = train.Pools(args, model, "base", "cpu")
    total = 0.0
    for m in range(2):
        out = model(pools.batch(model, 0, m, 0, 1))
        weights = {"t2i": args.t2i_weight, "edit": args.t2i_weight, "i2t": args.i2t_weight, "text": 1.0, "words": 1.0}
        total += sum(weights[p] * v.item() for p, v in out.items()) / sum(weights.values()) / 2
    assert abs(total - losses(tmp_path / "a")[1]["loss"]) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_is_one_graph(arch):
    """What GPUs compile: a break in it would cost launches and retracing in every step."""
    args, _ = train.parse_args(["--arch", arch, "--stage", "base", *SMALL])
    model = train.build(args, "cpu")
    model.trainable_parameters("base")
    batch = train.Pools(args, model, "base", "cpu").batch(model, 0, 0, 0, 1)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(batch)
    assert (found.graph_count, found.graph_break_count) == (1, 0), [r.reason for r in found.break_reasons]


@pytest.mark.parametrize("arch", ARCHS)
def test_several_questions_about_a_picture_share_its_row(arch):
    """--questions: turns of one dialogue; every answer with its end is in the loss, at the place that predicts it, and nothing else is."""
    args, _ = train.parse_args(["--arch", arch, "--stage", "base", *SMALL, "--questions", "3"])
    model = train.build(args, "cpu")
    pools = train.Pools(args, model, "base", "cpu")
    rows = [pools.sample("i2t", i, random.Random(i)) for i in range(8)]
    rows = [r for r in rows if "turns" in r]
    assert rows and all(len(r["turns"]) == 3 for r in rows)
    tensors = model.collate("i2t", rows, 0 if arch == "diffusion" else None)
    encode = model.tokenizer.encode_ordinary
    for ids, labels, row in zip(tensors["ids"], tensors["labels"], rows):
        end = model.config.eos if arch == "ar" else model.config.special[1] if arch == "diffusion" else model.tokenizer.special["<|im_end|>"]
        want = [i for _, answer in row["turns"] for i in [*encode(" " * (arch == "ar") + answer), end]]
        at = (labels != -100).nonzero().flatten()
        assert labels[at].tolist() == want
        where = at + len(ids) - len(labels) + (arch != "ar")  # Show-o's labels are shifted in the loss
        assert ids[where].tolist() == want


def test_learning_rate_schedule():
    args, _ = train.parse_args(["--steps", "110", "--warmup", "10", "--lr", "1"])
    assert train.learning_rate(args, 0, 1.0) == pytest.approx(0.1) and train.learning_rate(args, 9, 1.0) == 1.0
    assert train.learning_rate(args, 60, 1.0) == pytest.approx(0.5) and train.learning_rate(args, 109, 1.0) < 0.01


def test_tokenizer_stage_trains_and_calibrates(tmp_path):
    assert run("--arch", "mar", "--stage", "tokenizer", "--steps", "12", "--pool", "64", "--batch", "16", "--eval-n", "8", "--log-every", "1", "--warmup", "2", "--device", "cpu", out=tmp_path / "t") == 0
    rows = losses(tmp_path / "t")
    assert rows[12]["images"] < 0.8 * rows[1]["images"]
    out = subprocess.run([sys.executable, "-c", f"import train, sample; a, _ = train.parse_args(['--stage', 'base', '--tokenizer-ckpt', {str(tmp_path / 't')!r}]); m = train.build(a, 'cpu'); print(m.vae.config.scale)"],
                         cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-500:]


def test_sampler_script_same_seed_same_picture(tmp_path, capsys):
    if not os.path.isdir(sample.default_weights("mar", "base")):
        pytest.skip("weights/mar-base is not there")
    ckpt = sample.default_weights("mar", "base")
    for name in ("a", "b"):
        sample.main(["--ckpt", ckpt, "--prompt", "a red star", "--n", "2", "--seed", "3", "--device", "cpu", "--out", str(tmp_path / f"{name}.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    Image.fromarray(data.Scenes(1, seed=5).render()[0]).save(tmp_path / "x.png")
    sample.main(["--ckpt", ckpt, "--image", str(tmp_path / "x.png"), "--question", "How many objects are there?", "--device", "cpu"])
    assert capsys.readouterr().out.strip()
    sample.main(["--ckpt", ckpt, "--image", str(tmp_path / "x.png"), "--reconstruct", "--device", "cpu", "--out", str(tmp_path / "c.png")])
    with pytest.raises(ValueError, match="--steps 1: points in time"):
        sample.main(["--arch", "diffusion", "--ckpt", os.path.join(ROOT, "weights", "diffusion-base"), "--steps", "1", "--out", str(tmp_path / "x.png")])
    with pytest.raises(FileNotFoundError, match="nothing.png: no such image"):
        sample.main(["--ckpt", ckpt, "--image", str(tmp_path / "nothing.png"), "--reconstruct", "--device", "cpu"])
    with pytest.raises(SystemExit):
        sample.parse_args(["--question", "what?"])


def test_interrupted_write_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "f")
    data.write_text(path, "old")

    def fail(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="untouched"):
        data.atomic(path, fail)
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["f"]


def test_scores_report_holds_the_numbers():
    class Fake(torch.nn.Module):  # draws the truth for nobody: blank pictures
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def generate(self, prompts, generator=None):
            return torch.ones(len(prompts), 3, 48, 48)
    s, pictures, rows = evaluate.score_generation(Fake(), per_task=3)
    assert s["score"] == 0 and s["objects"] == 0 and s["n"] == 18 and pictures.shape == (18, 48, 48, 3)


@pytest.mark.parametrize("kind", train.UNDERSTANDING[1:])
def test_understanding_ablations_alter_recas_context_alone(kind, tmp_path):
    common = ["--arch", "ar", *SMALL, "--i2t-weight", "1", "--mix", "recon=1", "i2t=1", "--out", str(tmp_path)]
    batches = {}
    for k in ("full", kind):
        args, _ = train.parse_args([*common, "--understanding", k])
        model = train.build(args, "cpu")
        model.trainable_parameters("reca")
        batches[k] = train.Pools(args, model, "reca", "cpu").batch(model, 0, 0, 0, 1)
    full, altered = (batches[k]["recon"]["features"] for k in ("full", kind))  # (8, 9, width)
    assert full.shape == altered.shape and (full - altered).abs().max() > 1e-3
    assert torch.equal(batches["full"]["recon"]["codes"], batches[kind]["recon"]["codes"])
    assert torch.equal(batches["full"]["i2t"]["features"], batches[kind]["i2t"]["features"])
    if kind == "shuffled":
        assert torch.allclose(full.sort(1).values, altered.sort(1).values)
    if kind == "pooled":
        assert torch.allclose(altered, full.mean(1, keepdim=True).expand_as(full), atol=1e-6)


def test_caption_flags_change_the_captions(tmp_path):
    def captions(*flags):
        args, _ = train.parse_args(["--arch", "ar", *SMALL, "--out", str(tmp_path), "--captioned", "300", *flags])
        return train.Pools(args, train.build(args, "cpu"), args.stage, "cpu").text["captioned"]

    sft = ["--stage", "sft"]
    usual = captions(*sft)
    assert usual == captions(*sft, "--sparse-captions", "0.25", "--wrong-captions", "0.15")  # the bias that data.py documents
    assert all(" and " not in c for c in captions(*sft, "--sparse-captions", "1") if not any(n in c.split() for n in data.NUMBERS + ("of", "above", "below")))
    assert not any(color in c.split() for c in captions(*sft, "--sparse-captions", "1") for color in data.COLORS)
    assert sum(map(len, captions(*sft, "--sparse-captions", "0.6"))) < 0.85 * sum(map(len, usual))
    with pytest.raises(ValueError, match="--sparse-captions 1.5: a share, from 0 to 1"):
        train.check_args(train.parse_args([*sft, "--sparse-captions", "1.5"])[0], 1)


def test_oracle_captions_are_true_of_the_pool_s_pictures(tmp_path):
    for kind, flags in (("dense", []), ("clean", ["clean"])):
        args, _ = train.parse_args(["--arch", "mar", *SMALL, "--out", str(tmp_path), "--i2t-weight", "0", "--oracle-captions", *flags])
        pools = train.Pools(args, train.build(args, "cpu"), "reca", "cpu")
        assert set(pools.parts) == {"t2i", "oracle"} and args.oracle_captions == kind
        for i in range(8):
            _, objects = pools.scenes["broad"].scene(i)
            words = pools.sample("oracle", i, data.text_rng(0, i))["caption"].replace(",", "").split()
            assert all(data.COLORS[o[1]] in words for o in objects) or (kind == "clean" and len(objects) > 1 and len({o[0] for o in objects}) == 1)
            assert ("background" in words) or kind == "clean"


def test_captions_stay_with_their_own_pictures(tmp_path):
    (tmp_path / "x").mkdir()
    for name, size in (("a", (200, 10)), ("b", (48, 48)), ("c", (48, 48))):  # a is no picture to train on: the next one stands in, with its own caption
        Image.new("RGB", size, (len(name), 9, 9)).save(tmp_path / "x" / f"{name}.png")
        (tmp_path / "x" / f"{name}.txt").write_text(f"caption of {name}")
    for gb in ("8", "0"):  # cached, and encoded step by step
        args, _ = train.parse_args(["--arch", "mar", "--stage", "sft", *SMALL, "--i2t-weight", "0", "--data", str(tmp_path / "x"), "--cache-gb", gb])
        pools = train.Pools(args, train.build(args, "cpu"), "sft", "cpu")
        assert [pools.sample("t2i", i, random.Random(0))["caption"] for i in range(3)] == ["caption of b", "caption of b", "caption of c"]


def test_shuffled_features_do_not_depend_on_the_process(tmp_path):
    args, _ = train.parse_args(["--arch", "ar", *SMALL, "--understanding", "shuffled"])
    model = train.build(args, "cpu")
    pools = train.Pools(args, model, "reca", "cpu")
    half = pools.encode(model, pools.scenes["altered"], "altered", "reca", "cpu", list(range(16, 32)))["features"]  # the share of the second of two
    assert torch.equal(half, pools.cache["altered"]["features"][16:])
    args.cache_gb = 0
    with pytest.raises(ValueError, match="its pool must be cached"):
        train.Pools(args, model, "reca", "cpu")


def test_scrambled_boards_hold_the_same_cells_elsewhere(tmp_path):
    args, _ = train.parse_args(["--arch", "mar", *SMALL, "--understanding", "scrambled"])
    model = train.build(args, "cpu")
    pools = train.Pools(args, model, "reca", "cpu")
    seen = pools.cache["altered"]
    full, other = (torch.nn.functional.unfold(model.decode_latents(seen[k]), 16, stride=16).transpose(1, 2) for k in ("latents", "source_latents"))  # (32, 9 cells, D)
    assert (other - torch.stack([cells[order] for cells, order in zip(full, pools.orders)])).abs().mean() < 0.02
    assert ((other - full).abs().mean((1, 2)) > 0.02).sum() > 24  # an order may leave the few objects where they are
    half = pools.encode(model, pools.scenes["altered"], "altered", "reca", "cpu", list(range(16, 32)))["source_latents"]
    assert torch.equal(half, seen["source_latents"][16:])  # the same orders on whatever process
    args.altered_share = 0.25
    some = train.Pools(args, model, "reca", "cpu").cache["altered"]
    assert torch.equal(some["source_latents"][:8], seen["source_latents"][:8]) and torch.equal(some["source_latents"][8:], some["latents"][8:])
    assert run("--arch", "mar", *SMALL, "--understanding", "scrambled", "--stop-after", "1", out=tmp_path / "r") == 0


def test_resume_takes_what_is_typed_now(tmp_path, monkeypatch):
    run("--arch", "mar", "--stage", "base", *SMALL, "--stop-after", "2", out=tmp_path / "r")
    seen, adamw = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (seen.append(self.param_groups[0]["weight_decay"]), adamw(self)))
    assert run("--resume", str(tmp_path / "r"), "--stop-after", "0", "--weight-decay", "0.5", "--ema", "0.9", out=tmp_path / "elsewhere") == 0
    assert seen == [0.5, 0.5] and (tmp_path / "elsewhere" / "model.safetensors").exists() and not (tmp_path / "r" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="--resume .*: that is a run of --arch mar, not ar"):
        train.parse_args(["--resume", str(tmp_path / "r"), "--arch", "ar"])


def test_machines_that_do_not_tell_their_free_memory(monkeypatch):
    monkeypatch.setattr(train.os, "sysconf_names", {"SC_PAGE_SIZE": 1})  # macOS
    train.check_memory(types.SimpleNamespace(device="cpu", config="tiny", stage="base"), [], torch.nn.Linear(2, 2))


def test_understanding_ablation_needs_frozen_features():
    args, _ = train.parse_args(["--arch", "mar", *SMALL, "--understanding", "pooled"])
    with pytest.raises(ValueError, match="--understanding pooled: .* has only shrunk and scrambled"):
        train.Pools(args, train.build(args, "cpu"), "reca", "cpu")


def test_own_images_get_plain_reca():
    for arch in ("mar", "ar", "diffusion"):
        plain, own = (train.parse_args(["--arch", arch, *flags])[0] for flags in (["--data", "photos"], []))
        assert set(train.mix(plain)) == ({"recon"} if arch == "diffusion" else {"recon", "i2t"}) and plain.understanding == "full" and plain.t2i_weight == 0 and "t2i" in train.mix(own)


def test_muon_is_torchs_muon_in_full_precision():
    g = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 40), (24, 16), (16, 16)]  # tall, wide, two of one shape, square
    ours = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = train.Muon(ours, lr=0.1, weight_decay=0.3), torch.optim.Muon(theirs, lr=0.1, weight_decay=0.3)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.01 * q.norm()  # bf16 keeps three digits
    values = torch.linalg.svdvals(train.orthogonalize(torch.randn(3, 24, 16, generator=g)))
    assert values.min() > 0.3 and values.max() < 1.3
    a.load_state_dict(a.state_dict())  # momentum goes into checkpoints
    assert all("momentum_buffer" in a.state[p] for p in ours)


def test_muon_takes_the_matrices_inside_blocks():
    args, _ = train.parse_args(["--arch", "ar", "--stage", "base", *SMALL])
    model = train.build(args, "cpu")
    named = model.trainable_parameters("base")
    adam, muon = train.make_optimizers(args, model, named)
    ids = lambda o: {id(p) for g in o.param_groups for p in g["params"]}
    name = {id(p): n for n, p in named}
    assert not ids(adam) & ids(muon) and ids(adam) | ids(muon) == set(name)
    assert ids(muon) >= {id(p) for n, p in named if ".layers." in n and p.ndim == 2 and "embedding" not in n} and {"showo.lm_head.weight", "showo.model.embed_tokens.weight"} <= {name[i] for i in ids(adam)}
    assert args.muon_lr == 0.02 and train.parse_args(["--arch", "ar", *SMALL])[0].muon_lr == 0  # RecA itself is AdamW, as published
    assert muon.param_groups[0]["weight_decay"] == 0.02 and train.parse_args(["--arch", "diffusion", "--stage", "base"])[0].muon_decay == 0.3 and train.parse_args(["--arch", "ar", "--stage", "sft", *SMALL, "--muon-decay", "0.1"])[0].muon_decay == 0.1


def test_tiny_diffusion_recipe_and_plain_reca():
    parse = lambda *a: train.parse_args(["--arch", "diffusion", *a])[0]
    args = parse()
    assert train.mix(args) == {"recon": 0.5, "t2i": 0.5, "edit": 0.25} and args.muon_lr == 0.005 and args.t2i_weight == 1.0
    assert train.mix(parse("--t2i-weight", "0")) == {"recon": 0.5}  # the published loss: reconstruction alone
    assert train.mix(parse("--mix", "recon=1")) == {"recon": 1.0}
    assert train.mix(parse("--config", "bagel-7b-mot")) == {"recon": 1.0} and parse("--config", "bagel-7b-mot").muon_lr == 0  # published recipes stay as they are


def test_tiny_ar_recipe_and_its_control():
    reca, sft = (train.parse_args(["--arch", "ar", "--stage", stage])[0] for stage in ("reca", "sft"))
    assert train.mix(reca) == {"recon": 0.5, "t2i": 0.5} and train.mix(sft) == {"t2i": 1.0} and reca.t2i_weight == sft.t2i_weight == 1.0
    assert all(getattr(reca, k) == getattr(sft, k) for k in ("steps", "batch", "lr", "schedule", "warmup", "weight_decay")) and reca.steps == 1200
    published = train.parse_args(["--arch", "ar", "--steps", "300", "--i2t-weight", "1", "--t2i-weight", "0", "--mix", "recon=1", "i2t=1"])[0]
    assert train.mix(published) == {"recon": 1.0, "i2t": 1.0}


def test_tiny_mar_sees_half_of_its_pictures_scrambled():
    parse = lambda *a: train.parse_args(["--arch", "mar", *a])[0]
    args = parse()
    assert (args.understanding, args.altered_share) == ("scrambled", 0.5) and train.mix(args) == {"recon": 0.5, "t2i": 0.5, "i2t": 1.0}
    assert parse("--understanding", "shrunk").altered_share == 1.0  # an ablation that is typed holds for all pictures
    assert parse("--understanding", "scrambled", "--altered-share", "0.25").altered_share == 0.25
    assert parse("--data", "photos").understanding == "full"  # your own images: RecA as published


def test_features_are_dropped_only_without_captions_beside_them():
    args, _ = train.parse_args(["--arch", "diffusion", "--drop", "1"])
    for parts, drop in (({"recon": 1.0}, True), ({"recon": 0.5, "t2i": 0.5}, False)):
        pools = types.SimpleNamespace(args=args, parts=parts, pool_of={}, templates=["Describe."])
        assert train.Pools.sample(pools, "recon", 0, random.Random(0)) == {"prompt": "Describe.", "drop": drop}


def test_tables_and_figures_over_seeds(tmp_path, capsys):
    def result(score, curve, seed=0, stage="reca"):
        row = lambda s: {"generation": {"score": s, "seen": s, "held_out": s / 2, "objects": 2.0, "interval": (s - 0.1, s + 0.1), "tasks": {t: {"score": s, "held_out": {"score": s / 4}} for t in evaluate.data.TASKS}},
                         "questions": {"accuracy": 0.9, "interval": (0.8, 0.95)}}
        return json.dumps({"arch": "ar", "stage": stage, "seed": seed, "args": {"steps": 20, "i2t_weight": 0.0}, "scores": row(score), "curve": [(i * 10, row(s)) for i, s in enumerate(curve)]})
    runs = [("ar_reca_seed0", 0.5, (0.2, 0.3)), ("ar_reca_seed1", 0.7, (0.2, 0.5)), ("ar_reca_seed2", 0.6, ()), ("ar_base_seed0", 0.2, ()), ("ar_base_seed1", 0.3, ()), ("ar_base_seed2", 0.25, ()),
            ("ar_sft_seed1", 0.6, ()), ("ar_sft_seed2", 0.5, ())]
    for name, score, curve in runs:
        (tmp_path / f"{name}.json").write_text(result(score, curve, int(name[-1]), name.split("_")[1]))
    (tmp_path / "ar_sft-long_seed0.json").write_text(result(0.1, (), 0, "sft").replace('"steps": 20', '"steps": 40'))  # no control: more steps
    evaluate.main(["--table", str(tmp_path), "--figure", str(tmp_path / "f.png")])
    out = capsys.readouterr().out
    assert "| ar | reca | 3 | 0.60 0.60 0.60 0.60 0.60 0.60 | 0.600 ± 0.100 |" in out and "| ar | base | 3 |" in out
    assert "| ar | reca | score | 0.250 ± 0.050 | 0.600 ± 0.100 |  | **+0.350 ± 0.050** |  | 2.00 → 2.00 | 0.900 → 0.900 |  |" in out  # captions alone: not of every seed
    assert "| ar | sft-long | held-out | 0.100 | 0.050 |  | -0.050 |" in out
    (tmp_path / "ar_sft_seed0.json").write_text(result(0.5, (), 0, "sft"))
    evaluate.print_table(tmp_path)
    out = capsys.readouterr().out
    assert "| ar | reca | score | 0.250 ± 0.050 | 0.600 ± 0.100 | 0.533 ± 0.058 | **+0.350 ± 0.050** | +0.067 ± 0.058 |" in out  # 0, .1, .1 over captions alone: less than twice their spread
    assert Image.open(tmp_path / "f.png").size == (720, 400)
    for seed in (1, 2):
        os.remove(tmp_path / f"ar_base_seed{seed}.json")  # one base for all seeds
    evaluate.print_table(tmp_path)
    out = capsys.readouterr().out
    assert "| ar | reca* | score | 0.200 ± 0.000 | 0.600 ± 0.100 | 0.533 ± 0.058 | **+0.400 ± 0.100** |" in out
    (tmp_path / "ar_zero_seed0.json").write_text('{"arch": "ar", "seed": 0, "scores": null}')  # a run with --eval-n 0
    with pytest.raises(ValueError, match="ar_zero_seed0.json: no judged drawings"):
        evaluate.print_table(tmp_path)
    with pytest.raises(ValueError, match="knows the shape world only"):
        evaluate.main(["--arch", "mar", "--config", "harmon-1.5b"])
    with pytest.raises(ValueError, match="--eval-every"):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "ar_base_seed0.json").write_text(result(0.2, ()))
        evaluate.print_table(tmp_path / "x")
        assert "0.200 (0.100-0.300)" in capsys.readouterr().out  # one seed: its interval
        evaluate.main(["--table", str(tmp_path / "x"), "--figure", str(tmp_path / "g.png")])


def test_a_process_may_end_while_batches_are_being_made():
    program = "import torch, train\nget, close = train.prefetch(lambda s: [torch.randn(64, 64) @ torch.randn(64, 64) for _ in range(2000)][-1], range(10**6), depth=10**6)\nget()"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]  # a thread inside torch used to abort it: "terminate called without an active exception"
