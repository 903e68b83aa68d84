"""Every Triton kernel, as its Python wrapper would launch it, compiled for an A100 (sm_80) and an H100 or H200 (sm_90)
on a machine without a GPU.

The wrappers run on small CPU tensors with their kernels replaced by something that only notes the launch; from each
launch follows what a GPU would compile (types, constants, which arguments are multiples of 16). It runs in a process of
its own, because Triton must not interpret there. `python tests/test_kernels_compile.py all` compiles more head
dimensions and types, and prints the same table for them."""
import os
import re
import subprocess
import sys
import time

import pytest
from processes import alone

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of shared memory that one block can have
SPILL = 128  # bytes of stack a half-precision kernel may need per thread; more: registers in memory inside the loops

def note_launches():
    """Replace every kernel by a recorder -> the list that the launches go to."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **named: launches.append((self.kernel, args, named))

    for module in ("attention", "linear_cross_entropy", "diffusion_loss"):
        module = sys.modules["custom_kernels." + module]
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name)))
    return launches

def launch_attention(dtype, D):
    import torch

    from custom_kernels import attention_plan
    m = sys.modules["custom_kernels.attention"]  # the package's function of that name hides the module
    q, k = (torch.zeros(1, 256, heads, D, dtype=dtype).transpose(1, 2) for heads in (4, 2))
    plan = attention_plan(torch.zeros(1, 256).int(), torch.arange(1, 257)[None], 256)
    bounds = m.attention_bounds(plan)
    out, lse = m.interval_attention(q, k, k, plan.lo, plan.hi, *bounds)
    m.interval_attention_backward(q, q, k, k, out, lse, plan.lo, plan.hi, *bounds)

def launch_cross_entropy(dtype, gradients):
    import torch

    from custom_kernels.linear_cross_entropy import by_kernels
    hidden, weight, bias = (torch.zeros(shape, dtype=dtype) for shape in ((64, 256), (1000, 256), (1000,)))
    by_kernels(hidden, weight, bias if gradients else None, torch.zeros(64).long(), torch.ones(()), -100, gradients)

def launch_rows(dtype):
    import torch

    from custom_kernels.diffusion_loss import loss_rows
    x0, out, v = torch.zeros(64, 16), torch.zeros(64, 32, dtype=dtype), torch.zeros(64, 16, dtype=dtype)
    loss_rows(out, x0, x0, torch.zeros(64).long(), torch.zeros(1000, 5))
    loss_rows(v, x0, x0, None, None)

def compile_launch(kernel, args, named, arch):
    """-> the compiled kernel that this launch would make Triton compile on that GPU."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
             torch.int64: "*i64"}
    options = {n: named[n] for n in ("num_warps", "num_stages") if n in named}
    values = dict(zip(kernel.arg_names, args)) | named
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif torch.is_tensor(value):
            signature[name], attributes[(i,)] = types[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

def registers_and_stack(compiled):
    """What the assembler says it needed, per thread: registers, bytes of stack."""
    import tempfile

    import triton
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    return [int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", text).groups()]

def main(everything):
    import torch

    import custom_kernels  # noqa: F401
    launches, bad = note_launches(), 0
    print(f"{'kernel':32} {'type':9} {'flags':44} arch  shared  regs stack tensor cores  seconds")
    for dtype in (torch.bfloat16, torch.float32) + ((torch.float16,) if everything else ()):
        half = dtype != torch.float32
        for D in (64, 72, 80, 128) if everything else (80, 128) if half else (64,):
            launch_attention(dtype, D)
        for flag in (True, False):
            if half or flag or everything:
                launch_cross_entropy(dtype, flag)
        launch_rows(dtype)
        for kernel, args, named in launches:
            slow = "attention" in kernel.__name__ and not half  # these take longest: for one GPU only
            for arch in (90, 80) if everything or not slow else (90,):
                start = time.time()
                compiled = compile_launch(kernel, args, named, arch)
                shared, (registers, stack) = compiled.metadata.shared, registers_and_stack(compiled)
                cores = next((c for c in ("wgmma", "mma.sync") if c in compiled.asm["ptx"]), "-")
                flags = ("D", "BM", "BN", "HAS_BIAS", "STORE", "SWEEP")
                flags = " ".join(f"{n}={named[n]}" for n in flags if n in named)
                wrong = [f"{shared} bytes of shared memory, at most {SHARED[arch]}"] if shared > SHARED[arch] else []
                wrong += [f"{stack} bytes of spilled registers, at most {SPILL}"] if half and stack > SPILL else []
                wrong += ["no tensor cores"] if half and "tt.dot" in compiled.asm["ttir"] and cores == "-" else []
                bad += bool(wrong)
                print(f"{kernel.__name__:32} {str(dtype)[6:]:9} {flags:44} {arch:4} {shared // 1024:4} KB "
                      f"{registers:5} {stack:5} {cores:12} {time.time() - start:8.1f}  "
                      f"{'NOT OK: ' + ', '.join(wrong) if wrong else 'OK'}", flush=True)
        launches.clear()
    print(f"{bad} not OK")
    return bad

def test_kernels_compile_for_a100_and_h100():
    pytest.importorskip("triton", reason="triton is not installed (pip install --no-deps triton==3.7.1)")
    done = alone(os.path.abspath(__file__), NANORECA_KERNELS="triton", TRITON_INTERPRET="0", PYTHONPATH=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert done.stdout.count("  OK\n") > 40, done.stdout

if __name__ == "__main__":
    sys.exit(1 if main("all" in sys.argv[1:]) else 0)
