"""Attention over key intervals: query i of row b sees the keys lo[b, i] <= j < hi[b, i].

Every mask of the three models is of this kind. Text: hi = i + 1. A bidirectional image block: hi = end of the block. Left padding: lo =
first real token. Samples packed into one row: lo = start of the sample. So a mask is two integers per query instead of a (queries x
keys) table, and a kernel can tell from a few of them which part of the table it never has to look at.

The forward pass (online softmax; FlashAttention-2, arXiv 2307.08691)
    One program owns BM queries of one head and walks over the keys, BN at a time. It never holds more than a (BM, BN) tile of scores
    s = q k^T / sqrt(D). A softmax over pieces needs three running values per query: m, the largest score so far; l, the sum of
    exp(s - m) so far; acc, the sum of exp(s - m) v so far. When a tile raises the maximum from m to m', what was summed relative to m is
    multiplied by exp(m - m'), and the tile's own terms are added relative to m'. After the last tile the output is acc / l. The only
    other thing kept is lse = m + log l, one number per query, because exp(s - lse) is the softmax probability itself.
    (All exponents here are base 2: log2(e) is folded into the scale, and the hardware's exponential is exp2.)

Bounds (once per mask, shared by all heads and layers)
    For every 32 queries: the least and greatest lo, the least and greatest hi. A program combines those of its BM queries:
        keys   . . . [ min lo ........ max lo )[ max lo ........ min hi )[ min hi ........ max hi ) . . .
               nobody       some queries            every query              some queries         nobody
    Outside [min lo, max hi) no tile is loaded at all. Tiles inside [max lo, min hi) are seen by every query: their loop has no
    comparison in it. Only the tiles at the two edges compare key numbers with lo and hi. Nothing needs lo or hi to be monotone.
    For every 32 keys: the first query and the last query that may see one of them; it limits the loop of the dk/dv kernel below.

The backward pass (recomputation)
    With P = softmax(s), O = P V and dO given:  dV = P^T dO,  dP = dO V^T,  dS = P * (dP - delta),  dQ = dS K / sqrt(D),
    dK = dS^T Q / sqrt(D), where delta_i = sum_j P_ij dP_ij = dO_i . O_i needs no pass over the keys. P would be as large as the mask, so it
    is not stored but computed again, tile by tile, as exp(s - lse). One kernel owns queries, walks over keys and sums dQ; another owns
    keys, walks over queries (and over the query heads that share a key head) and sums dK and dV. Each output element has one owner: no
    atomic additions, so the same input gives the same bits.

Empty intervals
    Such a query has l = 0. Its output is 0 and its lse is +inf, so that exp(s - lse) = 0 and every gradient through it is 0.

Head dimensions
    A tile's side is a power of two. A head of 80 is worked on as 64 + 16 columns (72 as 64 + 16, half of them idle), not padded to 128.

Decoding
    With one or few queries against a long cache there are too few programs to fill a GPU. So the keys are cut into pieces, each piece
    gives its own (m, l, acc) for all query heads that share a key head, and a second kernel joins the pieces as the forward pass would.
"""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .pick import jit, tl, triton

GRAIN = 32  # queries (and keys) per bound; every tile side is a multiple of it
FLEX_BLOCK = 128


@dataclass
class AttentionPlan:
    """What depends on a mask alone; made once by `attention_plan`, shared by all layers."""
    lo: torch.Tensor  # (R, Tq) int32, R = 1 or the batch size
    hi: torch.Tensor  # (R, Tq) int32
    num_keys: int
    kind: str = "mask"  # "full" and "causal" are recognised on the CPU only, where looking costs no host sync
    cache: dict = field(default_factory=dict)  # masks and bounds, made on first use


def attention_plan(lo, hi, num_keys):
    """Intervals lo, hi (R, Tq) of integers, R = 1 or the batch size -> AttentionPlan. Ends outside [0, num_keys] are clamped to it; a query
    with hi <= lo sees nothing. ValueError where the shapes are not two equal (R, Tq)."""
    if lo.shape != hi.shape or lo.dim() != 2:
        raise ValueError(f"attention_plan: lo {tuple(lo.shape)} and hi {tuple(hi.shape)} must have one shape, (rows, queries)")
    plan = AttentionPlan(lo.clamp(0, num_keys).int(), hi.clamp(0, num_keys).int(), num_keys)
    if lo.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lo <= 0).all()):
        if bool((hi >= num_keys).all()):
            plan.kind = "full"
        elif hi.shape[1] == num_keys and bool((hi == torch.arange(1, num_keys + 1)).all()):
            plan.kind = "causal"
    return plan


