"""The memory-bound parts of a diffusion loss: adaptive LayerNorm, gated residual, the loss of each row.

Harmon's per-token diffusion MLP is small matrices and many rows (4 copies of every masked token), so what lies between its matrix products
costs as much as they do: eager PyTorch reads and writes the rows once per elementary operation, forward and backward. Each kernel here
reads its rows once and writes them once, in both directions; all arithmetic is float32 whatever the rows are stored in. BAGEL uses the flow
loss.
"""
import math

import torch
import torch.nn.functional as F

from .pick import jit, tl, triton


def diffusion_tables(betas):
    """Noise schedule betas (T,) -> (T, 5) float32, computed in float64. Columns, with a_t the cumulative product of 1 - beta:
    0 sqrt(a_t) and 1 sqrt(1 - a_t): x_t = [0] x0 + [1] noise;
    2 what an error of 1 in epsilon does to the posterior mean, c1_t sqrt(1/a_t - 1), with c1_t = beta_t sqrt(a_{t-1}) / (1 - a_t);
    3 log beta_t, the upper end of the learned log variance; 4 log of the posterior variance (entry 0 copies entry 1), the lower end."""
    betas = betas.double()
    acp = torch.cumprod(1 - betas, 0)
    prev = torch.cat([acp.new_ones(1), acp[:-1]])
    variance = betas * (1 - prev) / (1 - acp)
    log_variance = torch.cat([variance[1:2], variance[1:]]).log()
    mean_error = betas * prev.sqrt() / (1 - acp) * (1 / acp - 1).sqrt()
    return torch.stack([acp.sqrt(), (1 - acp).sqrt(), mean_error, betas.log(), log_variance], 1).float()


def add_noise(x0, noise, t, tables):
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise; x0, noise (N, C), t (N,) int64."""
    row = tables[t]  # (N, 5)
    return row[:, 0:1] * x0 + row[:, 1:2] * noise


def diffusion_loss_rows_reference(out, x0, noise, t, tables):
    """DDPM with learned variance: out (N, 2C) = [epsilon | v], x0 and noise (N, C), t (N,) int64 -> (mse, vb), each (N,) float32.

    mse = mean_c (epsilon - noise)^2. vb trains only v (epsilon is detached): for t > 0 the KL divergence in bits per channel between the
    true posterior of x_{t-1} and N(mean, exp(logvar)), logvar = f log beta_t + (1 - f) log posterior variance, f = (v + 1) / 2; at t = 0
    the negative log likelihood of x0 in bins of width 2/255 (x0 in [-1, 1], open bins at the two ends).
    Both means share their x_t term, so their difference is tables[t, 2] (noise - epsilon): no large numbers cancel, even at a_t = 1e-9."""
    C = x0.shape[1]
    out, x0, noise = (x if x.dtype == torch.float64 else x.float() for x in (out, x0, noise))
    epsilon, v = out.split(C, dim=1)
    error = epsilon - noise  # (N, C)
    row = tables[t]
    upper, lower = row[:, 3:4], row[:, 4:5]
    logvar = lower + 0.5 * (v + 1) * (upper - lower)
    shift = row[:, 2:3] * error.detach()  # true mean - predicted mean
    kl = 0.5 * (logvar - lower - 1 + torch.exp(lower - logvar) + shift.square() * torch.exp(-logvar))
    # at t = 0 the true mean is x0 itself: x0 - mean = shift
    inv_std = torch.exp(-0.5 * logvar)
    cdf_plus, cdf_minus = normal_cdf(inv_std * (shift + 1 / 255)), normal_cdf(inv_std * (shift - 1 / 255))
    inside = torch.where(x0 > 0.999, 1 - cdf_minus, cdf_plus - cdf_minus)
    nll = -torch.where(x0 < -0.999, cdf_plus, inside).clamp(min=1e-12).log()
    vb = torch.where(t[:, None] == 0, nll, kl).mean(1) / math.log(2)
    return error.square().mean(1), vb


def normal_cdf(x):
    """The tanh approximation of the Gaussian's distribution function that the published losses use."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def flow_loss_rows_reference(v, x0, noise):
    """Rectified flow with velocity = noise - x0: v, x0, noise (N, C) -> mean_c (v - (noise - x0))^2, (N,) float32."""
    v, x0, noise = (x if x.dtype == torch.float64 else x.float() for x in (v, x0, noise))
    return (v - (noise - x0)).square().mean(1)


