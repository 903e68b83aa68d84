"""Janus-Pro (arXiv 2501.17811): one causal transformer that reads words and pictures and draws code by code; and its
RecA post-training (arXiv 2509.07295).

A LLaMA decoder, and two ways for a picture into it. To understand, SigLIP gives features, and the aligner one embedding
for each. To draw, VQ-16 gives a grid of codes: next-token prediction, row by row, with an input table and an output
head of their own. There is no mask token and no diffusion; everything is causal, a picture that is understood, too.

    picture --SigLIP--> features --aligner--> |              | --lm_head---> answer
    text ------------------> embed_tokens --> | causal LLaMA |
    codes --gen_embed, gen_aligner----------> |              | --gen_head--> next code ..VQ-16's decoder..> picture

RecA (`Janus.reca_loss`) is cross entropy on the codes of this row, without a caption:
    bos <|User|>: [begin] features [end] "describe this image" <|Assistant|>: [begin] codes of the SAME picture

Conventions. B rows, P ids of a context (what comes before the codes), N codes, A features of a picture, D width, V
codes in the codebook. Images are (B, 3, H, W) in [-1, 1]. Rows are left-padded: `pads` (B,) counts the slots before the
first token, so query i of row b sees the keys [pads[b], i], and its rotary position is i - pads[b]. The only randomness
is that of the sampler, and an argument: u (B, N), uniform in [0, 1).
"""
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import vision_encoder as vision
from checkpoint import atomic, load_strict, read_weights, remark, write_text
from custom_kernels import attention, attention_plan, linear_cross_entropy, rms_norm
from custom_kernels.watch import boxes, watching
from image_tokenizer import TOKENIZERS, LFQConfig, VQConfig, build

IGNORE = -100  # label of a position that is not trained
UNUSED = (".attn_pool.", ".rotary_emb.inv_freq")  # of published names: SigLIP's pooling head, and what is computed here

class Marks(NamedTuple):
    """Ids of special tokens."""
    bos: int
    eos: int
    pad: int
    begin: int  # of an image, understood or drawn,
    end: int
    slot: int  # ... and what stands for each of its features
    user: int
    assistant: int

# ---------------------------------------------------------------------------------------------------------------------
# configurations and recipes

@dataclass
class JanusConfig:
    # LLaMA decoder
    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_layers: int = 24
    num_heads: int = 16
    num_kv_heads: int = 16
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    siglip: vision.CLIPConfig = field(default_factory=lambda: vision.VISION_ENCODERS["siglip-large-patch16-384"])
    gen_vision_model: VQConfig | LFQConfig = field(default_factory=lambda: TOKENIZERS["vq16"])
    code_width: int = 8  # of gen_embed, a table of its own beside VQ-16's codebook
    head_width: int = 2048  # of the hidden layer of gen_head
    image_size: int = 384  # pixels, training and default of the sampler
    # the names of Marks in the text tokenizer
    tokens: tuple = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>",
                     "<end_of_image>", "<image_placeholder>", "<|User|>", "<|Assistant|>")
    system: str = ("You are a helpful language and vision assistant. You are able to understand the visual content "
                   "that the user provides, and assist the user with a variety of tasks using natural language.")
    max_prompt: int = 256  # the longest rows in training, in ids: before a picture,
    max_request: int = 128  # ... RecA's request or an instruction to edit, beside the picture's features,
    max_dialogue: int = 1472  # ... questions and answers, beside the picture's features
    pad_multiple: int = 64  # rows are padded to a multiple of this, so that shapes take few values
    cfg: float = 5.0

