"""Harmon: a unified multimodal model on masked autoregression (MAR), and its RecA post-training (arXiv 2509.07295).

One MAR encoder (a ViT over continuous VAE latents and a few "buffer" tokens) understands all latents of a clean image,
and reads those that are known so far of one in the making. A causal Qwen2.5 decoder reads text and its features; a MAR
decoder fills the grid; a small MLP (DiffLoss) turns each of its outputs into a latent by diffusion.

    clean latents ----> MAR encoder --proj_in--> |
    text ----> embedding ----------------------> | causal LLM --lm_head--> answer
    visible latents --> MAR encoder --proj_in--> |      |
                             |                          +--proj_out--> + --> MAR decoder --> DiffLoss per masked token
                             +-----------------------------------------^

RecA (`Harmon.reca_loss`): the clean features of an image are a very dense prompt for the masked latents of the SAME
image; no captions. Editing is the same loss with the clean features of the source and the latents of the target.

Conventions. B rows, (m, n) latent grid, L = m*n tokens, S buffers, V visible and k masked tokens (V + k = L, equal in a
batch), C numbers per latent token, D and E the widths of the MAR encoder and decoder, h of the LLM, W tokens of a text
row; c is a HarmonConfig. Images are (B, 3, H, W) in [-1, 1]. Text rows are left-padded: `pads` (B,) counts the slots
before the first token, so query i of row b sees the keys [pads[b], i], and its rotary position is i - pads[b].
Everything random is an argument: `masked` (B, k) and `visible` (B, V) are positions in the grid (two tensors, since
torch.compile cannot cut one at a length that varies); t (B, M, k) and noise (B, M, k, C) belong to M diffusion draws of
each masked token, in the order of `masked`.
"""
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import NormalDist

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import vision_encoder as vision
from checkpoint import atomic, load_strict, read_weights
from custom_kernels import add_noise, attention, attention_plan, diffusion_loss_rows, linear_cross_entropy, rms_norm
from custom_kernels.cuda_graph import graphed
from custom_kernels.diffusion_process import T, diffusion_step, kept_steps, tables_on
from custom_kernels.products import sdpa
from custom_kernels.watch import boxes, watching
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig
from vision_encoder import caption_words, preprocess_pad, preprocess_stretch, to_pixels, words_loss

IMAGE = -200  # the id that marks where an image goes into a text row
IGNORE = -100  # label of a position that is not trained
UNCONDITIONAL = "Generate an image."  # the prompt where the condition is dropped

# ---------------------------------------------------------------------------------------------------------------------
# configurations and recipes

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
    diffloss_depth: int = 6
    diffloss_width: int = 1024
    diffusion_batch_mul: int = 4  # M: draws of (t, noise) per masked token and step
    num_sampling_steps: str = "100"  # see kept_steps
    image_size: int = 512  # pixels, training and default of the sampler
    vae: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    mask_ratio_min: float = 0.7  # training masks at least this share of an image's tokens
    mask_bucket: int = 32  # masked tokens come in multiples of this, so that shapes take few values
    context_grad: float = 0.1  # factor on the clean features' gradient: damps proj_in and the encoder there
    max_prompt: int = 128  # text tokens of a generation row
    max_dialogue: int = 1472  # text tokens of an understanding row
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    cfg: float = 3.0  # guidance of the sampler
    mask_steps: int = 64  # passes through the model per image

CONFIGS = {
    "tiny": HarmonConfig(vocab_size=1024, hidden_size=128, intermediate_size=240, num_layers=4, num_heads=4,
                         num_kv_heads=2, encoder_dim=96, encoder_depth=2, encoder_heads=4, decoder_dim=96,
                         decoder_depth=2, decoder_heads=4, mlp_ratio=2.5, buffer_size=9, native_grid=3, class_num=1,
                         dropout=0.0, diffloss_depth=3, diffloss_width=192, mask_ratio_min=0.3, mask_bucket=1,
                         # 24 steps from t = 949: at 999 a small net's error is multiplied by 1,000
                         num_sampling_steps="2,2,2,2,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2,0", image_size=48,
                         vae=TOKENIZERS["tiny-kl"], max_prompt=64, max_dialogue=128, pad_multiple=4, cfg=4.0,
                         mask_steps=9),
    "harmon-0.5b": HarmonConfig(),
    "harmon-1.5b": HarmonConfig(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, encoder_dim=1280,
                                encoder_depth=20, encoder_heads=16, decoder_dim=1280, decoder_depth=20,
                                decoder_heads=16, diffloss_depth=12, diffloss_width=1536),
}

# What is missing takes train.py's default. RecA is as published: a step is 4 micro-batches of 96 (0.5b) or 48 (1.5b) on
# each GPU, 2 to reconstruct and 2 of questions; ours hold half of each. How many GPUs is not said: 8 here.
# The authors count micro-batches: 3,000 (0.5b) and 5,000 (1.5b) of a cosine over 50,000, after 500 of warm-up; their
# step is taken at the last of 4, hence 0.75. The shared backbone needs questions; captions come with --t2i-weight.
PUBLISHED = dict(lr=1e-5, warmup=125, warmup_from=0.75, horizon=12500, accum=4)
SIZES = {"harmon-0.5b": dict(PUBLISHED, steps=750, batch=1536),
         "harmon-1.5b": dict(PUBLISHED, steps=1250, batch=768)}