def interval_mask(lo, hi, num_keys):
    """The same mask as a table: lo, hi (R, Tq) -> (R, 1, Tq, Tk) bool, True = may attend."""
    keys = torch.arange(num_keys, device=lo.device)
    return ((keys >= lo[..., None]) & (keys < hi[..., None])).unsqueeze(1)


# ----------------------------------------------------------------------------------------------------------------------------------------
# the reference, and FlexAttention

def attention_reference(q, k, v, plan):
    """What `attention` computes, in plain PyTorch: the specification of the kernels, and the path on CPUs."""
    gqa = q.shape[1] != k.shape[1]
    if plan.kind == "full":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
    if plan.kind == "causal":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if q.device.type == "cpu":  # an additive mask spares SDPA a conversion in every layer; rows of nothing but -inf give 0 on CPUs
        if q.dtype not in plan.cache:
            mask = interval_mask(plan.lo, plan.hi, plan.num_keys)
            plan.cache[q.dtype] = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.cache[q.dtype], enable_gqa=gqa)
    if "mask" not in plan.cache:  # elsewhere a row of nothing may give nan, so it looks at everything and is put to 0 afterwards
        empty = (plan.hi <= plan.lo)[:, None, :, None]
        plan.cache["mask"] = interval_mask(plan.lo, plan.hi, plan.num_keys) | empty, empty
    mask, empty = plan.cache["mask"]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa).masked_fill(empty, 0.0)


def flex_block_mask(plan, block=FLEX_BLOCK):
    """The plan as FlexAttention's BlockMask: the tiles that hold something, and those seen by every one of their queries."""
    if "flex" not in plan.cache:
        lo, hi, Tk = plan.lo, plan.hi, plan.num_keys
        R, Tq = lo.shape
        start = torch.arange(0, Tk, block, device=lo.device)  # (nk,)
        end = (start + block).clamp(max=Tk)
        some = (lo[..., None] < end) & (hi[..., None] > start) & (hi > lo)[..., None]  # (R, Tq, nk)
        every = (lo[..., None] <= start) & (hi[..., None] >= end)
        rest = -Tq % block  # queries that are not there: nobody's tile, and no obstacle to "every"
        some = F.pad(some, (0, 0, 0, rest), value=False).unflatten(1, (-1, block)).any(2)  # (R, nq, nk)
        every = F.pad(every, (0, 0, 0, rest), value=True).unflatten(1, (-1, block)).all(2)

        def lists(tiles):  # (R, nq, nk) bool -> how many per query block, and their numbers first
            return tiles.sum(-1, dtype=torch.int32)[:, None], tiles.int().argsort(dim=-1, descending=True, stable=True).int()[:, None]

        def sees(b, h, i, j):
            row = b * (R > 1)  # a plan of one row serves every sample
            return (j >= lo[row, i]) & (j < hi[row, i])

        plan.cache["flex"] = BlockMask.from_kv_blocks(*lists(some & ~every), *lists(every), BLOCK_SIZE=block, mask_mod=sees,
                                                      seq_lengths=(Tq, Tk))
    return plan.cache["flex"]


_compiled_flex = None


def attention_flex(q, k, v, plan):
    """FlexAttention with the plan's tiles; compiled, except where there is no GPU to compile for (then it is only a check)."""
    global _compiled_flex
    mask, gqa = flex_block_mask(plan), q.shape[1] != k.shape[1]
    if q.device.type == "cpu" or torch.compiler.is_compiling():
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)
    if _compiled_flex is None:
        # towers, batch parts and image sizes are all shapes of one function here; at the limit of 8 it would fall back to dense scores
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        _compiled_flex = torch.compile(flex_attention)
    return _compiled_flex(q, k, v, block_mask=mask, enable_gqa=gqa)


# ----------------------------------------------------------------------------------------------------------------------------------------
# the kernels

