"""Harmon's noise process: DDPM on the cosine schedule, all of its steps to train and some of them to sample."""
import math

import torch

from .diffusion_loss import diffusion_tables, posteriors

T = 1000  # steps of the trained process
TABLES = {}  # what tables_on has computed

def kept_steps(spacing):
    """Which of the 1000 steps a sampler keeps: "" all; "100" that many, evenly from 0 to 999; "a,b,c" so many in each
    of equal sections. ValueError where that is no such text, or where a section has fewer."""
    steps, start, name = [], 0, f"num_sampling_steps {str(spacing)[:40]!r}"
    counts = [int(n) if n.strip().isdecimal() else -1 for n in str(spacing or T).split(",")]
    if min(counts) < 0 or not any(counts):
        raise ValueError(f"{name}: expected a number of steps from 1 to {T}, or several, such as '10,5,5', for equal "
                         "sections of these, or '' for all")
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))  # the first sections take the remainder
        if count > size:
            raise ValueError(f"{name}: {count} steps in a section of {size} of the {T} trained")
        stride, at = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            steps.append(start + round(at))
            at += stride
        start += size
    return steps

def noise_process(spacing):
    """The cosine schedule (Nichol & Dhariwal), respaced to kept_steps(spacing) -> its `posteriors` and timestep_map."""
    def level(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = torch.tensor([min(1 - level((i + 1) / T) / level(i / T), 0.999) for i in range(T)], dtype=torch.float64)
    kept = torch.tensor(kept_steps(spacing))
    acp = torch.cumprod(1 - betas, 0)[kept]
    return {"timestep_map": kept, **posteriors(1 - acp / torch.cat([acp.new_ones(1), acp[:-1]]))}

@torch.compiler.assume_constant_result  # a compiled model would trace through the cache and break its graph there
def tables_on(spacing, device):
    """-> float32 tables on the device, for the loss (steps, 5) and for sampling (steps, 6), and each step's original
    index (list). Not buffers of a module: no checkpoint holds them, and the meta device would lose them."""
    if (spacing, device) not in TABLES:
        with torch.inference_mode(False):
            kept, betas, acp, log_variance, coef1, coef2 = noise_process(spacing).values()
            sampling = [betas.log(), log_variance, (1 / acp).sqrt(), (1 / acp - 1).sqrt(), coef1, coef2]
            sampling = torch.stack(sampling, 1).float().to(device)
            TABLES[spacing, device] = diffusion_tables(betas).to(device), sampling, kept.tolist()
    return TABLES[spacing, device]

def diffusion_step(out, x, i, noise, temperature, spacing):
    """One ancestral step x_i -> x_{i-1}: net output (N, 2C) = [epsilon | v], x (N, C), i an index or (N,) indices into
    the kept steps -> sample, mean, log variance, estimate of x0 (not clipped), each (N, C). Step 0 adds no noise."""
    columns = tables_on(spacing, str(x.device))[1][i][..., None, :].unbind(-1)
    upper, lower, scale_x, scale_epsilon, coef1, coef2 = columns  # each (1,) or (N, 1)
    noisy = (i > 0)[:, None] if torch.is_tensor(i) else i > 0
    epsilon, v = out.float().chunk(2, -1)
    log_variance = lower + 0.5 * (v + 1) * (upper - lower)
    x0 = scale_x * x - scale_epsilon * epsilon
    mean = coef1 * x0 + coef2 * x
    return mean + noisy * torch.exp(0.5 * log_variance) * noise * temperature, mean, log_variance, x0
