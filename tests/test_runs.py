"""Run folders: one run each, nothing that was saved is lost, nothing broken is saved, whatever ends a run."""
import functools
import json
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import SIGNALS, run
from PIL import Image
from processes import Launch, alive
from safetensors.torch import load_file

import checkpoint
import sample
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--arch", "ar", "--stage", "base", "--gemm", "mkl", "--batch", "8", "--pool", "32", "--eval-n", "0",
         "--log-every", "1", "--steps", "4", "--warmup", "2", "--device", "cpu", "--threads", "1"]

def launch(n, *argv, script="train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", script, *argv]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def rows(folder):
    lines = [json.loads(line) for line in open(os.path.join(folder, "log.jsonl"))]
    timed = ("ms", "images_per_s", "mfu")
    return [{k: v for k, v in row.items() if k not in timed} for row in lines if "loss" in row]

@pytest.fixture
def bad_norms(monkeypatch):
    """Makes the gradient norm of the steps in the returned list nan."""
    steps, true, now = [], torch.nn.utils.clip_grad_norm_, iter(range(10 ** 6))

    def norm(*args):
        out = true(*args)
        return out * float("nan") if next(now) in steps else out
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    return steps

def test_a_step_with_a_bad_gradient_changes_nothing(tmp_path, bad_norms, capsys):
    out = str(tmp_path / "a")
    bad_norms.append(2)
    assert run(*SMALL, "--ema", "0.5", "--out", out, "--stop-after", "2") == 0
    before = torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)
    assert run("--resume", out, "--stop-after", "3") == 0
    after = torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)
    assert " skipped 1 " in capsys.readouterr().out and after["step"] == 3
    for part in ("model", "ema"):
        assert all(torch.equal(before[part][k], v) for k, v in after[part].items())
    moments = [[s["exp_avg"] for s in state["optimizers"][0]["state"].values()] for state in (before, after)]
    assert all(torch.equal(a, b) for a, b in zip(*moments))

def test_three_bad_gradients_end_the_run_with_the_samples(tmp_path, bad_norms):
    out = str(tmp_path / "a")
    assert run(*SMALL, "--steps", "9", "--out", out, "--stop-after", "2") == 0
    good = open(os.path.join(out, "checkpoint.pt"), "rb").read()
    bad_norms += [2, 3, 4]
    message = r"3 steps in a row .* the last, 5, with samples .*'t2i': \[.*checkpoint.pt is good"
    with pytest.raises(ValueError, match=message):
        run("--resume", out, "--stop-after", "0")
    assert open(os.path.join(out, "checkpoint.pt"), "rb").read() == good
    bad_norms += [5, 6, 7]
    with pytest.raises(ValueError, match="no checkpoint was saved before"):
        run(*SMALL, "--steps", "9", "--out", str(tmp_path / "b"))
    assert not os.path.exists(tmp_path / "b" / "checkpoint.pt")

def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    out, step = str(tmp_path / "a"), torch.optim.AdamW.step

    def ruin(self):
        step(self)
        self.param_groups[0]["params"][0].data[0] = float("inf")
    monkeypatch.setattr(torch.optim.AdamW, "step", ruin)
    with pytest.raises(ValueError, match="1 weights are not finite .first .*nothing is written.* no checkpoint was"):
        run(*SMALL, "--steps", "1", "--out", out)
    assert not {"checkpoint.pt", "model.safetensors"} & set(os.listdir(out))

def test_averaged_weights_are_what_is_saved_on_the_way(tmp_path):
    out = str(tmp_path / "a")
    assert run(*SMALL, "--ema", "0.5", "--save-every", "1", "--steps", "3", "--out", out) == 0
    state, saved = torch.load(f"{out}/checkpoint.pt", weights_only=True), load_file(f"{out}/model.safetensors")
    assert state["ema"] and all(torch.equal(saved[k], v) for k, v in state["ema"].items())
    # --resume needs those as they are
    assert any(not torch.equal(state["model"][k], v) for k, v in state["ema"].items())