def attention_bounds(plan):
    """-> for every GRAIN queries (R, nq, 4) int32 [min lo, max lo, min hi, max hi]; for every GRAIN keys the same four about queries, (R,
    nk, 4) int32 [first that may see one of them, start and end of a run that sees all of them, end]. An empty interval hides every key from
    "all" and asks for none."""
    if "bounds" not in plan.cache:
        lo, hi, Tk = plan.lo, plan.hi, plan.num_keys
        Tq, some = lo.shape[1], hi > lo

        def over(values, pad, reduce):
            return getattr(F.pad(values, (0, -Tq % GRAIN), value=pad).unflatten(1, (-1, GRAIN)), reduce)(2)  # (R, nq)

        q_bounds = torch.stack([over(lo.masked_fill(~some, Tk), Tk, "amin"), over(lo.masked_fill(~some, Tk), 0, "amax"),
                                over(hi.masked_fill(~some, 0), Tk, "amin"), over(hi.masked_fill(~some, 0), 0, "amax")], 2)
        key = torch.arange(0, Tk, GRAIN, device=lo.device)  # (nk,)
        query = torch.arange(0, Tq, GRAIN, device=lo.device)[:, None]  # (nq, 1)
        touch = (q_bounds[..., 0:1] < key + GRAIN) & (q_bounds[..., 3:4] > key)  # (R, nq, nk)
        sees_all = (q_bounds[..., 1:2] <= key) & (q_bounds[..., 2:3] >= (key + GRAIN).clamp(max=Tk))
        full = torch.where(sees_all, query, Tq).amin(1, keepdim=True)
        full_end = torch.where(~sees_all & (query > full), query, Tq).amin(1)
        k_bounds = torch.stack([torch.where(touch, query, Tq).amin(1), full[:, 0], full_end,
                                torch.where(touch, query + GRAIN, 0).amax(1).clamp(max=Tq)], 2)
        plan.cache["bounds"] = q_bounds.int().contiguous(), k_bounds.int().contiguous()
    return plan.cache["bounds"]


def tiles(D, dtype):
    """Tile sides (queries, keys), warps and pipeline stages of the forward, dq and dk/dv kernels. Not measured yet: the largest of those
    tried that the compiler fits into the registers of an A100 and an H100 with hardly a spill (see tests/test_kernels_compile.py)."""
    if dtype.itemsize > 2:
        return dict(forward=(64, 32, 4, 2), dq=(64, 32, 4, 1), dkdv=(32, 32, 4, 1))
    if D <= 64:
        return dict(forward=(128, 64, 4, 3), dq=(128, 64, 8, 2), dkdv=(32, 128, 8, 2))
    if D <= 96:
        return dict(forward=(128, 64, 8, 3), dq=(128, 64, 8, 2), dkdv=(32, 128, 8, 2))
    return dict(forward=(128, 64, 8, 3), dq=(128, 32, 8, 2), dkdv=(32, 128, 8, 2))


def split_width(D):
    """Head dimension -> (D0, D1): columns worked on as a power of two and a rest of at least 16 (0 if there is none)."""
    D0 = max(16, 1 << (D.bit_length() - 1))
    return D0, (0 if D <= D0 else max(16, 1 << (D - D0 - 1).bit_length()))


@jit
def load_tile(ptr, stride, rows, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, CHECK: tl.constexpr):
    """(rows, WIDTH) from column FIRST on; rows >= limit (where CHECK) and columns >= D give 0."""
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if CHECK:
        if FIRST + WIDTH > D:
            return tl.load(ptrs, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(rows < limit)[:, None], other=0.0)
    else:
        if FIRST + WIDTH > D:
            return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
        else:
            return tl.load(ptrs)


@jit
def store_tile(ptr, stride, rows, limit, value, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=(rows < limit)[:, None] & (cols < D)[None, :])


