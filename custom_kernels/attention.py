"""Attention over key intervals: query i of row b sees the keys lo[b, i] <= j < hi[b, i].

Every mask of the three models is of this kind. Text: hi = i + 1. A bidirectional image block: hi = end of the block.
Left padding: lo = first real token. So a mask is two integers per query, and a few of them tell what nobody looks at.

The forward pass (online softmax; FlashAttention-2, arXiv 2307.08691): one program owns BM queries of one head and walks
over the keys with a (BM, BN) tile of scores s = q k^T / sqrt(D). Each query keeps m, the largest score so far; l, the
sum of exp(s - m); acc, the sum of exp(s - m) v. When a tile raises m to m', both sums are multiplied by exp(m - m').
The output is acc / l; beside it lse = m + log l is kept: exp(s - lse) is the softmax probability. All is in base 2.

Bounds, once per mask: for every 32 queries the least and greatest lo and hi. Keys outside [min lo, max hi) are never
loaded, those inside [max lo, min hi) need no comparison; the same for every 32 keys and the kernel that owns keys.

The backward pass: with P = softmax(s), O = P V and dO given, dV = P^T dO, dP = dO V^T, dS = P * (dP - delta),
dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D), where delta_i = dO_i . O_i. P is computed again, tile by tile. One kernel
owns queries and sums dQ; another owns keys, and sums dK and dV over all heads that share them. Each output element has
one owner: no atomic additions, so the same input gives the same bits.

An empty interval has output 0 and lse +inf, so that every gradient through it is 0. The sides of a kernel's matrices
are powers of two; other heads are padded with columns of 0."""
import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .pick import autocast, choose, dot_precision, exact, jit, tl, triton
from .products import sdpa

GRAIN = 32  # queries (and keys) per bound; every tile side is a multiple of it
FLEX_BLOCK = 128
FEW_QUERIES = 128  # up to here a dense mask is small, and compiling for every length of a cache would cost more
LOG2E = 1.4426950408889634

@dataclass
class AttentionPlan:
    """What depends on a mask alone; made once by `attention_plan`, shared by all layers."""
    lo: torch.Tensor  # (R, Tq) int32, R = 1 or the batch size
    hi: torch.Tensor  # (R, Tq) int32
    num_keys: int
    kind: str = "mask"  # "full" and "causal" are recognized on the CPU only, where looking costs no host sync
    cache: dict = field(default_factory=dict)  # masks and bounds, made on first use

def attention_plan(lo, hi, num_keys):
    """Intervals lo, hi (R, Tq) of integers, R = 1 or the batch size -> AttentionPlan. Ends outside [0, num_keys] are
    clamped to it; a query with hi <= lo sees nothing. ValueError where the shapes are not two equal (R, Tq)."""
    if lo.shape != hi.shape or lo.dim() != 2:
        raise ValueError(f"attention_plan: lo {tuple(lo.shape)} and hi {tuple(hi.shape)}, not twice (rows, queries)")
    plan = AttentionPlan(lo.clamp(0, num_keys).int(), hi.clamp(0, num_keys).int(), num_keys)
    if lo.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lo <= 0).all()):
        if bool((hi >= num_keys).all()):
            plan.kind = "full"
        elif hi.shape[1] == num_keys and bool((hi == torch.arange(1, num_keys + 1)).all()):
            plan.kind = "causal"
    if lo.is_cuda and lo.shape[1] > FEW_QUERIES:  # made here, outside of the blocks that recomputation runs twice
        choice = choose("attention", None, lo.device)
        if choice == "flex":
            flex_block_mask(plan)
        elif choice == "triton":
            attention_bounds(plan)
    return plan

def interval_mask(lo, hi, num_keys):
    """The same mask as a table: lo, hi (R, Tq) -> (R, 1, Tq, Tk) bool, True = may attend."""
    keys = torch.arange(num_keys, device=lo.device)
    return ((keys >= lo[..., None]) & (keys < hi[..., None])).unsqueeze(1)

def attention(q, k, v, lo, hi, plan=None):
    """Softmax attention in which query i of row b sees the keys [lo[b, i], hi[b, i]): q (B, Hq, Tq, D), k and v
    (B, Hkv, Tk, D), Hq a multiple of Hkv, lo and hi (B or 1, Tq) integers, scale D**-0.5 -> (B, Hq, Tq, D). A query
    with an empty interval gives 0. `plan` = attention_plan(lo, hi, Tk): pass it where several layers share a mask (lo
    and hi are then not looked at and may be None)."""
    if plan is None:
        plan = attention_plan(lo, hi, k.shape[2])
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    choice = choose("attention", q.shape[3], q.device)
    if choice == "reference" or (q.shape[2] <= FEW_QUERIES and not trains):
        return attention_reference(q, k, v, plan)
    q, k, v = autocast(q, k, v)
    return (attention_flex if choice == "flex" else attention_triton)(q, k, v, plan)

