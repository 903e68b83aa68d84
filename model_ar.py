"""Show-o: one transformer that writes text from left to right and paints pictures by filling in masked image codes.

A phi-1.5 decoder reads text ids and the codes of an image tokenizer (MAGVIT-v2) from ONE vocabulary. Text is learned by
next-token prediction, pictures by mask prediction as in MaskGIT: the place of a mask predicts its own code. Pictures
are understood through CLIP features (`show-o-clip-*`, `tiny`) or their own codes.

RecA (arXiv 2509.07295; `ShowO.reca_loss`) is cross entropy on the masked codes of this row, without a caption:
    [mmu][soi] CLIP features [eoi] "describe this image" [soi] masked codes of the SAME picture [eoi]

The order in which a row is stored in memory is free, since positions are given explicitly. Stored as
    [ target picture: eoi, codes, soi | CLIP features | text, right-padded ]
every mask is an interval of keys [lo, hi) per query, and what a loss reads has fixed slots. The published rows pad the
text on the left or in the middle: those pads are dropped, but positions count them.

Shapes: B rows, T text ids with pads, N codes of the target picture, A slots of the picture that is understood, D width.
"""
import json
import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import vision_encoder as vision
from checkpoint import atomic, load_strict, read_weights, write_text
from custom_kernels import attention, attention_plan, linear_cross_entropy
from custom_kernels.watch import boxes, watching
from image_tokenizer import TOKENIZERS, LFQConfig, LFQTokenizer

IGNORE = -100  # label of a position that is not trained

# ---------------------------------------------------------------------------------------------------------------------
# configurations and recipes

@dataclass
class ShowOConfig:
    hidden_size: int = 2048
    num_layers: int = 24
    num_heads: int = 32
    intermediate_size: int = 8192
    partial_rotary_factor: float = 0.5
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    # vocabulary: [ text ids | special ids | image codes | mask ]
    text_vocab: int = 50295
    eos: int = 50256  # also bos
    num_special: int = 10
    codebook_size: int = 8192
    image_size: int = 256
    vq: LFQConfig = field(default_factory=lambda: TOKENIZERS["magvitv2"])
    w_clip_vit: bool = True  # understand through CLIP features; otherwise through image codes
    clip: vision.CLIPConfig = field(default_factory=lambda: vision.VISION_ENCODERS["clip-vit-large-patch14-336"])
    clip_mean: tuple = vision.CLIP_MEAN  # for image-to-text only: RecA feeds CLIP the plain [-1, 1] pixels
    clip_std: tuple = vision.CLIP_STD
    train_clip: bool = False  # in the base stage; in all others CLIP is frozen
    system_prompt: str = ("A chat between a curious user and an artificial intelligence assistant. "
                          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    max_prompt: int = 129  # the longest rows, in ids. Text-to-image: [t2i] bos text eos
    max_dialogue: int = 381  # image-to-text: what follows the picture
    max_request: int = 128  # RecA: [mmu][soi][eoi] bos text eos PAD.., behind which the target has a fixed place
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    context_grad: float = 0.0  # CLIP variant: gradient that reaches projector and embeddings (published: no_grad, 0)
    reca_down_scale: int = 2  # VQ variant: how much smaller the copy is whose codes are the context,
    reca_resize_back: bool = False  # ... and whether it is enlarged again before encoding (a blur)
    cfg: float = 6.0  # logits = uncond + cfg * (cond - uncond): the published guidance g is cfg - 1
    mask_steps: int = 50
    reca_steps: int = 30  # reconstruction and editing

    def __post_init__(self):  # special ids: [PAD], start and end of image, two of video, task: draw, task: look
        self.pad, self.soi, self.eoi, _, _, self.t2i, self.mmu = range(self.text_vocab, self.text_vocab + 7)
        self.image_offset = self.text_vocab + self.num_special  # id of image code 0
        self.mask_id = self.image_offset + self.codebook_size
        self.vocab_size = self.mask_id + 1

CONFIGS = {
    # 48x48 pictures: 9 codes of 11 bits, 9 CLIP tokens. Texts are short, as a word costs as much as an image token.
    "tiny": ShowOConfig(
        hidden_size=128, num_layers=4, num_heads=4, intermediate_size=224, text_vocab=1024, eos=1018, image_size=48,
        codebook_size=2048, vq=TOKENIZERS["tiny-lfq"], clip=vision.VISION_ENCODERS["tiny-clip"], clip_mean=(0.5,) * 3,
        clip_std=(0.5,) * 3, train_clip=True, system_prompt="", user="Question:", assistant="Answer:", max_prompt=40,
        max_dialogue=56, max_request=32, pad_multiple=4, cfg=3.0, mask_steps=6, reca_steps=6),
    "show-o-256": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384),
    "show-o-512": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384, image_size=512, reca_steps=20),
    "show-o-512-blur8": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384, image_size=512, reca_steps=20,
                                    reca_down_scale=8, reca_resize_back=True),  # show-o-512's files, another bottleneck
    "show-o-clip-256": ShowOConfig(max_dialogue=228),
    "show-o-clip-512": ShowOConfig(max_dialogue=996, image_size=512),
}

# Flags of train.py. Published: image-to-text keeps the shared backbone understanding. One GPU; a micro-batch is 4 or 2
# pictures to reconstruct, as many with questions, and 1 caption. For show-o-256 nothing is published: it is as 512.
# The authors count optimizer steps, of `accum` micro-batches: 5,000 of a cosine over `horizon`, warm-up included.
PUBLISHED = dict(lr=5e-7, betas=(0.9, 0.999), weight_decay=0.01, clip=0.0, warmup=1000, warmup_from=0, steps=5000)
SIZES = {"show-o-256": dict(PUBLISHED, batch=40, accum=20, horizon=10 ** 6),
         "show-o-512": dict(PUBLISHED, batch=40, accum=20, horizon=10 ** 6),
         "show-o-512-blur8": dict(PUBLISHED, batch=10, accum=5, horizon=10 ** 6),
         "show-o-clip-256": dict(PUBLISHED, batch=20, accum=5, horizon=10 ** 4),
         "show-o-clip-512": dict(PUBLISHED, batch=10, accum=5, horizon=10 ** 6)}
