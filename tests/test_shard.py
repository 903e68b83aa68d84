"""--shard on two processes: a run that stops and goes on is the whole run, bit for bit; another number of processes
goes on with it; export joins it. (That its losses and gradients are those of one process: test_train.py.)"""
import contextlib
import io
import os
import pathlib
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Launch
from test_train import ARCHS, SMALL, losses, run
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

import checkpoint
import custom_kernels
import data
import train

STEPS = """
import functools, json, os, shutil, sys, torch
import checkpoint, data, train
arch, folder, *flags = sys.argv[1:]
encoded, written, true = [], {}, (data.Batches.encode, checkpoint.write_state)
data.Batches.encode = lambda self, *a, **kw: encoded.append(1) or true[0](self, *a, **kw)

def write_state(folder, state):
    written[state["step"]] = [row["step"] for row in state["history"]]
    true[1](folder, state)
checkpoint.write_state = write_state

def go(*argv):
    encoded.clear()
    args, state = train.parse_args([*argv])
    run = train.Run(args, state)
    train.train(run, [])
    checkpoint.settle(run)
    run.log.close()
    train.dist.barrier()
    run.lock = None
    train.dist.init_process_group = lambda *args, **more: None  # once is enough
    return checkpoint.all_tensors(run)

def first(work, *args):
    if train.dist.get_rank() == 0:
        work(*args)
    train.dist.barrier()

def add(path, text):
    with open(path, "a") as f:
        f.write(text)

flags += ["--arch", arch, "--shard"]
whole = go(*flags, "--out", f"{folder}/whole")
assert encoded and all(steps == [*range(1, n + 1)] for n, steps in written.items()), written  # of its step, not later
go(*flags, "--out", f"{folder}/part", "--stop-after", "2")
assert not encoded  # all is in --cache
first(shutil.copytree, f"{folder}/part", f"{folder}/alone")
first(add, f"{folder}/part/log.jsonl", json.dumps(dict(step=3, loss=0)) + chr(10))  # of a run that died after step 3
again = go("--resume", f"{folder}/part", "--stop-after", "0")
assert not encoded
assert whole.keys() == again.keys() and any(name.startswith("ema.") for name in whole)
different = [k for k, t in whole.items() if not torch.equal(*(checkpoint.own_rows(x)[0] for x in (t, again[k])))]
assert not different, different
rows = sum(checkpoint.own_rows(t)[0].numel() for k, t in whole.items() if ".exp_avg" in k)
assert rows < 0.6 * sum(t.numel() for k, t in whole.items() if ".exp_avg" in k)  # each process holds its share
if arch == "mar":
    go("--resume", f"{folder}/one", "--shard", "--stop-after", "0")
    torch.compile = functools.partial(torch.compile, backend="eager")
    go(*flags, "--out", f"{folder}/lora", "--lora", "2", "--lr", "0.01", "--compile", "on", "--stop-after", "2")
train.dist.barrier()
os._exit(0)
"""
FLAGS = [*SMALL, "--preview", "0", "--muon-lr", "0", "--ema", "0.9", "--steps", "3", "--save-every", "2"]

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{arch: the folder of its runs}: launches of two processes, all at once."""
    top = tmp_path_factory.mktemp("shard")
    script, out, launched = top / "steps.py", {arch: top / arch for arch in ARCHS}, {}
    script.write_text(STEPS)
    os.mkdir(top / "pictures")
    for i in range(16):
        noise = np.random.default_rng(i).integers(256, size=(48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(top / "pictures" / f"{i}.png")
    assert run("--arch", "mar", *FLAGS, "--stop-after", "2", out=out["mar"] / "one") == 0
    for arch, folder in out.items():
        os.makedirs(folder, exist_ok=True)
        argv = [arch, folder, *FLAGS, "--data", top / "pictures", "--mix", "recon=1", "--cache", folder / "cache"]
        launched[arch] = Launch(2, *argv, script=script)
    for process in launched.values():
        code, said = process.wait()
        assert code == 0, said[-3000:]
    return out

@pytest.mark.parametrize("arch", ARCHS)
def test_a_sharded_run_stops_goes_on_and_is_exported(arch, folders, tmp_path):
    folder = folders[arch] / "whole"
    assert [name for name in os.listdir(folder) if name.startswith("shards")] == ["shards-3"]  # earlier ones are gone
    assert losses(folders[arch] / "part") == losses(folder) and [*losses(folder)] == [1, 2, 3]
    alone = shutil.copytree(folders[arch] / "alone", tmp_path / "alone")
    assert run("--resume", str(alone), "--stop-after", "0", out=alone) == 0  # by one process
    out = {layout: tmp_path / layout for layout in ("ours", "published")}
    for layout in out:
        train.main(["--export", str(folder), str(out[layout]), "--layout", layout])
    joined = checkpoint.load_model(arch, str(out["ours"]))
    averages = {f"ema.{name}": p for name, p in joined.named_parameters()}
    state = checkpoint.read_checkpoint(str(folder))
    names = checkpoint.shard_names(str(folder / state["shards"]))
    stored = {n: torch.zeros_like(p) for n, p in averages.items() if n in names}
    checkpoint.load_shards(str(folder / state["shards"]), stored)
    assert stored and all(torch.equal(averages[n], t) for n, t in stored.items())  # as sample.py is to see it
    alone, base = (checkpoint.read_weights(f) for f in (alone, checkpoint.default_weights(arch, "base")))
    moved = {name: (p - base[name].float()).norm() for name, p in joined.named_parameters()}
    away = {name: (p - alone[name]).norm() for name, p in joined.named_parameters()}
    assert 0 < sum(moved.values()) and sum(away.values()) < 0.02 * sum(moved.values())
    published = joined.published_state()
    found = checkpoint.read_weights(out["published"])
    assert found.keys() == published.keys() and all(torch.equal(found[k], t) for k, t in published.items())

def test_two_processes_go_on_with_a_run_of_one(folders, tmp_path):
    """Its losses are those of the run that nothing stopped; the sums of gradients round in another order."""
    assert run("--arch", "mar", *FLAGS, out=tmp_path / "whole") == 0
    whole, part = losses(tmp_path / "whole"), losses(folders["mar"] / "one")
    assert [*part] == [1, 2, 3]
    for step in whole:
        assert part[step] == pytest.approx(whole[step], rel=2e-3), step

def test_a_damaged_shard_is_refused_in_one_line(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["ar"] / "whole", tmp_path / "run")
    checkpoint.read_checkpoint(folder)
    files = sorted(os.listdir(folder / "shards-3"))
    assert len(files) == 3  # what each process wrote, and the table of all tensors
    for name in files:
        path = folder / "shards-3" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for content in (bytes(flipped), whole[:-1], None):
            path.write_bytes(content) if content else path.unlink()
            with pytest.raises(ValueError, match=f"^{path}: missing or damaged, its SHA-256 is not") as e:
                checkpoint.read_checkpoint(folder)
            assert "\n" not in str(e.value)
        path.write_bytes(whole)
    (folder / "shards-3" / files[1]).write_bytes(b"x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):  # each process looks at its share of the files
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ValueError) if rank == 1 else contextlib.nullcontext():
            checkpoint.read_checkpoint(folder)

def test_a_table_of_shards_runs_nothing(folders, tmp_path):
    folder, sign = shutil.copytree(folders["ar"] / "whole" / "shards-3", tmp_path / "shards"), tmp_path / "sign"
    assert checkpoint.shard_names(folder)
    for call in ((os.mkdir, str(sign)), (eval, f"__import__('os').mkdir({str(sign)!r})"), (torch.load, str(sign)),
                 (getattr, pathlib.PosixPath, "unlink")):
        hostile = type("Hostile", (), {"__reduce__": lambda self: (call[0], call[1:])})
        (folder / ".metadata").write_bytes(pickle.dumps(hostile()))
        with pytest.raises(ValueError, match=f"^{folder}: not a whole sharded .*(no place there|_member_map_)") as e:
            checkpoint.load_shards(str(folder), {})
        assert "\n" not in str(e.value) and not sign.exists()
    member = type("Member", (), {"__reduce__": lambda self: (getattr, (_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))})
    assert checkpoint.Table(io.BytesIO(pickle.dumps(member()))).load() is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT

def test_a_sharded_run_saves_its_adapters_alone(folders):
    """Beside every checkpoint, and those that the checkpoint has: averaged ones, as it keeps averages."""
    folder = folders["mar"] / "lora"
    state = checkpoint.read_checkpoint(folder)
    model = checkpoint.load_model("mar", checkpoint.default_weights("mar", "base"))
    named = custom_kernels.add_lora(model, model.trainable_parameters("reca"), 2, torch.Generator())
    kept = {f"ema.{name}": p.detach() for name, p in named}
    checkpoint.load_shards(str(folder / state["shards"]), kept)
    saved = checkpoint.read_weights(folder / "adapter_model.safetensors")
    wanted = custom_kernels.lora_state(model)
    assert state["step"] == 2 and saved.keys() == wanted.keys() and not (folder / "model.safetensors").exists()
    assert all(torch.equal(saved[k], t) for k, t in wanted.items()) and any(t.any() for t in wanted.values())

def test_sharded_blocks_are_compiled_one_by_one(monkeypatch):
    """Between two of them FSDP gathers weights, which would break a graph of all."""
    args, _ = train.parse_args(["--arch", "ar", *SMALL, "--compile", "on"])
    model, compiled = checkpoint.load_model("ar"), []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    here = types.SimpleNamespace(args=args, model=model, device=torch.device("cpu"), world=2, sharded=True)
    forwards = [block.forward for block in model.blocks()]
    assert train.Run.wrapped(here) is model and compiled == forwards
    here.world, here.sharded = 1, False
    assert train.Run.wrapped(here) is not model and compiled[len(forwards):] == [model]

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
