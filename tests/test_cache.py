"""Data at size: worker processes, encodings on the disk, parquet, several sources with weights."""
import glob
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from processes import alive
from safetensors.torch import load_file

import checkpoint
import data
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARCHS = checkpoint.architectures()

def picture(i, size=(32, 24)):
    noise = np.random.default_rng(i).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()

def write_folder(path, n=20, bad=()):
    """n pictures with captions; those in `bad` are much too long for their width."""
    path.mkdir(parents=True)
    for i in range(n):
        (path / f"{i:03d}.png").write_bytes(picture(i, (300, 20) if i in bad else (32, 24)))
        (path / f"{i:03d}.txt").write_text(f"picture {i}")
    return path

def write_dialogues(folder, n=20):
    rows = [{"image": f"{i:03d}.png", "conversations": [{"from": "human", "value": "why " * 400 if i == 5 else "What?"},
                                                        {"from": "gpt", "value": f"Picture {i}."}]} for i in range(n)]
    (folder / "l.json").write_text(json.dumps(rows))
    return str(folder / "l.json")

@pytest.fixture(scope="module")
def models():
    """{arch: a tiny model}, made once."""
    found = {}
    for arch in ARCHS:
        torch.manual_seed(0)
        file = checkpoint.model_file(arch)
        found[arch] = file.Model(file.CONFIGS["tiny"], checkpoint.load_tokenizer("tiny")).eval()
    return found

def batches(models, *argv, arch="ar", stage="reca", rank=0, world=1):
    flags = ["--batch", "8", "--pool", "8", "--device", "cpu", "--drop", "0", "--i2t-weight", "1", "--mix",
             "recon=1" if stage == "reca" else "t2i=1", *map(str, argv)]
    args, _ = train.parse_args(["--arch", arch, "--stage", stage, *flags])
    models[arch].trainable_parameters(stage)
    return data.Batches(args, models[arch], "cpu", rank, world)

def steps_of(made, first, last):
    """As train.py has them made."""
    def make(step):
        return [made.batch(step, micro) for micro in range(made.args.accum)]
    return made.ahead(make, range(first, last))

def same(a, b):
    """Are two nests of dicts, lists and tensors equal?"""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))

@pytest.fixture
def calls(models, monkeypatch):
    """How many pictures were encoded and how many were opened."""
    count = dict(encoded=0, opened=0)
    true_open = data.open_image

    def precompute(true):
        def counted(images):
            count["encoded"] += len(images)
            return true(images)
        return counted

    def opened(*args):
        count["opened"] += 1
        return true_open(*args)
    for model in models.values():
        monkeypatch.setattr(model, "precompute", precompute(model.precompute), raising=False)
    monkeypatch.setattr(data, "open_image", opened)
    return count

def reset(calls):
    calls.update(encoded=0, opened=0)

# ------------------------------------------------------------------------------------------------ workers
@pytest.mark.parametrize("arch", ARCHS)
def test_workers_give_exactly_the_batches_of_none(models, arch, tmp_path, capfd):
    folder = write_folder(tmp_path / "f", 20, bad=(3, 11))
    flags = ["--data", folder, "--i2t-data", write_dialogues(folder), "--mix", "recon=1", "i2t=1", "--accum", "2",
             "--cache-gb", "0"]
    made = {n: batches(models, *flags, "--workers", n, arch=arch) for n in (0, 2)}
    steps = {n: list(steps_of(b, 3, 10)) for n, b in made.items()}
    assert len(steps[0]) == 7 and len(steps[0][0]) == 2 and same(steps[0], steps[2])
    assert same(steps[0][2][1], batches(models, *flags, arch=arch).batch(5, 1))
    found = [(set(s.rejected), set(s.problems)) for n in (0, 2) for s in made[n].listed.values()]
    assert found[:2] == found[2:] and len(found[0][0]) == 2
    assert set(made[0].cut) == set(made[2].cut) and "(row 5)" in str(made[2].cut)
    assert made[2].report().replace("003", "011") == made[0].report().replace("003", "011") != ""
    assert 2 <= capfd.readouterr().out.count("warning: ") <= 3  # each process that reads it says so once

