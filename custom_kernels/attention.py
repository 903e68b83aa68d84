"""Attention over key intervals: query i of row b sees the keys [lo[b, i], hi[b, i]).  (The Triton kernels follow below the reference.)"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass
class AttentionPlan:
    """Everything about a mask that does not depend on q, k and v; made once by `attention_plan`, shared by all layers."""
    lo: torch.Tensor  # (B or 1, Tq) int32
    hi: torch.Tensor  # (B or 1, Tq) int32
    num_keys: int
    kind: str = "mask"  # "full" and "causal" are known only on the CPU, where looking costs no host sync
    cache: dict = field(default_factory=dict)  # masks and bounds, made on first use


def attention_plan(lo, hi, num_keys):
    """Intervals (B or 1, Tq) of integers -> plan. Bounds outside [0, num_keys] are clamped; hi <= lo is an empty interval."""
    if lo.shape != hi.shape or lo.dim() != 2:
        raise ValueError(f"attention_plan: lo {tuple(lo.shape)} and hi {tuple(hi.shape)} must both be (rows, queries)")
    lo, hi = lo.clamp(0, num_keys).int(), hi.clamp(0, num_keys).int()
    plan = AttentionPlan(lo, hi, num_keys)
    if lo.device.type == "cpu" and not torch.compiler.is_compiling():
        if bool((lo == 0).all()):
            if bool((hi == num_keys).all()):
                plan.kind = "full"
            elif hi.shape[1] == num_keys and bool((hi == torch.arange(1, num_keys + 1)).all()):
                plan.kind = "causal"
    return plan


def interval_mask(lo, hi, num_keys):
    """The dense form of a mask: (B, Tq) intervals -> (B, 1, Tq, Tk) bool, True = may attend."""
    keys = torch.arange(num_keys, device=lo.device)
    return ((keys >= lo[..., None]) & (keys < hi[..., None])).unsqueeze(1)


def attention_reference(q, k, v, plan):
    """What `attention` computes, in plain PyTorch: the specification of the kernels, and the path on CPUs."""
    gqa = q.shape[1] != k.shape[1]
    if plan.kind == "full":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    if plan.kind == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if q.device.type == "cpu":  # an additive mask spares SDPA its own conversion in every layer; rows of -inf only give 0 there
        if q.dtype not in plan.cache:
            mask = interval_mask(plan.lo, plan.hi, plan.num_keys)
            plan.cache[q.dtype] = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.cache[q.dtype], enable_gqa=gqa)
    if "mask" not in plan.cache:  # elsewhere an empty row may give nan, so it looks at everything and is then put to 0
        empty = (plan.hi <= plan.lo)[:, None, :, None]
        plan.cache["mask"] = interval_mask(plan.lo, plan.hi, plan.num_keys) | empty, empty
    mask, empty = plan.cache["mask"]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).masked_fill(empty, 0.0)
