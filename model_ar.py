"""Show-o: one transformer that writes text from left to right and paints pictures by filling in masked image codes. RecA: arXiv 2509.07295.

A phi-1.5 decoder reads text ids and the integer codes of an image tokenizer (MAGVIT-v2) from ONE vocabulary. Text is learned by next-token
prediction, pictures by mask prediction as in MaskGIT: some codes are replaced by a mask id, and the place of a mask predicts its own code.
How it differs from a textbook decoder: attention and MLP side by side behind one LayerNorm; a LayerNorm per head on queries and keys before
the rotation; only the first half of each head is rotated; biases everywhere; an untied head with a bias. Pictures are understood through
CLIP features and a two-layer MLP (`show-o-clip-*`, `tiny`), or through their own codes (`show-o-*`).

RecA (`ShowO.reca_loss`): [mmu][soi] CLIP features [eoi] "describe this image" [soi] masked codes of the SAME picture [eoi], with cross
entropy on the masked codes. No captions.

Memory order. Positions are given explicitly, so the order in which a row is stored is free, and this one
    [ target picture: eoi, codes, soi | CLIP features | text, right-padded ]
makes every mask of the model an interval of keys [lo, hi) per query (`custom_kernels.attention`) and puts what a loss reads into fixed
slots. The published rows pad the text on the left or in the middle: those pads are dropped here, and the positions still count them.
"""
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_kernels import attention, attention_plan, linear_cross_entropy
from checkpoint import load_strict, read_weights
from data import CLIP_MEAN, CLIP_STD, clip_pixels, magvit_pixels, square_pixels
from image_tokenizer import TOKENIZERS, LFQConfig, LFQTokenizer
from vision_encoder import VISION_ENCODERS, CLIPConfig, CLIPVision, word_alignment

IGNORE = -100  # label of a position that is not trained
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
    # text: template words, longest rows in ids
    system_prompt: str = SYSTEM_PROMPT
    user: str = "USER:"
    assistant: str = "ASSISTANT:"
    max_prompt: int = 129  # text-to-image: [t2i] bos text eos
    max_dialogue: int = 381  # image-to-text: what follows the picture
    max_request: int = 128  # RecA: [mmu][soi][eoi] bos text eos and pads, behind which the target picture always starts at the same place
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    # RecA
    prefix_grad: bool = False  # CLIP variant: let the loss reach projector and embeddings (published: the row is built under no_grad)
    reca_down_scale: int = 2  # VQ variant: how much smaller the copy is whose codes are the context,
    reca_resize_back: bool = False  # ... and whether it is enlarged again before encoding (a blur)
    # samplers
    cfg: float = 6.0  # logits = uncond + cfg * (cond - uncond): the published guidance g is cfg - 1
    mask_steps: int = 50
    reca_steps: int = 30  # reconstruction and editing

    # Four of the ten special ids are used here. [PAD] is the first of them, then come <|soi|>, <|eoi|>, two of video, <|t2i|>, <|mmu|>.
    pad = property(lambda c: c.text_vocab)
    soi = property(lambda c: c.text_vocab + 1)  # start of image
    eoi = property(lambda c: c.text_vocab + 2)  # end of image
    t2i = property(lambda c: c.text_vocab + 5)  # task: draw
    mmu = property(lambda c: c.text_vocab + 6)  # task: look
    image_offset = property(lambda c: c.text_vocab + c.num_special)  # id of image code 0
    mask_id = property(lambda c: c.image_offset + c.codebook_size)
    vocab_size = property(lambda c: c.mask_id + 1)


CONFIGS = {
    # 48x48 pictures of the shape world: 9 codes of 11 bits, 9 CLIP tokens. No system prompt and template words that are one token each,
    # because at this size a text token costs as much as an image token.
    "tiny": ShowOConfig(
        hidden_size=128, num_layers=4, num_heads=4, intermediate_size=224, text_vocab=1024, eos=1018, codebook_size=2048, image_size=48,
        vq=TOKENIZERS["tiny-lfq"], clip=VISION_ENCODERS["tiny-clip"], clip_mean=(0.5,) * 3, clip_std=(0.5,) * 3, train_clip=True,
        system_prompt="", user="Question:", assistant="Answer:", max_prompt=40, max_dialogue=56, max_request=32, pad_multiple=4, cfg=2.0,
        mask_steps=6, reca_steps=6),
    "show-o-256": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384),
    "show-o-512": ShowOConfig(w_clip_vit=False, system_prompt="", max_request=384, image_size=512, reca_steps=20),
    "show-o-clip-256": ShowOConfig(max_dialogue=228),
    "show-o-clip-512": ShowOConfig(max_dialogue=996, image_size=512),
}


# ---------------------------------------------------------------------------------------------------------------------
# blocks


