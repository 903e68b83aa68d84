"""Public functions that pick an implementation; models call these and never a kernel.

On CPU the plain PyTorch reference runs. NANORECA_KERNELS=reference|triton forces one or the other on a GPU."""
from .attention import AttentionPlan, attention_plan, attention_reference, interval_mask
from .diffusion_loss import (add_noise, diffusion_loss_rows_reference, diffusion_tables, flow_loss_rows_reference,
                             gated_add_reference, norm_modulate_reference)
from .linear_cross_entropy import linear_cross_entropy_reference


def attention(q, k, v, lo, hi, plan=None):
    """Softmax attention in which query i of row b sees the keys [lo[b, i], hi[b, i]): q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D), Hq a
    multiple of Hkv, lo and hi (B or 1, Tq) integers, scale D**-0.5 -> (B, Hq, Tq, D). A query with an empty interval gives 0.
    `plan` = attention_plan(lo, hi, Tk): pass it where several layers share a mask (lo and hi are then ignored and may be None)."""
    if plan is None:
        plan = attention_plan(lo, hi, k.shape[2])
    return attention_reference(q, k, v, plan)


linear_cross_entropy = linear_cross_entropy_reference
norm_modulate = norm_modulate_reference
gated_add = gated_add_reference
diffusion_loss_rows = diffusion_loss_rows_reference
flow_loss_rows = flow_loss_rows_reference
