"""Measure the kernels against what PyTorch offers for the same work, at the shapes that RecA trains, on a GPU:

    python -m custom_kernels.bench                     # all tables, or --only one of them; writes bench.json
    python -m custom_kernels.bench --check             # bfloat16 correctness; exit code 1 if something is wrong
    python -m custom_kernels.bench --steps             # complete RecA steps at published sizes, weights at random
    python -m custom_kernels.bench --cpu               # no GPU: tiny models in turns with those of an earlier commit

Each line: median milliseconds forward, and forward + backward; TFLOP/s or TB/s of the latter; peak memory beyond the
inputs; how many times as long as ours it takes. Under each shape stands the line for pick.py's table."""
import argparse
import functools
import inspect
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import timeit
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from . import diffusion_loss, diffusion_tables, pick
from .attention import attention_flex, attention_plan, attention_reference, attention_triton
from .linear_cross_entropy import linear_cross_entropy_fused, linear_cross_entropy_reference

# ---------------------------------------------------------------------------------------------------------------------
# cases at the sizes that RecA trains, divided by `cut`; `like` has the device and type to work in. A case, to be used
# before the next one is made: title, key in pick.py's table, what it should say where ours is not the fastest, inputs,
# {way: function of the inputs}, operations or bytes forward and backward, unit.

