"""OpenUni (arXiv 2505.23661): a multimodal language model that stays as it is, asked by learned queries what to draw,
and SANA (arXiv 2410.10629), which draws it; and its RecA post-training (arXiv 2509.07295).

InternVL3 (arXiv 2504.10479) reads a prompt, with or without an image, and then 256 learned vectors, the queries. What
it makes of these passes through a small transformer, the connector, and one linear layer, and takes the place of the
text that SANA was trained with. InternVL3 never changes, and so neither does what it understands.

    image --InternViT, four patches to a token, mlp1--> |
    text -----------------------> embedding ----------> | causal Qwen2.5 --lm_head--> answer
    learned queries ----------------------------------> |      |
                                                        hidden states of the queries --connector, projector--> |
    latents on their way, (1 - sigma) image + sigma noise --> SANA: linear attention and convolutions, reads --+
                                                               |--> velocity noise - image

RecA (`OpenUni.reca_loss`): InternVL3 is shown an image and SANA draws the SAME image. Queries, connector, projector and
SANA learn, by gradients that pass through the frozen language model.

Conventions. B rows, H the width of the language model, D that of SANA, N tokens of an image, Q queries, (h, w) the grid
of the latents, C their channels. Images are (B, 3, height, width) in [-1, 1]. Text rows are left-padded: `pads` (B,)
counts the slots before the first token, so query i of row b sees the keys [pads[b], i], and its rotary position is
i - pads[b]. Everything random is an argument: `noise` (B, C, h, w), and `u` (B,) in [0, 1), which gives each image its
time: t from 1000 (noise) down to 1, sigma = t / 1000.
"""
import math
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import vision_encoder as vision
from checkpoint import atomic, load_strict, read_weights, remark
from custom_kernels import attention, attention_plan, flow_loss_rows, linear_cross_entropy, rms_norm
from custom_kernels.watch import boxes, watching
from image_tokenizer import TOKENIZERS, AutoencoderConfig, DCAutoencoderConfig, GatedConv, build, relu_attention

IGNORE = -100  # label of a position that is not trained
UNCONDITIONAL = "Generate an image."  # the request where there is none
T = 1000  # steps of time
# What InternVL's dialogues begin with: who it is, and by whom. Requests for a picture do not.
SYSTEM = ("你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学"
          "及多家合作单位联合开发的多模态大语言模型。")
# Parts that the release takes from other people's files, where their names lack this beginning
PREFIXES = {"lmm.": "give InternVL3's folder with --vision-ckpt", "vae.": "give DC-AE's with --tokenizer-ckpt",
            "transformer.": "give SANA's (transformer/) with --rest-ckpt"}

# ---------------------------------------------------------------------------------------------------------------------
# configurations and recipes

@dataclass
class SanaConfig:
    width: int = 1152
    layers: int = 28
    heads: int = 36  # of linear attention
    cross_heads: int = 16
    mlp_ratio: float = 2.5
    caption_channels: int = 2304
    qk_norm: bool = False  # RMSNorm of q and k over all heads: SANA 1.5
    places: bool = False  # a learned table of places, added to the latents; published models have none

@dataclass
class OpenUniConfig:
    # Qwen2.5 decoder of InternVL3
    vocab_size: int = 151674
    hidden_size: int = 896
    intermediate_size: int = 4864
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    vit: vision.CLIPConfig = field(default_factory=lambda: vision.VISION_ENCODERS["internvit-300m-448"])
    tokens: tuple = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")  # their names in the tokenizer
    system: str = SYSTEM
    queries: int = 256
    connector_layers: int = 6
    connector_heads: int = 14
    connector_mlp: int = 3072
    sana: SanaConfig = field(default_factory=SanaConfig)
    vae: AutoencoderConfig | DCAutoencoderConfig = field(default_factory=lambda: TOKENIZERS["dc-ae-f32c32"])
    image_size: int = 512  # pixels, training and default of the sampler
    max_prompt: int = 128  # text tokens of a row that asks for a picture,
    max_dialogue: int = 2048  # ... of a question and its answer; an image's come on top
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    flow_steps: int = 20  # passes through SANA
    shift: float = 3.0  # in sampling: more than 1 spends more steps near noise. In training all times are alike.
    cfg: float = 4.5

LARGE = dict(hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, connector_heads=24,
             connector_mlp=8960)  # InternVL3-2B