def rotate(x, rope):
    """x (B, T, heads, d), rope = cos, sin (B or 1, T, 1, r/2): turns the pairs (i, i + r/2) of the first r dimensions only."""
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
        """Embeddings x (B, T, D) -> hidden states of the slots `read` (a slice) after the final norm. With a cache (inference) the keys
        and values are written to its `slots` (B, T), and the layout's lo and hi count cache slots."""
        frequency = self.theta ** (-torch.arange(0, self.rotary_dim, 2, device=x.device).float() / self.rotary_dim)
        angle = (layout.positions[..., None].float() * frequency)[:, :, None]  # (B or 1, T, 1, r/2)
        rope = angle.cos(), angle.sin()
        num_keys = x.shape[1] if cache is None else cache[0].shape[2]
        plan = attention_plan(layout.lo, layout.hi, num_keys)
        for i, layer in enumerate(self.layers):
            more = {} if cache is None else {"cache": cache[i], "slots": slots}
            if i == len(self.layers) - 1 and read != slice(None):  # nobody attends to the last layer's output: compute what is asked for
                more["read"], plan = read, attention_plan(*layout.part(read)[1:], num_keys)
            x = layer(x, rope, plan, **more)
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
    """Lists of ids -> (B, length) int64, right-padded with `fill`. Raises ValueError if one is longer."""
    longest = max(map(len, rows))
    if longest > length:
        raise ValueError(f"a prompt of {longest} ids does not fit into {length}: shorten the text, or raise pad_to or the config's maximum")
    return torch.tensor([[*r, *[fill] * (length - len(r))] for r in rows], device=device)


# ---------------------------------------------------------------------------------------------------------------------
# masks. n (B,) = ids of each row that are no pads, T = ids with pads, N = codes of the target, A = slots of the picture in the context.
# Each line of a layout is one stretch of memory: where its slots stand in the published row, then which slots [lo, hi) they see.


def make_layout(rows, *stretches):
    """Stretches (positions (rows or 1, k), lo, hi), one behind the other -> Layout; lo and hi are ints or (rows or 1, k or 1)."""
    full = lambda v, like: (v if torch.is_tensor(v) else torch.full((1, 1), v, device=like.device)).expand(rows, like.shape[1])
    return Layout(*(torch.cat([full(s[i], s[0]) for s in stretches], dim=1) for i in range(3)))


def t2i_layout(n, T, N, start):
    """Text-to-image; published order PAD.. text [soi] codes [eoi], soi at the place `start`. Text is causal; soi, codes, eoi see all but
    pads. (Pads, which nobody reads, see the pads before them: so the published masks are met to the last entry. Likewise below.)"""
    n, j, i, S = n[:, None], torch.arange(T, device=n.device)[None], torch.arange(N + 2, device=n.device)[None], N + 2
    text = j < n
    return make_layout(len(n),
                       (start + torch.where(i == 0, N + 1, i % (N + 1)), 0, S + n),  # eoi, codes, soi
                       (torch.where(text, start - n + j, j - n), torch.where(text, S, S + n), S + 1 + j))  # text, pads


def reca_clip_layout(n, T, N, A, block):
    """RecA with CLIP; published order [mmu][soi] features [eoi] bos text eos PAD.. [soi] codes [eoi]; ids and pads take `block` places.
    All is causal, and besides: everybody sees the features, codes see each other but not the closing eoi, nobody sees a pad."""
    n, j, i, S = n[:, None], torch.arange(T, device=n.device)[None], torch.arange(N, device=n.device)[None], N + 2
    end, start = S + A + n, A + block
    return make_layout(len(n),
                       (start + N + 1 + i[:, :1], 0, end),  # eoi
                       (start + 1 + i, 1, end),  # codes
                       (start + i[:, :1], N + 1, end),  # soi
                       (2 + torch.arange(A, device=n.device)[None], S, S + A + 2),  # features: see themselves, mmu and soi
                       (torch.where(j < 2, j, j + A), S, torch.minimum(S + A + 1 + j, end)))  # ids, pads


def reca_vq_layout(n, T, N, A, limit):
    """RecA with image codes as context; published order PAD.. [mmu][soi] given codes [eoi] bos text eos [soi] codes [eoi]; given codes,
    ids, pads take A + limit places. mmu and text are causal; soi, given codes, eoi see mmu to eoi; the target sees all but pads."""
    n, j, i, S = n[:, None] - 3, torch.arange(T - 3, device=n.device)[None], torch.arange(N + 2, device=n.device)[None], N + 2
    text, given, pads, C = j < n, torch.arange(A + 3, device=n.device)[None], limit - 3 - n, A + 3
    return make_layout(len(n),
                       (A + limit + torch.where(i == 0, N + 1, i % (N + 1)), 0, S + C + n),  # eoi, codes, soi
                       (pads + given, S, torch.where(given == 0, S + 1, S + C)),  # mmu, soi, given codes, eoi
                       (torch.where(text, pads + C + j, j - n), torch.where(text, S, S + C + n), S + C + 1 + j))  # text, pads


def mmu_clip_layout(T, A, before, device=None):
    """Image-to-text with CLIP; published order: `before` ids (mmu, system, soi), features, eoi, chat, PAD.. Causal; all see features."""
    j = torch.arange(T, device=device)[None]
    return make_layout(1, (before + torch.arange(A, device=device)[None], 0, A + before), (torch.where(j < before, j, j + A), 0, A + 1 + j))


def causal_layout(T, seen_by_all=0, device=None):
    """Text alone; or image-to-text from codes, where all see the first `seen_by_all` places: mmu, soi, codes, eoi."""
    j = torch.arange(T, device=device)[None]
    return make_layout(1, (j, 0, (j + 1).clamp(min=seen_by_all)))