CONFIGS = {
    # 48x48 pictures: 9 codes of the tiny LFQ, which stands in for VQ-16, and 9 features
    "tiny": JanusConfig(vocab_size=1024, hidden_size=128, intermediate_size=240, num_layers=4, num_heads=4,
                        num_kv_heads=4, siglip=vision.VISION_ENCODERS["tiny-siglip16"],
                        gen_vision_model=TOKENIZERS["tiny-lfq"], code_width=64, head_width=128, image_size=48,
                        tokens=("<|endoftext|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>",
                                "<|image_pad|>", "<|im_start|>", "<|im_start|>"),
                        system="", max_prompt=64, max_request=32, max_dialogue=96, pad_multiple=4, cfg=2.0),
    "janus-pro-1b": JanusConfig(),
    "janus-pro-7b": JanusConfig(hidden_size=4096, intermediate_size=11008, num_layers=30, num_heads=32,
                                num_kv_heads=32, head_width=4096),
}

# Keys are train.py's flags; a missing key has the flag's default. Nobody has published RecA for Janus, so these recipes
# are ours, by analogy with Show-o: the backbone is shared, so image-to-text stands beside RecA, as often and with
# weight 1. Sizes as in the releases of models that share it. On 8 GPUs of 80 GB, for 7b with --shard, a micro-batch is
# 4 (1b) or 2 (7b) pictures to reconstruct, and as many with questions, on each.
OURS = dict(lr=1e-5, steps=5000, warmup=50, batch=128)
SIZES = {"janus-pro-1b": dict(OURS, accum=4), "janus-pro-7b": dict(OURS, accum=8)}
RECIPES = {
    "tiny": {
        # SigLIP brings nothing here: `words` teaches it to see sooner than questions would.
        "base": dict(lr=2e-3, muon_lr=0.005, muon_decay=0.1, warmup=100, steps=5500, batch=48, pool=40000, questions=4,
                     mix={"t2i": 1.0, "i2t": 0.75, "edit": 0.75, "text": 0.25, "words": 0.5}),
        # Captions stand beside RecA, as in model_mar.py. Image-to-text keeps the shared backbone's understanding.
        "reca": dict(lr=2e-4, steps=600, batch=96, mix={"recon": 0.5, "t2i": 0.5, "i2t": 1.0}),
        "sft": dict(lr=2e-4, steps=600, batch=96, mix={"t2i": 1.0, "i2t": 1.0}),  # captions alone
        "plain": dict(lr=2e-4, steps=300, batch=96, t2i_weight=0.0,  # a user's pictures, without captions
                      mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}),
    },
    **{size: {"reca": dict(flags, t2i_weight=0.0, mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}),
              "sft": dict(flags, mix={"t2i": 1.0, "i2t": 1.0})} for size, flags in SIZES.items()},
}

# ---------------------------------------------------------------------------------------------------------------------
# the language model

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
        D, inner, dim = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_heads
        self.head_dim = dim
        self.input_layernorm = RMSNorm(D, c.rms_norm_eps)
        widths = {"q_proj": c.num_heads * dim, "k_proj": c.num_kv_heads * dim, "v_proj": c.num_kv_heads * dim}
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, width, bias=False) for name, width in widths.items()})
        self.self_attn["o_proj"] = nn.Linear(c.num_heads * dim, D, bias=False)
        self.post_attention_layernorm = RMSNorm(D, c.rms_norm_eps)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(D, inner, bias=False),
                                  "up_proj": nn.Linear(D, inner, bias=False),
                                  "down_proj": nn.Linear(inner, D, bias=False)})

    def forward(self, x, cos, sin, plan, past=None, keep=None):
        """x (B, T, D). past (2, B, kv heads, T before and now, dim): keys and values, of which the last T are filled in
        here. keep: only the last `keep` positions are queries, and rows that come out."""
        attn, mlp, y = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (attn[name](y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, dim)
                   for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            past[0, :, :, -x.shape[1]:], past[1, :, :, -x.shape[1]:] = k, v
            k, v = past
        if keep is not None:
            x, q = x[:, -keep:], q[:, :, -keep:]
        x = x + attn.o_proj(attention(q, k, v, None, None, plan).transpose(1, 2).flatten(2))
        y = self.post_attention_layernorm(x)
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))