CONFIGS = {
    "tiny": OpenUniConfig(vocab_size=1024, hidden_size=128, intermediate_size=240, num_layers=4, num_heads=4,
                          num_kv_heads=2, rope_theta=1e4, vit=vision.VISION_ENCODERS["tiny-internvit"],
                          tokens=("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
                          system="", queries=16, connector_layers=2, connector_heads=4, connector_mlp=256,
                          sana=SanaConfig(128, 4, 4, 4, caption_channels=128, places=True),
                          vae=TOKENIZERS["tiny-kl"],
                          image_size=48, max_prompt=64, max_dialogue=128, pad_multiple=4, cfg=3.0),
    "openuni-b-512": OpenUniConfig(),
    "openuni-l-512": OpenUniConfig(**LARGE, sana=SanaConfig(2240, 20, 70, 20)),
    "openuni-l-1024": OpenUniConfig(**LARGE, sana=SanaConfig(2240, 20, 70, 20, qk_norm=True), image_size=1024),
}

# Keys are train.py's flags; a missing key has the flag's default. As published: 42 pictures on each GPU, 4 times (b) or
# 16 times (l) per step. How many GPUs is not said: 8 here. The authors count micro-batches, 10,000 (b) and 5,000 (l),
# the first hundredth of them warm-up; their step has the rate of its last one, hence warmup_from. There are no captions
# and no questions, and no request is dropped. For 1024 pixels no recipe was published: it has that of l-512.
PUBLISHED = dict(lr=1e-5, weight_decay=0.05)
SIZES = {"openuni-b-512": dict(PUBLISHED, batch=1344, accum=4, steps=2500, warmup=25, warmup_from=0.75),
         **dict.fromkeys(("openuni-l-512", "openuni-l-1024"), dict(PUBLISHED, batch=5376, accum=16, steps=312, warmup=3,
                                                                   warmup_from=0.9375))}
RECA = dict(mix={"recon": 1.0}, i2t_weight=0.0, t2i_weight=0.0, drop=0.0)
TINY = dict(lr=2e-4, steps=400, batch=96, i2t_weight=0.0)
RECIPES = {
    "tiny": {
        # What InternVL3 is to the published model: it sees and reads, and is frozen from then on. It is trained first,
        # by itself; how SANA and the queries then learn to draw is said in weights/README.md.
        "base": dict(lr=2e-3, muon_lr=0.005, muon_decay=0.1, warmup=100, steps=3000, batch=48, pool=40000, questions=4,
                     mix={"i2t": 1.0, "text": 0.5, "words": 0.5}),
        # Captions stand beside RecA, as in model_mar.py; edits keep editing alive.
        "reca": dict(TINY, mix={"recon": 0.5, "t2i": 0.5, "edit": 0.25}),
        "sft": dict(TINY, mix={"t2i": 1.0, "edit": 0.25}),  # captions alone
        "plain": dict(TINY, **RECA),  # RecA on a user's own images, which have no captions
    },
    **{size: {"reca": dict(flags, **RECA), "sft": dict(flags, mix={"t2i": 1.0})} for size, flags in SIZES.items()},
}

# ---------------------------------------------------------------------------------------------------------------------
# the language model

def rope_tables(positions, dim, theta):
    """positions (B, n) -> cos, sin (B, 1, n, dim/2) float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, heads, n, dim), the two halves of dim being the pairs."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps).to(x.dtype)  # SANA's trains in float32

class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        H, inner, dim = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_heads
        self.head_dim = dim
        self.input_layernorm = RMSNorm(H, c.rms_norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(H, c.num_heads * dim), "k_proj": nn.Linear(H, c.num_kv_heads * dim),
            "v_proj": nn.Linear(H, c.num_kv_heads * dim), "o_proj": nn.Linear(c.num_heads * dim, H, bias=False)})
        self.post_attention_layernorm = RMSNorm(H, c.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(H, inner, bias=False),
                                  "up_proj": nn.Linear(H, inner, bias=False),
                                  "down_proj": nn.Linear(inner, H, bias=False)})

    def forward(self, x, cos, sin, plan, past=None, keep=None):
        """x (B, n, H) -> (x, (k, v)). past: (k, v) of what came before; or memory for all, of which the last n are
        filled in here. keep: only the last `keep` positions are queries, and rows that come out."""
        attn, mlp, y = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attn[name](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, n, dim)
                   for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if torch.is_tensor(past):
            past[0, :, :, -k.shape[2]:], past[1, :, :, -k.shape[2]:] = k, v
            k, v = past
        elif past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if keep is not None:
            x, q = x[:, -keep:], q[:, :, -keep:]
        x = x + attn.o_proj(attention(q, k, v, None, None, plan).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)), (k, v)

class Cache:
    """Keys and values of all layers, in memory for `slots` positions that is taken once; `used` of them are filled."""

    def __init__(self, lm, rows, slots):
        c, weight = lm.config, lm.lm_head.weight
        kind, dtype = weight.device.type, weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        shape = (2, rows, c.num_kv_heads, slots, c.hidden_size // c.num_heads)
        self.layers = [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(c.num_layers)]
        self.used = 0

class Qwen2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                                    "layers": nn.ModuleList([DecoderLayer(c) for _ in range(c.num_layers)]),
                                    "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)  # not tied

    def forward(self, x, pads, past=None, keep=None, cache=None):
        """x (B, n, H) -> final hidden states, of the last `keep` positions (None: all), and what a next call may be
        given as `past`. Where many calls follow, a Cache holds the past instead."""
        c, start = self.config, cache.used if cache else past[0][0].shape[2] if past else 0
        total = start + x.shape[1]
        if cache:
            past, cache.used = [layer[:, :, :, :total] for layer in cache.layers], total
        past = past or [None] * c.num_layers
        slots = torch.arange(start, total, device=x.device)[None]  # (1, n)
        positions = (slots - pads[:, None]).clamp(min=0)  # (B, n): pads do not count
        cos, sin = rope_tables(positions, c.hidden_size // c.num_heads, c.rope_theta)
        lo, hi = pads[:, None].expand(-1, x.shape[1]), (slots + 1).expand(len(x), -1)
        plan, made = attention_plan(lo, hi, total), []
        for i, layer in enumerate(self.model.layers):
            last = keep if i == c.num_layers - 1 else None  # nobody attends to the last layer's other outputs
            if last is not None:
                plan = attention_plan(lo[:, -last:], hi[:, -last:], total)
            x, kv = layer(x, cos, sin, plan, past[i], last)
            made.append(kv)
        return self.model.norm(x), made

# ---------------------------------------------------------------------------------------------------------------------
# SANA

def modulate(x, shift, scale):
    """LayerNorm without weights, then a scale and a shift (B, 1, D) that depend on the time."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

class SanaAttention(nn.ModuleDict):
    """Projections q, k, v and out under their published names, with q and k normalized over all heads in SANA 1.5."""

    def __init__(self, c, heads, bias):
        D = c.width
        super().__init__({name: nn.Linear(D, D, bias=bias) for name in ("to_q", "to_k", "to_v")})
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        self.heads = heads
        if c.qk_norm:
            self.update({"norm_q": RMSNorm(D, 1e-5), "norm_k": RMSNorm(D, 1e-5)})

    def split(self, x, source):
        """x (B, n, D), source (B, m, D) -> q (B, heads, n, dim), k and v (B, heads, m, dim)."""
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        if "norm_q" in self:
            q, k = self.norm_q(q), self.norm_k(k)
        return (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))

    def join(self, x):  # (B, heads, n, dim) -> (B, n, D)
        return self.to_out[0](x.transpose(1, 2).flatten(2))

class SanaBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, c.width) * c.width ** -0.5)
        self.attn1 = SanaAttention(c, c.heads, bias=False)
        self.attn2 = SanaAttention(c, c.cross_heads, bias=True)
        self.ff = GatedConv(c.width, int(c.mlp_ratio * c.width), norm=False)

    def forward(self, x, caption, time, grid):
        """x (B, h*w, D), caption (B, Q, D), time (B, 6, D). Cross-attention reads x as it is: no norm, no gate."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).chunk(6, 1)  # (B, 1, D) each
        y = modulate(x, shift1, scale1)
        x = x + gate1 * self.attn1.join(relu_attention(*self.attn1.split(y, y)))
        x = x + self.attn2.join(F.scaled_dot_product_attention(*self.attn2.split(x, caption)))
        y = modulate(x, shift2, scale2).transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return x + gate2 * self.ff(y).flatten(2).transpose(1, 2)

class Sana(nn.Module):
    """The diffusion transformer. Its 3x3 convolutions see where a picture ends, so it needs no table of places; ours,
    which is trained for minutes, has one."""

    def __init__(self, c, channels, side):
        super().__init__()
        D = c.width

        def two_layers(first):
            return nn.ModuleDict({"linear_1": nn.Linear(first, D), "linear_2": nn.Linear(D, D)})
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(channels, D, 1)})
        self.places = nn.Parameter(torch.randn(1, D, side, side)) if c.places else None
        self.time_embed = nn.ModuleDict({"emb": nn.ModuleDict({"timestep_embedder": two_layers(256)}),
                                         "linear": nn.Linear(D, 6 * D)})
        self.caption_projection, self.caption_norm = two_layers(c.caption_channels), RMSNorm(D, 1e-5)
        self.transformer_blocks = nn.ModuleList([SanaBlock(c) for _ in range(c.layers)])
        self.scale_shift_table = nn.Parameter(torch.randn(2, D) * D ** -0.5)
        self.proj_out = nn.Linear(D, channels)

    def time(self, t):
        """t (B,) in 0..1000 -> (B, D) and, for the blocks, (B, 6*D)."""
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.proj_out.weight.dtype)  # cosines first
        embedder = self.time_embed.emb.timestep_embedder
        e = embedder.linear_2(F.silu(embedder.linear_1(waves)))
        return e, self.time_embed.linear(F.silu(e))

    def read(self, caption):
        """caption (B, Q, caption_channels) -> (B, Q, D)."""
        project = self.caption_projection
        return self.caption_norm(project.linear_2(F.gelu(project.linear_1(caption), approximate="tanh")))

    def forward(self, z, t, caption):
        """Latents z (B, C, h, w) at times t (B,) in 0..1000, caption (B, Q, caption_channels) -> velocity (B, C, h, w),
        float32, towards noise."""
        x = self.patch_embed.proj(z.to(self.proj_out.weight.dtype))  # (B, D, h, w)
        if self.places is not None:
            x = x + F.interpolate(self.places, z.shape[2:], mode="bilinear")
        x = x.flatten(2).transpose(1, 2)  # (B, h*w, D)
        (e, time), caption = self.time(t), self.read(caption)
        for block in self.transformer_blocks:
            x = block(x, caption, time.unflatten(1, (6, -1)), tuple(z.shape[2:]))
        shift, scale = (self.scale_shift_table + e[:, None]).chunk(2, 1)
        return self.proj_out(modulate(x, shift, scale)).float().transpose(1, 2).unflatten(2, z.shape[2:])

def sampling_sigmas(steps, shift):
    """-> steps + 1 noise levels, from nearly 1 to 0, evenly spaced before the shift."""
    even = [0.999 * (steps - i) / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in even] + [0.0]

def solver_step(z, image, before, sigmas):
    """DPM-Solver++(2M) (arXiv 2211.01095): latents at sigmas[1] -> at sigmas[2]. image: what they seem to become; where
    `before` is not None, that was so at sigmas[0], and goes on as it changed since then."""
    last, now, after = sigmas
    if after == 0:
        return image

    def log_snr(sigma):
        return math.log(1 - sigma) - math.log(sigma)
    h = log_snr(after) - log_snr(now)
    if before is not None:
        image = image + (image - before) * (0.5 * h / (log_snr(now) - log_snr(last)))
    return after / now * z - (1 - after) * math.expm1(-h) * image

# ---------------------------------------------------------------------------------------------------------------------
# the model

def left_pad(rows, width, fill=0):
    """Lists of ids -> (B, width) int64 and the number of pads per row (B,). Longer rows lose their end."""
    pads = [max(0, width - len(row)) for row in rows]
    return torch.tensor([[fill] * n + row[:width] for n, row in zip(pads, rows)]), torch.tensor(pads)

class OpenUni(nn.Module):
    image_tokenizer = "vae"  # the frozen autoencoder: this submodule, and its config in OpenUniConfig
    encoders = ("vae", "lmm")  # the submodules that precompute uses
    trace = None  # or a list, to which `paint` and `sample` add how a picture comes about

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.stage, c = config, tokenizer, "reca", config
        if missing := tokenizer and [name for name in c.tokens if name not in tokenizer.special]:
            raise ValueError(f"text tokenizer without {', '.join(missing)}: give InternVL3's (--text-tokenizer)")
        self.marks = tuple(tokenizer.special[name] if tokenizer else i for i, name in enumerate(c.tokens))  # ids
        H, folded = c.hidden_size, 4 * c.vit.width
        self.seen = (c.vit.image_size // c.vit.patch // 2) ** 2  # N
        self.vae = build(c.vae)
        self.stride = self.vae.stride  # pixels per latent, in each direction
        self.lmm = nn.ModuleDict({
            "vision_model": vision.InternViT(c.vit), "language_model": Qwen2(c),
            "mlp1": nn.Sequential(nn.LayerNorm(folded), nn.Linear(folded, H), nn.GELU(), nn.Linear(H, H))})
        self.meta_queries = nn.Parameter(torch.zeros(c.queries, H))
        self.connector = nn.ModuleDict({"layers": nn.ModuleList(
            vision.EncoderLayer(H, c.connector_heads, c.connector_mlp, 1e-6, partial(F.gelu, approximate="tanh"))
            for _ in range(c.connector_layers))})
        self.projector = nn.Linear(H, c.sana.caption_channels)
        self.transformer = Sana(c.sana, c.vae.z_channels, c.image_size // self.stride)
        self.init_weights()
        self.trainable_parameters("reca")

    @torch.no_grad()
    def init_weights(self):
        """From scratch: the connector as published; in the others N(0, 0.02), velocity 0, and what sees a picture keeps
        PyTorch's own."""
        nn.init.normal_(self.meta_queries, std=self.config.hidden_size ** -0.5)
        for name, p in self.connector.named_parameters():
            if p.ndim == 2:
                nn.init.xavier_uniform_(p)
            elif name.endswith("bias"):
                nn.init.normal_(p, std=1e-6 * ("mlp" in name))
        for name, p in [*self.lmm.language_model.named_parameters(), *self.transformer.time_embed.named_parameters()]:
            nn.init.normal_(p, std=0.02) if p.ndim == 2 else nn.init.constant_(p, name.endswith("norm.weight"))
        nn.init.zeros_(self.transformer.proj_out.weight)

    # ---- losses

    def reca_loss(self, latents, ids, pads, noise, u, features=None, count=None):
        """Reconstruction alignment: what InternVL3 sees of an image, in the prompt, is what SANA draws it from. The
        loss is the flow's own, a mean over places and channels: no captions, no questions.

        latents (B, C, h, w): the image. ids (B, W), pads (B,): the request, with room for the N tokens of the image.
        features (B, N, H): of the same image; in editing of another one. noise, u: see the top of the file. count: what
        the sum over images is divided by (None: their number)."""
        caption = self.condition(ids, pads, features)  # (B, Q, caption_channels): the answer of the queries
        return self.flow_loss(caption, latents, noise, u, count)

    def flow_loss(self, caption, latents, noise, u, count=None):
        """How well SANA, told `caption`, points from the images to the noise: see reca_loss."""
        t, sigma = self.flow_time(u)
        z = (1 - sigma) * latents + sigma * noise  # (B, C, h, w)
        rows = [x.permute(0, 2, 3, 1).flatten(0, 2) for x in (self.transformer(z, t, caption), latents, noise)]
        loss = flow_loss_rows(*rows)  # (B*h*w,): mean over channels of (v - (noise - latents))^2
        return loss.sum() / latents[0, 0].numel() / (len(latents) if count is None else count)

    def t2i_loss(self, latents, ids, pads, noise, u, features=None, count=None):
        """Text-to-image: the same loss, but the prompt is a caption alone, whatever was seen. In base, SANA also learns
        to read its words, as the published one did before it met queries: from these alone it learns no places."""
        if self.stage != "base":
            return self.reca_loss(latents, ids, pads, noise, u, None, count)
        captions = self.condition(ids, pads, words=True)
        return sum(self.flow_loss(caption, latents, noise, u, count) for caption in captions) / 2

    def i2t_loss(self, ids, pads, labels, features=None, count=None, **_):
        """Next-token cross entropy on answers. ids (B, W), labels (B, A): of the last A positions. InternVL3 alone."""
        lm = self.lmm.language_model
        hidden = lm(self.embed(ids, features), pads, keep=labels.shape[1])[0].flatten(0, 1)  # (B*A, H)
        return linear_cross_entropy(hidden, lm.lm_head.weight, labels.flatten(), None, IGNORE, count)

    def flow_time(self, u):
        """u (B,) in [0, 1) -> t (B,) from 1000 down to 1, float, and sigma (B, 1, 1, 1)."""
        t = T - (u * T).floor()
        return t, (t / T)[:, None, None, None]

    def condition(self, ids, pads, features=None, words=False):
        """Prompts -> what SANA reads (B, Q, caption_channels). Nothing that trains comes before the queries, so without
        a graph; the queries' gradient goes through the language model, which learns nothing from pictures it asks for.
        words: -> (this, what it would read if the prompt's own hidden states stood for the queries'), for base."""
        lm = self.lmm.language_model
        with torch.no_grad():
            embedded = self.embed(ids, features)
            prompt, past = lm(embedded, pads, keep=None if words else 1)
        queries = self.meta_queries.to(embedded.dtype).expand(len(ids), -1, -1)
        frozen = {name: p.detach() for name, p in lm.named_parameters()} if self.stage == "base" else {}
        caption = self.connect(torch.func.functional_call(lm, frozen, (queries, pads, past))[0])
        if not words:
            return caption
        here = torch.arange(ids.shape[1], device=ids.device) >= pads[:, None]  # (B, W): others are zero, as is the rest
        width = self.config.max_prompt - ids.shape[1]  # so that a row does not depend on how wide its batch is
        return caption, self.connect(F.pad(prompt * here[..., None], (0, 0, width, 0)))

    def connect(self, x):
        """Hidden states of the queries (B, Q, H) -> (B, Q, caption_channels)."""
        for layer in self.connector.layers:
            x = layer(x)
        return self.projector(x)

    def embed(self, ids, features=None):
        """ids (B, W), features (B, N, H) for the N slots of each row -> embeddings (B, W, H)."""
        x = self.lmm.language_model.model.embed_tokens(ids)
        if features is None:
            return x
        slots = ids == self.marks[4]
        index = (slots.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(x)  # of the slot that is here, or was the last
        return torch.where(slots[..., None], features.to(x.dtype).gather(1, index), x)

    def see(self, images):
        """images (B, 3, height, width) -> features (B, N, H). As published, normalized before they are resized, without
        smoothing; four neighbors of the patches make a token."""
        mean, std = (torch.tensor(x, device=images.device)[:, None, None]
                     for x in (vision.IMAGENET_MEAN, vision.IMAGENET_STD))
        size, weight = self.config.vit.image_size, self.lmm.mlp1[1].weight
        x = ((images.float() + 1) / 2 - mean) / std
        x = F.interpolate(x, (size, size), mode="bilinear").to(weight.dtype)
        return self.lmm.mlp1(self.fold(self.lmm.vision_model(x)))

    def fold(self, x):
        """Patch features (B, 4*N, width) of a square -> (B, N, 4*width), the four row by row."""
        side = math.isqrt(x.shape[1])
        return vision.patchify(x.transpose(1, 2).unflatten(2, (side, side)), 2)

    def forward(self, batch):
        """{part: tensors of precompute, collate} -> {part: loss}. `source_` encodings are of a picture to be edited."""
        own, losses = {"recon": self.reca_loss, "edit": self.reca_loss, "i2t": self.i2t_loss, "text": self.i2t_loss,
                       "words": self.words_loss}, {}
        for part, row in batch.items():
            seen, pixels = ("source_" * (part == "edit") + name for name in ("features", "pixels"))
            features = row.get(seen)
            if pixels in row and part not in ("t2i", "uncond"):  # InternViT trains along
                features = self.see(row[pixels] / 127.5 - 1)
            rest = {k: x for k, x in row.items() if not k.endswith(("features", "pixels")) and k != "source_latents"}
            losses[part] = own.get(part, self.t2i_loss)(features=features, **rest)
        return losses

    # ---- samplers

    def sampling_steps(self, job):
        """How many steps the sampler of this name takes unless it is told."""
        return self.config.flow_steps

    @torch.no_grad()
    def sample(self, caption, noise, cfg=1.0, steps=None, reads=None):
        """Captions (B, Q, caption_channels) and noise (B, C, h, w) -> latents. With cfg != 1 there are 2 B captions, of
        which the second half is what guidance leads away from. reads (Q, W), for the trace: the queries' attention."""
        sigmas = sampling_sigmas(steps or self.config.flow_steps, self.config.shift)
        z, before = noise.to(caption.device, torch.float32), None
        for i, sigma in enumerate(sigmas[:-1]):
            t = torch.full((len(caption),), float(int(T * sigma)), device=z.device)  # whole numbers, as published
            with watching(reads is not None) as watch:
                v = self.transformer(z.repeat(len(caption) // len(z), 1, 1, 1), t, caption)
            if len(caption) > len(z):
                wanted, other = v.chunk(2)
                v = other + cfg * (wanted - other)
            image = z - sigma * v
            if watch:  # a place looks at queries, and these have looked at the prompt
                looks = torch.stack([each[0] for each in watch.seen]).mean(0) @ reads  # (h*w, W)
                self.trace.append(dict(picture=self.decode_latents(image[:1]), looks=looks, masked=None,
                                       title=f"noise {sigma:.2f}"))
            z, before = solver_step(z, image, before, (sigmas[i - 1], sigma, sigmas[i + 1])), image
        return z

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None):
        """Captions -> images (B, 3, height, width) in [-1, 1]. size: pixels, one number or (height, width), multiples
        of self.stride."""
        size = size or self.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        samples = [{"caption": prompt} for prompt in prompts]
        return self.paint("t2i", samples, None, size, cfg, steps, temperature, generator)

    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0,
                    generator=None):
        """images (B, 3, height, width) in [-1, 1] -> what SANA draws when InternVL3 is shown them, with a request."""
        samples = [{"prompt": prompt}] * len(images)
        return self.paint("recon", samples, images, images.shape[2:], cfg, steps, temperature, generator)

    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None):
        """images (B, 3, height, width) in [-1, 1], an instruction for each -> edited images. SANA does not see their
        pixels: all it knows of them is what the queries say."""
        samples = [{"instruction": text} for text in instructions]
        return self.paint("edit", samples, images, images.shape[2:], cfg, steps, temperature, generator)

    @torch.no_grad()
    def paint(self, part, samples, images, size, cfg, steps, temperature, generator):
        """An image of `size` (height, width) for each of the samples of a part (see draw_ids), in whose prompts are
        `images`. Guidance leads away from the same prompt without a request. temperature: factor on the first noise."""
        if any(side % self.stride for side in size):
            raise ValueError(f"size {tuple(size)}: both sides must be multiples of {self.stride} pixels")
        cfg, generators = vision.guidance(cfg, self.config.cfg), vision.row_generators(generator, len(samples))
        contexts = samples + [{"drop": True}] * (len(samples) * (cfg > 1))
        rows = [self.draw_ids(part, sample) for sample in contexts]
        device = self.meta_queries.device
        ids, pads = (x.to(device) for x in left_pad(rows, max(map(len, rows))))
        features = None if images is None else self.see(images).repeat(len(rows) // len(samples), 1, 1)
        grid = [side // self.stride for side in size]
        noise = vision.draw_rows(torch.randn, generators, self.config.vae.z_channels, *grid, device=device)
        with watching(self.trace is not None) as watch:
            caption = self.condition(ids, pads, features)
        reads = self.tell(watch.seen, ids[0], int(pads[0])) if watch else None
        z = self.sample(caption, temperature * noise, cfg, steps, reads)
        return self.decode_latents(z).clamp(-1, 1)

    def tell(self, seen, ids, pads):
        """Adds to the trace what stands in the slots of a prompt, ids (W,) -> what the queries attend to there, (Q, W),
        a mean over layers. seen: attention of each layer, (rows, queries, keys), of the prompt itself first."""
        places, L = iter(boxes(*[math.isqrt(self.seen)] * 2)), self.config.num_layers
        self.trace.append([next(places) if i == self.marks[4] else "" if k < pads or i in self.marks
                           else self.tokenizer.decode([i]) for k, i in enumerate(ids.tolist())])
        return torch.stack([each[0, :, :len(ids)] for each in seen[L:2 * L]]).mean(0)

    @torch.no_grad()
    def decode_latents(self, z):
        """z (B, C, h, w) -> images (B, 3, height, width), not clamped."""
        return self.vae.decode(z.to(self.vae.decoder.conv_in.weight.dtype)).float()

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        """images (B, 3, height, width) in [-1, 1], or None, and a question for each row -> list of answers, of the
        language model alone."""
        part, end = "text" if images is None else "i2t", self.marks[1]
        rows = [self.dialogue_ids(part, {"question": question, "answer": ""}) for question in questions]
        rows = [ids[:labels.index(end)] for ids, labels in rows]
        ids, pads = (x.to(self.meta_queries.device) for x in left_pad(rows, max(map(len, rows))))
        embedded = self.embed(ids, None if images is None else self.see(images))
        tokens = self.generate_tokens(embedded, pads, max_new_tokens, temperature, generator, end).tolist()
        return [self.tokenizer.decode(row[:row.index(end)] if end in row else row) for row in tokens]

    @torch.no_grad()
    def generate_tokens(self, x, pads, max_new_tokens, temperature=0.0, generator=None, stop=-1):
        """Continues the rows (B, W, H), greedily at temperature 0, until each has had the id `stop` -> ids (B, new)."""
        lm, out, done = self.lmm.language_model, [], torch.zeros_like(pads, dtype=torch.bool)
        generators, cache = vision.row_generators(generator, len(x)), Cache(lm, len(x), x.shape[1] + max_new_tokens)
        while len(out) < max_new_tokens and not bool(done.all()):
            hidden, _ = lm(x, pads, keep=1, cache=cache)
            token = vision.next_token(lm.lm_head(hidden[:, -1]).float(), temperature, generators)  # (B, 1)
            out.append(token)
            done = done | (token[:, 0] == stop)
            x = lm.model.embed_tokens(token)
        return torch.cat(out, 1)

    # ---- what train.py needs

    def trainable_parameters(self, stage):
        """-> [(name, parameter)]: base all but the autoencoder, else all but InternVL3, too. Sets stage and
        requires_grad."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.stage, frozen = stage, ("vae.",) if stage == "base" else ("vae.", "lmm.")
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe's exemptions from weight decay."""
        return p.ndim < 2

    def blocks(self):
        """The repeated modules, which recomputation and sharding wrap."""
        lmm = self.lmm
        return [*lmm.language_model.model.layers, *lmm.vision_model.encoder["layers"], *self.connector.layers,
                *self.transformer.transformer_blocks]

    def preprocess(self, image, purpose):
        """PIL image -> (3, side, side) in [-1, 1]: its center as a square (in training the release takes a random one),
        or for questions all of it, stretched to what InternViT takes."""
        if purpose in ("i2t", "answer"):
            return vision.square_pixels(image, self.config.vit.image_size)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return vision.square_pixels(image.crop((left, top, left + side, top + side)), self.config.image_size)

    @torch.no_grad()
    def precompute(self, images):
        """images (n, 3, height, width) in [-1, 1] -> latents (n, C, h, w), and features (n, N, H) or in base, where
        InternViT trains, pixels (uint8) in its size."""
        latents = self.vae.encode(images.to(self.vae.encoder.conv_in.weight.dtype)).contiguous()
        if self.stage != "base":
            return {"latents": latents, "features": self.see(images)}
        pixels = F.interpolate(images, (self.config.vit.image_size,) * 2, mode="bilinear")
        return {"latents": latents, "pixels": ((pixels + 1) * 127.5).round().clamp(0, 255).byte()}

    def encode(self, text):
        """Text of people or files -> ids. A special string in it is spelled out, never parsed."""
        return self.tokenizer.encode_ordinary(text)

    def ask(self, text, image, limit=None):
        """A user's turn, with the N slots of an image or without, up to where the answer begins -> ids."""
        start, end, image_start, image_end, slot = self.marks
        if image:
            words = [image_start, *[slot] * self.seen, image_end, *self.encode("\n" + text)[:limit]]
            words = self.encode("user\n") + words
        else:
            words = self.encode("user\n" + text)
        return [start, *words, end, *self.encode("\n"), start, *self.encode("assistant\n")]

    def draw_ids(self, part, sample):
        """One sample -> ids of a row that asks for a picture. <img> ends it, where an answer would begin. The longest
        loses its end (a caption, as published) or the end of its request."""
        limit, image = self.config.max_prompt, part not in ("t2i", "uncond")
        if sample.get("drop"):
            text = UNCONDITIONAL
        elif image:
            text = sample["prompt" if part == "recon" else "instruction"]
        else:
            text = "Generate an image: " + sample["caption"].strip()
        room = limit - len(self.ask("", False)) - 1
        return [*self.ask(text, image, room), self.marks[2]][:limit + image * (self.seen + 2)]

    def dialogue_ids(self, part, sample, limit=math.inf):
        """One sample -> ids and labels of its row (IGNORE but for answers and <|im_end|>). A dialogue ends with the
        last turn that fits whole into `limit` ids. The first stays: what cuts it cuts its end, too."""
        start, end, *_ = self.marks
        newline, ids = self.encode("\n"), []
        if self.config.system:
            ids = [start, *self.encode("system\n" + self.config.system), end, *newline]
        labels, first = [IGNORE] * len(ids), True
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            ask, reply = self.ask(question, part == "i2t" and first), [*self.encode(answer), end]
            if not first and len(ids + ask + reply) > limit:
                break
            first = False
            ids += ask + reply + newline
            labels += [IGNORE] * len(ask) + reply + [IGNORE] * len(newline)
        return ids, labels

    def collate(self, part, samples, generators, shared, pad_to=None):
        """Samples (dicts) -> ids (B, W), pads (B,), and either u (B,) and noise (B, C, h, w), row b drawn from
        generators[b], or labels (B, A) of the last A positions; count of the targets. W: the longest row rounded up to
        pad_multiple, at most the config's maximum; or pad_to. An image's tokens come on top of these two."""
        if part == "words":
            return {"words": vision.caption_words(self.tokenizer, [sample["caption"] for sample in samples])}
        c, step, image = self.config, self.config.pad_multiple, part not in ("t2i", "uncond", "text")
        if part not in ("i2t", "text"):
            rows = [self.draw_ids(part, sample) for sample in samples]
            ids, pads = left_pad(rows, -(-max(map(len, rows)) // step) * step)
            side, draws = c.image_size // self.stride, []
            for g in generators:
                draws.append((torch.rand((), generator=g), torch.randn(c.vae.z_channels, side, side, generator=g)))
            u, noise = (torch.stack(draw) for draw in zip(*draws))
            return {"ids": ids, "pads": pads, "u": u, "noise": noise, "count": torch.tensor(float(len(samples)))}
        limit = (pad_to or c.max_dialogue) + image * (self.seen + 2)
        rows, labels = zip(*[self.dialogue_ids(part, sample, limit) for sample in samples])
        width = limit if pad_to else min(-(-max(map(len, rows)) // step) * step, limit)
        ids, pads = left_pad(rows, width)
        # a label at every token of an answer, shifted to the position that predicts it, and none before the first
        labels = left_pad([row[1:width] + [IGNORE] for row in labels], width, IGNORE)[0]
        labels = labels[:, int((labels != IGNORE).any(0).int().argmax()) // step * step:]
        return {"ids": ids, "pads": pads, "labels": labels, "count": (labels != IGNORE).sum().float()}

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="openuni-b-512", tokenizer_path=None, vision_path=None, tokenizer=None,
                       device="cpu", dtype=None, prepare=None, rest=()):
        """path: openuni_*.pth or RecA's, which hold what was trained; vision_path: InternVL3's folder; tokenizer_path:
        DC-AE's; rest: where to look next for what is nowhere in these, as SANA's folder, or OpenUni's file under RecA's
        -> model in eval mode, in `dtype` (None: float32; DC-AE always). Says on stderr what came from where. Raises
        FileNotFoundError, and ValueError with the keys that do not fit or that no file has."""
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer).to(dtype or torch.float32)
        model.vae.float()
        own, state, came_from, said = model.state_dict(), {}, {}, []
        for file, prefix in ((path, None), (vision_path, "lmm."), (tokenizer_path, "vae."), *((x, None) for x in rest)):
            weights = read_weights(file) if file else {}
            if file and prefix is None:  # the one under which most of its names are ours
                known = {p: sum(p + name in own for name in weights) for p in ("", *PREFIXES)}
                prefix = max(known, key=known.get)
            new = {prefix + name: t for name, t in weights.items() if prefix + name not in state}
            state |= new
            for name in new:
                came_from.setdefault(next((p for p in PREFIXES if name.startswith(p)), ""), file)
            groups = sorted({name.split(".")[0] for name in new})
            said += [f"{file}: {len(new)} of {len(weights)} tensors ({', '.join(groups)})"] * bool(file)
        for prefix, hint in PREFIXES.items():
            if prefix not in came_from:
                raise ValueError(f"{path}: no {prefix}* among its keys, nor in other files that were given: {hint}")
        remark("; ".join(said))
        if prepare:
            prepare(model)
        load_strict(model, state, {prefix: came_from[prefix] for prefix in PREFIXES} | {"": path}, device)
        return model.eval()

    def published_state(self):
        """{name: tensor} as OpenUni's and RecA's files have it, float32 on the CPU (meta stays meta): what trains."""
        return {name: t.to("meta" if t.is_meta else "cpu", torch.float32) for name, t in self.state_dict().items()
                if not name.startswith(("lmm.", "vae."))}

    def save_published(self, folder):
        """Writes folder/openuni_trained.pth (the folder exists) for the original code -> [path]. Raises OSError."""
        path = f"{folder}/openuni_trained.pth"
        atomic(path, partial(torch.save, self.published_state()))
        return [path]

    # ---- base training from nothing

    def words_loss(self, words, features, **_):
        """What InternViT brings from its pre-training, see vision.words_loss."""
        embeddings = self.lmm.language_model.model.embed_tokens.weight[:words.shape[1]]
        return vision.words_loss(features, words, embeddings)

Model = OpenUni