TINY = dict(lr=2e-4, steps=300, batch=96)
RECIPES = {
    # A drawing loss is about 0.05 where a cross entropy is about 0.5: weights of 8 to 1 share the backbone's gradient.
    "tiny": {
        # Muon needs fewer samples; its decay keeps picture tokens from growing so large that blocks cannot add to
        # them. Four questions a row, and `words`, teach the encoder what is where.
        "base": dict(lr=2e-3, muon_lr=0.005, muon_decay=0.1, warmup=100, steps=6000, batch=48, t2i_weight=8.0,
                     mix={"t2i": 1.0, "i2t": 0.75, "edit": 0.5, "text": 0.25, "words": 0.5}, questions=4,
                     pool=40000),
        # Captions stand beside RecA: pictures name everything, short prompts do not, and what RecA alone teaches is
        # that whatever is not named is not there.
        "reca": dict(TINY, mix={"recon": 0.5, "t2i": 0.5, "i2t": 1.0}, i2t_weight=0.125),
        "sft": dict(TINY, mix={"t2i": 1.0, "i2t": 1.0}, t2i_weight=8.0),  # captions alone
        # RecA on a user's own pictures, which have no captions
        "plain": dict(TINY, mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}, i2t_weight=0.125, t2i_weight=0.0),
    },
    **{size: {"reca": dict(flags, mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}, t2i_weight=0.0),
              "sft": dict(flags, mix={"t2i": 1.0, "i2t": 1.0})} for size, flags in SIZES.items()},
}

# ---------------------------------------------------------------------------------------------------------------------
# blocks

