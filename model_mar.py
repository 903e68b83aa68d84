"""Harmon: a unified multimodal model on masked autoregression (MAR), and its RecA post-training (arXiv 2509.07295).

One MAR encoder (a ViT over continuous VAE latents and a few "buffer" tokens) is both the understanding encoder, on all latents of a clean
image, and the generation encoder, on the latents that are known so far. A causal Qwen2.5 decoder reads text and those features; a MAR
decoder fills the grid; a small MLP per token (DiffLoss) turns the decoder's output into a latent by diffusion.

    clean latents ----> MAR encoder --proj_in--> |
    text ----> embedding ----------------------> | causal LLM --lm_head--> answer
    visible latents --> MAR encoder --proj_in--> |            --proj_out--> + encoder output --> MAR decoder --> DiffLoss per masked token

RecA (`Harmon.reca_loss`): the clean features of an image stand in the context as a very dense prompt, and the model learns to fill the
masked latents of the SAME image. No captions. Editing is the same loss with the clean features of the SOURCE image and the latents of the
target.

Conventions. B rows, (m, n) latent grid, L = m*n tokens, S buffers, V visible and k masked tokens (V + k = L, equal in a batch), D / E
widths of encoder / decoder, h of the LLM, C numbers per latent token. Images are (B, 3, H, W) in [-1, 1]. Text rows are left-padded:
`pads` (B,) counts the slots before the first token, so query i of row b sees the keys [pads[b], i], and its rotary position is i -
pads[b]. Everything random is an argument: `masked` (B, k) and `visible` (B, V) are positions in the grid, t (B, M, k) and noise (B, M, k, C)
belong to M diffusion draws of each masked token, in the order of `masked`. (Two tensors, not one cut at k: a length like L - k, a difference of
two that vary, is what torch.compile's dynamic shapes stumble over.)
"""
import math
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from checkpoint import load_strict, read_weights
from custom_kernels import (
    add_noise,
    attention,
    attention_plan,
    diffusion_loss_rows,
    diffusion_tables,
    gated_add,
    linear_cross_entropy,
    norm_modulate,
    rms_norm,
)
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig
from vision_encoder import preprocess_pad, preprocess_stretch, to_pixels, word_alignment

IMAGE = -200  # the id that marks where an image goes into a text row
IGNORE = -100  # label of a position that is not trained
T = 1000  # diffusion steps of the trained process

# ----------------------------------------------------------------------------------------------------------------------
# configurations

@dataclass
class HarmonConfig:
    # Qwen2.5 decoder
    vocab_size: int = 151936
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    # MAR encoder and decoder
    encoder_dim: int = 768
    encoder_depth: int = 12
    encoder_heads: int = 12
    decoder_dim: int = 768
    decoder_depth: int = 12
    decoder_heads: int = 12
    mlp_ratio: float = 4.0
    buffer_size: int = 64
    native_grid: int = 16  # side of the learned positional tables; other grids interpolate them
    patch_size: int = 1
    class_num: int = 1000  # rows of class_emb, which is in the published files and never used
    dropout: float = 0.1  # of the ViT blocks (attention and projections), active in training only
    # DiffLoss
    diffloss_depth: int = 6
    diffloss_width: int = 1024
    diffusion_batch_mul: int = 4  # draws of (t, noise) per masked token and step
    num_sampling_steps: str = "100"
    # images
    image_size: int = 512  # pixels, training and default of the sampler
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    # training
    mask_ratio_min: float = 0.7
    mask_bucket: int = 32  # the number of masked tokens is rounded to multiples of this, so that shapes take few values (1 = exact)
    grad_scale: float = 0.1  # on the clean features' gradient in RecA: damps proj_in and the encoder there, not the masked branch
    max_prompt: int = 128  # text tokens of a generation row
    max_dialogue: int = 1472  # text tokens of an understanding row
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    # sampler
    cfg: float = 3.0
    mask_steps: int = 64

CONFIGS = {
    "tiny": HarmonConfig(vocab_size=1024, hidden_size=128, intermediate_size=240, num_layers=4, num_heads=4, num_kv_heads=2,
                         encoder_dim=96, encoder_depth=2, encoder_heads=4, decoder_dim=96, decoder_depth=2, decoder_heads=4, mlp_ratio=2.5,
                         buffer_size=9, native_grid=3, class_num=1, dropout=0.0, diffloss_depth=3, diffloss_width=192, mask_ratio_min=0.3,
                         # 24 steps from t = 949: at 999 a small net's error is multiplied by 1,000
                         num_sampling_steps="2,2,2,2,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2,0",
                         image_size=48, vae=TOKENIZERS["tiny-kl"], mask_bucket=1, max_prompt=64,
                         max_dialogue=128, pad_multiple=4, mask_steps=9),
    "harmon-0.5b": HarmonConfig(),
    "harmon-1.5b": HarmonConfig(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12,
                                encoder_dim=1280, encoder_depth=20, encoder_heads=16, decoder_dim=1280, decoder_depth=20, decoder_heads=16,
                                diffloss_depth=12, diffloss_width=1536),
}

# ----------------------------------------------------------------------------------------------------------------------
# the language model: Qwen2.5

