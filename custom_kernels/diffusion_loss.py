"""The memory-bound parts of a diffusion loss: adaptive LayerNorm, gated residual, loss rows.  (The Triton kernels follow below.)"""
import math

import torch
import torch.nn.functional as F


def diffusion_tables(betas):
    """Noise schedule betas (T,) -> (T, 5) float32, computed in float64. Columns, with a_t the cumulative product of 1 - beta:
    0 sqrt(a_t) and 1 sqrt(1 - a_t): x_t = [0] x0 + [1] noise;
    2 what an error of 1 in epsilon does to the posterior mean, c1_t sqrt(1/a_t - 1), with c1_t = beta_t sqrt(a_{t-1}) / (1 - a_t);
    3 log beta_t, the upper end of the learned log variance; 4 log of the posterior variance (entry 0 is a copy of entry 1), the lower end."""
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
    Both means share their x_t term, so their difference is tables[t, 2] (noise - epsilon): no large numbers cancel even where a_t is 1e-9."""
    C = x0.shape[1]
    epsilon, v = out.float().split(C, dim=1)
    x0, noise = x0.float(), noise.float()
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
    return (v.float() - (noise.float() - x0.float())).square().mean(1)


def norm_modulate_reference(x, shift, scale, weight=None, bias=None, eps=1e-6):
    """LayerNorm(x) * (1 + scale) + shift over the last axis; x, shift, scale (..., W), weight and bias (W,) or None."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return torch.addcmul(normed + shift, normed, scale)


def gated_add_reference(h, gate, a):
    """h + gate * a, all of one shape."""
    return torch.addcmul(h, gate, a)