def norm_modulate_reference(x, shift, scale, weight=None, bias=None, eps=1e-6):
    """LayerNorm(x) * (1 + scale) + shift over the last axis; x, shift, scale (..., W), weight and bias (W,) or None."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.addcmul(normed + shift, normed, scale)


def gated_add_reference(h, gate, a):
    """h + gate * a, all of one shape."""
    return torch.addcmul(h, gate, a)


# ----------------------------------------------------------------------------------------------------------------------------------------
# the kernels

@jit
def norm_modulate_kernel(X, Shift, Scale, Weight, Bias, Out, Mean, Rstd, stride_x, stride_s, stride_c, eps, W: tl.constexpr,
                         AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """One row: normalise, weigh, modulate; keep its mean and 1 / standard deviation."""
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    here = c < W
    x = tl.load(X + row * stride_x + c, mask=here, other=0.0).to(ACC)
    mean = tl.sum(x, 0) / W
    d = tl.where(here, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 0) / W + eps)
    y = d * rstd
    if AFFINE:
        y = y * tl.load(Weight + c, mask=here, other=0.0).to(ACC) + tl.load(Bias + c, mask=here, other=0.0).to(ACC)
    scale = tl.load(Scale + row * stride_c + c, mask=here, other=0.0).to(ACC)
    shift = tl.load(Shift + row * stride_s + c, mask=here, other=0.0).to(ACC)
    tl.store(Out + row * W + c, (y * (1.0 + scale) + shift).to(Out.dtype.element_ty), mask=here)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)


@jit
def norm_modulate_backward_kernel(G, X, Scale, Weight, Bias, Mean, Rstd, DX, DScale, DWeight, DBias, N, stride_g, stride_x, stride_c,
                                  W: tl.constexpr, AFFINE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows program, program + programs, ...: their gradients, and this program's part of the weight's and the bias's.
    With xhat = (x - mean) rstd and g' the gradient that reaches xhat: dx = rstd (g' - mean(g') - xhat mean(g' xhat))."""
    ACC: tl.constexpr = tl.float64 if X.dtype.element_ty == tl.float64 else tl.float32
    c = tl.arange(0, BLOCK)
    here = c < W
    dweight = tl.zeros([BLOCK], ACC)
    dbias = tl.zeros([BLOCK], ACC)
    if AFFINE:
        weight = tl.load(Weight + c, mask=here, other=0.0).to(ACC)
        bias = tl.load(Bias + c, mask=here, other=0.0).to(ACC)
    for i in range(0, (N - tl.program_id(0) + tl.num_programs(0) - 1) // tl.num_programs(0)):
        row = tl.program_id(0).to(tl.int64) + i * tl.num_programs(0)
        g = tl.load(G + row * stride_g + c, mask=here, other=0.0).to(ACC)
        x = tl.load(X + row * stride_x + c, mask=here, other=0.0).to(ACC)
        scale = tl.load(Scale + row * stride_c + c, mask=here, other=0.0).to(ACC)
        rstd = tl.load(Rstd + row)
        xhat = tl.where(here, (x - tl.load(Mean + row)) * rstd, 0.0)
        inner = g * (1.0 + scale)
        if AFFINE:
            tl.store(DScale + row * W + c, (g * (xhat * weight + bias)).to(DScale.dtype.element_ty), mask=here)
            dweight += inner * xhat
            dbias += inner
            inner = inner * weight
        else:
            tl.store(DScale + row * W + c, (g * xhat).to(DScale.dtype.element_ty), mask=here)
        dx = rstd * (inner - tl.sum(inner, 0) / W - xhat * (tl.sum(inner * xhat, 0) / W))
        tl.store(DX + row * W + c, dx.to(DX.dtype.element_ty), mask=here)
    if AFFINE:
        tl.store(DWeight + tl.program_id(0) * W + c, dweight, mask=here)
        tl.store(DBias + tl.program_id(0) * W + c, dbias, mask=here)


@jit
def gated_add_kernel(H, Gate, A, Out, stride_h, stride_gate, stride_a, W: tl.constexpr, BLOCK: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if H.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.load(H + row * stride_h + c, mask=c < W, other=0.0).to(ACC)
    gate = tl.load(Gate + row * stride_gate + c, mask=c < W, other=0.0).to(ACC)
    a = tl.load(A + row * stride_a + c, mask=c < W, other=0.0).to(ACC)
    tl.store(Out + row * W + c, (h + gate * a).to(Out.dtype.element_ty), mask=c < W)


@jit
def gated_add_backward_kernel(G, Gate, A, DGate, DA, stride_g, stride_gate, stride_a, W: tl.constexpr, BLOCK: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if G.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(G + row * stride_g + c, mask=c < W, other=0.0).to(ACC)
    gate = tl.load(Gate + row * stride_gate + c, mask=c < W, other=0.0).to(ACC)
    a = tl.load(A + row * stride_a + c, mask=c < W, other=0.0).to(ACC)
    tl.store(DGate + row * W + c, (g * a).to(DGate.dtype.element_ty), mask=c < W)
    tl.store(DA + row * W + c, (g * gate).to(DA.dtype.element_ty), mask=c < W)


@jit
def cdf_and_density(x):
    """normal_cdf and its derivative: (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    cdf = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return cdf, cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def diffusion_rows_kernel(Out, X0, Noise, T, Tables, A, B, DOut, N, stride_o, C: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr,
                          BLOCK: tl.constexpr):
    """ROWS rows of diffusion_loss_rows. Forward: A, B are written, mse and vb. BACKWARD: A, B are their gradients, DOut is written."""
    ACC: tl.constexpr = tl.float64 if Out.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    row = r < N
    here = row[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    out = Out + r.to(tl.int64)[:, None] * stride_o + c[None, :]
    x0 = tl.load(X0 + at, mask=here, other=0.0).to(ACC)
    error = tl.load(out, mask=here, other=0.0).to(ACC) - tl.load(Noise + at, mask=here, other=0.0).to(ACC)
    v = tl.load(out + C, mask=here, other=0.0).to(ACC)
    t = tl.load(T + r, mask=row, other=1)
    mean_error = tl.load(Tables + t * 5 + 2, mask=row, other=0.0).to(ACC)
    upper = tl.load(Tables + t * 5 + 3, mask=row, other=0.0).to(ACC)
    lower = tl.load(Tables + t * 5 + 4, mask=row, other=0.0).to(ACC)
    first = (t == 0)[:, None]
    span = 0.5 * (upper - lower)
    logvar = lower[:, None] + (v + 1.0) * span[:, None]
    shift = mean_error[:, None] * error
    ratio = tl.exp(lower[:, None] - logvar)
    square = shift * shift * tl.exp(-logvar)
    inv_std = tl.exp(-0.5 * logvar)
    z_plus, z_minus = inv_std * (shift + 1.0 / 255.0), inv_std * (shift - 1.0 / 255.0)
    cdf_plus, density_plus = cdf_and_density(z_plus)
    cdf_minus, density_minus = cdf_and_density(z_minus)
    low, high = x0 < -0.999, x0 > 0.999  # the open bins at the ends
    inside = tl.where(low, cdf_plus, tl.where(high, 1.0 - cdf_minus, cdf_plus - cdf_minus))
    if BACKWARD:
        dmse = tl.load(A + r, mask=row, other=0.0).to(ACC) * (2.0 / C)
        dvb = tl.load(B + r, mask=row, other=0.0).to(ACC) * (1.4426950408889634 / C) * span  # per unit of d vb / d logvar
        # d z / d logvar = -z / 2
        dplus, dminus = tl.where(high, 0.0, density_plus * z_plus), tl.where(low, 0.0, density_minus * z_minus)
        dnll = tl.where(inside < 1e-12, 0.0, 0.5 * (dplus - dminus) / tl.maximum(inside, 1e-12))
        dkl = 0.5 * (1.0 - ratio - square)
        dout = DOut + r.to(tl.int64)[:, None] * (2 * C) + c[None, :]
        tl.store(dout, (dmse[:, None] * error).to(DOut.dtype.element_ty), mask=here)
        tl.store(dout + C, (dvb[:, None] * tl.where(first, dnll, dkl)).to(DOut.dtype.element_ty), mask=here)
    else:
        kl = 0.5 * (logvar - lower[:, None] - 1.0 + ratio + square)
        nll = -tl.log(tl.maximum(inside, 1e-12))
        vb = tl.sum(tl.where(here, tl.where(first, nll, kl), 0.0), 1) * (1.4426950408889634 / C)
        tl.store(A + r, tl.sum(tl.where(here, error * error, 0.0), 1) / C, mask=row)
        tl.store(B + r, vb, mask=row)


@jit
def flow_rows_kernel(V, X0, Noise, A, DV, N, stride_v, C: tl.constexpr, BACKWARD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if V.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    row = r < N
    here = row[:, None] & (c < C)[None, :]
    at = r.to(tl.int64)[:, None] * C + c[None, :]
    target = tl.load(Noise + at, mask=here, other=0.0).to(ACC) - tl.load(X0 + at, mask=here, other=0.0).to(ACC)
    error = tl.load(V + r.to(tl.int64)[:, None] * stride_v + c[None, :], mask=here, other=0.0).to(ACC) - target
    if BACKWARD:
        g = tl.load(A + r, mask=row, other=0.0).to(ACC) * (2.0 / C)
        tl.store(DV + at, (g[:, None] * error).to(DV.dtype.element_ty), mask=here)
    else:
        tl.store(A + r, tl.sum(error * error, 1) / C, mask=row)


# ----------------------------------------------------------------------------------------------------------------------------------------
# the kernels as differentiable operators that torch.compile leaves in its graph; all take rows (N, W) whose last axis is dense

def exact(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dense_rows(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def common_type(*tensors):
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def row_warps(W):
    return 4 if W <= 2048 else 8


@torch.library.custom_op("nanoreca::norm_modulate", mutates_args=())
def norm_modulate_op(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
                     eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, shift, scale = dense_rows(x), dense_rows(shift), dense_rows(scale)
    N, W = x.shape
    out = torch.empty(N, W, dtype=common_type(x, shift, scale), device=x.device)
    mean, rstd = (torch.empty(N, dtype=exact(x), device=x.device) for _ in range(2))
    if N:
        norm_modulate_kernel[(N,)](x, shift, scale, weight, bias, out, mean, rstd, x.stride(0), shift.stride(0), scale.stride(0), eps, W=W,
                                   AFFINE=weight is not None, BLOCK=triton.next_power_of_2(W), num_warps=row_warps(W))
    return out, mean, rstd


@norm_modulate_op.register_fake
def _(x, shift, scale, weight, bias, eps):
    rows = x.shape[:1]
    return x.new_empty(x.shape, dtype=common_type(x, shift, scale)), x.new_empty(rows, dtype=exact(x)), x.new_empty(rows, dtype=exact(x))


@torch.library.custom_op("nanoreca::norm_modulate_backward", mutates_args=())
def norm_modulate_backward_op(grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor | None,
                              bias: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor
                              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grad, x, scale = dense_rows(grad), dense_rows(x), dense_rows(scale)
    N, W = x.shape
    programs = max(1, min(N, 512)) if x.is_cuda else max(1, min(N, 4))
    dx, dscale = (torch.empty(N, W, dtype=t.dtype, device=x.device) for t in (x, scale))
    parts = [torch.zeros((programs, W) if weight is not None else (0, W), dtype=exact(x), device=x.device) for _ in range(2)]
    if N:
        norm_modulate_backward_kernel[(programs,)](grad, x, scale, weight, bias, mean, rstd, dx, dscale, *parts, N, grad.stride(0),
                                                   x.stride(0), scale.stride(0), W=W, AFFINE=weight is not None,
                                                   BLOCK=triton.next_power_of_2(W), num_warps=row_warps(W))
    return dx, dscale, parts[0].sum(0), parts[1].sum(0)


@norm_modulate_backward_op.register_fake
def _(grad, x, scale, weight, bias, mean, rstd):
    vector = x.new_empty(x.shape[1:], dtype=exact(x))
    return x.new_empty(x.shape), scale.new_empty(x.shape), vector, torch.empty_like(vector)


def _norm_setup(ctx, inputs, output):
    x, shift, scale, weight, bias, _ = inputs
    ctx.save_for_backward(x, scale, weight, bias, *output[1:])
    ctx.shift_type = shift.dtype


def _norm_backward(ctx, grad, *_):
    x, scale, weight, bias, mean, rstd = ctx.saved_tensors
    dx, dscale, dweight, dbias = norm_modulate_backward_op(grad, x, scale, weight, bias, mean, rstd)
    if weight is None:
        return dx, grad.to(ctx.shift_type), dscale, None, None, None
    return dx, grad.to(ctx.shift_type), dscale, dweight.to(weight.dtype), dbias.to(bias.dtype), None


norm_modulate_op.register_autograd(_norm_backward, setup_context=_norm_setup)


def norm_modulate_triton(x, shift, scale, weight=None, bias=None, eps=1e-6):
    W = x.shape[-1]
    if (weight is None) != (bias is None):
        raise ValueError("norm_modulate: give both weight and bias or neither")
    shift, scale = shift.expand(x.shape), scale.expand(x.shape)
    return norm_modulate_op(x.reshape(-1, W), shift.reshape(-1, W), scale.reshape(-1, W), weight, bias, eps)[0].reshape(x.shape)


@torch.library.custom_op("nanoreca::gated_add", mutates_args=())
def gated_add_op(h: torch.Tensor, gate: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    h, gate, a = dense_rows(h), dense_rows(gate), dense_rows(a)
    N, W = h.shape
    out = torch.empty(N, W, dtype=common_type(h, gate, a), device=h.device)
    BLOCK = min(2048, triton.next_power_of_2(W))
    if N:
        gated_add_kernel[(N, triton.cdiv(W, BLOCK))](h, gate, a, out, h.stride(0), gate.stride(0), a.stride(0), W=W, BLOCK=BLOCK,
                                                    num_warps=4)
    return out


@gated_add_op.register_fake
def _(h, gate, a):
    return h.new_empty(h.shape, dtype=common_type(h, gate, a))


@torch.library.custom_op("nanoreca::gated_add_backward", mutates_args=())
def gated_add_backward_op(grad: torch.Tensor, gate: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grad, gate, a = dense_rows(grad), dense_rows(gate), dense_rows(a)
    N, W = gate.shape
    dgate, da = (torch.empty(N, W, dtype=t.dtype, device=t.device) for t in (gate, a))
    BLOCK = min(2048, triton.next_power_of_2(W))
    if N:
        gated_add_backward_kernel[(N, triton.cdiv(W, BLOCK))](grad, gate, a, dgate, da, grad.stride(0), gate.stride(0), a.stride(0), W=W,
                                                              BLOCK=BLOCK, num_warps=4)
    return dgate, da


@gated_add_backward_op.register_fake
def _(grad, gate, a):
    return gate.new_empty(gate.shape), a.new_empty(a.shape)


def _gate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])
    ctx.h_type = inputs[0].dtype


def _gate_backward(ctx, grad):
    return grad.to(ctx.h_type), *gated_add_backward_op(grad, *ctx.saved_tensors)


gated_add_op.register_autograd(_gate_backward, setup_context=_gate_setup)


def gated_add_triton(h, gate, a):
    W = h.shape[-1]
    return gated_add_op(h.reshape(-1, W), gate.expand(h.shape).reshape(-1, W), a.reshape(-1, W)).reshape(h.shape)


def row_tiles(N, C):
    """-> grid, sizes: about 2,048 numbers per program."""
    BLOCK = triton.next_power_of_2(C)
    ROWS = max(1, 2048 // BLOCK)
    return (triton.cdiv(N, ROWS),), dict(C=C, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)


@torch.library.custom_op("nanoreca::diffusion_rows", mutates_args=())
def diffusion_rows_op(out: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, tables: torch.Tensor
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    N, C = x0.shape
    grid, sizes = row_tiles(N, C)
    out = dense_rows(out)
    mse, vb = (torch.empty(N, dtype=exact(out), device=out.device) for _ in range(2))
    if N:
        diffusion_rows_kernel[grid](out, x0.contiguous(), noise.contiguous(), t, tables, mse, vb, out, N, out.stride(0),
                                    BACKWARD=False, **sizes)
    return mse, vb


@diffusion_rows_op.register_fake
def _(out, x0, noise, t, tables):
    return out.new_empty(x0.shape[:1], dtype=exact(out)), out.new_empty(x0.shape[:1], dtype=exact(out))


@torch.library.custom_op("nanoreca::diffusion_rows_backward", mutates_args=())
def diffusion_rows_backward_op(dmse: torch.Tensor, dvb: torch.Tensor, out: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor,
                               t: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    N, C = x0.shape
    grid, sizes = row_tiles(N, C)
    out = dense_rows(out)
    dout = torch.empty(N, 2 * C, dtype=out.dtype, device=out.device)
    if N:
        diffusion_rows_kernel[grid](out, x0.contiguous(), noise.contiguous(), t, tables, dmse.contiguous(), dvb.contiguous(), dout, N,
                                    out.stride(0), BACKWARD=True, **sizes)
    return dout


@diffusion_rows_backward_op.register_fake
def _(dmse, dvb, out, x0, noise, t, tables):
    return out.new_empty(out.shape)


diffusion_rows_op.register_autograd(
    lambda ctx, dmse, dvb: (diffusion_rows_backward_op(dmse, dvb, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def diffusion_loss_rows_triton(out, x0, noise, t, tables):
    return diffusion_rows_op(out, x0, noise, t, tables)


@torch.library.custom_op("nanoreca::flow_rows", mutates_args=())
def flow_rows_op(v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    N, C = v.shape
    grid, sizes = row_tiles(N, C)
    v = dense_rows(v)
    mse = torch.empty(N, dtype=exact(v), device=v.device)
    if N:
        flow_rows_kernel[grid](v, x0.contiguous(), noise.contiguous(), mse, v, N, v.stride(0), BACKWARD=False, **sizes)
    return mse


@flow_rows_op.register_fake
def _(v, x0, noise):
    return v.new_empty(v.shape[:1], dtype=exact(v))


@torch.library.custom_op("nanoreca::flow_rows_backward", mutates_args=())
def flow_rows_backward_op(dmse: torch.Tensor, v: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    N, C = v.shape
    grid, sizes = row_tiles(N, C)
    v = dense_rows(v)
    dv = torch.empty(N, C, dtype=v.dtype, device=v.device)
    if N:
        flow_rows_kernel[grid](v, x0.contiguous(), noise.contiguous(), dmse.contiguous(), dv, N, v.stride(0), BACKWARD=True, **sizes)
    return dv


@flow_rows_backward_op.register_fake
def _(dmse, v, x0, noise):
    return v.new_empty(v.shape)


flow_rows_op.register_autograd(lambda ctx, dmse: (flow_rows_backward_op(dmse, *ctx.saved_tensors), None, None),
                               setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def flow_loss_rows_triton(v, x0, noise):
    return flow_rows_op(v, x0, noise)