def rope_tables(positions, dim, theta):
    """positions (B, T) -> cos, sin (B, 1, T, dim/2) float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, H, T, dim), the two halves of dim being the pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)

class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, inner, dim = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_heads
        self.head_dim, self.heads, self.kv_heads = dim, c.num_heads, c.num_kv_heads
        self.input_layernorm = RMSNorm(h, c.rms_norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(h, c.num_heads * dim), "k_proj": nn.Linear(h, c.num_kv_heads * dim),
            "v_proj": nn.Linear(h, c.num_kv_heads * dim), "o_proj": nn.Linear(c.num_heads * dim, h, bias=False)})
        self.post_attention_layernorm = RMSNorm(h, c.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(h, inner, bias=False), "up_proj": nn.Linear(h, inner, bias=False),
                                  "down_proj": nn.Linear(inner, h, bias=False)})

    def forward(self, x, cos, sin, plan, past=None, keep=None):
        """x (B, T, h) -> (x, (k, v)). keep: the queries, and so the rows that come out, are the last `keep` ones only."""
        a, mlp = self.self_attn, self.mlp
        # one product for q, k and v: joining the weights is cheap next to three passes over x
        weight = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
        bias = torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias])
        qkv = F.linear(self.input_layernorm(x), weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, Hq + 2 Hkv, T, dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if keep is not None:
            x, q = x[:, -keep:], q[:, :, -keep:]
        x = x + a.o_proj(attention(q, k, v, None, None, plan).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)), (k, v)

class Qwen2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList([DecoderLayer(c) for _ in range(c.num_layers)]), "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # tied; both names are in the published files

    def forward(self, x, pads, past=None, keep=None):
        """x (B, T, h), pads (B,) -> hidden states after the final norm, of the last `keep` positions (None: all), and per layer the keys
        and values of everything so far. past: that list from an earlier call; x continues it. Causal; rotary positions do not count the
        pads."""
        c = self.config
        start = past[0][0].shape[2] if past is not None else 0
        total = start + x.shape[1]
        slots = torch.arange(start, total, device=x.device)[None]  # (1, T)
        positions = (slots - pads[:, None]).clamp(min=0)  # (B, T)
        cos, sin = rope_tables(positions, c.hidden_size // c.num_heads, c.rope_theta)
        lo, hi = pads[:, None].expand(-1, x.shape[1]), (slots + 1).expand(len(x), -1)
        plan = attention_plan(lo, hi, total)
        cache = []
        for i, layer in enumerate(self.model.layers):
            last = {}
            if keep is not None and i == c.num_layers - 1:  # nobody attends to the last layer's output: compute what is asked for
                last, plan = {"keep": keep}, attention_plan(lo[:, -keep:], hi[:, -keep:], total)
            x, kv = layer(x, cos, sin, plan, past[i] if past is not None else None, **last)
            cache.append(kv)
        return self.model.norm(x), cache

# ----------------------------------------------------------------------------------------------------------------------
# MAR: two ViTs

class Block(nn.Module):
    """Pre-norm ViT block with full attention."""

    def __init__(self, dim, heads, mlp_ratio, dropout):
        super().__init__()
        self.heads, self.dropout, hidden = heads, dropout, int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):  # (B, N, dim)
        p = self.dropout if self.training else 0.0
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim/heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.attn.proj(y), p)
        y = F.dropout(F.gelu(self.mlp.fc1(self.norm2(x))), p)
        return x + F.dropout(self.mlp.fc2(y), p)

def pick(x, index):
    """x (B, N, c), index (B, K) -> the rows x[b, index[b]], (B, K, c)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

class MAR(nn.Module):
    """Masked autoencoder over VAE latents. Buffers stand first in the encoder and the decoder, last in the LLM."""

    def __init__(self, c):
        super().__init__()
        self.config, D, E, cells = c, c.encoder_dim, c.decoder_dim, c.native_grid ** 2
        self.class_emb = nn.Embedding(c.class_num, D)
        self.fake_latent = nn.Parameter(torch.zeros(1, D))  # what every buffer holds before its position is added
        self.z_proj, self.z_proj_ln = nn.Linear(latent_channels(c), D), nn.LayerNorm(D, eps=1e-6)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, c.buffer_size + cells, D))
        self.encoder_blocks = nn.ModuleList([Block(D, c.encoder_heads, c.mlp_ratio, c.dropout) for _ in range(c.encoder_depth)])
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(D, E), nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, c.buffer_size + cells, E))
        self.decoder_blocks = nn.ModuleList([Block(E, c.decoder_heads, c.mlp_ratio, c.dropout) for _ in range(c.decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, cells, E))
        self.diffloss = DiffLoss(c)

    def positions(self, table, grid):
        """Learned table (1, [S +] native*native, dim) -> buffer rows (S, dim) and image rows (m*n, dim), resized to the grid."""
        side = self.config.native_grid
        buffers, image = table[0].split([table.shape[1] - side * side, side * side])
        if tuple(grid) != (side, side):
            image = image.T.reshape(1, -1, side, side)
            image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T
        return buffers, image

    def encode(self, latents, visible=None):
        """latents (B, m, n, C); visible (B, V) positions in raster order, None for all -> (B, S + V, D). The clean branch and the masked
        one."""
        buffer_pos, image_pos = self.positions(self.encoder_pos_embed_learned, latents.shape[1:3])
        tokens = latents.flatten(1, 2).to(self.z_proj.weight.dtype)
        if visible is None:
            x = self.z_proj(tokens) + image_pos
        else:
            x = self.z_proj(pick(tokens, visible)) + F.embedding(visible, image_pos)
        buffers = (self.fake_latent + buffer_pos).expand(len(x), -1, -1)
        x = self.z_proj_ln(torch.cat([buffers, x], 1))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, x, visible, masked, grid):
        """x (B, S + V, D), positions visible (B, V) and masked (B, k) -> conditions of DiffLoss (B, V + k, E), in the order [visible,
        masked]. Attention is blind to order, so the mask tokens simply follow the visible ones and everybody brings its own position."""
        order = torch.cat([visible, masked], 1)
        buffer_pos, image_pos = self.positions(self.decoder_pos_embed_learned, grid)
        pos = torch.cat([buffer_pos.expand(len(x), -1, -1), F.embedding(order, image_pos)], 1)
        x = torch.cat([self.decoder_embed(x), self.mask_token.expand(len(x), masked.shape[1], -1)], 1) + pos
        for block in self.decoder_blocks:
            x = block(x)
        x = self.decoder_norm(x)[:, self.config.buffer_size:]
        return x + F.embedding(order, self.positions(self.diffusion_pos_embed_learned, grid)[1])