# ---------------------------------------------------------------------------------------------------------------------
# the reference, and FlexAttention

def attention_reference(q, k, v, plan):
    """The specification of `attention` and its path on CPUs."""
    gqa = q.shape[1] != k.shape[1]
    if plan.kind in ("full", "causal"):
        return sdpa(q, k, v, is_causal=plan.kind == "causal", enable_gqa=gqa)
    if q.device.type == "cpu":  # an additive mask spares SDPA a conversion per layer; a row of -inf gives 0 on CPUs
        if q.dtype not in plan.cache:
            mask = interval_mask(plan.lo, plan.hi, plan.num_keys)
            plan.cache[q.dtype] = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        return sdpa(q, k, v, attn_mask=plan.cache[q.dtype], enable_gqa=gqa)
    if "mask" not in plan.cache:  # elsewhere a row of nothing may give nan: it looks at everything and is then zeroed
        empty = (plan.hi <= plan.lo)[:, None, :, None]
        plan.cache["mask"] = interval_mask(plan.lo, plan.hi, plan.num_keys) | empty, empty
    mask, empty = plan.cache["mask"]
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=gqa).masked_fill(empty, 0.0)

def flex_block_mask(plan, block=FLEX_BLOCK):
    """The plan as FlexAttention's BlockMask: the tiles that hold something, and those that all their queries see."""
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
            order = tiles.int().argsort(dim=-1, descending=True, stable=True)
            return tiles.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

        def sees(b, h, i, j):
            row = b * (R > 1)  # a plan of one row serves every sample
            return (j >= lo[row, i]) & (j < hi[row, i])

        plan.cache["flex"] = BlockMask.from_kv_blocks(*lists(some & ~every), *lists(every), BLOCK_SIZE=block,
                                                      mask_mod=sees, seq_lengths=(Tq, Tk))
    return plan.cache["flex"]

@functools.cache
def compiled_flex():
    # towers, batch parts and image sizes are many shapes of one function; beyond the limit it would hold dense scores
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention)

def attention_flex(q, k, v, plan):
    """FlexAttention with the plan's tiles; compiled, except on a CPU, where it is only a check."""
    flex = flex_attention if q.device.type == "cpu" or torch.compiler.is_compiling() else compiled_flex()
    return flex(q, k, v, block_mask=flex_block_mask(plan), enable_gqa=q.shape[1] != k.shape[1])

# ---------------------------------------------------------------------------------------------------------------------
# the kernels; x_b, x_h and x_t are the strides of X's batch, head and time axes, scale2 is scale * log2(e)

def attention_bounds(plan):
    """-> for every GRAIN queries (R, nq, 4) int32 [min lo, max lo, min hi, max hi]; for every GRAIN keys the same four
    about queries, (R, nk, 4) int32 [first that may see one of them, start and end of a run that sees all of them, end].
    An empty interval hides every key from "all" and asks for none."""
    if "bounds" not in plan.cache:
        lo, hi, Tk = plan.lo, plan.hi, plan.num_keys
        Tq, some = lo.shape[1], hi > lo
        lo, hi = lo.masked_fill(~some, Tk), hi.masked_fill(~some, 0)

        def over(values, pad, reduce):
            return getattr(F.pad(values, (0, -Tq % GRAIN), value=pad).unflatten(1, (-1, GRAIN)), reduce)(2)  # (R, nq)

        q_bounds = [over(lo, Tk, "amin"), over(lo, 0, "amax"), over(hi, Tk, "amin"), over(hi, 0, "amax")]
        q_bounds = torch.stack(q_bounds, 2)
        key = torch.arange(0, Tk, GRAIN, device=lo.device)  # (nk,)
        query = torch.arange(0, Tq, GRAIN, device=lo.device)[:, None]  # (nq, 1)
        touch = (q_bounds[..., 0:1] < key + GRAIN) & (q_bounds[..., 3:4] > key)  # (R, nq, nk)
        sees_all = (q_bounds[..., 1:2] <= key) & (q_bounds[..., 2:3] >= (key + GRAIN).clamp(max=Tk))
        full = torch.where(sees_all, query, Tq).amin(1, keepdim=True)
        full_end = torch.where(~sees_all & (query > full), query, Tq).amin(1)
        first, end = torch.where(touch, query, Tq).amin(1), torch.where(touch, query + GRAIN, 0).amax(1).clamp(max=Tq)
        k_bounds = torch.stack([first, full[:, 0], full_end, end], 2)
        plan.cache["bounds"] = q_bounds.int().contiguous(), k_bounds.int().contiguous()
    return plan.cache["bounds"]

