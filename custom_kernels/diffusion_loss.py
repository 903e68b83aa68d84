"""The losses of diffusion, one number for each row: Harmon's DDPM with learned variance, BAGEL's rectified flow.

Eager PyTorch reads and writes the rows once per elementary operation. The kernels read them once and write each row's
loss and its gradient in that row, in float32; the backward pass multiplies it by the incoming number per row."""
import math

import torch

from .pick import choose, exact, jit, tl, triton

def posteriors(betas):
    """Noise schedule betas (steps,) -> float64 tables of the distribution of x_{t-1} given x_t and x0."""
    betas = betas.double()
    acp = torch.cumprod(1 - betas, 0)
    prev = torch.cat([acp.new_ones(1), acp[:-1]])
    variance = betas * (1 - prev) / (1 - acp)
    return {"betas": betas, "alphas_cumprod": acp,
            "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),  # entry 0 would be log 0
            "posterior_mean_coef1": betas * prev.sqrt() / (1 - acp),
            "posterior_mean_coef2": (1 - prev) * (1 - betas).sqrt() / (1 - acp)}

def diffusion_tables(betas):
    """-> (steps, 5) float32. Columns, with a_t the cumulative product of 1 - beta: 0 sqrt(a_t) and 1 sqrt(1 - a_t), so
    that x_t = [0] x0 + [1] noise; 2 what an error of 1 in epsilon does to the posterior mean; 3 log beta_t, the upper
    end of the learned log variance; 4 the log of the posterior variance, its lower end."""
    betas, acp, log_variance, coef1, _ = posteriors(betas).values()
    return torch.stack([acp.sqrt(), (1 - acp).sqrt(), coef1 * (1 / acp - 1).sqrt(), betas.log(), log_variance],
                       1).float()

def add_noise(x0, noise, t, tables):
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise; x0, noise (N, C), t (N,) int64, tables those of the loss."""
    row = tables[t]  # (N, 5)
    return row[:, 0:1] * x0 + row[:, 1:2] * noise

def diffusion_loss_rows(out, x0, noise, t, tables):
    """Harmon's token loss, DDPM with learned variance: out (N, 2C) = [epsilon | v], x0 and noise (N, C), t (N,) int64,
    tables = diffusion_tables(betas) -> (mse, vb), float32 (N,) each.

    mse = mean_c (epsilon - noise)^2. vb trains only v (epsilon is detached): for t > 0 the KL divergence in bits per
    channel between the true posterior of x_{t-1} and N(mean, exp(logvar)), logvar = f log beta_t + (1 - f) log of the
    posterior's variance, f = (v + 1) / 2; at t = 0 the negative log likelihood of x0 in bins of width 2/255 (x0 in
    [-1, 1], open bins at the two ends). Both means share their x_t term, so their difference is
    tables[t, 2] (noise - epsilon): no large numbers cancel, even at a_t = 1e-9."""
    triton = choose("diffusion_loss_rows", x0.shape[1], out.device) == "triton"
    return (diffusion_loss_rows_triton if triton else diffusion_loss_rows_reference)(out, x0, noise, t, tables)

def flow_loss_rows(v, x0, noise):
    """BAGEL's token loss, rectified flow: v, x0, noise (N, C) -> mean_c (v - (noise - x0))^2, float32 (N,)."""
    triton = choose("flow_loss_rows", x0.shape[1], v.device) == "triton"
    return (flow_loss_rows_triton if triton else flow_loss_rows_reference)(v, x0, noise)

def diffusion_loss_rows_reference(out, x0, noise, t, tables):
    C = x0.shape[1]
    out, x0, noise = (x.to(exact(x)) for x in (out, x0, noise))
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
    v, x0, noise = (x.to(exact(x)) for x in (v, x0, noise))
    return (v - (noise - x0)).square().mean(1)

# ---------------------------------------------------------------------------------------------------------------------
# the kernels, ROWS rows at a time