def latent_channels(c):
    return c.vae.z_channels * c.patch_size ** 2

# ----------------------------------------------------------------------------------------------------------------------
# DiffLoss: one latent token by diffusion

def kept_steps(spacing):
    """Which of the 1000 steps a sampler keeps: "" all; "100" that many, evenly from 0 to 999; "a,b,c" that many in each of equal sections.
    """
    if not spacing:
        return list(range(T))
    counts, steps, start = [int(n) for n in str(spacing).split(",")], [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))  # the first sections take the remainder
        if count > size:
            raise ValueError(f"num_sampling_steps {spacing!r}: {count} steps asked of a section of {size} of the {T} trained ones")
        stride, at = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            steps.append(start + round(at))
            at += stride
        start += size
    return steps

def noise_process(spacing):
    """The cosine schedule (Nichol & Dhariwal), respaced to kept_steps(spacing): dict of float64 tables, one entry per kept step."""
    level = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = torch.tensor([min(1 - level((i + 1) / T) / level(i / T), 0.999) for i in range(T)], dtype=torch.float64)
    kept = torch.tensor(kept_steps(spacing))
    acp = torch.cumprod(1 - betas, 0)[kept]
    betas = 1 - acp / torch.cat([acp.new_ones(1), acp[:-1]])
    acp = torch.cumprod(1 - betas, 0)
    prev = torch.cat([acp.new_ones(1), acp[:-1]])
    variance = betas * (1 - prev) / (1 - acp)
    return {"timestep_map": kept, "betas": betas, "alphas_cumprod": acp,
            "posterior_log_variance_clipped": torch.cat([variance[1:2], variance[1:]]).log(),  # entry 0 would be log 0
            "posterior_mean_coef1": betas * prev.sqrt() / (1 - acp), "posterior_mean_coef2": (1 - prev) * (1 - betas).sqrt() / (1 - acp)}

@lru_cache(maxsize=None)
def _tables_on(spacing, device):
    with torch.inference_mode(False):
        p = noise_process(spacing)
        acp = p["alphas_cumprod"]
        sampling = torch.stack([p["betas"].log(), p["posterior_log_variance_clipped"], (1 / acp).sqrt(), (1 / acp - 1).sqrt(),
                                p["posterior_mean_coef1"], p["posterior_mean_coef2"]], 1)
        return diffusion_tables(p["betas"]).to(device), sampling.float().to(device), p["timestep_map"].tolist()

@torch.compiler.assume_constant_result  # constants to a compiled model, which would otherwise trace through the cache and break its graph
def tables_on(spacing, device):
    """-> float32 tables on the device: for the loss (steps, 5), for sampling (steps, 6), and the original index of each step as a list.
    Not buffers of a module: no checkpoint holds them, and a model from the meta device would lose them."""
    return _tables_on(spacing, device)

class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h, y):  # y = SiLU of the condition, which all blocks share
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, -1)
        return gated_add(h, gate, self.mlp(norm_modulate(h, shift, scale, self.in_ln.weight, self.in_ln.bias, 1e-6)))

class Denoiser(nn.Module):
    """MLP with adaptive LayerNorm: noisy token, step, condition -> predicted noise and variance value."""

    def __init__(self, c):
        super().__init__()
        self.config, w, channels = c, c.diffloss_width, latent_channels(c)
        self.time_embed = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, w), nn.SiLU(), nn.Linear(w, w))})
        self.cond_embed, self.input_proj = nn.Linear(c.decoder_dim, w), nn.Linear(channels, w)
        self.res_blocks = nn.ModuleList([ResBlock(w) for _ in range(c.diffloss_depth)])
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(w, 2 * channels),
                                          "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(w, 2 * w))})

    def time(self, t):
        """t int64 in 0..999, any shape -> (..., width)."""
        if t.numel() > T:  # more rows than different steps: embed each step once
            return F.embedding(t, self.time(torch.arange(T, device=t.device)))
        angles = t[..., None] * torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        return self.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.input_proj.weight.dtype))

    def forward(self, x, t, z):
        """x (..., C), t and z (..., E) broadcast over the leading axes of x -> (..., 2C): epsilon, then the variance value."""
        h = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = F.silu(self.time(t) + self.cond_embed(z)).expand_as(h).flatten(0, -2)
        shape, h = h.shape, h.flatten(0, -2)  # (N, width)
        for block in self.res_blocks:
            h = block(h, y)
        shift, scale = self.final_layer.adaLN_modulation[1](y).chunk(2, -1)
        return self.final_layer.linear(norm_modulate(h, shift, scale, None, None, 1e-6)).view(*shape[:-1], -1)

