"""BAGEL: a transformer with two complete sets of weights that reads, sees and, by rectified flow, paints; and its RecA
post-training (arXiv 2509.07295).

Mixture of transformers: each layer holds an understanding expert (named as in Qwen2.5) and a generation expert
(`_moe_gen`). There is no router; the TYPE of a token decides. Text, SigLIP features and all special tokens, also the
two that frame a painted image, go to understanding; latents go to generation. Both attend in one sequence: text is
causal, and the tokens of an image see each other and everything before them, and share one rotary position.

    image --SigLIP--> features --connector--> | understanding expert | --lm_head--> answer
    text, special tokens ----> embedding ---> |   shared attention   |
    latents, 2x2 to a token, + time + place > |  generation expert   | --llm2vae--> velocity noise - image
                                                                                     at x_t = (1 - t) image + t noise

RecA (`Bagel.reca_loss`): the SigLIP features of an image, taken at the smallest size, are the prompt from which the
SAME image is painted. Only the generation expert learns.

Conventions. B rows, U understanding and G generation tokens per row, two tensors through all layers. Only keys and
values are joined, padding first, so ordered by `layout` that those which a query sees are an interval. W is the width
of the model, P the numbers per latent token, V the SigLIP features of a row. Images are (B, 3, H, W) in [-1, 1].
Everything random is an argument: `noise` (B, G, P), and `u` (B, images), normal, which gives each image its flow time;
-inf (t = 0) where it is clean context.
"""
import math
import os
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import vision_encoder as vision
from checkpoint import cast, check_keys, load_strict, read_weights, remark, write_safetensors
from custom_kernels import attention, attention_plan, flow_loss_rows, linear_cross_entropy, rms_norm
from custom_kernels.watch import boxes, watching
from image_tokenizer import TOKENIZERS, Autoencoder, AutoencoderConfig

IGNORE = -100  # label of a position that is not trained
UND, GEN = EXPERTS = ("", "_moe_gen")  # endings of the two experts' published names

# ---------------------------------------------------------------------------------------------------------------------
# configurations and recipes

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
    # <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>; where a text tokenizer is given, its ids replace these
    special: tuple = (151644, 151645, 151652, 151653)
    vit: vision.SigLIPConfig = field(default_factory=lambda: vision.VISION_ENCODERS["siglip-so400m-14-980"])
    vae: AutoencoderConfig = field(default_factory=lambda: TOKENIZERS["flux"])
    latent_patch_size: int = 2
    max_latent_size: int = 64  # rows and columns of the table of latent places
    image_size: int = 1024  # pixels, training and default of the sampler
    vae_resize: tuple = (1024, 512)  # largest long, smallest short side of a picture that is edited or reconstructed,
    vit_resize: tuple = (980, 224)  # ... of what SigLIP sees of it to answer or to edit,
    reca_resize: tuple = (224, 224)  # ... and as RecA's prompt: the smallest it knows, so there are no pixels to copy
    timestep_shift: float = 1.0  # in training: more than 1 favors times near noise
    max_prompt: int = 128  # text tokens, markers included, of a caption,
    max_request: int = 64  # ... of RecA's request or an instruction to edit,
    max_dialogue: int = 1024  # ... of a question and its answer
    flow_steps: int = 49  # passes through the model
    shift: float = 3.0  # in sampling: more than 1 spends more steps near noise
    cfg: float = 4.0
    cfg_image: float = 2.0  # editing only
    interval: tuple = (0.4, 1.0)  # (low, high] of the times that are guided, after the shift

CONFIGS = {
    "tiny": BagelConfig(vocab_size=1024, hidden_size=128, intermediate_size=224, num_layers=4, num_heads=4,
                        num_kv_heads=4, rope_theta=1e4, special=(1019, 1020, 1021, 1022),
                        vit=vision.VISION_ENCODERS["tiny-siglip"], vae=TOKENIZERS["tiny-kl"], latent_patch_size=1,
                        max_latent_size=6, image_size=48, vae_resize=(48, 48), vit_resize=(48, 48),
                        reca_resize=(48, 48), max_prompt=40, max_request=16, max_dialogue=64, flow_steps=24,
                        interval=(0.0, 1.0)),
    "bagel-7b-mot": BagelConfig(),
}

# Keys are train.py's flags; a missing key has the flag's default. After the base stage the understanding expert is
# frozen, so image-to-text data would teach nothing: i2t_weight 0. Published: 8 pictures on each of 8 GPUs, no
# accumulation (on 6 GPUs: --batch 48); the release's command averages (0.9999), its authors say that they did not.
# They count optimizer steps: 1,000, all inside the warm-up of the release's command, whose first step has rate 0.
PUBLISHED = dict(lr=4e-5, eps=1e-15, weight_decay=0.0, warmup=1000, warmup_from=0, schedule="constant", steps=1000,
                 batch=64, mix={"recon": 1.0, "i2t": 1.0, "t2i": 1.0}, i2t_weight=0.0, t2i_weight=0.0)
TINY = dict(lr=2e-4, muon_lr=0.005, steps=400, batch=96, i2t_weight=0.0)  # after the base stage of the tiny model
RECIPES = {
    "tiny": {
        # The encoder and its expert learn beside the drawing one; then this learns drawing alone, by the second command
        # of weights/README.md. Muon's decay keeps picture tokens from becoming so much larger than words that no block
        # can add to them. `words` teaches the encoder what is where, `uncond` the empty prompt.
        "base": dict(lr=2e-3, muon_lr=0.003, muon_decay=0.1, warmup=100, steps=4500, batch=48, drop=0.0, pool=40000,
                     mix={"t2i": 1.0, "uncond": 0.25, "i2t": 0.75, "edit": 0.5, "text": 0.25, "words": 0.5},
                     questions=4),
        # Captions stand beside RecA, as in model_mar.py; edits keep editing alive.
        "reca": dict(TINY, mix={"recon": 0.5, "t2i": 0.5, "edit": 0.25}),
        "sft": dict(TINY, mix={"t2i": 1.0, "edit": 0.25}),  # captions alone
        # RecA on a user's own images, which have no captions
        "plain": dict(lr=2e-4, steps=300, batch=96, mix=PUBLISHED["mix"], i2t_weight=0.0, t2i_weight=0.0),
    },
    "bagel-7b-mot": {"reca": PUBLISHED, "sft": dict(PUBLISHED, mix={"t2i": 1.0, "i2t": 1.0}, t2i_weight=1.0)},
}