RECIPES = {
    "tiny": {
        # Muon, because AdamW alone needs twice the samples.
        "base": dict(lr=1e-3, muon_lr=0.02, warmup=100, steps=5500, batch=48, pool=40000,
                     mix={"t2i": 1.0, "i2t": 0.75, "edit": 0.75, "text": 0.25}),
        # Captions stand beside RecA, as in model_mar.py. No image-to-text: this model forgets little without it.
        "reca": dict(lr=2e-4, steps=600, batch=96, i2t_weight=0.0,
                     mix={"recon": 0.5, "t2i": 0.5, "i2t": 1.0}),
        "sft": dict(lr=2e-4, steps=600, batch=96, i2t_weight=0.0, mix={"t2i": 1.0, "i2t": 1.0}),  # captions alone
        "plain": dict(lr=2e-4, steps=300, batch=96, t2i_weight=0.0,  # a user's pictures, without captions
                      mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}),
    },
    **{size: {"reca": dict(p, drop=0.0, t2i_weight=0.0, mix={"recon": 1.0, "i2t": 1.0, "t2i": p["accum"] / p["batch"]}),
              "sft": dict(p, mix={"t2i": 1.0, "i2t": 1.0})} for size, p in SIZES.items()},
}

# ---------------------------------------------------------------------------------------------------------------------
# blocks

def rotate(x, rope):
    """x (B, T, heads, d), rope = cos, sin (B or 1, T, 1, r/2): turns the pairs (i, i + r/2) of the first r channels."""
    cos, sin = rope
    a, b, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

class Block(nn.Module):
    """x + attention(LN x) + mlp(LN x). Only the slots `read` (a slice) come out."""

    def __init__(self, c):
        super().__init__()
        D, self.head_dim = c.hidden_size, c.hidden_size // c.num_heads
        self.input_layernorm = nn.LayerNorm(D, eps=c.norm_eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, D) for name in ("q_proj", "k_proj", "v_proj", "dense")})
        for name in ("q_layernorm", "k_layernorm"):
            self.self_attn[name] = nn.LayerNorm(self.head_dim, eps=c.norm_eps)  # one for all heads
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, c.intermediate_size), "fc2": nn.Linear(c.intermediate_size, D)})

    def forward(self, x, rope, plan, read=slice(None), cache=None, slots=None):
        h, m, heads = self.input_layernorm(x), self.self_attn, (-1, self.head_dim)
        v = m["v_proj"](h).unflatten(-1, heads)  # (B, T, heads, d)
        k = rotate(m["k_layernorm"](m["k_proj"](h).unflatten(-1, heads)), rope).to(v.dtype)
        q = m["q_layernorm"](m["q_proj"](h[:, read]).unflatten(-1, heads))
        q = rotate(q, [table[:, read] for table in rope]).to(v.dtype)
        if cache is not None:
            row = torch.arange(len(h), device=h.device)[:, None]
            cache[0][row, slots], cache[1][row, slots] = k, v
            k, v = cache
        a = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, plan)  # (B, heads, T, d)
        x = x[:, read] + m["dense"](a.transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](h[:, read]), approximate="tanh"))

class Layout(NamedTuple):
    """Where the slots of a row stand and what they see, in memory order; each (B or 1, T)."""
    positions: torch.Tensor  # rotary positions: places in the published row, whose pads count
    lo: torch.Tensor  # slot i sees the slots [lo, hi)
    hi: torch.Tensor

    def part(self, slots):
        return Layout(*(t[:, slots] for t in self))

class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.rotary_dim, self.theta = int(c.partial_rotary_factor * c.hidden_size // c.num_heads), c.rope_theta
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)

    def forward(self, x, layout, read=slice(None), cache=None, slots=None):
        """Embeddings x (B, T, D) -> hidden states of the slots `read` (a slice) after the final norm. With a cache the
        keys and values are written to its `slots` (B, T), and the layout's lo and hi count cache slots."""
        frequency = self.theta ** (-torch.arange(0, self.rotary_dim, 2, device=x.device).float() / self.rotary_dim)
        angle = (layout.positions[..., None].float() * frequency)[:, :, None]  # (B or 1, T, 1, r/2)
        rope = angle.cos(), angle.sin()
        num_keys = x.shape[1] if cache is None else cache[0].shape[2]
        plan = attention_plan(layout.lo, layout.hi, num_keys)
        for i, layer in enumerate(self.layers):
            more = {} if cache is None else {"cache": cache[i], "slots": slots}
            if i == len(self.layers) - 1 and read != slice(None):  # nobody attends to the last layer's other outputs
                more["read"], plan = read, attention_plan(*layout.part(read)[1:], num_keys)
            x = layer(x, rope, plan, **more)
        return self.final_layernorm(x)

# ---------------------------------------------------------------------------------------------------------------------
# prompts and layouts: lists of text ids -> lists of ids

def with_bos(text, c):
    return list(text) if text[:1] == [c.eos] else [c.eos, *text]

def t2i_prompt(text, c, limit=None, drop=False):
    """[t2i] bos text eos, at most `limit` ids (the end is cut, eos stays). drop: that of the empty text."""
    ids, limit = [c.t2i, *with_bos([] if drop else text, c), c.eos], limit or c.max_prompt
    return ids if len(ids) <= limit else [*ids[:limit - 1], c.eos]