class Cache:
    """Keys and values of all layers, in memory for `slots` positions that is taken once; `used` of them are filled."""

    def __init__(self, lm, rows, slots):
        c, weight = lm.config, lm.lm_head.weight
        kind, dtype = weight.device.type, weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        shape = (2, rows, c.num_kv_heads, slots, c.hidden_size // c.num_heads)
        self.layers = [torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(c.num_layers)]
        self.used = 0

class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
                                    "layers": nn.ModuleList([DecoderLayer(c) for _ in range(c.num_layers)]),
                                    "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)  # not tied

    def forward(self, x, pads, keep=None, cache=None):
        """x (B, T, D), which follow what is in the cache -> hidden states after the final norm, of the last `keep`
        positions (None: all)."""
        c, T, start = self.config, x.shape[1], cache.used if cache else 0
        total = start + T
        slots = torch.arange(start, total, device=x.device)[None]  # (1, T)
        positions = (slots - pads[:, None]).clamp(min=0)  # (B, T): pads do not count
        cos, sin = rope_tables(positions, c.hidden_size // c.num_heads, c.rope_theta)
        lo, hi = pads[:, None].expand(-1, T), (slots + 1).expand(len(x), -1)
        plan = attention_plan(lo, hi, total)
        for i, layer in enumerate(self.model.layers):
            past = cache.layers[i][:, :, :, :total] if cache else None
            last = keep if i == c.num_layers - 1 and keep != T else None
            if last is not None:  # nobody attends to the last layer's other outputs
                plan = attention_plan(lo[:, -last:], hi[:, -last:], total)
            x = layer(x, cos, sin, plan, past, last)
        if cache:
            cache.used = total
        return self.model.norm(x)

class MLP(nn.Module):
    """The aligners: what a picture is made of becomes embeddings of the language model."""

    def __init__(self, width, D):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, D), nn.GELU(), nn.Linear(D, D))

    def forward(self, x):
        return self.layers(x)

# ---------------------------------------------------------------------------------------------------------------------
# the model

def left_pad(rows, width, fill=0):
    """Lists of ids -> (B, width) int64 and the number of pads per row (B,). Longer rows lose their end."""
    pads = [max(0, width - len(row)) for row in rows]
    return torch.tensor([[fill] * n + row[:width] for n, row in zip(pads, rows)]), torch.tensor(pads)

@lru_cache(None)
def say_steps(steps, N):
    remark(f"steps {steps}: this model draws one code a step, so it takes {N}")  # once