def test_one_run_per_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = [*SMALL, "--steps", "1"]
    for name in ("runs/ar-base", "runs/ar-base-2", "runs/ar-base-3"):
        assert run(*short) == 0 and f"run folder: {name} (" in capsys.readouterr().out
    log = open("runs/ar-base/log.jsonl").read()
    with pytest.raises(ValueError, match="runs/ar-base holds a run .checkpoint.pt, .*--overwrite"):
        run(*short, "--out", "runs/ar-base")
    assert open("runs/ar-base/log.jsonl").read() == log
    assert run(*short, "--out", "runs/ar-base", "--overwrite") == 0
    with open("runs/ar-base/run.lock", "a") as lock:  # another process that trains there
        checkpoint.fcntl.flock(lock, checkpoint.fcntl.LOCK_EX)
        for argv in (["--out", "runs/ar-base", "--overwrite"], ["--resume", "runs/ar-base"]):
            with pytest.raises(ValueError, match=r"runs/ar-base is in use by process \d+ on"):
                run(*(short if "--resume" not in argv else []), *argv)
    with open("runs/ar-base/run.lock", "w") as lock:  # what a dead process left is taken over
        lock.write("process 1 on elsewhere")
    assert run(*short, "--out", "runs/ar-base", "--overwrite") == 0

def test_resuming_puts_the_folder_in_order(tmp_path):
    out = str(tmp_path / "a")
    assert run(*SMALL, "--out", out, "--stop-after", "2") == 0
    with open(f"{out}/log.jsonl", "a") as f:  # a run that was killed had gone on, and was writing
        f.write(json.dumps(dict(step=3, loss=1.0)) + "\n" + '{"step": 4, "lo')
    for name in ("checkpoint.pt.tmp999999", "model.safetensors.tmp999999"):
        open(f"{out}/{name}", "w").close()
    assert run("--resume", out, "--stop-after", "0") == 0
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]
    assert not [name for name in os.listdir(out) if ".tmp" in name]
    result = json.load(open(f"{out}/result.json"))
    assert "resumed_by" in result and "command" in result

@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_saves(number, tmp_path, monkeypatch):
    true = train.learning_rate

    def rate(args, step, lr):
        if step == 1:
            os.kill(os.getpid(), number)
        return true(args, step, lr)
    monkeypatch.setattr(train, "learning_rate", rate)
    assert run(*SMALL, "--out", str(tmp_path / "a")) == 128 + number
    assert torch.load(tmp_path / "a" / "checkpoint.pt", weights_only=True)["step"] == 2

@pytest.mark.parametrize("flags", [("--eval-n", "6", "--eval-every", "2"), ("--preview", "2", "--preview-every", "2")])
def test_a_signal_ends_scoring_and_drawing_on_the_way(flags, tmp_path, monkeypatch):
    def long(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    monkeypatch.setattr(train.evaluate, "score_all", long)
    model = checkpoint.model_file("ar").Model
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda self, *args, **more: (
        long() if os.path.exists(tmp_path / "a" / "log.jsonl") and "step" in open(tmp_path / "a" / "log.jsonl").read()
        else generate(self, *args, **more)))
    start = time.time()
    assert run(*SMALL, *flags, "--out", str(tmp_path / "a")) == 128 + signal.SIGTERM
    assert time.time() - start < 30 and os.path.exists(tmp_path / "a" / "checkpoint.pt")

