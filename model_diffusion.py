"""BAGEL: one transformer with two complete sets of weights that reads, sees and, by rectified flow, paints; and its RecA post-training (arXiv 2509.07295).

Mixture of transformers: every layer holds an understanding expert (names as in Qwen2.5) and a generation expert (names with `_moe_gen`). There is no
router, a token's TYPE decides: text, SigLIP features and all special tokens, also the two that frame a painted image, go to understanding, latents
to generation. Both attend in one sequence. Text is causal; the tokens of an image see each other and what came before, and share one rotary position.

    image --SigLIP--> features --connector--> |                                             |--lm_head--> answer
    text, special tokens ----> embedding ---> | understanding expert  \\                     |
                                              |                        shared attention     |
    latents, 2x2 to a token, + time + place > | generation expert     /                     |--llm2vae--> velocity = noise - image
                                                                                              at x_t = (1 - t) image + t noise
RecA (`Bagel.reca_loss`): the SigLIP features of an image, taken at the smallest size, are the prompt from which the SAME image is painted. Only the
generation expert learns; the understanding stream is detached wherever it is made, so its half has neither gradients nor optimizer state.

Conventions. B rows, U understanding and G generation tokens per row, kept as two tensors through all layers: each expert works on one slice, no layer
scatters. Only keys and values are joined, and which of them a query sees is an interval, because `layout` puts them in memory in the right order and
padding first. W width of the model, P numbers per latent token. Images are (B, 3, H, W) in [-1, 1]. Everything random is an argument: `noise`
(B, G, P), and a normal number `u` (B, images) from which the flow time of each image comes, -inf for an image that is clean context (t = 0).
"""
import math
import os
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from custom_kernels import attention, attention_plan, flow_loss_rows, linear_cross_entropy
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig, check_keys
from vision_encoder import VISION_ENCODERS, SigLIPConfig, SigLIPNaViT, bagel_resize, bagel_size, grid_ids, magvit_pixels, patchify, to_pixels

ARCH = "diffusion"
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
    special: tuple = (151644, 151645, 151652, 151653)  # <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>; a text tokenizer's own ids win
    # images
    vit: SigLIPConfig = field(default_factory=lambda: VISION_ENCODERS["siglip-so400m-14-980"])
    vae: AutoencoderConfig = field(default_factory=lambda: TOKENIZERS["flux"])
    latent_patch_size: int = 2
    max_latent_size: int = 64  # rows and columns of the table of latent places
    image_size: int = 1024  # pixels, training and default of the sampler
    vae_resize: tuple = (1024, 512)  # largest long and smallest short side of a picture that is edited or reconstructed,
    vit_resize: tuple = (980, 224)  # ... of what SigLIP sees of it to answer or to edit,
    reca_resize: tuple = (224, 224)  # ... and as a prompt in RecA: the smallest size it knows, so that there are no pixels to copy
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
    "tiny": BagelConfig(vocab_size=1024, hidden_size=128, intermediate_size=128, num_layers=4, num_heads=4, num_kv_heads=2, rope_theta=1e4,
                        special=(1019, 1020, 1021, 1022), vit=VISION_ENCODERS["tiny-siglip"], vae=TOKENIZERS["tiny-flux"], max_latent_size=6, image_size=48,
                        vae_resize=(48, 48), vit_resize=(48, 48), reca_resize=(48, 48), max_prompt=24, max_request=16, max_dialogue=48, steps=25, interval=(0.0, 1.0)),
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
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


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
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@dataclass
class View:
    """What all layers share; the lists have one entry per stream, understanding first."""
    rope: list  # (cos, sin)
    masks: list  # AttentionPlan, or a dense bool mask (B, T, keys)
    order: torch.Tensor = None  # (B*(U+G),) place in [understanding | generation] of each key in memory; None where these are the same
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
        (B, kv_heads, n, dim). -> the streams (None for one that is not `wanted`) and the keys and values of past and present in memory order.
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
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size), "layers": nn.ModuleList(MoTLayer(c) for _ in range(c.num_layers)),
                                    **{"norm" + e: RMSNorm(c.hidden_size, c.rms_norm_eps) for e in EXPERTS}})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)  # not tied

    def forward(self, streams, view, past=None, wanted=EXPERTS, keep=False):
        """-> the wanted streams after the final norm (None for the other), and, with keep, per layer the keys and values of everything so far."""
        layers, cache = self.model["layers"], []
        for i, layer in enumerate(layers):  # nobody attends to the last layer's output, so there only what is wanted is computed
            streams, kv = layer(streams, view, past[i] if past is not None else None, wanted if i == len(layers) - 1 else EXPERTS)
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
    """Fixed sine-cosine table (side*side, width) of a grid, row by row; the first half of the channels encodes the column, the second the row.
    The published files hold it too, rounded to bfloat16: it is computed instead, in float64, and stays float32."""

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


_THINK = ("You should first think about the {0} process in the mind and then {1}. \nThe {0} process is enclosed within <think> </think> tags, "
          "i.e. <think> {0} process here </think> {2} here")  # the published words; a text of its own in front of everything