class DiffLoss(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net, self.spacing = Denoiser(c), c.num_sampling_steps

    def loss_rows(self, z, x0, t, noise):
        """Conditions z (B, k, E), latents x0 (B, k, C), t (B, M, k), noise (B, M, k, C) -> mse, vb, each (B*M*k,) float32: epsilon
        prediction, and the variational bound in bits, from which only the variance learns."""
        tables = tables_on("", str(z.device))[0]
        x0, noise, t_rows = x0[:, None].expand_as(noise).flatten(0, 2).float(), noise.flatten(0, 2), t.flatten()
        x_t = add_noise(x0, noise, t_rows, tables).view(*t.shape, -1)
        return diffusion_loss_rows(self.net(x_t, t, z[:, None]).flatten(0, 2), x0, noise, t_rows, tables)

    def step(self, out, x, i, noise, temperature, spacing):
        """One ancestral step x_i -> x_{i-1} of the respaced process: net output (N, 2C), x (N, C), i an index or (N,) indices into the
        kept steps -> sample, mean, log variance, estimate of x0, each (N, C). The last step (i = 0) adds no noise; x0 is not clipped."""
        upper, lower, a, b, c1, c2 = tables_on(spacing, str(x.device))[1][i][..., None, :].unbind(-1)  # each (1,) or (N, 1)
        noisy = (i > 0)[:, None] if torch.is_tensor(i) else i > 0
        epsilon, v = out.float().chunk(2, -1)
        log_variance = lower + 0.5 * (v + 1) * (upper - lower)
        x0 = a * x - b * epsilon
        mean = c1 * x0 + c2 * x
        return mean + noisy * torch.exp(0.5 * log_variance) * noise * temperature, mean, log_variance, x0

    @torch.no_grad()
    def sample(self, z, temperature=1.0, cfg=1.0, noise=None, generator=None, spacing=None):
        """Conditions z (N, E) -> tokens (N, C). With cfg != 1 z is [conditional rows, as many unconditional rows]: epsilon is guided, the
        variance is not, and the first half is the result. noise: (initial (N or N/2, C), per step (steps, N, C), first executed first), or
        from the generator."""
        spacing = self.spacing if spacing is None else spacing
        timesteps = tables_on(spacing, str(z.device))[2]
        n = len(z) // 2 if cfg != 1 else len(z)
        if noise is None:
            shape, where = (n, self.net.input_proj.in_features), generator.device if generator is not None else z.device
            noise = [torch.randn(s, generator=generator, device=where) for s in (shape, (len(timesteps), len(z), shape[1]))]
        x, steps = noise[0].to(z.device).repeat(len(z) // n, 1), noise[1].to(z.device)
        for j, i in enumerate(reversed(range(len(timesteps)))):
            out = self.net(x[:n].repeat(len(z) // n, 1), torch.full((1,), timesteps[i], device=z.device), z).float()
            if cfg != 1:
                epsilon, v = out.chunk(2, -1)
                epsilon = epsilon[n:] + cfg * (epsilon[:n] - epsilon[n:])
                out = torch.cat([epsilon.repeat(2, 1), v], -1)
            x = self.step(out, x, i, steps[j], temperature, spacing)[0]
        return x

# ----------------------------------------------------------------------------------------------------------------------
# prompts: Qwen's chat template without a system turn

USER = "<|im_start|>user\n"
TEMPLATE = USER + "{}<|im_end|>\n<|im_start|>assistant\n"
UNCONDITIONAL = "Generate an image."

def insert_image(tokenizer, ids):
    """Puts the image slot behind the first token that ends a line: after "<|im_start|>user\\n", or after the "\\n\\n" that is one token
    for Qwen."""
    at = 1 + next(i for i, token in enumerate(ids) if "\n" in tokenizer.decode([token]))
    return ids[:at] + [IMAGE] + ids[at:]

def first_answer(labels):
    """Where the first answer of a row's labels begins."""
    return next(i for i, label in enumerate(labels) if label != IGNORE)

def left_pad(rows, width, fill=0):
    """Lists of ids -> (B, width) int64 and the number of pads per row (B,). Longer rows lose their end."""
    rows = [row[:width] for row in rows]
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([width - len(row) for row in rows])

# ----------------------------------------------------------------------------------------------------------------------
# the model

def scale_gradient(x, factor):
    """x, with `factor` times its gradient."""
    return x if factor == 1 else x.detach() + factor * (x - x.detach())

class Harmon(nn.Module):
    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.grad_scale = config, tokenizer, config.grad_scale
        self.vae = Autoencoder(config.vae).requires_grad_(False)  # always frozen
        self.llm = Qwen2(config)
        self.mar = MAR(config)
        mlp = lambda a, h, b: nn.Sequential(nn.Linear(a, h), nn.SiLU(), nn.Linear(h, b))
        self.proj_in = mlp(config.encoder_dim, config.hidden_size, config.hidden_size)
        self.proj_out = mlp(config.hidden_size, config.hidden_size, config.encoder_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02) in the LLM and the learned tables, Xavier in MAR and the projections; DiffLoss starts as the identity.
        """
        for name, module in self.named_modules():
            if name.startswith("vae"):
                continue
            if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
                if "adaLN_modulation" in name or name.endswith("final_layer.linear"):
                    nn.init.zeros_(module.weight)
                elif name.startswith("llm") or "time_embed" in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, p in self.mar.named_parameters():
            if name.endswith("_learned") or name in ("fake_latent", "mask_token"):  # 0.5: beside latents of deviation 1, 0.02 would not be seen
                nn.init.normal_(p, std=0.5 if name == "encoder_pos_embed_learned" else 0.02)

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad: everything but the VAE and class_emb, which
        nothing reads. Base training from scratch keeps the full gradient of the clean features; post-training damps it to
        config.grad_scale."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.grad_scale = 1.0 if stage == "base" else self.config.grad_scale
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith("vae.") and name != "mar.class_emb.weight")
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe's exemptions from weight decay. Embeddings, positional tables and mask tokens do decay."""
        return p.ndim == 1 or name.endswith(".bias") or "diffloss" in name

    def target_count(self, part, tensors):
        """What the loss of a part is a mean over where that differs from sample to sample (0-dim), else None."""
        return (tensors["labels"] != IGNORE).sum().float() if "labels" in tensors else None

    # ---- data side

    @property
    def stride(self):
        return self.vae.stride * self.config.patch_size

    def preprocess(self, image, purpose):
        """PIL image -> (3, S, S) in [-1, 1]. "understand": padded to a square; "recon": stretched to a square of the longer side, then
        resized, as in the published training; anything else: resized at once, as in its sampler."""
        size = self.config.image_size
        if purpose in ("understand", "recon"):
            return (preprocess_pad if purpose == "understand" else preprocess_stretch)(image, size)
        return to_pixels(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def precompute(self, images, stage="base"):
        """images (N, 3, H, W) in [-1, 1] -> {"latents": (N, m, n, C)}: the posterior's mean, never a sample. The VAE is frozen in every
        stage."""
        images = images.to(self.vae.encoder.conv_in.weight.dtype)
        return {"latents": F.pixel_unshuffle(self.vae.encode(images), self.config.patch_size).permute(0, 2, 3, 1)}

    @torch.no_grad()
    def decode_latents(self, latents):
        """latents (B, m, n, C) -> images (B, 3, H, W), not clamped."""
        latents = latents.permute(0, 3, 1, 2).to(self.vae.encoder.conv_in.weight.dtype)
        return self.vae.decode(F.pixel_shuffle(latents, self.config.patch_size)).float()

    def prompt_ids(self, part, sample):
        """One sample -> ids and labels of its row (IGNORE but for answers with their <|im_end|>; the newline after them is not in the loss), or ids
        and None. Several turns come as sample["turns"] = [(question, answer), ...]."""
        encode = self.tokenizer.encode
        if part in ("recon", "edit"):  # the image stays when the request is dropped
            text = UNCONDITIONAL if sample.get("drop") else "\n" + sample["prompt" if part == "recon" else "instruction"]
            return insert_image(self.tokenizer, encode(TEMPLATE.format(text))), None
        if part == "t2i":
            return encode(TEMPLATE.format(UNCONDITIONAL if sample.get("drop") else "Generate an image: " + sample["caption"].strip())), None
        if part not in ("i2t", "text"):
            raise ValueError(f"part {part!r}: expected recon, edit, t2i, i2t or text")
        ids, labels = [], []
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            if part == "i2t" and not ids:  # the two sides of the image are tokenised apart
                ask = encode(USER) + [IMAGE] + encode(TEMPLATE.format("\n" + question)[len(USER):])
            else:
                ask = encode(TEMPLATE.format(question))
            reply, newline = encode(answer + "<|im_end|>"), encode("\n")
            ids, labels = ids + ask + reply + newline, labels + [IGNORE] * len(ask) + reply + [IGNORE] * len(newline)
        return ids, labels

    def collate(self, part, samples, pad_to=None):
        """Samples (dicts) -> ids (B, W) and pads (B,), left-padded to W = pad_to, or to the longest row, rounded up to pad_multiple and at
        most the config's maximum; what is longer is cut at its end. i2t and text also get labels (B, A): the next token for each of the
        last A positions, IGNORE where none is trained."""
        c, dialogue = self.config, part in ("i2t", "text")
        rows, labels = zip(*[self.prompt_ids(part, s) for s in samples])
        longest, up = max(map(len, rows)), lambda n: -(-n // c.pad_multiple) * c.pad_multiple
        width = pad_to or min(up(longest), c.max_dialogue if dialogue else c.max_prompt)
        ids, pads = left_pad(rows, width)
        if not dialogue:
            return {"ids": ids, "pads": pads}
        # a label at every token of an answer, shifted to the position that predicts it
        tail = max(len(row) - first_answer(row) for row in labels)
        labels = left_pad([row[1:width] + [IGNORE] for row in labels], width, IGNORE)[0]
        return {"ids": ids, "pads": pads, "labels": labels[:, -min(width, up(tail + 1)):] if longest <= width else labels}

    def draw(self, part, generator, rate_generator):
        """Randomness of one sample, on the CPU: masked (k,), visible (V,), t (M, k), noise (M, k, C). The mask rate, from `rate_generator`, is a
        truncated normal on [mask_ratio_min, 1] with mode 1 and scale 0.25; all samples of a batch must share it."""
        if part in ("i2t", "text"):
            return {}
        c = self.config
        L, M = (c.image_size // self.stride) ** 2, c.diffusion_batch_mul
        normal, u = NormalDist(1.0, 0.25), torch.rand((), generator=rate_generator, dtype=torch.float64).item()
        low = normal.cdf(c.mask_ratio_min)
        rate = normal.inv_cdf(low + u * (0.5 - low))
        k = min(L, max(1, round(math.ceil(L * rate) / c.mask_bucket)) * c.mask_bucket)
        order = torch.randperm(L, generator=generator)
        return {"masked": order[:k], "visible": order[k:].sort().values,  # visible tokens enter in raster order
                "t": torch.randint(0, T, (M, k), generator=generator), "noise": torch.randn(M, k, latent_channels(c), generator=generator)}

    # ---- losses

    def embed(self, ids, images=None):
        """ids (B, W) with one IMAGE slot per row, images (B, N, h) -> embeddings (B, W - 1 + N, h), the images in the place of the slots.
        """
        text = self.llm.model.embed_tokens(ids.clamp(min=0))
        if images is None:
            return text
        (rows, W), N = ids.shape, images.shape[1]
        slot = (ids == IMAGE).int().argmax(1, keepdim=True)  # (B, 1)
        j = torch.arange(W - 1 + N, device=ids.device)
        source = torch.where(j < slot, j, torch.where(j < slot + N, W + j - slot, j - N + 1))  # a row of [text, images]
        return pick(torch.cat([text, images.to(text.dtype)], 1), source)

    def visual_features(self, latents, visible=None):
        """latents (B, m, n, C) -> encoder output (B, S + V, D), buffers first, and the LLM's input (B, V + S, h), buffers last."""
        x, S = self.mar.encode(latents, visible), self.config.buffer_size
        z = self.proj_in(x)
        return x, torch.cat([z[:, S:], z[:, :S]], 1)

    def fuse(self, latents, visible, pads, context=None, past=None):
        """Visible latents, read by the LLM after the context (B, W, h) or after its cached keys and values -> (B, S + V, D), buffers
        first."""
        x, z = self.visual_features(latents, visible)
        embeds = z if context is None else torch.cat([context, z], 1)
        hidden, S = self.llm(embeds, pads, past, keep=z.shape[1])[0], self.config.buffer_size
        hidden = torch.cat([hidden[:, -S:], hidden[:, :-S]], 1)
        return x + self.proj_out(hidden)

    def generation_loss(self, context, pads, latents, masked, visible, t, noise, count=None):
        """Masked autoregression: DiffLoss of the k masked tokens, given the context and the visible tokens. count: masked tokens to divide
        by."""
        x = self.fuse(latents, visible, pads, context)
        z = self.mar.decode(x, visible, masked, latents.shape[1:3])[:, -masked.shape[1]:]  # (B, k, E)
        mse, vb = self.mar.diffloss.loss_rows(z, pick(latents.flatten(1, 2), masked), t, noise)
        total = (mse + vb).sum() / t.shape[1]
        return total / (masked.numel() if count is None else count)

    def t2i_loss(self, latents, ids, pads, masked, visible, t, noise, count=None):
        """Text-to-image: the context is the text."""
        return self.generation_loss(self.embed(ids), pads, latents, masked, visible, t, noise, count)

    def reca_loss(self, latents, ids, pads, masked, visible, t, noise, source_latents=None, grad_scale=None, count=None):
        """Reconstruction alignment: the image's own clean features, seen by the understanding branch, are the prompt for its generation.

        latents (B, m, n, C): what is generated. ids (B, W), pads (B,): the request with an image slot. source_latents: what is understood,
        the same image where absent (RecA), another one for editing. masked, visible, t, noise: see the top of the file. grad_scale: factor
        on the gradient that reaches the clean branch (None: self.grad_scale). LLM sequence: [pads | prefix | L + S clean | request | V visible +
        S]."""
        scale = self.grad_scale if grad_scale is None else grad_scale
        clean = self.visual_features(latents if source_latents is None else source_latents)[1]  # (B, L + S, h): all tokens, buffers last
        context = self.embed(ids, scale_gradient(clean, scale))
        return self.generation_loss(context, pads, latents, masked, visible, t, noise, count)

    def i2t_loss(self, ids, pads, labels, latents=None, grad_scale=None, count=None):
        """Next-token cross entropy on the answers (labels (B, A): of the last A positions), with the image in the context; without it text
        only."""
        scale = self.grad_scale if grad_scale is None else grad_scale
        images = None if latents is None else scale_gradient(self.visual_features(latents)[1], scale)
        hidden = self.llm(self.embed(ids, images), pads, keep=labels.shape[1])[0]
        return linear_cross_entropy(hidden.flatten(0, 1), self.llm.lm_head.weight, labels.flatten(), ignore_index=IGNORE, count=count)

    def align_loss(self, words, latents, kind="contrast"):
        """Base training from scratch only, see word_alignment. words (B, V): 1 where the caption has the id."""
        seen = self.visual_features(latents)[1][:, :latents.shape[1] * latents.shape[2]]  # without buffers: they are no places
        return word_alignment(seen, words, self.llm.model.embed_tokens.weight[:words.shape[1]], kind)

    def forward(self, batch):
        """{part: tensors} -> {part: loss}, all parts in one forward."""
        losses = {"recon": self.reca_loss, "edit": self.reca_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss, "text": self.i2t_loss,
                  "align": self.align_loss, "words": lambda **t: self.align_loss(kind="presence", **t), "oracle": self.t2i_loss, "uncond": self.t2i_loss}
        return {part: losses[part](**tensors) for part, tensors in batch.items()}

    # ---- samplers

    @torch.no_grad()
    def sample(self, context, pads, grid, cfg=None, steps=None, temperature=1.0, schedule="constant", orders=None, noise=None,
               generator=None):
        """Masked autoregression -> latents (R, m, n, C), or (R/2, m, n, C) where cfg != 1: then the first half of the rows is conditional,
        the second half their unconditional partners. context (R, W, h), pads (R,): embeddings of the rows' contexts; grid (m, n); steps:
        passes over the grid; schedule: guidance "constant", or "linear", which grows from 1 to cfg with the number of tokens made.
        Randomness, drawn from `generator` where absent: orders (R, L), equal for partners, and noise, per step what DiffLoss.sample takes.
        """
        if schedule not in ("constant", "linear"):
            raise ValueError(f"schedule {schedule!r}: expected constant or linear")
        cfg, steps = self.config.cfg if cfg is None else cfg, steps or self.config.mask_steps
        R, L, device = len(context), grid[0] * grid[1], context.device
        n = R // 2 if cfg != 1 else R
        if orders is None:
            where = generator.device if generator is not None else "cpu"
            orders = torch.stack([torch.randperm(L, generator=generator, device=where) for _ in range(n)]).repeat(R // n, 1)
        orders = orders.to(device)
        past = self.llm(context, pads, keep=1)[1]  # the context is read once; the image part is computed anew in every step
        tokens, masked_now = torch.zeros(R, L, latent_channels(self.config), device=device), L
        for s in range(steps):
            masked_next = max(1, min(masked_now - 1, math.floor(L * math.cos(math.pi / 2 * (s + 1) / steps))))
            left = 0 if s == steps - 1 else masked_next  # the last step takes everything that is left
            if left == masked_now:  # more steps than tokens
                continue
            visible = orders[:, masked_now:].sort(1).values
            predicted = orders[:, left:masked_now].sort(1).values  # raster order, in which the noise is counted
            x = self.fuse(tokens.view(R, *grid, -1), visible, pads, past=past)
            z = self.mar.decode(x, visible, torch.cat([orders[:, :left], predicted], 1), grid)[:, left - masked_now:]
            guidance = cfg if schedule == "constant" else 1 + (cfg - 1) * (L - masked_next) / L
            new = self.mar.diffloss.sample(z.flatten(0, 1), temperature, guidance, noise[s] if noise else None, generator)
            new = new.view(R, -1, new.shape[-1])[:n].repeat(R // n, 1, 1)
            tokens = tokens.scatter(1, predicted[..., None].expand_as(new), new)
            masked_now = left
        return tokens[:n].view(n, *grid, -1)

    def context(self, rows, latents=None, width=None):
        """Lists of ids, and clean latents where the rows have an image slot -> embeddings (R, W, h), pads (R,)."""
        ids, pads = (x.to(self.device) for x in left_pad(rows, width or max(map(len, rows))))
        return self.embed(ids, None if latents is None else self.visual_features(latents)[1]), pads

    @property
    def device(self):
        return self.llm.lm_head.weight.device

    @torch.no_grad()
    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None, schedule="constant"):
        """Captions -> images (B, 3, H, W) in [-1, 1]. size: pixels, one number or (H, W); cfg, steps, size: the config's where None."""
        size = size or self.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if any(side % self.stride for side in size):
            raise ValueError(f"size {size}: both sides must be multiples of {self.stride} pixels")
        rows = [self.prompt_ids("t2i", {"caption": p})[0] for p in prompts]
        if cfg != 1:
            rows += [self.prompt_ids("t2i", {"drop": True})[0]] * len(prompts)
        context, pads = self.context(rows)
        grid = tuple(side // self.stride for side in size)
        return self.decode_latents(self.sample(context, pads, grid, cfg, steps, temperature, schedule, generator=generator)).clamp(-1, 1)

    @torch.no_grad()
    def sample_with_image(self, images, rows, unconditional, cfg=None, **options):
        """images (B, 3, H, W), rows of ids with an image slot, ids of the unconditional row (text only), options of `sample` -> images, not
        clamped."""
        latents = self.precompute(images.to(self.device))["latents"]
        context, pads = self.context(rows, latents)
        if cfg != 1:
            other = self.context([unconditional] * len(rows), width=context.shape[1])
            context, pads = torch.cat([context, other[0]]), torch.cat([pads, other[1]])
        return self.decode_latents(self.sample(context, pads, latents.shape[1:3], cfg, **options))

    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0, generator=None,
                    schedule="constant"):
        """images (B, 3, H, W) in [-1, 1] -> what the model draws when it is shown them; prompt: one, or one per image. As in the published
        sampler the image follows "user\\n" at once, without the blank line of RecA's training rows."""
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        rows = [insert_image(self.tokenizer, self.tokenizer.encode(TEMPLATE.format(p))) for p in prompts]
        unconditional = self.prompt_ids("t2i", {"drop": True})[0]
        return self.sample_with_image(images, rows, unconditional, cfg, steps=steps, temperature=temperature, schedule=schedule,
                                      generator=generator).clamp(-1, 1)

    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None, schedule="constant"):
        """images (B, 3, H, W) in [-1, 1] and one instruction for each -> edited images. The rows are those of the `edit` loss."""
        rows = [self.prompt_ids("edit", {"instruction": text})[0] for text in instructions]
        unconditional = self.prompt_ids("t2i", {"drop": True})[0]
        return self.sample_with_image(images, rows, unconditional, cfg, steps=steps, temperature=temperature, schedule=schedule,
                                      generator=generator).clamp(-1, 1)

    @torch.no_grad()
    def generate_tokens(self, context, pads, max_new_tokens, temperature=0.0, generator=None, stop=None):
        """Continues the rows (B, W, h), greedily at temperature 0 -> ids (B, at most max_new_tokens). Ends once every row has had the id
        `stop`."""
        x, past, out, done = context, None, [], torch.zeros(len(context), dtype=torch.bool, device=context.device)
        while len(out) < max_new_tokens and not bool(done.all()):
            hidden, past = self.llm(x, pads, past, keep=1)
            logits = self.llm.lm_head(hidden[:, -1]).float()  # (B, vocabulary)
            if temperature > 0:
                p = torch.softmax(logits / temperature, -1).to(generator.device if generator is not None else logits.device)
                token = torch.multinomial(p, 1, generator=generator).to(logits.device)
            else:
                token = logits.argmax(-1, keepdim=True)  # (B, 1)
            out.append(token)
            done = done | (token[:, 0] == (-1 if stop is None else stop))
            x = self.llm.model.embed_tokens(token)
        return torch.cat(out, 1)

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers."""
        rows = [self.prompt_ids("text" if images is None else "i2t", {"question": q, "answer": ""}) for q in questions]
        latents = None if images is None else self.precompute(images.to(self.device))["latents"]
        context, pads = self.context([ids[:first_answer(labels)] for ids, labels in rows], latents)
        end = self.tokenizer.special["<|im_end|>"]
        tokens = self.generate_tokens(context, pads, max_new_tokens, temperature, generator, end).tolist()
        return [self.tokenizer.decode(row[:row.index(end)] if end in row else row) for row in tokens]

    # ---- published weights

    @classmethod
    def load_published(cls, path, config=None, tokenizer_path=None, tokenizer=None, device="cpu", dtype=None):
        """path: harmon_*.pth together with tokenizer_path = kl16.ckpt, or a checkpoint (file or folder, sharded or not) that holds the VAE
        under `vae.` -> model in eval mode. Strict, but one of the two names of the tied embedding may be absent. config: a name, a
        HarmonConfig, or None for the published one that fits. The model is built without memory and filled in `dtype` (None: float32) on
        `device`; the VAE is float32 always. Raises FileNotFoundError, and ValueError with a table of the keys that do not fit."""
        state = read_weights(path, device)
        embed, head = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
        if embed not in state and head not in state:
            raise ValueError(f"{path}: no {embed} among its {len(state)} keys ({', '.join(list(state)[:3])}, ...): not a Harmon checkpoint")
        state[embed] = state.get(embed, state.get(head))
        state[head] = state[embed]
        if config is None:
            sizes = {c.hidden_size: name for name, c in CONFIGS.items() if name != "tiny"}
            if state[embed].shape[1] not in sizes:
                raise ValueError(f"{path}: hidden size {state[embed].shape[1]}, published: {sizes}: pass config=HarmonConfig(...)")
            config = sizes[state[embed].shape[1]]
        if tokenizer_path is not None:
            parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the file may hold its training loss as well
            state |= {f"vae.{k}": v for k, v in read_weights(tokenizer_path, device).items() if k.startswith(parts)}
        elif not any(k.startswith("vae.") for k in state):
            raise ValueError(f"{path}: {len(state)} keys and no vae.*: the VAE is a file of its own, give kl16.ckpt with --tokenizer-ckpt")
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer).to(dtype or torch.float32)
        model.vae.float()
        load_strict(model, state, str(path) if tokenizer_path is None else f"{path} + {tokenizer_path}")
        model.llm.lm_head.weight = model.llm.model.embed_tokens.weight
        return model.eval()

    def flops_per_sample(self, part, text_tokens=32):
        """Estimate for MFU: 6 operations per weight and token plus attention, forward and backward, one sample at the mean mask rate."""
        c, weights = self.config, lambda module: sum(p.numel() for p in module.parameters())
        generates, L, S = part in ("recon", "edit", "t2i"), (c.image_size // self.stride) ** 2, c.buffer_size
        clean = 0 if part in ("t2i", "text") else L + S
        unit, edge = NormalDist(), (1 - c.mask_ratio_min) / 0.25
        mean = 0.25 * (unit.pdf(0) - unit.pdf(edge)) / (unit.cdf(edge) - 0.5)  # share of visible tokens under the truncated normal
        shown = mean * L + S if generates else 0
        encoder, decoder, sequence = weights(self.mar.encoder_blocks), weights(self.mar.decoder_blocks), text_tokens + clean + shown
        total = sequence * weights(self.llm.model.layers) + (clean + 2 * shown) * weights(self.proj_in) + (clean + shown) * encoder
        scores = sequence ** 2 / 2 * c.hidden_size * c.num_layers + (clean ** 2 + shown ** 2) * c.encoder_dim * c.encoder_depth
        if generates:
            total += (L + S) * decoder + (L + S - shown) * c.diffusion_batch_mul * weights(self.mar.diffloss)
            scores += (L + S) ** 2 * c.decoder_dim * c.decoder_depth
        else:
            total += text_tokens / 2 * c.vocab_size * c.hidden_size
        return 6 * total + 12 * scores

Model = Harmon