def test_disks_and_paths(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="cannot be written|not a directory|Not a directory|File exists"):
        open(tmp_path / "file", "w").close()
        run(*SMALL, "--out", str(tmp_path / "file"))
    encoded = []
    monkeypatch.setattr(train.data, "Batches", lambda *args: encoded.append(1))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1_500_000})())
    with pytest.raises(ValueError, match=r"a checkpoint needs \d+\.\d MB and 1\.5 MB are free"):
        run(*SMALL, "--out", str(tmp_path / "a"))
    assert not encoded  # before anything was encoded
    os.mkfifo(tmp_path / "fifo")
    os.mkdir(tmp_path / "folder")
    for name in ("fifo", "folder"):
        with pytest.raises(OSError, match="is a folder or a device"):
            checkpoint.write_text(tmp_path / name, "text")
    checkpoint.write_text(tmp_path / "real", "old")
    os.symlink(tmp_path / "real", tmp_path / "link")
    checkpoint.write_text(tmp_path / "link", "new")
    assert os.path.islink(tmp_path / "link") and open(tmp_path / "real").read() == "new"

OUTS = {"a file": "file", "below a file": "file/sub", "a pipe": "pipe", "a link to itself": "loop", "a device": "null",
        "too long": "x" * 300, "no folder can be there": "/proc/nowhere", "half a name": "a\0b"}

@pytest.mark.parametrize("kind", OUTS)
def test_places_where_nothing_can_be_written(kind, tmp_path, monkeypatch):
    """Said before anything is built, drawn or encoded, in one line; what is there stays as it is."""
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("/dev/null", tmp_path / "null")
    os.symlink("loop", tmp_path / "loop")
    monkeypatch.setattr(train, "build", None)
    out = os.path.join(tmp_path, OUTS[kind])
    for call in (lambda: run(*SMALL, "--out", out), lambda: sample.save_png(Image.new("RGB", (4, 4)), out + "/x.png"),
                 lambda: checkpoint.write_text(out + "/scores.json", "{}")):
        with pytest.raises((ValueError, OSError)) as e:
            call()
        said = str(e.value)
        assert "\n" not in said and (OUTS[kind] in said or kind == "half a name" or "/dev/null" in said)
    assert sorted(os.listdir(tmp_path)) == ["file", "loop", "null", "pipe"]
    assert (tmp_path / "file").read_text() == "mine"

@pytest.mark.parametrize("argv, message", [
    ("--mix images=1", "--stage base --mix images: the tokenizer stage trains images alone"),
    ("--stage tokenizer --mix t2i=1", "--stage tokenizer --mix t2i: the tokenizer stage"),
    ("--stage tokenizer --mix images=1 t2i=1", "--stage tokenizer --mix images t2i: the tokenizer stage"),
    ("--t2i-weight 0 --i2t-weight 0 --mix t2i=1 i2t=1", "leave nothing to train on"),
    ("--batch 8 --mix t2i=0.01", "--batch 8 gives 0 t2i samples"), ("--batch 9 --accum 2", "cannot share: take a mul")])
def test_parts_and_batches_that_do_not_fit(argv, message, tmp_path):
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        run(*SMALL, *argv.split(), "--out", str(tmp_path / "a"))
    assert not os.listdir(tmp_path)

@pytest.mark.parametrize("kind", ["a folder", "empty", "cut", "text", "list", "one bit", "no sum"])
def test_checkpoints_that_are_none(kind, tmp_path, capsys):
    path, content = tmp_path / "checkpoint.pt", {"text": b"hello " * 99, "empty": b""}.get(kind)
    if kind == "a folder":
        path.mkdir()
    else:
        torch.save([1] if kind == "list" else {"step": 1, "model": torch.zeros(999)}, path)
        checkpoint.write_checksum(path, path)
        good = path.read_bytes()
        content = {"cut": good[:-99], "one bit": good[:500] + bytes([good[500] ^ 1]) + good[501:]}.get(kind, content)
    if content is not None:
        path.write_bytes(content)
    if kind == "no sum":
        os.remove(f"{path}.sha256")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((ValueError, OSError)) as e:
        run("--resume", str(tmp_path))
    assert "checkpoint.pt" in str(e.value) and "\n" not in str(e.value) and sorted(os.listdir(tmp_path)) == before

