"""Vision encoders: what the models see with. The understanding side of Show-o is `CLIPVision` (CLIP ViT-L/14-336), that of BAGEL
`SigLIPNaViT` (SigLIP so400m/14 with NaViT packing: pictures of any size side by side in one sequence). The tiny ones for 48x48 pictures
are the same two classes with small configs. Harmon has no encoder of its own here: it understands with its MAR encoder.

Both are pre-norm ViTs of one kind of block and differ in the activation, the patch embedding, what surrounds the blocks, and which layer
is read. Module names are the published state-dict keys. The preprocessing that belongs to the published weights (PIL image -> tensor) is
at the end.
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from custom_kernels import attention, attention_plan
from checkpoint import load_strict, read_weights


@dataclass
class CLIPConfig:
    width: int = 1024
    layers: int = 24  # blocks in the file
    skip_last: int = 1  # so many of them are never run: the features are the penultimate hidden state, as in LLaVA
    heads: int = 16
    mlp_width: int = 4096
    image_size: int = 336
    patch: int = 14
    eps: float = 1e-5


@dataclass
class SigLIPConfig:
    width: int = 1152
    layers: int = 26  # SigLIP has 27; BAGEL stores and runs 26
    heads: int = 16
    mlp_width: int = 4304
    patch: int = 14
    positions: int = 70  # rows and columns of the position table: pictures of up to 70*14 = 980 pixels a side
    eps: float = 1e-6


VISION_ENCODERS = {
    "clip-vit-large-patch14-336": CLIPConfig(),
    "siglip-so400m-14-980": SigLIPConfig(),
    # 48x48 pictures in 9 patches, one for each cell of the shape world. No block is stored without being run.
    "tiny-clip": CLIPConfig(width=128, layers=2, skip_last=0, heads=4, mlp_width=256, image_size=48, patch=16),
    "tiny-siglip": SigLIPConfig(width=128, layers=2, heads=4, mlp_width=256, patch=16, positions=6),
}


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


class EncoderLayer(nn.Module):
    def __init__(self, width, heads, mlp_width, eps, activation):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x, plan=None):
        """x (B, T, width); without a plan every row is one picture in which everything sees everything."""
        B, T, width = x.shape
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h).view(B, T, self.heads, -1).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        h = F.scaled_dot_product_attention(q, k, v) if plan is None else attention(q, k, v, None, None, plan)  # (B, heads, T, d)
        x = x + self.self_attn["out_proj"](h.transpose(1, 2).reshape(B, T, width))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


def encoder_layers(c, activation):
    return nn.ModuleList(EncoderLayer(c.width, c.heads, c.mlp_width, c.eps, activation) for _ in range(c.layers))


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


class CLIPEmbeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(c.width) * c.width ** -0.5)
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch, stride=c.patch, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch) ** 2 + 1, c.width)
        nn.init.normal_(self.position_embedding.weight, std=c.width ** -0.5)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, N, width), row by row
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class CLIPVision(nn.Module):
    """CLIP's vision tower as LLaVA and Show-o use it: patch features of the penultimate layer, no class token, no final norm."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vision_model = nn.ModuleDict({
            "embeddings": CLIPEmbeddings(c),
            "pre_layrnorm": nn.LayerNorm(c.width, eps=c.eps),  # the published spelling
            "encoder": nn.ModuleDict({"layers": encoder_layers(c, quick_gelu)}),
            "post_layernorm": nn.LayerNorm(c.width, eps=c.eps),  # in the file, not used
        })
        if c.skip_last == 0:  # from scratch: no parameters without a gradient
            del self.vision_model["post_layernorm"]

    @property
    def num_tokens(self):
        return (self.config.image_size // self.config.patch) ** 2

    def forward(self, pixels):
        """pixels (B, 3, image_size, image_size), normalised -> patch features (B, num_tokens, width), row by row."""
        c, m = self.config, self.vision_model
        if pixels.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"CLIPVision: pixels {tuple(pixels.shape)}, expected (B, 3, {c.image_size}, {c.image_size}): resize first")
        x = m["pre_layrnorm"](m["embeddings"](pixels))
        for layer in m["encoder"]["layers"][:c.layers - c.skip_last]:
            x = layer(x)
        return x[:, 1:]

    def load_published(self, path):
        """Loads `vision_model.*` of a CLIP checkpoint (file or folder), strictly; its text tower and projections are left out."""
        state = {k: v for k, v in read_weights(path).items() if k.startswith("vision_model.") and not k.endswith(".position_ids")}
        load_strict(self, state, f"CLIP vision tower from {path}")
        return self


def caption_words(tokenizer, captions):
    """Captions -> (n, vocabulary) float32: 1 where the caption has the id (special strings spelled out), see word_alignment."""
    words = torch.zeros(len(captions), tokenizer.vocab_size)
    for k, caption in enumerate(captions):
        words[k, tokenizer.encode_ordinary(caption)] = 1
    return words