def stack_rows(a, b):
    """Two batches of (embeddings, layout) as one [a; b]; the shorter ones get slots at their end that nobody sees."""
    length = max(a[0].shape[1], b[0].shape[1])

    def pad(x, layout):
        extra = length - x.shape[1]
        return [F.pad(x, (0, 0, 0, extra)), *(F.pad(t.expand(len(x), -1), (0, extra)) for t in layout)]
    x, *layout = (torch.cat(pair) for pair in zip(pad(*a), pad(*b)))
    return x, Layout(*layout)


# ---------------------------------------------------------------------------------------------------------------------
# masking of image codes


def mask_ratio(t):
    """Share of codes that are masked at time t in [0, 1], a cosine; in training t ~ U(0, 1), in sampling t = steps done / steps."""
    return torch.cos(t * math.pi * 0.5).clamp(min=0)


def mask_codes(codes, u, r, c):
    """codes (B, N), u (B,) and r (B, N) uniform in [0, 1) -> input ids and labels (B, N). Masked are the places where argsort(r) is below
    max(1, round(N * mask_ratio(u))): a uniformly random subset."""
    count = (codes.shape[1] * mask_ratio(u)).round().clamp(min=1)  # rounds half to even
    masked, ids = r.argsort(dim=1) < count[:, None], codes + c.image_offset
    return ids.masked_fill(masked, c.mask_id), ids.masked_fill(~masked, IGNORE)


# ---------------------------------------------------------------------------------------------------------------------
# the model


