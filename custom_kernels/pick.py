"""Which implementation runs where, and Triton itself, imported only where a kernel could run.

CPU: always the plain PyTorch reference. CUDA: what PICK says. NANORECA_KERNELS=reference|triton forces one everywhere
(triton on a CPU means Triton's interpreter, TRITON_INTERPRET=1: slow, for the tests).

PICK is data: (function, size) -> (choice, the measurement that decided). A kernel is picked at a size only after `python -m
custom_kernels.bench` has seen it win there. Nothing has been measured yet, so every line is the choice that rests on PyTorch's own GPU
code: FlexAttention where a dense mask would be too large, chunks of plain matrix products where all logits would be."""
import os
from types import SimpleNamespace

import torch

NOT_MEASURED = "not measured yet"
PICK = {  # size: head dimension, vocabulary, width, channels; None = every size that has no line of its own
    ("attention", 64): ("flex", NOT_MEASURED),  # Show-o
    ("attention", 72): ("flex", NOT_MEASURED),  # SigLIP
    ("attention", 80): ("flex", NOT_MEASURED),  # Harmon's MAR
    ("attention", 128): ("flex", NOT_MEASURED),  # Harmon's and BAGEL's language models
    ("attention", None): ("flex", NOT_MEASURED),
    ("attention_decode", None): ("reference", NOT_MEASURED),  # few queries: the dense mask is small
    ("linear_cross_entropy", 58498): ("chunked", NOT_MEASURED),  # Show-o
    ("linear_cross_entropy", 151936): ("chunked", NOT_MEASURED),  # Harmon
    ("linear_cross_entropy", None): ("chunked", NOT_MEASURED),
    ("norm_modulate", None): ("reference", NOT_MEASURED),
    ("gated_add", None): ("reference", NOT_MEASURED),
    ("diffusion_loss_rows", None): ("reference", NOT_MEASURED),
    ("flow_loss_rows", None): ("reference", NOT_MEASURED),
}

FORCED = os.environ.get("NANORECA_KERNELS", "")
if FORCED not in ("", "reference", "triton"):
    raise ValueError(f"NANORECA_KERNELS={FORCED!r} is not known; it must be 'reference' or 'triton', or unset to let the pick table decide")

triton, tl = None, SimpleNamespace(constexpr=None)  # without Triton only this name is looked up: in the kernels' signatures
if FORCED == "triton" or torch.cuda.is_available():  # a CPU-only run neither needs Triton nor waits for its import
    try:
        import triton
        import triton.language as tl
    except ImportError:
        if FORCED == "triton":
            raise ImportError("NANORECA_KERNELS=triton, but triton cannot be imported: pip install triton==3.7.1, or unset the variable")
INTERPRETING = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel):
    """triton.jit where Triton is; elsewhere the kernels stay plain functions that nobody calls."""
    return kernel if triton is None else triton.jit(kernel)


def choose(name, size, device):
    """-> 'reference', 'triton', 'flex' or 'chunked'."""
    if FORCED == "reference" or (device.type == "cpu" and not INTERPRETING):
        if FORCED == "triton":
            raise ValueError(f"NANORECA_KERNELS=triton, but {name} was given CPU tensors: unset it, or set TRITON_INTERPRET=1 (slow)")
        return "reference"
    if FORCED == "triton":
        return "triton"
    if device.type != "cuda":
        return "reference"
    choice = (PICK.get((name, size)) or PICK[(name, None)])[0]
    return choice if triton is not None or choice == "chunked" else "reference"


def autocast(*tensors):
    """What autocast does for PyTorch's own matrix products, for ours."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(None if t is None else t.to(dtype) for t in tensors)
    return tensors