def fork_launch(n, main, path):
    """Runs main in n processes below a launcher, as torchrun does, but for its time: all are forks of this one, which
    is good for what ends before anything is computed. What they say goes to a file -> its lines, their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with open(path, "w") as said:
        if (launcher := os.fork()) == 0:
            os.dup2(said.fileno(), 1), os.dup2(said.fileno(), 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
            os.environ.update(WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            workers = []
            for rank in range(n):
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
                if (worker := os.fork()) == 0:
                    code = 99
                    signal.signal(signal.SIGALRM, signal.SIG_DFL)
                    signal.alarm(60)
                    try:
                        checkpoint.one_line_errors(main)
                    except SystemExit as e:
                        code = e.code
                    finally:
                        sys.stdout.flush()
                        os._exit(code)
                workers.append(worker)
            codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
            with open(f"{path}.codes", "w") as f:
                json.dump(codes, f)
            os._exit(0)
        os.waitpid(launcher, 0)
    with open(path, errors="replace") as said, open(f"{path}.codes") as f:
        return said.read().splitlines(), json.load(f)

FAULTS = {  # what is wrong: (flags, the line)
    "no such file": ("--ckpt no/such", "no/such: no config.json there"),
    "a config file": ("--ckpt bad", "bad/config.json: not valid JSON"),
    "no run": ("--resume bad", "--resume bad: no checkpoint.pt there"), "a run": ("--resume run", "run/checkpoint.pt"),
    "a number": ("--lr -1", "--lr -1: must be from 0 to 100"), "a device": ("--device mps:3", "--device mps:3: this"),
    "a share": ("--batch 7", "--batch 7 gives 4 recon samples, which 3 processes"),
    "unused": ("--image-root x", "--image-root is for JSON"), "a folder in use": ("--out run", "run holds a run "),
    "no folder": ("--out bad/config.json", ".*a file stands"), "pictures": ("--data no", "no: no such"),
    "prompts": ("--preview-prompts gone", "gone: no such file of prompts"),
    "a tokenizer": ("--text-tokenizer bad/config.json", "bad/config.json: ")}

@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault_is_one_line_of_all_processes(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bad/config.json", "run/checkpoint.pt"):
        os.makedirs(os.path.dirname(name))
        checkpoint.write_text(name, "{")
    (flags, line), remarks = FAULTS[kind], int(kind == "a run")  # no checksum is beside it
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    argv = ["--batch", "12", "--device", "cpu", "--threads", "1", "--out", "a", *flags.split()]
    train.recipe(train.parser().parse_args([]))  # imported once, for all forks
    lines, codes = fork_launch(3, functools.partial(train.main, argv), tmp_path / "said")
    errors = [text for text in lines if text.startswith("error: ")]
    assert codes == [2, 2, 2] and len(errors) == 1 and len(lines) <= 1 + remarks, (codes, lines)
    assert re.match(f"error: {line}", errors[0])
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - {*before}
    assert {path.name for path in new} <= {"said", "said.codes", "run.lock"}
    assert all(path.read_bytes() == content for path, content in before.items())

def test_all_processes_resume_the_same_step(tmp_path):
    """Also where nodes hold copies of a run folder, one of them older."""
    for step in "12":
        assert run(*SMALL, "--stop-after", step, out=tmp_path / step) == 0

    def main():
        folder = str(tmp_path / "21"[int(os.environ["RANK"])])
        return train.main(["--resume", folder, "--stop-after", "0"])
    lines, codes = fork_launch(2, main, tmp_path / "said")
    wanted = f"error: --resume {tmp_path}/1: step 1, on the first process 2: give all one folder"
    assert codes == [2, 2] and [line for line in lines if line.startswith("error")] == [wanted], lines

SCRIPTS = {"train": "--ckpt no --out out --gemm mkl", "sample": "--prompt x --ckpt no --out x.png",
           "evaluate": "--ckpt no --json x.json", "data": "--check no"}

@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_ends_with_one_line_and_exit_code_2(script, tmp_path, monkeypatch):
    path = os.path.join(ROOT, f"{script}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path, *SCRIPTS[script].split()])
    lines, codes = fork_launch(1, functools.partial(runpy.run_path, path, run_name="__main__"), tmp_path / "said")
    assert codes == [2] and len(lines) == 1 and re.match("error: no: no (config.json|such folder)", lines[0]), lines
    assert {path.name for path in tmp_path.rglob("*")} <= {"said", "said.codes", "out", "run.lock"}

def test_one_fault_is_one_line_under_torchrun(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "evaluate.py"), "--ckpt", "no", "--json", "x.json"]
    alone = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = launch(3, "--ckpt", "no/such", "--batch", "12", "--device", "cpu", "--out", str(tmp_path / "a"))
    lines = done.communicate(timeout=240)[0].splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: no/such") and lines.index(errors[0]) < 3
    assert done.returncode != 0
    assert alone.communicate(timeout=240)[0].startswith("error: no: no config.json there") and alone.returncode == 2
    assert set(os.listdir(tmp_path)) <= {"a"}

def test_kills(tmp_path):
    """Two processes, killed at random four times, a worker or the launcher, and resumed: the same numbers in the
    end. First under torchrun itself, then by a launcher that starts sooner."""
    whole, out = str(tmp_path / "whole"), str(tmp_path / "a")
    common = [*SMALL[:-2], "--steps", "40", "--save-every", "2"]
    undisturbed = Launch(2, *common, "--out", whole)
    report = kill_rounds(out, common, rounds=4, seed=0, starts=(launch, forked))
    assert undisturbed.wait()[0] == 0 and any(line["resumed"] for line in report)
    assert rows(out) == rows(whole)
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in b)

def forked(n, *argv):
    return Launch(n, *argv, TORCHELASTIC_RUN_ID="forked")

def ended(job):
    """-> exit code and output of a job, once it is over."""
    if isinstance(job, Launch):
        return job.wait()
    text = job.communicate(timeout=600)[0]
    return job.returncode, text

def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        return [int(child) for child in f.read().split()]

def last_step(out):
    path = os.path.join(out, "log.jsonl")
    lines = open(path).read().splitlines() if os.path.exists(path) else []
    return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)

def kill_rounds(out, common, rounds, seed, starts=(launch,)):
    """Starts or resumes a two-process run, kills one of its processes after a random number of steps, or before the
    first, `rounds` times; then lets it end. starts: what launches the rounds, the last one all that are left. -> what
    happened, for the report."""
    rng, report = random.Random(seed), []
    for n in range(rounds + 1):
        resumable = os.path.exists(os.path.join(out, "checkpoint.pt"))
        again = ["--overwrite"] if os.path.exists(os.path.join(out, "log.jsonl")) else []
        before = last_step(out) * resumable
        start = starts[min(n, len(starts) - 1)]
        job = start(2, *(["--resume", out] if resumable else [*common, "--out", out, *again]))
        if n == rounds:
            code, text = ended(job)
            assert code == 0, text[-2000:]
            return report
        deadline, steps = time.time() + 60, before + rng.randrange(-1, 7)
        while job.poll() is None and time.time() < deadline and (len(children(job.pid)) < 2 or last_step(out) < steps):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.5))
        workers = children(job.pid) if job.poll() is None else []
        victim = rng.choice([job.pid, *workers]) if workers else None
        if victim:
            os.kill(victim, signal.SIGKILL)
        start = time.time()
        ended(job)
        while any(map(alive, workers)) and time.time() - start < 40:
            time.sleep(0.1)
        kind = {None: "none", job.pid: "launcher"}.get(victim, "worker")
        report.append(dict(round=n, victim=kind, seconds=round(time.time() - start, 1), resumed=resumable))
        assert time.time() - start < 30, report
    return report
