"""Show-o (`--arch ar`): one transformer that writes text from left to right and paints pictures by filling in masked image codes.

A phi-1.5 decoder reads text ids and the integer codes of an image tokenizer (MAGVIT-v2) from ONE vocabulary. Text is learned by next-token
prediction, pictures by mask prediction as in MaskGIT: some codes are replaced by a mask id, and the position of a mask predicts its own code.
What differs from a textbook decoder: attention and MLP side by side behind one LayerNorm; a LayerNorm per head on queries and keys before the
rotation; only the first half of each head is rotated; biases everywhere; an untied head with a bias. Pictures are understood through CLIP
features and an MLP (`show-o-clip-*`, `tiny`) or through their own codes (`show-o-*`).

RecA (arXiv 2509.07295) for it: [mmu][soi] CLIP features [eoi] "describe this image" [soi] masked codes of the SAME picture [eoi], cross entropy on
the masked codes. See `ShowO.reca_loss`.

MEMORY ORDER. Rows are not stored in the order in which they are read. With positions given explicitly the order is free, and the order
    [ target image: eoi, codes, soi ][ CLIP features ][ text, right-padded ]
makes every mask of the model an interval of keys [lo, hi) per query, for `custom_kernels.attention`, and puts whatever a loss reads in fixed
slots. The published rows pad the text on the left or in the middle; those pads are dropped here, and positions still count them.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_kernels import attention, attention_plan, linear_cross_entropy
from image_tokenizer import TOKENIZERS, LFQConfig, LFQTokenizer, load_strict, read_weights
from vision_encoder import VISION_ENCODERS, CLIPConfig, CLIPVision, clip_pixels, magvit_pixels, square_pixels

ARCH = "ar"
IGNORE = -100  # label of a position that is not trained
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SYSTEM_PROMPT = ("A chat between a curious user and an artificial intelligence assistant. "
                 "The assistant gives helpful, detailed, and polite answers to the user's questions.")


# ---------------------------------------------------------------------------------------------------------------------
# config


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
    # pictures
    image_size: int = 256
    vq: LFQConfig = field(default_factory=lambda: TOKENIZERS["magvitv2"])
    w_clip_vit: bool = True  # understand through CLIP features; otherwise through image codes
    clip: CLIPConfig = field(default_factory=lambda: VISION_ENCODERS["clip-vit-large-patch14-336"])
    clip_mean: tuple = CLIP_MEAN  # of the image-to-text flow only: RecA feeds CLIP the plain [-1, 1] pixels
    clip_std: tuple = CLIP_STD
    train_clip: bool = False  # in the base stage; in all others CLIP is frozen
    # text: longest rows in ids, template words
    max_prompt: int = 129  # text-to-image: [t2i] bos text eos
    max_dialogue: int = 381  # image-to-text: what follows the picture
    max_request: int = 128  # RecA: [mmu][soi][eoi] bos text eos; with CLIP the target image starts at a fixed position behind so many
    system_prompt: str = SYSTEM_PROMPT
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    # RecA
    prefix_grad: bool = False  # CLIP variant: let the loss reach projector and embeddings (the published code builds the row under no_grad)
    reca_down_scale: int = 2  # VQ variant: how much smaller the copy is whose codes are the context ...
    reca_resize_back: bool = False  # ... and whether it is enlarged again before encoding (a blur)
    # samplers
    cfg: float = 6.0  # logits = uncond + cfg * (cond - uncond); the published guidance g is cfg - 1
    steps: int = 50
    reca_steps: int = 30

    # Special ids follow the text ids; of the ten, four are used. [PAD] is the first of them.
    pad = property(lambda c: c.text_vocab)
    soi = property(lambda c: c.text_vocab + 1)  # start of image
    eoi = property(lambda c: c.text_vocab + 2)  # end of image
    t2i = property(lambda c: c.text_vocab + 5)  # task: draw
    mmu = property(lambda c: c.text_vocab + 6)  # task: look
    image_offset = property(lambda c: c.text_vocab + c.num_special)  # id of image code 0
    mask_id = property(lambda c: c.image_offset + c.codebook_size)
    vocab_size = property(lambda c: c.mask_id + 1)


CONFIGS = {
    # 48x48 pictures of the shape world: 9 codes of 10 bits, 9 CLIP tokens; 2M parameters with both encoders. No system prompt and shorter
    # template words, because at this size a text token costs as much as an image token.
    "tiny": ShowOConfig(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, text_vocab=1024, eos=1018, codebook_size=1024, image_size=48,
                        vq=TOKENIZERS["tiny-lfq"], clip=VISION_ENCODERS["tiny-clip"], clip_mean=(0.5,) * 3, clip_std=(0.5,) * 3, train_clip=True,
                        max_prompt=48, max_dialogue=96, max_request=40, system_prompt="", user="Question:", assistant="Answer:", cfg=3.0, steps=6, reca_steps=6),
    "show-o-256": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384),
    "show-o-512": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384, image_size=512, reca_steps=20),
    "show-o-clip-256": ShowOConfig(max_dialogue=228),
    "show-o-clip-512": ShowOConfig(max_dialogue=996, image_size=512),
}


# ---------------------------------------------------------------------------------------------------------------------
# blocks (module names are the published keys)


def rotate(x, rope):
    """x (B, T, heads, d), rope = cos and sin (B or 1, T, 1, r/2): turns the pairs (i, i + r/2) of the first r dimensions, leaves the others."""
    cos, sin = rope
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.hidden_size // c.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            setattr(self, name, nn.Linear(c.hidden_size, c.hidden_size))
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps=c.norm_eps)  # one for all heads
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps=c.norm_eps)

    def forward(self, h, rope, plan, read, cache, slots):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, d)
        v = heads(self.v_proj(h))
        k = rotate(self.k_layernorm(heads(self.k_proj(h))), rope).to(v.dtype)
        q = rotate(self.q_layernorm(heads(self.q_proj(h[:, read]))), [table[:, read] for table in rope]).to(v.dtype)
        if cache is not None:
            row = torch.arange(len(h), device=h.device)[:, None]
            cache[0][row, slots], cache[1][row, slots] = k, v
            k, v = cache
        a = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, plan)  # (B, heads, T, d)
        return self.dense(a.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class Block(nn.Module):
    """x + attention(LN x) + mlp(LN x): both read the same normalised input. Only the slots `read` (a slice) come out."""

    def __init__(self, c):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        self.self_attn = Attention(c)
        self.mlp = MLP(c)

    def forward(self, x, rope, plan, read=slice(None), cache=None, slots=None):
        h = self.input_layernorm(x)
        return x[:, read] + self.self_attn(h, rope, plan, read, cache, slots) + self.mlp(h[:, read])


class Layout(NamedTuple):
    """Where the slots of a row stand and what they see, in memory order; each (B or 1, T)."""
    positions: torch.Tensor  # rotary positions: places in the published row, whose pads count
    lo: torch.Tensor  # slot i sees the slots [lo, hi)
    hi: torch.Tensor


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.rotary_dim, self.theta = int(c.partial_rotary_factor * c.hidden_size // c.num_heads), c.rope_theta
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.final_layernorm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)

    def forward(self, x, layout, read=slice(None), cache=None, slots=None):
        """Embeddings x (B, T, D) -> hidden states of the slots `read` after the final norm. With a cache (inference) keys and values are written to its
        `slots` (B, T), and lo, hi count cache slots."""
        frequency = self.theta ** (-torch.arange(0, self.rotary_dim, 2, device=x.device).float() / self.rotary_dim)
        angle = (layout.positions[..., None].float() * frequency)[:, :, None]  # (B or 1, T, 1, r/2)
        rope = angle.cos(), angle.sin()
        num_keys = x.shape[1] if cache is None else cache[0].shape[2]
        plan = attention_plan(layout.lo, layout.hi, num_keys)
        for i, layer in enumerate(self.layers):
            last = {} if cache is None else {"cache": cache[i], "slots": slots}
            if i == len(self.layers) - 1 and read != slice(None):  # nobody attends to the last layer's output: compute what is asked for
                plan, last["read"] = attention_plan(layout.lo[:, read], layout.hi[:, read], num_keys), read
            x = layer(x, rope, plan, **last)
        return self.final_layernorm(x)


# ---------------------------------------------------------------------------------------------------------------------
# prompts: lists of text ids -> lists of ids


def with_bos(text, c):
    return list(text) if text[:1] == [c.eos] else [c.eos, *text]


def t2i_prompt(text, c, limit=None, drop=False):
    """[t2i] bos text eos, at most `limit` ids (the end is cut, eos stays). drop: the unconditional prompt, that of the empty text."""
    ids, limit = [c.t2i, *with_bos([] if drop else text, c), c.eos], limit or c.max_prompt
    return ids if len(ids) <= limit else [*ids[:limit - 1], c.eos]


def lm_prompt(text, c, limit):
    """Text alone: bos text eos, cut to `limit`; every id is a target."""
    return [*with_bos(text, c), c.eos][:limit]


def mmu_prompt(chat, c, system=()):
    """[mmu] system [soi][eoi] chat; the picture (features or codes) goes between soi and eoi when the row is built."""
    return [c.mmu, *system, c.soi, c.eoi, *chat]


def reca_prompt(text, c):
    """[mmu][soi][eoi] bos text eos; the picture goes between soi and eoi. There is no system prompt in RecA."""
    return [c.mmu, c.soi, c.eoi, *with_bos(text, c), c.eos]


def pad_rows(rows, fill, length, device=None):
    """Lists of ids -> (B, length) int64, right-padded with `fill`."""
    if max(map(len, rows)) > length:
        raise ValueError(f"a prompt of {max(map(len, rows))} ids does not fit into {length}: shorten the text, or raise pad_to / the config's max_* field")
    return torch.tensor([[*r, *[fill] * (length - len(r))] for r in rows], device=device)


# ---------------------------------------------------------------------------------------------------------------------
# masks: (positions, lo, hi) in memory order, each (B or 1, T). n (B,) = ids of each row that are no pads, T = ids with pads, N = image codes.


def _slots(rows, *parts):
    return torch.cat([p.expand(rows, -1) for p in parts], dim=1)


def _target(start, N, device):
    """Positions of the slots [eoi, N codes, soi] of a target image whose soi stands at `start`."""
    i = torch.arange(N + 2, device=device)[None]
    return start + torch.where(i == 0, N + 1, i % (N + 1))


def t2i_layout(n, T, N, start):
    """Text-to-image; published order PAD.. text | soi codes eoi, with soi at `start`. Text is causal; soi, codes and eoi see everything but pads.
    (Pads, which nobody reads, see the pads before them: so the published masks are met exactly.)"""
    n, j, S = n[:, None], torch.arange(T, device=n.device)[None], N + 2
    text, target = j < n, torch.zeros(1, S, dtype=torch.long, device=n.device)
    return Layout(_slots(len(n), _target(start, N, n.device), torch.where(text, start - n + j, j - n)),
                  _slots(len(n), target, torch.where(text, S, S + n)),
                  _slots(len(n), target + S + n, S + 1 + j))


def reca_clip_layout(n, T, N, num_features, block):
    """RecA with CLIP; published order mmu soi | features | eoi bos text eos PAD.. | soi codes eoi, where ids and pads fill `block` places. Everything is
    causal, and besides: all see the features, the codes see each other (but not the closing eoi), nobody sees a pad."""
    n, j, S, A = n[:, None], torch.arange(T, device=n.device)[None], N + 2, num_features
    zero, end = torch.zeros_like(n), S + A + n
    return Layout(_slots(len(n), _target(A + block, N, n.device), 2 + torch.arange(A, device=n.device)[None], torch.where(j < 2, j, j + A)),
                  _slots(len(n), zero, (zero + 1).expand(-1, N), zero + N + 1, (zero + S).expand(-1, A + T)),
                  _slots(len(n), end.expand(-1, S), (zero + S + A + 2).expand(-1, A), torch.minimum(S + A + 1 + j, end)))


def reca_vq_layout(n, T, N, given, limit):
    """RecA with image codes as context; published order PAD.. mmu soi given eoi | bos text eos | soi codes eoi; eos stands at the place given + limit - 1.
    T and n count the three ids around the given codes. mmu and text are causal; soi, given codes, eoi see all from mmu to eoi; the target sees all but pads."""
    n, j, S, A = n[:, None] - 3, torch.arange(T - 3, device=n.device)[None], N + 2, given + 3
    context, text, target = torch.arange(A, device=n.device)[None], j < n, torch.zeros(1, S, dtype=torch.long, device=n.device)
    pads = limit - 3 - n
    return Layout(_slots(len(n), _target(given + limit, N, n.device), pads + context, torch.where(text, pads + A + j, j - n)),
                  _slots(len(n), target, torch.full_like(context, S), torch.where(text, S, S + A + n)),
                  _slots(len(n), target + S + A + n, torch.where(context == 0, S + 1, S + A), S + A + 1 + j))


def mmu_clip_layout(T, num_features, before, device=None):
    """Image-to-text with CLIP; published order: `before` ids (mmu, system, soi) | features | eoi and chat, right-padded. Causal, and all see the features."""
    j, A = torch.arange(T, device=device), num_features
    hi = torch.cat([torch.full((A,), A + before, device=device), A + 1 + j])
    return Layout(torch.cat([before + torch.arange(A, device=device), torch.where(j < before, j, j + A)])[None], torch.zeros_like(hi)[None], hi[None])


def causal_layout(T, seen_by_all=0, device=None):
    """Text alone; or image-to-text from codes, where all see the first `seen_by_all` places: mmu, soi, codes, eoi."""
    i = torch.arange(T, device=device)
    return Layout(i[None], torch.zeros_like(i)[None], (i + 1).clamp(min=seen_by_all)[None])


# ---------------------------------------------------------------------------------------------------------------------
# masking of image codes


def mask_ratio(t):
    """Share of codes that are masked at time t in [0, 1]: cosine schedule, in training t ~ U(0, 1), in sampling t = steps done / steps."""
    return torch.cos(t * math.pi * 0.5).clamp(min=0)


def mask_codes(codes, u, r, c):
    """codes (B, N), u (B,) and r (B, N) uniform in [0, 1) -> input ids and labels (B, N). Masked: the places whose entry in argsort(r) is below
    max(1, round(N * mask_ratio(u))), a uniformly random subset."""
    count = (codes.shape[1] * mask_ratio(u)).round().clamp(min=1)  # round half to even
    masked, ids = r.argsort(dim=1) < count[:, None], codes + c.image_offset
    return ids.masked_fill(masked, c.mask_id), ids.masked_fill(~masked, IGNORE)


def learning_rate_factor(step, max_steps, warmup=1000):
    """The published schedule of RecA as a factor on the rate: linear from 0, then half a cosine to 0 at max_steps."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (max_steps - warmup))))