class Janus(nn.Module):
    image_tokenizer = "gen_vision_model"  # the frozen tokenizer: this submodule, and its config in JanusConfig
    encoders = ("gen_vision_model", "vision_model")  # the submodules that precompute uses
    device = property(lambda self: self.language_model.lm_head.weight.device)
    trace = None  # or a list, to which `paint` adds how a picture comes about

    def __init__(self, config, tokenizer=None):
        super().__init__()
        self.config, self.tokenizer, self.stage, c = config, tokenizer, "reca", config
        if missing := tokenizer and [name for name in c.tokens if name not in tokenizer.special]:
            raise ValueError(f"text tokenizer without {', '.join(missing)}: give Janus's own (--text-tokenizer)")
        self.marks = Marks(*(tokenizer.special[name] if tokenizer else i for i, name in enumerate(c.tokens)))
        D, self.seen = c.hidden_size, (c.siglip.image_size // c.siglip.patch) ** 2  # A
        self.vision_model = nn.ModuleDict({"vision_tower": vision.SigLIP(c.siglip)})
        self.aligner = MLP(c.siglip.width, D)
        self.gen_vision_model = build(c.gen_vision_model)
        self.stride = self.gen_vision_model.stride  # pixels a side of one code
        codes = c.gen_vision_model.codebook_size
        self.gen_embed, self.gen_aligner = nn.Embedding(codes, c.code_width), MLP(c.code_width, D)
        self.gen_head = nn.ModuleDict({"output_mlp_projector": nn.Linear(D, c.head_width),
                                       "vision_head": nn.Linear(c.head_width, codes)})
        self.language_model = Llama(c)
        self.init_weights()
        self.trainable_parameters("reca")

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02) in the decoder, smaller for what writes into the residual stream, or depth would
        scale it up; the others keep PyTorch's own."""
        for name, p in self.language_model.named_parameters():
            if p.ndim == 2:
                out = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_layers) if out else 0.02)

    # ---- losses

    def reca_loss(self, codes, ids, pads, features=None, pixels=None, count=None):
        """Reconstruction alignment: understand a picture, then draw it. Its own features stand where a very dense
        caption would; the target is the same picture as codes, each predicted from the features, the request and the
        codes before it.

        codes (B, N): the target. ids (B, P), pads (B,): the context, with a slot for each feature; where the condition
        is dropped it has pad ids instead. features (B, A, width), or uint8 pixels that SigLIP makes them from: of the
        same picture; in editing of the one before the edit. count: the denominator, if it is not B * N."""
        context = self.embed(ids, self.see(features, pixels))
        x = torch.cat([context, self.embed_codes(codes[:, :-1])], 1)  # (B, P + N - 1, D)
        hidden = self.language_model(x, pads, keep=codes.shape[1])  # each place predicts the code after it
        head = self.gen_head["vision_head"]
        return linear_cross_entropy(self.before_head(hidden).flatten(0, 1), head.weight, codes.flatten(), head.bias,
                                    IGNORE, count)

    def t2i_loss(self, codes, ids, pads, count=None, **_):
        """Text-to-image: the same loss after a caption alone."""
        return self.reca_loss(codes, ids, pads, count=count)

    def i2t_loss(self, ids, pads, labels, features=None, pixels=None, count=None, **_):
        """Image-to-text or text alone: next-token cross entropy on answers. ids (B, T), labels (B, k): what the last k
        places predict."""
        x = self.embed(ids, self.see(features, pixels))
        hidden = self.language_model(x, pads, keep=labels.shape[1]).flatten(0, 1)
        return linear_cross_entropy(hidden, self.language_model.lm_head.weight, labels.flatten(), None, IGNORE, count)

    def see(self, features=None, pixels=None):
        """SigLIP's features (B, A, width), or uint8 pixels (B, 3, H, W) -> embeddings (B, A, D); neither: None."""
        if pixels is not None:
            features = self.vision_model["vision_tower"](pixels.float() / 127.5 - 1)
        return None if features is None else self.aligner(features.to(self.aligner.layers[0].weight.dtype))

    def embed(self, ids, seen=None):
        """ids (B, T), and what is seen (B, A, D), for the A slots of each row -> embeddings (B, T, D)."""
        x = self.language_model.model.embed_tokens(ids)
        if seen is None:
            return x
        slots = ids == self.marks.slot
        index = (slots.cumsum(1) - 1).clamp(min=0)[..., None].expand_as(x)  # of the slot that is here, or was the last
        return torch.where(slots[..., None], seen.to(x.dtype).gather(1, index), x)

    def embed_codes(self, codes):
        """codes (B, k) -> embeddings (B, k, D)."""
        return self.gen_aligner(self.gen_embed(codes)).to(self.gen_embed.weight.dtype)  # that of text, too

    def before_head(self, hidden):
        """Hidden states (..., D) -> what the last layer of gen_head makes logits of, (..., head_width)."""
        return F.gelu(self.gen_head["output_mlp_projector"](hidden))

    def forward(self, batch):
        """{part: tensors of precompute, collate} -> {part: loss}. `source_` encodings are of a picture to be edited."""
        own, losses = {"recon": self.reca_loss, "edit": self.reca_loss, "i2t": self.i2t_loss, "text": self.i2t_loss,
                       "words": self.words_loss}, {}
        for part, tensors in batch.items():
            kept = {name: t for name, t in tensors.items() if not name.startswith("source_")}
            if part == "edit":
                kept |= {name: tensors.get(f"source_{name}") for name in ("features", "pixels")}
            losses[part] = own.get(part, self.t2i_loss)(**kept)
        return losses

    # ---- samplers

    def sampling_steps(self, job):
        """How many steps the sampler of this name takes: one for each code."""
        return (self.config.image_size // self.stride) ** 2

    @torch.no_grad()
    def sample(self, context, pads, u, cfg=1.0, temperature=1.0, forced=None, trace=None):
        """Draws code by code. context (rows, P, D), pads (rows,): B rows, or 2 B, the unconditional ones second;
        u (B, N) in [0, 1) -> codes (B, N). A code is the first one up to which the probabilities sum to more than its
        u; at temperature 0 the likeliest. forced (B, N): codes to go on with instead. trace: a list that gets the
        guided logits (B, V) of every step."""
        (B, N), rows, out = u.shape, len(context), []
        x, cache = context, Cache(self.language_model, rows, context.shape[1] + N - 1)
        for i in range(N):  # all rows in one pass, and after the context one code of each
            hidden = self.language_model(x, pads, keep=1, cache=cache)[:, 0]
            logits = self.gen_head["vision_head"](self.before_head(hidden)).float()  # (rows, V)
            if rows > B:
                logits = torch.lerp(logits[B:], logits[:B], cfg)
            if trace is not None:
                trace.append(logits)
            if temperature == 0:
                code = logits.argmax(-1)
            else:
                total = torch.softmax(logits / temperature, -1).cumsum(-1)
                code = (total <= u[:, i, None] * total[:, -1:]).sum(-1).clamp(max=logits.shape[1] - 1)
            out.append(code)
            x = self.embed_codes(code if forced is None else forced[:, i]).repeat(rows // B, 1)[:, None]
        return torch.stack(out, 1)

    def without_condition(self, ids, pads):
        """ids (B, P) of contexts -> as long ones that say nothing: all but the first and the last id of a row are the
        pad id. These pads are read like words: only what stands before a row's first id is invisible."""
        places = torch.arange(ids.shape[1], device=ids.device)
        inside = (places > pads[:, None]) & (places < ids.shape[1] - 1)
        return ids.masked_fill(inside, self.marks.pad)

    @torch.no_grad()
    def paint(self, part, samples, images, size, cfg, steps, temperature, generator):
        """A picture of `size` (height, width) for each sample of a part (see draw_ids), in whose context is what is
        seen of `images`, if there are any."""
        if any(side % self.stride for side in size):
            raise ValueError(f"size {tuple(size)}: both sides must be multiples of {self.stride} pixels")
        cfg, generators = vision.guidance(cfg, self.config.cfg), vision.row_generators(generator, len(samples))
        grid = [side // self.stride for side in size]
        if steps not in (None, math.prod(grid)):
            say_steps(steps, math.prod(grid))
        rows = [self.draw_ids(part, sample) for sample in samples]
        ids, pads = (t.to(self.device) for t in left_pad(rows, max(map(len, rows))))
        context = self.embed(ids, None if images is None else self.see(self.understand(images.to(self.device))))
        if cfg != 1:
            context = torch.cat([context, self.embed(self.without_condition(ids, pads))])
        u = vision.draw_rows(torch.rand, generators, math.prod(grid), device=self.device)
        with watching(self.trace is not None) as watch:
            codes = self.sample(context, pads.repeat(len(context) // len(pads)), u, cfg, temperature)
        if watch:
            self.tell(watch.seen, ids[0], codes[0], grid)
        return self.gen_vision_model.decode(codes.unflatten(1, grid)).float().clamp(-1, 1)

    def tell(self, seen, ids, codes, grid):
        """Adds to the trace what stands in a context, ids (P,); then for each row of the grid the codes (N,) up to it,
        and where those of this row looked. seen: attention of each layer at each code, (rows, queries, keys)."""
        places = iter(boxes(*[math.isqrt(self.seen)] * 2))
        self.trace.append([next(places) if i == self.marks.slot else "" if i in self.marks
                           else self.tokenizer.decode([i]) for i in ids.tolist()])
        looks = torch.stack([each[0, -1, :len(ids)] for each in seen]).unflatten(0, (len(codes), -1)).mean(1)  # (N, P)
        at = torch.arange(len(codes), device=codes.device) // grid[1]  # the row of each code
        for row in range(grid[0]):
            picture = self.gen_vision_model.decode(codes.masked_fill(at > row, 0).view(1, *grid)).float()
            self.trace.append(dict(picture=picture, looks=looks.masked_fill((at != row)[:, None], math.nan),
                                   masked=(at > row).view(*grid), title=f"row {row + 1}"))

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None):
        """Captions -> images (B, 3, height, width) in [-1, 1]. size: pixels, one number or (height, width), multiples
        of self.stride; Janus-Pro was trained with squares of 384 alone."""
        size = size or self.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        samples = [{"caption": prompt} for prompt in prompts]
        return self.paint("t2i", samples, None, size, cfg, steps, temperature, generator)

    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0,
                    generator=None):
        """images (B, 3, height, width) in [-1, 1] -> the same through the model's own understanding of them."""
        samples = [{"prompt": prompt}] * len(images)
        return self.paint("recon", samples, images, images.shape[2:], cfg, steps, temperature, generator)

    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None):
        """images (B, 3, height, width) in [-1, 1], an instruction for each -> edited images, in RecA's row. The
        published model was not trained for it."""
        samples = [{"instruction": text} for text in instructions]
        return self.paint("edit", samples, images, images.shape[2:], cfg, steps, temperature, generator)

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        """images (B, 3, height, width) in [-1, 1], or None, and a question for each row -> list of answers."""
        rows = [self.opening() + self.ask(question, images is not None) for question in questions]
        ids, pads = (t.to(self.device) for t in left_pad(rows, max(map(len, rows))))
        x = self.embed(ids, None if images is None else self.see(self.understand(images.to(self.device))))
        new, eos = self.write(x, pads, max_new_tokens, temperature, generator).tolist(), self.marks.eos
        return [self.tokenizer.decode(row[:row.index(eos)] if eos in row else row).strip() for row in new]

    @torch.no_grad()
    def write(self, x, pads, max_new_tokens, temperature=0.0, generator=None):
        """Continues the rows x (B, T, D), greedily at temperature 0 -> ids (B, at most max_new_tokens), eos behind."""
        lm, generators, out = self.language_model, vision.row_generators(generator, len(x)), []
        cache, ended = Cache(lm, len(x), x.shape[1] + max_new_tokens - 1), torch.zeros_like(pads, dtype=torch.bool)
        while len(out) < max_new_tokens and not bool(ended.all()):
            logits = lm.lm_head(lm(x, pads, keep=1, cache=cache)[:, 0]).float()
            new = vision.next_token(logits, temperature, generators).masked_fill(ended[:, None], self.marks.eos)
            out.append(new)
            ended = ended | (new[:, 0] == self.marks.eos)
            x = self.embed(new)
        return torch.cat(out, 1)

    # ---- what train.py needs

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad: all but the image tokenizer,
        and but SigLIP, unless it is to learn from nothing (base)."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.stage = stage
        frozen = ("gen_vision_model.",) if stage == "base" else ("gen_vision_model.", "vision_model.")
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        return p.ndim < 2

    def blocks(self):
        """The repeated blocks: what recomputation and sharding wrap."""
        return [*self.language_model.model.layers, *self.vision_model["vision_tower"].blocks]

    def preprocess(self, image, purpose):
        """PIL image -> (3, image_size, image_size) in [-1, 1]: for questions all of it, on gray, as published; else the
        square in its middle, of which RecA sees what it is to draw."""
        fit = vision.letterbox_pixels if purpose in ("i2t", "answer") else vision.magvit_pixels
        return fit(image, self.config.image_size)

    def understand(self, images):
        """images (B, 3, H, W) in [-1, 1] -> SigLIP's features (B, A, width)."""
        tower, size = self.vision_model["vision_tower"], (self.config.siglip.image_size,) * 2
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return tower(images.to(tower.pos_embed.dtype))

    @torch.no_grad()
    def precompute(self, images):
        """images (B, 3, H, W) in [-1, 1] -> all that is frozen in this stage: codes (B, N), and features (B, A, width),
        or in base, where SigLIP trains, uint8 pixels."""
        with torch.autocast(images.device.type, enabled=False):  # rounding would change some of the codes
            out = {"codes": self.gen_vision_model.encode(images.float()).flatten(1)}
            if self.stage == "base":
                return out | {"pixels": ((images + 1) * 127.5).round().clamp(0, 255).byte()}
            return out | {"features": self.understand(images)}

    def encode(self, text):
        """Text of people or files -> ids; a special string in it is spelled out."""
        return self.tokenizer.encode_ordinary(text)

    def opening(self):
        """How a dialogue begins -> ids. What asks for a picture has no system prompt."""
        return [self.marks.bos, *(self.encode(self.config.system + "\n\n") if self.config.system else [])]

    def ask(self, text, image=False, limit=None):
        """A user's turn, with the slots of a picture or without, at most `limit` ids of text, up to where the answer
        begins -> ids. Line breaks are encoded apart: in Janus's tokenizer they are never part of a longer token."""
        m, text = self.marks, text.strip()
        if image:
            words = [*self.encode(": "), m.begin, *[m.slot] * self.seen, m.end, *self.encode("\n" + text)[:limit]]
        else:
            words = self.encode(": " + text if text else ":")[:limit]
        words += self.encode("\n\n") if text or image else []
        return [m.user, *words, m.assistant, *self.encode(":")]

    def draw_ids(self, part, sample, limit=None):
        """One sample -> ids of the context of a picture, up to and with <begin_of_image>; the text in it is cut so that
        all but a picture's slots are at most `limit`. drop: nothing but pad ids between the first and the last."""
        m, image = self.marks, part in ("recon", "edit")
        text = sample[{"recon": "prompt", "edit": "instruction"}.get(part, "caption")]
        if limit is not None:  # less what stands around the text, but for the picture's slots
            limit -= len(self.ask("-", image, 0)) - image * (self.seen + 2) + 2
        ids = [m.bos, *self.ask(text, image, limit), m.begin]
        return [m.bos, *[m.pad] * (len(ids) - 2), m.begin] if sample.get("drop") else ids

    def dialogue_ids(self, part, sample, limit=math.inf):
        """One sample -> ids and labels of its row (IGNORE but for answers and what ends them). A dialogue ends with the
        last turn that fits whole into `limit` ids. The first stays: what cuts it cuts its end, too."""
        ids, first = self.opening(), True
        labels = [IGNORE] * len(ids)
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            ask = self.ask(question, part == "i2t" and first)
            reply = [*self.encode(" " + answer.strip()), self.marks.eos]
            if not first and len(ids + ask + reply) > limit:
                break
            ids, labels, first = ids + ask + reply, labels + [IGNORE] * len(ask) + reply, False
        return ids, labels

    def collate(self, part, samples, generators, shared, pad_to=None):
        """Samples (dicts) -> ids (B, T), pads (B,), for dialogues also labels (B, k) of the last k places; count of the
        targets. T: the longest row rounded up to pad_multiple; of dialogues at most the config's maximum, or pad_to, on
        top of which come a picture's slots. Nothing is random here."""
        if part == "words":
            return {"words": vision.caption_words(self.tokenizer, [sample["caption"] for sample in samples])}
        c, step = self.config, self.config.pad_multiple
        if part not in ("i2t", "text"):
            limit = c.max_request if part in ("recon", "edit") else c.max_prompt
            rows = [self.draw_ids(part, sample, limit) for sample in samples]
            ids, pads = left_pad(rows, -(-max(map(len, rows)) // step) * step)
            return {"ids": ids, "pads": pads, "count": torch.tensor(float(len(rows) * self.sampling_steps(part)))}
        limit = (pad_to or c.max_dialogue) + (part == "i2t") * (self.seen + 2)
        rows, labels = zip(*[self.dialogue_ids(part, sample, limit) for sample in samples])
        width = limit if pad_to else min(-(-max(map(len, rows)) // step) * step, limit)
        ids, pads = left_pad(rows, width)
        # a label at every token of an answer, shifted to the place that predicts it, and none before the first
        labels = left_pad([row[1:width] + [IGNORE] for row in labels], width, IGNORE)[0]
        labels = labels[:, int((labels != IGNORE).any(0).int().argmax()) // step * step:]
        return {"ids": ids, "pads": pads, "labels": labels, "count": (labels != IGNORE).sum().float()}

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="janus-pro-1b", tokenizer_path=None, vision_path=None, tokenizer=None,
                       device="cpu", dtype=None, prepare=None):
        """Janus-Pro's folder or file, which holds SigLIP and VQ-16, too -> model in eval mode, in `dtype` (None:
        float32; VQ-16 always). Says on stderr what was left out. Raises FileNotFoundError, and ValueError with the keys
        that do not fit, or where a second file is given."""
        for flag, other in (("--tokenizer-ckpt", tokenizer_path), ("--vision-ckpt", vision_path)):
            if other:
                raise ValueError(f"{flag} {other}: leave it out, {path} is one file with all that Janus consists of")
        weights = read_weights(path)
        state = {name: t for name, t in weights.items() if not any(part in name for part in UNUSED)}
        if len(state) < len(weights):
            remark(f"{path}: {len(weights) - len(state)} of {len(weights)} tensors are left out: {', '.join(UNUSED)}")
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer).to(dtype or torch.float32)
        model.gen_vision_model.float()  # rounding would change some of the codes
        if prepare:
            prepare(model)
        load_strict(model, state, path, device)
        return model.eval()

    def published_state(self):
        """{name: tensor} as the published file has it, bfloat16 on the CPU (meta stays meta). SigLIP's pooling head is
        not here: the original code starts it at random, and never runs it."""
        return {name: t.to("meta" if t.is_meta else "cpu", torch.bfloat16 if t.is_floating_point() else t.dtype)
                for name, t in self.state_dict().items()}

    def save_published(self, folder):
        """Writes pytorch_model.bin and config.json, for the original code, to a folder that exists -> their paths. The
        text tokenizer's and the processor's files are those of the release. Raises OSError."""
        c, paths = self.config, [f"{folder}/pytorch_model.bin", f"{folder}/config.json"]
        atomic(paths[0], partial(torch.save, self.published_state()))
        codes, D = c.gen_vision_model.codebook_size, c.hidden_size
        parts = {
            "vision": ("CLIPVisionTower", dict(image_size=c.siglip.image_size, model_name="siglip_large_patch16_384",
                                               select_feature="same", select_layer=-1)),
            "aligner": ("MlpProjector", dict(depth=2, input_dim=c.siglip.width, n_embed=D, projector_type="mlp_gelu")),
            "gen_vision": ("VQ-16", dict(image_token_size=codes, n_embed=c.code_width)),
            "gen_aligner": ("MlpProjector", dict(depth=2, input_dim=c.code_width, n_embed=D,
                                                 projector_type="mlp_gelu")),
            "gen_head": ("vision_head", dict(image_token_embed=c.head_width, image_token_size=codes, n_embed=D))}
        about = {f"{name}_config": dict(cls=kind, model_type=name, params=params)
                 for name, (kind, params) in parts.items()}
        about["language_config"] = dict(
            model_type="llama", vocab_size=c.vocab_size, hidden_size=D, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=16384, torch_dtype="bfloat16")
        write_text(paths[1], json.dumps(dict(model_type="multi_modality", torch_dtype="bfloat16", **about), indent=1))
        return paths

    # ---- base training from nothing

    def words_loss(self, words, features=None, pixels=None, **_):
        """What SigLIP brings from its pre-training, see vision.words_loss."""
        embeddings = self.language_model.model.embed_tokens.weight[:words.shape[1]]
        return vision.words_loss(self.see(features, pixels), words, embeddings)

Model = Janus