def test_an_error_in_a_worker_is_the_one_without_workers(models, tmp_path):
    folder = write_folder(tmp_path / "f", 20)
    for i in range(1, 20):  # the first one is encoded at the start
        (folder / f"{i:03d}.png").write_bytes(b"")
    said, made = [], None
    for workers in (0, 1):
        with pytest.raises(ValueError) as e:
            made = steps_of(batches(models, "--data", folder, "--cache-gb", "0", "--workers", workers), 0, 3)
            list(made)
        said.append(str(e.value))
    first = [text.partition(" ")[2].partition("(")[0] for text in said]  # how many are found meanwhile may differ
    assert made and first[0] == first[1] and "more than 1%" in first[0] and "\n" not in said[0] + said[1]

def child(program):
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)

@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_the_run_and_not_before_it():
    """A launcher's SIGTERM reaches them too, while the run still wants to end its step and to save."""
    p = child("import os, signal, torch, data\n"
              "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
              "big = [torch.zeros(9)] * 3000\n"  # fills the pipe: a worker waits inside of it
              "for pid, _ in data.prefetch(lambda i: (os.getpid(), big), range(10 ** 6), workers=2):\n"
              "    print(pid, flush=True)\n")
    pids = {int(p.stdout.readline()) for _ in range(6)}
    assert len(pids) == 2 and p.pid not in pids and all(map(alive, pids))
    os.killpg(p.pid, signal.SIGTERM)
    while p.stdout.readline().strip() != "asked":
        assert p.poll() is None
    assert all(p.stdout.readline().strip().isdecimal() for _ in range(50)) and all(map(alive, pids))
    p.kill()
    p.wait()
    end = time.time() + 15  # DataLoader's watchdog looks every 5 s
    while any(map(alive, pids)) and time.time() < end:
        time.sleep(0.05)
    assert not any(map(alive, pids))

def test_a_worker_that_dies_ends_the_run_in_one_line():
    p = child("import os, checkpoint, data\n"
              "def make(i): return os.kill(os.getpid(), 9) if i == 3 else i\n"
              "checkpoint.one_line_errors(lambda: list(data.prefetch(make, range(9), workers=1)))")
    _, errors = p.communicate(timeout=100)
    assert p.returncode == 2 and errors.count("\n") == 1, errors
    assert errors.startswith("error: a process of --workers has died (") and errors.endswith("fewer --workers, or 0\n")

def test_how_many_workers_there_are():
    def count(*argv, device="cuda", config="harmon-0.5b"):
        args, _ = train.parse_args(["--arch", "mar", *argv])
        args.config = config
        return data.worker_count(args, device)
    cores = os.cpu_count()
    assert count("--data", "x") == max(1, min(4, cores)) and count("--data", "x", "--workers", "0") == 0
    assert count("--data", "x", device="cpu") == count("--data", "x", config="tiny") == 0
    assert count("--workers", "7", device="cpu") == 7

# ------------------------------------------------------------------------------------------------ cache
POOLS = {"reca": ("real", "understanding"), "sft": ("captioned", "understanding")}

