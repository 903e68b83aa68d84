"""BAGEL: a transformer with two complete sets of weights that reads, sees and, by rectified flow, paints; and its RecA post-training
(arXiv 2509.07295).

Mixture of transformers: each layer holds an understanding expert (names as in Qwen2.5) and a generation expert (`_moe_gen`). There is no
router, a token's TYPE decides: text, SigLIP features and all special tokens, also the two that frame a painted image, go to understanding,
latents to generation. Both attend in one sequence: text is causal, the tokens of an image see each other and all before, and share one
rotary position.

    image --SigLIP--> features --connector--> | understanding expert | --lm_head--> answer
    text, special tokens ----> embedding ---> |          |           |
                                              |  shared attention    |
                                              |          |           |
    latents, 2x2 to a token, + time + place > |  generation expert   | --llm2vae--> velocity noise - image at x_t = (1 - t) image + t noise

RecA (`Bagel.reca_loss`): the SigLIP features of an image, taken at the smallest size, are the prompt from which the SAME image is painted.
Only the generation expert learns; the understanding stream is detached, so that its half of the model has neither gradients nor optimizer
state. Editing is the same loss with the source picture, as clean latents and as features, and an instruction in the context.

Conventions. B rows, U understanding and G generation tokens per row, two tensors through all layers: each expert works on one slice and no
layer scatters. Only keys and values are joined, and those that a query sees are an interval, because `layout` puts them in memory in the
right order, padding first. W width of the model, P numbers per latent token. Images are (B, 3, H, W) in [-1, 1]. Everything random is an
argument: `noise` (B, G, P), and `u` (B, images), normal, which gives each image its flow time; -inf (t = 0) where it is clean context.
"""
import math
import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import stream
from custom_kernels import attention, attention_plan, flow_loss_rows, linear_cross_entropy, rms_norm
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig
from vision_encoder import (
    VISION_ENCODERS,
    SigLIPConfig,
    SigLIPNaViT,
    bagel_resize,
    bagel_size,
    grid_ids,
    magvit_pixels,
    patchify,
    to_pixels,
    word_alignment,
)

IGNORE = -100  # label of a position that is not trained
UND, GEN = EXPERTS = ("", "_moe_gen")  # endings of the two experts' published names

# ----------------------------------------------------------------------------------------------------------------------
# configurations

@dataclass
class BagelConfig:
    # Qwen2.5 decoder, twice
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    special: tuple = (151644, 151645, 151652, 151653)  # <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>; a text tokenizer's own win
    # images
    vit: SigLIPConfig = field(default_factory=lambda: VISION_ENCODERS["siglip-so400m-14-980"])
    vae: AutoencoderConfig = field(default_factory=lambda: TOKENIZERS["flux"])
    latent_patch_size: int = 2
    max_latent_size: int = 64  # rows and columns of the table of latent places
    image_size: int = 1024  # pixels, training and default of the sampler
    vae_resize: tuple = (1024, 512)  # largest long and smallest short side of a picture that is edited or reconstructed,
    vit_resize: tuple = (980, 224)  # ... of what SigLIP sees of it to answer or to edit,
    reca_resize: tuple = (224, 224)  # ... and as RecA's prompt: the smallest size it knows, so that there are no pixels to copy
    # training
    timestep_shift: float = 1.0
    max_prompt: int = 128  # text tokens, markers included, of a caption,
    max_request: int = 64  # ... of RecA's request or an instruction to edit,
    max_dialogue: int = 1024  # ... of a question and its answer
    # sampler
    steps: int = 50  # points in time, one more than evaluations
    shift: float = 3.0
    cfg: float = 4.0
    cfg_image: float = 2.0  # editing only
    interval: tuple = (0.4, 1.0)  # (low, high] of the times that are guided, after the shift

CONFIGS = {
    "tiny": BagelConfig(vocab_size=1024, hidden_size=128, intermediate_size=224, num_layers=4, num_heads=4, num_kv_heads=4, rope_theta=1e4,
                        special=(1019, 1020, 1021, 1022), vit=VISION_ENCODERS["tiny-siglip"], vae=TOKENIZERS["tiny-kl"],
                        latent_patch_size=1, max_latent_size=6, image_size=48, vae_resize=(48, 48), vit_resize=(48, 48),
                        reca_resize=(48, 48), max_prompt=32, max_request=16, max_dialogue=64, steps=25,
                        interval=(0.0, 1.0)),
    "bagel-7b-mot": BagelConfig(),
}

# ----------------------------------------------------------------------------------------------------------------------
# the mixture of transformers

def rope_tables(positions, dim, theta):
    """positions (B, T) -> cos, sin (B, T, 1, dim/2) float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[..., None, None].float() * frequencies
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, H, dim), the two halves of dim being the pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat([torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)], -1)

def pick(x, index):
    """x (B, N, c), index (B, K) -> the rows x[b, index[b]], (B, K, c). As an embedding, whose backward is quicker than that of gather."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(index + first, x.flatten(0, 1))

class Permute(torch.autograd.Function):
    """Rows of x (N, c) in another order, with a gather in the backward pass too, where autograd would scatter."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None

class RMSNorm(nn.Module):
    """With float32 statistics, whatever the dtype of x and of the weight."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x.float(), self.weight.float(), self.eps).to(x.dtype)

@dataclass
class View:
    """What all layers share; the lists have one entry per stream, understanding first."""
    rope: list  # (cos, sin)
    masks: list  # AttentionPlan, or a dense bool mask (B, T, keys)
    order: torch.Tensor = None  # (B*(U+G),) place in [understanding | generation] of each key in memory; None where they are the same
    inverse: torch.Tensor = None
    detach: bool = False

    def grad(self, expert):
        return torch.set_grad_enabled(torch.is_grad_enabled() and not (self.detach and expert == UND))

class MoTLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        dim, W = c.hidden_size // c.num_heads, c.hidden_size
        self.head_dim, self.self_attn = dim, nn.ModuleDict()
        for e in EXPERTS:
            self.self_attn.update({
                "q_proj" + e: nn.Linear(W, c.num_heads * dim), "k_proj" + e: nn.Linear(W, c.num_kv_heads * dim),
                "v_proj" + e: nn.Linear(W, c.num_kv_heads * dim), "o_proj" + e: nn.Linear(c.num_heads * dim, W, bias=False),
                "q_norm" + e: RMSNorm(dim, c.rms_norm_eps), "k_norm" + e: RMSNorm(dim, c.rms_norm_eps)})
            self.add_module("mlp" + e, nn.ModuleDict({
                "gate_proj": nn.Linear(W, c.intermediate_size, bias=False), "up_proj": nn.Linear(W, c.intermediate_size, bias=False),
                "down_proj": nn.Linear(c.intermediate_size, W, bias=False)}))
            self.add_module("input_layernorm" + e, RMSNorm(W, c.rms_norm_eps))
            self.add_module("post_attention_layernorm" + e, RMSNorm(W, c.rms_norm_eps))

    def forward(self, streams, view, past=None, wanted=EXPERTS):
        """streams: understanding (B, U, W) and, unless there is none, generation (B, G, W). past: keys and values of earlier tokens, each
        (B, kv_heads, n, dim). -> the streams (None for one that is not `wanted`), and keys and values of past and present in memory order.
        With view.detach the understanding stream is computed without a graph: nothing is learned by it or through it."""
        attn, q, k, v = self.self_attn, [], [], []
        for e, x, rope in zip(EXPERTS, streams, view.rope):
            with view.grad(e):
                y = getattr(self, "input_layernorm" + e)(x)
                heads = lambda name: attn[name + e](y).unflatten(-1, (-1, self.head_dim))  # (B, T, H, dim)
                v.append(heads("v_proj"))
                for name, to in (("q", q), ("k", k)):  # normalised, then rotated, in float32
                    to.append(rotate(attn[name + "_norm" + e](heads(name + "_proj").float()), *rope).to(v[0].dtype))
        k, v = (torch.cat(t, 1) if len(t) > 1 else t[0] for t in (k, v))
        if view.order is not None:
            k, v = (Permute.apply(t.flatten(0, 1).flatten(1), view.order, view.inverse).view_as(t) for t in (k, v))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = []
        for e, x, query, mask in zip(EXPERTS, streams, q, view.masks):
            if e not in wanted:
                out.append(None)
                continue
            with view.grad(e):
                if isinstance(mask, torch.Tensor):
                    y = F.scaled_dot_product_attention(query.transpose(1, 2), k, v, attn_mask=mask[:, None], enable_gqa=True)
                else:
                    y = attention(query.transpose(1, 2), k, v, None, None, mask)
                x = x + attn["o_proj" + e](y.transpose(1, 2).flatten(2))
                y, mlp = getattr(self, "post_attention_layernorm" + e)(x), getattr(self, "mlp" + e)
                out.append(x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y)))
        return out, (k, v)

class MoT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size), "layers": nn.ModuleList(MoTLayer(c) for _ in range(c.num_layers)),
            **{"norm" + e: RMSNorm(c.hidden_size, c.rms_norm_eps) for e in EXPERTS}})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)  # not tied

    def forward(self, streams, view, past=None, wanted=EXPERTS, keep=False):
        """-> the wanted streams after the final norm, None for the other; with keep, also keys and values of all so far per layer."""
        layers, cache = self.model["layers"], []
        for i, layer in enumerate(layers):  # nobody attends to the last layer's output, so there only what is wanted is computed
            streams, kv = layer(streams, view, None if past is None else past[i], wanted if i == len(layers) - 1 else EXPERTS)
            if keep:
                cache.append(kv)
        out = []
        for e, x in zip(EXPERTS, streams):
            with view.grad(e):
                out.append(x if x is None else self.model["norm" + e](x))
        return out, cache

# ----------------------------------------------------------------------------------------------------------------------
# time and place

