"""Which implementation runs where, and Triton itself, imported only where a kernel could run.

CPU: always the plain PyTorch reference. CUDA: what PICK says. NANORECA_KERNELS=reference|triton forces one everywhere
(triton on a CPU means Triton's interpreter, TRITON_INTERPRET=1: slow, for the tests).

PICK is data: (function, size) -> (choice, the measurement that decided). A kernel is picked at a size only after
`python -m custom_kernels.bench` has seen it win there. Nothing has been measured yet: so far all is PyTorch's own, with
FlexAttention where a dense mask would be too large, chunks of plain products where all logits would be."""
import os
from types import SimpleNamespace

import torch

NOT_MEASURED = "not measured yet"
PICK = {  # size: head dimension, vocabulary, channels; None = every size that has no line of its own
    ("attention", None): ("flex", NOT_MEASURED),
    ("linear_cross_entropy", None): ("chunked", NOT_MEASURED),
    ("diffusion_loss_rows", None): ("reference", NOT_MEASURED),
    ("flow_loss_rows", None): ("reference", NOT_MEASURED),
    ("denoise", None): ("reference", NOT_MEASURED),  # or a CUDA graph
}

META = "cpu"  # which device meta tensors stand for: a GPU never holds all logits
FORCED = os.environ.get("NANORECA_KERNELS", "")
if FORCED not in ("", "reference", "triton"):
    raise ValueError(f"NANORECA_KERNELS={FORCED!r} is not known; it must be 'reference' or 'triton', or unset to let "
                     "the pick table decide")

triton, tl = None, SimpleNamespace(constexpr=None)  # without Triton the kernels' signatures look up this name only
if FORCED == "triton" or torch.cuda.is_available():  # a CPU-only run neither needs Triton nor waits for its import
    try:
        import triton
        import triton.language as tl  # noqa: F401 (the modules of the kernels take it from here)
    except ImportError:
        if FORCED == "triton":
            raise ImportError("NANORECA_KERNELS=triton, but triton cannot be imported: pip install triton==3.7.1, or "
                              "unset the variable")
INTERPRETING = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"

def jit(kernel):
    """triton.jit where Triton is; elsewhere the kernels stay plain functions that nobody calls."""
    return kernel if triton is None else triton.jit(kernel)

def choose(name, size, device):
    """-> 'reference', 'triton', 'flex', 'chunked' or 'graph'."""
    if device.type == "meta":
        return "chunked" if META == "cuda" and name == "linear_cross_entropy" else "reference"
    if FORCED == "triton" and device.type == "cpu" and not INTERPRETING:
        raise ValueError(f"NANORECA_KERNELS=triton, but {name} was given CPU tensors: unset it, or set "
                         "TRITON_INTERPRET=1 (slow)")
    if FORCED or device.type != "cuda":
        return FORCED or "reference"
    choice = (PICK.get((name, size)) or PICK[(name, None)])[0]
    return choice if triton is not None or choice in ("chunked", "graph") else "reference"

def compiled(forward):
    """torch.compile of a model that takes a batch. From the first call on it has symbols for the lengths that differ
    from step to step, those of integers and of noise, and no two of them are one because they are equal just then."""
    torch.fx.experimental._config.use_duck_shape = False
    fast = torch.compile(forward)

    def call(batch):
        for name, t in (item for tensors in batch.values() for item in tensors.items()):
            if name == "noise" or not t.is_floating_point():
                torch._dynamo.maybe_mark_dynamic(t, [*range(1, t.dim())])
        return fast(batch)
    return call

def autocast(*tensors):
    """What autocast does for PyTorch's own matrix products, for ours."""
    device = tensors[0].device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(None if t is None else t.to(dtype) for t in tensors)
    return tensors

def exact(t):
    """The type in which sums over a tensor's elements are held."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32

def dot_precision(dtype):
    """float32 follows torch.set_float32_matmul_precision: three tf32 products (near float32's accuracy) or one."""
    if dtype != torch.float32:
        return "ieee"  # half precision and float64 have one way only
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"

PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40": 181, "4090": 165, "3090": 71}  # dense bf16, for MFU

def peak_flops(device):
    """Dense bf16 operations per second of a GPU; infinite where that is not known, so that MFU is 0."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * tflops for key, tflops in PEAK_TFLOPS.items() if key in name), float("inf"))