@pytest.mark.parametrize("arch, stage", [("ar", "reca"), ("diffusion", "reca"), ("mar", "sft")])
def test_a_second_start_encodes_nothing(models, arch, stage, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
    folder = write_folder(tmp_path / "f", 20, bad=(3, 11))
    first_part = "recon" if stage == "reca" else "t2i"
    flags = ["--data", folder, "--i2t-data", write_dialogues(folder), "--mix", f"{first_part}=1", "i2t=1",
             "--cache-gb", "0"]
    plain = batches(models, *flags, "--cache-gb", "8", arch=arch, stage=stage)
    reset(calls)
    flags += ["--cache", tmp_path / "c"]
    first = batches(models, *flags, arch=arch, stage=stage)
    assert calls["encoded"] == 2 * 20
    steps = list(steps_of(first, 0, 5))
    reset(calls)
    (folder / "999.txt").write_text("no picture")  # is no part of the data
    again = batches(models, *flags, arch=arch, stage=stage)
    assert same(list(steps_of(again, 0, 5)), steps) and calls == dict(encoded=0, opened=0)
    for pool in POOLS[stage]:  # the order of good ones, and what was wrong with the others
        assert again.size[pool] == plain.size[pool] == 18
        assert again.listed[pool].rejected == plain.listed[pool].rejected != {}
    kept = plain.encodings[POOLS[stage][0]]
    for a, b in zip(steps[0][0].values(), plain.batch(0).values()):  # the same but for bf16
        for k in b:
            torch.testing.assert_close(a[k], b[k], rtol=2 ** -7 * (k in kept), atol=1e-3 * (k in kept))
    shard = load_file(sorted(glob.glob(str(tmp_path / "c" / f"{POOLS[stage][0]}-*" / "*")))[0])
    kinds = {k: v.dtype for k, v in shard.items() if k != "sums"}
    assert set(kinds.values()) <= {torch.bfloat16, torch.uint16} and len(shard["sums"]) == 8

def shards(folder):
    return sorted(glob.glob(str(folder / "*" / "*.safetensors")))

def test_what_was_encoded_before_a_crash_is_kept(models, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 8)
    folder, cache, true = write_folder(tmp_path / "f", 30, bad=(2,)), tmp_path / "c", data.Cache.write

    def dies(self, start, *rest):
        if start == 2:
            raise KeyboardInterrupt
        true(self, start, *rest)
    monkeypatch.setattr(data.Cache, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        batches(models, "--data", folder, "--cache", cache)
    assert len(shards(cache)) == 2
    monkeypatch.setattr(data.Cache, "write", true)
    reset(calls)
    made = batches(models, "--data", folder, "--cache", cache)
    assert calls["encoded"] == 14 and made.size["real"] == 29 and len(shards(cache)) == 4
    os.remove(shards(cache)[1])
    reset(calls)
    assert same(batches(models, "--data", folder, "--cache", cache).batch(3), made.batch(3))
    assert calls["encoded"] == 8

def test_a_damaged_shard_is_named_with_the_way_out(models, tmp_path, calls):
    folder, cache = write_folder(tmp_path / "f", 12), tmp_path / "c"
    flags = ("--data", folder, "--cache", cache)
    batches(models, *flags)
    [path] = shards(cache)
    whole = open(path, "rb").read()
    flipped = bytearray(whole)
    flipped[-100] ^= 64
    reset(calls)
    for content in (whole[:-9], whole[:5], b"", bytes(flipped)):
        with open(path, "wb") as f:
            f.write(content)
        with pytest.raises(ValueError, match=f"^{path}: damaged file of --cache .*: delete it$") as e:
            list(steps_of(batches(models, *flags), 0, 4))
        assert "\n" not in str(e.value) and calls["encoded"] == 0
    os.remove(path)
    assert batches(models, *flags).size["real"] == 12 and calls["encoded"] == 12

def test_whatever_encodings_depend_on_makes_a_new_key(models, tmp_path, calls):
    folder, cache = write_folder(tmp_path / "f", 4), tmp_path / "c"

    def keys(*argv, stage="reca", arch="mar", size=1):
        reset(calls)
        batches(models, "--data", folder, "--cache", cache, *argv, stage=stage, arch=arch)
        assert calls["encoded"] in (0, 4)
        return calls["encoded"] > 0
    assert keys() and not keys()
    assert not keys("--seed", "7", "--batch", "4", "--drop", "0.5")  # the order of samples has caches of no own
    models["mar"].config.cfg += 1
    assert not keys()
    models["mar"].config.cfg -= 1
    trained = next(p for p in models["mar"].parameters() if p.requires_grad)
    with torch.no_grad():
        trained += 1
        assert not keys()
        trained -= 1
        weight = models["mar"].vae.encoder.conv_in.weight
        weight[0, 0, 0, 0] += 1e-3
        assert keys()
        weight[0, 0, 0, 0] -= 1e-3
    assert not keys() and keys("--no-exif") and keys(stage="sft") and keys(arch="diffusion")
    os.utime(folder / "002.png", (1, 1))
    assert keys() and not keys()
    (folder / "002.png").write_bytes(picture(77, (31, 24)))
    assert keys()
    (folder / "001.png").unlink(), (folder / "001.txt").unlink()
    (folder / "9.png").write_bytes(picture(1)), (folder / "9.txt").write_text("x")
    assert keys()

@pytest.mark.parametrize("arch", ARCHS)
def test_a_models_encoders_are_all_that_its_encodings_depend_on(models, arch):
    """In no stage do other weights reach what precompute makes, or an old cache would be taken for a new one."""
    model = models[arch]
    images = torch.rand(2, 3, model.config.image_size, model.config.image_size) * 2 - 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for stage in ("base", "sft", "reca"):
        model.trainable_parameters(stage)
        want = model.precompute(images)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.split(".")[0] not in model.encoders or p.requires_grad:
                    p.copy_(torch.randn(p.shape))
            got = model.precompute(images)
            for name, p in model.named_parameters():
                p.copy_(before[name])
        assert same(got, want), stage

def test_there_must_be_room_for_a_cache(models, tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "f", 12)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"the cache of encodings needs 0.0 MB and 0.0 MB are free: .* --cache on an"):
        batches(models, "--data", folder, "--cache", tmp_path / "c")
    monkeypatch.undo()
    batches(models, "--data", folder, "--cache", tmp_path / "c")
    assert " GB of encodings will be kept" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        batches(models, "--data", folder, "--cache", tmp_path / "file")

def test_processes_share_the_work_and_the_cache(models, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHARD", 4)
    folder = write_folder(tmp_path / "f", 18, bad=(1, 17))
    flags = ("--data", folder, "--cache", tmp_path / "c")
    alone = batches(models, *flags[:2], "--cache", tmp_path / "other")
    children = []
    for rank in (0, 1):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
                encoded, true = [], models["ar"].precompute
                models["ar"].precompute = lambda images: encoded.append(len(images)) or true(images)
                made = batches(models, *flags, rank=rank, world=2)
                want = {k: v[4 * rank:4 * rank + 4] for k, v in alone.batch(2)["recon"].items() if v.ndim}
                good = all(torch.equal(made.batch(2)["recon"][k], v) for k, v in want.items() if k != "ids")
                dist.barrier()
                code = 0 if good and sum(encoded) == 12 and made.size["real"] == 16 else 2
                time.sleep(0.2)  # the other may still be in the barrier
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
    assert len(shards(tmp_path / "c")) == 5

def test_a_run_goes_on_from_its_cache(tmp_path, monkeypatch):
    """Filling it, starting from it and going on with it give the same losses; only the first encodes."""
    folder, encoded = write_folder(tmp_path / "f", 24), []
    true = data.Batches.encode
    monkeypatch.setattr(data.Batches, "encode", lambda self, *a, **kw: encoded.append(1) or true(self, *a, **kw))

    def run(name, *argv):
        encoded.clear()
        threads, handlers = torch.get_num_threads(), {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        train.main([*argv, "--out", str(tmp_path / name)])
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        rows = [json.loads(line) for line in open(tmp_path / name / "log.jsonl")]
        return [r["loss"] for r in rows], len(encoded)
    flags = ["--arch", "ar", "--data", str(folder), "--batch", "8", "--steps", "4", "--eval-n", "0", "--log-every", "1",
             "--mix", "recon=1", "--warmup", "1", "--device", "cpu", "--threads", "1", "--cache", str(tmp_path / "c")]
    first, count = run("a", *flags)
    assert count == 1 and len(first) == 4
    assert run("b", *flags, "--stop-after", "2", "--workers", "1")[1] == 0
    assert run("b", "--resume", str(tmp_path / "b"), "--stop-after", "0") == (first, 0)

# ------------------------------------------------------------------------------------------------ parquet
def test_parquet_gives_the_pictures_of_a_folder(models, tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = write_folder(tmp_path / "f", 20, bad=(3,))
    rows = [{"image": {"bytes": (folder / f"{i:03d}.png").read_bytes(), "path": f"{i}.png"}, "text": f" picture  {i}",
             "score": i} for i in range(20)]
    shard = str(tmp_path / "x.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), shard, row_group_size=6)
    plain = str(tmp_path / "d" / "plain.parquet")
    os.mkdir(tmp_path / "d")
    columns = {"jpg": [row["image"]["bytes"] for row in rows], "caption": [row["text"] for row in rows]}
    parquet.write_table(pa.table(columns), plain)
    parquet.write_table(pa.table({"url": ["x"]}), str(tmp_path / "d" / "urls.parquet"))
    want = data.Images(folder, captions=True)
    for path in (shard, tmp_path / "d"):
        images = data.Images(path, captions=True)
        assert [s.caption for s in images.samples] == [s.caption for s in want.samples]
        for i in (19, 0, 7, 3, 5):
            a, b = images.read(i), want.read(i)
            assert (a is None) == (b is None) == (i == 3) and (a is None or a.tobytes() == b.tobytes())
        assert len(images.rejected) == 1 and images.samples[7].name.endswith(".parquet:7")
    assert [why.split(" column")[0] for _, why in images.left_out] == ["parquet files without a"]
    for sft, flags in (("reca", ()), ("sft", ("--cache", tmp_path / "c", "--workers", "2"))):
        a, b = (list(steps_of(batches(models, "--data", path, *flags, stage=sft), 0, 3)) for path in (folder, shard))
        assert same(a, b)
    rows[4]["image"], rows[5]["text"] = None, None
    parquet.write_table(pa.Table.from_pylist(rows * 9), shard)
    images = data.Images(shard, captions=True, max_broken=0.2)
    assert images.problems[f"{shard}:5"] == "empty caption" and images.read(4) is None
    (tmp_path / "x.parquet").write_bytes(open(plain, "rb").read()[:-20])
    with pytest.raises(ValueError, match="x.parquet: truncated or damaged parquet file") as e:
        data.Images(shard)
    assert "\n" not in str(e.value)

def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="x.parquet: left out: parquet files, .*pip install pyarrow"):
        data.Images(tmp_path / "x.parquet")
    (tmp_path / "1.png").write_bytes(picture(1))
    assert "pip install pyarrow" in data.Images(tmp_path).summary()

# ------------------------------------------------------------------------------------------------ sources and texts
def test_sources_are_drawn_with_their_weights(models, tmp_path):
    a, b = write_folder(tmp_path / "a", 12), write_folder(tmp_path / "b", 5, bad=(0, 1))
    flags = ("--data", a, b, "--data-weights", "0.7", "0.3", "--batch", "40")
    for gb in (1, 0):
        made = batches(models, *flags, "--cache-gb", gb)
        drawn = torch.cat([made.numbers("recon", step) for step in range(50)])
        assert abs((drawn < 12).float().mean() - 0.7) < 0.04 and set(drawn.tolist()) == set(range(made.size["real"]))
        assert torch.equal(drawn[80:120], batches(models, *flags, "--cache-gb", gb).numbers("recon", 2))
        whole = made.batch(1)["recon"]
        parts = []
        for made.rank in (0, 1):
            made.world = 2
            parts.append(made.batch(1)["recon"])
        for k in set(whole) - {"ids", "lengths", "count"}:
            assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])
    images = made.listed["real"]
    assert {images.read_or_draw(12, data.text_rng(i))[0] for i in range(30)} == {14, 15, 16}  # of the same source
    for weights in (["1"], ["1", "2", "3"], ["0", "1"], ["-1", "2"], ["nan", "1"], ["inf", "1"]):
        with pytest.raises(ValueError, match="--data-weights .* for 2 paths of --data; give one above 0 for each") as e:
            batches(models, *flags[:3], "--data-weights", *weights)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="1 numbers for 0 paths"):
        batches(models, "--data-weights", "1")
    bad = write_folder(tmp_path / "bad", 2, bad=(0, 1))
    with pytest.raises(ValueError, match="--data-weights: no picture of .*bad can be used"):
        next(steps_of(batches(models, "--data", a, bad, "--data-weights", "1", "1"), 0, 9))

def test_pictures_are_not_opened_for_their_texts(models, tmp_path, calls):
    folder = write_folder(tmp_path / "f", 6)
    images = data.Images(folder, captions=True)
    assert [s.caption for s in images.samples] == [f"picture {i}" for i in range(6)]
    made = batches(models, "--data", folder, "--i2t-data", write_dialogues(folder, 6), "--mix", "text=1")
    assert list(steps_of(made, 0, 2)) and calls == dict(encoded=0, opened=0)
