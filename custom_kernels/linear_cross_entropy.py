"""Cross entropy of a linear layer's output without all logits at once (20,000 x 151,936 in float32: 12 GB, twice).

The gradient of a row's loss in its logits is softmax - onehot, known as soon as they are. So a chunk of rows at a time:
logits, loss, gradient in their place, and its products with weight and with hidden. The gradients are ready when the
forward pass ends; the backward pass multiplies them by a scalar. Three matrix products, as in the plain way.

Two ways beside the plain reference: `chunked` in PyTorch, and Triton kernels, which spend no product on the ignored
labels: a stable sort puts the kept rows first, and a program whose rows lie behind them returns at once. No host sync,
no shape that depends on data."""
import torch
import torch.nn.functional as F

from .pick import autocast, choose, dot_precision, exact, jit, tl, triton

def linear_cross_entropy(hidden, weight, labels, bias=None, ignore_index=-100, count=None):
    """Sum over the rows with labels[i] != ignore_index of -log softmax(hidden @ weight.T + bias)[labels[i]], divided by
    `count`, or where that is None by the number of those rows (no such row: 0, with gradient 0). hidden (N, D), weight
    (V, D), bias (V,), labels (N,) int64, count a 0-dim tensor or a number -> float32 scalar. On CUDA never more than a
    chunk of the logits exists."""
    choice = choose("linear_cross_entropy", weight.shape[0], hidden.device)
    if choice == "reference":
        return linear_cross_entropy_reference(hidden, weight, labels, bias, ignore_index, count)
    hidden, weight, bias = autocast(hidden, weight, bias)
    return linear_cross_entropy_fused(hidden, weight, labels, bias, ignore_index, count, kernels=choice == "triton")

def linear_cross_entropy_reference(hidden, weight, labels, bias=None, ignore_index=-100, count=None):
    """The specification of `linear_cross_entropy` and its path on CPUs."""
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # only here is counting no host sync
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if kept.numel() < labels.numel():
            hidden, labels = hidden[kept], labels[kept]
    logits = F.linear(hidden, weight, bias)
    total = F.cross_entropy(logits.to(exact(logits)), labels, ignore_index=ignore_index, reduction="sum")
    return total / ((labels != ignore_index).sum().clamp(min=1) if count is None else count)