# ---------------------------------------------------------------------------------------------------------------------
# the model


class ShowO(nn.Module):
    """config: ShowOConfig; tokenizer: text tokenizer (encode_ordinary, decode, eos), needed only where text goes in or out as a string."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config = c = config
        self.tokenizer = tokenizer
        if tokenizer is not None and (tokenizer.eos != c.eos or tokenizer.vocab_size > c.text_vocab):
            raise ValueError(f"text tokenizer: {tokenizer.vocab_size} ids with <|endoftext|> {tokenizer.eos}, but the config expects at most {c.text_vocab} ids "
                             f"with <|endoftext|> {c.eos}: give the tokenizer that the model was trained with (--text-tokenizer)")
        self.system_ids = self._encode(c.system_prompt) if tokenizer is not None and c.system_prompt else []
        self.showo = nn.Module()
        self.showo.model, self.showo.lm_head = Backbone(c), nn.Linear(c.hidden_size, c.vocab_size)
        if c.w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(c.clip.width, c.hidden_size), nn.GELU(), nn.Linear(c.hidden_size, c.hidden_size))
            self.clip = CLIPVision(c.clip)
        self.vq = LFQTokenizer(c.vq)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02), zero biases; what writes into the residual stream starts smaller, so that its scale does not grow with depth."""
        for name, p in self.showo.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_layers) if name.endswith(("dense.weight", "fc2.weight")) else 0.02)

    def trainable_parameters(self, stage):
        """Sets requires_grad everywhere; returns [(name, parameter)] of what trains in `stage` (base, sft, reca). The image tokenizer never does."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        frozen = ("vq.",) if stage == "base" and self.config.train_clip else ("vq.", "clip.")
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe exempts biases only: LayerNorm weights and embeddings are decayed."""
        return "bias" in name

    def target_count(self, part, tensors):
        """How many labels a batch of the part has in its loss, 0-dim: what "count" is made from where a batch is spread over processes."""
        if "labels" in tensors:
            return (tensors["labels"][:, 1:] != IGNORE).sum().float()
        masked = mask_codes(tensors["codes"], tensors["u"], tensors["r"], self.config)[1] != IGNORE
        return (masked.sum() + (2 * len(masked) if part == "t2i" else 0)).float()

    def flops_per_sample(self, part):
        """Floating point operations of forward + backward of one sample, with the text at its maximal length."""
        c, N = self.config, self.image_tokens
        context = self.clip.num_tokens if c.w_clip_vit else N // (1 if c.reca_resize_back else c.reca_down_scale ** 2)
        tokens = {"t2i": c.max_prompt + N + 2, "i2t": c.max_dialogue + (context if c.w_clip_vit else N) + 3, "text": c.max_dialogue}.get(part, c.max_request + context + N + 2)
        read = c.max_dialogue if part in ("i2t", "text") else N
        block = 4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size
        return 6.0 * (tokens * c.num_layers * (block + tokens * c.hidden_size) + read * c.hidden_size * c.vocab_size)

    # ---- data side

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    @property
    def image_tokens(self):
        return (self.config.image_size // self.vq.stride) ** 2

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1], sized as published: for "understand" and "generate" cropped to the central square, else ("recon", "edit")
        squashed to a square."""
        c = self.config
        if purpose == "understand" and c.w_clip_vit:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
            return (clip_pixels(image, c.clip.image_size) * std + mean) * 2 - 1  # CLIP's normalisation follows in clip_features
        return magvit_pixels(image, c.image_size) if purpose in ("understand", "generate") else square_pixels(image, c.image_size)

    def clip_features(self, images, chat=False):
        """images (B, 3, H, W) in [-1, 1] -> (B, tokens, width). RecA: bilinear to CLIP's size, pixels as they are. chat: with CLIP's mean and deviation."""
        c, size = self.config, self.config.clip.image_size
        if images.shape[2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic" if chat else "bilinear", align_corners=False, antialias=chat)
        if chat:
            mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (c.clip_mean, c.clip_std))
            images = (images * 0.5 + 0.5 - mean) / std
        return self.clip(images.to(self.mm_projector[0].weight.dtype))

    def shrunken(self, images):
        """The degraded copy whose codes are RecA's context in the VQ variant: an information bottleneck."""
        H, W = images.shape[2:]
        small = F.interpolate(images, (H // self.config.reca_down_scale, W // self.config.reca_down_scale), mode="bilinear", align_corners=False)
        return F.interpolate(small, (H, W), mode="bilinear", align_corners=False) if self.config.reca_resize_back else small

    @torch.no_grad()
    def precompute(self, images, stage="base"):
        """images (N, 3, H, W) in [-1, 1] -> all that is frozen in `stage`, leading dim N: codes (N, n) int64, and what the picture is understood from: pixels
        (uint8, where CLIP trains), features (and chat_features, where the two flows normalise differently), or small_codes."""
        c = self.config
        with torch.autocast(images.device.type, enabled=False):  # a code is a sign: rounding flips it
            out = {"codes": self.vq.encode(images.float()).flatten(1)}
            if not c.w_clip_vit:
                return out | {"small_codes": self.vq.encode(self.shrunken(images.float())).flatten(1)}
            if stage == "base" and c.train_clip:
                return out | {"pixels": ((images + 1) * 127.5).round().clamp(0, 255).byte()}
            out["features"] = self.clip_features(images)
            if set(c.clip_mean + c.clip_std) != {0.5}:
                out["chat_features"] = self.clip_features(images, chat=True)
        return out

    def _encode(self, text):
        if self.tokenizer is None:
            raise ValueError("this model was built without a text tokenizer: pass tokenizer= (data.load_tokenizer)")
        return self.tokenizer.encode_ordinary(text)

    def chat_ids(self, question, answer=None):
        """`USER: q ASSISTANT: a<eos>` -> ids, labels; labels are IGNORE up to and including `ASSISTANT:`. Without an answer: the ids to continue."""
        c = self.config
        ids = self._encode(f"{c.user} {question} {c.assistant}")
        if answer is None:
            return ids
        reply = [*self._encode(" " + answer.strip()), c.eos]
        return ids + reply, [IGNORE] * len(ids) + reply

    def collate(self, part, samples, pad_to=None):
        """Samples (dicts of strings) -> ids (B, T), right-padded, with labels (B, T) for i2t and text, lengths (B,) for the others. T = pad_to, or the
        config's maximum. Captions and answers that are too long are cut; a request or instruction that does not fit raises ValueError."""
        c = self.config
        if part == "t2i":
            limit = min(pad_to or c.max_prompt, c.max_prompt)
            rows = [t2i_prompt(self._encode(s["caption"]), c, limit, s.get("drop", False)) for s in samples]
        elif part in ("recon", "edit"):
            limit, key = min(pad_to or c.max_request, c.max_request), "prompt" if part == "recon" else "instruction"
            rows = [reca_prompt(self._encode(f"{c.user} \n {s[key]} {c.assistant}"), c) for s in samples]
        else:
            head = mmu_prompt((), c, self.system_ids) if part == "i2t" else [c.eos]
            limit = min(pad_to or c.max_dialogue + len(head), c.max_dialogue + len(head))
            chats = [self.chat_ids(s["question"].strip(), s["answer"]) for s in samples]
            rows = [[*head, *ids][:limit] for ids, _ in chats]
            labels = pad_rows([[*[IGNORE] * len(head), *labels][:limit] for _, labels in chats], IGNORE, limit if pad_to is None or pad_to else max(map(len, rows)))
        limit = limit if pad_to is None or pad_to else max(map(len, rows))
        ids = pad_rows(rows, c.pad, limit)
        return {"ids": ids, "labels": labels} if part in ("i2t", "text") else {"ids": ids, "lengths": torch.tensor([len(r) for r in rows])}

    def draw(self, part, generator, rate_generator=None):
        """Randomness of one sample: u () decides how many codes are masked, r (n,) which. Nothing has to be equal within a batch."""
        if part in ("i2t", "text"):
            return {}
        return {"u": torch.rand((), generator=generator), "r": torch.rand(self.image_tokens, generator=generator)}

    # ---- losses

    def embed(self, *ids):
        """Ids (B, n), and single ints for whole columns -> (B, T, D)."""
        rows = next(i for i in ids if torch.is_tensor(i))
        ids = [i if torch.is_tensor(i) else torch.full((len(rows), 1), i, device=rows.device) for i in ids]
        return self.showo.model.embed_tokens(torch.cat(ids, dim=1))

    def with_target(self, image, context):
        """Puts the target image, ids (B, N), before the context: [eoi, codes, soi, context]."""
        return torch.cat([self.embed(self.config.eoi, image, self.config.soi), context], dim=1)

    def project(self, features=None, pixels=None):
        """CLIP features (B, A, width), or the uint8 pixels they come from -> (B, A, D); in fp32 as published, whatever autocast says."""
        if features is None:
            features = self.clip(pixels.float() / 127.5 - 1)
        with torch.autocast(features.device.type, enabled=False):
            return self.mm_projector(features.to(self.mm_projector[0].weight.dtype))

    def cross_entropy(self, x, layout, read, labels, count=None):
        """Runs the row and scores its slots `read` against labels (B, n), over the whole vocabulary: image codes as well as words. count: the
        denominator, if it is not the number of labels that are not IGNORE."""
        hidden, head = self.showo.model(x, layout, read), self.showo.lm_head
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, ignore_index=IGNORE, count=count)

    def reca_context(self, ids, lengths, N, features=None, pixels=None, small_codes=None):
        """[mmu][soi] picture [eoi] bos text eos, the picture as CLIP features (B, A, width), or as codes of a degraded copy (B, G), -> (B, T, D), layout."""
        c, T = self.config, ids.shape[1]
        if c.w_clip_vit:
            picture = self.project(features, pixels)
            return torch.cat([picture, self.embed(ids)], dim=1), reca_clip_layout(lengths, T, N, picture.shape[1], c.max_request)
        context = self.embed(ids[:, :2], small_codes + c.image_offset, ids[:, 2:])
        return context, reca_vq_layout(lengths, T, N, small_codes.shape[1], c.max_request)

    def reca_loss(self, codes, ids, lengths, u, r, features=None, pixels=None, small_codes=None, prefix_grad=None, count=None, **_):
        """Reconstruction alignment: understand a picture, then reproduce it. The picture's own understanding features stand where a very dense caption
        would; the target is the same picture as image codes, of which a random part is masked.

        codes (B, N): the target. ids (B, T), lengths (B,): the request (collate "recon"). u (B,), r (B, N): how many codes are masked, and which.
        What is understood: features (B, A, width), or the pixels that CLIP makes them from, or small_codes (B, G). In the published order
            [mmu][soi] picture [eoi] bos "USER: \\n describe this ASSISTANT:" eos PAD.. [soi] masked codes [eoi]
        Masked codes alone are in the loss, and each predicts itself: no shift. Codes see each other and all before them.

        prefix_grad False is the published convention of the CLIP variant: the whole INPUT row (projected features and all embeddings, the mask's
        included) is built without gradients, so this loss trains blocks, final norm and head; projector and embeddings learn from image-to-text
        alone. The VQ variant lets gradients through to the embeddings."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        if prefix_grad is None:
            prefix_grad = c.prefix_grad or not c.w_clip_vit
        with torch.set_grad_enabled(prefix_grad and torch.is_grad_enabled()):
            context, layout = self.reca_context(ids, lengths, N, features, pixels, small_codes)
            x = self.with_target(image, context)
        return self.cross_entropy(x, layout, slice(1, N + 1), labels, count)

    def edit_loss(self, codes, ids, lengths, u, r, count=None, **source):
        """Editing, which the published model lacks. Our layout: RecA's sequence with the SOURCE picture as context, the instruction as request and the
        codes of the EDITED picture as target. The row is built with gradients, as everything is that the base stage trains."""
        source = {k: source.get(f"source_{k}") for k in ("features", "pixels", "small_codes")}
        return self.reca_loss(codes, ids, lengths, u, r, **source, prefix_grad=True, count=count)

    def t2i_context(self, ids, lengths, N):
        return self.embed(ids), t2i_layout(lengths, ids.shape[1], N, self.config.max_prompt)

    def t2i_loss(self, codes, ids, lengths, u, r, count=None, **_):
        """Text-to-image: codes (B, N), captions ids (B, T) and lengths (B,), u (B,), r (B, N). As published, soi and eoi are in the loss with their own ids:
        two trivial terms per row in the mean."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        labels = torch.cat([torch.full_like(labels[:, :1], c.eoi), labels, torch.full_like(labels[:, :1], c.soi)], dim=1)
        context, layout = self.t2i_context(ids, lengths, N)
        return self.cross_entropy(self.with_target(image, context), layout, slice(0, N + 2), labels, count)

    def mmu_context(self, ids, codes=None, features=None, pixels=None):
        """ids (B, T) of mmu_prompt; the picture as features or pixels, or as codes -> (B, T', D), layout."""
        c, before = self.config, 2 + len(self.system_ids)  # mmu, system, soi
        if c.w_clip_vit:
            picture = self.project(features, pixels)
            return torch.cat([picture, self.embed(ids)], dim=1), mmu_clip_layout(ids.shape[1], picture.shape[1], before, ids.device)
        x = self.embed(ids[:, :before], codes + c.image_offset, ids[:, before:])
        return x, causal_layout(x.shape[1], before + codes.shape[1] + 1, ids.device)

    def i2t_loss(self, ids, labels, codes=None, features=None, chat_features=None, pixels=None, count=None, **_):
        """Image-to-text: ids and labels (B, T) (collate "i2t"); each slot predicts the id behind it. What is understood: features, chat_features if these
        are normalised in another way than RecA's, pixels, or codes."""
        x, layout = self.mmu_context(ids, codes, features if chat_features is None else chat_features, pixels)
        first = x.shape[1] - ids.shape[1]  # the slots before hold the picture and what precedes it, and are never read
        return self.cross_entropy(x, layout, slice(first, x.shape[1] - 1), labels[:, 1:], count)

    def text_loss(self, ids, labels, count=None, **_):
        """Text alone, ids and labels (B, T): the published lm rows (labels = ids), or a question of whose answer the labels are."""
        return self.cross_entropy(self.embed(ids), causal_layout(ids.shape[1], device=ids.device), slice(0, ids.shape[1] - 1), labels[:, 1:], count)

    def forward(self, batch):
        """{part: tensors} -> {part: loss}, all parts in one forward."""
        losses = {"recon": self.reca_loss, "edit": self.edit_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss, "text": self.text_loss}
        return {part: losses[part](**tensors) for part, tensors in batch.items()}

    # ---- samplers

    def logits(self, hidden, ids=slice(None)):
        """hidden (..., D) -> float32 logits of the given slice of the vocabulary."""
        head = self.showo.lm_head
        return F.linear(hidden, head.weight[ids], head.bias[ids]).float()

    def new_cache(self, rows, slots):
        """Keys and values of every layer: [(2, B, slots, heads, d)]."""
        c, weight = self.config, self.showo.lm_head.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        shape = (2, rows, slots, c.num_heads, c.hidden_size // c.num_heads)
        return [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(c.num_layers)]

    @torch.no_grad()
    def paint(self, context, layout, image, guidance, steps, temperature=1.0, generator=None, exponential=None, gumbel_u=None, trace=None):
        """Parallel decoding (MaskGIT with Show-o's details). context (b, T, D) and the layout of the row with its target, or 2b rows with the unconditional
        ones second; image (b, N) ids, mask_id = to be painted; guidance g: logits = (1 + g) cond - g uncond. Every step draws all unknown codes, keeps the
        most confident ones and masks the others again. The noise (drawn from `generator` if not given): exponential (steps, b, N, codebook), since
        argmax(p / e) with e ~ Exp(1) is a draw from p, and gumbel_u (steps, b, N) uniform. trace: list that gets a dict per step. Returns codes (b, N)."""
        c, (b, N) = self.config, image.shape
        S, rows, model, device = N + 2, len(context), self.showo.model, image.device
        noise_device = device if generator is None else generator.device
        target, condition = Layout(*(t[:, :S] for t in layout)), Layout(*(t[:, S:] for t in layout))
        slots = torch.arange(S + context.shape[1], device=device).expand(rows, -1)
        cache = self.new_cache(rows, slots.shape[1])
        model(context, condition, cache=cache, slots=slots[:, S:])  # no condition slot sees the target, so this is done once and not in every step
        codebook = slice(c.image_offset, c.image_offset + c.codebook_size)
        for k in range(steps):
            x = self.embed(c.eoi, image, c.soi).repeat(rows // b, 1, 1)
            hidden = model(x, target, slice(1, N + 1), cache, slots[:, :S])
            logits = self.logits(hidden, codebook)  # (rows, N, codebook)
            if rows > b:
                cond, uncond = logits.chunk(2)
                logits = (1 + guidance) * cond - guidance * uncond
            p = logits.softmax(dim=-1)
            e = torch.empty(p.shape, device=noise_device).exponential_(generator=generator).to(device) if exponential is None else exponential[k].view_as(p)
            unknown = image == c.mask_id
            codes = torch.where(unknown, (p / e).argmax(dim=-1), image - c.image_offset)
            confidence = torch.where(unknown, p.gather(2, codes[..., None]).squeeze(2), torch.finfo(p.dtype).max)
            done = (k + 1) / steps
            planned = (N * mask_ratio(torch.tensor(done))).floor().item()  # a CPU tensor: float32 as published, and no sync
            count = (unknown.sum(dim=1, keepdim=True) - 1).clamp(max=planned).clamp(min=1).long()  # (b, 1) codes to mask again
            temperature = temperature * (1 - done)  # a running product: falls much faster than linearly, 0 at the end
            w = torch.rand(image.shape, device=noise_device, generator=generator).to(device) if gumbel_u is None else gumbel_u[k]
            gumbel = -(-w.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            score = confidence.clamp(min=1e-20).log() + temperature * gumbel
            masked = score < score.sort(dim=1).values.gather(1, count)
            image = (codes + c.image_offset).masked_fill(masked, c.mask_id)
            if trace is not None:
                trace.append({"codes": codes, "confidence": confidence, "masked": masked, "count": count, "temperature": temperature, "image": image, "hidden": hidden})
        return codes

    def t2i_contexts(self, prompts, N, guided):
        """Prompts, and behind them as many empty ones if guided -> context for paint()."""
        prompts = [t2i_prompt(self._encode(p), self.config) for p in prompts] + [t2i_prompt([], self.config)] * (guided * len(prompts))
        ids = pad_rows(prompts, self.config.pad, max(map(len, prompts)), self.device)
        return self.t2i_context(ids, torch.tensor([len(p) for p in prompts], device=self.device), N)

    def _paint(self, context, image, cfg, steps, temperature, generator, shape=None):
        """cfg as in the other models (1 = none); codes -> pictures in [-1, 1]."""
        codes = self.paint(*context, image, cfg - 1, steps, 1.0 if temperature is None else temperature, generator)
        return self.decode(codes, shape)

    def decode(self, codes, shape=None):
        """codes (B, n), row by row -> images (B, 3, H, W) in [-1, 1]; shape (h, w) of the grid if it is no square."""
        side = math.isqrt(codes.shape[1])
        return self.vq.decode(codes.unflatten(1, shape or (side, side))).clamp(-1, 1)

    @torch.no_grad()
    def generate(self, prompts, cfg=None, steps=None, temperature=None, generator=None, size=None):
        """Texts -> pictures (B, 3, size, size) in [-1, 1]. size in pixels, a multiple of the tokenizer's stride (default: the config's)."""
        c = self.config
        cfg, steps, N = c.cfg if cfg is None else cfg, steps or c.steps, (size // self.vq.stride) ** 2 if size else self.image_tokens
        image = torch.full((len(prompts), N), c.mask_id, device=self.device)
        return self._paint(self.t2i_contexts(prompts, N, cfg != 1), image, cfg, steps, temperature, generator)

    def _repaint(self, images, requests, cfg, steps, temperature, generator):
        """RecA's sequence at inference, for reconstruct and edit."""
        c, N = self.config, self.image_tokens
        cfg, steps = c.cfg if cfg is None else cfg, steps or c.reca_steps
        batch = {k: v.to(images.device) for k, v in self.collate("recon", [{"prompt": r} for r in requests]).items()}
        picture = {k: v for k, v in self.precompute(images, "reca").items() if k in ("features", "small_codes")}
        context = self.reca_context(**batch, N=N, **picture)
        if cfg != 1:  # unconditional: the empty text-to-image row. (The published demo's rows are only partly known; rotation is relative, so
            # that this one stands at other positions makes no difference.)
            context = stack_rows(context, self.t2i_contexts([""] * len(images), N, False))
        image = torch.full((len(images), N), c.mask_id, device=images.device)
        return self._paint(context, image, cfg, steps, temperature, generator)

    @torch.no_grad()
    def reconstruct(self, images, prompt=None, cfg=None, steps=None, temperature=None, generator=None):
        """Pictures (B, 3, H, W) in [-1, 1] -> the same through the model's own understanding of them."""
        return self._repaint(images, [prompt or "Describe the image in detail."] * len(images), cfg, steps, temperature, generator)

    @torch.no_grad()
    def edit(self, images, instructions, cfg=None, steps=None, temperature=None, generator=None):
        """Pictures and what to change -> changed pictures. For models whose base stage had edit pairs; the published ones had none."""
        return self._repaint(images, instructions, cfg, steps, temperature, generator)

    @torch.no_grad()
    def inpaint(self, images, mask, prompts, cfg=None, steps=None, temperature=None, generator=None):
        """mask (B, 1, H, W), 1 = paint anew: resized to the grid of codes (bicubic), from 0.5 on a code is masked."""
        c = self.config
        codes = self.vq.encode(images)  # (B, h, w)
        hole = F.interpolate(mask.float(), codes.shape[1:], mode="bicubic").squeeze(1) >= 0.5
        image = (codes + c.image_offset).masked_fill(hole, c.mask_id).flatten(1)
        cfg = c.cfg if cfg is None else cfg
        return self._paint(self.t2i_contexts(prompts, image.shape[1], cfg != 1), image, cfg, steps or c.steps, temperature, generator, codes.shape[1:])

    @torch.no_grad()
    def extrapolate(self, images, prompts, side="right", cfg=None, steps=None, temperature=None, generator=None):
        """Pictures -> half as large again towards `side` (left, right, up, down): the half that is next to the new part is given, the other half painted."""
        c = self.config
        if side not in ("left", "right", "up", "down"):
            raise ValueError(f"extrapolate: side {side!r}, expected left, right, up or down")
        dim, first = (2 if side in ("left", "right") else 1), side in ("left", "up")
        codes = self.vq.encode(images)  # (B, h, w)
        half = codes.shape[dim] // 2
        known = codes.narrow(dim, 0 if first else codes.shape[dim] - half, half) + c.image_offset
        rest = codes.narrow(dim, 0, codes.shape[dim] - half)
        hole = torch.full_like(rest, c.mask_id)
        image = torch.cat([hole, known] if first else [known, hole], dim)
        cfg = c.cfg if cfg is None else cfg
        context = self.t2i_contexts(prompts, image[0].numel(), cfg != 1)
        new = self.paint(*context, image.flatten(1), cfg - 1, steps or c.steps, 1.0 if temperature is None else temperature, generator).view_as(image)
        new = new.narrow(dim, 0 if first else half, rest.shape[dim])
        grown = torch.cat([new, codes] if first else [codes, new], dim)
        return self.decode(grown.flatten(1), grown.shape[1:])

    @torch.no_grad()
    def write(self, x, layout, lengths, max_new_tokens, temperature=0.0, top_k=None, generator=None):
        """Continues the rows (their first lengths (B,) slots are no pads) -> ids (B, <= max_new_tokens), eos once a row has ended. temperature 0 = greedy.
        The new id of a row overwrites its first pad, so positions go on without a gap."""
        (B, T), model, device = x.shape[:2], self.showo.model, x.device
        cache = self.new_cache(B, T + max_new_tokens)
        hidden = model(x, layout, cache=cache, slots=torch.arange(T, device=device).expand(B, -1))
        hidden = hidden[torch.arange(B, device=device), lengths - 1][:, None]  # (B, 1, D)
        out, ended = [], torch.zeros(B, 1, dtype=torch.bool, device=device)
        for t in range(max_new_tokens):
            logits = self.logits(hidden[:, 0])  # (B, vocabulary)
            if temperature > 0:
                if top_k is not None:
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
                p = (logits / temperature).softmax(dim=-1)
                e = torch.empty(p.shape, device=device if generator is None else generator.device).exponential_(generator=generator).to(device)
                logits = p / e
            new = logits.argmax(dim=-1, keepdim=True).masked_fill(ended, self.config.eos)
            out.append(new)
            ended = ended | (new == self.config.eos)
            if t + 1 == max_new_tokens or bool(ended.all()):
                break
            slot = lengths[:, None] + t
            hidden = model(self.embed(new), Layout(slot, torch.zeros_like(slot), slot + 1), cache=cache, slots=slot)
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, top_k=None):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers."""
        c = self.config
        chats, picture, head = [self.chat_ids(q.strip()) for q in questions], {}, []
        if images is None:
            head = [c.eos]
        elif c.w_clip_vit:
            picture, head = {"features": self.clip_features(images, chat=True)}, mmu_prompt([], c, self.system_ids)
        else:  # a bos, and a newline before the question, at inference only
            picture, head = {"codes": self.vq.encode(images).flatten(1)}, mmu_prompt([c.eos], c)
            chats = [self.chat_ids("\n" + q.strip()) for q in questions]
        prompts = [head + chat for chat in chats]
        ids = pad_rows(prompts, c.pad, max(map(len, prompts)), self.device)
        x, layout = self.mmu_context(ids, **picture) if picture else (self.embed(ids), causal_layout(ids.shape[1], device=self.device))
        lengths = torch.tensor([len(p) for p in prompts], device=self.device) + x.shape[1] - ids.shape[1]
        ids = self.write(x, layout, lengths, max_new_tokens, temperature, top_k, generator).tolist()
        ids = [row[:row.index(c.eos)] if c.eos in row else row for row in ids]
        return [self.tokenizer.decode([i for i in row if i < c.text_vocab]).strip() for row in ids]

    # ---- published weights

    @classmethod
    def load_published(cls, path, config, tokenizer_path, vision_path=None, tokenizer=None, device="cpu", dtype=None):
        """Loads showlab/show-o*, or Show-o-RecA (file or folder: pytorch_model.bin or safetensors), with showlab/magvitv2 (tokenizer_path) and, for show-o-clip-*,
        openai/clip-vit-large-patch14-336 (vision_path). config: a key of CONFIGS. Strict: ValueError lists every key that does not fit."""
        c = CONFIGS[config]
        if not tokenizer_path or (c.w_clip_vit and not vision_path):
            raise ValueError(f"{config} comes in {'three' if c.w_clip_vit else 'two'} files: give the image tokenizer magvitv2 (--tokenizer-ckpt)"
                             + (" and clip-vit-large-patch14-336 (--vision-ckpt)" if c.w_clip_vit else "") + f" beside {path}")
        with torch.device("meta"):
            model = cls(c, tokenizer).to(dtype or torch.float32)
        model.vq.float()  # a code is a sign: rounding flips it
        state = read_weights(path) | {f"vq.{k}": v for k, v in read_weights(tokenizer_path).items()}
        if c.w_clip_vit:
            clip = read_weights(vision_path).items()
            state |= {f"clip.{k}": v for k, v in clip if k.startswith("vision_model.") and not k.endswith("position_ids")}
        load_strict(model, state, f"{config} from {path}")
        return model.to(device)


def stack_rows(a, b):
    """Two batches of contexts with their layouts as one [a; b]; the shorter ones get slots at their end that nobody sees."""
    length = max(a[0].shape[1], b[0].shape[1])

    def pad(x, layout):
        extra = length - x.shape[1]
        return [F.pad(x, (0, 0, 0, extra)), *(F.pad(t.expand(len(x), -1), (0, extra)) for t in layout)]
    x, *layout = (torch.cat(pair) for pair in zip(pad(*a), pad(*b)))
    return x, Layout(*layout)


Model = ShowO