def tiles(D, dtype):
    """Tile sides (queries, keys), warps and pipeline stages of each kernel: of those tried the largest that the
    compiler fits into an A100's and an H100's registers with hardly a spill (tests/test_kernels_compile.py)."""
    if dtype.itemsize > 2:
        return dict(forward=(64, 32, 4, 2), dq=(64, 32, 4, 1), dkdv=(32, 32, 4, 1))
    return dict(forward=(128, 64, 4 if D <= 64 else 8, 3), dq=(128, 64 if D <= 64 else 32, 8, 2),
                dkdv=(32, 64 if D % 16 else 128, 8, 2))  # rows like 72 numbers are loaded in small pieces

@jit
def load_tile(ptr, stride, rows, limit, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr):
    """-> (rows, WIDTH); rows >= limit (where CHECK) and columns >= D give 0."""
    cols = tl.arange(0, WIDTH)
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    if CHECK:
        return tl.load(ptrs, mask=(rows < limit)[:, None] & (cols < D)[None, :], other=0.0)
    elif WIDTH > D:
        return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(ptrs)

@jit
def store_tile(ptr, stride, rows, limit, tile, D: tl.constexpr, WIDTH: tl.constexpr):
    cols = tl.arange(0, WIDTH)
    mask = (rows < limit)[:, None] & (cols < D)[None, :]
    tl.store(ptr + rows[:, None] * stride + cols[None, :], tile, mask=mask)

