"""Public functions that pick an implementation (see pick.py); models call these and never a kernel.

Each module holds a function's plain PyTorch reference, which is its specification, beside the Triton kernel that computes the same."""
import torch

from .attention import (AttentionPlan, attention_bounds, attention_decode_triton, attention_flex, attention_plan as _plan, attention_reference,
                        attention_triton, flex_block_mask, interval_mask)
from .diffusion_loss import (add_noise, diffusion_loss_rows_reference, diffusion_tables, flow_loss_rows_reference,
                             gated_add_reference, norm_modulate_reference)
from .linear_cross_entropy import linear_cross_entropy_reference
from .pick import autocast, choose

FEW_QUERIES = 128  # up to here a dense mask costs nothing worth avoiding, and compiling for every new cache length would


def attention_plan(lo, hi, num_keys):
    """Intervals lo, hi (R, Tq) of integers, R = 1 or the batch size -> a plan, to be shared by all layers. Ends outside [0, num_keys] are
    clamped to it; a query with hi <= lo sees nothing. ValueError where the shapes are not two equal (R, Tq)."""
    plan = _plan(lo, hi, num_keys)
    if lo.is_cuda and lo.shape[1] > FEW_QUERIES:  # made now, so that a compiled model finds them instead of tracing them
        {"flex": flex_block_mask, "triton": attention_bounds}.get(choose("attention", None, lo.device), lambda plan: None)(plan)
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


linear_cross_entropy = linear_cross_entropy_reference
norm_modulate = norm_modulate_reference
gated_add = gated_add_reference
diffusion_loss_rows = diffusion_loss_rows_reference
flow_loss_rows = flow_loss_rows_reference