def chunk_rows(N, V, numbers):
    """Rows per chunk so that a chunk's logits are about `numbers` numbers."""
    return max(1, min(N, max(256, numbers // V // 256 * 256)))

def chunked(hidden, weight, bias, labels, inv_count, ignore_index, gradients):
    """-> loss, and where `gradients` those of hidden (in its dtype), weight and bias (float32), else empty tensors."""
    N, V = hidden.shape[0], weight.shape[0]
    loss = torch.zeros((), dtype=exact(hidden), device=hidden.device)
    dhidden = hidden.new_empty(hidden.shape)
    dweight = loss.new_zeros(weight.shape if gradients else 0)
    dbias = loss.new_zeros(V if gradients and bias is not None else 0)
    chunk = chunk_rows(N, V, 2 ** 27)
    for i in range(0, N, chunk):
        h, y = hidden[i:i + chunk], labels[i:i + chunk]
        keep = (y != ignore_index).to(loss.dtype)
        y = torch.where(y != ignore_index, y, 0)[:, None]
        logits = F.linear(h, weight, bias).to(loss.dtype)  # (chunk, V)
        lse = logits.logsumexp(1, keepdim=True)
        loss += ((lse - logits.gather(1, y)).squeeze(1) * keep).sum()
        if gradients:
            p = logits.sub_(lse).exp_().scatter_add_(1, y, logits.new_full(y.shape, -1.0)).mul_(keep[:, None])
            if bias is not None:
                dbias += p.sum(0)
            p = p.to(h.dtype)
            dhidden[i:i + chunk] = (p @ weight).mul_(inv_count)  # scaled after the product, where float16 loses less
            dweight += p.t() @ h
    dweight.mul_(inv_count)
    dbias.mul_(inv_count)
    return loss * inv_count, dhidden if gradients else loss.new_empty(0), dweight, dbias

# ---------------------------------------------------------------------------------------------------------------------
# the kernels; the first Kept rows of H and Labels are the kept ones

@jit
def load_block(ptr, rows, stride, rows_here, cols, cols_here):
    ptrs = ptr + rows[:, None] * stride + cols[None, :]
    return tl.load(ptrs, mask=rows_here[:, None] & cols_here[None, :], other=0.0)

@jit
def ce_logits_kernel(H, W, Bias, Labels, Kept, Logits, Max, Sum, Picked, first, V, stride_l, chunk, D: tl.constexpr,
                     HAS_BIAS: tl.constexpr, STORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                     PRECISION: tl.constexpr):
    """One tile of a chunk's logits, its rows' maxima and sums of exponentials, and the labels' logits that are here."""
    ACC: tl.constexpr = tl.float64 if H.dtype.element_ty == tl.float64 else tl.float32
    m, n = tl.program_id(0), tl.program_id(1)  # neighbors share a tile of the large weight
    kept = tl.load(Kept)
    local = m * BM + tl.arange(0, BM)
    if first + m * BM >= kept:
        return
    here = (local < chunk) & (first + local < kept)
    rows = first + local
    cols = n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    for k in range(0, D, BK):
        d = k + tl.arange(0, BK)
        h = load_block(H, rows, D, here, d, d < D)
        w = load_block(W, cols, D, cols < V, d, d < D)
        acc = tl.dot(h, tl.trans(w), acc, input_precision=PRECISION, out_dtype=ACC)
    if HAS_BIAS:
        acc += tl.load(Bias + cols, mask=cols < V, other=0.0).to(ACC)[None, :]
    logits = acc.to(H.dtype.element_ty)  # rounded as a linear layer's output would be, and used so from here on
    acc = tl.where((cols < V)[None, :], logits.to(ACC), float("-inf"))
    if STORE:
        ptrs = Logits + local[:, None] * stride_l + cols[None, :]
        tl.store(ptrs, logits, mask=here[:, None] & (cols < V)[None, :])
    top = tl.max(acc, 1)
    tl.store(Max + n * chunk + local, top, mask=here)
    tl.store(Sum + n * chunk + local, tl.sum(tl.exp(acc - top[:, None]), 1), mask=here)
    label = tl.load(Labels + rows, mask=here, other=-1)
    mine = (label >= n * BN) & (label < n * BN + BN)
    tl.store(Picked + local, tl.sum(tl.where(cols[None, :] == label[:, None], acc, 0.0), 1), mask=here & mine)

@jit
def ce_softmax_kernel(Labels, Kept, Logits, Max, Sum, Picked, Loss, first, V, stride_l, chunk, tiles_n,
                      SWEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One row: its loss, and (SWEEP) softmax - onehot in place of its logits."""
    local = tl.program_id(0)
    row = first + local
    if row >= tl.load(Kept):
        return
    i = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), Max.dtype.element_ty)
    for n in range(0, tiles_n, BLOCK):
        top = tl.maximum(top, tl.load(Max + (n + i) * chunk + local, mask=n + i < tiles_n, other=float("-inf")))
    top = tl.max(top, 0)
    total = tl.zeros([BLOCK], Max.dtype.element_ty)
    for n in range(0, tiles_n, BLOCK):
        part_top = tl.load(Max + (n + i) * chunk + local, mask=n + i < tiles_n, other=float("-inf"))
        total += tl.load(Sum + (n + i) * chunk + local, mask=n + i < tiles_n, other=0.0) * tl.exp(part_top - top)
    lse = top + tl.log(tl.sum(total, 0))
    tl.store(Loss + row, lse - tl.load(Picked + local))
    if SWEEP:
        label = tl.load(Labels + row)
        for n in range(0, V, BLOCK):
            ptrs = Logits + local * stride_l + n + i
            p = tl.exp(tl.load(ptrs, mask=n + i < V, other=0.0).to(Max.dtype.element_ty) - lse)
            tl.store(ptrs, tl.where(n + i == label, p - 1.0, p), mask=n + i < V)

@jit
def ce_dhidden_kernel(P, W, Kept, Inv, DH, first, V, stride_l, chunk, D: tl.constexpr, BM: tl.constexpr,
                      BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk's gradient of hidden: P (chunk, V) W (V, D)."""
    ACC: tl.constexpr = tl.float64 if W.dtype.element_ty == tl.float64 else tl.float32
    m, n = tl.program_id(0), tl.program_id(1)
    kept = tl.load(Kept)
    if first + m * BM >= kept:
        return
    local = m * BM + tl.arange(0, BM)
    here = (local < chunk) & (first + local < kept)
    cols = n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    for k in range(0, V, BK):
        v = k + tl.arange(0, BK)
        p = load_block(P, local, stride_l, here, v, v < V)
        w = load_block(W, v, D, v < V, cols, cols < D)
        acc = tl.dot(p, w, acc, input_precision=PRECISION, out_dtype=ACC)
    out = DH + (first + local)[:, None] * D + cols[None, :]
    tl.store(out, acc * tl.load(Inv), mask=here[:, None] & (cols < D)[None, :])

@jit
def ce_dweight_kernel(P, H, Kept, Inv, DW, DB, first, V, stride_l, chunk, D: tl.constexpr, HAS_BIAS: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """A chunk's term of the gradient of weight, P^T (V, chunk) H (chunk, D), added to what earlier chunks left."""
    ACC: tl.constexpr = tl.float64 if H.dtype.element_ty == tl.float64 else tl.float32
    n, m = tl.program_id(0), tl.program_id(1)
    rows_here = tl.minimum(tl.load(Kept) - first, chunk)
    if rows_here <= 0:
        return
    v = m * BM + tl.arange(0, BM)
    cols = n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], ACC)
    dbias = tl.zeros([BM], ACC)
    for k in range(0, rows_here, BK):
        local = k + tl.arange(0, BK)
        p = load_block(P, local, stride_l, local < rows_here, v, v < V)
        h = load_block(H, first + local, D, local < rows_here, cols, cols < D)
        acc = tl.dot(tl.trans(p), h, acc, input_precision=PRECISION, out_dtype=ACC)
        if HAS_BIAS:
            dbias += tl.sum(p.to(ACC), 0)
    inv = tl.load(Inv)
    old = load_block(DW, v, D, v < V, cols, cols < D)
    tl.store(DW + v[:, None] * D + cols[None, :], old + acc * inv, mask=(v < V)[:, None] & (cols < D)[None, :])
    if HAS_BIAS:
        if n == 0:
            tl.store(DB + v, tl.load(DB + v, mask=v < V, other=0.0) + dbias * inv, mask=v < V)

def by_kernels(hidden, weight, bias, labels, inv_count, ignore_index, gradients):
    """`chunked` by our kernels."""
    (N, D), V, dtype, has_bias = hidden.shape, weight.shape[0], hidden.dtype, bias is not None
    if N * D >= 2 ** 31 or V * D >= 2 ** 31:
        raise ValueError(f"linear_cross_entropy: {N} rows or {V} classes of width {D} need 64-bit offsets; "
                         "set NANORECA_KERNELS=reference")
    ignored = labels == ignore_index
    order = ignored.to(torch.uint8).argsort(stable=True)
    hidden, labels, weight, kept = hidden[order], labels[order], weight.contiguous(), (N - ignored.sum()).int()
    BM, BN, BK = (128, 128, 64) if dtype.itemsize == 2 else (64, 64, 32)
    launch = dict(D=D, BM=BM, BN=BN, BK=BK, num_warps=8, num_stages=3, PRECISION=dot_precision(dtype))
    chunk = chunk_rows(N, V, 2 ** 28)
    tiles_m, tiles_n, tiles_d = triton.cdiv(chunk, BM), triton.cdiv(V, BN), triton.cdiv(D, BN)
    stride_l = triton.cdiv(V, 64) * 64  # rows that start aligned, whatever the vocabulary
    logits = hidden.new_empty((chunk, stride_l) if gradients else 1)
    loss = hidden.new_zeros(N, dtype=exact(hidden))
    top, total, picked = loss.new_empty(tiles_n, chunk), loss.new_empty(tiles_n, chunk), loss.new_empty(chunk)
    dhidden = torch.zeros_like(hidden) if gradients else loss.new_zeros(0)  # ignored rows are never written
    dweight, dbias = loss.new_zeros((V, D) if gradients else 0), loss.new_zeros(V if gradients and has_bias else 0)
    for first in range(0, N, chunk):
        place = first, V, stride_l, chunk
        ce_logits_kernel[(tiles_m, tiles_n)](hidden, weight, bias, labels, kept, logits, top, total, picked, *place,
                                               HAS_BIAS=has_bias, STORE=gradients, **launch)
        ce_softmax_kernel[(min(chunk, N - first),)](labels, kept, logits, top, total, picked, loss, *place, tiles_n,
                                                    SWEEP=gradients, BLOCK=1024, num_warps=4)
        if gradients:
            ce_dhidden_kernel[(tiles_m, tiles_d)](logits, weight, kept, inv_count, dhidden, *place, **launch)
            ce_dweight_kernel[(tiles_d, triton.cdiv(V, BM))](logits, hidden, kept, inv_count, dweight, dbias, *place,
                                                               HAS_BIAS=has_bias, **launch)
    if gradients:
        dhidden = torch.empty_like(dhidden).index_copy_(0, order, dhidden)
    return loss.sum() * inv_count, dhidden, dweight, dbias

# ---------------------------------------------------------------------------------------------------------------------
# one differentiable operator for both, which torch.compile leaves in its graph

@torch.library.custom_op("nanoreca::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor,
                            inv_count: torch.Tensor, ignore_index: int, gradients: bool, kernels: bool
                            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return (by_kernels if kernels else chunked)(hidden, weight, bias, labels, inv_count, ignore_index, gradients)

@linear_cross_entropy_op.register_fake
def _(hidden, weight, bias, labels, inv_count, ignore_index, gradients, kernels):
    loss = hidden.new_empty((), dtype=exact(hidden))
    if not gradients:
        return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    dbias = loss.new_empty(0 if bias is None else bias.shape)
    return loss, hidden.new_empty(hidden.shape), loss.new_empty(weight.shape), dbias

def _setup(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.dtypes = inputs[1].dtype, None if inputs[2] is None else inputs[2].dtype

def _backward(ctx, grad, *_):
    dhidden, dweight, dbias = ctx.saved_tensors
    weight_type, bias_type = ctx.dtypes
    dbias = None if bias_type is None else (dbias * grad).to(bias_type)
    return (dhidden * grad).to(dhidden.dtype), (dweight * grad).to(weight_type), dbias, None, None, None, None, None

linear_cross_entropy_op.register_autograd(_backward, setup_context=_setup)

def linear_cross_entropy_fused(hidden, weight, labels, bias=None, ignore_index=-100, count=None, kernels=True):
    """`linear_cross_entropy_reference` chunk by chunk, by Triton or (kernels=False) by PyTorch."""
    if count is None:
        count = (labels != ignore_index).sum().clamp(min=1)
    elif not torch.is_tensor(count):
        count = torch.full((), count, device=hidden.device)
    inv_count = count.to(exact(hidden)).reciprocal()
    gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    return linear_cross_entropy_op(hidden, weight, bias, labels, inv_count, ignore_index, gradients, kernels)[0]
