"""Measure the kernels against everything PyTorch offers for the same work, at the shapes that RecA trains:

    python -m custom_kernels.bench                     # all tables; writes bench.json
    python -m custom_kernels.bench --only attention    # or linear_cross_entropy, diffusion
    python -m custom_kernels.bench --check             # bfloat16 correctness on this GPU; exit code 1 if one is wrong

Each line: median milliseconds forward, and forward + backward; TFLOP/s or TB/s of the latter; peak memory beyond the
inputs; how many times as long as ours it takes. Under each shape stands the line that pick.py's table should hold then.
--dry tries the script out on a CPU at tiny shapes (NANORECA_KERNELS=triton TRITON_INTERPRET=1); its times mean nothing.
"""
import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from . import diffusion_loss, pick
from .attention import attention_decode_triton, attention_flex, attention_plan, attention_reference, attention_triton
from .linear_cross_entropy import linear_cross_entropy_fused, linear_cross_entropy_reference


# ---------------------------------------------------------------------------------------------------------------------
# cases, as RecA trains (full) or for --check, small if cut > 1. A case is (title, key of pick.py's table, what the table
# should say where ours is not the fastest, inputs, {way: function of the inputs}, operations or bytes of forward and
# backward, unit), to be used before the next one is made. `like` has the device and type to work in.

def layout(samples, *blocks):
    """Intervals of one row of `samples`, each made of blocks (length, bidirectional or causal)."""
    hi = []
    for length, bidirectional in blocks:
        first = len(hi)
        hi += [first + length] * length if bidirectional else range(first + 1, first + length + 1)
    start = torch.arange(samples)[:, None] * len(hi)
    return start.expand(samples, len(hi)).reshape(1, -1), (start + torch.tensor(hi)).reshape(1, -1)


def anywhere(B, T, keys):
    """Random intervals, some of them empty."""
    return torch.randint(0, keys + 1, (2, B, T)).sort(0).values