THINK_PAINT = _THINK.format("planning", "generate the image", "image")
THINK_ANSWER = _THINK.format("reasoning", "provide the user with the answer", "answer")


def _columns(n, *columns):
    out = np.empty((n, len(columns)), np.int64)
    for i, column in enumerate(columns):
        out[:, i] = column
    return out


def layout(c, samples, packed=False, pad_to=0):
    """Where the tokens of samples lie, and what they see. A sample is a list of segments, in the order of the rotary positions:
        ("text", ids) and ("answer", ids): <|im_start|> ids <|im_end|>, causal; the ids and <|im_end|> of an answer are to be predicted;
        ("vit", (h, w)): h*w SigLIP tokens;  ("clean", (h, w)): a picture's h*w latents as context;  ("noise", (h, w)): latents to be painted;
        each of these between two special tokens, bidirectional. Nothing outside sees a noisy image, and it takes no rotary position from what follows.
    An image with a third entry False is left out (conditioning dropout): its rotary position and its place among the given features or latents stay.
    One row per sample, padded on the left to `pad_to` understanding tokens (0: the longest), or, packed, all samples side by side in a single row.

    -> int64 tensors: ids (B, U), of which vocab_size + j stands for the row's j-th SigLIP token;  labels (B, U), IGNORE where nothing is predicted;
    und_pos, und_lo, und_hi (B, U) and gen_pos, gen_lo, gen_hi (B, G): rotary positions and the interval of keys each token sees, empty for padding;
    gen_grid, gen_image, gen_noisy (B, G): place in the table of latents, number of the image in the row, 1 if it is to be painted;  vit_grid (B, V);
    start, rope (B,): first key that is no padding, next rotary position. Only where needed: order, inverse (B, U+G) between [understanding |
    generation] and memory; und_mask, gen_mask (B, U or G, U+G) bool, where something follows a noisy image and what it sees is no interval.
    Raises ValueError if a row is longer than pad_to or a grid larger than its position table."""
    bos, eos, image_start, image_end = c.special
    rows, labelled, dense = [], False, False
    for row in [samples] if packed else [[s] for s in samples]:
        # columns: slot in memory, id, position, lo, hi, label;  slot, position, lo, hi, place, image, noisy
        und, gen, vit_grid, painted = [_columns(0, *range(6))], [_columns(0, *range(7))], [np.zeros(0, np.int64)], []
        at = images = seen = rope = 0  # `at`: the next free slot
        for sample in row:
            start, rope = at, 0
            for kind, content, *given in sample:
                if kind in ("text", "answer"):
                    ids, slots = [bos, *content, eos], np.arange(at, at + len(content) + 2)
                    labelled |= kind == "answer"
                    und.append(_columns(len(ids), slots, ids, rope + slots - at, start, slots + 1, [*ids[1:], IGNORE] if kind == "answer" else IGNORE))
                    at, rope = at + len(ids), rope + len(ids)
                    continue
                n, given = content[0] * content[1], all(given)
                grid = grid_ids(*content, c.vit.positions if kind == "vit" else c.max_latent_size).numpy()
                end = at + (n + 2) * given
                if kind == "vit":
                    ids = [image_start, *range(c.vocab_size + seen, c.vocab_size + seen + n), image_end]
                    und += [_columns(n + 2, np.arange(at, end), ids, rope, start, end, IGNORE)] if given else []
                    vit_grid.append(grid)
                    seen += n
                else:  # the two markers come first: inside a bidirectional block the order in memory is free
                    if given:
                        und.append(_columns(2, [at, at + 1], [image_start, image_end], rope, start, end, IGNORE))
                        gen.append(_columns(n, np.arange(at + 2, end), rope, start, end, grid, images, kind == "noise"))
                        painted += [(at, end)] if kind == "noise" else []
                    else:  # its latents are among the given ones, so it keeps its place there
                        gen.append(_columns(n, -1, 0, 0, 0, 0, images, 0))
                    images += 1
                at, rope = end, rope + (kind != "noise")
            dense |= any(first >= start and end < at for first, end in painted)
        rows.append((np.concatenate(und), np.concatenate(gen), np.concatenate(vit_grid), painted, at, rope))

    U, G, V = (max(len(r[i]) for r in rows) for i in range(3))
    if pad_to and U > pad_to:
        raise ValueError(f"a row of {U} text and SigLIP tokens does not fit pad_to = {pad_to}: shorten its text or raise pad_to")
    U = max(U, pad_to)
    B, T = len(rows), U + G
    und, gen, place = _columns(B * U, 0, 0, 0, 0, 0, IGNORE).reshape(B, U, 6), np.zeros((B, G, 7), np.int64), np.full((B, T), -1)
    for b, (u, g, _, _, used, _) in enumerate(rows):
        pads, i, j = T - used, U - len(u), G - len(g)
        place[b, i:U], place[b, U + j:] = u[:, 0] + pads, np.where(g[:, 0] < 0, -1, g[:, 0] + pads)
        place[b, place[b] < 0] = np.arange(pads)
        und[b, i:], gen[b, j:] = u + [0, 0, 0, pads, pads, 0], g + [0, 0, pads, pads, 0, 0, 0]
    out = dict(ids=und[..., 1], und_pos=und[..., 2], und_lo=und[..., 3], und_hi=und[..., 4],
               start=np.array([T - r[4] for r in rows]), rope=np.array([r[5] for r in rows]))
    if labelled:
        out["labels"] = und[..., 5]
    if G:
        out.update(zip(("gen_pos", "gen_lo", "gen_hi", "gen_grid", "gen_image", "gen_noisy"), np.moveaxis(gen, 2, 0)[1:]))
    if V:
        out["vit_grid"] = np.stack([np.pad(r[2], (0, V - len(r[2]))) for r in rows])
    if (place != np.arange(T)).any():
        out.update(order=place.argsort(1), inverse=place)
    if dense:
        lo, hi = (np.concatenate([und[..., i], gen[..., i - 1]], 1)[..., None] for i in (3, 4))
        mask = (np.arange(T) >= lo) & (np.arange(T) < hi)  # (B, U+G, T)
        for b, (_, _, _, painted, used, _) in enumerate(rows):
            for first, end in painted:
                first, end = first + T - used, end + T - used
                mask[b, (place[b] < first) | (place[b] >= end), first:end] = False
        out.update(und_mask=mask[:, :U], gen_mask=mask[:, U:])
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}


