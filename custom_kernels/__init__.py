"""Public functions that pick an implementation (pick.py says which and why); models call these and never a kernel.

Each of the three modules holds a function's plain PyTorch reference, which is its specification, beside the Triton kernels that compute the
same. On a CPU the reference runs, at the cost of one comparison. `python -m custom_kernels.bench` measures where a kernel wins."""
import torch

from .attention import (AttentionPlan, attention_bounds, attention_decode_triton, attention_flex, attention_plan as _plan,
                        attention_reference, attention_triton, flex_block_mask, interval_mask)
from .diffusion_loss import (add_noise, diffusion_loss_rows_reference, diffusion_loss_rows_triton, diffusion_tables,
                             flow_loss_rows_reference, flow_loss_rows_triton, gated_add_reference, gated_add_triton,
                             norm_modulate_reference, norm_modulate_triton)
from .linear_cross_entropy import linear_cross_entropy_fused, linear_cross_entropy_reference
from .pick import autocast, choose
from .rms_norm import rms_norm

FEW_QUERIES = 128  # up to here a dense mask is small, and compiling for every new length of a cache would cost more


def attention_plan(lo, hi, num_keys):
    """Intervals lo, hi (R, Tq) of integers, R = 1 or the batch size -> a plan that all layers share. Ends outside [0, num_keys] are clamped
    to it; a query with hi <= lo sees nothing. ValueError where the shapes are not two equal (R, Tq)."""
    plan = _plan(lo, hi, num_keys)
    if lo.is_cuda and lo.shape[1] > FEW_QUERIES:  # made here, outside of the blocks that --checkpoint runs twice
        choice = choose("attention", None, lo.device)
        if choice == "flex":
            flex_block_mask(plan)
        elif choice == "triton":
            attention_bounds(plan)
    return plan


def attention(q, k, v, lo, hi, plan=None):
    """Softmax attention in which query i of row b sees the keys [lo[b, i], hi[b, i]): q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D), Hq a
    multiple of Hkv, lo and hi (B or 1, Tq) integers, scale D**-0.5 -> (B, Hq, Tq, D). A query with an empty interval gives 0.
    `plan` = attention_plan(lo, hi, Tk): pass it where several layers share a mask (lo and hi are then not looked at and may be None)."""
    if plan is None:
        plan = attention_plan(lo, hi, k.shape[2])
    few = q.shape[2] <= FEW_QUERIES and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    choice = choose("attention_decode" if few else "attention", q.shape[3], q.device)
    if choice == "reference":
        return attention_reference(q, k, v, plan)
    q, k, v = autocast(q, k, v)
    if choice == "flex":
        return attention_flex(q, k, v, plan)
    if few and q.shape[2] * (q.shape[1] // k.shape[1]) <= 64:
        return attention_decode_triton(q, k, v, plan)
    return attention_triton(q, k, v, plan)


def linear_cross_entropy(hidden, weight, labels, bias=None, ignore_index=-100, count=None):
    """Cross entropy of hidden @ weight.T + bias, summed over the rows whose label is not ignore_index and divided by `count`, or where that
    is None by the number of those rows (no such row: 0, with gradient 0). hidden (N, D), weight (V, D), bias (V,), labels (N,) int64, count
    a 0-dim tensor or a number -> float32 scalar. On CUDA never more than a chunk of the logits exists."""
    choice = choose("linear_cross_entropy", weight.shape[0], hidden.device)
    if choice == "reference":
        return linear_cross_entropy_reference(hidden, weight, labels, bias, ignore_index, count)
    hidden, weight, bias = autocast(hidden, weight, bias)
    return linear_cross_entropy_fused(hidden, weight, labels, bias, ignore_index, count, kernels=choice == "triton")


def norm_modulate(x, shift, scale, weight=None, bias=None, eps=1e-6):
    """LayerNorm(x) * (1 + scale) + shift over the last axis; x (..., W), shift and scale of its shape or broadcast to it, weight and bias
    (W,) or None -> (..., W). Statistics in float32."""
    if choose("norm_modulate", x.shape[-1], x.device) == "triton":
        return norm_modulate_triton(x, shift, scale, weight, bias, eps)
    return norm_modulate_reference(x, shift, scale, weight, bias, eps)


def gated_add(h, gate, a):
    """h + gate * a; h and a (..., W), gate of their shape or broadcast to it."""
    return (gated_add_triton if choose("gated_add", h.shape[-1], h.device) == "triton" else gated_add_reference)(h, gate, a)


def diffusion_loss_rows(out, x0, noise, t, tables):
    """Harmon's token loss, DDPM with learned variance: out (N, 2C) = [epsilon | v], x0 and noise (N, C), t (N,) int64, tables =
    diffusion_tables(betas) -> (mse, vb), float32 (N,) each: mean squared error of epsilon, and the variational bound in bits per channel,
    which trains v only."""
    choice = choose("diffusion_loss_rows", x0.shape[1], out.device)
    return (diffusion_loss_rows_triton if choice == "triton" else diffusion_loss_rows_reference)(out, x0, noise, t, tables)


def flow_loss_rows(v, x0, noise):
    """BAGEL's token loss, rectified flow: v, x0, noise (N, C) -> mean_c (v - (noise - x0))^2, float32 (N,)."""
    choice = choose("flow_loss_rows", x0.shape[1], v.device)
    return (flow_loss_rows_triton if choice == "triton" else flow_loss_rows_reference)(v, x0, noise)
