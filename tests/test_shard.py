"""--shard on two processes: a run that stops and goes on is the whole run, bit for bit; another number of processes
goes on with it; export joins it. (That its losses and gradients are those of one process: test_train.py.)"""
import os

import pytest
import torch
from test_train import ARCHS, ROOT, SMALL, losses, python, run, torchrun

import checkpoint
import data
import train

STEPS = """
import os, shutil, sys, torch, train
import checkpoint
folder, *argv = sys.argv[1:]

def go(*more):
    args, state = train.parse_args([*argv, *more])
    run = train.Run(args, state)
    run.log.close()
    train.train(run, [])
    checkpoint.settle(run)
    train.dist.barrier()
    run.lock = None
    train.dist.init_process_group = lambda *args, **more: None  # once is enough
    return checkpoint.all_tensors(run)

train.report_step = lambda *args: None
whole = go("--out", f"{folder}/whole")
go("--out", f"{folder}/part", "--stop-after", "2")
if train.dist.get_rank() == 0:
    shutil.copytree(f"{folder}/part", f"{folder}/alone")
argv = []
again = go("--resume", f"{folder}/part", "--stop-after", "0")
assert whole.keys() == again.keys() and any(name.startswith("ema.") for name in whole)
different = [k for k, t in whole.items() if not torch.equal(*(checkpoint.own_rows(x)[0] for x in (t, again[k])))]
assert not different, different
rows = sum(checkpoint.own_rows(t)[0].numel() for k, t in whole.items() if ".exp_avg" in k)
assert rows < 0.6 * sum(t.numel() for k, t in whole.items() if ".exp_avg" in k)  # each process holds its share
train.dist.barrier()
os._exit(0)
"""

@pytest.mark.parametrize("arch", ARCHS)
def test_a_sharded_run_stops_goes_on_and_is_exported(arch, tmp_path):
    script = tmp_path / "steps.py"
    script.write_text(STEPS)
    argv = ["--arch", arch, *SMALL, "--muon-lr", "0", "--ema", "0.9", "--steps", "3", "--save-every", "2"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = python(*launcher, str(script), str(tmp_path), *argv, "--shard",
                  env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "whole"
    assert [name for name in os.listdir(folder) if name.startswith("shards")] == ["shards-3"]  # earlier ones are gone
    assert run("--resume", str(tmp_path / "alone"), "--stop-after", "0", out=tmp_path / "alone") == 0  # by one process
    out = {layout: tmp_path / layout for layout in ("ours", "published")}
    for layout in out:
        train.main(["--export", str(folder), str(out[layout]), "--layout", layout])
    joined = checkpoint.load_model(arch, str(out["ours"]))
    averages = {f"ema.{name}": p for name, p in joined.named_parameters()}
    state = checkpoint.read_checkpoint(str(folder))
    stored = {f"ema.{n}": torch.zeros_like(p) for n, p in joined.named_parameters()}
    stored = {n: t for n, t in stored.items() if n in checkpoint.shard_names(str(folder / state["shards"]))}
    checkpoint.load_shards(str(folder / state["shards"]), stored)
    assert stored and all(torch.equal(averages[n], t) for n, t in stored.items())  # as sample.py is to see it
    alone, base = (checkpoint.read_weights(f) for f in (tmp_path / "alone", checkpoint.default_weights(arch, "base")))
    moved = {name: (p - base[name].float()).norm() for name, p in joined.named_parameters()}
    away = {name: (p - alone[name]).norm() for name, p in joined.named_parameters()}
    assert 0 < sum(moved.values()) and sum(away.values()) < 0.02 * sum(moved.values())
    published = joined.published_state()
    found = checkpoint.read_weights(out["published"])
    assert found.keys() == published.keys() and all(torch.equal(found[k], t) for k, t in published.items())

def test_two_processes_go_on_with_a_run_of_one(tmp_path):
    """Its losses are those of the run that nothing stopped; the sums of gradients round in another order."""
    argv = ["--arch", "mar", *SMALL, "--muon-lr", "0", "--save-every", "2"]
    assert run(*argv, out=tmp_path / "whole") == 0
    assert run(*argv, "--shard", "--stop-after", "2", out=tmp_path / "part") == 0
    torchrun(2, "--resume", str(tmp_path / "part"), "--shard", "--stop-after", "0")
    whole, part = losses(tmp_path / "whole"), losses(tmp_path / "part")
    assert [*part] == [1, 2, 3, 4]
    for step in whole:
        assert part[step] == pytest.approx(whole[step], rel=2e-3), step

def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="Muon needs whole matrices"):
        train.parse_args(["--arch", "mar", "--shard", "--muon-lr", "0.01"])
    args, _ = train.parse_args(["--arch", "diffusion", "--shard"])
    assert args.muon_lr == 0 and train.recipe(args)["muon_lr"]  # a recipe's own gives way

def test_what_is_frozen_is_bf16(tmp_path):
    """At published sizes, and where products are; what trains and the image tokenizer stay in fp32."""
    args, _ = train.parse_args(["--arch", "diffusion", *SMALL])
    args.config = "large"
    module = checkpoint.model_file("diffusion")
    with torch.device("meta"):
        model = module.Model(module.CONFIGS["tiny"])
    train.place(model, args, torch.bfloat16, False)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for name, dtype in kinds.items():
        whole = name in trained or name.startswith("vae.")
        assert dtype == (torch.float32 if whole else torch.bfloat16), name
    assert 0 < len(trained) < len(kinds)

@pytest.mark.parametrize("arch", ARCHS)
def test_models_with_frozen_bf16_draw_and_learn(arch):
    """As on GPUs at published sizes: encodings without autocast, losses and drawings with it, near those of fp32."""
    args, _ = train.parse_args(["--arch", arch, *SMALL])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = checkpoint.load_model(arch, checkpoint.default_weights(arch, "base"))
        batches = data.Batches(args, model)
        args.config = "large"
        train.place(model, args, dtype, False)
        args.config = "tiny"
        scenes = {name: source for name, source in batches.scenes.items() if name in ("broad", "captioned")}
        batches.encodings |= {name: batches.encode(name, source, range(32)) for name, source in scenes.items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = model(batches.batch(0))
            sum(losses.values()).backward()
            picture = model.eval().generate(["a red circle"], generator=torch.Generator().manual_seed(0))
            assert model.answer(picture, ["What color is the circle?"]) and picture.isfinite().all()
        found.append(torch.stack([*losses.values()]).detach())
    assert torch.allclose(found[0], found[1], rtol=0.1, atol=0.02), found