@dataclass
class Cache:
    """A context that has been read: rows are samples, padded on the left."""
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
            config = replace(config, special=tuple(tokenizer.special[s] for s in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")))
        self.config, self.tokenizer, self.detach = config, tokenizer, False
        c = config
        self.vae = Autoencoder(c.vae).requires_grad_(False)  # always frozen
        self.language_model = MoT(c)
        self.vae2llm = nn.Linear(c.vae.z_channels * c.latent_patch_size ** 2, c.hidden_size)
        self.llm2vae = nn.Linear(c.hidden_size, c.vae.z_channels * c.latent_patch_size ** 2)
        self.time_embedder = TimeEmbedder(c.hidden_size)
        self.latent_pos_embed = PositionTable(c.max_latent_size, c.hidden_size)
        self.vit_model = SigLIPNaViT(c.vit)
        self.connector = Connector(c.vit.width, c.hidden_size)
        self.vit_pos_embed = PositionTable(c.vit.positions, c.hidden_size)
        if not self.llm2vae.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02) in the transformer and around it; the generation expert starts as a copy of the understanding expert; velocity 0."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and not name.startswith(("vae.", "vit_model.")):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        own = dict(self.named_parameters())
        for name, p in own.items():
            if GEN in name:
                p.copy_(own[name.replace(GEN, UND)])
        nn.init.zeros_(self.llm2vae.weight)

    def trainable_parameters(self, stage):
        """stage base | sft | reca -> [(name, parameter)] to train, and sets requires_grad. base: everything but the autoencoder. sft and reca: the
        generation expert, the two latent projections and the time embedder, with the understanding stream detached: the rest needs no gradient."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        self.detach = stage != "base"
        for name, p in self.named_parameters():
            p.requires_grad_(not name.startswith("vae.") if stage == "base" else is_generation(name))
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe has no weight decay at all; where --weight-decay is given, it is for matrices only, embeddings excepted."""
        return p.ndim < 2 or "embed_tokens" in name or "position_embedding" in name

    def flops_per_sample(self, part):
        """Arithmetic of forward + backward for one sample with the longest text: 2 per weight and token forward, and 4 more backward where a graph is kept."""
        c = self.config
        vit = (c.reca_resize if self.detach else c.vit_resize)[0] // c.vit.patch
        vit, latents = min(vit, c.image_size // c.vit.patch) ** 2 + 2, (c.image_size // self.stride) ** 2
        und = {"recon": vit + c.max_request + 2, "t2i": c.max_prompt + 2, "edit": vit + c.max_request + 4, "i2t": vit + c.max_dialogue, "text": c.max_dialogue}[part]
        gen = {"recon": latents, "t2i": latents, "edit": 2 * latents}.get(part, 0)
        dim = c.hidden_size // c.num_heads
        layer = c.hidden_size * (2 * c.hidden_size + 2 * c.num_kv_heads * dim + 3 * c.intermediate_size)
        weights = lambda n: n * c.num_layers * (layer + (und + gen) * c.hidden_size)  # attention: half of the keys for q.k and half for .v, on average
        head = c.max_dialogue * c.vocab_size * c.hidden_size if part in ("i2t", "text") else 0
        return 6.0 * weights(gen) + (2.0 if self.detach else 6.0) * (weights(und) + head)

    # ---- data side

    @property
    def stride(self):
        """Pixels per latent token and side."""
        return self.vae.stride * self.config.latent_patch_size

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1]. "understand": SigLIP's size; "edit", "reconstruct": the autoencoder's size, proportions kept; anything
        else is for training batches: shorter side to image_size and centre crop, so that pictures can be stacked."""
        c = self.config
        if purpose == "understand":
            return to_pixels(bagel_resize(image, *c.vit_resize, c.vit.patch))
        if purpose in ("edit", "reconstruct"):
            return to_pixels(bagel_resize(image, *c.vae_resize, self.stride))
        return magvit_pixels(image, c.image_size)

    def resized(self, images, limits, stride):
        """images (B, 3, H, W) to the size that bagel_size gives them (bicubic, as PIL up to rounding to whole grey levels)."""
        w, h = bagel_size(images.shape[3], images.shape[2], *limits, stride)
        if (h, w) == tuple(images.shape[2:]):
            return images
        return F.interpolate(images, (h, w), mode="bicubic", antialias=True).clamp(-1, 1)

    def patches(self, images, limits):
        """images (B, 3, H, W) -> SigLIP patches (B, h*w, 3*patch^2) and (h, w)."""
        images, p = self.resized(images, limits, self.config.vit.patch), self.config.vit.patch
        return patchify(images, p), (images.shape[2] // p, images.shape[3] // p)

    def features(self, patches, grid):
        """Patches of pictures of one size (B, h*w, 3*patch^2) in [-1, 1] -> SigLIP features (B, h*w, width)."""
        ids = grid_ids(*grid, self.config.vit.positions, patches.device)
        return self.vit_model(patches.to(self.connector.fc1.weight.dtype), ids)

    def latent_tokens(self, latents):
        """(B, C, H, W) -> (B, h*w, P), rows of 2x2 squares, channel fastest; an odd row or column is cut off."""
        p = self.config.latent_patch_size
        return patchify(latents[..., :latents.shape[-2] // p * p, :latents.shape[-1] // p * p], p)

    def decode_latents(self, tokens, grid):
        """tokens (B, h*w, P) of a grid (h, w) -> images (B, 3, H, W), not clamped."""
        p = self.config.latent_patch_size
        x = tokens.unflatten(1, grid).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h*p, w*p)
        return self.vae.decode(x.to(self.vae.decoder.conv_in.weight.dtype)).float()

    @torch.no_grad()
    def precompute(self, images, stage="base"):
        """images (N, 3, H, W) in [-1, 1] -> moments (N, G, 2*P), mean and log variance of each latent token's numbers; and what SigLIP sees, in base as
        patches (uint8, since it trains), later, at reca_resize, as features."""
        c = self.config
        moments = self.vae.moments(images.to(self.vae.encoder.conv_in.weight.dtype)).chunk(2, 1)
        out = {"moments": torch.cat([self.latent_tokens(m) for m in moments], -1)}
        patches, grid = self.patches(images, c.vit_resize if stage == "base" else c.reca_resize)
        if stage == "base":
            return {**out, "patches": ((patches + 1) * 127.5).round().clamp(0, 255).byte()}
        return {**out, "features": self.features(patches, grid)}

    def encode(self, text, limit=None):
        return self.tokenizer.encode_ordinary(text.strip())[:None if limit is None else max(0, limit - 2)]

    def collate(self, part, samples, pad_to=None):
        """Samples (dicts) -> the tensors of `layout`, one row per sample. Texts get `pad_to` tokens (None: the config's maximum, 0: those of the longest);
        what is longer is cut. "drop": True leaves out the text, "drop_image" (edit only) the source picture. labels (B, A) belong to the last A tokens."""
        c = self.config
        most = {"t2i": c.max_prompt, "recon": c.max_request, "edit": c.max_request}.get(part, c.max_dialogue)
        limit = min(pad_to or most, most)
        w, h = bagel_size(c.image_size, c.image_size, *(c.reca_resize if self.detach else c.vit_resize), c.vit.patch)
        vit, grid = ("vit", (h // c.vit.patch, w // c.vit.patch)), (c.image_size // self.stride,) * 2
        rows = []
        for s in samples:
            if part in ("i2t", "text"):
                question = self.encode(s["question"], limit - 2)
                rows.append([vit] * (part == "i2t") + [("text", question), ("answer", self.encode(s["answer"], limit - len(question) - 2))])
                continue
            key = {"t2i": "caption", "recon": "prompt", "edit": "instruction"}[part]
            text = [] if s.get("drop") else [("text", self.encode(s[key], limit))]
            seen = not s.get("drop_image", False)
            before = {"t2i": [], "recon": [vit], "edit": [("clean", grid, seen), (*vit, seen)]}[part]
            rows.append([*before, *text, ("noise", grid)])
        fixed = (vit[1][0] * vit[1][1] + 2) * (part in ("recon", "edit", "i2t")) + {"t2i": 2, "recon": 2, "edit": 4}.get(part, 0)
        out = layout(c, rows, pad_to=0 if pad_to == 0 else fixed + limit)
        if "labels" in out:
            longest = max(len(r[-1][1]) for r in rows) + 2
            out["labels"] = out["labels"][:, -(-(-longest // 8) * 8):]  # few different shapes
        return {k: v for k, v in out.items() if k not in ("start", "rope")}

    def draw(self, part, generator, rate_generator=None):
        """Randomness of one sample, on the CPU: u () gives the time, noise (G, P) the flow's end, posterior (G, P) the sample of the autoencoder's
        distribution (source_posterior: that of the picture to be edited). Nothing has to be equal within a batch."""
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
        order = [row[n] + torch.arange(len(row[n]), device=row[n].device)[:, None] * keys for n in ("order", "inverse") if n in row]
        return View(rope, masks, *[o.flatten() for o in order] or (None, None), detach)

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
        return self.vae2llm(x_t.to(self.vae2llm.weight.dtype)) + pick(self.time_embedder(t), gen_image) + self.latent_pos_embed(gen_grid)

    def velocity(self, und, x_t, t, row, view, past=None):
        """-> (B, G, P) float32: where the latents are moving, towards noise."""
        gen = self.embed_latents(x_t, t, row["gen_image"], row["gen_grid"]).to(self.vae2llm.weight.dtype)
        hidden = self.language_model([und, gen], view, past, wanted=(GEN,))[0][1]
        return self.llm2vae(hidden).float()

    def flow_time(self, u):
        """Normal numbers -> times in [0, 1]: logit-normal, moved towards noise by timestep_shift; -inf -> 0."""
        s = torch.sigmoid(u.float())
        return self.config.timestep_shift * s / (1 + (self.config.timestep_shift - 1) * s)

    def flow_loss(self, und, view, latents, noise, u, count, row):
        """Rectified flow: mean square of (velocity - (noise - latents)) over the numbers of the tokens to be painted; count: tokens to divide by."""
        t = self.flow_time(u)  # (B, images)
        at = t.gather(1, row["gen_image"])[..., None]  # (B, G, 1)
        v = self.velocity(und, (1 - at) * latents + at * noise, t, row, view)
        rows = flow_loss_rows(v.flatten(0, 1), latents.flatten(0, 1), noise.flatten(0, 1)) * row["gen_noisy"].flatten()
        return rows.sum() / (row["gen_noisy"].sum() if count is None else count)

    def t2i_loss(self, latents, noise, u, features=None, detach=None, count=None, **row):
        """Text-to-image and, with features and the latents of the clean picture first, editing: flow matching with whatever context `row` describes."""
        view = self.view(row, detach=self.detach if detach is None else detach)
        with view.grad(UND):
            und = self.embed(row["ids"], features, row.get("vit_grid"))
        return self.flow_loss(und, view, latents, noise, u, count, row)

    def reca_loss(self, features, latents, noise, u, detach=None, count=None, **row):
        """Reconstruction alignment: what SigLIP saw of an image at its smallest size is the prompt for painting that image.

        features (B, V, width): SigLIP on the image at reca_resize, never dropped. latents (B, G, P): the same image at full size. noise (B, G, P), u (B, 1):
        see the top of the file. row: `layout` of [("vit", ..), ("text", request), ("noise", ..)], the text left out in a tenth of the samples.
        Sequence: <|vision_start|> V features <|vision_end|> <|im_start|> request <|im_end|> <|vision_start|> G noisy latents <|vision_end|>.
        The loss is the flow's alone: no caption, no text-to-image and no image-to-text data, as understanding has weights of its own.

        detach (None: self.detach, set by trainable_parameters): the whole understanding stream is computed without a graph: features, embeddings, and in
        every layer its q, k, v, attention and MLP. So it costs no memory for the backward pass, and no gradient passes THROUGH it either, not even through the
        two markers of the painted image, which do attend to the latents. Merely freezing the weights (detach=False) leaves that path open and gives
        the generation expert slightly different gradients."""
        view = self.view(row, detach=self.detach if detach is None else detach)
        with view.grad(UND):
            context = self.embed(row["ids"], features, row["vit_grid"])  # (B, U, W): the image as seen, the request, two markers
        return self.flow_loss(context, view, latents, noise, u, count, row)

    def i2t_loss(self, ids, labels, features=None, vit_grid=None, count=None, **row):
        """Next-token cross entropy on the answers (labels (B, A): of the last A tokens), with the picture in the context; without it text only."""
        view = self.view(row, detach=self.detach)
        with view.grad(UND):
            hidden = self.language_model([self.embed(ids, features, vit_grid)], view)[0][0][:, -labels.shape[1]:]
            return linear_cross_entropy(hidden.flatten(0, 1), self.language_model.lm_head.weight, labels.flatten(), ignore_index=IGNORE, count=count)

    def forward(self, batch):
        """{part: tensors of precompute, collate and draw} -> {part: loss}, all parts in one forward."""
        losses = {}
        for part, row in batch.items():
            row = dict(row)
            cached = {k: row.pop(k) for k in list(row) if k.endswith(("moments", "posterior", "features", "patches"))}
            see = "source_" if part == "edit" else ""
            if part not in ("t2i", "text"):
                row["features"] = cached.get(see + "features")
                if row["features"] is None:
                    row["features"] = self.vit_model(cached[see + "patches"].to(self.connector.fc1.weight.dtype) / 127.5 - 1, row["vit_grid"])
            if part in ("i2t", "text"):
                losses[part] = self.i2t_loss(**row)
                continue
            row["latents"], row["u"] = self.sample_latents(cached["moments"], cached["posterior"]), row["u"][:, None]
            if part == "edit":  # the picture to be edited is an image at time 0
                source = self.sample_latents(cached["source_moments"], cached["source_posterior"])
                row["latents"], row["noise"] = torch.cat([source, row["latents"]], 1), torch.cat([source, row["noise"]], 1)
                row["u"] = torch.cat([torch.full_like(row["u"], -math.inf), row["u"]], 1)
            losses[part] = self.reca_loss(**row) if part == "recon" else self.t2i_loss(**row)
        return losses

    def sample_latents(self, moments, noise):
        """moments (B, G, 2*P), noise (B, G, P) -> latents of the autoencoder's distribution, scaled."""
        mean, logvar = moments.float().chunk(2, -1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.vae.config.shift) * self.vae.config.scale

    # ---- samplers

    @torch.no_grad()
    def read(self, samples, features=None, latents=None):
        """Reads contexts (lists of segments, see `layout`) into a Cache; features (B, V, width) and clean latents (B, G, P) are those of its images."""
        device, count = self.llm2vae.weight.device, sum(s[0] == "clean" for s in max(samples, key=len))
        row = {k: v.to(device) for k, v in layout(self.config, samples).items()}
        streams = [self.embed(row["ids"], features, row.get("vit_grid"))]
        if "gen_pos" in row:
            t = torch.zeros(len(samples), count, device=device)
            streams.append(self.embed_latents(latents, t, row["gen_image"], row["gen_grid"]).to(streams[0].dtype))
        return Cache(self.language_model(streams, self.view(row), keep=True)[1], row["start"], row["rope"])

    @torch.no_grad()
    def sample(self, cache, noise, grid, cfg=1.0, cfg_image=1.0, steps=None, shift=None, interval=None, renorm="global", renorm_min=0.0, trace=None):
        """Integrates the flow from noise (B, h*w, P) to latents of a grid (h, w).

        cache: B rows of full context; if cfg > 1, B more without the last text; if cfg_image > 1 too, B more without images. `steps` points in time are
        steps - 1 evaluations. Guidance holds in `interval` (low, high]. renorm: global, channel or text_channel (see `guide`). trace: a list that
        collects (x, velocity) of every step. All branches of a step are one forward; the cached context is never computed again."""
        c, B, n = self.config, len(noise), noise.shape[1]
        steps, shift, (low, high) = steps or c.steps, shift or c.shift, interval or c.interval
        branches = 1 if cfg <= 1 else 2 if cfg_image <= 1 else 3
        past, device, keys = cache.kv[0][0].shape[2], noise.device, cache.kv[0][0].shape[2] + n + 2
        rows = []
        for B_now in {B, branches * B}:
            same = lambda t, m: t[:B_now, None].expand(-1, m)
            row = {"und_pos": same(cache.rope, 2), "gen_pos": same(cache.rope, n), "gen_image": torch.zeros(B_now, n, dtype=torch.long, device=device),
                   "gen_grid": grid_ids(*grid, c.max_latent_size, device).expand(B_now, -1)}
            for name, m in (("und", 2), ("gen", n)):
                row[name + "_lo"], row[name + "_hi"] = same(cache.start, m), torch.full((B_now, m), keys, device=device)
            und = self.embed(torch.tensor([c.special[2:]], device=device)).expand(B_now, -1, -1)
            rows.append((und, row, self.view(row, past), [(k[:B_now], v[:B_now]) for k, v in cache.kv]))
        plain, guided = min(rows, key=lambda r: len(r[0])), max(rows, key=lambda r: len(r[0]))
        time = [tau * shift / (1 + (shift - 1) * tau) for tau in (1 - i / (steps - 1) for i in range(steps))]
        x = noise.float()
        for t, after in zip(time, time[1:]):
            und, row, view, kv = guided if low < t <= high else plain
            m = len(und) // B
            v = self.velocity(und, x.repeat(m, 1, 1), torch.full((m * B, 1), t, device=device), row, view, kv)
            if m > 1:
                v = guide(*v.chunk(m), cfg=cfg, cfg_image=cfg_image, renorm=renorm, renorm_min=renorm_min)
            if trace is not None:
                trace.append((x, v))
            x = x - v * (t - after)
        return x

    def paint(self, contexts, size, cfg, cfg_image, generator, temperature=None, features=None, latents=None, **how):
        """contexts: full, without the last text, without images (the latter two only read if they are needed) -> images (B, 3, *size)."""
        contexts = contexts[:1 if cfg <= 1 else 2 if cfg_image <= 1 else 3]
        B, grid, m, device = len(contexts[0]), (size[0] // self.stride, size[1] // self.stride), len(contexts), self.llm2vae.weight.device
        cache = self.read(sum(contexts, []), *(x if x is None else x.repeat(m, 1, 1) for x in (features, latents)))
        noise = self.randn(B, grid[0] * grid[1], self.llm2vae.out_features, generator=generator).to(device) * (1.0 if temperature is None else temperature)
        return self.decode_latents(self.sample(cache, noise, grid, cfg, cfg_image, **how), grid).clamp(-1, 1)

    def randn(self, *shape, generator=None):
        return torch.randn(shape, generator=generator, device="cpu" if generator is None else generator.device)

    @torch.no_grad()
    def generate(self, prompts, cfg=None, steps=None, temperature=None, generator=None, size=None, think=False, **how):
        """Prompts -> images (B, 3, H, W) in [-1, 1]. size: pixels, one number or (H, W); temperature scales the noise it starts from. think: first writes a
        plan and reads it too. how: shift, interval, renorm, renorm_min of `sample`. The guided-away context is empty, not an empty text."""
        before = [("text", self.encode(THINK_PAINT))] * think
        full = [[*before, ("text", self.encode(p))] for p in prompts]
        bare = [before for _ in prompts]
        if think:
            full = self.think(full)
        size = size or self.config.image_size
        return self.paint([full, bare], (size, size) if isinstance(size, int) else size, self.config.cfg if cfg is None else cfg, 1.0, generator, temperature,
                          steps=steps, **how)

    @torch.no_grad()
    def reconstruct(self, images, prompt=None, cfg=None, steps=None, temperature=None, generator=None, **how):
        """Images (B, 3, H, W) through the model's own understanding and back: the context is what SigLIP sees of them at reca_resize and a request."""
        patches, grid = self.patches(images, self.config.reca_resize)
        text = ("text", self.encode(prompt or "Describe the image in detail."))
        full, bare = [[("vit", grid), text]] * len(images), [[("vit", grid)]] * len(images)
        return self.paint([full, bare], images.shape[2:], self.config.cfg if cfg is None else cfg, 1.0, generator, temperature,
                          features=self.features(patches, grid), steps=steps, **{"interval": (0.0, 1.0), **how})

    @torch.no_grad()
    def edit(self, images, instructions, cfg=None, cfg_image=None, steps=None, temperature=None, generator=None, think=False, **how):
        """Images (B, 3, H, W) and what to change -> images. Each is read twice, as clean latents, then by SigLIP; without text and without images are the two
        contexts that guidance leads away from."""
        c = self.config
        images = self.resized(images, c.vae_resize, self.stride)
        patches, vit = self.patches(images, c.vit_resize)
        grid = images.shape[2] // self.stride, images.shape[3] // self.stride
        moments = self.vae.moments(images.to(self.vae.encoder.conv_in.weight.dtype)).chunk(2, 1)
        moments = torch.cat([self.latent_tokens(m) for m in moments], -1)
        noise = self.randn(len(images), grid[0] * grid[1], self.llm2vae.out_features, generator=generator).to(moments.device)
        seen = dict(features=self.features(patches, vit), latents=self.sample_latents(moments, noise))
        before = [("text", self.encode(THINK_PAINT))] * think
        pictures = [*before, ("clean", grid), ("vit", vit)]
        texts = [("text", self.encode(s)) for s in instructions]
        full = [[*pictures, text] for text in texts]
        if think:
            full = self.think(full, **seen)
        return self.paint([full, [pictures] * len(texts), [[*before, text] for text in texts]], images.shape[2:], c.cfg if cfg is None else cfg,
                          c.cfg_image if cfg_image is None else cfg_image, generator, temperature, **seen, steps=steps, **{"interval": (0.0, 1.0), "renorm": "text_channel", **how})

    @torch.no_grad()
    def write(self, cache, max_new_tokens, temperature=0.0, generator=None, trace=None):
        """Continues contexts with an answer: -> ids (B, n) int64, each row up to its <|im_end|> and whatever follows. temperature 0 is greedy. trace: a list
        that collects the logits (B, vocab_size) of every step."""
        kv, rope, written = cache.kv, cache.rope, []
        token = torch.full_like(rope, self.config.special[0])[:, None]  # (B, 1)
        over = torch.zeros_like(token, dtype=torch.bool)
        for i in range(max_new_tokens):
            keys = kv[0][0].shape[2]
            row = {"und_pos": rope[:, None] + i, "und_lo": cache.start[:, None], "und_hi": torch.full_like(token, keys + 1)}
            hidden, kv = self.language_model([self.embed(token)], self.view(row, keys), kv, keep=True)
            logits = self.language_model.lm_head(hidden[0][:, -1]).float()
            if trace is not None:
                trace.append(logits)
            if temperature > 0:
                p = torch.softmax(logits / temperature, -1)
                token = torch.multinomial(p.to("cpu" if generator is None else generator.device), 1, generator=generator).to(p.device)
            else:
                token = logits.argmax(-1, keepdim=True)
            written.append(token)
            over |= token == self.config.special[1]
            if over.all():
                break
        return torch.cat(written, 1)

    def texts(self, ids):
        """Rows of ids, each up to its first <|im_end|> -> strings."""
        rows = [row[:row.index(self.config.special[1])] if self.config.special[1] in row else row for row in ids.tolist()]
        return [self.tokenizer.decode(row).strip() for row in rows]

    def think(self, samples, max_new_tokens=1000, **seen):
        """The contexts, each with what the model writes next as one more text."""
        thoughts = self.texts(self.write(self.read(samples, **seen), max_new_tokens))
        return [[*sample, ("text", self.encode(t))] for sample, t in zip(samples, thoughts)]

    @torch.no_grad()
    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, think=False):
        """Images (B, 3, H, W) and a question for each -> answers (strings). Greedy at temperature 0. think: the answer comes with its reasoning."""
        patches, grid = self.patches(images, self.config.vit_resize)
        before = [("text", self.encode(THINK_ANSWER))] * think
        cache = self.read([[*before, ("vit", grid), ("text", self.encode(q))] for q in questions], self.features(patches, grid))
        return self.texts(self.write(cache, max_new_tokens, temperature, generator))

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="bagel-7b-mot", tokenizer_path=None, tokenizer=None, device="cpu", dtype=None):
        """path: ema.safetensors (BAGEL-7B-MoT), model_bf16.safetensors (BAGEL-RecA), or the folder of one of them; tokenizer_path: ae.safetensors (default:
        beside it). Keys and shapes must match exactly. The model is built without memory and each tensor goes straight from the file to `device` in
        `dtype`. None: float32, except that on a GPU what RecA leaves frozen stays as stored (bfloat16): 6.5 B masters and 8 B more, not 14.6 B, in float32.
        The autoencoder is always float32. Raises FileNotFoundError, and ValueError with a table of wrong keys."""
        if os.path.isdir(path):
            found = [n for n in ("ema.safetensors", "model_bf16.safetensors") if os.path.exists(os.path.join(path, n))]
            if len(found) != 1:
                raise FileNotFoundError(f"{path}: holds {' and '.join(found) or 'neither ema.safetensors nor model_bf16.safetensors'}: name the file to load")
            path = os.path.join(path, found[0])
        tokenizer_path = tokenizer_path or os.path.join(os.path.dirname(path), "ae.safetensors")
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer)
        frozen = torch.float32 if dtype is None and torch.device(device).type == "cpu" else dtype
        own = {k: v for k, v in model.state_dict().items() if not k.startswith("vae.")}
        stream(model, path, own, device, lambda name, stored: (dtype or torch.float32) if is_generation(name) else frozen or stored)
        stream(model.vae, tokenizer_path, model.vae.state_dict(), device, lambda name, stored: torch.float32)
        for table in (model.latent_pos_embed, model.vit_pos_embed):
            table.compute(device)
        return model