def rope_tables(positions, dim, theta):
    """positions (B, T) -> cos, sin (B, 1, T, dim/2) float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, T, dim), the two halves of dim being the pairs."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

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
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(h, inner, bias=False),
                                  "up_proj": nn.Linear(h, inner, bias=False),
                                  "down_proj": nn.Linear(inner, h, bias=False)})

    def forward(self, x, cos, sin, plan, past=None, keep=None):
        """x (B, T, h) -> (x, (k, v)). past: see Qwen2. keep: only the last `keep` are queries, and rows that come out.
        """
        attn, mlp = self.self_attn, self.mlp
        # one product for q, k and v: joining the weights is cheap next to three passes over x
        weight = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight])
        bias = torch.cat([attn.q_proj.bias, attn.k_proj.bias, attn.v_proj.bias])
        qkv = F.linear(self.input_layernorm(x), weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)  # (B, heads, T, dim)
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 1)
        if past is not None:
            past[..., -k.shape[2]:, :] = torch.stack([k, v])
            k, v = past
        if keep is not None:
            x, q = x[:, -keep:], q[:, :, -keep:]
        x = x + attn.o_proj(attention(q, k, v, None, None, plan).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)), (k, v)

class Qwen2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                                    "layers": nn.ModuleList([DecoderLayer(c) for _ in range(c.num_layers)]),
                                    "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight  # tied; both names are in the published files

    def forward(self, x, pads, past=None, keep=None):
        """x (B, T, h) -> final hidden states, of the last `keep` positions (None: all), and keys and values per layer.
        past: of each layer those of earlier tokens (2, B, kv_heads, n, dim), at whose end these are written."""
        c, start = self.config, past[0].shape[3] - x.shape[1] if past else 0
        past = past or [None] * c.num_layers
        total = start + x.shape[1]
        slots = torch.arange(start, total, device=x.device)[None]  # (1, T)
        positions = (slots - pads[:, None]).clamp(min=0)  # (B, T): pads do not count
        cos, sin = rope_tables(positions, c.hidden_size // c.num_heads, c.rope_theta)
        lo, hi = pads[:, None].expand(-1, x.shape[1]), (slots + 1).expand(len(x), -1)
        plan, cache = attention_plan(lo, hi, total), []
        for i, layer in enumerate(self.model.layers):
            last = keep if i == c.num_layers - 1 else None  # nobody attends to the last layer's other outputs
            if last is not None:
                plan = attention_plan(lo[:, -last:], hi[:, -last:], total)
            x, kv = layer(x, cos, sin, plan, past[i], last)
            cache.append(kv)
        return self.model.norm(x), cache

class Block(nn.Module):
    def __init__(self, dim, heads, c):
        super().__init__()
        self.heads, self.dropout, hidden = heads, c.dropout, int(dim * c.mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x):  # (B, N, dim)
        drop = self.dropout if self.training else 0.0
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, dim/heads)
        y = sdpa(q, k, v, dropout_p=drop).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.attn.proj(y), drop)
        y = F.dropout(F.gelu(self.mlp.fc1(self.norm2(x))), drop)
        return x + F.dropout(self.mlp.fc2(y), drop)

def pick(x, index):
    """x (B, N, width), index (B, K) -> the rows x[b, index[b]], (B, K, width)."""
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
        self.encoder_blocks = nn.Sequential(*[Block(D, c.encoder_heads, c) for _ in range(c.encoder_depth)])
        self.encoder_norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_embed, self.mask_token = nn.Linear(D, E), nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, c.buffer_size + cells, E))
        self.decoder_blocks = nn.Sequential(*[Block(E, c.decoder_heads, c) for _ in range(c.decoder_depth)])
        self.decoder_norm = nn.LayerNorm(E, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, cells, E))
        self.diffloss = DiffLoss(c)

    def positions(self, table, grid):
        """Learned table (1, [S +] native*native, dim) -> rows of buffers (S, dim) and of the grid (L, dim), resized."""
        side = self.config.native_grid
        buffers, image = table[0].split([table.shape[1] - side * side, side * side])
        if tuple(grid) != (side, side):
            image = image.T.reshape(1, -1, side, side)
            image = F.interpolate(image, size=grid, mode="bilinear", align_corners=False)[0].flatten(1).T
        return buffers, image

    def encode(self, latents, visible=None):
        """latents (B, m, n, C) -> (B, S + V, D). visible (B, V): positions in raster order, or None for all of them."""
        buffer_pos, image_pos = self.positions(self.encoder_pos_embed_learned, latents.shape[1:3])
        tokens = latents.flatten(1, 2).to(self.z_proj.weight.dtype)  # (B, L, C)
        if visible is not None:
            tokens, image_pos = pick(tokens, visible), F.embedding(visible, image_pos)
        buffers = (self.fake_latent + buffer_pos).expand(len(tokens), -1, -1)
        x = self.z_proj_ln(torch.cat([buffers, self.z_proj(tokens) + image_pos], 1))
        return self.encoder_norm(self.encoder_blocks(x))

    def decode(self, x, visible, masked, grid):
        """x (B, S + V, D) -> conditions of DiffLoss (B, V + k, E), visible before masked: attention needs no order."""
        order = torch.cat([visible, masked], 1)
        buffer_pos, image_pos = self.positions(self.decoder_pos_embed_learned, grid)
        pos = torch.cat([buffer_pos.expand(len(x), -1, -1), F.embedding(order, image_pos)], 1)
        x = torch.cat([self.decoder_embed(x), self.mask_token.expand(len(x), masked.shape[1], -1)], 1) + pos
        x = self.decoder_norm(self.decoder_blocks(x))[:, self.config.buffer_size:]
        return x + F.embedding(order, self.positions(self.diffusion_pos_embed_learned, grid)[1])

def latent_channels(c):
    return c.vae.z_channels * c.patch_size ** 2

def modulate(normed, shift, scale):
    """Adaptive LayerNorm: normed * (1 + scale) + shift."""
    return torch.addcmul(normed + shift, normed, scale)

class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        """x (N, width), y (N, width): SiLU of the condition, which all blocks share."""
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, -1)
        return torch.addcmul(x, gate, self.mlp(modulate(self.in_ln(x), shift, scale)))

class Denoiser(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, width, channels = c, c.diffloss_width, latent_channels(c)
        self.time_embed = nn.ModuleDict({
            "mlp": nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.cond_embed, self.input_proj = nn.Linear(c.decoder_dim, width), nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList([ResBlock(width) for _ in range(c.diffloss_depth)])
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, 2 * channels), "adaLN_modulation": modulation})

    def time(self, t):
        """t int64 in 0..999, any shape -> (..., width)."""
        if t.numel() > T:  # more rows than different steps: embed each step once
            return F.embedding(t, self.time(torch.arange(T, device=t.device)))
        angles = t[..., None] * torch.exp(torch.arange(128, device=t.device) * (-math.log(10000) / 128))
        return self.time_embed.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.input_proj.weight.dtype))

    def forward(self, x, t, z):
        """x (..., C); t (...) and z (..., E) broadcast to its leading axes -> (..., 2C): epsilon, variance value."""
        x = self.input_proj(x.to(self.input_proj.weight.dtype))
        y = F.silu(self.time(t) + self.cond_embed(z)).expand_as(x).flatten(0, -2)
        shape, x = x.shape, x.flatten(0, -2)  # (N, width)
        for block in self.res_blocks:
            x = block(x, y)
        shift, scale = self.final_layer.adaLN_modulation[1](y).chunk(2, -1)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return self.final_layer.linear(modulate(normed, shift, scale)).view(*shape[:-1], -1)

class DiffLoss(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net, self.spacing = Denoiser(c), c.num_sampling_steps
        kept_steps(self.spacing)  # raises here what sampling would raise only after training

    def loss_rows(self, z, x0, t, noise):
        """Conditions z (B, k, E), latents x0 (B, k, C) -> mse of epsilon, variational bound, (B*M*k,) float32 each."""
        tables = tables_on("", str(z.device))[0]
        x0, noise, t_rows = x0[:, None].expand_as(noise).flatten(0, 2).float(), noise.flatten(0, 2), t.flatten()
        x_t = add_noise(x0, noise, t_rows, tables).view(*t.shape, -1)
        return diffusion_loss_rows(self.net(x_t, t, z[:, None]).flatten(0, 2), x0, noise, t_rows, tables)

    @torch.no_grad()
    def sample(self, z, temperature, cfg, noise, graph=None, pad_to=1):
        """Conditions z (N, E) -> tokens (N, C). With cfg != 1 z is [conditional rows, as many unconditional rows], and
        epsilon is guided, not the variance. noise: (initial (N or N/2, C), per step (steps, N or N/2, C)); only
        that of the conditional rows reaches a picture. graph: `denoise`, recorded, whose rows should come in few
        numbers: either kind is padded to a multiple of pad_to."""
        n = len(z) // 2 if cfg != 1 else len(z)
        more, kinds = -n % pad_to, [t.to(z.device).unflatten(-2, (-1, n)) for t in (z, *noise)]  # (.., 1 or 2, n, ..)
        z, x, noise = (F.pad(t, (0, 0, 0, more)).flatten(-3, -2) for t in kinds)
        tokens = (graph or self.denoise)(z, x, noise, temperature, cfg)
        return tokens.unflatten(0, (-1, n + more))[:, :n].flatten(0, 1)

    def denoise(self, z, x, noise, temperature, cfg):
        """All steps of `sample`, a function of its arguments and weights alone: z (N, E), x (n, C) and noise (steps, N
        or n, C) -> (N, C). n is N / 2 with guidance. temperature, cfg: numbers, or tensors ()."""
        timesteps, n = tables_on(self.spacing, str(z.device))[2], len(x)
        x, steps = x.repeat(len(z) // n, 1), noise.repeat(1, len(z) // noise.shape[1], 1)
        for j, i in enumerate(reversed(range(len(timesteps)))):
            out = self.net(x[:n].repeat(len(z) // n, 1), torch.full((1,), timesteps[i], device=z.device), z).float()
            if n < len(z):
                epsilon, v = out.chunk(2, -1)
                epsilon = epsilon[n:] + cfg * (epsilon[:n] - epsilon[n:])
                out = torch.cat([epsilon.repeat(2, 1), v], -1)
            x = diffusion_step(out, x, i, steps[j], temperature, self.spacing)[0]
        return x

# ---------------------------------------------------------------------------------------------------------------------
# prompts and layouts

def insert_image(tokenizer, ids):
    """Puts the image slot behind the first token that ends a line; for Qwen a "\\n\\n" is one token."""
    at = 1 + next(i for i, token in enumerate(ids) if "\n" in tokenizer.decode([token]))
    return ids[:at] + [IMAGE] + ids[at:]

def left_pad(rows, width, fill=0):
    """Lists of ids -> (B, width) int64 and the number of pads per row (B,). Longer rows lose their end."""
    pads = [max(0, width - len(row)) for row in rows]
    return torch.tensor([[fill] * n + row[:width] for n, row in zip(pads, rows)]), torch.tensor(pads)

# ---------------------------------------------------------------------------------------------------------------------
# the model

class Harmon(nn.Module):
    image_tokenizer = "vae"  # the frozen autoencoder: this submodule, and its config in HarmonConfig
    encoders = ("vae",)  # the submodules that precompute uses
    trace = None  # or a list, to which `paint` and `sample` add how a picture comes about

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.stage = config, tokenizer, "reca"
        if missing := tokenizer and {"<|im_start|>", "<|im_end|>"} - set(tokenizer.special):
            raise ValueError(f"text tokenizer without {', '.join(sorted(missing))}: give Qwen2.5's (--text-tokenizer)")
        self.vae = Autoencoder(config.vae).requires_grad_(False)
        self.stride = self.vae.stride * config.patch_size  # pixels per latent token, in each direction
        self.llm = Qwen2(config)
        self.mar = MAR(config)
        h, D = config.hidden_size, config.encoder_dim
        self.proj_in = nn.Sequential(nn.Linear(D, h), nn.SiLU(), nn.Linear(h, h))
        self.proj_out = nn.Sequential(nn.Linear(h, h), nn.SiLU(), nn.Linear(h, D))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: Xavier, or N(0, 0.02) in the LLM and learned tables; DiffLoss starts as the identity."""
        for name, p in self.named_parameters():
            if name.startswith("vae."):
                continue
            if name.endswith(".bias") or "adaLN_modulation" in name or "final_layer" in name:
                nn.init.zeros_(p)
            elif p.ndim == 2 and (name.startswith("llm.") or "time_embed" in name or "class_emb" in name):
                nn.init.normal_(p, std=0.02)
            elif p.ndim == 2 and name.endswith(".weight"):
                nn.init.xavier_uniform_(p)
        for name, p in self.mar.named_parameters(recurse=False):  # positions of 0.02 would not be seen beside latents
            nn.init.normal_(p, std=0.5 if name == "encoder_pos_embed_learned" else 0.02)

    # ---- losses

    def reca_loss(self, latents, ids, pads, masked, visible, t, noise, source_latents=None, context_grad=None,
                  count=None):
        """Reconstruction alignment: the clean features of an image, as the understanding branch sees it, are the prompt
        for its own generation. The LLM reads [pads | "user" | L + S clean | request | V visible + S].

        latents (B, m, n, C): what is generated. ids (B, W), pads (B,): the request with an image slot. masked, visible,
        t, noise: see the top of the file. source_latents: what is understood (None: the same image; another one for
        editing). context_grad: factor on the gradient that reaches the clean features (None: the stage's). count: to
        divide the sum over the masked tokens by (None: their number)."""
        source = latents if source_latents is None else source_latents  # (B, m, n, C)
        clean = self.clean_features(source, context_grad)  # (B, L + S, h): the image as understanding sees it
        context = self.embed(ids, clean)  # (B, W - 1 + L + S, h): the request with the image in its slot
        x = self.fuse(latents, visible, pads, context)  # (B, S + V, D): the visible latents, read after that context
        z = self.mar.decode(x, visible, masked, latents.shape[1:3])  # (B, V + k, E): a condition for every token
        return self.token_loss(z, latents, masked, t, noise, count)  # denoise the k masked latents, given z

    def t2i_loss(self, latents, ids, pads, masked, visible, t, noise, count=None):
        """Text-to-image: the same loss, but the context is the text."""
        x = self.fuse(latents, visible, pads, self.embed(ids))
        z = self.mar.decode(x, visible, masked, latents.shape[1:3])
        return self.token_loss(z, latents, masked, t, noise, count)

    def i2t_loss(self, ids, pads, labels, latents=None, count=None):
        """Next-token cross entropy on the answers. ids (B, W), labels (B, A): of the last A positions."""
        images = None if latents is None else self.clean_features(latents)
        hidden = self.llm(self.embed(ids, images), pads, keep=labels.shape[1])[0].flatten(0, 1)  # (B*A, h)
        return linear_cross_entropy(hidden, self.llm.lm_head.weight, labels.flatten(), None, IGNORE, count)

    def token_loss(self, z, latents, masked, t, noise, count=None):
        """DiffLoss of the masked tokens. z (B, V + k, E): conditions, the masked tokens' last."""
        targets = pick(latents.flatten(1, 2), masked)  # (B, k, C)
        mse, vb = self.mar.diffloss.loss_rows(z[:, -masked.shape[1]:], targets, t, noise)  # (B*M*k,) each
        return (mse + vb).sum() / t.shape[1] / (masked.numel() if count is None else count)

    def clean_features(self, latents, context_grad=None):
        """latents (B, m, n, C) -> what the LLM reads of an image (B, L + S, h), its gradient times context_grad."""
        if context_grad is None:
            context_grad = 1.0 if self.stage == "base" else self.config.context_grad
        clean = self.visual_features(latents)[1]
        return clean if context_grad == 1 else clean.detach() + context_grad * (clean - clean.detach())

    def visual_features(self, latents, visible=None):
        """latents (B, m, n, C) -> encoder output (B, S + V, D), and the LLM's input (B, V + S, h), buffers last."""
        x, S = self.mar.encode(latents, visible), self.config.buffer_size
        z = self.proj_in(x)
        return x, torch.cat([z[:, S:], z[:, :S]], 1)

    def embed(self, ids, images=None):
        """ids (B, W) with one IMAGE slot per row, images (B, N, h) that take their place -> (B, W - 1 + N, h)."""
        text = self.llm.model.embed_tokens(ids.clamp(min=0))
        if images is None:
            return text
        (_, W), N = ids.shape, images.shape[1]
        slot = (ids == IMAGE).int().argmax(1, keepdim=True)  # (B, 1)
        j = torch.arange(W - 1 + N, device=ids.device)
        source = torch.where(j < slot, j, torch.where(j < slot + N, W + j - slot, j - N + 1))  # rows of [text, images]
        return pick(torch.cat([text, images.to(text.dtype)], 1), source)

    def fuse(self, latents, visible, pads, context=None, past=None):
        """Visible latents (B rows, or those of the first of guided pairs), read by the LLM after the context (B, W, h)
        or its cached `past` -> (B, S + V, D)."""
        x, z = self.visual_features(latents, visible)
        if len(x) < len(pads):  # guided pairs, which see the same
            x, z = (t.repeat(len(pads) // len(t), 1, 1) for t in (x, z))
        embeds = z if context is None else torch.cat([context, z], 1)
        hidden, S = self.llm(embeds, pads, past, keep=z.shape[1])[0], self.config.buffer_size
        return x + self.proj_out(torch.cat([hidden[:, -S:], hidden[:, :-S]], 1))

    def forward(self, batch):
        """{part: tensors} -> {part: loss}, all parts in one forward."""
        losses = {"recon": self.reca_loss, "edit": self.reca_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss,
                  "text": self.i2t_loss, "uncond": self.t2i_loss, "words": self.words_loss}
        return {part: losses[part](**tensors) for part, tensors in batch.items()}

    # ---- samplers

    def sampling_steps(self, job):
        """How many steps the sampler of this name takes unless it is told."""
        return self.config.mask_steps

    @torch.no_grad()
    def sample(self, context, pads, grid, cfg, steps=None, temperature=1.0, schedule="constant", orders=None,
               noise=None, generator=None):
        """Masked autoregression after context (R, W, h) -> latents (R, m, n, C), or, with cfg != 1, (R/2, m, n, C): the
        second half of the rows are then the unconditional partners of the first. schedule of guidance: "constant", or
        "linear", from 1 to cfg. orders (R, L), equal for partners; noise: per step what DiffLoss.sample takes.
        generator: see row_generators; with guidance or without, a row draws its order, then each step's noise."""
        if schedule not in ("constant", "linear"):
            raise ValueError(f"schedule {schedule!r}: expected constant or linear")
        R, L, device, steps = len(context), grid[0] * grid[1], context.device, steps or self.config.mask_steps
        n, times = R // 2 if cfg != 1 else R, len(tables_on(self.mar.diffloss.spacing, str(device))[2])
        generators = vision.row_generators(generator, n)
        orders = vision.draw_rows(torch.randperm, generators, L) if orders is None else orders
        orders = orders.to(device).repeat(R // len(orders), 1)
        kv = self.llm(context, pads, keep=1)[1]  # the context is read once; the image part is computed in every step
        kv, read = [F.pad(torch.stack(t), (0, 0, 0, L + self.config.buffer_size)) for t in kv], context.shape[1]
        C, counts = latent_channels(self.config), [L]  # how many tokens are masked before each step, and at the end
        for s in range(steps):
            counts.append(max(1, min(counts[-1] - 1, math.floor(L * math.cos(math.pi / 2 * (s + 1) / steps)))))
        counts[-1] = 0  # the last step takes everything that is left
        graph = graphed(self.mar.diffloss.denoise, self.mar.diffloss, device)
        pad_to = n * math.ceil(max(a - b for a, b in pairwise(counts)) / 2) if graph else 1  # two sizes: half, and all
        tokens = torch.zeros(n, L, C, device=device)
        for s, (masked_now, left) in enumerate(pairwise(counts)):
            if left == masked_now:  # more steps than tokens
                continue
            visible = orders[:, masked_now:].sort(1).values
            predicted = orders[:, left:masked_now].sort(1).values  # raster order, in which the noise is counted
            past = [t[..., :read + visible.shape[1] + self.config.buffer_size, :] for t in kv]
            with watching(self.trace is not None) as watch:
                x = self.fuse(tokens.view(n, *grid, -1), visible[:n], pads, past=past)
                z = self.mar.decode(x, visible, torch.cat([orders[:, :left], predicted], 1), grid)
            z = z[:, left - masked_now:]
            scale = cfg if schedule == "constant" else 1 + (cfg - 1) * (L - max(1, left)) / L
            if noise is None:
                drawn = vision.draw_rows(torch.randn, generators, 1 + times, predicted.shape[1], C)  # (n, .., k, C)
                drawn = drawn.transpose(0, 1).flatten(1, 2)
            step_noise = (drawn[0], drawn[1:]) if noise is None else noise[s]  # (n*k, C), (times, n*k, C)
            new = self.mar.diffloss.sample(z.flatten(0, 1), temperature, scale, step_noise, graph, pad_to)
            new = new.view(R, -1, C)[:n]
            tokens = tokens.scatter(1, predicted[:n, :, None].expand_as(new), new)
            if watch:
                looks = torch.full((L, read), math.nan, device=device)
                looks[predicted[0]] = self.looks(watch.seen, read, predicted.shape[1])
                masked = torch.zeros(L, dtype=torch.bool, device=device).index_fill(0, orders[0, :left], True)
                self.trace.append(dict(picture=self.decode_latents(tokens[:1].view(1, *grid, -1)), looks=looks,
                                       masked=masked.view(grid), title=f"step {s + 1}"))
        return tokens.view(n, *grid, -1)

    def looks(self, seen, width, k):
        """Attention of one pass (`Watch.seen`) -> (k, width): where the k latents that are drawn look in the context,
        through the visible latents and the buffers, which alone have read it. A mean over layers."""
        c, S = self.config, self.config.buffer_size
        llm = torch.stack(seen[c.encoder_depth:-c.decoder_depth]).mean(0)[0, :, :width]  # (V + S, width)
        mar = torch.stack(seen[-c.decoder_depth:]).mean(0)[0, -k:, :len(llm)]  # (k, S + V)
        return mar @ torch.cat([llm[-S:], llm[:-S]])

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None, schedule="constant"):
        """Captions -> images (B, 3, H, W) in [-1, 1]. size: pixels, one number or (H, W), multiples of self.stride."""
        size = size or self.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if any(side % self.stride for side in size):
            raise ValueError(f"size {size}: both sides must be multiples of {self.stride} pixels")
        rows = [self.prompt_ids("t2i", {"caption": prompt})[0] for prompt in prompts]
        return self.paint(rows, None, size, cfg, steps, temperature, schedule, generator=generator).clamp(-1, 1)

    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0,
                    generator=None):
        """images (B, 3, H, W) in [-1, 1] -> what the model draws when it is shown them. As in the published sampler,
        the image follows "user\\n" at once, without the blank line of RecA's training."""
        rows = [insert_image(self.tokenizer, self.turn(self.encode("user\n" + prompt)))] * len(images)
        return self.paint(rows, images, images.shape[2:], cfg, steps, temperature, generator=generator).clamp(-1, 1)

    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None):
        """images (B, 3, H, W) in [-1, 1], an instruction for each -> edited images. Rows are those of the edit loss."""
        rows = [self.prompt_ids("edit", {"instruction": text})[0] for text in instructions]
        return self.paint(rows, images, images.shape[2:], cfg, steps, temperature, generator=generator).clamp(-1, 1)

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers."""
        part, end = "text" if images is None else "i2t", self.tokenizer.special["<|im_end|>"]
        rows = [self.prompt_ids(part, {"question": question, "answer": ""}) for question in questions]
        context, pads = self.context([ids[:labels.index(end)] for ids, labels in rows], images)
        tokens = self.generate_tokens(context, pads, max_new_tokens, temperature, generator, end).tolist()
        return [self.tokenizer.decode(row[:row.index(end)] if end in row else row) for row in tokens]

    def context(self, rows, images=None, width=None):
        """Lists of ids, and images (R, 3, H, W) for their slots -> embeddings (R, W, h), pads (R,)."""
        ids, pads = (x.to(self.llm.lm_head.weight.device) for x in left_pad(rows, width or max(map(len, rows))))
        if images is not None:
            images = self.visual_features(self.precompute(images.to(ids.device))["latents"])[1]  # (R, L + S, h)
        return self.embed(ids, images), pads

    @torch.no_grad()
    def paint(self, rows, images, size, cfg, *options, unconditional=None, **more):
        """What `context` takes, (H, W), and options of `sample` -> images (R, 3, H, W), not clamped. unconditional: ids
        of the row that guidance leads away from (None: "Generate an image."); it never has an image."""
        cfg = vision.guidance(cfg, self.config.cfg)
        context, pads = self.context(rows, images)
        if self.trace is not None:
            picture = [] if images is None else boxes(*(side // self.stride for side in images.shape[2:]))
            picture += [None] * self.config.buffer_size
            self.trace.append([x for i in rows[0] for x in (picture if i == IMAGE else [self.tokenizer.decode([i])])])
        if cfg != 1:
            empty = unconditional or self.prompt_ids("uncond", {"drop": True})[0]
            other = self.context([empty] * len(rows), width=context.shape[1])
            context, pads = torch.cat([context, other[0]]), torch.cat([pads, other[1]])
        grid = tuple(side // self.stride for side in size)
        return self.decode_latents(self.sample(context, pads, grid, cfg, *options, **more))

    @torch.no_grad()
    def decode_latents(self, latents):
        """latents (B, m, n, C) -> images (B, 3, H, W), not clamped."""
        latents = latents.permute(0, 3, 1, 2).to(self.vae.encoder.conv_in.weight.dtype)
        return self.vae.decode(F.pixel_shuffle(latents, self.config.patch_size)).float()

    @torch.no_grad()
    def generate_tokens(self, context, pads, max_new_tokens, temperature=0.0, generator=None, stop=-1):
        """Continues the rows (B, W, h), greedily at temperature 0, until each has had the id `stop` -> ids (B, new)."""
        out, done, read = [], torch.zeros_like(pads, dtype=torch.bool), context.shape[1]
        generators = vision.row_generators(generator, len(context))
        hidden, kv = self.llm(context, pads, keep=1)
        kv = [F.pad(torch.stack(t), (0, 0, 0, max_new_tokens)) for t in kv]
        while len(out) < max_new_tokens and not bool(done.all()):
            if out:
                x = self.llm.model.embed_tokens(out[-1])
                hidden = self.llm(x, pads, [t[..., :read + len(out), :] for t in kv])[0]
            logits = self.llm.lm_head(hidden[:, -1]).float()  # (B, vocabulary)
            token = vision.next_token(logits, temperature, generators)  # (B, 1)
            out.append(token)
            done = done | (token[:, 0] == stop)
        return torch.cat(out, 1)

    # ---- what train.py needs

    def trainable_parameters(self, stage):
        """-> [(name, parameter)]: all but the VAE, and class_emb, which nothing reads. Sets stage and requires_grad."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.stage = stage
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith("vae.") and name != "mar.class_emb.weight")
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe's exemptions from weight decay. Embeddings, positional tables and mask tokens decay."""
        return p.ndim == 1 or name.endswith(".bias") or "diffloss" in name

    def blocks(self):
        """The repeated modules, which recomputation and sharding wrap."""
        mar = self.mar
        return [*self.llm.model.layers, *mar.encoder_blocks, *mar.decoder_blocks, *mar.diffloss.net.res_blocks]

    def preprocess(self, image, purpose):
        """PIL image -> (3, size, size) in [-1, 1], as published: padded, stretched to the longer side, or resized."""
        size = self.config.image_size
        if purpose in ("i2t", "answer", "recon"):
            return (preprocess_stretch if purpose == "recon" else preprocess_pad)(image, size)
        return to_pixels(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

    @torch.no_grad()
    def precompute(self, images):
        """images (N, 3, H, W) in [-1, 1] -> {"latents": (N, m, n, C)}: the posterior's mean, never a sample."""
        images = images.to(self.vae.encoder.conv_in.weight.dtype)
        return {"latents": F.pixel_unshuffle(self.vae.encode(images), self.config.patch_size).permute(0, 2, 3, 1)}

    def encode(self, text):
        """Text of people or files -> ids. A special string in it is spelled out, never parsed."""
        return self.tokenizer.encode_ordinary(text)

    def turn(self, body):
        """Ids from "user\\n" on -> ids of the user's turn in Qwen's template, up to where the answer begins."""
        start, end = self.tokenizer.special["<|im_start|>"], self.tokenizer.special["<|im_end|>"]
        return [start, *body, end, *self.encode("\n"), start, *self.encode("assistant\n")]

    def prompt_ids(self, part, sample, limit=math.inf):
        """One sample -> ids and labels of its row (IGNORE but for answers and <|im_end|>), or ids and None. A dialogue
        ends with the last turn that fits whole into `limit` ids. The first stays: what cuts it cuts its end, too."""
        drop = sample.get("drop")
        if part in ("recon", "edit"):  # the image stays when the request is dropped
            request = UNCONDITIONAL if drop else "\n" + sample["prompt" if part == "recon" else "instruction"]
            return insert_image(self.tokenizer, self.turn(self.encode("user\n" + request))), None
        if part in ("t2i", "uncond"):
            request = UNCONDITIONAL if drop else "Generate an image: " + sample["caption"].strip()
            return self.turn(self.encode("user\n" + request)), None
        if part not in ("i2t", "text"):
            raise ValueError(f"part {part!r}: expected recon, edit, t2i, uncond, i2t or text")
        ids, labels = [], []
        newline, end = self.encode("\n"), self.tokenizer.special["<|im_end|>"]
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            ask = self.encode("user\n" + question)
            if part == "i2t" and not ids:  # the two sides of the image are tokenized apart
                ask = [*self.encode("user\n"), IMAGE, *self.encode("\n" + question)]
            ask, reply = self.turn(ask), [*self.encode(answer), end]
            if ids and len(ids + ask + reply) > limit:
                break
            ids += ask + reply + newline
            labels += [IGNORE] * len(ask) + reply + [IGNORE] * len(newline)
        return ids, labels

    def collate(self, part, samples, generators, shared, pad_to=None):
        """Samples (dicts) -> ids (B, W), pads (B,), labels (B, A) of the last A positions or `randomness`, count of the
        targets. W: pad_to, or the longest row rounded up to pad_multiple, at most the config's maximum."""
        if part == "words":
            return {"words": caption_words(self.tokenizer, [sample["caption"] for sample in samples])}
        c, dialogue = self.config, part in ("i2t", "text")
        limit, step = pad_to or (c.max_dialogue if dialogue else c.max_prompt), c.pad_multiple
        rows, labels = zip(*[self.prompt_ids(part, sample, limit) for sample in samples])
        width = pad_to or min(-(-max(map(len, rows)) // step) * step, limit)
        ids, pads = left_pad(rows, width)
        if not dialogue:
            random = self.randomness(generators, shared)
            return {"ids": ids, "pads": pads, "count": torch.tensor(float(random["masked"].numel())), **random}
        # a label at every token of an answer, shifted to the position that predicts it, and none before the first
        labels = left_pad([row[1:width] + [IGNORE] for row in labels], width, IGNORE)[0]
        labels = labels[:, int((labels != IGNORE).any(0).int().argmax()) // step * step:]
        return {"ids": ids, "pads": pads, "labels": labels, "count": (labels != IGNORE).sum().float()}

    def randomness(self, generators, shared):
        """Row b from generators[b], the mask rate of all from `shared`: N(1, 0.25^2), cut to [mask_ratio_min, 1]."""
        c, L, M = self.config, (self.config.image_size // self.stride) ** 2, self.config.diffusion_batch_mul
        normal, u = NormalDist(1.0, 0.25), torch.rand((), generator=shared, dtype=torch.float64).item()
        low = normal.cdf(c.mask_ratio_min)
        rate = normal.inv_cdf(low + u * (0.5 - low))
        k = min(L, max(1, round(math.ceil(L * rate) / c.mask_bucket)) * c.mask_bucket)
        rows = []
        for generator in generators:
            order = torch.randperm(L, generator=generator)
            t = torch.randint(0, T, (M, k), generator=generator)
            noise = torch.randn(M, k, latent_channels(c), generator=generator)
            rows.append((order[:k], order[k:].sort().values, t, noise))  # visible tokens enter in raster order
        return dict(zip(("masked", "visible", "t", "noise"), map(torch.stack, zip(*rows))))

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="harmon-0.5b", tokenizer_path=None, vision_path=None, tokenizer=None,
                       device="cpu", dtype=None, prepare=None):
        """path: harmon_*.pth, with tokenizer_path: kl16.ckpt; or a checkpoint that has the VAE under `vae.` -> model in
        eval mode, in `dtype` (None: float32; the VAE always). FileNotFoundError, or ValueError if keys do not fit."""
        if vision_path:
            raise ValueError(f"{vision_path}: Harmon understands with its MAR encoder and takes no vision file")
        state = read_weights(path)
        for name, tensor in read_weights(tokenizer_path).items() if tokenizer_path else ():
            if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")):  # not its training loss
                state[f"vae.{name}"] = tensor
        for prefix, hint in ("llm.", "not a Harmon checkpoint"), ("vae.", "give kl16.ckpt with --tokenizer-ckpt"):
            if not any(name.startswith(prefix) for name in state):
                raise ValueError(f"{path}: no {prefix}* among its {len(state)} keys: {hint}")
        embed, head = "llm.model.embed_tokens.weight", "llm.lm_head.weight"
        state |= {new: state[old] for new, old in ((embed, head), (head, embed)) if old in state and new not in state}
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer).to(dtype or torch.float32)
        model.vae.float()
        if prepare:
            prepare(model)
        load_strict(model, state, {"vae.": tokenizer_path or path, "": path}, device)
        return model.eval()

    def published_state(self):
        """{name: tensor} as harmon_*.pth has it, float32 on the CPU (meta stays meta): without the VAE."""
        state = {name: t.to("meta" if t.is_meta else "cpu", torch.float32) for name, t in self.state_dict().items()
                 if not name.startswith("vae.")}
        return state | {"llm.lm_head.weight": state["llm.model.embed_tokens.weight"]}  # both names, stored once

    def save_published(self, folder):
        """Writes folder/harmon_trained.pth (the folder exists) for the original code -> [path]. Raises OSError."""
        path = f"{folder}/harmon_trained.pth"
        atomic(path, partial(torch.save, self.published_state()))
        return [path]

    # ---- base training from nothing

    def words_loss(self, words, latents):
        """What published encoders bring from their pre-training, see vision_encoder.words_loss. words (B, vocabulary):
        1 where the caption has the id; latents (B, m, n, C)."""
        seen = self.visual_features(latents)[1][:, :latents.shape[1] * latents.shape[2]]  # buffers are no places
        return words_loss(seen, words, self.llm.model.embed_tokens.weight[:words.shape[1]])

Model = Harmon