def attention_cases(like, full, cut):
    checked = [  # name, batch, keys, query heads, key heads, head dimension, (lo, hi)
        ("random", 2, 515, 4, 2, 64, anywhere(2, 300 // cut, 515 // cut)),
        ("random", 2, 300, 4, 1, 80, anywhere(2, 515 // cut, 300 // cut)),
        ("random", 2, 700, 6, 2, 128, anywhere(2, 700 // cut, 700 // cut)),
        ("packed", 1, 2061, 2, 2, 72, layout(3, (333 // cut, True), (21 // cut, False), (333 // cut, True))),
        ("decoding", 2, 300, 4, 1, 80, anywhere(2, 3, 300 // cut))]
    trained = [
        ("Harmon-1.5B LLM", 8, 1320, 12, 2, 128, layout(1, (1320, False))),
        ("MAR-H, clean image", 8, 1088, 16, 16, 80, layout(1, (1088, True))),
        ("MAR-H, masked image", 32, 200, 16, 16, 80, layout(1, (200, True))),
        ("Show-o 512 RecA", 4, 1730, 32, 32, 64, layout(1, (576, True), (128, False), (1026, True))),
        ("BAGEL RecA, packed", 1, 34960, 28, 4, 128, layout(8, (258, True), (14, False), (4098, True))),
        ("decoding Harmon-1.5B", 1, 1200, 12, 2, 128, torch.tensor([[[0]], [[1200]]])),
        ("decoding BAGEL", 1, 5000, 28, 4, 128, torch.tensor([[[0]], [[5000]]])),
        ("decoding Show-o", 1, 1200, 32, 32, 64, torch.tensor([[[0]], [[1200]]]))]
    for name, B, Tk, Hq, Hkv, D, (lo, hi) in trained if full else checked:
        Tq, Tk, decoding = lo.shape[1], Tk // cut, name.startswith("decoding")
        q, k, v = (like.new_empty(B, T, H, D).normal_().transpose(1, 2).requires_grad_(not decoding)
                   for T, H in ((Tq, Hq), (Tk, Hkv), (Tk, Hkv)))
        plan = attention_plan(lo.to(like.device), hi.to(like.device), Tk)
        plan.kind = "mask"
        kernel = attention_decode_triton if decoding else attention_triton
        ways = dict(ours=lambda *qkv: kernel(*qkv, plan), reference=lambda *qkv: attention_reference(*qkv, plan))
        if like.is_cuda and not decoding:
            ways["FlexAttention"] = lambda *qkv: attention_flex(*qkv, plan)
        causal = Tq == Tk and bool((hi == torch.arange(Tk) + 1).all())
        if causal or bool((hi - lo == Tk).all()):
            ways["SDPA, no mask"] = lambda *qkv: F.scaled_dot_product_attention(
                *qkv, is_causal=causal, enable_gqa=True)
        pairs = (hi - lo).sum().item() * (B // len(lo))
        title = f"attention, {name}: B {B} T {Tq} {Tk} heads {Hq}/{Hkv} of {D}, {pairs / B / Tq / Tk:.0%} of the pairs"
        if decoding:
            yield title, ("attention_decode", None), "reference", (q, k, v), ways, 2 * k.nbytes, "TB/s"
        else:  # 2 products forward, 5 backward, 2 operations each
            yield title, ("attention", D), "flex", (q, k, v), ways, 14 * D * Hq * pairs, "TFLOP/s"


def linear_cross_entropy_cases(like, full, cut):
    checked = [(3000, 5003, 512, True, 0.3), (700, 151936, 256, False, 1.0), (64, 1000, 72, True, 0.0)]
    trained = [(10560, 151936, 1536, False, 1.0), (10560, 151936, 1536, False, 0.1), (6920, 58498, 2048, True, 0.5)]
    for N, V, D, bias, kept in trained if full else checked:  # rows, classes, width, -, share of labels that count
        N, V = N // cut, V // cut ** 2
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


def diffusion_cases(like, full, cut):
    shapes = ((4 * 8 * 888, 16), (8 * 4096, 64)) if full else ((5000 // cut, 16), (5000 // cut, 64))  # of 8 pictures
    for name, (N, C) in zip(("diffusion_loss_rows", "flow_loss_rows"), shapes):
        x0, noise, near = torch.randn(3, N, C, device=like.device)
        rows, rest = like.new_empty(N, C).normal_(), (x0, noise)
        if name == "diffusion_loss_rows":
            t = torch.randint(0, 1000, (N,), device=like.device)
            t[:N // 5] = 0
            rest += t, diffusion_loss.diffusion_tables(torch.linspace(1e-4, 0.02, 1000)).to(like.device)
            rows = torch.cat([(noise + 0.02 * near).to(like.dtype), rows], 1)
        kernel, reference = (getattr(diffusion_loss, name + end) for end in ("_triton", "_reference"))
        ways = dict(ours=lambda rows: kernel(rows, *rest), reference=lambda rows: reference(rows, *rest))
        work = 3 * rows.nbytes + 4 * x0.nbytes
        yield f"{name}: {N} of {C}", (name, None), "reference", (rows.requires_grad_(),), ways, work, "TB/s"


CASES = dict(attention=attention_cases, linear_cross_entropy=linear_cross_entropy_cases, diffusion=diffusion_cases)


# ---------------------------------------------------------------------------------------------------------------------
# times, and correctness in bfloat16

def random_like(t):
    return torch.randn(t.shape, generator=torch.Generator(t.device).manual_seed(1), device=t.device).to(t.dtype)


def results(f, inputs, weigh=torch.ones_like):
    """-> the outputs of f, and the gradients of their weighted sum in the inputs that want one."""
    outs = f(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return *outs, *(torch.autograd.grad(outs, wanted, [weigh(o) for o in outs]) if wanted else ())


def median_ms(f, cuda):
    if cuda:
        return pick.triton.testing.do_bench(f, rep=500, return_mode="median")  # empties the L2 cache before each call
    start = time.perf_counter()
    f()
    return (time.perf_counter() - start) * 1e3


def measure(f, inputs, cuda):
    """-> dict(forward, both: ms, memory: GB beyond the inputs) or dict(error)."""
    try:
        results(f, inputs)  # compiles
        memory = 0.0
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results(f, inputs)
            memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        both = median_ms(lambda: results(f, inputs), cuda)
        with torch.no_grad():
            return dict(forward=median_ms(lambda: f(*inputs), cuda), both=both, memory=memory)
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
    best = min(((r["both"], name) for name, r in rows.items() if "both" in r and name != "ours"), default=(ours, "none"))
    choice = "triton" if ours < best[0] else fallback
    measured = f"{where}, {title.split(':')[0]}: {ours:.3f} ms against {best[0]:.3f} ms ({best[1]})"
    print(f"  pick.py: {key}: ({choice!r}, {measured!r})")
    return dict(shape=title, key=key, work=work, unit=unit, pick=choice, rows=rows)


def check(device="cuda", dtype=torch.bfloat16, cut=1):
    """Every kernel: its error against the reference in float32 on the same (rounded) inputs must be at most twice the
    error that the reference itself makes in `dtype`, plus a hair, and two runs must agree bit by bit. -> [(line, ok)]"""
    torch.manual_seed(0)
    like, lines = torch.empty(0, device=device, dtype=dtype), []
    for title, key, _, inputs, ways, *_ in (case for cases in CASES.values() for case in cases(like, False, cut)):
        precise = [None if t is None else t.detach().float().requires_grad_(t.requires_grad) for t in inputs]
        exact, usual = (results(ways["reference"], x, random_like) for x in (precise, inputs))
        for way in sorted(ways.keys() & {"ours", "chunks", "FlexAttention"}):
            name = f"{title.split(':')[0]} {key[1] or ''} {way}"
            try:
                mine, again = (results(ways[way], inputs, random_like) for _ in range(2))
            except Exception as e:
                lines.append((f"{name:48} NOT OK {type(e).__name__}: {str(e).strip()[-120:]!r}", False))
                continue
            for i, (a, b, c, want) in enumerate(zip(mine, again, usual, exact, strict=True)):
                error, usually, most = (t.float().abs().max().item() for t in (a - want, c - want, want))
                allowed = 2 * usually + 1e-3 * most + 1e-6
                ok = bool(a.isfinite().all()) and error <= allowed and (way != "ours" or torch.equal(a, b))
                word = "OK" if ok else "NOT OK"
                lines.append((f"{name + f' [{i}]':48} {word:6} error {error:.2e}, allowed {allowed:.2e}", ok))
    print("\n".join(line for line, _ in lines))
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__.split(",")[0])
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--check", action="store_true", help="bfloat16 correctness instead of times")
    parser.add_argument("--out", default="bench.json", help="where the numbers go")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to try the script out")
    args = parser.parse_args()
    if args.dry and not pick.INTERPRETING:
        sys.exit("--dry runs in Triton's interpreter: set NANORECA_KERNELS=triton TRITON_INTERPRET=1")
    if pick.triton is None or not (args.dry or torch.cuda.is_available()):
        print("custom_kernels.bench needs a CUDA GPU and triton, and misses one: nothing was measured", file=sys.stderr)
        sys.exit(2)
    device, dtype, cut = ("cpu", torch.float32, 16) if args.dry else ("cuda", torch.bfloat16, 1)
    if args.check:
        failed = sum(not ok for _, ok in check(device, dtype, cut))
        print(f"{failed} not OK")
        sys.exit(failed > 0)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    where = "CPU" if args.dry else torch.cuda.get_device_name()
    report = dict(device=where, torch=torch.__version__, triton=pick.triton.__version__, commit=commit, dtype=str(dtype))
    print(report)
    torch.manual_seed(0)
    like = torch.empty(0, device=device, dtype=dtype)
    report["results"] = [table(case, like.is_cuda, where) for name, cases in CASES.items() if args.only in (None, name)
                         for case in cases(like, not args.dry, cut)]
    with open(args.out, "w") as f:
        json.dump(report, f, indent=1)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