@jit
def cdf_and_density(x):
    """normal_cdf and its derivative: (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    cdf = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return cdf, cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)

@jit
def diffusion_rows_kernel(Out, X0, Noise, T, Tables, Mse, Vb, Grad, N, C: tl.constexpr, ROWS: tl.constexpr,
                          BLOCK: tl.constexpr):
    """Grad (N, 2C): d mse / d epsilon beside d vb / d v."""
    ACC: tl.constexpr = tl.float64 if Out.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    row = r < N
    here = row[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    at_out = r[:, None] * (2 * C) + c[None, :]
    x0 = tl.load(X0 + at, mask=here, other=0.0).to(ACC)
    error = tl.load(Out + at_out, mask=here, other=0.0).to(ACC) - tl.load(Noise + at, mask=here, other=0.0).to(ACC)
    v = tl.load(Out + at_out + C, mask=here, other=0.0).to(ACC)
    t = tl.load(T + r, mask=row, other=1)
    mean_error = tl.load(Tables + t * 5 + 2, mask=row, other=0.0).to(ACC)[:, None]
    upper = tl.load(Tables + t * 5 + 3, mask=row, other=0.0).to(ACC)[:, None]
    lower = tl.load(Tables + t * 5 + 4, mask=row, other=0.0).to(ACC)[:, None]
    first = (t == 0)[:, None]
    span = 0.5 * (upper - lower)
    logvar = lower + (v + 1.0) * span
    shift = mean_error * error
    ratio = tl.exp(lower - logvar)
    square = shift * shift * tl.exp(-logvar)
    inv_std = tl.exp(-0.5 * logvar)
    z_plus, z_minus = inv_std * (shift + 1.0 / 255.0), inv_std * (shift - 1.0 / 255.0)
    cdf_plus, density_plus = cdf_and_density(z_plus)
    cdf_minus, density_minus = cdf_and_density(z_minus)
    low, high = x0 < -0.999, x0 > 0.999  # the open bins at the ends
    inside = tl.where(low, cdf_plus, tl.where(high, 1.0 - cdf_minus, cdf_plus - cdf_minus))
    kl = 0.5 * (logvar - lower - 1.0 + ratio + square)
    nll = -tl.log(tl.maximum(inside, 1e-12))
    bits = 1.4426950408889634 / C  # per channel
    tl.store(Mse + r, tl.sum(tl.where(here, error * error, 0.0), 1) / C, mask=row)
    tl.store(Vb + r, tl.sum(tl.where(here, tl.where(first, nll, kl), 0.0), 1) * bits, mask=row)
    dplus, dminus = tl.where(high, 0.0, density_plus * z_plus), tl.where(low, 0.0, density_minus * z_minus)
    dnll = tl.where(inside < 1e-12, 0.0, 0.5 * (dplus - dminus) / tl.maximum(inside, 1e-12))  # dz / dlogvar = -z / 2
    dkl = 0.5 * (1.0 - ratio - square)
    tl.store(Grad + at_out, error * (2.0 / C), mask=here)
    tl.store(Grad + at_out + C, tl.where(first, dnll, dkl) * span * bits, mask=here)

@jit
def flow_rows_kernel(V, X0, Noise, Mse, Grad, N, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    ACC: tl.constexpr = tl.float64 if V.dtype.element_ty == tl.float64 else tl.float32
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    here = (r < N)[:, None] & (c < C)[None, :]
    at = r[:, None] * C + c[None, :]
    target = tl.load(Noise + at, mask=here, other=0.0).to(ACC) - tl.load(X0 + at, mask=here, other=0.0).to(ACC)
    error = tl.load(V + at, mask=here, other=0.0).to(ACC) - target
    tl.store(Mse + r, tl.sum(error * error, 1) / C, mask=r < N)
    tl.store(Grad + at, error * (2.0 / C), mask=here)

# ---------------------------------------------------------------------------------------------------------------------
# one differentiable operator for both, which torch.compile leaves in its graph

@torch.library.custom_op("nanoreca::loss_rows", mutates_args=())
def loss_rows(out: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor | None,
              tables: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> mse (N,), vb (N,), and the gradient of both in `out`, which has its shape; without t the flow loss, no vb."""
    (N, C), (mse, vb, grad) = x0.shape, _loss_rows_fake(out, x0, noise, t, tables)
    BLOCK = triton.next_power_of_2(C)
    ROWS = max(1, 2048 // BLOCK)  # a program has about 2,048 numbers
    out, x0, noise = out.contiguous(), x0.contiguous(), noise.contiguous()
    sizes = dict(C=C, ROWS=ROWS, BLOCK=BLOCK, num_warps=4)
    if N and t is None:
        flow_rows_kernel[(triton.cdiv(N, ROWS),)](out, x0, noise, mse, grad, N, **sizes)
    elif N:
        diffusion_rows_kernel[(triton.cdiv(N, ROWS),)](out, x0, noise, t, tables, mse, vb, grad, N, **sizes)
    return mse, vb, grad

@loss_rows.register_fake
def _loss_rows_fake(out, x0, noise, t, tables):
    mse = out.new_empty(x0.shape[:1], dtype=exact(out))
    return mse, torch.empty_like(mse), mse.new_empty(out.shape)

def _setup(ctx, inputs, output):
    ctx.save_for_backward(output[2])
    ctx.channels, ctx.dtype = inputs[1].shape[1], inputs[0].dtype

def _backward(ctx, dmse, dvb, _):
    halves = ctx.saved_tensors[0].split(ctx.channels, 1)  # epsilon and v, or v alone
    grad = torch.cat([upstream[:, None] * half for upstream, half in zip((dmse, dvb), halves)], 1)
    return grad.to(ctx.dtype), None, None, None, None

loss_rows.register_autograd(_backward, setup_context=_setup)

def diffusion_loss_rows_triton(out, x0, noise, t, tables):
    return loss_rows(out, x0, noise, t, tables)[:2]

def flow_loss_rows_triton(v, x0, noise):
    return loss_rows(v, x0, noise, None, None)[0]
