"""Measure the kernels against everything PyTorch offers for the same work, at the shapes that RecA trains:

    python -m custom_kernels.bench                     # all tables; writes bench.json
    python -m custom_kernels.bench --only attention    # or linear_cross_entropy, diffusion
    python -m custom_kernels.bench --check             # bfloat16 correctness on this GPU, no timing; exit code 1 if something is wrong

Each line: median milliseconds forward, and forward + backward; TFLOP/s or TB/s of the latter; peak memory beyond the inputs; and how many
times as long as ours it takes (above 1: ours is faster). Under each shape stands the line that pick.py's table should hold after this
measurement. Without a CUDA GPU it says so in one line and exits with code 2. `--dry` runs tiny shapes on the CPU in Triton's interpreter:
it tries out this script, and its times mean nothing (NANORECA_KERNELS=triton TRITON_INTERPRET=1 python -m custom_kernels.bench --dry)."""
import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from . import pick
from .attention import (attention_bounds, attention_decode_triton, attention_flex, attention_plan, attention_reference, attention_triton,
                        flex_block_mask)
from .diffusion_loss import (diffusion_loss_rows_reference, diffusion_loss_rows_triton, diffusion_tables, flow_loss_rows_reference,
                             flow_loss_rows_triton, gated_add_reference, gated_add_triton, norm_modulate_reference, norm_modulate_triton)
from .linear_cross_entropy import linear_cross_entropy_fused, linear_cross_entropy_reference

SECONDS = 0.5  # of measuring per number


# ----------------------------------------------------------------------------------------------------------------------------------------
# measuring