@jit
def tile_range(Bounds, own, own_limit, limit, OWN: tl.constexpr, WALK: tl.constexpr, GRAIN: tl.constexpr):
    """A program owns OWN queries (or keys) from `own` on and walks over the keys (queries) in tiles of WALK: those in
    [full, end_full) are seen as a whole, those in [start, full) and [end_full, end) hold edges."""
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
def forward_step(acc, m, l, q, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D: tl.constexpr, WIDTH: tl.constexpr,
                 BN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = m.dtype
    keys = n + tl.arange(0, BN)
    k = load_tile(K, k_t, keys, Tk, D, WIDTH, EDGE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale2  # (BM, BN)
    if EDGE:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    new_m = tl.maximum(m, tl.max(s, 1))
    base = new_m
    if EDGE:  # a query that has not seen a key yet: -inf - -inf would be nan
        base = tl.where(new_m == float("-inf"), 0.0, new_m)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    v = load_tile(V, v_t, keys, Tk, D, WIDTH, EDGE)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION, out_dtype=ACC)
    return acc, new_m, l * shrink + tl.sum(p, 1)

@jit
def attention_forward_kernel(Q, K, V, Out, Lse, Lo, Hi, QBounds, scale2, Tq, Tk,
                             q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, lo_b, bounds_b,
                             GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                             BM: tl.constexpr, BN: tl.constexpr, GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal rows get longer downwards: the longest first
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    lo = tl.load(Lo + b * lo_b + rows, mask=rows < Tq, other=0)
    hi = tl.load(Hi + b * lo_b + rows, mask=rows < Tq, other=0)
    q = load_tile(Q + b * q_b + h * q_h, q_t, rows, Tq, D, WIDTH, True)
    acc = tl.zeros([BM, WIDTH], ACC)
    m = tl.full([BM], float("-inf"), ACC)
    l = tl.zeros([BM], ACC)
    start, full, end_full, end = tile_range(QBounds + b * bounds_b, tile * BM, Tq, Tk, BM, BN, GRAIN)
    for n in range(full, end_full, BN):
        acc, m, l = forward_step(acc, m, l, q, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D, WIDTH, BN, False, PRECISION)
    for i in range(0, (full - start + end - end_full) // BN):
        n = edge_tile(i, start, full, end_full, BN)
        acc, m, l = forward_step(acc, m, l, q, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D, WIDTH, BN, True, PRECISION)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    store_tile(Out + b * o_b + h * o_h, o_t, rows, Tq, acc * (1 / l[:, None]), D, WIDTH)
    lse = tl.where(empty, float("inf"), m + tl.log2(l))
    tl.store(Lse + (b * tl.num_programs(1) + h) * Tq + rows, lse, mask=rows < Tq)

@jit
def dq_step(dq, q, do, lse, delta, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D: tl.constexpr, WIDTH: tl.constexpr,
            BN: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = lse.dtype
    keys = n + tl.arange(0, BN)
    k = load_tile(K, k_t, keys, Tk, D, WIDTH, EDGE)
    v = load_tile(V, v_t, keys, Tk, D, WIDTH, EDGE)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * scale2
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION, out_dtype=ACC)
    if EDGE:
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION, out_dtype=ACC)

@jit
def attention_dq_kernel(Q, K, V, Out, DOut, Lse, Delta, DQ, Lo, Hi, QBounds, scale, scale2, Tq, Tk,
                        q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
                        lo_b, bounds_b, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tile * BM + tl.arange(0, BM)
    stat = (b * tl.num_programs(1) + h) * Tq + rows
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    lo = tl.load(Lo + b * lo_b + rows, mask=rows < Tq, other=0)
    hi = tl.load(Hi + b * lo_b + rows, mask=rows < Tq, other=0)
    lse = tl.load(Lse + stat, mask=rows < Tq, other=float("inf"))
    q = load_tile(Q + b * q_b + h * q_h, q_t, rows, Tq, D, WIDTH, True)
    do = load_tile(DOut + b * do_b + h * do_h, do_t, rows, Tq, D, WIDTH, True)
    out = load_tile(Out + b * o_b + h * o_h, o_t, rows, Tq, D, WIDTH, True)
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    tl.store(Delta + stat, delta, mask=rows < Tq)  # the dk/dv kernel reads it
    dq = tl.zeros([BM, WIDTH], ACC)
    start, full, end_full, end = tile_range(QBounds + b * bounds_b, tile * BM, Tq, Tk, BM, BN, GRAIN)
    for n in range(full, end_full, BN):
        dq = dq_step(dq, q, do, lse, delta, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D, WIDTH, BN, False, PRECISION)
    for i in range(0, (full - start + end - end_full) // BN):
        n = edge_tile(i, start, full, end_full, BN)
        dq = dq_step(dq, q, do, lse, delta, K, V, k_t, v_t, n, lo, hi, Tk, scale2, D, WIDTH, BN, True, PRECISION)
    store_tile(DQ + b * dq_b + h * dq_h, dq_t, rows, Tq, dq * scale, D, WIDTH)

@jit
def dkdv_step(dk, dv, k, v, Q, DOut, Lse, Delta, Lo, Hi, q_t, do_t, i, keys, Tq, scale2, D: tl.constexpr,
              WIDTH: tl.constexpr, BM: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = dk.dtype
    rows = i + tl.arange(0, BM)
    q = load_tile(Q, q_t, rows, Tq, D, WIDTH, EDGE)
    do = load_tile(DOut, do_t, rows, Tq, D, WIDTH, EDGE)
    lse = tl.load(Lse + rows, mask=rows < Tq, other=float("inf"))
    delta = tl.load(Delta + rows, mask=rows < Tq, other=0.0)
    # (BN, BM): keys first, so that P^T and dS^T need no transposing
    st = tl.dot(k, tl.trans(q), input_precision=PRECISION, out_dtype=ACC) * scale2
    dpt = tl.dot(v, tl.trans(do), input_precision=PRECISION, out_dtype=ACC)
    if EDGE:
        lo = tl.load(Lo + rows, mask=rows < Tq, other=0)
        hi = tl.load(Hi + rows, mask=rows < Tq, other=0)
        st = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), st, float("-inf"))
    pt = tl.exp2(st - lse[None, :])
    dst = (pt * (dpt - delta[None, :])).to(q.dtype)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision=PRECISION, out_dtype=ACC)
    return tl.dot(dst, q, dk, input_precision=PRECISION, out_dtype=ACC), dv

@jit
def attention_dkdv_kernel(Q, K, V, DOut, Lse, Delta, DK, DV, Lo, Hi, KBounds, scale, scale2, Tq, Tk,
                          q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t,
                          dv_b, dv_h, dv_t, lo_b, bounds_b, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
                          BM: tl.constexpr, BN: tl.constexpr, GRAIN: tl.constexpr, PRECISION: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if Q.dtype.element_ty == tl.float64 else tl.float32
    tile, hk, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    keys = tile * BN + tl.arange(0, BN)
    Lo += b * lo_b
    Hi += b * lo_b
    k = load_tile(K + b * k_b + hk * k_h, k_t, keys, Tk, D, WIDTH, True)
    v = load_tile(V + b * v_b + hk * v_h, v_t, keys, Tk, D, WIDTH, True)
    dk = tl.zeros([BN, WIDTH], ACC)
    dv = tl.zeros([BN, WIDTH], ACC)
    start, full, end_full, end = tile_range(KBounds + b * bounds_b, tile * BN, Tk, Tq, BN, BM, GRAIN)
    for g in range(0, GROUP):  # the query heads that share this key head
        h = hk * GROUP + g
        Qh = Q + b * q_b + h * q_h
        DOh = DOut + b * do_b + h * do_h
        stat = (b * tl.num_programs(1) * GROUP + h) * Tq
        for i in range(full, end_full, BM):
            dk, dv = dkdv_step(dk, dv, k, v, Qh, DOh, Lse + stat, Delta + stat, Lo, Hi, q_t, do_t, i, keys, Tq,
                               scale2, D, WIDTH, BM, False, PRECISION)
        for j in range(0, (full - start + end - end_full) // BM):
            i = edge_tile(j, start, full, end_full, BM)
            dk, dv = dkdv_step(dk, dv, k, v, Qh, DOh, Lse + stat, Delta + stat, Lo, Hi, q_t, do_t, i, keys, Tq,
                               scale2, D, WIDTH, BM, True, PRECISION)
    store_tile(DK + b * dk_b + hk * dk_h, dk_t, keys, Tk, dk * scale, D, WIDTH)
    store_tile(DV + b * dv_b + hk * dv_h, dv_t, keys, Tk, dv, D, WIDTH)

# ---------------------------------------------------------------------------------------------------------------------
# the kernels as differentiable operators that torch.compile leaves in its graph

def dense_rows(x):
    """(B, H, T, D) with its last axis dense and offsets inside a head that fit 32 bits."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.shape[2] * x.stride(2) >= 2 ** 31:
        raise ValueError(f"attention: {x.shape[2]} rows {x.stride(2)} numbers apart need 64-bit offsets; "
                         "set NANORECA_KERNELS=reference")
    return x

def strides(*tensors):
    return [n for t in tensors for n in t.stride()[:3]]

def options(kernel, q, k, lo, bounds):
    """The arguments that a kernel takes by name; a plan of one row serves every sample."""
    D = q.shape[3]
    BM, BN, warps, stages = tiles(D, q.dtype)[kernel]
    lo_b, bounds_b = (t.stride(0) if t.shape[0] > 1 else 0 for t in (lo, bounds))
    return dict(lo_b=lo_b, bounds_b=bounds_b, GROUP=q.shape[1] // k.shape[1], D=D,
                WIDTH=max(16, triton.next_power_of_2(D)), BM=BM, BN=BN, GRAIN=GRAIN, PRECISION=dot_precision(q.dtype),
                num_warps=warps, num_stages=stages)

@torch.library.custom_op("nanoreca::interval_attention", mutates_args=())
def interval_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor,
                       q_bounds: torch.Tensor, k_bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    B, Hq, Tq, D = q.shape
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=exact(q))
    named = options("forward", q, k, lo, q_bounds)
    attention_forward_kernel[(triton.cdiv(Tq, named["BM"]), Hq, B)](
        q, k, v, out, lse, lo, hi, q_bounds, D ** -0.5 * LOG2E, Tq, k.shape[2], *strides(q, k, v, out), **named)
    return out, lse

@interval_attention.register_fake
def _(q, k, v, lo, hi, q_bounds, k_bounds):
    return torch.empty_like(q if q.stride(-1) == 1 else q.contiguous()), q.new_empty(q.shape[:3], dtype=exact(q))

@torch.library.custom_op("nanoreca::interval_attention_backward", mutates_args=())
def interval_attention_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                                out: torch.Tensor, lse: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor,
                                q_bounds: torch.Tensor, k_bounds: torch.Tensor
                                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, grad = dense_rows(q), dense_rows(k), dense_rows(v), dense_rows(grad)
    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    numbers = D ** -0.5, D ** -0.5 * LOG2E, Tq, Tk
    named = options("dq", q, k, lo, q_bounds)
    attention_dq_kernel[(triton.cdiv(Tq, named["BM"]), Hq, B)](
        q, k, v, out, grad, lse, delta, dq, lo, hi, q_bounds, *numbers, *strides(q, k, v, out, grad, dq), **named)
    named = options("dkdv", q, k, lo, k_bounds)
    attention_dkdv_kernel[(triton.cdiv(Tk, named["BN"]), Hkv, B)](
        q, k, v, grad, lse, delta, dk, dv, lo, hi, k_bounds, *numbers, *strides(q, k, v, grad, dk, dv), **named)
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