def stream(module, path, own, device, dtype):
    """Loads a .safetensors file into a module on the meta device, tensor by tensor. own: the keys it must have; dtype(name, dtype in the file) -> dtype."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such weight file")
    try:
        file = safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        raise ValueError(f"{path}: not a complete safetensors file ({e}; {os.path.getsize(path):,} bytes on disk): copy or download it again") from None
    with file as f:
        check_keys(own, {k: torch.empty(f.get_slice(k).get_shape(), device="meta") for k in f.keys()}, path)
        for name in own:
            t, (owner, _, last) = f.get_tensor(name), name.rpartition(".")
            t, owner = t.to(dtype(name, t.dtype)), module.get_submodule(owner)
            if last in owner._parameters:
                t = nn.Parameter(t, owner._parameters[last].requires_grad)
            setattr(owner, last, t)


def guide(v, v_text, v_image=None, cfg=1.0, cfg_image=1.0, renorm="global", renorm_min=0.0):
    """Classifier-free guidance of velocities (B, n, P): v with the full context, without the last text, without images.

    g = v_text + cfg (v - v_text), then g = v_image + cfg_image (g - v_image). Guidance makes velocities longer, so they are shrunk by |v| / |g|, between
    renorm_min and 1: of each picture (global), of each token (channel), or of each token before the images' guidance (text_channel)."""
    def shrink(g, dim):
        norm = lambda x: x.flatten(1).norm(dim=1)[:, None, None] if dim is None else x.norm(dim=dim, keepdim=True)
        return g * (norm(v) / (norm(g) + 1e-8)).clamp(renorm_min, 1.0)

    if renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"renorm {renorm!r}: expected global, channel or text_channel")
    g = v_text + cfg * (v - v_text)
    g = shrink(g, -1) if renorm == "text_channel" else g
    if v_image is not None:
        g = v_image + cfg_image * (g - v_image)
    return g if renorm == "text_channel" else shrink(g, None if renorm == "global" else -1)


Model = Bagel