def median_ms(f, device):
    """Median time of f(); on a GPU by events, with the L2 cache overwritten before every call, as the rest of a model would."""
    f(), f()
    if device.type == "cpu":
        start = time.perf_counter()
        f()
        return (time.perf_counter() - start) * 1e3
    flush = torch.empty(256 * 2 ** 20, dtype=torch.int8, device=device)
    times, begin = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begin < SECONDS and len(times) < 200):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure(f, inputs, device):
    """-> dict(forward, both: ms, memory: GB beyond the inputs) or dict(error). f(*inputs) gives tensors; gradients go to inputs that want
    one."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]

    def forward():
        with torch.no_grad():
            return f(*inputs)

    def both():
        outs = f(*inputs)
        outs = [o for o in (outs if isinstance(outs, tuple) else (outs,)) if o.requires_grad]
        return torch.autograd.grad(outs, wanted, [torch.ones_like(o) for o in outs])

    try:
        both()
        memory = 0.0
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            both()
            torch.cuda.synchronize()
            memory = (torch.cuda.max_memory_allocated() - before) / 1e9
        return dict(forward=median_ms(forward, device), both=median_ms(both, device), memory=memory)
    except torch.OutOfMemoryError:
        return dict(error="out of memory")
    except Exception as e:  # one competitor that cannot do a shape must not end the table
        return dict(error=f"{type(e).__name__}: {str(e).strip().splitlines()[0][:80] if str(e).strip() else ''}")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def table(title, key, contestants, inputs, device, work, unit, results, fallback):
    """Measure all contestants {name: function} on a shape and print them. `ours` is the kernel; work = operations or bytes of forward +
    backward."""
    print(f"\n{title}\n  {'':28} {'forward':>10} {'fwd + bwd':>10} {unit:>9} {'memory':>9} {'x ours':>7}")
    rows = {name: measure(f, inputs, device) for name, f in contestants.items()}
    ours = rows["ours"].get("both")
    for name, r in rows.items():
        if "error" in r:
            print(f"  {name:28} {r['error']}")
            continue
        r["rate"] = work / r["both"] / 1e9
        ratio = f"{r['both'] / ours:7.2f}" if ours else "      -"
        print(f"  {name:28} {r['forward']:8.3f}ms {r['both']:8.3f}ms {r['rate']:9.2f} {r['memory']:7.2f}GB {ratio}", flush=True)
    others = [(r["both"], n) for n, r in rows.items() if n != "ours" and "both" in r and "pads seen" not in n]
    verdict = "triton" if ours and (not others or ours <= min(others)[0]) else fallback
    why = "ours failed" if not ours else f"{ours:.3f} ms" + "".join(f" against {ms:.3f} ms ({n})" for ms, n in sorted(others)[:1])
    measured = f"{device_name(device)}, {title.split(':')[0]}: {why}"
    print(f"  pick.py: {key}: ({verdict!r}, {measured!r})")
    results.append(dict(shape=title, key=list(key), work=work, unit=unit, pick=verdict, rows=rows))


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


# ----------------------------------------------------------------------------------------------------------------------------------------
# shapes: (name, B, T, Hq, Hkv, D, lo, hi); the second set is for --dry

def causal(B, T, pads):
    """Left-padded rows: row b begins with pads * b / B tokens that nobody sees."""
    i, first = torch.arange(T)[None], (torch.arange(B) * pads // max(1, B))[:, None]
    return torch.where(i < first, 0, first).expand(B, T), torch.where(i < first, 0, i + 1)


def full(B, T):
    return torch.zeros(1, T, dtype=torch.long), torch.full((1, T), T)


def showo(B, features, text, image):
    """Show-o's RecA rows as they lie in memory: features | pads and text | image; features see themselves, text is causal, the image sees
    all."""
    T = features + text + image
    i, pads = torch.arange(T)[None], features + (torch.arange(B) * text // (2 * B))[:, None]
    hi = torch.where(i < features, features, torch.where(i < features + text, i + 1, T)).expand(B, T)
    return torch.zeros(B, T, dtype=torch.long), torch.where((i >= features) & (i < pads), 0, hi)


def bagel(samples, vit, text, latents):
    """Packed RecA samples: ViT block | prompt | noisy block; the blocks see themselves and what is before them in their sample."""
    n = vit + text + latents
    i = torch.arange(n)
    hi = torch.where(i < vit, vit, torch.where(i < vit + text, i + 1, n))
    start = torch.arange(samples)[:, None] * n
    return start.expand(samples, n).reshape(1, -1), (start + hi).reshape(1, -1)


def attention_shapes(dry):
    if dry:
        return [("dry causal", 2, 40, 2, 1, 16, *causal(2, 40, 6)), ("dry packed", 1, 60, 2, 1, 24, *bagel(2, 8, 4, 18))]
    return [("Harmon-1.5B LLM", 8, 1320, 12, 2, 128, *causal(8, 1320, 40)),
            ("MAR-H, clean image", 8, 1088, 16, 16, 80, *full(8, 1088)),
            ("MAR-H, masked image", 32, 200, 16, 16, 80, *full(32, 200)),
            ("Show-o 512 RecA", 4, 1730, 32, 32, 64, *showo(4, 576, 128, 1026)),
            ("BAGEL RecA, packed", 1, 34960, 28, 4, 128, *bagel(8, 258, 14, 4098))]


def bench_attention(device, dtype, dry, results):
    for name, B, T, Hq, Hkv, D, lo, hi in attention_shapes(dry):
        g = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(B, T, H, D, generator=g, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
                   for H in (Hq, Hkv, Hkv))
        plan = attention_plan(lo.to(device), hi.to(device), T)
        plan.kind = "mask"
        attention_bounds(plan)
        pairs = (hi - lo).clamp(min=0).sum().item() * (B // len(lo))
        gqa = Hq != Hkv
        contestants = dict(ours=lambda q, k, v: attention_triton(q, k, v, plan))
        if not dry:
            flex_block_mask(plan)
            contestants["FlexAttention, compiled"] = lambda q, k, v: attention_flex(q, k, v, plan)
        contestants["SDPA, dense mask"] = lambda q, k, v: attention_reference(q, k, v, plan)
        if bool((hi - lo == T).all()):
            contestants["SDPA, full"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        elif bool((hi <= torch.arange(T) + 1).all()):  # not the same work where rows are padded, but near it
            causal_sdpa = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
            contestants["SDPA, causal (pads seen)"] = causal_sdpa
        title = f"attention, {name}: B {B} T {T} heads {Hq}/{Hkv} of {D}, {pairs / B / T / T:.0%} of the pairs seen"
        work = 14 * D * Hq * pairs  # 2 products forward, 5 backward, 2 operations each
        table(title, ("attention", D), contestants, (q, k, v), device, work, "TFLOP/s", results, "flex")
    for name, B, Tk, Hq, Hkv, D in [("dry", 1, 70, 2, 1, 16)] if dry else [
            ("Harmon-1.5B", 1, 1200, 12, 2, 128), ("BAGEL", 1, 5000, 28, 4, 128), ("Show-o", 1, 1200, 32, 32, 64)]:
        q, k, v = (torch.randn(B, H, T, D, device=device, dtype=dtype) for H, T in ((Hq, 1), (Hkv, Tk), (Hkv, Tk)))
        plan = attention_plan(torch.zeros(1, 1, device=device).int(), torch.full((1, 1), Tk, device=device), Tk)
        plan.kind = "mask"
        print(f"\ndecoding, {name}: B {B} keys {Tk} heads {Hq}/{Hkv} of {D}, forward only")
        with torch.no_grad():
            rows = {n: median_ms(f, device) for n, f in {
                "ours": lambda: attention_decode_triton(q, k, v, plan), "SDPA, dense mask": lambda: attention_reference(q, k, v, plan),
                "SDPA, no mask": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=Hq != Hkv)}.items()}
        for n, ms in rows.items():
            print(f"  {n:28} {ms:8.4f}ms {2 * k.nbytes / ms / 1e9:9.3f} TB/s {ms / rows['ours']:7.2f}")
        results.append(dict(shape=name, key=["attention_decode", None], rows=rows))


def bench_linear_cross_entropy(device, dtype, dry, results):
    shapes = [("dry", 40, 70, 16, True, 0.5)] if dry else [
        ("Harmon-1.5B, every label", 10560, 151936, 1536, False, 1.0), ("Harmon-1.5B, 1 label in 10", 10560, 151936, 1536, False, 0.1),
        ("Show-o, every label", 6920, 58498, 2048, True, 1.0), ("Show-o, half the labels", 6920, 58498, 2048, True, 0.5)]
    for name, N, V, D, bias, kept in shapes:
        g = torch.Generator(device).manual_seed(0)
        new = lambda *shape: (torch.randn(shape, generator=g, device=device) * D ** -0.5).to(dtype).requires_grad_()
        h, w, b = new(N, D), new(V, D), new(V) if bias else None
        labels = torch.randint(0, V, (N,), generator=g, device=device)
        labels = labels.masked_fill(torch.rand(N, generator=g, device=device) >= kept, -100)
        fused = lambda kernels: lambda h, w, b: linear_cross_entropy_fused(h, w, labels, b, kernels=kernels)
        plain = lambda h, w, b: F.cross_entropy(F.linear(h, w, b).float(), labels)
        contestants = {"ours": fused(True), "chunks of PyTorch": fused(False), "plain": plain}
        if not dry:
            contestants["plain, compiled"] = torch.compile(plain)
            if hasattr(F, "linear_cross_entropy"):
                from torch.nn import LinearCrossEntropyOptions
                contestants["torch's own, chunked"] = lambda h, w, b: F.linear_cross_entropy(
                    h, w, labels, linear_bias=b, ignore_index=-100, options=LinearCrossEntropyOptions())
        table(f"linear_cross_entropy, {name}: {N} rows x {D}, {V} classes", ("linear_cross_entropy", V), contestants, (h, w, b), device,
              6 * kept * N * V * D, "TFLOP/s", results, "chunked")


def bench_diffusion(device, dtype, dry, results):
    N, W = (6, 24) if dry else (4 * 8 * 888, 1536)  # Harmon: 4 copies of the masked tokens of 8 images
    new = lambda *shape, **kw: torch.randn(shape, device=device, dtype=kw.get("dtype", dtype))
    x, y, a = new(N, W).requires_grad_(), new(N, 3 * W).requires_grad_(), new(N, W).requires_grad_()
    weight, bias = new(W).requires_grad_(), new(W).requires_grad_()

    def block(norm, gate):
        def f(x, y, a, weight, bias):
            shift, scale, g = y.chunk(3, 1)
            return gate(x, g, norm(x, shift, scale, weight, bias) * a)
        return f

    compiled = (lambda f: f) if dry else torch.compile
    size = x.element_size() * N * W
    table(f"norm, modulate and gated residual: {N} rows of {W}", ("norm_modulate", None), {
        "ours": block(norm_modulate_triton, gated_add_triton), "eager": block(norm_modulate_reference, gated_add_reference),
        "compiled": compiled(block(norm_modulate_reference, gated_add_reference))}, (x, y, a, weight, bias), device, 24 * size, "TB/s",
        results, "reference")  # about: 5 reads 1 write, product 2 + 1, backward twice as much
    tables = diffusion_tables(torch.linspace(1e-4, 0.02, 1000)).to(device)
    N, C = (20, 8) if dry else (4 * 8 * 888, 16)
    out, x0, noise = new(N, 2 * C).requires_grad_(), new(N, C, dtype=torch.float32), new(N, C, dtype=torch.float32)
    t = torch.randint(0, 1000, (N,), device=device)
    rows = lambda f: lambda out: f(out, x0, noise, t, tables)
    table(f"diffusion loss rows: {N} of {C}", ("diffusion_loss_rows", None), {
        "ours": rows(diffusion_loss_rows_triton), "eager": rows(diffusion_loss_rows_reference),
        "compiled": compiled(rows(diffusion_loss_rows_reference))}, (out,), device, 3 * out.nbytes + 4 * x0.nbytes, "TB/s", results,
        "reference")
    N, C = (20, 8) if dry else (8 * 4096, 64)
    v, x0, noise = new(N, C).requires_grad_(), new(N, C, dtype=torch.float32), new(N, C, dtype=torch.float32)
    rows = lambda f: lambda v: f(v, x0, noise)
    table(f"flow loss rows: {N} of {C}", ("flow_loss_rows", None), {
        "ours": rows(flow_loss_rows_triton), "eager": rows(flow_loss_rows_reference), "compiled": compiled(rows(flow_loss_rows_reference))},
        (v,), device, 3 * v.nbytes + 4 * x0.nbytes, "TB/s", results, "reference")


# ----------------------------------------------------------------------------------------------------------------------------------------
# correctness in bfloat16

def check(device=None, dtype=torch.bfloat16, dry=False):
    """Every kernel on `device`: its error against the reference in float32 on the same (rounded) inputs must be at most twice the error
    that the reference itself makes in `dtype`, plus a hair. -> [(line, ok)]."""
    device, lines, g = device or torch.device("cuda"), [], torch.Generator().manual_seed(0)

    def compare(name, f, reference, inputs, against=None):
        weights = []

        def run(f, inputs):
            inputs = [t if t is None or not t.is_floating_point() else t.detach().clone().requires_grad_() for t in inputs]
            outs = f(*inputs)
            outs = outs if isinstance(outs, tuple) else (outs,)
            if not weights:
                weights.extend(torch.randn(o.shape, generator=g).to(device) for o in outs)
            wanted = [t for t in inputs if t is not None and t.requires_grad]
            return [*outs, *torch.autograd.grad(outs, wanted, [w.to(o.dtype) for w, o in zip(weights, outs)])]

        exact = run(reference, [None if t is None else t.float() for t in inputs])
        try:
            mine, usual = run(f, inputs), run(against or reference, inputs)
        except Exception as e:
            lines.append((f"{name:40} NOT OK  {type(e).__name__}: {str(e).strip().splitlines()[-1][:120]}", False))
            return print(lines[-1][0], flush=True)
        for i, (a, b, want) in enumerate(zip(mine, usual, exact)):
            error, usually, most = (t.abs().max().item() for t in (a.float() - want, b.float() - want, want))
            allowed = 2 * usually + 1e-3 * most + 1e-6
            ok = a.isfinite().all().item() and error <= allowed
            lines.append((f"{name + f' [{i}]':40} {'OK' if ok else 'NOT OK':6} error {error:.2e}, allowed {allowed:.2e}", ok))
            print(lines[-1][0], flush=True)

    new = lambda *shape: torch.randn(shape, generator=g).to(device, dtype)
    shapes = [("random", 1, 2, 1, 40, 50, 24)] if dry else [
        ("random", 2, 4, 2, 300, 515, 64), ("random", 2, 4, 1, 515, 300, 80), ("random", 1, 2, 2, 200, 200, 72),
        ("random", 2, 6, 2, 700, 700, 128), ("causal", 2, 4, 2, 1000, 1000, 128), ("full", 2, 4, 4, 777, 777, 80)]
    for kind, B, Hq, Hkv, Tq, Tk, D in shapes:
        a, b = torch.randint(0, Tk + 1, (2, B, Tq), generator=g)  # some empty, some of one key
        lo, hi = {"random": (torch.minimum(a, b), torch.maximum(a, b)), "causal": causal(B, Tq, 30), "full": full(B, Tq)}[kind]
        plan = attention_plan(lo.to(device), hi.to(device), Tk)
        plan.kind = "mask"
        q, k, v = new(B, Tq, Hq, D).transpose(1, 2), new(B, Tk, Hkv, D).transpose(1, 2), new(B, Tk, Hkv, D).transpose(1, 2)
        reference = lambda q, k, v: attention_reference(q, k, v, plan)
        compare(f"attention {kind} {D}", lambda q, k, v: attention_triton(q, k, v, plan), reference, (q, k, v))
        if device.type == "cuda":
            compare(f"flex {kind} {D}", lambda q, k, v: attention_flex(q, k, v, plan), reference, (q, k, v))
        few = attention_plan(lo[:, :3].to(device), hi[:, :3].to(device), Tk)
        with torch.no_grad():
            got, want = attention_decode_triton(q[:, :, :3], k, v, few), attention_reference(q[:, :, :3].float(), k.float(), v.float(), few)
        error = (got.float() - want).abs().max().item()
        ok = error < 2e-2
        lines.append((f"{f'decode {kind} {D}':40} {'OK' if ok else 'NOT OK':6} error {error:.2e}, allowed 2.00e-02", ok))
        print(lines[-1][0])
        if torch.equal(attention_triton(q, k, v, plan), attention_triton(q, k, v, plan)) is False:
            lines.append((f"attention {kind} {D}: two runs differ: NOT OK", False))
    for N, V, D, bias, kept in [(40, 70, 16, True, 0.5)] if dry else [
            (3000, 5003, 512, True, 0.3), (700, 151936, 256, False, 1.0), (64, 1000, 72, True, 0.0)]:
        labels = torch.randint(0, V, (N,), generator=g).masked_fill(torch.rand(N, generator=g) >= kept, -100).to(device)
        inputs = new(N, D), new(V, D) * D ** -0.5, new(V) if bias else None
        reference = lambda h, w, b: linear_cross_entropy_reference(h, w, labels, b)
        for kernels in (True, False):
            compare(f"linear cross entropy {V} {'kernels' if kernels else 'chunked'}",
                    lambda h, w, b: linear_cross_entropy_fused(h, w, labels, b, kernels=kernels), reference, inputs)
    for N, W in [(6, 24)] if dry else [(1000, 1536), (333, 1000)]:
        shift, gate, scale = (lambda y, i=i: y.chunk(3, 1)[i] for i in range(3))
        compare(f"norm_modulate {W}", lambda x, y, w, b: norm_modulate_triton(x, shift(y), scale(y), w, b),
                lambda x, y, w, b: norm_modulate_reference(x, shift(y), scale(y), w, b), (new(N, W), new(N, 3 * W), new(W), new(W)))
        compare(f"gated_add {W}", lambda x, y, a: gated_add_triton(x, gate(y), a), lambda x, y, a: gated_add_reference(x, gate(y), a),
                (new(N, W), new(N, 3 * W), new(N, W)))
    N, C = (20, 8) if dry else (5000, 16)
    tables, t = diffusion_tables(torch.linspace(1e-4, 0.02, 1000)).to(device), torch.randint(0, 1000, (N,), generator=g).to(device)
    t[:N // 5] = 0
    x0, noise = torch.randn(2, N, C, generator=g).to(device)
    out = torch.cat([noise + 0.02 * torch.randn(N, C, generator=g).to(device), torch.randn(N, C, generator=g).to(device)], 1).to(dtype)
    compare("diffusion rows", lambda out: diffusion_loss_rows_triton(out, x0, noise, t, tables),
            lambda out: diffusion_loss_rows_reference(out, x0, noise, t, tables), (out,))
    compare("flow rows", lambda v: flow_loss_rows_triton(v, x0, noise), lambda v: flow_loss_rows_reference(v, x0, noise), (new(N, C),))
    return lines


def main():
    parser = argparse.ArgumentParser(prog="python -m custom_kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("attention", "linear_cross_entropy", "diffusion"))
    parser.add_argument("--check", action="store_true", help="bfloat16 correctness instead of times")
    parser.add_argument("--out", default="bench.json", help="where the numbers go")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to try the script out")
    args = parser.parse_args()
    if args.dry and not pick.INTERPRETING:
        sys.exit("custom_kernels.bench --dry runs in Triton's interpreter: set NANORECA_KERNELS=triton TRITON_INTERPRET=1")
    if not args.dry and not torch.cuda.is_available():
        print("custom_kernels.bench needs a CUDA GPU and found none: nothing was measured, pick.py's table stays as it is", file=sys.stderr)
        sys.exit(2)
    if pick.triton is None:
        print("custom_kernels.bench needs triton and cannot import it: pip install triton==3.7.1", file=sys.stderr)
        sys.exit(2)
    device, dtype = (torch.device("cpu"), torch.float32) if args.dry else (torch.device("cuda"), torch.bfloat16)
    if args.check:
        failed = [line for line, ok in check(device, dtype, args.dry) if not ok]
        print(f"{len(failed)} not OK")
        sys.exit(1 if failed else 0)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    report = dict(device=device_name(device), torch=torch.__version__, cuda=torch.version.cuda, triton=pick.triton.__version__,
                  commit=commit, dtype=str(dtype), command=sys.argv, results=[])
    print(", ".join(f"{k} {report[k]}" for k in ("device", "torch", "cuda", "triton", "commit", "dtype")))
    for name, bench in dict(attention=bench_attention, linear_cross_entropy=bench_linear_cross_entropy, diffusion=bench_diffusion).items():
        if args.only in (None, name):
            bench(device, dtype, args.dry, report["results"])
    with open(args.out, "w") as f:
        json.dump(report, f, indent=1)
    print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