# ---------------------------------------------------------------------------------------------------------------------
# blocks

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
    """x (B, N, c), index (B, K) -> the rows x[b, index[b]], (B, K, c). The backward of an embedding is a fast one."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(index + first, x.flatten(0, 1))

class RMSNorm(nn.RMSNorm):
    def forward(self, x):  # in float32, whatever the dtype of x and of the weight
        return rms_norm(x.float(), self.weight.float(), self.eps).to(x.dtype)

@dataclass
class View:
    """What all layers share of a row of tokens; lists have one entry per stream, understanding first."""
    rope: list  # (cos, sin)
    plans: list  # AttentionPlan: the keys that each query sees
    context_grad: float  # 0.0: the understanding stream is computed without a graph; 1.0: with one
    order: torch.Tensor = None  # (B, U+G) place in [understanding | generation] of each key in memory; None: the same

    def grad(self, expert):
        return torch.set_grad_enabled(torch.is_grad_enabled() and (expert == GEN or self.context_grad > 0))

class MoTLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        dim, W, inner = c.hidden_size // c.num_heads, c.hidden_size, c.intermediate_size
        kv = c.num_kv_heads * dim
        self.head_dim, self.self_attn = dim, nn.ModuleDict()
        for e in EXPERTS:
            self.self_attn.update({
                "q_proj" + e: nn.Linear(W, W), "k_proj" + e: nn.Linear(W, kv), "v_proj" + e: nn.Linear(W, kv),
                "o_proj" + e: nn.Linear(W, W, bias=False),
                "q_norm" + e: RMSNorm(dim, c.rms_norm_eps), "k_norm" + e: RMSNorm(dim, c.rms_norm_eps)})
            self.add_module("mlp" + e, nn.ModuleDict({
                "gate_proj": nn.Linear(W, inner, bias=False), "up_proj": nn.Linear(W, inner, bias=False),
                "down_proj": nn.Linear(inner, W, bias=False)}))
            self.add_module("input_layernorm" + e, RMSNorm(W, c.rms_norm_eps))
            self.add_module("post_attention_layernorm" + e, RMSNorm(W, c.rms_norm_eps))

    def forward(self, streams, view, past=None, wanted=EXPERTS):
        """streams: understanding (B, U, W) and, unless there is none, generation (B, G, W). past: keys and values of
        earlier tokens (2, B, kv_heads, n, dim), at whose end these are written. -> the streams (None for one that is
        not `wanted`), and keys and values of past and present in memory order."""
        attn, q, k, v = self.self_attn, [], [], []
        for e, x, rope in zip(EXPERTS, streams, view.rope):
            with view.grad(e):
                y = getattr(self, "input_layernorm" + e)(x)
                heads = {n: attn[n + "_proj" + e](y).unflatten(-1, (-1, self.head_dim)) for n in "vqk"}
                v.append(heads["v"])
                for n, to in (("q", q), ("k", k)):  # (B, T, heads, dim), normalized, then rotated, in float32
                    to.append(rotate(attn[n + "_norm" + e](heads[n].float()), *rope).to(heads[n].dtype))
        k, v = (torch.cat(t, 1) if len(t) > 1 else t[0] for t in (k, v))
        if view.order is not None:
            k, v = (pick(t.flatten(2), view.order).view_as(t) for t in (k, v))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, kv_heads, U+G, dim)
        if past is not None:
            past[..., -k.shape[2]:, :] = torch.stack([k, v])
            k, v = past
        out = []
        for e, x, query, plan in zip(EXPERTS, streams, q, view.plans):
            if e not in wanted:
                out.append(None)
                continue
            with view.grad(e):
                y = attention(query.transpose(1, 2), k, v, None, None, plan)
                x = x + attn["o_proj" + e](y.transpose(1, 2).flatten(2))
                y, mlp = getattr(self, "post_attention_layernorm" + e)(x), getattr(self, "mlp" + e)
                out.append(x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y)))
        return out, (k, v)

class MoT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(MoTLayer(c) for _ in range(c.num_layers)),
            **{"norm" + e: RMSNorm(c.hidden_size, c.rms_norm_eps) for e in EXPERTS}})
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)  # not tied

    def forward(self, streams, view, past=None, wanted=EXPERTS, keep=False):
        """-> the wanted streams after the final norm, None for the other; with keep, also keys and values per layer.
        Nobody attends to the last layer's output, so there only what is wanted is computed."""
        layers, cache = self.model["layers"], []
        for i, layer in enumerate(layers):
            streams, kv = layer(streams, view, past and past[i], wanted if layer is layers[-1] else EXPERTS)
            if keep:
                cache.append(kv)
        out = []
        for e, x in zip(EXPERTS, streams):
            with view.grad(e):
                out.append(x if x is None else self.model["norm" + e](x))
        return out, cache

class TimeEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def features(self, t):
        angle = t.float()[..., None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        return torch.cat([angle.cos(), angle.sin()], -1)  # cosines first

    def forward(self, t):  # flow times (...) in [0, 1], not in 0..1000 -> (..., W)
        return self.mlp(self.features(t).to(self.mlp[0].weight.dtype))

def guide(v, v_text, v_image=None, cfg=1.0, cfg_image=1.0, renorm="global", renorm_min=0.0):
    """Classifier-free guidance of velocities (B, n, P) with the full context, without the last text, without images:
    g = v_text + cfg (v - v_text), then g = v_image + cfg_image (g - v_image). This makes velocities longer, so they are
    shrunk by |v| / |g|, between renorm_min and 1: of each picture ("global"; the published sampler takes the norm over
    a batch), of each token ("channel"), or of each token before images guide ("text_channel")."""
    if renorm not in ("global", "channel", "text_channel"):
        raise ValueError(f"renorm {renorm!r}: expected global, channel or text_channel")

    def shrink(g):
        dims = (1, 2) if renorm == "global" else -1
        long, short = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (g, v))
        return g * (short / (long + 1e-8)).clamp(renorm_min, 1.0)

    g = v_text + cfg * (v - v_text)
    g = shrink(g) if renorm == "text_channel" else g
    g = g if v_image is None else v_image + cfg_image * (g - v_image)
    return g if renorm == "text_channel" else shrink(g)

# ---------------------------------------------------------------------------------------------------------------------
# prompts and layouts

# The published words for thinking before painting or answering, a text of their own in front of everything.
_THINK = ("You should first think about the {0} process in the mind and then {1}. \n"
          "The {0} process is enclosed within <think> </think> tags, i.e. <think> {0} process here </think> {2} here")
THINK_PAINT = _THINK.format("planning", "generate the image", "image")
THINK_ANSWER = _THINK.format("reasoning", "provide the user with the answer", "answer")

def layout(c, samples, pad_to=0):
    """Where the tokens of samples lie, one row for each, and what they see. A sample is a list of segments, in order:
        ("text", ids), ("answer", ids): <|im_start|> ids <|im_end|>, causal; an answer's ids and end are predicted
        ("cut", ids): an answer that goes on where the row ends, so without an end
        ("vit", (h, w)): h*w SigLIP tokens; ("clean", (h, w)), ("noise", (h, w)): latents as context, or to be painted.
            Each lies between two special tokens, bidirectional; noise comes last and takes up no rotary position.
    Rows are padded on the left to `pad_to` understanding tokens (0: the longest); ValueError if one has more.
    -> int64: ids (B, U), where vocab_size + j is the row's j-th SigLIP token; labels (B, U), only with answers, IGNORE
    where nothing is predicted; und_pos, und_lo, und_hi (B, U), gen_pos, gen_lo, gen_hi (B, G): rotary position and
    interval of the keys seen, empty for padding; gen_grid, gen_image, gen_noisy (B, G): place in the table of latents,
    number of the image in the row, 1 if to be painted; vit_grid (B, V); start, rope (B,): first key that is no padding,
    next rotary position; order (B, U+G): see View."""
    bos, eos, *markers = c.special
    rows = []
    for sample in samples:
        tokens, features = [], []  # tokens in the order of memory: expert, value, position, lo, hi, target, image
        rope = images = latents = 0
        for kind, content in sample:
            at = len(tokens)
            if kind in ("text", "answer", "cut"):
                ids = [bos, *content] if kind == "cut" else [bos, *content, eos]
                targets = [IGNORE] * len(ids) if kind == "text" else [*ids[1:], IGNORE]
                tokens += [(0, ids[i], rope + i, 0, at + i + 1, targets[i], 0) for i in range(len(ids))]
                rope += len(ids)
                continue
            grid = vision.grid_ids(*content, c.vit.positions if kind == "vit" else c.max_latent_size).tolist()
            end = at + 2 + len(grid)
            # both markers come first: inside a bidirectional block the order in memory is free
            tokens += [(0, marker, rope, 0, end, IGNORE, 0) for marker in markers]
            if kind == "vit":
                tokens += [(0, c.vocab_size + len(features) + i, rope, 0, end, IGNORE, 0) for i in range(len(grid))]
                features += grid
            else:
                tokens += [(1, place, rope, 0, end, kind == "noise", images) for place in grid]
                images, latents = images + 1, latents + len(grid)
            rope += kind != "noise"
        rows.append((tokens, features, rope, latents))

    tokens, features, rope, latents = zip(*rows)
    U, G, V = max(len(t) - n for t, n in zip(tokens, latents)), max(latents), max(len(grid) for grid in features)
    if pad_to and U > pad_to:
        raise ValueError(f"a row of {U} text and SigLIP tokens does not fit into pad_to = {pad_to}: shorten its text")
    U = max(U, pad_to)
    pads = [[(0, 0, 0, 0, 0, IGNORE, 0)] * (U - len(t) + n) + [(1, 0, 0, 0, 0, 0, 0)] * (G - n)
            for t, n in zip(tokens, latents)]
    start = torch.tensor([len(pad) for pad in pads])
    memory = torch.tensor([pad + t for pad, t in zip(pads, tokens)])  # (B, U+G, 7)
    memory[..., 3:5] += start[:, None, None] * (memory[..., 4:5] > 0)  # of all but padding, which sees nothing
    by_expert = memory[..., :1].argsort(dim=1, stable=True)
    und, gen = memory.take_along_dim(by_expert, 1).split([U, G], 1)
    out = {"start": start, "rope": torch.tensor(rope), "order": by_expert[..., 0].argsort(1),
           "vit_grid": torch.tensor([grid + [0] * (V - len(grid)) for grid in features])}
    out |= zip(("ids", "und_pos", "und_lo", "und_hi", "labels"), und[..., 1:].unbind(-1))
    out |= zip(("gen_grid", "gen_pos", "gen_lo", "gen_hi", "gen_noisy", "gen_image"), gen[..., 1:].unbind(-1))
    answers = any(kind in ("answer", "cut") for sample in samples for kind, _ in sample)
    wanted = {"gen": G, "vit": V, "labels": answers, "order": (out["order"].diff() != 1).any()}
    return {name: x.contiguous() for name, x in out.items() if wanted.get(name.split("_")[0], True)}