def mmu_prompt(chat, c, system=()):
    """[mmu] system [soi][eoi] chat; the picture (features or codes) goes between soi and eoi when the row is built."""
    return [c.mmu, *system, c.soi, c.eoi, *chat]

def reca_prompt(text, c):
    """[mmu][soi][eoi] bos text eos; the picture goes between soi and eoi. There is no system prompt in RecA."""
    return mmu_prompt([*with_bos(text, c), c.eos], c)

def pad_rows(rows, fill, length=None, device=None):
    """Lists of ids -> ids (B, length) int64, right-padded with `fill`, lengths (B,). ValueError if one is longer."""
    lengths = [len(row) for row in rows]
    length = length or max(lengths)
    if max(lengths) > length:
        raise ValueError(f"{max(lengths)} ids do not fit into {length}: shorten the text, or raise the limit")
    ids = [[*row, *[fill] * (length - len(row))] for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(lengths, device=device)

def make_layout(rows, *stretches):
    """Stretches of memory in order -> Layout. Each: where its slots are in the published row (rows or 1, k), and which
    slots [lo, hi) they see, int or (rows or 1, k or 1). Nobody reads pads; what they see is as published, too."""
    full = [[(s[0] * 0 + value).expand(rows, -1) for value in s] for s in stretches]
    return Layout(*(torch.cat(column, dim=1) for column in zip(*full)))

def t2i_layout(n, T, N, start, A=0):
    """Text-to-image; published order PAD.. n (B,) text ids [soi] codes [eoi], soi at the place `start`. Text is causal;
    soi, codes, eoi see all but pads. Before the text may stand A slots: the first sees itself, the others see all A."""
    n, S = n[:, None], N + 2
    j, i, k = (torch.arange(length, device=n.device)[None] for length in (T, S, A))
    text = j < n
    return make_layout(
        len(n), (start + torch.where(i == 0, N + 1, i % (N + 1)), 0, S + A + n),  # eoi, codes, soi
        (start - n - A + k, S, torch.where(k == 0, S + 1, S + A)),  # what stands before the text
        (torch.where(text, start - n + j, j - n), torch.where(text, S, S + A + n), S + A + 1 + j))  # text, pads

def reca_vq_layout(n, T, N, A, limit):
    """RecA with image codes as context; published order PAD.. [mmu][soi] given codes [eoi] bos text eos [soi] codes
    [eoi], where given codes, ids, pads take A + limit places."""
    return t2i_layout(n - 3, T - 3, N, A + limit, A + 3)

def reca_clip_layout(n, T, N, A, block):
    """RecA with CLIP; published order [mmu][soi] features [eoi] bos text eos PAD.. [soi] codes [eoi], where ids and
    pads take `block` places. Causal, but all see the features, codes see each other (not eoi), nobody sees a pad."""
    n, S, start = n[:, None], N + 2, A + block
    j, i, k = (torch.arange(length, device=n.device)[None] for length in (T, S, A))
    first, end = torch.where(i > N, i, i.clamp(max=1)), S + A + n
    return make_layout(
        len(n), (start + torch.where(i == 0, N + 1, i % (N + 1)), first, end),  # eoi, codes, soi
        (2 + k, S, S + A + 2),  # features: see mmu and soi too
        (torch.where(j < 2, j, j + A), S, torch.minimum(S + A + 1 + j, end)))  # ids, pads

def causal_layout(T, seen_by_all=0, A=0, before=0, device=None):
    """Text alone; image-to-text from codes, where all see the first `seen_by_all` places (mmu, soi, codes, eoi); or
    from A features, which all see and which are read behind the first `before` ids (mmu, system, soi)."""
    j, k = (torch.arange(length, device=device)[None] for length in (T, A))
    return make_layout(1, (before + k, 0, before + A),  # features
                       (torch.where(j < before, j, j + A), 0, (A + 1 + j).clamp(min=seen_by_all)))

def stack_rows(a, b):
    """Two batches of (embeddings, layout) as one [a; b]; the shorter ones get slots at their end that nobody sees."""
    length, rows = max(a[0].shape[1], b[0].shape[1]), []
    for x, layout in (a, b):
        extra = length - x.shape[1]
        rows.append([F.pad(x, (0, 0, 0, extra)), *(F.pad(t.expand(len(x), -1), (0, extra)) for t in layout)])
    x, *layout = (torch.cat(pair) for pair in zip(*rows))
    return x, Layout(*layout)

def mask_ratio(t):
    """Share of codes that are masked at time t in [0, 1]; in training t ~ U(0, 1), in sampling steps done / steps."""
    return torch.cos(t * math.pi * 0.5).clamp(min=0)

def masked_count(u, N):
    """u in [0, 1) -> how many of N codes are masked, at least one, float32 in the shape of u."""
    return (N * mask_ratio(u)).round().clamp(min=1)  # rounds half to even

def draw_exponential(*shape, generator, device):
    return torch.empty(shape, device=device).exponential_(generator=generator)

def mask_codes(codes, u, r, c):
    """codes, r (B, N), u (B,); r, u in [0, 1) -> ids, labels (B, N). Masked: where argsort(r) < masked_count(u)."""
    masked, ids = r.argsort(dim=1) < masked_count(u, codes.shape[1])[:, None], codes + c.image_offset
    return ids.masked_fill(masked, c.mask_id), ids.masked_fill(~masked, IGNORE)

# ---------------------------------------------------------------------------------------------------------------------
# the model

class ShowO(nn.Module):
    """config: ShowOConfig; tokenizer: a text tokenizer (encode_ordinary, decode, eos, vocab_size), needed where text is
    a string. A context is a pair (embeddings, layout) of rows whose target picture is still to be put in front."""
    image_tokenizer = "vq"  # the frozen tokenizer: this submodule, and its config in ShowOConfig
    encoders = ("vq", "clip")  # the submodules that precompute uses
    trace = None  # or a list, to which contexts and `paint` add how a picture comes about
    device = property(lambda self: self.showo.lm_head.weight.device)

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.stage = config, tokenizer, "reca"
        c, D = config, config.hidden_size
        if tokenizer is not None and (tokenizer.eos != c.eos or tokenizer.vocab_size > c.text_vocab):
            raise ValueError(f"text tokenizer with {tokenizer.vocab_size} ids, <|endoftext|> {tokenizer.eos}; expected "
                             f"at most {c.text_vocab}, and {c.eos}: give the model's own (--text-tokenizer)")
        self.system_ids = self.encode(c.system_prompt) if tokenizer is not None and c.system_prompt else []
        self.showo = nn.Module()
        self.showo.model, self.showo.lm_head = Backbone(c), nn.Linear(D, c.vocab_size)
        if c.w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(c.clip.width, D), nn.GELU(), nn.Linear(D, D))
            self.clip = vision.CLIPVision(c.clip)
        self.vq = LFQTokenizer(c.vq).requires_grad_(False)  # always frozen
        self.side = c.image_size // self.vq.stride  # of the grid of codes
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02), zero biases; smaller for what writes into the residual stream, or depth would scale it up."""
        for name, p in self.showo.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                out = name.endswith(("dense.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_layers) if out else 0.02)

    # ---- losses

    def reca_loss(self, codes, ids, lengths, u, r, context_grad=None, count=None, **seen):
        """Reconstruction alignment: understand a picture, then reproduce it. The picture's own understanding features
        stand where a very dense caption would; the target is the same picture as codes, some of them masked. The row is
            [mmu][soi] picture [eoi] bos USER: \\n describe this ASSISTANT: eos PAD.. [soi] masked codes [eoi]
        Only masked codes are in the loss, and each predicts itself: no shift. Codes see each other and all before them.

        codes (B, N): the target. ids (B, T), lengths (B,): the request. u (B,), r (B, N): how many codes are masked,
        and which. seen, what is understood: features (B, A, width), or the pixels that CLIP makes them from, or
        small_codes (B, A), those of a degraded copy. context_grad 0 is the published convention of the CLIP variant:
        the whole INPUT row (projected features and all embeddings, the mask's included) is built without gradients, so
        this loss trains blocks, final norm and head, while projector and embeddings learn from image-to-text alone.
        With 1, or in the VQ variant, gradients pass. count: the denominator, if it is not the number of labels."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        if context_grad is None:
            context_grad = c.context_grad if c.w_clip_vit else 1.0
        with torch.set_grad_enabled(context_grad > 0 and torch.is_grad_enabled()):
            context, layout = self.reca_context(ids, lengths, N, **seen)
            x = self.with_target(image, context)
        if 0 < context_grad < 1:
            x = torch.lerp(x.detach(), x, context_grad)  # the same value
        return self.cross_entropy(x, layout, slice(1, N + 1), labels, count)

    def t2i_loss(self, codes, ids, lengths, u, r, count=None, **_):
        """Text-to-image: codes (B, N), captions ids (B, T), lengths (B,), masking u (B,), r (B, N). As published, soi
        and eoi are in the loss with their own ids: two trivial terms per row in the mean."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        labels = F.pad(F.pad(labels, (1, 0), value=c.eoi), (0, 1), value=c.soi)
        context, layout = self.t2i_context(ids, lengths, N)
        return self.cross_entropy(self.with_target(image, context), layout, slice(0, N + 2), labels, count)

    def i2t_loss(self, ids, labels, codes=None, features=None, chat_features=None, pixels=None, count=None, **_):
        """Image-to-text or text alone: ids, labels (B, T). Each slot predicts the next. Picture: as in mmu_context."""
        x, layout = self.mmu_context(ids, codes, features if chat_features is None else chat_features, pixels)
        return self.cross_entropy(x, layout, slice(-ids.shape[1], -1), labels[:, 1:], count)

    def edit_loss(self, **tensors):
        """Editing, which the published model lacks: RecA's row with the SOURCE picture (source_features ...) as
        context, the instruction as request, the codes of the EDITED picture as target. Gradients pass."""
        source = {name: tensors.get(f"source_{name}") for name in ("features", "pixels", "small_codes")}
        return self.reca_loss(**(tensors | source), context_grad=1.0)

    def embed(self, *ids):
        """Ids (B, k), one after the other -> (B, T, D)."""
        return self.showo.model.embed_tokens(torch.cat(ids, dim=1))

    def project(self, features=None, pixels=None):
        """CLIP features (B, A, width), or the uint8 pixels they come from -> (B, A, D), in float32 as published."""
        if features is None:
            features = self.clip(pixels.float() / 127.5 - 1)
        with torch.autocast(features.device.type, enabled=False):
            return self.mm_projector(features.to(self.mm_projector[0].weight.dtype))

    def reca_context(self, ids, lengths, N, features=None, pixels=None, small_codes=None, **_):
        """[mmu][soi] picture [eoi] bos text eos, before a target of N codes."""
        c, T = self.config, ids.shape[1]
        if c.w_clip_vit:
            x = torch.cat([self.project(features, pixels), self.embed(ids)], dim=1)
            return x, reca_clip_layout(lengths, T, N, x.shape[1] - T, c.max_request)
        x = self.embed(ids[:, :2], small_codes + c.image_offset, ids[:, 2:])
        return x, reca_vq_layout(lengths, T, N, small_codes.shape[1], c.max_request)

    def t2i_context(self, ids, lengths, N):
        return self.embed(ids), t2i_layout(lengths, ids.shape[1], N, self.config.max_prompt)

    def mmu_context(self, ids, codes=None, features=None, pixels=None):
        """[mmu] system [soi] picture [eoi] chat, whose ids (B, T) lack the picture; or text alone, if none is given."""
        T, before = ids.shape[1], 2 + len(self.system_ids)  # mmu, system, soi
        if features is not None or pixels is not None:
            x = torch.cat([self.project(features, pixels), self.embed(ids)], dim=1)
            return x, causal_layout(T, 0, x.shape[1] - T, before, ids.device)
        if codes is None:
            return self.embed(ids), causal_layout(T, device=ids.device)
        x = self.embed(ids[:, :before], codes + self.config.image_offset, ids[:, before:])
        return x, causal_layout(x.shape[1], before + codes.shape[1] + 1, device=ids.device)

    def with_target(self, image, *context):
        """Puts the target picture, ids (B, N), before the context (B, T, D): slots [eoi, N codes, soi, context]."""
        image = F.pad(F.pad(image, (1, 0), value=self.config.eoi), (0, 1), value=self.config.soi)
        return torch.cat([self.embed(image), *context], dim=1)

    def cross_entropy(self, x, layout, read, labels, count=None):
        """Runs the rows and scores their slots `read` against labels (B, k), over words as well as image codes."""
        hidden, head = self.showo.model(x, layout, read).flatten(0, 1), self.showo.lm_head
        return linear_cross_entropy(hidden, head.weight, labels.flatten(), head.bias, IGNORE, count)

    def forward(self, batch):
        """{part: tensors} -> {part: loss}, all parts in one forward."""
        losses = {"recon": self.reca_loss, "edit": self.edit_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss,
                  "text": self.i2t_loss, "uncond": self.t2i_loss, "words": self.words_loss}
        return {part: losses[part](**tensors) for part, tensors in batch.items()}

    # ---- samplers

    def sampling_steps(self, job):
        """How many steps the sampler of this name takes unless it is told."""
        return self.config.reca_steps if job in ("reconstruct", "edit") else self.config.mask_steps

    @torch.no_grad()
    def sample(self, context, layout, image, guidance, steps, temperature=1.0, generator=None, exponential=None,
               gumbel_u=None, trace=None):
        """MaskGIT's parallel decoding: every step draws all unknown codes, keeps the most confident, masks the others.
        context (b, T, D) and its layout, or 2b rows, the unconditional ones second; image (b, N) ids, mask_id = to be
        painted -> codes (b, N). Guidance g: logits = (1 + g) cond - g uncond. exponential (steps, b * N, codebook) and
        gumbel_u (steps, b, N), uniform, replace the noise of `generator`, see row_generators. trace: a list that gets a
        dict per step."""
        c, (b, N), rows, model = self.config, image.shape, len(context), self.showo.model
        S, codebook, generators = N + 2, slice(c.image_offset, c.mask_id), vision.row_generators(generator, b)
        slots = torch.arange(S + context.shape[1], device=image.device).expand(rows, -1)
        cache = self.new_cache(rows, slots.shape[1])
        model(context, layout.part(slice(S, None)), cache=cache, slots=slots[:, S:])  # once: it never sees the target
        for k in range(steps):
            x = self.with_target(image).repeat(rows // b, 1, 1)
            with watching(trace is not None) as watch:
                hidden = model(x, layout.part(slice(S)), slice(1, N + 1), cache, slots[:, :S])
            logits = self.logits(hidden, codebook)  # (rows, N, codebook): a mask predicts itself
            if rows > b:
                logits = (1 + guidance) * logits[:b] - guidance * logits[b:]
            p = logits.softmax(dim=-1)
            e = (vision.draw_rows(draw_exponential, generators, *p.shape[1:], device=p.device) if exponential is None
                 else exponential[k].view_as(p))  # argmax(p / e) with e ~ Exp(1) is a draw from p
            unknown = image == c.mask_id
            codes = torch.where(unknown, (p / e.to(p)).argmax(dim=-1), image - c.image_offset)
            confidence = torch.where(unknown, p.gather(2, codes[..., None]).squeeze(2), torch.finfo(p.dtype).max)
            done = (k + 1) / steps
            planned = int(N * mask_ratio(torch.tensor(done)))  # on the CPU: no sync; float32: the published rounding
            count = (unknown.sum(dim=1, keepdim=True) - 1).clamp(max=planned).clamp(min=1)  # (b, 1) codes to mask again
            temperature = temperature * (1 - done)  # a running product: falls much faster than linearly, to 0
            w = vision.draw_rows(torch.rand, generators, N, device=p.device) if gumbel_u is None else gumbel_u[k]
            gumbel = -(-w.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            score = confidence.clamp(min=1e-20).log() + temperature * gumbel
            masked = score < score.sort(dim=1).values.gather(1, count)
            image = (codes + c.image_offset).masked_fill(masked, c.mask_id)
            if trace is not None:
                looks = torch.stack([each[0, -N - 1:-1] if each.shape[1] > N else each[0] for each in watch.seen])
                looks = looks.mean(0)[:, S:].masked_fill(~unknown[0, :, None], math.nan)  # (N, context)
                trace.append(dict(hidden=hidden, confidence=confidence, masked=masked, temperature=temperature,
                                  codes=codes, looks=looks))
        return codes

    def paint(self, context, image, cfg=None, steps=None, temperature=1.0, generator=None):
        """image (b, h, w) ids -> codes (b, h, w). cfg 1 = no guidance. Unconditional is the empty text-to-image row,
        also where a picture is the condition: the published demo's row for that is only partly known."""
        c, (b, h, w) = self.config, image.shape
        cfg, steps = vision.guidance(cfg, c.cfg), steps or c.mask_steps
        if cfg != 1:
            context = stack_rows(context, self.context([""] * b, h * w))
        trace = None if self.trace is None else []
        codes = self.sample(*context, image.flatten(1), cfg - 1, steps, temperature, generator, trace=trace)
        for k, step in enumerate(trace or ()):  # the last one masks a code again, which no step looks at
            masked = step["masked"][0].view(h, w) & (k + 1 < steps)
            looks = step["looks"][:, :len(self.trace[0])]
            self.trace.append(dict(picture=self.decode_codes(step["codes"][:1].view(1, h, w)), looks=looks,
                                   masked=masked, title=f"step {k + 1}"))
        return codes.view(b, h, w)

    @torch.no_grad()
    def context(self, prompts, N):
        """Texts -> context of text-to-image."""
        prompts = [t2i_prompt(self.encode(p), self.config) for p in prompts]
        self.note(prompts[0])
        return self.t2i_context(*pad_rows(prompts, self.config.pad, device=self.device), N)

    def note(self, ids, seen=None):
        """Says once, in the trace, what stands in the slots of a context: pieces of text, places of a picture."""
        if self.trace != []:  # None, or it was said: what follows is the row that guidance leads away from
            return
        words = ["" if i >= self.config.text_vocab else self.tokenizer.decode([i]) for i in ids]
        picture = [] if seen is None else boxes(*[math.isqrt(seen.shape[1])] * 2)
        before = 0 if self.config.w_clip_vit else 2  # features stand before the text, codes in it
        self.trace.append([*words[:before], *picture, *words[before:]])

    def logits(self, hidden, ids=slice(None)):
        """hidden (..., D) -> float32 logits of a slice of the vocabulary."""
        head = self.showo.lm_head
        return F.linear(hidden, head.weight[ids], head.bias[ids]).float()

    def new_cache(self, rows, slots):
        """Keys and values of each layer: [(2, rows, slots, heads, d)]."""
        c, kind, dtype = self.config, self.device.type, self.showo.lm_head.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        shape = (2, rows, slots, c.num_heads, c.hidden_size // c.num_heads)
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.num_layers)]

    def decode_codes(self, codes):
        return self.vq.decode(codes).clamp(-1, 1)

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None):
        """Texts -> pictures (B, 3, H, W) in [-1, 1]. size: pixels, int or (H, W), multiples of vq.stride."""
        size, stride = size or self.config.image_size, self.vq.stride
        H, W = (size, size) if isinstance(size, int) else size
        if H % stride or W % stride:
            raise ValueError(f"size {size}: each side must be a multiple of {stride} pixels")
        image = torch.full((len(prompts), H // stride, W // stride), self.config.mask_id, device=self.device)
        context = self.context(prompts, image[0].numel())
        return self.decode_codes(self.paint(context, image, cfg, steps, temperature, generator))

    def reconstruct(self, images, prompt=None, cfg=None, steps=None, temperature=1.0, generator=None):
        """Pictures (B, 3, H, W) in [-1, 1] -> the same through the model's own understanding of them."""
        prompts = [prompt or "Describe the image in detail."] * len(images)
        return self.edit(images, prompts, cfg, steps, temperature, generator)

    @torch.no_grad()
    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None):
        """Pictures and what to change -> changed pictures. The published model was not trained for it. ValueError for
        an instruction that training would cut: half of it would do something else, without a word."""
        c, samples = self.config, [{"instruction": text} for text in instructions]
        pad_rows([self.prompt_ids("edit", sample, math.inf)[0] for sample in samples], c.pad, c.max_request)
        request = self.collate("edit", samples, [torch.Generator()] * len(samples), None)
        request = {k: v.to(self.device) for k, v in request.items()}
        seen = self.understand(images.to(self.device))
        context = self.reca_context(**request, N=self.side ** 2, **seen)
        self.note(request["ids"][0].tolist(), *seen.values())
        image = torch.full((len(images), self.side, self.side), c.mask_id, device=self.device)
        return self.decode_codes(self.paint(context, image, cfg, steps or self.sampling_steps("edit"),
                                             temperature, generator))

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers."""
        c, picture, line = self.config, {}, ""
        head = [c.eos] if images is None else mmu_prompt([], c, self.system_ids)
        if images is not None and c.w_clip_vit:
            picture = {"features": self.clip_features(images.to(self.device), chat=True)}
        elif images is not None:
            picture = {"codes": self.vq.encode(images.to(self.device).float()).flatten(1)}
            head, line = [*head, c.eos], "\n"  # at inference only
        rows = [head + self.dialogue(line + q.strip())[0] for q in questions]
        ids, lengths = pad_rows(rows, c.pad, device=self.device)
        x, layout = self.mmu_context(ids, **picture)
        lengths += x.shape[1] - ids.shape[1]
        new = self.write(x, layout, lengths, max_new_tokens, temperature, generator).tolist()
        new = [row[:row.index(c.eos)] if c.eos in row else row for row in new]
        return [self.tokenizer.decode([i for i in row if i < c.text_vocab]).strip() for row in new]

    @torch.no_grad()
    def write(self, x, layout, lengths, max_new_tokens, temperature=0.0, generator=None):
        """Continues rows whose first lengths (B,) slots are no pads -> ids (B, at most max_new_tokens), at the end eos.
        Greedy at temperature 0. New ids overwrite a row's pads, so that every mask stays an interval."""
        (B, T), model, generators = x.shape[:2], self.showo.model, vision.row_generators(generator, len(x))
        cache = self.new_cache(B, T + max_new_tokens)
        hidden = model(x, layout, cache=cache, slots=torch.arange(T, device=x.device).expand(B, -1))
        hidden = hidden[torch.arange(B, device=x.device), lengths - 1]  # (B, D)
        out, ended = [], torch.zeros(B, 1, dtype=torch.bool, device=x.device)
        for t in range(max_new_tokens):
            logits = self.logits(hidden)  # (B, vocabulary)
            new = vision.next_token(logits, temperature, generators).masked_fill(ended, self.config.eos)
            out.append(new)
            ended = ended | (new == self.config.eos)
            if t + 1 == max_new_tokens or bool(ended.all()):
                break
            slot = lengths[:, None] + t
            layout = Layout(slot, torch.zeros_like(slot), slot + 1)
            hidden = model(self.embed(new), layout, cache=cache, slots=slot)[:, 0]
        return torch.cat(out, dim=1)

    def inpaint(self, images, mask, prompts, **how):
        """mask (B, 1, H, W): 1 = paint anew, resized to the grid of codes. how: cfg, steps, temperature, generator."""
        codes = self.vq.encode(images.to(self.device).float())  # (B, h, w)
        hole = F.interpolate(mask.to(self.device).float(), codes.shape[1:], mode="bicubic").squeeze(1) >= 0.5
        image = (codes + self.config.image_offset).masked_fill(hole, self.config.mask_id)
        return self.decode_codes(self.paint(self.context(prompts, image[0].numel()), image, **how))

    def extrapolate(self, images, prompts, side="right", **how):
        """Pictures -> half as large again towards `side` (left, right, up, down), painted from the near half."""
        codes, dims = self.vq.encode(images.to(self.device).float()), {"left": 2, "right": 2, "up": 1, "down": 1}
        if side not in dims:
            raise ValueError(f"side {side!r}: expected one of {', '.join(dims)}")
        dim, backwards = dims[side], side in ("left", "up")
        size, far = codes.shape[dim], codes.shape[dim] // 2  # so much of the grid is left out, and as much is new
        start, shift = (0, far) if backwards else (size - far, -far)
        image = codes.roll(shift, dim) + self.config.image_offset
        image.narrow(dim, start, far).fill_(self.config.mask_id)
        new = self.paint(self.context(prompts, image[0].numel()), image, **how).narrow(dim, start, far)
        return self.decode_codes(torch.cat([new, codes] if backwards else [codes, new], dim))

    # ---- what train.py needs

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad: all but the image tokenizer
        and CLIP. A CLIP that did not come pre-trained (config.train_clip) learns in the base stage."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.stage = stage
        frozen = ("vq.",) if stage == "base" and self.config.train_clip else ("vq.", "clip.")
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe exempts biases only: LayerNorm weights and embeddings do decay."""
        return "bias" in name

    def blocks(self):
        """The repeated blocks: what recomputation and sharding wrap."""
        clip = self.clip.vision_model["encoder"]["layers"] if self.config.w_clip_vit else []
        return [*self.showo.model.layers, *clip]

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1], cropped to the central square or squashed to a square, as published."""
        if purpose in ("i2t", "answer") and self.config.w_clip_vit:  # clip_features will normalize
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vision.CLIP_MEAN, vision.CLIP_STD))
            return (vision.clip_pixels(image, self.clip.config.image_size) * std + mean) * 2 - 1
        fit = vision.magvit_pixels if purpose in ("t2i", "i2t", "answer") else vision.square_pixels
        return fit(image, self.config.image_size)

    def clip_features(self, images, chat=False):
        """images (B, 3, H, W) in [-1, 1] -> (B, A, width). For RecA resized bilinearly, pixels as they are; chat: with
        CLIP's mean and deviation, as its own preprocessing has it."""
        c, size = self.config, (self.config.clip.image_size,) * 2
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic" if chat else "bilinear", antialias=chat)
        if chat:
            mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (c.clip_mean, c.clip_std))
            images = (images * 0.5 + 0.5 - mean) / std
        return self.clip(images.to(next(self.clip.parameters()).dtype))

    def understand(self, images):
        """What RecA's context shows of images: {"features": (B, A, width)} or {"small_codes": (B, A)}."""
        c, (H, W) = self.config, images.shape[2:]
        with torch.autocast(images.device.type, enabled=False):  # a code is made of signs: rounding would flip some
            if c.w_clip_vit:
                return {"features": self.clip_features(images)}
            size = H // c.reca_down_scale, W // c.reca_down_scale  # a bottleneck, or it just copies
            small = F.interpolate(images.float(), size, mode="bilinear")
            small = F.interpolate(small, (H, W), mode="bilinear") if c.reca_resize_back else small
            return {"small_codes": self.vq.encode(small).flatten(1)}

    @torch.no_grad()
    def precompute(self, images):
        """images (B, 3, H, W) in [-1, 1] -> all that is frozen in this stage: codes (B, N), and uint8 pixels where CLIP
        trains, else features (and chat_features, where image-to-text normalizes differently) or small_codes."""
        c = self.config
        with torch.autocast(images.device.type, enabled=False):
            out = {"codes": self.vq.encode(images.float()).flatten(1)}
            if c.w_clip_vit and c.train_clip and self.stage == "base":
                return out | {"pixels": ((images + 1) * 127.5).round().clamp(0, 255).byte()}
            out |= self.understand(images)
            if c.w_clip_vit and set(c.clip_mean + c.clip_std) != {0.5}:
                out["chat_features"] = self.clip_features(images, chat=True)
        return out

    def encode(self, text):
        """Text of people or files -> ids; a special string in it is spelled out."""
        return self.tokenizer.encode_ordinary(text)

    def dialogue(self, question, answer=None):
        """`USER: question ASSISTANT: answer<eos>` -> ids, labels (IGNORE up to `ASSISTANT:`). No answer: to be had."""
        ids = self.encode(f"{self.config.user} {question} {self.config.assistant}")
        reply = [] if answer is None else [*self.encode(" " + answer.strip()), self.config.eos]
        return ids + reply, [IGNORE] * len(ids) + reply

    def prompt_ids(self, part, sample, limit):
        """One sample -> ids and labels of its row, or ids and None. A dialogue ends with the last turn that fits whole
        into `limit` ids; where not even the first does, it is cut, and has no end of an answer."""
        c = self.config
        if part == "t2i":
            return t2i_prompt(self.encode(sample["caption"]), c, limit, sample.get("drop", False)), None
        if part in ("recon", "edit"):  # a request is never dropped: the published recipe has none
            request = sample["prompt" if part == "recon" else "instruction"]
            ids, end = self.encode(f"{c.user} \n {request} {c.assistant}"), self.encode(f" {c.assistant}")
            if (over := len(reca_prompt(ids, c)) - limit) > 0:  # the request loses its end, and the row nothing else
                ids = [*ids[:-over - len(end)], *end]
            return reca_prompt(ids, c), None
        ids = mmu_prompt([], c, self.system_ids) if part == "i2t" else [c.eos]
        labels = [IGNORE] * len(ids)
        for i, (question, answer) in enumerate(sample.get("turns") or [(sample["question"], sample["answer"])]):
            turn = self.dialogue(question.strip(), answer)
            if i > 0 and len(ids + turn[0]) > limit:
                break
            ids, labels = ids + turn[0], labels + turn[1]
        return ids[:limit], labels[:limit]

    def collate(self, part, samples, generators, shared, pad_to=None):
        """Samples (dicts), a generator for each -> what a loss needs beside the encodings. ids (B, T): right-padded to
        pad_to, or to a multiple of pad_multiple. Texts that are too long are cut. u (B,): how many codes are masked,
        r (B, N): which. count (): how many labels the loss has."""
        if part == "words":
            return {"words": vision.caption_words(self.tokenizer, [s["caption"] for s in samples])}
        if part == "uncond":
            part, samples = "t2i", [{"caption": "", "drop": True}] * len(samples)
        c, N = self.config, self.side ** 2
        limits = {"t2i": c.max_prompt, "recon": c.max_request, "edit": c.max_request}
        limit = limits.get(part, c.max_dialogue + 3 + len(self.system_ids))
        rows, labels = zip(*[self.prompt_ids(part, s, min(pad_to or limit, limit)) for s in samples])
        T = pad_to or min(-(-max(map(len, rows)) // c.pad_multiple) * c.pad_multiple, limit)
        ids, lengths = pad_rows(rows, c.pad, T)
        if part in ("i2t", "text"):
            labels, _ = pad_rows(labels, IGNORE, T)
            return {"ids": ids, "labels": labels, "count": (labels[:, 1:] != IGNORE).sum().float()}
        draws = [(torch.rand((), generator=g), torch.rand(N, generator=g)) for g in generators]
        u, r = (torch.stack(d) for d in zip(*draws))
        count = masked_count(u, N).sum() + (2 * len(u) if part == "t2i" else 0)
        return {"ids": ids, "lengths": lengths, "u": u, "r": r, "count": count}

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="show-o-clip-512", tokenizer_path=None, vision_path=None, tokenizer=None,
                       device="cpu", dtype=None, prepare=None):
        """Show-o or Show-o-RecA, with magvitv2 (tokenizer_path) and, for show-o-clip-*, clip-vit-large-patch14-336
        (vision_path) -> model in eval mode. Raises FileNotFoundError, and ValueError with the keys that do not fit."""
        c = CONFIGS[config] if isinstance(config, str) else config
        if not tokenizer_path or bool(vision_path) != c.w_clip_vit:
            raise ValueError(f"{path}: {config} needs --tokenizer-ckpt (magvitv2) and "
                             f"{'' if c.w_clip_vit else 'no '}--vision-ckpt (clip-vit-large-patch14-336)")
        state = read_weights(path) | {f"vq.{k}": v for k, v in read_weights(tokenizer_path).items()}
        clip = read_weights(vision_path) if c.w_clip_vit else {}  # also holds a text tower, and position_ids
        state |= {f"clip.{k}": v for k, v in clip.items() if "vision_model." in k and "_ids" not in k}
        with torch.device("meta"):
            model = cls(c, tokenizer).to(dtype or torch.float32)
        model.vq.float()  # a code is made of signs: rounding would flip some
        if prepare:
            prepare(model)
        load_strict(model, state, {"vq.": tokenizer_path, "clip.": vision_path, "": path}, device)
        return model.eval()

    def published_state(self):
        """{name: tensor} as the published file has it, float32 on the CPU (meta stays meta): without vq and CLIP."""
        return {name: t.to("meta" if t.is_meta else "cpu", torch.float32) for name, t in self.state_dict().items()
                if not name.startswith(("vq.", "clip."))}

    def save_published(self, folder):
        """Writes pytorch_model.bin and config.json, for the original code, to a folder that exists -> their paths.
        Raises OSError."""
        c, paths = self.config, [f"{folder}/pytorch_model.bin", f"{folder}/config.json"]
        atomic(paths[0], partial(torch.save, self.published_state()))
        about = dict(_class_name="Showo", w_clip_vit=c.w_clip_vit, vocab_size=c.vocab_size, llm_vocab_size=c.text_vocab,
                     llm_model_path="microsoft/phi-1_5", codebook_size=c.codebook_size, mask_token_id=c.mask_id,
                     num_new_special_tokens=c.num_special, num_vq_tokens=self.side ** 2)
        write_text(paths[1], json.dumps(about, indent=1))
        return paths

    # ---- base training from nothing

    def words_loss(self, words, features=None, pixels=None, **_):
        """For a CLIP that did not come pre-trained: see vision.words_loss. words (B, V): 1 where the caption has it."""
        embeddings = self.showo.model.embed_tokens.weight[:words.shape[1]]
        return vision.words_loss(self.project(features, pixels), words, embeddings)

Model = ShowO