class TimeEmbedder(nn.Module):
    """Flow time t in [0, 1], not in 0..1000: t (...) -> (..., W)."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t):
        angle = t.float()[..., None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        return torch.cat([angle.cos(), angle.sin()], -1)  # cosines first

    def forward(self, t):
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))

class PositionTable(nn.Module):
    """Fixed sine-cosine table (side*side, width) of a grid, row by row; the first half of the channels encodes the column, the second the
    row. The published files hold it rounded to bfloat16: it is computed in float64 and kept in float32 instead."""

    def __init__(self, side, width):
        super().__init__()
        self.side, self.width = side, width
        self.register_buffer("pos_embed", torch.empty(side * side, width))
        if not self.pos_embed.is_meta:
            self.compute()

    def compute(self, device="cpu"):
        n = self.width // 4
        angle = np.arange(self.side)[:, None] * 10000.0 ** (-np.arange(n) / n)
        one = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (side, width/2)
        table = np.concatenate([np.tile(one, (self.side, 1)), np.repeat(one, self.side, 0)], 1)
        self.pos_embed = torch.from_numpy(table).to(device, torch.float32)

    def forward(self, ids):
        return F.embedding(ids, self.pos_embed)

class Connector(nn.Module):
    def __init__(self, c_in, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c_in, width), nn.Linear(width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))

# ----------------------------------------------------------------------------------------------------------------------
# prompts and layouts

# The published words, a text of their own in front of everything.
_THINK = ("You should first think about the {0} process in the mind and then {1}. \n"
          "The {0} process is enclosed within <think> </think> tags, i.e. <think> {0} process here </think> {2} here")
THINK_PAINT = _THINK.format("planning", "generate the image", "image")
THINK_ANSWER = _THINK.format("reasoning", "provide the user with the answer", "answer")

def _tokens(n, *columns):
    out = np.empty((n, len(columns)), np.int64)
    for i, column in enumerate(columns):
        out[:, i] = column
    return out

def layout(c, samples, packed=False, pad_to=0):
    """Where the tokens of samples lie, and what they see. A sample is a list of segments, in the order of the rotary positions:
        ("text", ids) or ("answer", ids): <|im_start|> ids <|im_end|>, causal; of an answer, ids and <|im_end|> are to be predicted;
        ("vit", (h, w)): h*w SigLIP tokens;  ("clean", (h, w)): a picture's h*w latents, as context;  ("noise", (h, w)): latents to be
        painted; each between two special tokens, bidirectional. Nothing outside sees a noisy image, and it takes up no rotary position.
    An image with a third entry False is left out (conditioning dropout): its rotary position, and its place among the features or latents
    that are given, stay. One row per sample, padded on the left to `pad_to` understanding tokens (0: the longest), or, packed, all samples
    side by side in one row.

    -> int64 tensors: ids (B, U), where vocab_size + j is the row's j-th SigLIP token;  labels (B, U), IGNORE where nothing is predicted;
    und_pos, und_lo, und_hi (B, U), gen_pos, gen_lo, gen_hi (B, G): rotary position and interval of the keys seen, empty for padding;
    gen_grid, gen_image, gen_noisy (B, G): place in the table of latents, number of the image in the row, 1 if to be painted;  vit_grid
    (B, V);  start, rope (B,): first key that is no padding, next rotary position. Only where needed: order, inverse (B, U+G) between
    [understanding | generation] and memory; und_mask, gen_mask (B, U or G, U+G) bool, where something follows a noisy image (multi-turn
    editing), which makes what it sees no interval. Raises ValueError for a row longer than pad_to or a grid larger than its table."""
    bos, eos, *markers = c.special
    rows, labelled, multi_turn = [], False, False
    for row in [samples] if packed else [[s] for s in samples]:
        parts, vit_grid, painted = [], [np.zeros(0, np.int64)], []  # parts: stream, slot, value, position, lo, hi, label or noisy, image
        at = images = features = 0  # `at`: the next free slot
        for sample in row:
            start, rope = at, 0
            for kind, content, *given in sample:
                if kind in ("text", "answer"):
                    ids, n = [bos, *content, eos], len(content) + 2
                    labels = [*ids[1:], IGNORE] if kind == "answer" else IGNORE
                    i = np.arange(n)
                    parts.append(_tokens(n, 0, at + i, ids, rope + i, start, at + i + 1, labels, 0))
                    at, rope, labelled = at + n, rope + n, labelled or kind == "answer"
                    continue
                n, given, is_vit = content[0] * content[1], all(given), kind == "vit"
                value = grid = grid_ids(*content, c.vit.positions if is_vit else c.max_latent_size).numpy()
                end = at + (n + 2) * given
                if is_vit:
                    value, features = np.arange(features, features + n) + c.vocab_size, features + n
                    vit_grid.append(grid)
                if given:  # both markers come first: inside a bidirectional block the order in memory is free
                    extra = IGNORE if is_vit else kind == "noise"
                    parts.append(_tokens(2, 0, [at, at + 1], markers, rope, start, end, IGNORE, 0))
                    parts.append(_tokens(n, int(not is_vit), np.arange(at + 2, end), value, rope, start, end, extra, images))
                    painted += [(at, end)] if kind == "noise" else []
                elif not is_vit:  # its latents are among the given ones, so it keeps a place there, but none in memory
                    parts.append(_tokens(n, 1, -1, 0, 0, 0, 0, 0, images))
                at, rope, images = end, rope + (kind != "noise"), images + (not is_vit)
            multi_turn = multi_turn or any(first >= start and end < at for first, end in painted)
        rows.append((np.concatenate([np.zeros((0, 8), np.int64), *parts]), np.concatenate(vit_grid), painted, at, rope))

    streams = [[r[0][r[0][:, 0] == s, 1:] for r in rows] for s in (0, 1)]
    U, G = (max(map(len, stream)) for stream in streams)
    if pad_to and U > pad_to:
        raise ValueError(f"a row of {U} text and SigLIP tokens does not fit pad_to = {pad_to}: shorten its text or raise pad_to")
    U = max(U, pad_to)
    B, T, V = len(rows), U + G, max(len(r[1]) for r in rows)
    tokens, place = np.zeros((B, T, 7), np.int64), np.full((B, T), -1)  # slot, value, position, lo, hi, label or noisy, image
    tokens[:, :U, 5] = IGNORE
    for b, (und, gen) in enumerate(zip(*streams)):
        pads = T - rows[b][3]
        for stop, t in ((U, und), (T, gen)):
            place[b, stop - len(t):stop] = np.where(t[:, 0] < 0, -1, t[:, 0] + pads)
            tokens[b, stop - len(t):stop] = t + [0, 0, 0, pads, pads, 0, 0]
        place[b, place[b] < 0] = np.arange(pads)
    und, gen = np.moveaxis(tokens[:, :U], 2, 0), np.moveaxis(tokens[:, U:], 2, 0)
    out = dict(ids=und[1], und_pos=und[2], und_lo=und[3], und_hi=und[4], start=np.array([T - r[3] for r in rows]),
               rope=np.array([r[4] for r in rows]))
    if labelled:
        out["labels"] = und[5]
    if G:
        out.update(gen_grid=gen[1], gen_pos=gen[2], gen_lo=gen[3], gen_hi=gen[4], gen_noisy=gen[5], gen_image=gen[6])
    if V:
        out["vit_grid"] = np.stack([np.pad(r[1], (0, V - len(r[1]))) for r in rows])
    if (place != np.arange(T)).any():
        out.update(order=place.argsort(1), inverse=place)
    if multi_turn:
        mask = (np.arange(T) >= tokens[..., 3:4]) & (np.arange(T) < tokens[..., 4:5])  # (B, U+G, T)
        for b, (_, _, painted, used, _) in enumerate(rows):
            for first, end in painted:
                first, end = first + T - used, end + T - used
                mask[b, (place[b] < first) | (place[b] >= end), first:end] = False
        out.update(und_mask=mask[:, :U], gen_mask=mask[:, U:])
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}

@dataclass
class Cache:
    """Contexts that have been read, one per row, padded on the left."""
    kv: list  # per layer keys (normalised and rotated) and values, each (B, kv_heads, n, dim)
    start: torch.Tensor  # (B,) first key that is no padding
    rope: torch.Tensor  # (B,) next rotary position

# ----------------------------------------------------------------------------------------------------------------------
# the model

def is_generation(name):
    """Does RecA train the parameter of this name?"""
    return GEN in name or name.split(".")[0] in ("vae2llm", "llm2vae", "time_embedder")

class Bagel(nn.Module):
    def __init__(self, config, tokenizer=None):
        super().__init__()
        if tokenizer is not None:
            names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
            config = replace(config, special=tuple(tokenizer.special[s] for s in names))
        self.config, self.tokenizer, self.detach = config, tokenizer, False
        c, P = config, config.vae.z_channels * config.latent_patch_size ** 2
        self.vae = Autoencoder(c.vae).requires_grad_(False)  # always frozen
        self.language_model = MoT(c)
        self.vae2llm, self.llm2vae = nn.Linear(P, c.hidden_size), nn.Linear(c.hidden_size, P)
        self.time_embedder = TimeEmbedder(c.hidden_size)
        self.latent_pos_embed = PositionTable(c.max_latent_size, c.hidden_size)
        self.vit_model = SigLIPNaViT(c.vit)
        self.connector = Connector(c.vit.width, c.hidden_size)
        self.vit_pos_embed = PositionTable(c.vit.positions, c.hidden_size)
        if not self.llm2vae.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02) in the transformer, whose generation expert starts as a copy of the other; PyTorch's own, larger, for
        what is added to the position tables (amplitude 1) at its entrance, with biases that take away what the tables have in common at all
        places of a picture: it would drown what was seen, and where; velocity 0."""
        for module in self.language_model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        own = dict(self.named_parameters())
        for name, p in own.items():
            if GEN in name:
                p.copy_(own[name.replace(GEN, UND)])
        nn.init.zeros_(self.llm2vae.weight)
        c, side = self.config, self.config.image_size // self.stride
        for bias, table, n in ((self.connector.fc2.bias, self.vit_pos_embed, min(c.vit_resize[0], c.image_size) // c.vit.patch),
                               (self.vae2llm.bias, self.latent_pos_embed, side)):
            bias.sub_(table(grid_ids(n, n, table.side)).mean(0))

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad. base: all but the autoencoder. sft and reca: the
        generation expert, latent projections and time embedder, with the understanding stream detached: the rest needs no gradient."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.detach = stage != "base"
        for name, p in self.named_parameters():
            p.requires_grad_(is_generation(name) if self.detach else not name.startswith("vae."))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe has no weight decay at all; one that is asked for spares vectors and embeddings."""
        return p.ndim < 2 or "embed_tokens" in name or "position_embedding" in name

    def target_count(self, part, tensors):
        """What the loss of a part is a mean over where that differs from sample to sample (0-dim), else None."""
        return (tensors["labels"] != IGNORE).sum().float() if "labels" in tensors and part in ("i2t", "text") else None

    @property
    def stride(self):
        """Pixels per latent token and side."""
        return self.vae.stride * self.config.latent_patch_size

    @property
    def device(self):
        return self.llm2vae.weight.device

    # ---- data side

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1]. "understand": SigLIP's size; "edit", "reconstruct": the autoencoder's, proportions kept; for
        all else, training batches, the shorter side becomes image_size and the centre is cropped, so that pictures can be stacked."""
        c = self.config
        if purpose == "understand":
            return to_pixels(bagel_resize(image, *c.vit_resize, c.vit.patch))
        if purpose in ("edit", "reconstruct"):
            return to_pixels(bagel_resize(image, *c.vae_resize, self.stride))
        return magvit_pixels(image, c.image_size)

    def resized(self, images, limits, stride):
        """images (B, 3, H, W) in the size that bagel_size gives them (bicubic; PIL would round to whole grey levels)."""
        w, h = bagel_size(images.shape[3], images.shape[2], *limits, stride)
        if (h, w) == tuple(images.shape[2:]):
            return images
        return F.interpolate(images, (h, w), mode="bicubic", antialias=True).clamp(-1, 1)

    def patches(self, images, limits):
        """images (B, 3, H, W) -> SigLIP patches (B, h*w, 3*patch^2) of the resized images, and (h, w)."""
        p = self.config.vit.patch
        images = self.resized(images, limits, p)
        return patchify(images, p), (images.shape[2] // p, images.shape[3] // p)

    def features(self, patches, grid):
        """Patches (B, h*w, 3*patch^2) in [-1, 1] of pictures of one size -> SigLIP features (B, h*w, width)."""
        return self.vit_model(patches.to(self.connector.fc1.weight.dtype), grid_ids(*grid, self.config.vit.positions, patches.device))

    def latent_tokens(self, latents):
        """(B, C, H, W) -> (B, h*w, P), squares of latents row by row, channel fastest; an odd row or column is cut off."""
        p = self.config.latent_patch_size
        return patchify(latents[..., :latents.shape[-2] // p * p, :latents.shape[-1] // p * p], p)

    def moments(self, images):
        """images (B, 3, H, W) -> mean and log variance of each latent token's numbers (B, G, 2*P)."""
        parts = self.vae.moments(images.to(self.vae.encoder.conv_in.weight.dtype)).chunk(2, 1)
        return torch.cat([self.latent_tokens(m) for m in parts], -1)

    def sample_latents(self, moments, noise):
        """moments (B, G, 2*P), noise (B, G, P) -> scaled latents; BAGEL always samples them, also at inference."""
        mean, logvar = moments.float().chunk(2, -1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.vae.config.shift) * self.vae.config.scale

    @torch.no_grad()
    def decode_latents(self, tokens, grid):
        """tokens (B, h*w, P) of a grid (h, w) -> images (B, 3, H, W), not clamped."""
        p = self.config.latent_patch_size
        x = tokens.unflatten(1, grid).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h*p, w*p)
        return self.vae.decode(x.to(self.vae.decoder.conv_in.weight.dtype)).float()

    @torch.no_grad()
    def precompute(self, images, stage="base"):
        """images (N, 3, H, W) in [-1, 1] -> moments (N, G, 2*P), and what SigLIP sees: in base, where it trains, patches (uint8); later, at
        reca_resize, features."""
        patches, grid = self.patches(images, self.config.vit_resize if stage == "base" else self.config.reca_resize)
        if stage == "base":
            return {"moments": self.moments(images), "patches": ((patches + 1) * 127.5).round().clamp(0, 255).byte()}
        return {"moments": self.moments(images), "features": self.features(patches, grid)}

    def encode(self, text, limit=None):
        """Text -> ids without markers; with them at most `limit`."""
        return self.tokenizer.encode_ordinary(text)[:None if limit is None else max(0, limit - 2)]

    def collate(self, part, samples, pad_to=None):
        """Samples (dicts) -> tensors of `layout`, a row for each. Texts get room for `pad_to` tokens (None: the config's maximum, 0: that
        of the longest), what is longer is cut. "drop": True leaves out the text, "drop_image" the source of an edit. labels (B, A) are of
        the last A tokens."""
        c = self.config
        limit = {"t2i": c.max_prompt, "recon": c.max_request, "edit": c.max_request}.get(part, c.max_dialogue)
        limit = min(pad_to or limit, limit)
        w, h = bagel_size(c.image_size, c.image_size, *(c.reca_resize if self.detach else c.vit_resize), c.vit.patch)
        vit, grid = ("vit", (h // c.vit.patch, w // c.vit.patch)), (c.image_size // self.stride,) * 2
        rows = []
        for s in samples:
            if part in ("i2t", "text"):
                row, room = [vit] * (part == "i2t"), limit - 2
                for question, answer in s.get("turns") or [(s["question"], s["answer"])]:
                    question = self.encode(question, room)
                    answer = self.encode(answer, room - len(question))
                    row, room = [*row, ("text", question), ("answer", answer)], room - len(question) - len(answer) - 4
                    if room < 16:  # what is left would not hold another turn
                        break
                rows.append(row)
                continue
            key = {"t2i": "caption", "recon": "prompt", "edit": "instruction"}[part]
            text = [] if s.get("drop") else [("text", self.encode(s[key], limit))]
            seen = not s.get("drop_image")
            before = {"t2i": [], "recon": [vit], "edit": [("clean", grid, seen), (*vit, seen)]}[part]
            rows.append([*before, *text, ("noise", grid)])
        fixed = (vit[1][0] * vit[1][1] + 2) * (part in ("recon", "edit", "i2t")) + {"t2i": 2, "recon": 2, "edit": 4}.get(part, 0)
        out = layout(c, rows, pad_to=0 if pad_to == 0 else fixed + limit)
        if "labels" in out:
            tail = max(sum(len(text) + 2 for _, text in r[1 + (part == "i2t"):]) for r in rows)  # from the first answer on
            out["labels"] = out["labels"][:, -(-(-tail // 8) * 8):]  # few different shapes
        return {k: v for k, v in out.items() if k not in ("start", "rope")}

    def draw(self, part, generator, rate_generator=None):
        """Randomness of one sample, on the CPU: u () for the time, noise (G, P), posterior (G, P) for sample_latents, source_posterior for
        the picture to be edited. Nothing has to be equal within a batch."""
        if part in ("i2t", "text"):
            return {}
        shape = (self.config.image_size // self.stride) ** 2, self.llm2vae.out_features
        names = ("noise", "posterior", "source_posterior")[:3 if part == "edit" else 2]
        return {"u": torch.randn((), generator=generator), **{n: torch.randn(shape, generator=generator) for n in names}}

    # ---- losses

    def view(self, row, past=0, detach=False):
        """Rotary tables and masks of a row (tensors of `layout`) that follows `past` keys."""
        c, names = self.config, ("und", "gen") if "gen_pos" in row else ("und",)
        keys = past + sum(row[n + "_pos"].shape[1] for n in names)
        rope = [rope_tables(row[n + "_pos"], c.hidden_size // c.num_heads, c.rope_theta) for n in names]
        masks = [row[n + "_mask"] if n + "_mask" in row else attention_plan(row[n + "_lo"], row[n + "_hi"], keys) for n in names]
        if "order" not in row:
            return View(rope, masks, detach=detach)
        first = torch.arange(len(row["order"]), device=row["order"].device)[:, None] * keys
        return View(rope, masks, (row["order"] + first).flatten(), (row["inverse"] + first).flatten(), detach)

    def embed(self, ids, features=None, vit_grid=None):
        """ids (B, U), SigLIP features (B, V, width) -> understanding tokens (B, U, W)."""
        n = self.config.vocab_size
        x = self.language_model.model.embed_tokens(ids.clamp(max=n - 1))
        if features is None:
            return x
        seen = self.connector(features) + self.vit_pos_embed(vit_grid)
        return torch.where((ids >= n)[..., None], pick(seen, (ids - n).clamp(min=0)), x).to(x.dtype)

    def embed_latents(self, x_t, t, gen_image, gen_grid):
        """Latents x_t (B, G, P) of images at times t (B, images) -> generation tokens (B, G, W)."""
        x = self.vae2llm(x_t.to(self.vae2llm.weight.dtype)) + pick(self.time_embedder(t), gen_image) + self.latent_pos_embed(gen_grid)
        return x.to(self.vae2llm.weight.dtype)

    def velocity(self, und, x_t, t, row, view, past=None):
        """-> (B, G, P) float32: where the latents are moving, towards noise."""
        gen = self.embed_latents(x_t, t, row["gen_image"], row["gen_grid"])
        return self.llm2vae(self.language_model([und, gen], view, past, wanted=(GEN,))[0][1]).float()

    def flow_time(self, u):
        """Normal numbers -> times in [0, 1]: logit-normal, moved towards noise by timestep_shift; -inf -> 0."""
        s = torch.sigmoid(u.float())
        return self.config.timestep_shift * s / (1 + (self.config.timestep_shift - 1) * s)

    def flow_loss(self, und, view, latents, noise, u, count, row):
        """Rectified flow: mean of (velocity - (noise - latents))^2 over the tokens to be painted; count: so many are divided by."""
        t = self.flow_time(u)  # (B, images)
        at = t.gather(1, row["gen_image"])[..., None]  # (B, G, 1)
        v = self.velocity(und, (1 - at) * latents + at * noise, t, row, view)
        rows = flow_loss_rows(v.flatten(0, 1), latents.flatten(0, 1), noise.flatten(0, 1)) * row["gen_noisy"].flatten()
        return rows.sum() / (row["gen_noisy"].sum() if count is None else count)

    def t2i_loss(self, latents, noise, u, features=None, detach=None, count=None, **row):
        """Flow matching in whatever context `row` describes: text-to-image; with features, and clean latents before the others, editing."""
        view = self.view(row, detach=self.detach if detach is None else detach)
        with view.grad(UND):
            und = self.embed(row["ids"], features, row.get("vit_grid"))
        return self.flow_loss(und, view, latents, noise, u, count, row)

    def reca_loss(self, features, latents, noise, u, detach=None, count=None, **row):
        """Reconstruction alignment: what SigLIP saw of an image at its smallest size is the prompt for painting that image.

        features (B, V, width): SigLIP's of the image at reca_resize, never dropped. latents (B, G, P): the same image at full size. noise
        (B, G, P), u (B, 1): see the top of the file. row: `layout` of [("vit", ..), ("text", request), ("noise", ..)], the request left out
        of a tenth of the samples. Sequence: <|vision_start|> V features <|vision_end|> <|im_start|> request <|im_end|> <|vision_start|> G
        noisy latents <|vision_end|>. The flow's loss is all: no captions, no image-to-text data, as understanding has weights of its own.

        detach (None: self.detach, which trainable_parameters sets): the understanding stream is computed without a graph from end to end:
        features, embeddings, in each layer its q, k, v, attention and MLP. It costs no memory for the backward pass, and no gradient passes
        THROUGH it, not even through the two markers of the painted image, which do attend to the latents. Merely freezing its weights
        (detach=False) leaves that path open and gives the generation expert slightly different gradients."""
        view = self.view(row, detach=self.detach if detach is None else detach)
        with view.grad(UND):
            context = self.embed(row["ids"], features, row["vit_grid"])  # (B, U, W): the image as seen, the request, two markers
        return self.flow_loss(context, view, latents, noise, u, count, row)

    def i2t_loss(self, ids, labels, features=None, vit_grid=None, count=None, **row):
        """Next-token cross entropy on the answers (labels (B, A): of the last A tokens), with the picture in the context or text only."""
        view = self.view(row, detach=self.detach)
        with view.grad(UND):
            hidden = self.language_model([self.embed(ids, features, vit_grid)], view)[0][0][:, -labels.shape[1]:]
            weight = self.language_model.lm_head.weight
            return linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), ignore_index=IGNORE, count=count)

    def align_loss(self, words, patches, kind="contrast"):
        """Base training only, for a SigLIP that did not come pre-trained: see word_alignment. words (B, V): 1 where the caption has the id."""
        side = self.config.vit_resize[0] // self.config.vit.patch
        seen = self.connector(self.features(patches / 127.5 - 1, (side, side)))
        places = self.vit_pos_embed(grid_ids(side, side, self.vit_pos_embed.side, patches.device))
        seen = seen + places.mean(0)  # what was seen, without where: the connector's bias starts at minus this mean
        return word_alignment(seen, words, self.language_model.model.embed_tokens.weight[:words.shape[1]], kind)

    def forward(self, batch):
        """{part: tensors of precompute, collate and draw} -> {part: loss}, all parts in one forward."""
        losses = {}
        for part, row in batch.items():
            row, source = dict(row), "source_" if part == "edit" else ""
            cached = {k: row.pop(k) for k in list(row) if k.endswith(("moments", "posterior", "features", "patches"))}
            if part in ("align", "words"):
                losses[part] = self.align_loss(row["words"], cached["patches"], "presence" if part == "words" else "contrast")
                continue
            if part in ("recon", "edit", "i2t"):
                row["features"] = cached.get(source + "features")
                if row["features"] is None:
                    pixels = cached[source + "patches"].to(self.connector.fc1.weight.dtype) / 127.5 - 1
                    row["features"] = self.vit_model(pixels, row["vit_grid"])
            if part in ("i2t", "text"):
                losses[part] = self.i2t_loss(**row)
                continue
            row["latents"], row["u"] = self.sample_latents(cached["moments"], cached["posterior"]), row["u"][:, None]
            if part == "edit":  # the source is an image at time 0; what stands for its noise is not looked at
                clean = self.sample_latents(cached["source_moments"], cached["source_posterior"])
                row["latents"], row["noise"] = torch.cat([clean, row["latents"]], 1), torch.cat([clean, row["noise"]], 1)
                row["u"] = torch.cat([torch.full_like(row["u"], -math.inf), row["u"]], 1)
            losses[part] = (self.reca_loss if part == "recon" else self.t2i_loss)(**row)
        return losses

    # ---- samplers

    @torch.no_grad()
    def context(self, samples, features=None, latents=None):
        """Reads samples (see `layout`) that are to be continued -> Cache. features (B, V, width), latents (B, G, P): of their images."""
        row = {k: v.to(self.device) for k, v in layout(self.config, samples).items()}
        streams = [self.embed(row["ids"], features, row.get("vit_grid"))]
        if "gen_pos" in row:
            t = torch.zeros(len(samples), max(sum(segment[0] == "clean" for segment in s) for s in samples), device=self.device)
            streams.append(self.embed_latents(latents, t, row["gen_image"], row["gen_grid"]))
        return Cache(self.language_model(streams, self.view(row), keep=True)[1], row["start"], row["rope"])

    @torch.no_grad()
    def sample(self, cache, noise, grid, cfg=1.0, cfg_image=1.0, steps=None, shift=None, interval=None, renorm="global", renorm_min=0.0,
               trace=None):
        """Integrates the flow from noise (B, h*w, P) to latents of a grid (h, w).

        cache: contexts of B rows; then, for guidance, of B rows without the last text; then, if images guide too, of B rows without images.
        steps: points in time, one more than evaluations; shift > 1 spends more of them near noise; interval (low, high]: times that are
        guided; renorm: see `guide`. trace: a list that collects (x, velocity) of every step. All branches of a step are one forward."""
        c, (B, n, _), R = self.config, noise.shape, len(cache.rope)
        steps, shift, (low, high) = steps or c.steps, shift or c.shift, interval or c.interval
        past = cache.kv[0][0].shape[2]
        wide = lambda t, m: t[:, None].expand(R, m)
        row = {"ids": torch.tensor([c.special[2:]], device=self.device).expand(R, 2),
               "gen_grid": grid_ids(*grid, c.max_latent_size, self.device).expand(R, n), "gen_image": wide(torch.zeros_like(cache.rope), n)}
        for name, m in (("und", 2), ("gen", n)):
            keys = torch.full_like(cache.rope, past + 2 + n)
            row |= {name + "_pos": wide(cache.rope, m), name + "_lo": wide(cache.start, m), name + "_hi": wide(keys, m)}

        def prepare(m):  # for the first m rows
            rows = {k: v[:m] for k, v in row.items()}
            return self.embed(rows["ids"]), rows, self.view(rows, past), [(k[:m], v[:m]) for k, v in cache.kv]

        if steps < 2:
            raise ValueError(f"--steps {steps}: points in time, one more than passes through the model, so at least 2")
        plain, guided = prepare(B), prepare(R)
        times = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / (steps - 1) for i in range(steps))]
        x = noise.to(self.device, torch.float32)
        for t, after in zip(times, times[1:]):
            und, rows, view, kv = guided if low < t <= high else plain
            m = len(und) // B
            v = self.velocity(und, x.repeat(m, 1, 1), torch.full((m * B, 1), t, device=self.device), rows, view, kv)
            v = v if m == 1 else guide(*v.chunk(m), cfg=cfg, cfg_image=cfg_image, renorm=renorm, renorm_min=renorm_min)
            if trace is not None:
                trace.append((x, v))
            x = x - v * (t - after)
        return x

    @torch.no_grad()
    def paint(self, contexts, size, cfg, cfg_image=1.0, temperature=1.0, generator=None, features=None, latents=None, **how):
        """contexts: B samples in full, without the last text, without images; the last two only if cfg > 1 and cfg_image > 1 want them."""
        if any(side % self.stride for side in size):
            raise ValueError(f"size {tuple(size)}: both sides must be multiples of {self.stride} pixels")
        contexts = contexts[:1 if cfg <= 1 else 2 if cfg_image <= 1 else 3]
        grid = tuple(side // self.stride for side in size)
        cache = self.context(sum(contexts, []), *(x if x is None else x.repeat(len(contexts), 1, 1) for x in (features, latents)))
        noise = temperature * self.randn(len(contexts[0]), grid[0] * grid[1], generator)
        return self.decode_latents(self.sample(cache, noise, grid, cfg, cfg_image, **how), grid).clamp(-1, 1)

    def randn(self, rows, tokens, generator):
        where = generator.device if generator is not None else "cpu"
        return torch.randn(rows, tokens, self.llm2vae.out_features, generator=generator, device=where).to(self.device)

    @torch.no_grad()
    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None, think=False, **how):
        """Captions -> images (B, 3, H, W) in [-1, 1]. size: pixels, one number or (H, W); cfg, steps, size: the config's where None;
        temperature: factor on the noise at the start; think: first writes a plan and reads it too; how: shift, interval, renorm, renorm_min
        of `sample`. Guidance leads away from an empty context, not from an empty text."""
        size, before = size or self.config.image_size, [("text", self.encode(THINK_PAINT))] * think
        full = [[*before, ("text", self.encode(p))] for p in prompts]
        without_text = [before] * len(full)
        full = self.think(full) if think else full
        size, cfg = (size, size) if isinstance(size, int) else size, self.config.cfg if cfg is None else cfg
        return self.paint([full, without_text], size, cfg, temperature=temperature, generator=generator, steps=steps, **how)

    @torch.no_grad()
    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0, generator=None, **how):
        """images (B, 3, H, W) in [-1, 1] -> what the model paints when SigLIP shows it them at reca_resize, with a request."""
        patches, grid = self.patches(images, self.config.reca_resize)
        prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
        full = [[("vit", grid), ("text", self.encode(p))] for p in prompts]
        cfg, how = self.config.cfg if cfg is None else cfg, {"interval": (0.0, 1.0), **how}
        return self.paint([full, [s[:1] for s in full]], images.shape[2:], cfg, temperature=temperature, generator=generator,
                          features=self.features(patches, grid), steps=steps, **how)

    @torch.no_grad()
    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None, cfg_image=None, think=False, **how):
        """images (B, 3, H, W) in [-1, 1] and one instruction for each -> edited images in the size of vae_resize. Context: the picture as
        clean latents, then as SigLIP sees it, then the text; guidance leads away from pictures (cfg) and from text (cfg_image) alone."""
        c = self.config
        images = self.resized(images, c.vae_resize, self.stride)
        patches, vit = self.patches(images, c.vit_resize)
        grid, moments = (images.shape[2] // self.stride, images.shape[3] // self.stride), self.moments(images)
        seen = dict(features=self.features(patches, vit), latents=self.sample_latents(moments, self.randn(*moments.shape[:2], generator)))
        before, texts = [("text", self.encode(THINK_PAINT))] * think, [("text", self.encode(text)) for text in instructions]
        pictures = [*before, ("clean", grid), ("vit", vit)]
        full = [[*pictures, text] for text in texts]
        full = self.think(full, **seen) if think else full
        contexts = full, [pictures] * len(full), [[*before, text] for text in texts]
        cfg, cfg_image = c.cfg if cfg is None else cfg, c.cfg_image if cfg_image is None else cfg_image
        how = {"interval": (0.0, 1.0), "renorm": "text_channel", **how}
        return self.paint(contexts, images.shape[2:], cfg, cfg_image, temperature, generator, **seen, steps=steps, **how)

    @torch.no_grad()
    def generate_tokens(self, cache, max_new_tokens, temperature=0.0, generator=None, trace=None):
        """Continues contexts with an answer, greedily at temperature 0 -> ids (B, at most max_new_tokens); rows that have had <|im_end|>
        run on until all have. trace: a list that collects the logits (B, vocabulary) of every step."""
        kv, (bos, eos, *_), written = cache.kv, self.config.special, []
        token = torch.full_like(cache.rope, bos)[:, None]  # (B, 1)
        done = torch.zeros_like(token, dtype=torch.bool)
        while len(written) < max_new_tokens and not bool(done.all()):
            past = kv[0][0].shape[2]
            at, hi = cache.rope[:, None] + len(written), torch.full_like(token, past + 1)
            row = {"und_pos": at, "und_lo": cache.start[:, None], "und_hi": hi}
            hidden, kv = self.language_model([self.embed(token)], self.view(row, past), kv, keep=True)
            logits = self.language_model.lm_head(hidden[0][:, -1]).float()
            if trace is not None:
                trace.append(logits)
            if temperature > 0:
                p = torch.softmax(logits / temperature, -1).to(generator.device if generator is not None else logits.device)
                token = torch.multinomial(p, 1, generator=generator).to(logits.device)
            else:
                token = logits.argmax(-1, keepdim=True)
            written.append(token)
            done = done | (token == eos)
        return torch.cat(written, 1)

    def texts(self, tokens):
        """Rows of ids, each up to its first <|im_end|> -> strings."""
        end = self.config.special[1]
        return [self.tokenizer.decode(row[:row.index(end)] if end in row else row) for row in tokens.tolist()]

    def think(self, samples, max_new_tokens=1000, **seen):
        """The samples, each with what the model writes next as one more text."""
        thoughts = self.texts(self.generate_tokens(self.context(samples, **seen), max_new_tokens))
        return [[*sample, ("text", self.encode(text))] for sample, text in zip(samples, thoughts)]

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, think=False):
        """images (B, 3, H, W) in [-1, 1], or None, and a question for each row -> list of answers; think: with the reasoning in front."""
        patches, grid = (None, None) if images is None else self.patches(images, self.config.vit_resize)
        before = [("text", self.encode(THINK_ANSWER))] * think + ([] if images is None else [("vit", grid)])
        samples = [[*before, ("text", self.encode(q))] for q in questions]
        cache = self.context(samples, None if images is None else self.features(patches, grid))
        return self.texts(self.generate_tokens(cache, max_new_tokens, temperature, generator))

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="bagel-7b-mot", tokenizer_path=None, tokenizer=None, device="cpu", dtype=None):
        """path: ema.safetensors (BAGEL-7B-MoT), model_bf16.safetensors (BAGEL-RecA) or the folder of one of them; tokenizer_path:
        ae.safetensors (None: the one beside it). Strict. The model is built without memory, then each tensor goes from the file straight to
        `device` and `dtype` (None: float32). The autoencoder is float32 always. Raises FileNotFoundError, and ValueError with a table of the keys that do not fit."""
        if os.path.isdir(path):
            found = [n for n in ("ema.safetensors", "model_bf16.safetensors") if os.path.exists(os.path.join(path, n))]
            if len(found) != 1:
                raise FileNotFoundError(f"{path}: holds {len(found)} of ema.safetensors, model_bf16.safetensors: name the file to read")
            path = os.path.join(path, found[0])
        tokenizer_path = tokenizer_path or os.path.join(os.path.dirname(path), "ae.safetensors")
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer)
        names = [name for name in model.state_dict() if not name.startswith("vae.")]
        dtype = dtype or torch.float32
        stream(model, path, names, device, lambda name: dtype)
        stream(model.vae, tokenizer_path, list(model.vae.state_dict()), device, lambda name: torch.float32)
        for table in (model.latent_pos_embed, model.vit_pos_embed):
            table.compute(device)
        return model.eval()

    def flops_per_sample(self, part):
        """Estimate for MFU with the longest text: 2 operations per weight and token forward, 4 more backward where there is a graph."""
        c, dim = self.config, self.config.hidden_size // self.config.num_heads
        vit = (min((c.reca_resize if self.detach else c.vit_resize)[0], c.image_size) // c.vit.patch) ** 2 + 2
        text = {"t2i": c.max_prompt, "recon": c.max_request, "edit": c.max_request}.get(part, c.max_dialogue)
        und, images = text + vit * (part in ("recon", "edit", "i2t")), {"recon": 1, "t2i": 1, "edit": 2}.get(part, 0)
        gen = images * (c.image_size // self.stride) ** 2
        layer = c.hidden_size * (2 * c.hidden_size + 2 * c.num_kv_heads * dim + 3 * c.intermediate_size) + 2 * (und + gen) * c.hidden_size
        head = text * c.vocab_size * c.hidden_size if part in ("i2t", "text") else 0
        return 6.0 * gen * c.num_layers * layer + (2.0 if self.detach else 6.0) * (und * c.num_layers * layer + head)

def guide(v, v_text, v_image=None, cfg=1.0, cfg_image=1.0, renorm="global", renorm_min=0.0):
    """Classifier-free guidance of velocities (B, n, P): with the full context, without the last text, without images.

    g = v_text + cfg (v - v_text), then g = v_image + cfg_image (g - v_image). Guidance makes velocities longer, so they are shrunk by
    |v| / |g|, between renorm_min and 1: of each picture ("global"; the published sampler takes the norm over a batch, which is the same for
    one picture), of each token ("channel"), or of each token before images guide ("text_channel")."""
    def shrink(g, dims):
        norm = lambda x: torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        return g * (norm(v) / (norm(g) + 1e-8)).clamp(renorm_min, 1.0)

    if renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"renorm {renorm!r}: expected global, channel or text_channel")
    g = v_text + cfg * (v - v_text)
    if renorm == "text_channel":
        g = shrink(g, -1)
    if v_image is not None:
        g = v_image + cfg_image * (g - v_image)
    return g if renorm == "text_channel" else shrink(g, (1, 2) if renorm == "global" else -1)

Model = Bagel
