"""Which library multiplies float32 matrices on a CPU: MKL, PyTorch's choice, or oneDNN, twice as fast on AMD's.
PyTorch turns to oneDNN only where a lower precision is allowed, which oneDNN uses only where a processor has units for
it: so a check must find it exact. Attention stays with MKL, as oneDNN slows its many small products down."""
import time

import torch
import torch.nn.functional as F

WAYS = {"mkl": "ieee", "onednn": "bf16"}  # the lowest precision that PyTorch is told to use
chosen = "mkl"

def told(way):
    torch.backends.mkldnn.matmul.fp32_precision = WAYS[way]

def compare():
    """-> oneDNN's relative error here, and its time over MKL's, of one thread alone: others on the machine hardly
    matter then, and a fork does not wait for OpenMP's other threads, which it has not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, w = (torch.randn(n, 128, generator=torch.Generator().manual_seed(n)) for n in (2048, 512))
    wanted, seconds = x.double() @ w.double().T, {way: [] for way in WAYS}
    for way in [*WAYS] * 5:
        told(way)
        seconds[way].append(-time.process_time())
        y = F.linear(x, w)
        seconds[way][-1] += time.process_time()
    error = (y - wanted).norm() / wanted.norm()  # of onednn, which came last; bf16 has 2e-3
    torch.set_num_threads(threads)
    return float(error), min(seconds["onednn"]) / min(seconds["mkl"])

def use_products(way="auto"):
    """way: auto, mkl or onednn, from now on in this process -> mkl or onednn. ValueError where oneDNN is not exact."""
    global chosen
    if way != "mkl":
        error, share = compare() if torch.backends.mkldnn.is_available() else (1.0, 1.0)
        if way == "onednn" and error > 1e-6:
            raise ValueError(f"--gemm onednn: off by {error:.0e} here (expected: below 1e-6), take --gemm mkl")
        way = "onednn" if way == "onednn" or error < 1e-6 and share < 0.8 else "mkl"
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
    if out.grad_fn:
        out.grad_fn.register_prehook(lambda *_: told("mkl"))
        out.grad_fn.register_hook(lambda *_: told("onednn"))
    return out