# Contexts that have been read. kv: per layer keys and values, each (B, kv_heads, n, dim); start, rope: see layout
Cache = namedtuple("Cache", "kv start rope")

# ---------------------------------------------------------------------------------------------------------------------
# the model

class Bagel(nn.Module):
    image_tokenizer = "vae"  # the frozen autoencoder's name, here and in the configuration
    encoders = ("vae", "vit_model")  # the submodules that precompute uses
    trace = None  # or a list, to which `paint` and `sample` add how a picture comes about

    def __init__(self, config, tokenizer=None):
        super().__init__()
        if tokenizer is not None:
            names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
            if missing := [s for s in names if s not in tokenizer.special]:
                raise ValueError(f"text tokenizer without {', '.join(missing)}: give Qwen2.5's (--text-tokenizer)")
            config = replace(config, special=tuple(tokenizer.special[s] for s in names))
        self.config, self.tokenizer, c = config, tokenizer, config
        P, W = c.vae.z_channels * c.latent_patch_size ** 2, c.hidden_size
        self.vae = Autoencoder(c.vae)  # always frozen
        self.language_model = MoT(c)
        self.vae2llm, self.llm2vae = nn.Linear(P, W), nn.Linear(W, P)
        self.time_embedder = TimeEmbedder(W)
        self.latent_pos_embed = vision.PositionTable(c.max_latent_size, W)
        self.vit_model = vision.SigLIPNaViT(c.vit)
        self.connector = nn.Sequential(OrderedDict(fc1=nn.Linear(c.vit.width, W), gelu=nn.GELU(approximate="tanh"),
                                                   fc2=nn.Linear(W, W)))
        self.vit_pos_embed = vision.PositionTable(c.vit.positions, W)
        self.stride = self.vae.stride * c.latent_patch_size  # pixels per latent token and side
        self.text_limit = {"t2i": c.max_prompt, "uncond": c.max_prompt, "recon": c.max_request, "edit": c.max_request,
                           "i2t": c.max_dialogue, "text": c.max_dialogue}  # text tokens of a row, markers included
        self.trainable_parameters("base")
        if not self.llm2vae.weight.is_meta:
            self.init_weights()
        self.trainable_parameters("reca")

    @torch.no_grad()
    def init_weights(self):
        """From scratch: N(0, 0.02) in the transformer, whose generation expert starts as a copy of the other; velocity
        0. What is added to the position tables (amplitude 1) keeps PyTorch's own, larger values, and biases take away
        the tables' mean over a picture, which would drown what was seen."""
        own = dict(self.language_model.named_parameters())
        for name, p in own.items():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            p.copy_(own[name.replace(GEN, UND)])
        nn.init.zeros_(self.llm2vae.weight)
        vit, side = self.vit_side, self.config.image_size // self.stride
        self.connector.fc2.bias.sub_(self.vit_pos_embed(vision.grid_ids(vit, vit, self.vit_pos_embed.side)).mean(0))
        self.vae2llm.bias.sub_(self.latent_pos_embed(vision.grid_ids(side, side, self.latent_pos_embed.side)).mean(0))

    # ---- losses

    def reca_loss(self, features, latents, noise, u, context_grad=None, count=None, **row):
        """Reconstruction alignment: what SigLIP saw of an image at its smallest size is the prompt for painting it. The
        loss is the rectified flow's: no captions, and no image-to-text data, as understanding has weights of its own.

        features (B, V, width): SigLIP's of the image at reca_resize, never dropped. latents (B, G, P): the same image
        at full size. noise (B, G, P), u (B, 1): see the top of the file. row: `layout` of <|vision_start|> V features
        <|vision_end|> <|im_start|> request <|im_end|> <|vision_start|> G latents <|vision_end|>, where a tenth of the
        samples have no request. count: what the sum over tokens is divided by (None: their number).

        context_grad (None: self.context_grad): with 0.0 the understanding stream is computed without a graph from end
        to end. No gradient passes THROUGH it, not even through the two markers of the painted image, which do attend to
        the latents. 1.0 leaves that path open: even where the stream's weights are frozen, the generation expert gets
        slightly different gradients, and the backward pass more work."""
        view = self.view(row, context_grad=context_grad)
        with view.grad(UND):
            context = self.embed(row["ids"], features, row.get("vit_grid"))  # (B, U, W): picture, request, markers
        t = self.flow_time(u)  # (B, 1)
        at = t.gather(1, row["gen_image"])[..., None]  # (B, G, 1)
        v = self.velocity(context, (1 - at) * latents + at * noise, t, row, view)
        rows = flow_loss_rows(v.flatten(0, 1), latents.flatten(0, 1), noise.flatten(0, 1)) * row["gen_noisy"].flatten()
        return rows.sum() / (row["gen_noisy"].sum() if count is None else count)  # (v - (noise - latents))^2

    def t2i_loss(self, latents, noise, u, features=None, count=None, **row):
        """The same with another prompt: a caption; or, in editing, the source picture and an instruction: features are
        the source's, and latents, noise (B, 2 G, P) and u (B, 2) begin with it."""
        return self.reca_loss(features, latents, noise, u, count=count, **row)

    def i2t_loss(self, ids, labels, features=None, vit_grid=None, count=None, **row):
        """Cross entropy of answers, labels (B, U), with the picture in the context or without one."""
        view = self.view(row)
        with view.grad(UND):
            x = self.language_model([self.embed(ids, features, vit_grid)], view)[0][0].flatten(0, 1)  # (B*U, W)
            return linear_cross_entropy(x, self.language_model.lm_head.weight, labels.flatten(), None, IGNORE, count)

    def flow_time(self, u):
        """Normal numbers -> times in [0, 1]: logit-normal, moved towards noise by timestep_shift; -inf -> 0."""
        s = torch.sigmoid(u.float())
        return self.config.timestep_shift * s / (1 + (self.config.timestep_shift - 1) * s)

    def velocity(self, context, x_t, t, row, view, past=None):
        """-> (B, G, P) float32: where the latents x_t are moving, towards noise."""
        gen = self.embed_latents(x_t, t, row["gen_image"], row["gen_grid"])
        return self.llm2vae(self.language_model([context, gen], view, past, wanted=(GEN,))[0][1]).float()

    def view(self, row, past=0, context_grad=None):
        """What the layers need of a row (tensors of `layout`) that follows `past` keys."""
        c, names = self.config, [name for name in ("und", "gen") if name + "_pos" in row]
        keys = past + sum(row[n + "_pos"].shape[1] for n in names)
        return View(rope=[rope_tables(row[n + "_pos"], c.hidden_size // c.num_heads, c.rope_theta) for n in names],
                    plans=[attention_plan(row[n + "_lo"], row[n + "_hi"], keys) for n in names],
                    context_grad=self.context_grad if context_grad is None else context_grad, order=row.get("order"))

    def embed(self, ids, features=None, vit_grid=None):
        """ids (B, U), SigLIP features (B, V, width) -> understanding tokens (B, U, W)."""
        n = self.config.vocab_size
        x = self.language_model.model.embed_tokens(ids.clamp(max=n - 1))
        if vit_grid is None:
            return x
        seen = self.connector(features.to(x.dtype)) + self.vit_pos_embed(vit_grid)
        return torch.where((ids >= n)[..., None], pick(seen, (ids - n).clamp(min=0)), x).to(x.dtype)

    def embed_latents(self, x_t, t, gen_image, gen_grid):
        """Latents x_t (B, G, P) of images at times t (B, images) -> generation tokens (B, G, W)."""
        x = self.vae2llm(x_t.to(self.vae2llm.weight.dtype)) + pick(self.time_embedder(t), gen_image)
        return (x + self.latent_pos_embed(gen_grid)).to(self.vae2llm.weight.dtype)

    def sample_latents(self, moments, noise):
        """moments (B, G, 2*P), noise (B, G, P) -> scaled latents; BAGEL always samples them, also at inference."""
        mean, logvar = moments.float().chunk(2, -1)
        return (mean + torch.exp(0.5 * logvar) * noise - self.vae.config.shift) * self.vae.config.scale

    def forward(self, batch):
        """{part: tensors of precompute, collate} -> {part: loss}. `source_` encodings are of a picture to be edited."""
        losses, own = {}, dict(recon=self.reca_loss, i2t=self.i2t_loss, text=self.i2t_loss, words=self.words_loss)
        for part, row in batch.items():
            row, source = dict(row), "source_" * ("source_moments" in row)
            row["features"] = row.get(source + "features")
            if "vit_grid" in row and source + "patches" in row:  # SigLIP trains along
                row["features"] = self.vit_model(row[source + "patches"] / 127.5 - 1, row["vit_grid"])
            if "noise" in row:
                moments = torch.cat([row[k] for k in ("source_moments", "moments") if k in row], 1)
                row["latents"] = self.sample_latents(moments, row["posterior"])
            losses[part] = own.get(part, self.t2i_loss)(**row)
        return losses

    # ---- samplers

    def sampling_steps(self, job):
        """How many steps the sampler of this name takes unless it is told."""
        return self.config.flow_steps

    @torch.no_grad()
    def sample(self, cache, noise, grid, cfg=1.0, cfg_image=1.0, steps=None, shift=None, interval=None, **how):
        """Integrates the flow from noise (B, h*w, P) to latents of a grid (h, w). cache: B full contexts; for guidance
        then B without the last text, and B without images. steps, shift, interval: see BagelConfig; how: `guide`."""
        c, (B, n, _), R, device = self.config, noise.shape, len(cache.rope), cache.rope.device
        steps, shift, (low, high) = steps or c.flow_steps, shift or c.shift, interval or c.interval
        past, kv = cache.kv[0][0].shape[2], [F.pad(torch.stack(layer), (0, 0, 0, 2 + n)) for layer in cache.kv]
        bounds = {"pos": cache.rope, "lo": cache.start, "hi": 0 * cache.rope + past + 2 + n, "image": 0 * cache.rope}
        row = {name + k: v[:, None].expand(R, m) for name, m in (("und_", 2), ("gen_", n)) for k, v in bounds.items()}
        row["gen_grid"] = vision.grid_ids(*grid, c.max_latent_size, device).expand(R, n)
        markers = self.embed(torch.tensor([c.special[2:]], device=device).expand(R, 2))
        branches = []
        for m in (B, R):  # without and with guidance
            rows = {k: v[:m] for k, v in row.items()}
            branches.append((markers[:m], rows, self.view(rows, past), [layer[:, :m] for layer in kv]))
        times = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / steps for i in range(steps + 1))]
        x = noise.to(device, torch.float32)
        for t, after in zip(times, times[1:]):
            context, rows, view, kv = branches[low < t <= high]
            m = len(context) // B
            with watching(self.trace is not None) as watch:
                v = self.velocity(context, x.repeat(m, 1, 1), torch.full((m * B, 1), t, device=device), rows, view, kv)
            v = v if m == 1 else guide(*v.chunk(m), cfg=cfg, cfg_image=cfg_image, **how)
            if watch:  # of each layer but the last the markers look first; x - v t is where a straight path would end
                looks = torch.stack([*watch.seen[1:-1:2], watch.seen[-1]]).mean(0)[0, :, :past]
                self.trace.append(dict(picture=self.decode_latents((x - v * t)[:1], grid), looks=looks, masked=None,
                                       title=f"time {t:.2f}"))
            x = x - v * (t - after)
        return x

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None, size=None, think=False, **how):
        """Captions -> images. size: pixels, int or (H, W). Guidance compares with no context, not an empty text."""
        size = size or self.config.image_size
        size = (size, size) if isinstance(size, int) else size
        return self.paint([], prompts, size, cfg, steps, temperature, generator, think=think, **how)

    def reconstruct(self, images, prompt="Describe the image in detail.", cfg=None, steps=None, temperature=1.0,
                    generator=None, **how):
        """images -> what the model paints when SigLIP shows it them at reca_resize, with a request."""
        features, grid = self.see(images, self.config.reca_resize)
        prompts = [prompt] * len(images)
        how = {"features": features, "interval": (0.0, 1.0), **how}
        return self.paint([("vit", grid)], prompts, images.shape[2:], cfg, steps, temperature, generator, **how)

    def edit(self, images, instructions, cfg=None, steps=None, temperature=1.0, generator=None, cfg_image=None,
             think=False, **how):
        """images and one instruction for each -> edited images in the size of vae_resize. Context: clean latents, what
        SigLIP sees, text; guidance leads away from pictures alone (cfg) and from text alone (cfg_image; None: the
        config's, but at most cfg, so that cfg 1 and a little more give nearly the same)."""
        images = self.resized(images, self.config.vae_resize, self.stride)
        features, vit = self.see(images, self.config.vit_resize)
        grid, moments = tuple(side // self.stride for side in images.shape[2:]), self.moments(images)
        generators, cfg = vision.row_generators(generator, len(images)), vision.guidance(cfg, self.config.cfg)
        latents = self.sample_latents(moments, self.randn(generators, moments.shape[1]))
        how = {"interval": (0.0, 1.0), "renorm": "text_channel", "features": features, "latents": latents, **how,
               "think": think, "cfg_image": min(cfg, self.config.cfg_image) if cfg_image is None else cfg_image}
        pictures = [("clean", grid), ("vit", vit)]
        return self.paint(pictures, instructions, images.shape[2:], cfg, steps, temperature, generators, **how)

    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, think=False):
        """images, or None, and a question for each -> answers; think: after reasoning aloud."""
        before, features = [("text", self.encode(THINK_ANSWER))] * think, None
        if images is not None:
            features, grid = self.see(images, self.config.vit_resize)
            before = [*before, ("vit", grid)]
        samples = [[*before, ("text", self.encode(question))] for question in questions]
        return self.write(samples, max_new_tokens, temperature, generator, features=features)

    @torch.no_grad()
    def context(self, samples, features=None, latents=None):
        """Reads samples (see `layout`), with features (B, V, width) and latents (B, G, P) of their images -> Cache."""
        row = {k: v.to(self.llm2vae.weight.device) for k, v in layout(self.config, samples).items()}
        streams = [self.embed(row["ids"], features, row.get("vit_grid"))]
        if latents is not None:
            t = torch.zeros(len(samples), 1 + int(row["gen_image"].max()), device=row["ids"].device)
            streams.append(self.embed_latents(latents, t, row["gen_image"], row["gen_grid"]))
        return Cache(self.language_model(streams, self.view(row), keep=True)[1], row["start"], row["rope"])

    def paint(self, pictures, texts, size, cfg, steps, temperature, generator, features=None, latents=None,
              think=False, cfg_image=1.0, **how):
        """An image of `size` (H, W) for each text, after `pictures`: segments that features and latents fill. think:
        writes a plan first, and reads it. temperature: factor on the first noise. how: see `sample`, `guide`."""
        if any(side % self.stride for side in size):
            raise ValueError(f"size {tuple(size)}: both sides must be multiples of {self.stride} pixels")
        cfg, grid = vision.guidance(cfg, self.config.cfg), tuple(side // self.stride for side in size)
        cfg_image, generators = vision.guidance(cfg_image, 1.0), vision.row_generators(generator, len(texts))
        before, texts = [("text", self.encode(THINK_PAINT))] * think, [("text", self.encode(text)) for text in texts]
        full = [[*before, *pictures, text] for text in texts]
        full = self.think(full, features=features, latents=latents) if think else full
        if self.trace is not None:
            self.trace.append(self.labels(full[0]))
        contexts = [full, [[*before, *pictures]] * len(full), [[*before, text] for text in texts]]
        contexts = contexts[:1 + (cfg > 1) + (cfg > 1 and cfg_image > 1)]
        seen = (x if x is None else x.repeat(len(contexts), 1, 1) for x in (features, latents))
        cache = self.context(sum(contexts, []), *seen)
        noise = temperature * self.randn(generators, grid[0] * grid[1])
        return self.decode_latents(self.sample(cache, noise, grid, cfg, cfg_image, steps, **how), grid).clamp(-1, 1)

    def labels(self, sample):
        """What stands in the slots of a context, see `layout`: pieces of text, places of a picture, "" for a marker."""
        out = []
        for kind, content in sample:
            words = [self.tokenizer.decode([i]) for i in content] if kind == "text" else []
            out += ["", *words, ""] if kind == "text" else ["", "", *boxes(*content)]
        return out

    def randn(self, generators, tokens):
        weight = self.llm2vae.weight
        return vision.draw_rows(torch.randn, generators, tokens, len(weight), device=weight.device)

    @torch.no_grad()
    def generate_tokens(self, cache, max_new_tokens, temperature=0.0, generator=None):
        """Continues contexts, greedily at temperature 0, until each row has had <|im_end|> -> ids (B, new)."""
        past, (bos, eos, *_), written = cache.kv[0][0].shape[2], self.config.special, []
        kv = [F.pad(torch.stack(layer), (0, 0, 0, max_new_tokens)) for layer in cache.kv]
        llm, generators = self.language_model, vision.row_generators(generator, len(cache.rope))
        token = torch.full_like(cache.rope, bos)[:, None]  # (B, 1)
        done = torch.zeros_like(token, dtype=torch.bool)
        while len(written) < max_new_tokens and not bool(done.all()):
            row = {"und_pos": cache.rope[:, None] + len(written), "und_lo": cache.start[:, None],
                   "und_hi": torch.full_like(token, past + 1)}
            hidden, _ = llm([self.embed(token)], self.view(row, past), [t[..., :past + 1, :] for t in kv])
            logits = llm.lm_head(hidden[0][:, -1]).float()  # (B, vocabulary)
            token = vision.next_token(logits, temperature, generators)  # (B, 1)
            written.append(token)
            done, past = done | (token == eos), past + 1
        return torch.cat(written, 1)

    def write(self, samples, max_new_tokens, temperature=0.0, generator=None, **seen):
        """What the model writes after each sample (see `context`), up to <|im_end|> -> strings."""
        tokens = self.generate_tokens(self.context(samples, **seen), max_new_tokens, temperature, generator)
        end = self.config.special[1]
        return [self.tokenizer.decode(row[:row.index(end)] if end in row else row) for row in tokens.tolist()]

    def think(self, samples, max_new_tokens=1000, **seen):
        """The samples, each with what the model writes next as one more text."""
        thoughts = self.write(samples, max_new_tokens, **seen)
        return [[*sample, ("text", self.encode(text))] for sample, text in zip(samples, thoughts)]

    def resized(self, images, limits, stride):
        """images (B, 3, H, W) in the size of bagel_size (bicubic; PIL would round to whole gray levels)."""
        w, h = vision.bagel_size(images.shape[3], images.shape[2], *limits, stride)
        if (h, w) == tuple(images.shape[2:]):
            return images
        return F.interpolate(images, (h, w), mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def see(self, images, limits):
        """images (B, 3, H, W) -> SigLIP features (B, h*w, width) of the resized images, and (h, w)."""
        images = self.resized(images, limits, self.config.vit.patch)
        grid = tuple(side // self.config.vit.patch for side in images.shape[2:])
        patches = vision.patchify(images, self.config.vit.patch).to(self.connector.fc1.weight.dtype)
        return self.vit_model(patches, vision.grid_ids(*grid, self.config.vit.positions, images.device)), grid

    def moments(self, images):
        """images (B, 3, H, W) -> mean and log variance of each latent token's numbers (B, G, 2*P)."""
        parts = self.vae.moments(images.to(self.vae.encoder.conv_in.weight.dtype)).chunk(2, 1)
        return torch.cat([vision.patchify(part, self.config.latent_patch_size) for part in parts], -1)

    def decode_latents(self, tokens, grid):
        """tokens (B, h*w, P) of a grid (h, w) -> images (B, 3, H, W), not clamped."""
        p = self.config.latent_patch_size
        x = tokens.unflatten(-1, (p * p, -1)).permute(0, 3, 2, 1).flatten(1, 2).unflatten(-1, grid)  # (B, C*p*p, h, w)
        return self.vae.decode(F.pixel_shuffle(x, p).to(self.vae.decoder.conv_in.weight.dtype)).float()

    # ---- what train.py needs

    def trainable_parameters(self, stage):
        """-> [(name, parameter)]: base all but the autoencoder, else what generates. Sets stage and requires_grad."""
        if stage not in ("base", "sft", "reca"):
            raise ValueError(f"stage {stage!r}: expected base, sft or reca")
        c, self.stage, self.context_grad = self.config, stage, float(stage == "base")
        self.vit_limits = c.vit_resize if stage == "base" else c.reca_resize  # of training pictures; their SigLIP rows:
        side, _ = vision.bagel_size(c.image_size, c.image_size, *self.vit_limits, c.vit.patch)
        self.vit_side = side // c.vit.patch
        for name, p in self.named_parameters():
            generation = GEN in name or name.startswith(("vae2llm.", "llm2vae.", "time_embedder."))
            p.requires_grad_(not name.startswith("vae.") if stage == "base" else generation)
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def no_decay(self, name, p):
        """The published recipe has no weight decay at all; one that is asked for spares vectors and embeddings."""
        return p.ndim < 2 or "embed_tokens" in name or "position_embedding" in name

    def blocks(self):
        """The modules that recomputation and sharding wrap."""
        return [*self.language_model.model["layers"], *self.vit_model.vision_model["encoder"]["layers"]]

    def preprocess(self, image, purpose):
        """PIL image -> (3, H, W) in [-1, 1], in its proportions as published; for training its center, as a square."""
        c = self.config
        if purpose == "answer":
            return vision.to_pixels(vision.bagel_resize(image, *c.vit_resize, c.vit.patch))
        if purpose in ("edit", "reconstruct"):
            return vision.to_pixels(vision.bagel_resize(image, *c.vae_resize, self.stride))
        return vision.magvit_pixels(image, c.image_size)

    @torch.no_grad()
    def precompute(self, images):
        """images -> moments (N, G, 2*P), and features, or in base, where SigLIP trains, patches (uint8)."""
        if self.stage != "base":
            return {"moments": self.moments(images), "features": self.see(images, self.vit_limits)[0]}
        patch = self.config.vit.patch
        patches = vision.patchify(self.resized(images, self.vit_limits, patch), patch)
        return {"moments": self.moments(images), "patches": ((patches + 1) * 127.5).round().clamp(0, 255).byte()}

    def encode(self, text):
        """Text -> ids without markers. It may come from anywhere, so special strings in it are spelled out."""
        return self.tokenizer.encode_ordinary(text)

    def segments(self, part, sample, limit):
        """The texts of a sample as segments of `layout`, at most `limit` tokens: the turns of a dialogue that fit whole
        or, if not even the first does, as much of it as fits, without an end of the answer."""
        if part not in ("i2t", "text"):
            text = sample[{"recon": "prompt", "edit": "instruction"}.get(part, "caption")]
            return [] if sample.get("drop") else [("text", self.encode(text)[:max(0, limit - 2)])]
        segments, room = [], limit
        for question, answer in sample.get("turns") or [(sample["question"], sample["answer"])]:
            question, answer = self.encode(question), self.encode(answer)
            room -= len(question) + len(answer) + 4  # each has two markers
            if room < 0 and segments:
                break
            if room < 0:
                question = question[:max(0, limit - 3)]
                return [("text", question), ("cut", answer[:max(0, limit - 3 - len(question))])]
            segments += [("text", question), ("answer", answer)]
        return segments

    def collate(self, part, samples, generators, shared, pad_to=None):
        """Samples (dicts) -> tensors of `layout`, count of the targets; u, noise, posterior (B, G, P), row b drawn from
        generators[b]. Texts are cut to `pad_to` tokens (None: the config's maximum, 0: room for the longest)."""
        if part == "words":
            return {"words": vision.caption_words(self.tokenizer, [sample["caption"] for sample in samples])}
        limit = min(pad_to or self.text_limit[part], self.text_limit[part])
        vit, side = self.vit_side, self.config.image_size // self.stride
        see, clean = ("vit", (vit, vit)), ("clean", (side, side))
        paint = [] if part in ("i2t", "text") else [("noise", (side, side))]
        before = {"recon": [see], "i2t": [see], "edit": [clean, see]}.get(part, [])
        texts = [self.segments(part, sample, limit) for sample in samples]
        fixed = 2 * len(before + paint) + vit * vit * (see in before)  # tokens beside the text
        out = layout(self.config, [[*before, *text, *paint] for text in texts], 0 if pad_to == 0 else fixed + limit)
        if not paint:
            return {**out, "count": (out["labels"] != IGNORE).sum().float()}
        shapes = [(1,)] + [(side * side, self.llm2vae.out_features)] * (3 if clean in before else 2)
        draws = [[torch.randn(shape, generator=generator) for shape in shapes] for generator in generators]
        u, noise, posterior, *source = (torch.stack(draw) for draw in zip(*draws))
        if source:  # the picture to be edited comes first: its time is 0, so that its noise is not looked at
            u, noise = F.pad(u, (1, 0), value=-math.inf), F.pad(noise, (0, 0, side * side, 0))
            posterior = torch.cat([*source, posterior], 1)
        return {**out, "u": u, "noise": noise, "posterior": posterior, "count": out["gen_noisy"].sum().float()}

    # ---- published weights

    @classmethod
    def load_published(cls, path, config="bagel-7b-mot", tokenizer_path=None, vision_path=None, tokenizer=None,
                       device="cpu", dtype=None, prepare=None):
        """path: ema.safetensors (BAGEL-7B-MoT), model_bf16.safetensors (BAGEL-RecA) or the folder of one of them;
        tokenizer_path: ae.safetensors (None: the one beside it) -> model in eval mode, in `dtype` (None: float32; the
        autoencoder always). Raises FileNotFoundError, and ValueError with the keys that do not fit."""
        if vision_path:
            raise ValueError(f"--vision-ckpt {vision_path}: BAGEL's own file holds its vision encoder, leave this out")
        if os.path.isdir(path):
            files = {"ema.safetensors", "model_bf16.safetensors"}.intersection(os.listdir(path))
            if len(files) != 1:
                raise FileNotFoundError(f"{path}: {len(files)} of ema.safetensors, model_bf16.safetensors: name one")
            path = os.path.join(path, *files)
        with torch.device("meta"):
            model = cls(CONFIGS[config] if isinstance(config, str) else config, tokenizer)
        cast(model.parameters(), dtype or torch.float32)
        state, kind = read_weights(path), os.path.splitext(path)[1]
        what = path + f" (a {kind}; BAGEL's are ema.safetensors and ae.safetensors)" * (kind != ".safetensors")
        check_keys({k: t for k, t in model.state_dict().items() if not k.startswith("vae.")}, state, what)
        remark(what * (what != path))
        tables = [table.clone() for table in model.buffers()]  # of places; the file has them rounded
        model.vae.float()
        if prepare:
            prepare(model)
        tokenizer_path = tokenizer_path or os.path.join(os.path.dirname(path), "ae.safetensors")
        state |= {f"vae.{name}": t for name, t in read_weights(tokenizer_path).items()}
        load_strict(model, state, {"vae.": tokenizer_path, "": path}, device)
        for buffer, table in zip(model.buffers(), tables):
            buffer.copy_(table)
        return model.eval()

    def published_state(self):
        """{name: tensor} as ema.safetensors has it, bfloat16 on the CPU (meta stays meta): without the autoencoder."""
        return {name: t.to("meta" if t.is_meta else "cpu", torch.bfloat16) for name, t in self.state_dict().items()
                if not name.startswith("vae.")}

    def save_published(self, folder):
        """Writes folder/ema.safetensors (the folder exists) to stand among BAGEL-7B-MoT's files -> [path]. OSError."""
        path = f"{folder}/ema.safetensors"
        write_safetensors(path, self.published_state())
        return [path]

    # ---- base training from nothing

    def words_loss(self, words, patches, **_):
        """For a SigLIP that did not come pre-trained, see vision.words_loss."""
        side = math.isqrt(patches.shape[1])
        grid = vision.grid_ids(side, side, self.vit_pos_embed.side, patches.device)
        seen = self.connector(self.vit_model(patches / 127.5 - 1, grid))
        seen = seen + self.vit_pos_embed(grid).mean(0)  # without places: the connector's bias starts at minus this mean
        embeddings = self.language_model.model.embed_tokens.weight[:words.shape[1]]
        return vision.words_loss(seen, words, embeddings)

Model = Bagel
