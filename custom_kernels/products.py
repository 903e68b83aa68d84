"""Which library multiplies float32 matrices on a CPU. PyTorch gives them to MKL; on AMD's processors oneDNN is more
than twice as fast. PyTorch turns to oneDNN only where it may use a lower precision, and oneDNN uses one only where the
processor has units for it: so it is taken where a check finds it exact, and never for attention, whose many small
products it slows down."""
import time

import torch
import torch.nn.functional as F

WAYS = {"mkl": "ieee", "onednn": "bf16"}  # the lowest precision that PyTorch is told to use
NOISE = 1e-6  # relative error of a float32 product, with room; bf16 has 2e-3
chosen = "mkl"

def told(way):
    torch.backends.mkldnn.matmul.fp32_precision = WAYS[way]

def faster():
    """-> "onednn" where it takes at most four fifths of MKL's time and is as exact, else "mkl". Takes milliseconds of
    this process's own time, so that others on the machine hardly matter."""
    if not torch.backends.mkldnn.is_available():
        return "mkl"
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 128, generator=generator) for n in (2048, 512))
    wanted, seconds = x.double() @ w.double().T, {way: [] for way in WAYS}
    for way in [*WAYS] * 5:
        told(way)
        start = time.process_time()
        y = F.linear(x, w)
        seconds[way].append(time.process_time() - start)
    told("mkl")
    error = (y - wanted).norm() / wanted.norm()  # of onednn, which came last
    return "onednn" if error < NOISE and min(seconds["onednn"]) < 0.8 * min(seconds["mkl"]) else "mkl"

def use_products(way="auto"):
    """way: auto, mkl or onednn, from now on in this process -> mkl or onednn. ValueError where there is no oneDNN."""
    global chosen
    way = faster() if way == "auto" else way
    if way == "onednn" and not torch.backends.mkldnn.is_available():
        raise ValueError("--gemm onednn: this PyTorch was built without oneDNN: take --gemm mkl")
    told(way)
    chosen = way
    return way

def sdpa(q, k, v, **options):
    """F.scaled_dot_product_attention, whose products stay with MKL in both directions."""
    if chosen == "mkl":
        return F.scaled_dot_product_attention(q, k, v, **options)
    told("mkl")
    out = F.scaled_dot_product_attention(q, k, v, **options)
    told("onednn")
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda *_: told("mkl"))
        out.grad_fn.register_hook(lambda *_: told("onednn"))
    return out