class ShowO(nn.Module):
    """config: ShowOConfig; tokenizer: a text tokenizer (encode_ordinary, decode, eos, vocab_size), needed only where text is a string."""

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        c = config
        if tokenizer is not None and (tokenizer.eos != c.eos or tokenizer.vocab_size > c.text_vocab):
            raise ValueError(f"text tokenizer with {tokenizer.vocab_size} ids, <|endoftext|> {tokenizer.eos}; expected at most "
                             f"{c.text_vocab} ids, <|endoftext|> {c.eos}: give the one that the model was trained with (--text-tokenizer)")
        self.system_ids = self.encode(c.system_prompt) if tokenizer is not None and c.system_prompt else []
        self.showo = nn.Module()
        self.showo.model, self.showo.lm_head = Backbone(c), nn.Linear(c.hidden_size, c.vocab_size)
        if c.w_clip_vit:
            self.mm_projector = nn.Sequential(nn.Linear(c.clip.width, c.hidden_size), nn.GELU(), nn.Linear(c.hidden_size, c.hidden_size))
            self.clip = CLIPVision(c.clip)
        self.vq = LFQTokenizer(c.vq).requires_grad_(False)  # always frozen
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02), zero biases; smaller for what writes into the residual stream, so that depth does not scale it up."""
        for name, p in self.showo.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                out = name.endswith(("dense.weight", "fc2.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_layers) if out else 0.02)

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad: all but the image tokenizer and CLIP. A CLIP
        that did not come pre-trained (config.train_clip) learns in the base stage."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        frozen = ("vq.",) if stage == "base" and self.config.train_clip else ("vq.", "clip.")
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe exempts biases only: LayerNorm weights and embeddings do decay."""
        return "bias" in name

    @staticmethod
    def learning_rate_factor(step, max_steps, warmup=1000):
        """The published schedule, as a factor on the learning rate: linear from 0, then half a cosine to 0 at max_steps."""
        return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (max_steps - warmup))))

    def target_count(self, part, tensors):
        """How many labels a batch of this part has in its loss, 0-dim: what "count" is made of where a batch is spread over processes."""
        if "labels" in tensors:
            return (tensors["labels"][:, 1:] != IGNORE).sum().float()
        labels = mask_codes(tensors["codes"], tensors["u"], tensors["r"], self.config)[1]
        return (labels != IGNORE).sum().float() + (2 * len(labels) if part == "t2i" else 0)

    # ---- data side

    @property
    def device(self):
        return self.showo.lm_head.weight.device

    @property
    def image_tokens(self):
        return (self.config.image_size // self.vq.stride) ** 2

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1], sized as published: for "understand" and "generate" cropped to the central square, for all
        else ("recon", "edit") squashed to a square."""
        c = self.config
        if purpose == "understand" and c.w_clip_vit:
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
            return (clip_pixels(image, c.clip.image_size) * std + mean) * 2 - 1  # clip_features normalises
        return magvit_pixels(image, c.image_size) if purpose in ("understand", "generate") else square_pixels(image, c.image_size)

    def clip_features(self, images, chat=False):
        """images (B, 3, H, W) in [-1, 1] -> (B, A, width). For RecA resized bilinearly, pixels as they are; chat: with CLIP's mean and
        deviation, as its own preprocessing has it."""
        c, size = self.config, (self.config.clip.image_size,) * 2
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic" if chat else "bilinear", align_corners=False, antialias=chat)
        if chat:
            mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (c.clip_mean, c.clip_std))
            images = (images * 0.5 + 0.5 - mean) / std
        return self.clip(images.to(self.mm_projector[0].weight.dtype))

    def shrunken(self, images):
        """The degraded copy whose codes are RecA's context in the VQ variant: an information bottleneck, or the model learns to copy."""
        c, (H, W) = self.config, images.shape[2:]
        small = F.interpolate(images, (H // c.reca_down_scale, W // c.reca_down_scale), mode="bilinear", align_corners=False)
        return F.interpolate(small, (H, W), mode="bilinear", align_corners=False) if c.reca_resize_back else small

    @torch.no_grad()
    def precompute(self, images, stage="base"):
        """images (B, 3, H, W) in [-1, 1] -> all that is frozen in the stage: codes (B, N) int64, and what a picture is understood from:
        pixels (uint8, where CLIP trains), features (and chat_features, where the two flows normalise differently) (B, A, width), or
        small_codes (B, A)."""
        c = self.config
        with torch.autocast(images.device.type, enabled=False):  # a code is made of signs: rounding would flip some
            out = {"codes": self.vq.encode(images.float()).flatten(1)}
            if not c.w_clip_vit:
                out["small_codes"] = self.vq.encode(self.shrunken(images.float())).flatten(1)
            elif stage == "base" and c.train_clip:
                out["pixels"] = ((images + 1) * 127.5).round().clamp(0, 255).byte()
            else:
                out["features"] = self.clip_features(images)
                if set(c.clip_mean + c.clip_std) != {0.5}:
                    out["chat_features"] = self.clip_features(images, chat=True)
        return out

    @torch.no_grad()
    def decode_codes(self, codes):
        """codes (B, h, w) -> images (B, 3, H, W) in [-1, 1]."""
        return self.vq.decode(codes).clamp(-1, 1)

    def encode(self, text):
        if self.tokenizer is None:
            raise ValueError("this model was built without a text tokenizer: pass tokenizer=data.load_tokenizer(...)")
        return self.tokenizer.encode_ordinary(text)

    def dialogue(self, question, answer=None):
        """`USER: question ASSISTANT: answer<eos>` -> ids, labels (IGNORE up to `ASSISTANT:`). Without answer: what is to be continued."""
        ids = self.encode(f"{self.config.user} {question} {self.config.assistant}")
        reply = [] if answer is None else [*self.encode(" " + answer.strip()), self.config.eos]
        return ids + reply, [IGNORE] * len(ids) + reply

    def prompt_ids(self, part, sample, limit=None):
        """One sample -> ids and labels of its row, or ids and None. Several turns come as sample["turns"] = [(question, answer), ...]."""
        c = self.config
        if part == "t2i":
            return t2i_prompt(self.encode(sample["caption"]), c, limit, sample.get("drop", False)), None
        if part in ("recon", "edit"):  # a request is never dropped: the published recipe has none
            request = sample["prompt" if part == "recon" else "instruction"]
            return reca_prompt(self.encode(f"{c.user} \n {request} {c.assistant}"), c), None
        if part not in ("i2t", "text"):
            raise ValueError(f"part {part!r}: expected recon, edit, t2i, i2t or text")
        ids = mmu_prompt([], c, self.system_ids) if part == "i2t" else [c.eos]
        labels = [IGNORE] * len(ids)
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            turn = self.dialogue(question.strip(), answer)
            ids, labels = ids + turn[0], labels + turn[1]
        return ids[:limit], labels[:limit]

    def collate(self, part, samples, pad_to=None):
        """Samples (dicts) -> ids (B, T), right-padded to T = pad_to, or to the longest row, rounded up to pad_multiple and at most the
        config's maximum; with labels (B, T) for i2t and text, lengths (B,) for the others. Captions and dialogues that are too long are
        cut; a request that is too long raises ValueError."""
        c, dialogue = self.config, part in ("i2t", "text")
        limit = c.max_dialogue + 3 + len(self.system_ids) if dialogue else c.max_prompt if part == "t2i" else c.max_request
        rows, labels = zip(*[self.prompt_ids(part, s, min(pad_to or limit, limit)) for s in samples])
        width = pad_to or min(-(-max(map(len, rows)) // c.pad_multiple) * c.pad_multiple, limit)
        out = {"ids": pad_rows(rows, c.pad, width)}
        return out | ({"labels": pad_rows(labels, IGNORE, width)} if dialogue else {"lengths": torch.tensor([len(row) for row in rows])})

    def draw(self, part, generator, rate_generator=None):
        """Randomness of one sample, on the CPU: u () decides how many codes are masked, r (N,) which. A batch shares nothing."""
        if part in ("i2t", "text"):
            return {}
        return {"u": torch.rand((), generator=generator), "r": torch.rand(self.image_tokens, generator=generator)}

    # ---- losses

    def embed(self, *ids):
        """Ids (B, k), or single ints for a whole column -> (B, T, D)."""
        rows = next(i for i in ids if torch.is_tensor(i))
        ids = [i if torch.is_tensor(i) else torch.full((len(rows), 1), i, device=rows.device) for i in ids]
        return self.showo.model.embed_tokens(torch.cat(ids, dim=1))

    def with_target(self, image, context):
        """Puts the target picture, ids (B, N), before the context (B, T, D): the slots are [eoi, N codes, soi, context]."""
        return torch.cat([self.embed(self.config.eoi, image, self.config.soi), context], dim=1)

    def project(self, features=None, pixels=None):
        """CLIP features (B, A, width), or the uint8 pixels they come from -> (B, A, D); in fp32 as published, whatever autocast says."""
        if features is None:
            features = self.clip(pixels.float() / 127.5 - 1)
        with torch.autocast(features.device.type, enabled=False):
            return self.mm_projector(features.to(self.mm_projector[0].weight.dtype))

    def cross_entropy(self, x, layout, read, labels, count=None):
        """Runs the rows and scores their slots `read` against labels (B, k), over the whole vocabulary: words as well as image codes.
        count: the denominator, if it is not the number of labels."""
        hidden, head = self.showo.model(x, layout, read), self.showo.lm_head
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, labels.flatten(), bias=head.bias, ignore_index=IGNORE, count=count)

    def reca_context(self, ids, lengths, N, features=None, pixels=None, small_codes=None):
        """[mmu][soi] picture [eoi] bos text eos -> (B, T', D), layout with a target of N codes."""
        c, T = self.config, ids.shape[1]
        if c.w_clip_vit:
            picture = self.project(features, pixels)
            return torch.cat([picture, self.embed(ids)], dim=1), reca_clip_layout(lengths, T, N, picture.shape[1], c.max_request)
        context = self.embed(ids[:, :2], small_codes + c.image_offset, ids[:, 2:])
        return context, reca_vq_layout(lengths, T, N, small_codes.shape[1], c.max_request)

    def reca_loss(self, codes, ids, lengths, u, r, features=None, pixels=None, small_codes=None, prefix_grad=None, count=None, **_):
        """Reconstruction alignment: understand a picture, then reproduce it. The picture's own understanding features stand where a very
        dense caption would; the target is the same picture as image codes, of which a random part is masked. The row, in published order:
            [mmu][soi] picture [eoi] bos USER: \\n describe this ASSISTANT: eos PAD.. [soi] masked codes [eoi]
        Only masked codes are in the loss, and each predicts itself: no shift. Codes see each other and all before them.

        codes (B, N): the target. ids (B, T), lengths (B,): the request (collate "recon"). u (B,), r (B, N): how many codes are masked,
        and which. What is understood: features (B, A, width), or the pixels that CLIP makes them from, or small_codes (B, A), those of a
        degraded copy. prefix_grad False is the published convention of the CLIP variant: the whole INPUT row (projected features and all
        embeddings, the mask's included) is built without gradients, so this loss trains blocks, final norm and head, while projector and
        embeddings learn from image-to-text alone. The VQ variant lets gradients through to the embeddings."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        if prefix_grad is None:
            prefix_grad = c.prefix_grad or not c.w_clip_vit
        with torch.set_grad_enabled(prefix_grad and torch.is_grad_enabled()):
            context, layout = self.reca_context(ids, lengths, N, features, pixels, small_codes)
            x = self.with_target(image, context)
        return self.cross_entropy(x, layout, slice(1, N + 1), labels, count)

    def edit_loss(self, codes, ids, lengths, u, r, count=None, **source):
        """Editing, which the published model lacks. Our layout: RecA's row with the SOURCE picture as context, the instruction as request
        and the codes of the EDITED picture as target. The row is built with gradients, like everything in base training."""
        source = {k: source.get(f"source_{k}") for k in ("features", "pixels", "small_codes")}
        return self.reca_loss(codes, ids, lengths, u, r, **source, prefix_grad=True, count=count)

    def t2i_context(self, ids, lengths, N):
        return self.embed(ids), t2i_layout(lengths, ids.shape[1], N, self.config.max_prompt)

    def t2i_loss(self, codes, ids, lengths, u, r, count=None, **_):
        """Text-to-image: codes (B, N), captions ids (B, T) and lengths (B,), masking u (B,), r (B, N). As published, soi and eoi are in
        the loss with their own ids: two trivial terms per row in the mean."""
        c, N = self.config, codes.shape[1]
        image, labels = mask_codes(codes, u, r, c)
        labels = torch.cat([torch.full_like(labels[:, :1], c.eoi), labels, torch.full_like(labels[:, :1], c.soi)], dim=1)
        context, layout = self.t2i_context(ids, lengths, N)
        return self.cross_entropy(self.with_target(image, context), layout, slice(0, N + 2), labels, count)

    def mmu_context(self, ids, codes=None, features=None, pixels=None):
        """[mmu] system [soi] picture [eoi] chat -> (B, T', D), layout; ids (B, T) lack the picture: features, pixels or codes (B, A)."""
        c, before = self.config, 2 + len(self.system_ids)  # mmu, system, soi
        if c.w_clip_vit:
            picture = self.project(features, pixels)
            return torch.cat([picture, self.embed(ids)], dim=1), mmu_clip_layout(ids.shape[1], picture.shape[1], before, ids.device)
        x = self.embed(ids[:, :before], codes + c.image_offset, ids[:, before:])
        return x, causal_layout(x.shape[1], before + codes.shape[1] + 1, ids.device)

    def i2t_loss(self, ids, labels, codes=None, features=None, chat_features=None, pixels=None, count=None, **_):
        """Image-to-text: ids and labels (B, T) (collate "i2t"); each slot predicts the id behind it. What is understood: chat_features
        where there are any, else features, pixels or codes."""
        x, layout = self.mmu_context(ids, codes, features if chat_features is None else chat_features, pixels)
        first = x.shape[1] - ids.shape[1]  # the slots before hold the picture and what precedes it: no labels
        return self.cross_entropy(x, layout, slice(first, x.shape[1] - 1), labels[:, 1:], count)

    def text_loss(self, ids, labels, count=None, **_):
        """Text alone, ids and labels (B, T): a question and the answer that is learned, or the published lm rows (labels = ids)."""
        T = ids.shape[1]
        return self.cross_entropy(self.embed(ids), causal_layout(T, 0, ids.device), slice(0, T - 1), labels[:, 1:], count)

    def align_loss(self, words, features=None, pixels=None, kind="contrast", **_):
        """Base training only, for a CLIP that did not come pre-trained: see word_alignment. words (B, V): 1 where the caption has the id."""
        return word_alignment(self.project(features, pixels), words, self.showo.model.embed_tokens.weight[:words.shape[1]], kind)

    def forward(self, batch):
        """{part: tensors} -> {part: loss}, all parts in one forward."""
        losses = {"recon": self.reca_loss, "edit": self.edit_loss, "t2i": self.t2i_loss, "i2t": self.i2t_loss, "text": self.text_loss,
                  "align": self.align_loss, "words": lambda **t: self.align_loss(kind="presence", **t), "oracle": self.t2i_loss, "uncond": self.t2i_loss}
        return {part: losses[part](**tensors) for part, tensors in batch.items()}

    # ---- samplers

    def logits(self, hidden, ids=slice(None)):
        """hidden (..., D) -> float32 logits of a slice of the vocabulary."""
        head = self.showo.lm_head
        return F.linear(hidden, head.weight[ids], head.bias[ids]).float()

    def new_cache(self, rows, slots):
        """Keys and values of each layer: [(2, rows, slots, heads, d)]."""
        c, kind, dtype = self.config, self.device.type, self.showo.lm_head.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        shape = (2, rows, slots, c.num_heads, c.hidden_size // c.num_heads)
        return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(c.num_layers)]

    @torch.no_grad()
    def sample(self, context, layout, image, guidance, steps, temperature=1.0, generator=None, exponential=None, gumbel_u=None, trace=None):
        """Parallel decoding: MaskGIT with Show-o's details. Every step draws all unknown codes, keeps the most confident ones, masks the
        others again.

        context (b, T, D) with the layout of its row, target included, or 2b rows, the unconditional ones second; image (b, N) ids,
        mask_id = to be painted. Guidance g: logits = (1 + g) cond - g uncond. Noise, from the generator if not given: exponential (steps,
        b, N, codebook), since argmax(p / e) with e ~ Exp(1) is a draw from p, and gumbel_u (steps, b, N), uniform. trace: a list that
        gets a dict per step. Returns the codes of the last step, (b, N)."""
        c, (b, N), rows, model = self.config, image.shape, len(context), self.showo.model
        S, codebook, source = N + 2, slice(c.image_offset, c.mask_id), image.device if generator is None else generator.device
        slots = torch.arange(S + context.shape[1], device=image.device).expand(rows, -1)
        cache = self.new_cache(rows, slots.shape[1])
        model(context, layout.part(slice(S, None)), cache=cache, slots=slots[:, S:])  # the context never sees the target: once is enough
        for k in range(steps):
            x = self.embed(c.eoi, image, c.soi).repeat(rows // b, 1, 1)
            hidden = model(x, layout.part(slice(S)), slice(1, N + 1), cache, slots[:, :S])
            logits = self.logits(hidden, codebook)  # (rows, N, codebook): a mask predicts itself
            if rows > b:
                logits = (1 + guidance) * logits[:b] - guidance * logits[b:]
            p = logits.softmax(dim=-1)
            e = torch.empty(p.shape, device=source).exponential_(generator=generator) if exponential is None else exponential[k].view_as(p)
            unknown = image == c.mask_id
            codes = torch.where(unknown, (p / e.to(p)).argmax(dim=-1), image - c.image_offset)
            confidence = torch.where(unknown, p.gather(2, codes[..., None]).squeeze(2), torch.finfo(p.dtype).max)
            done = (k + 1) / steps
            planned = int(N * mask_ratio(torch.tensor(done)))  # on the CPU: no sync; in float32 as published, for the same rounding
            count = (unknown.sum(dim=1, keepdim=True) - 1).clamp(max=planned).clamp(min=1)  # (b, 1) codes to mask again
            temperature = temperature * (1 - done)  # a running product: falls much faster than linearly, to 0
            w = torch.rand(image.shape, device=source, generator=generator).to(p) if gumbel_u is None else gumbel_u[k]
            gumbel = -(-w.clamp(min=1e-20).log()).clamp(min=1e-20).log()
            score = confidence.clamp(min=1e-20).log() + temperature * gumbel
            masked = score < score.sort(dim=1).values.gather(1, count)
            image = (codes + c.image_offset).masked_fill(masked, c.mask_id)
            if trace is not None:
                trace.append({"codes": codes, "confidence": confidence, "masked": masked, "count": count, "temperature": temperature,
                              "image": image, "hidden": hidden})
        return codes

    def text_context(self, prompts, N):
        """Texts -> context of text-to-image."""
        prompts = [t2i_prompt(self.encode(p), self.config) for p in prompts]
        ids = pad_rows(prompts, self.config.pad, max(map(len, prompts)), self.device)
        return self.t2i_context(ids, torch.tensor([len(p) for p in prompts], device=self.device), N)

    def paint(self, context, image, cfg, steps, temperature, generator):
        """image (b, h, w) ids -> codes (b, h, w). cfg as in the other models: 1 = none. Unconditional is the empty text-to-image row,
        also where a picture is the condition (the published demo's row for that is only partly known); that it then stands at other
        positions is no matter, since rotation is relative."""
        b, h, w = image.shape
        if cfg != 1:
            context = stack_rows(context, self.text_context([""] * b, h * w))
        return self.sample(*context, image.flatten(1), cfg - 1, steps, 1.0 if temperature is None else temperature, generator).view(b, h, w)

    def paint_text(self, prompts, image, cfg=None, steps=None, temperature=None, generator=None):
        c = self.config
        cfg, steps = c.cfg if cfg is None else cfg, steps or c.mask_steps
        return self.paint(self.text_context(prompts, image[0].numel()), image, cfg, steps, temperature, generator)

    @torch.no_grad()
    def generate(self, prompts, cfg=None, steps=None, temperature=None, generator=None, size=None):
        """Texts -> pictures (B, 3, size, size) in [-1, 1]. size: pixels, a multiple of the image tokenizer's stride."""
        size = size or self.config.image_size
        if size % self.vq.stride:
            raise ValueError(f"size {size}: must be a multiple of {self.vq.stride} pixels")
        image = torch.full((len(prompts), size // self.vq.stride, size // self.vq.stride), self.config.mask_id, device=self.device)
        return self.decode_codes(self.paint_text(prompts, image, cfg, steps, temperature, generator))

    @torch.no_grad()
    def edit(self, images, instructions, cfg=None, steps=None, temperature=None, generator=None):
        """Pictures and what to change -> changed pictures. For models whose base training had edit pairs; the published one's had none."""
        c, images = self.config, images.to(self.device)
        request = {k: v.to(self.device) for k, v in self.collate("edit", [{"instruction": i} for i in instructions]).items()}
        seen, side = self.precompute(images, "reca"), c.image_size // self.vq.stride
        context = self.reca_context(**request, N=side ** 2, **{k: v for k, v in seen.items() if k in ("features", "small_codes")})
        image = torch.full((len(images), side, side), c.mask_id, device=self.device)
        return self.decode_codes(self.paint(context, image, c.cfg if cfg is None else cfg, steps or c.reca_steps, temperature, generator))

    @torch.no_grad()
    def reconstruct(self, images, prompt=None, cfg=None, steps=None, temperature=None, generator=None):
        """Pictures (B, 3, H, W) in [-1, 1] -> the same through the model's own understanding of them."""
        return self.edit(images, [prompt or "Describe the image in detail."] * len(images), cfg, steps, temperature, generator)

    @torch.no_grad()
    def inpaint(self, images, mask, prompts, **how):
        """mask (B, 1, H, W), 1 = paint anew: resized to the grid of codes (bicubic); from 0.5 on a code is masked. how: cfg, steps,
        temperature, generator."""
        codes = self.vq.encode(images.to(self.device).float())  # (B, h, w)
        hole = F.interpolate(mask.to(self.device).float(), codes.shape[1:], mode="bicubic").squeeze(1) >= 0.5
        return self.decode_codes(self.paint_text(prompts, (codes + self.config.image_offset).masked_fill(hole, self.config.mask_id), **how))

    @torch.no_grad()
    def extrapolate(self, images, prompts, side="right", **how):
        """Pictures -> half as large again towards `side` (left, right, up, down): the near half of the grid is given, as much beyond it
        is painted."""
        if side not in ("left", "right", "up", "down"):
            raise ValueError(f"extrapolate: side {side!r}, expected left, right, up or down")
        dim, flip = 2 if side in ("left", "right") else 1, side in ("left", "up")
        order = lambda *parts: torch.cat(parts[::-1] if flip else parts, dim)
        codes = self.vq.encode(images.to(self.device).float())  # (B, h, w)
        far = codes.shape[dim] // 2  # so much of the grid is left out, and as much is new
        near = codes.narrow(dim, 0 if flip else far, codes.shape[dim] - far)
        image = order(near + self.config.image_offset, torch.full_like(codes, self.config.mask_id).narrow(dim, 0, far))
        new = self.paint_text(prompts, image, **how).narrow(dim, 0 if flip else near.shape[dim], far)
        return self.decode_codes(order(codes, new))

    @torch.no_grad()
    def write(self, x, layout, lengths, max_new_tokens, temperature=0.0, top_k=None, generator=None, trace=None):
        """Continues rows whose first lengths (B,) slots are no pads -> ids (B, at most max_new_tokens), eos from where a row has ended.
        Temperature 0 is greedy. A row's new ids overwrite its pads, so that every mask stays an interval. trace: a list that gets the
        logits of each step."""
        (B, T), model = x.shape[:2], self.showo.model
        cache = self.new_cache(B, T + max_new_tokens)
        hidden = model(x, layout, cache=cache, slots=torch.arange(T, device=x.device).expand(B, -1))
        hidden = hidden[torch.arange(B, device=x.device), lengths - 1]  # (B, D)
        out, ended = [], torch.zeros(B, 1, dtype=torch.bool, device=x.device)
        for t in range(max_new_tokens):
            logits = self.logits(hidden)  # (B, vocabulary)
            if trace is not None:
                trace.append(logits)
            if temperature > 0:
                if top_k is not None:
                    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
                e = torch.empty(logits.shape, device=x.device if generator is None else generator.device).exponential_(generator=generator)
                logits = (logits / temperature).softmax(dim=-1) / e.to(logits)
            new = logits.argmax(dim=-1, keepdim=True).masked_fill(ended, self.config.eos)
            out.append(new)
            ended = ended | (new == self.config.eos)
            if t + 1 == max_new_tokens or bool(ended.all()):
                break
            slot = lengths[:, None] + t
            hidden = model(self.embed(new), Layout(slot, torch.zeros_like(slot), slot + 1), cache=cache, slots=slot)[:, 0]
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, top_k=None):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers."""
        c, picture, line = self.config, {}, ""
        head = [c.eos] if images is None else mmu_prompt([], c, self.system_ids)
        if images is not None and c.w_clip_vit:
            picture = {"features": self.clip_features(images.to(self.device), chat=True)}
        elif images is not None:
            picture = {"codes": self.vq.encode(images.to(self.device).float()).flatten(1)}
            head, line = [*head, c.eos], "\n"  # at inference only
        rows = [head + self.dialogue(line + q.strip())[0] for q in questions]
        ids = pad_rows(rows, c.pad, max(map(len, rows)), self.device)
        x, layout = self.mmu_context(ids, **picture) if picture else (self.embed(ids), causal_layout(ids.shape[1], 0, self.device))
        lengths = torch.tensor([len(row) for row in rows], device=self.device) + x.shape[1] - ids.shape[1]
        new = self.write(x, layout, lengths, max_new_tokens, temperature, top_k, generator).tolist()
        new = [row[:row.index(c.eos)] if c.eos in row else row for row in new]
        return [self.tokenizer.decode([i for i in row if i < c.text_vocab]).strip() for row in new]

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="show-o-clip-512", tokenizer_path=None, vision_path=None, tokenizer=None, device="cpu",
                       dtype=None):
        """Show-o or Show-o-RecA (file or folder: pytorch_model.bin or safetensors) with magvitv2 (tokenizer_path) and, for show-o-clip-*,
        clip-vit-large-patch14-336 (vision_path) -> model in eval mode. config: a name in CONFIGS, or a ShowOConfig. The model is built
        without memory and filled in `dtype` (None: float32); the image tokenizer is float32 always. Raises FileNotFoundError, and
        ValueError with a table of the keys that do not fit."""
        c = CONFIGS[config] if isinstance(config, str) else config
        for what, flag, needed, given in (("magvitv2", "--tokenizer-ckpt", True, tokenizer_path),
                                          ("clip-vit-large-patch14-336", "--vision-ckpt", c.w_clip_vit, vision_path)):
            if needed and not given:
                raise ValueError(f"{path}: {config} needs the file or folder of {what} as well: give it with {flag}")
        state = read_weights(path) | {f"vq.{k}": v for k, v in read_weights(tokenizer_path).items()}
        if c.w_clip_vit:  # the CLIP file also holds the text tower
            tower = {k: v for k, v in read_weights(vision_path).items() if k.startswith("vision_model.") and not k.endswith("position_ids")}
            state |= {f"clip.{k}": v for k, v in tower.items()}
        with torch.device("meta"):
            model = cls(c, tokenizer).to(dtype or torch.float32)
        model.vq.float()  # a code is made of signs: rounding would flip some
        load_strict(model, state, " + ".join(filter(None, (str(path), str(tokenizer_path), vision_path and str(vision_path)))))
        return model.to(device).eval()

    def flops_per_sample(self, part, text_tokens=32):
        """Estimate for MFU: 6 operations per weight and token plus attention, forward and backward, one sample."""
        c, N = self.config, self.image_tokens
        A = 0 if part in ("t2i", "text") else self.clip.num_tokens if c.w_clip_vit else N
        if part in ("recon", "edit") and not c.w_clip_vit and not c.reca_resize_back:
            A = N // c.reca_down_scale ** 2
        read = text_tokens / 2 if part in ("i2t", "text") else N
        tokens = text_tokens + A + (0 if part in ("i2t", "text") else N + 2)
        block = 4 * c.hidden_size ** 2 + 2 * c.hidden_size * c.intermediate_size
        return 6 * (tokens * c.num_layers * block + read * c.hidden_size * c.vocab_size) + 12 * tokens ** 2 * c.hidden_size * c.num_layers


Model = ShowO