def layout(cut, *blocks):
    """Intervals lo, hi (1, T) of a sample made of blocks (length, bidirectional or causal)."""
    hi = []
    for length, bidirectional in blocks:
        block = range(len(hi) + 1, len(hi) + length // cut + 1)
        hi += [block[-1]] * len(block) if bidirectional else block
    hi = torch.tensor([hi])
    return torch.zeros_like(hi), hi

def attention_cases(like, cut):
    shapes = [  # name, batch, query heads, key heads, head dimension, (lo, hi)
        ("Harmon-1.5B LLM", 8, 12, 2, 128, layout(cut, (1320, False))),
        ("Show-o 512 RecA", 4, 32, 32, 64, layout(cut, (576, True), (130, False), (1026, True))),
        ("BAGEL RecA", 8, 28, 4, 128, layout(cut, (258, True), (66, False), (4098, True))),
        ("random, some empty", 2, 4, 1, 80, torch.randint(0, 1230 // cut, (2, 2, 1030 // cut)).sort(0).values)]
    for name, B, Hq, Hkv, D, (lo, hi) in shapes:
        Tq, Tk, B = lo.shape[1], int(hi.max()), max(len(lo), B // cut)
        q, k, v = (like.new_empty(B, T, H, D).normal_().transpose(1, 2).requires_grad_()
                   for T, H in ((Tq, Hq), (Tk, Hkv), (Tk, Hkv)))
        plan = attention_plan(lo.to(like.device), hi.to(like.device), Tk)
        ways = dict(ours=lambda *qkv: attention_triton(*qkv, plan),
                    reference=lambda *qkv: attention_reference(*qkv, plan))
        if like.is_cuda:
            ways["FlexAttention"] = lambda *qkv: attention_flex(*qkv, plan)
        pairs = (hi - lo).sum().item() * (B // len(lo))
        title = f"attention, {name}: B {B} T {Tq} {Tk} heads {Hq}/{Hkv} of {D}, {pairs / B / Tq / Tk:.0%} of the pairs"
        # 2 products forward, 5 backward, 2 operations each
        yield title, ("attention", D), "flex", (q, k, v), ways, 14 * D * Hq * pairs, "TFLOP/s"

def linear_cross_entropy_cases(like, cut):
    shapes = [(10570, 151936, 1536, False, 1.0), (10570, 151936, 1536, False, 0.1), (6920, 58498, 2048, True, 0.5)]
    for N, V, D, bias, kept in shapes:  # rows, classes, width, whether there is a bias, share of the labels that count
        N, V, D = N // cut, V // cut, D // cut
        h, w, b = (like.new_empty(shape).normal_() for shape in ((N, D), (V, D), (V,)))
        inputs = h.requires_grad_(), w.mul_(D ** -0.5).requires_grad_(), b.requires_grad_() if bias else None
        labels = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) >= kept, -100).to(like.device)
        ways = dict(ours=lambda h, w, b: linear_cross_entropy_fused(h, w, labels, b),
                    chunks=lambda h, w, b: linear_cross_entropy_fused(h, w, labels, b, kernels=False),
                    reference=lambda h, w, b: linear_cross_entropy_reference(h, w, labels, b))
        if like.is_cuda:
            ways["torch's own"] = lambda h, w, b: F.linear_cross_entropy(
                h, w, labels, linear_bias=b, ignore_index=-100, options=torch.nn.LinearCrossEntropyOptions())
        title = f"linear_cross_entropy: {N} rows of {D}, {V} classes, {kept:.0%} of the labels"
        yield title, ("linear_cross_entropy", V), "chunked", inputs, ways, 6 * kept * N * V * D, "TFLOP/s"

def diffusion_cases(like, cut):
    for name, N, C in (("diffusion_loss_rows", 4 * 8 * 888, 16), ("flow_loss_rows", 8 * 4098, 64)):  # 8 pictures
        N //= cut
        x0, noise, near = torch.randn(3, N, C, device=like.device)
        rows, rest = like.new_empty(N, C).normal_(), (x0, noise)
        if name == "diffusion_loss_rows":
            t = torch.randint(-200, 1000, (N,), device=like.device).clamp(min=0)
            rest += t, diffusion_tables(torch.linspace(1e-4, 0.02, 1000)).to(like.device)
            near *= torch.where(t == 0, 0.02, 1.0)[:, None]
            rows = torch.cat([(noise + near).to(like.dtype), rows], 1)
        kernel, reference = (getattr(diffusion_loss, name + end) for end in ("_triton", "_reference"))
        ways = dict(ours=lambda rows: kernel(rows, *rest), reference=lambda rows: reference(rows, *rest))
        work = 3 * rows.nbytes + 4 * x0.nbytes
        yield f"{name}: {N} of {C}", (name, None), "reference", (rows.requires_grad_(),), ways, work, "TB/s"

CASES = dict(attention=attention_cases, linear_cross_entropy=linear_cross_entropy_cases, diffusion=diffusion_cases)

# ---------------------------------------------------------------------------------------------------------------------
# times, and correctness in bfloat16

@functools.cache
def weights(shape, dtype, device):
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)

def results(f, inputs):
    """-> the outputs of f, and the gradients of one weighting of them in the inputs that want one."""
    outs = f(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    upstream = [weights(o.shape, o.dtype, o.device) for o in outs]
    return *outs, *(torch.autograd.grad(outs, wanted, upstream) if wanted else ())

def measure(f, inputs, cuda):
    """-> dict(forward, both: ms, memory: GB beyond the inputs) or dict(error)."""
    def median_ms(f):
        if not cuda:
            return timeit.timeit(f, number=1) * 1e3
        return pick.triton.testing.do_bench(f, rep=500, return_mode="median")  # empties the L2 cache before each call

    try:
        results(f, inputs)  # compiles
        memory = 0.0
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results(f, inputs)
            memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        both = median_ms(lambda: results(f, inputs))
        with torch.no_grad():
            return dict(forward=median_ms(lambda: f(*inputs)), both=both, memory=memory)
    except Exception as e:  # one way that cannot do a shape, or runs out of memory, must not end the table
        return dict(error=f"{type(e).__name__}: {str(e).strip()[:80]!r}")

def table(case, cuda, where):
    """Measure all ways of a case and print them with the line for pick.py -> what bench.json keeps."""
    title, key, fallback, inputs, ways, work, unit = case
    print(f"\n{title}\n  {'':20} {'forward':>10} {'fwd + bwd':>10} {unit:>9} {'memory':>9} {'x ours':>7}")
    if cuda:
        ways["reference, compiled"] = torch.compile(ways["reference"])
    rows = {name: measure(f, inputs, cuda) for name, f in ways.items()}
    ours = rows["ours"].get("both", float("inf"))
    for name, r in rows.items():
        line = r.get("error") or (f"{r['forward']:8.3f}ms {r['both']:8.3f}ms {work / r['both'] / 1e9:9.2f} "
                                  f"{r['memory']:7.2f}GB {r['both'] / ours:7.2f}")
        print(f"  {name:20} {line}", flush=True)
    best = min([(r["both"], name) for name, r in rows.items() if "both" in r and name != "ours"] or [(ours, "none")])
    choice = "triton" if ours < best[0] else fallback
    measured = f"{where}, {title.split(':')[0]}: {ours:.3f} ms against {best[0]:.3f} ms ({best[1]})"
    print(f"  pick.py: {key}: ({choice!r}, {measured!r})")
    return dict(shape=title, key=key, work=work, unit=unit, pick=choice, rows=rows)

def check(device="cuda", dtype=torch.bfloat16, cut=4):
    """Every kernel: its error against the reference in float32 on the same (rounded) inputs must be at most twice the
    error that the reference makes in `dtype`, plus a hair, and two runs must agree bit by bit. -> [(line, ok)]"""
    torch.manual_seed(0)
    like, lines = torch.empty(0, device=device, dtype=dtype), []
    for title, key, _, inputs, ways, *_ in (case for cases in CASES.values() for case in cases(like, cut)):
        precise = [None if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
        exact, usual = (results(ways["reference"], x) for x in (precise, inputs))
        for way in sorted(ways.keys() & {"ours", "chunks", "FlexAttention"}):
            name = f"{title.split(':')[0]} {key[1] or ''} {way}"
            try:
                mine, again = (results(ways[way], inputs) for _ in range(2))
            except Exception as e:
                lines.append((f"{name}: NOT OK, {type(e).__name__}: {str(e).strip()[-120:]!r}", False))
                continue
            for i, (a, b, c, want) in enumerate(zip(mine, again, usual, exact, strict=True)):
                error, usually, most = (t.float().abs().max().item() for t in (a - want, c - want, want))
                allowed = 2 * usually + 1e-3 * most + 1e-6
                ok = bool(a.isfinite().all()) and error <= allowed and (way != "ours" or torch.equal(a, b))
                lines.append((f"{name} {i}: {'OK' if ok else 'NOT OK'}, error {error:.2e}, allowed {allowed:.2e}", ok))
    print("\n".join(line for line, _ in lines))
    return lines

# ---------------------------------------------------------------------------------------------------------------------
# complete RecA steps at published sizes, with weights at random

STEPS = (  # and how many pictures, each to be reconstructed
    ("mar", "harmon-0.5b", 16), ("mar", "harmon-1.5b", 8), ("ar", "show-o-clip-512", 4), ("janus", "janus-pro-1b", 8),
    ("diffusion", "bagel-7b-mot", 1), ("openuni", "openuni-b-512", 16))

def a_run(arch, config, device):
    """What `train.train_step` and `train.Run.wrapped` ask of a run, of one process, with a model of random weights."""
    import checkpoint
    import data
    import train
    args, _ = train.parse_args(["--arch", arch, "--config", config, "--device", device, "--mix", "recon=1"])
    file, dtype = checkpoint.model_file(arch), torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = file.Model(file.CONFIGS[config], checkpoint.load_tokenizer("tiny"))
    train.place(model, args, dtype, sharded=False)
    named = model.trainable_parameters("reca")
    run = SimpleNamespace(args=args, model=model, named=named, device=torch.device(device), dtype=dtype, world=1,
                          rank=0, sharded=False, ema=None, weights={"recon": 1.0}, stream=None,
                          optimizers=train.make_optimizers(args, model, named))
    run.skipped, run.streak, run.last_skip = torch.zeros(3, dtype=torch.int64, device=device).unbind()
    run.batches = SimpleNamespace(to_device=functools.partial(data.Batches.to_device, run))
    return run

def one_step(run, batch):
    import train
    train.train_step(run, 1, [batch])
    if run.device.type == "cuda":
        torch.cuda.synchronize()

def measure_step(arch, config, n, device, turns=10):
    """-> {way: dict(ms, images_per_s, mfu, gb) or dict(error)}: our step on n pictures, and the same in the released
    order of work: pictures encoded in every step, all blocks computed twice, dense masks, nothing compiled."""
    import train
    found, cuda = {}, device == "cuda"
    for way, recompute, forced in (("ours", "none", pick.FORCED), ("released order", "blocks", "reference")):
        try:
            run = a_run(arch, config, device)
            run.args.recompute, run.args.compile = recompute, "on" if cuda and way == "ours" else "off"
            batch = {"recon": train.rehearsal_batch(run.model, "recon", n, 30)}
            if way == "ours":
                batch = run.batches.to_device(batch, {})  # with encodings in place of pixels, from the cache
            with mock.patch.object(pick, "FORCED", forced):
                run.forward = train.Run.wrapped(run)
                times = [timeit.timeit(functools.partial(one_step, run, batch), number=1) for _ in range(turns + 2)]
            seconds, gb = statistics.median(times[2:]), torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
            mfu = train.count_flops(train.rehearsal(run.args)[0], batch) / seconds / pick.peak_flops(run.device)
            found[way] = dict(ms=seconds * 1e3, images_per_s=n / seconds, mfu=mfu, gb=gb)
        except Exception as e:  # such as too little memory: the others are measured all the same
            found[way] = dict(error=f"{type(e).__name__}: {str(e).strip()[:80]!r}")
        run = batch = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        print(f"{arch} {config}, {n} pictures, {way:15}", found[way], flush=True)
    return found

def measure_drawing(arch, config, n, device):
    """-> {way: median seconds} of n guided pictures: with the CUDA graph of a sampler, and without."""
    model, found = a_run(arch, config, device).model.eval(), {}

    def draw():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            model.generate(["a red star"] * n, generator=[torch.Generator() for _ in range(n)]).cpu()
    for way, choice in (("CUDA graph", "graph"), ("no graph", "reference")):
        with mock.patch.dict(pick.PICK, {("denoise", None): (choice, "measured here")}):
            found[way] = statistics.median(timeit.repeat(draw, number=1, repeat=4)[1:])
        print(f"{arch} {config}, {n} pictures drawn, {way}: {found[way]:.2f} s", flush=True)
    return found

# ---------------------------------------------------------------------------------------------------------------------
# on a CPU: the tiny models' work in turns with that of another commit, each in a process of its own, on one thread

BEFORE = "59b0348"  # the last commit before speed was looked at
CPU_JOBS = [f"{what} {arch}" for what in ("step", "scores") for arch in ("mar", "ar", "diffusion")]
CPU_JOBS += ["encode", "decode"]  # of KL-16, a picture of 512 pixels
TURNS = {"step": 21, "scores": 3, "encode": 5, "decode": 5}

def worker():
    """Stands in a checkout, whatever its commit: reads names of jobs, one a line, and answers with milliseconds of this
    process's own time, which others on the machine hardly change. Its source is sent there, so it imports all it needs.
    """
    import functools
    import os
    import sys
    import time
    answers, sys.stdout = sys.stdout, sys.stderr
    import torch

    import checkpoint
    import evaluate
    import image_tokenizer
    import train
    try:  # a run of train.py does this by itself
        from custom_kernels.products import use_products
        use_products()
    except ImportError:
        pass

    @functools.cache
    def prepared(what, arch):
        """-> a function of the number of the turn."""
        if what == "step":
            out = os.path.join(sys.argv[1], arch)
            small = ("--pool", "400", "--threads", "1")
            args, _ = train.parse_args(["--arch", arch, "--out", out, *small])
            run = train.Run(args, None)
            batches = [[run.batches.batch(step)] for step in range(8)]
            return lambda turn: train.train_step(run, turn, batches[turn % 8])
        if what == "scores":
            model = checkpoint.load_model(arch, checkpoint.default_weights(arch, "base")).eval()
            counts = dict(n=150, questions=200, reconstructions=64, editing=arch == "diffusion")
            return lambda turn: evaluate.score_all(model, **counts)
        vae = image_tokenizer.Autoencoder(image_tokenizer.TOKENIZERS["kl16"]).eval()
        x = torch.rand(1, 3, 512, 512) * 2 - 1 if what == "encode" else torch.randn(1, 16, 32, 32)
        return lambda turn: getattr(vae, what)(x)

    torch.set_num_threads(1)
    for turn, job in enumerate(sys.stdin):
        work = prepared(*(job.split() + [""])[:2])
        with torch.set_grad_enabled(job.startswith("step")):
            start = time.process_time()
            work(turn)
        print((time.process_time() - start) * 1e3, file=answers, flush=True)

def compare_commits(before, turns):
    """-> {job: {"before", "now": median ms, "spread": the least and the most, "ratio"}}."""
    source = inspect.getsource(worker) + "worker()"
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", before], capture_output=True)
        if archive.returncode:
            sys.exit(f"--before {before}: {archive.stderr.decode().strip()}: give a commit that is in this clone")
        os.makedirs(old := os.path.join(folder, "before"))
        subprocess.run(["tar", "-x", "-C", old], input=archive.stdout, check=True)
        workers = {}
        for name, where in (("before", old), ("now", os.getcwd())):
            command = [sys.executable, "-c", source, os.path.join(folder, name + "-runs")]
            with open(os.path.join(folder, name + ".log"), "w") as log:
                workers[name] = subprocess.Popen(command, cwd=where, text=True, stdin=subprocess.PIPE,
                                                 stdout=subprocess.PIPE, stderr=log)
        found = {}
        for job in CPU_JOBS:
            took = {name: [] for name in workers}
            for turn in range(turns or 1 + TURNS[job.split()[0]]):
                for name, process in workers.items():
                    print(job, file=process.stdin, flush=True)
                    took[name].append(float(process.stdout.readline()))
            found[job] = {name: statistics.median(ms[1:]) for name, ms in took.items()}  # the first turn warms up
            found[job]["spread"] = {name: [min(ms[1:]), max(ms[1:])] for name, ms in took.items()}
            found[job]["ratio"] = found[job]["before"] / found[job]["now"]
            print("{:18} {before:9.1f} ms before {now:9.1f} ms now, {ratio:.2f} x".format(job, **found[job]),
                  flush=True)
        for process in workers.values():
            process.stdin.close()
            process.wait()
    return found

def processor():
    if not os.path.exists("/proc/cpuinfo"):
        return platform.processor()
    with open("/proc/cpuinfo") as f:
        return re.search(r"model name\s*:\s*(.+)|$", f.read())[1] or platform.machine()

def write(report, results, path):
    with open(path, "w") as f:
        json.dump(dict(report, results=results), f, indent=1)
    print(f"\nwritten to {path}")

def main():
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__.split(",")[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--check", action="store_true", help="bfloat16 correctness instead of times")
    parser.add_argument("--steps", action="store_true", help="complete RecA steps; with --dry of tiny models, on a CPU")
    parser.add_argument("--cpu", action="store_true", help="tiny models in turns with those of --before, on one thread")
    parser.add_argument("--before", default=BEFORE, metavar="COMMIT", help=f"of --cpu (default {BEFORE})")
    parser.add_argument("--turns", type=int, help="of --cpu; the first one warms up")
    parser.add_argument("--out", default="bench.json", help="where the numbers go")
    parser.add_argument("--dry", action="store_true", help="tiny sizes in Triton's interpreter, to try it out")
    args = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    on_cpu = args.dry or args.cpu
    name = processor() if on_cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    report = dict(device=name, torch=torch.__version__, commit=commit)
    if args.cpu:
        return write(dict(report, before=args.before), compare_commits(args.before, args.turns), args.out)
    if args.steps and (args.dry or torch.cuda.is_available()):
        steps, device = STEPS, "cpu" if args.dry else "cuda"
        if args.dry:
            steps = [(arch, "tiny", 2) for arch, *_ in STEPS]
        measured = [(*step, measure_step(*step, device)) for step in steps]
        measured += [("draw", *size, measure_drawing(*size, device)) for arch, config, _ in steps if arch == "mar"
                     for size in ((arch, config, 1), (arch, config, 16))]
        return write(report, measured, args.out)
    if pick.triton is None or not (pick.INTERPRETING if args.dry else torch.cuda.is_available()):
        print("custom_kernels.bench needs a CUDA GPU and triton (see --help): nothing was measured", file=sys.stderr)
        sys.exit(2)
    device, dtype, cut = ("cpu", torch.float32, 64) if args.dry else ("cuda", torch.bfloat16, 4 if args.check else 1)
    if args.check:
        failed = sum(not ok for _, ok in check(device, dtype, cut))
        sys.exit(f"{failed} not OK" if failed else 0)
    print(report)
    torch.manual_seed(0)
    like = torch.empty(0, device=device, dtype=dtype)
    write(report, [table(case, like.is_cuda, report["device"]) for name, cases in CASES.items()
                   if args.only in (None, name) for case in cases(like, cut)], args.out)

if __name__ == "__main__":
    main()