@jit
def dot_t(a0, a1, b0, b1, D1: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, summed over both parts of the head dimension."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION, out_dtype=ACC)
    return s


@jit
def tile_range(Bounds, own, own_limit, limit, OWN: tl.constexpr, WALK: tl.constexpr, GRAIN: tl.constexpr):
    """A program owns OWN queries (or keys) from `own` on and walks over the keys (queries) in tiles of WALK: those in [full, end_full)
    are seen as a whole, those in [start, full) and [end_full, end) hold edges."""
    start, full, end_full, end = limit, 0, limit, 0
    for i in tl.static_range(OWN // GRAIN):
        if own + i * GRAIN < own_limit:
            grain = Bounds + (own // GRAIN + i) * 4
            start = tl.minimum(start, tl.load(grain))
            full = tl.maximum(full, tl.load(grain + 1))
            end_full = tl.minimum(end_full, tl.load(grain + 2))
            end = tl.maximum(end, tl.load(grain + 3))
    end = (end + WALK - 1) // WALK * WALK
    start = tl.minimum(start // WALK * WALK, end)
    full = tl.minimum(tl.maximum((full + WALK - 1) // WALK * WALK, start), end)
    end_full = tl.maximum(tl.minimum(end_full // WALK * WALK, end), full)
    return start, full, end_full, end


@jit
def edge_tile(i, start, full, end_full, WALK: tl.constexpr):
    """The i-th tile that needs comparisons: those left of the fully visible ones, then those right of them."""
    left = (full - start) // WALK
    return tl.where(i < left, start + i * WALK, end_full + (i - left) * WALK)


@jit
def forward_step(acc0, acc1, m, l, q0, q1, K, V, stride_k, stride_v, n, lo, hi, Tk, scale_log2, D: tl.constexpr, D0: tl.constexpr,
                 D1: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = m.dtype
    keys = n + tl.arange(0, BN)
    k0 = load_tile(K, stride_k, keys, Tk, 0, D0, D, EDGE)
    k1 = k0 if D1 == 0 else load_tile(K, stride_k, keys, Tk, D0, D1, D, EDGE)
    s = dot_t(q0, q1, k0, k1, D1, ACC, PRECISION) * scale_log2  # (BM, BN)
    if EDGE:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = new_m
    if EDGE:  # a query that has not seen a key yet: -inf - -inf would be nan
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    l = l * shrink + tl.sum(p, 1)
    v0 = load_tile(V, stride_v, keys, Tk, 0, D0, D, EDGE)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        v1 = load_tile(V, stride_v, keys, Tk, D0, D1, D, EDGE)
        acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc0, acc1, new_m, l


@jit
def attention_forward_kernel(Q, K, V, Out, Lse, Lo, Hi, QBounds, scale_log2, Tq, Tk,
                             stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                             stride_ob, stride_oh, stride_ot, stride_lo, stride_bounds,
                             GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                             GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal rows get longer downwards: the longest first
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    V += b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    lo = tl.load(Lo + b * stride_lo + rows, mask=rows < Tq, other=0)
    hi = tl.load(Hi + b * stride_lo + rows, mask=rows < Tq, other=0)
    q0 = load_tile(Q, stride_qt, rows, Tq, 0, D0, D, True)
    acc0 = tl.zeros([BM, D0], ACC)
    m = tl.full([BM], float("-inf"), ACC)
    l = tl.zeros([BM], ACC)
    if D1 > 0:
        q1 = load_tile(Q, stride_qt, rows, Tq, D0, D1, D, True)
        acc1 = tl.zeros([BM, D1], ACC)
    else:
        q1, acc1 = q0, l  # never used
    start, full, end_full, end = tile_range(QBounds + b * stride_bounds, tile * BM, Tq, Tk, BM, BN, GRAIN)
    for n in range(full, end_full, BN):
        acc0, acc1, m, l = forward_step(acc0, acc1, m, l, q0, q1, K, V, stride_kt, stride_vt, n, lo, hi, Tk, scale_log2, D, D0, D1, BN,
                                        False, PRECISION)
    for i in range(0, (full - start + end - end_full) // BN):
        n = edge_tile(i, start, full, end_full, BN)
        acc0, acc1, m, l = forward_step(acc0, acc1, m, l, q0, q1, K, V, stride_kt, stride_vt, n, lo, hi, Tk, scale_log2, D, D0, D1, BN,
                                        True, PRECISION)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    Out += b * stride_ob + h.to(tl.int64) * stride_oh
    store_tile(Out, stride_ot, rows, Tq, acc0 / l[:, None], 0, D0, D)
    if D1 > 0:
        store_tile(Out, stride_ot, rows, Tq, acc1 / l[:, None], D0, D1, D)
    lse = tl.where(empty, float("inf"), m + tl.log2(l))
    tl.store(Lse + (b * tl.num_programs(1) + h) * Tq + rows, lse, mask=rows < Tq)


@jit
def dq_step(dq0, dq1, q0, q1, do0, do1, lse, delta, K, V, stride_k, stride_v, n, lo, hi, Tk, scale_log2, D: tl.constexpr, D0: tl.constexpr,
            D1: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = lse.dtype
    keys = n + tl.arange(0, BN)
    k0 = load_tile(K, stride_k, keys, Tk, 0, D0, D, EDGE)
    v0 = load_tile(V, stride_v, keys, Tk, 0, D0, D, EDGE)
    k1 = k0 if D1 == 0 else load_tile(K, stride_k, keys, Tk, D0, D1, D, EDGE)
    v1 = v0 if D1 == 0 else load_tile(V, stride_v, keys, Tk, D0, D1, D, EDGE)
    s = dot_t(q0, q1, k0, k1, D1, ACC, PRECISION) * scale_log2
    dp = dot_t(do0, do1, v0, v1, D1, ACC, PRECISION)
    if EDGE:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    ds = ds.to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION, out_dtype=ACC)
    return dq0, dq1


@jit
def attention_dq_kernel(Q, K, V, Out, DOut, Lse, Delta, DQ, Lo, Hi, QBounds, scale, scale_log2, Tq, Tk,
                        stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                        stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt, stride_db, stride_dh, stride_dt,
                        stride_lo, stride_bounds,
                        GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    stat = (b * tl.num_programs(1) + h) * Tq + rows
    Q += b * stride_qb + h.to(tl.int64) * stride_qh
    K += b * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    V += b * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    Out += b * stride_ob + h.to(tl.int64) * stride_oh
    DOut += b * stride_gb + h.to(tl.int64) * stride_gh
    DQ += b * stride_db + h.to(tl.int64) * stride_dh
    lo = tl.load(Lo + b * stride_lo + rows, mask=rows < Tq, other=0)
    hi = tl.load(Hi + b * stride_lo + rows, mask=rows < Tq, other=0)
    lse = tl.load(Lse + stat, mask=rows < Tq, other=float("inf"))
    q0 = load_tile(Q, stride_qt, rows, Tq, 0, D0, D, True)
    do0 = load_tile(DOut, stride_gt, rows, Tq, 0, D0, D, True)
    delta = tl.sum(do0.to(ACC) * load_tile(Out, stride_ot, rows, Tq, 0, D0, D, True).to(ACC), 1)
    dq0 = tl.zeros([BM, D0], ACC)
    if D1 > 0:
        q1 = load_tile(Q, stride_qt, rows, Tq, D0, D1, D, True)
        do1 = load_tile(DOut, stride_gt, rows, Tq, D0, D1, D, True)
        delta += tl.sum(do1.to(ACC) * load_tile(Out, stride_ot, rows, Tq, D0, D1, D, True).to(ACC), 1)
        dq1 = tl.zeros([BM, D1], ACC)
    else:
        q1, do1, dq1 = q0, do0, delta  # never used
    tl.store(Delta + stat, delta, mask=rows < Tq)  # the dk/dv kernel reads it
    start, full, end_full, end = tile_range(QBounds + b * stride_bounds, tile * BM, Tq, Tk, BM, BN, GRAIN)
    for n in range(full, end_full, BN):
        dq0, dq1 = dq_step(dq0, dq1, q0, q1, do0, do1, lse, delta, K, V, stride_kt, stride_vt, n, lo, hi, Tk, scale_log2, D, D0, D1, BN,
                           False, PRECISION)
    for i in range(0, (full - start + end - end_full) // BN):
        n = edge_tile(i, start, full, end_full, BN)
        dq0, dq1 = dq_step(dq0, dq1, q0, q1, do0, do1, lse, delta, K, V, stride_kt, stride_vt, n, lo, hi, Tk, scale_log2, D, D0, D1, BN,
                           True, PRECISION)
    store_tile(DQ, stride_dt, rows, Tq, dq0 * scale, 0, D0, D)
    if D1 > 0:
        store_tile(DQ, stride_dt, rows, Tq, dq1 * scale, D0, D1, D)


@jit
def dkdv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, Q, DOut, Lse, Delta, Lo, Hi, stride_q, stride_g, i, keys, Tq, scale_log2,
              D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = dk0.dtype
    rows = i + tl.arange(0, BM)
    q0 = load_tile(Q, stride_q, rows, Tq, 0, D0, D, EDGE)
    do0 = load_tile(DOut, stride_g, rows, Tq, 0, D0, D, EDGE)
    q1 = q0 if D1 == 0 else load_tile(Q, stride_q, rows, Tq, D0, D1, D, EDGE)
    do1 = do0 if D1 == 0 else load_tile(DOut, stride_g, rows, Tq, D0, D1, D, EDGE)
    lse = tl.load(Lse + rows, mask=rows < Tq, other=float("inf"))
    delta = tl.load(Delta + rows, mask=rows < Tq, other=0.0)
    st = dot_t(k0, k1, q0, q1, D1, ACC, PRECISION) * scale_log2  # (BN, BM): keys first, so that P^T and dS^T need no transposing
    dpt = dot_t(v0, v1, do0, do1, D1, ACC, PRECISION)
    if EDGE:
        lo = tl.load(Lo + rows, mask=rows < Tq, other=0)
        hi = tl.load(Hi + rows, mask=rows < Tq, other=0)
        st = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), st, float("-inf"))
    pt = tl.exp2(st - lse[None, :])
    dst = (pt * (dpt - delta[None, :])).to(q0.dtype)
    pt = pt.to(do0.dtype)
    dv0 = tl.dot(pt, do0, dv0, input_precision=PRECISION, out_dtype=ACC)
    dk0 = tl.dot(dst, q0, dk0, input_precision=PRECISION, out_dtype=ACC)
    if D1 > 0:
        dv1 = tl.dot(pt, do1, dv1, input_precision=PRECISION, out_dtype=ACC)
        dk1 = tl.dot(dst, q1, dk1, input_precision=PRECISION, out_dtype=ACC)
    return dk0, dk1, dv0, dv1


@jit
def attention_dkdv_kernel(Q, K, V, DOut, Lse, Delta, DK, DV, Lo, Hi, KBounds, scale, scale_log2, Tq, Tk,
                          stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
                          stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkh, stride_dkt, stride_dvb, stride_dvh, stride_dvt,
                          stride_lo, stride_bounds,
                          GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                          GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile, hk, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys = tile * BN + tl.arange(0, BN)
    K += b * stride_kb + hk.to(tl.int64) * stride_kh
    V += b * stride_vb + hk.to(tl.int64) * stride_vh
    Lo += b * stride_lo
    Hi += b * stride_lo
    k0 = load_tile(K, stride_kt, keys, Tk, 0, D0, D, True)
    v0 = load_tile(V, stride_vt, keys, Tk, 0, D0, D, True)
    dk0 = tl.zeros([BN, D0], ACC)
    dv0 = tl.zeros([BN, D0], ACC)
    if D1 > 0:
        k1 = load_tile(K, stride_kt, keys, Tk, D0, D1, D, True)
        v1 = load_tile(V, stride_vt, keys, Tk, D0, D1, D, True)
        dk1 = tl.zeros([BN, D1], ACC)
        dv1 = tl.zeros([BN, D1], ACC)
    else:
        k1, v1, dk1, dv1 = k0, v0, scale, scale  # never used
    start, full, end_full, end = tile_range(KBounds + b * stride_bounds, tile * BN, Tk, Tq, BN, BM, GRAIN)
    for g in range(0, GROUP):  # the query heads that share this key head
        h = hk * GROUP + g
        Qh = Q + b * stride_qb + h.to(tl.int64) * stride_qh
        DOh = DOut + b * stride_gb + h.to(tl.int64) * stride_gh
        stat = (b * tl.num_programs(1) * GROUP + h) * Tq
        for i in range(full, end_full, BM):
            dk0, dk1, dv0, dv1 = dkdv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, Qh, DOh, Lse + stat, Delta + stat, Lo, Hi, stride_qt,
                                           stride_gt, i, keys, Tq, scale_log2, D, D0, D1, BM, False, PRECISION)
        for j in range(0, (full - start + end - end_full) // BM):
            i = edge_tile(j, start, full, end_full, BM)
            dk0, dk1, dv0, dv1 = dkdv_step(dk0, dk1, dv0, dv1, k0, k1, v0, v1, Qh, DOh, Lse + stat, Delta + stat, Lo, Hi, stride_qt,
                                           stride_gt, i, keys, Tq, scale_log2, D, D0, D1, BM, True, PRECISION)
    DK += b * stride_dkb + hk.to(tl.int64) * stride_dkh
    DV += b * stride_dvb + hk.to(tl.int64) * stride_dvh
    store_tile(DK, stride_dkt, keys, Tk, dk0 * scale, 0, D0, D)
    store_tile(DV, stride_dvt, keys, Tk, dv0, 0, D0, D)
    if D1 > 0:
        store_tile(DK, stride_dkt, keys, Tk, dk1 * scale, D0, D1, D)
        store_tile(DV, stride_dvt, keys, Tk, dv1, D0, D1, D)


@jit
def attention_decode_kernel(Q, K, V, Part, PartLse, Lo, Hi, scale_log2, Tq, Tk, piece,
                            stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_lo,
                            GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                            PRECISION: tl.constexpr):
    """One piece of the keys for the GROUP * Tq queries that share a key head. Part (pieces, B, Hkv, GROUP * Tq, D), PartLse without D."""
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    s_id, hk, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    r = tl.arange(0, BM)  # query r: head r // Tq of the group, time r % Tq
    here = r < GROUP * Tq
    head, time = hk * GROUP + r // Tq, r % Tq
    lo = tl.load(Lo + b * stride_lo + time, mask=here, other=Tk)
    hi = tl.load(Hi + b * stride_lo + time, mask=here, other=0)
    some = lo < hi
    K += b * stride_kb + hk.to(tl.int64) * stride_kh
    V += b * stride_vb + hk.to(tl.int64) * stride_vh
    q_ptrs = Q + b * stride_qb + head.to(tl.int64)[:, None] * stride_qh + time[:, None] * stride_qt
    c0 = tl.arange(0, D0)
    q0 = tl.load(q_ptrs + c0[None, :], mask=here[:, None] & (c0 < D)[None, :], other=0.0)
    acc0 = tl.zeros([BM, D0], ACC)
    m = tl.full([BM], float("-inf"), ACC)
    l = tl.zeros([BM], ACC)
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        q1 = tl.load(q_ptrs + c1[None, :], mask=here[:, None] & (c1 < D)[None, :], other=0.0)
        acc1 = tl.zeros([BM, D1], ACC)
    else:
        q1, acc1 = q0, l
    start = tl.maximum(s_id * piece, tl.min(tl.where(some, lo, Tk), 0) // BN * BN)
    end = tl.minimum((s_id + 1) * piece, tl.max(tl.where(some, hi, 0), 0))
    for n in range(start, end, BN):
        acc0, acc1, m, l = forward_step(acc0, acc1, m, l, q0, q1, K, V, stride_kt, stride_vt, n, lo, hi, Tk, scale_log2, D, D0, D1, BN,
                                        True, PRECISION)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    row = ((s_id * tl.num_programs(2) + b) * tl.num_programs(1) + hk) * (GROUP * Tq) + r
    tl.store(PartLse + row, tl.where(empty, float("-inf"), m + tl.log2(l)), mask=here)  # -inf: this piece weighs nothing
    tl.store(Part + row[:, None] * D + c0[None, :], acc0 / l[:, None], mask=here[:, None] & (c0 < D)[None, :])
    if D1 > 0:
        tl.store(Part + row[:, None] * D + c1[None, :], acc1 / l[:, None], mask=here[:, None] & (c1 < D)[None, :])


@jit
def attention_join_kernel(Part, PartLse, Out, rows, pieces, D: tl.constexpr, DP: tl.constexpr, PIECES: tl.constexpr):
    """Part (pieces, rows, D) weighted by softmax over the pieces of PartLse -> Out (rows, D)."""
    row = tl.program_id(0)
    i, c = tl.arange(0, PIECES), tl.arange(0, DP)
    lse = tl.load(PartLse + i * rows + row, mask=i < pieces, other=float("-inf"))
    m = tl.max(lse, 0)
    w = tl.exp2(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(w, 0)
    part = tl.load(Part + (i * rows + row)[:, None] * D + c[None, :], mask=(i < pieces)[:, None] & (c < D)[None, :], other=0.0)
    out = tl.sum(part * w[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(Out + row * D + c, out.to(Out.dtype.element_ty), mask=c < D)


# ----------------------------------------------------------------------------------------------------------------------------------------
# the kernels as one differentiable operator that torch.compile leaves in its graph

LOG2E = 1.4426950408889634


def dot_precision(dtype):
    """float32 follows torch.set_float32_matmul_precision: three tf32 products (near float32's accuracy, on tensor cores) or one."""
    if dtype != torch.float32:
        return "ieee"  # half precision and float64 have one way only
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def dense_rows(x):
    """The last axis dense, and (B, H, T, D) with offsets inside a head that fit 32 bits."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.shape[2] * x.stride(2) >= 2 ** 31:
        raise ValueError(f"attention: {x.shape[2]} rows {x.stride(2)} numbers apart need 64-bit offsets; set NANORECA_KERNELS=reference")
    return x


def statistics_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stride(t):  # a plan of one row serves every sample
    return t.stride(0) if t.shape[0] > 1 else 0


@torch.library.custom_op("nanoreca::interval_attention", mutates_args=())
def interval_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, q_bounds: torch.Tensor,
                       k_bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    B, Hq, Tq, D = q.shape
    D0, D1 = split_width(D)
    BM, BN, warps, stages = tiles(D, q.dtype)["forward"]
    out = torch.empty_like(q)
    lse = torch.empty(B, Hq, Tq, dtype=statistics_dtype(q.dtype), device=q.device)
    attention_forward_kernel[(triton.cdiv(Tq, BM), Hq, B)](
        q, k, v, out, lse, lo, hi, q_bounds, D ** -0.5 * LOG2E, Tq, k.shape[2], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *out.stride()[:3], row_stride(lo), row_stride(q_bounds), GROUP=Hq // k.shape[1], D=D, D0=D0, D1=D1, BM=BM, BN=BN, GRAIN=GRAIN,
        PRECISION=dot_precision(q.dtype), num_warps=warps, num_stages=stages)
    return out, lse


@interval_attention.register_fake
def _(q, k, v, lo, hi, q_bounds, k_bounds):
    out = torch.empty_like(q if q.stride(-1) == 1 else q.contiguous())
    return out, q.new_empty(q.shape[:3], dtype=statistics_dtype(q.dtype))


@torch.library.custom_op("nanoreca::interval_attention_backward", mutates_args=())
def interval_attention_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
                                lo: torch.Tensor, hi: torch.Tensor, q_bounds: torch.Tensor, k_bounds: torch.Tensor
                                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, grad = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(grad)
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    D0, D1 = split_width(D)
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    sizes = dict(GROUP=Hq // Hkv, D=D, D0=D0, D1=D1, GRAIN=GRAIN, PRECISION=dot_precision(q.dtype))
    BM, BN, warps, stages = tiles(D, q.dtype)["dq"]
    attention_dq_kernel[(triton.cdiv(Tq, BM), Hq, B)](
        q, k, v, out, grad, lse, delta, dq, lo, hi, q_bounds, D ** -0.5, D ** -0.5 * LOG2E, Tq, Tk, *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], *out.stride()[:3], *grad.stride()[:3], *dq.stride()[:3], row_stride(lo), row_stride(q_bounds), BM=BM, BN=BN,
        **sizes, num_warps=warps, num_stages=stages)
    BM, BN, warps, stages = tiles(D, q.dtype)["dkdv"]
    attention_dkdv_kernel[(triton.cdiv(Tk, BN), Hkv, B)](
        q, k, v, grad, lse, delta, dk, dv, lo, hi, k_bounds, D ** -0.5, D ** -0.5 * LOG2E, Tq, Tk, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], row_stride(lo), row_stride(k_bounds),
        BM=BM, BN=BN, **sizes, num_warps=warps, num_stages=stages)
    return dq, dk, dv


@interval_attention_backward.register_fake
def _(grad, q, k, v, out, lse, lo, hi, q_bounds, k_bounds):
    return tuple(torch.empty_like(t if t.stride(-1) == 1 else t.contiguous()) for t in (q, k, v))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad, _):
    return *interval_attention_backward(grad, *ctx.saved_tensors), None, None, None, None


interval_attention.register_autograd(_backward, setup_context=_setup)


def attention_triton(q, k, v, plan):
    """`attention_reference` by our kernels; q, k, v of one dtype."""
    return interval_attention(q, k, v, plan.lo, plan.hi, *attention_bounds(plan))[0]


@torch.library.custom_op("nanoreca::interval_attention_decode", mutates_args=())
def interval_attention_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    D0, D1 = split_width(D)
    BN = 64 if q.dtype.itemsize == 2 else 32
    pieces = min(32, triton.cdiv(Tk, 4 * BN))  # at least four tiles each
    piece = triton.cdiv(triton.cdiv(Tk, pieces), BN) * BN
    rows = B * Hq * Tq
    part = torch.empty(pieces, rows, D, dtype=statistics_dtype(q.dtype), device=q.device)
    part_lse = torch.empty(pieces, rows, dtype=part.dtype, device=q.device)
    attention_decode_kernel[(pieces, Hkv, B)](
        q, k, v, part, part_lse, lo, hi, D ** -0.5 * LOG2E, Tq, Tk, piece, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        row_stride(lo), GROUP=Hq // Hkv, D=D, D0=D0, D1=D1, BM=max(16, triton.next_power_of_2(Hq // Hkv * Tq)), BN=BN,
        PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=2)
    out = torch.empty(B, Hq, Tq, D, dtype=q.dtype, device=q.device)
    attention_join_kernel[(rows,)](part, part_lse, out, rows, pieces, D=D, DP=triton.next_power_of_2(D),
                                   PIECES=triton.next_power_of_2(pieces), num_warps=1)
    return out


@interval_attention_decode.register_fake
def _(q, k, v, lo, hi):
    return q.new_empty(q.shape)


def attention_decode_triton(q, k, v, plan):
    """The same without gradients, for few queries (Tq * Hq / Hkv <= 64) against many keys."""
    return interval_attention_decode(q, k, v, plan.lo, plan.hi)