def word_alignment(seen, words, embeddings, kind="contrast", scale=None, margin=0.3):
    """What CLIP and SigLIP bring from their pre-training, for encoders that start from nothing: the words of a picture's caption should find a place
    in it that looks like them. As the words are the language model's own embeddings, pictures and text come to be read alike.

    seen (B, A, D): picture tokens as the language model gets them. words (B, V): 1 where the caption has the word. embeddings (V, D). A word is as
    like a picture as it is (cosine) to the place that fits it best. -> a mean, 0-dim.
    "presence": is the word in this picture's caption or not, each for itself (SigLIP's sigmoid loss, arXiv 2303.15343, a word at a time; `scale`, 20, and
    `margin` are fixed). For captions that say everything. Words of all or none of the captions are not asked for.
    "contrast": cross entropy of a word over the pictures of the batch (FILIP's late interaction, arXiv 2111.07783; scale 10). For captions that leave
    things out. Words of more than half of the captions say nothing, nor do pictures without a caption."""
    everybody = words
    if dist.is_initialized() and dist.get_world_size() > 1:
        everybody = gather(words.contiguous(), gradient=False)
        if kind == "contrast":  # the other processes' pictures are in it too
            seen, words = gather(seen), everybody
    seen, embeddings = F.normalize(seen.float(), dim=-1), F.normalize(embeddings.float(), dim=-1)
    with torch.autocast(seen.device.type, enabled=False):  # these products stay float32
        likeness = torch.stack([x @ embeddings.T for x in seen.unbind(1)]).amax(0)  # (B, V): at the place that fits best
    share = everybody.mean(0)
    if kind == "presence":
        asked = ((share > 0) & (share < 1)).float().expand_as(words)
        loss = F.binary_cross_entropy_with_logits((scale or 20.0) * (likeness - margin), words, weight=asked, reduction="sum")
        return loss / asked.sum().clamp(min=1)
    words, likeness = words * (share < 0.5), (scale or 10.0) * likeness
    likeness = likeness.masked_fill(words.sum(1, keepdim=True) == 0, -1e4)
    return -(words * likeness.log_softmax(0)).sum() / words.sum().clamp(min=1)


def gather(x, gradient=True):
    """The global batch of a tensor. Gradients reach this process's own rows, scaled up for the mean that DDP will take."""
    n, parts = dist.get_world_size(), [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    if gradient:
        parts[dist.get_rank()] = x * n - (x * (n - 1)).detach()
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP


def patchify(images, patch):
    """images (..., C, H, W) -> (..., H/patch * W/patch, patch*patch*C): patches row by row, inside a patch (row, column, channel)."""
    *lead, C, H, W = images.shape
    if H % patch or W % patch:
        raise ValueError(f"patchify: {H}x{W} pixels cannot be cut into {patch}x{patch} patches: resize the picture to multiples of {patch}")
    x = images.reshape(*lead, C, H // patch, patch, W // patch, patch)
    n = len(lead)
    x = x.permute(*range(n), n + 1, n + 3, n + 2, n + 4, n)  # (..., h, w, patch, patch, C)
    return x.reshape(*lead, (H // patch) * (W // patch), patch * patch * C)


def grid_ids(rows, columns, stride, device=None):
    """Position ids (rows*columns,) of a grid in the top left corner of a table with `stride` columns: row * stride + column."""
    if max(rows, columns) > stride:
        raise ValueError(f"grid_ids: a grid of {rows}x{columns} does not fit the {stride}x{stride} position table: shrink the picture")
    return (torch.arange(rows, device=device)[:, None] * stride + torch.arange(columns, device=device)).flatten()


class SigLIPNaViT(nn.Module):
    """SigLIP's vision tower with a linear patch embedding and packing, as in BAGEL: all layers and the final norm; no pooling, no class
    token."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"patch_embedding": nn.Linear(3 * c.patch ** 2, c.width),
                                         "position_embedding": nn.Embedding(c.positions ** 2, c.width)}),
            "encoder": nn.ModuleDict({"layers": encoder_layers(c, gelu_tanh)}),
            "post_layernorm": nn.LayerNorm(c.width, eps=c.eps),
        })
        nn.init.normal_(self.vision_model["embeddings"]["position_embedding"].weight, std=c.width ** -0.5)

    def pack(self, images):
        """List of pictures (3, H, W), normalised, of any sizes -> patches (N, patch*patch*3), position ids (N,), patches per picture."""
        c = self.config
        patches = [patchify(image, c.patch) for image in images]
        ids = [grid_ids(i.shape[1] // c.patch, i.shape[2] // c.patch, c.positions, i.device) for i in images]
        return torch.cat(patches), torch.cat(ids), torch.tensor([len(p) for p in patches], device=patches[0].device)

    def forward(self, patches, position_ids, seqlens=None):
        """Pictures of one size: patches (B, N, patch*patch*3), position_ids (N,) or (B, N) -> (B, N, width).
        Packed: patches (N, patch*patch*3), position_ids (N,), seqlens = patches per picture -> (N, width); pictures see only themselves."""
        m = self.vision_model
        x = m["embeddings"]["patch_embedding"](patches) + m["embeddings"]["position_embedding"](position_ids)
        plan = None
        if seqlens is not None:
            total = len(patches)
            hi = torch.repeat_interleave(seqlens.cumsum(0), seqlens, output_size=total)  # output_size: no question to the GPU
            lo = hi - torch.repeat_interleave(seqlens, seqlens, output_size=total)
            plan, x = attention_plan(lo[None], hi[None], total), x[None]
        for layer in m["encoder"]["layers"]:
            x = layer(x, plan)
        x = m["post_layernorm"](x)
        return x if seqlens is None else x[0]
