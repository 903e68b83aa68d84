"""Vision encoders: what the models see with. The understanding side of Show-o is `CLIPVision` (CLIP ViT-L/14-336), that
of BAGEL `SigLIPNaViT` (SigLIP so400m/14 for pictures of any size). The tiny ones for 48x48 pictures are the same two
classes with small configs. Harmon has no encoder of its own here: it understands with its MAR encoder.

Both are pre-norm ViTs of one kind of block. Module names are the published state-dict keys. The preprocessing that
belongs to the published weights (PIL image -> tensor) is at the end, with what the samplers of all models share.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps

from custom_kernels.products import sdpa

# ---------------------------------------------------------------------------------------------------------------------
# configurations

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

# ---------------------------------------------------------------------------------------------------------------------
# the block

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)

class EncoderLayer(nn.Module):
    def __init__(self, width, heads, mlp_width, eps, activation):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x):
        """x (B, T, width): every row is one picture, in which everything sees everything."""
        B, T, width = x.shape
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](h).view(B, T, self.heads, -1).transpose(1, 2)  # (B, heads, T, width / heads)
                   for name in ("q_proj", "k_proj", "v_proj"))
        h = sdpa(q, k, v)
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
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight  # (B, 1 + N, width)

class CLIPVision(nn.Module):
    """CLIP's vision tower (arXiv 2103.00020) as LLaVA and Show-o use it: patch features of the penultimate layer, no
    class token, no final norm."""

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
        """pixels (B, 3, image_size, image_size), normalized -> patch features (B, num_tokens, width), row by row.
        Raises ValueError for pictures of another size."""
        c, m = self.config, self.vision_model
        if pixels.shape[1:] != (3, c.image_size, c.image_size):
            raise ValueError(f"CLIPVision: pixels {tuple(pixels.shape)}, expected "
                             f"(B, 3, {c.image_size}, {c.image_size}): resize first")
        x = m["pre_layrnorm"](m["embeddings"](pixels))
        for layer in m["encoder"]["layers"][:c.layers - c.skip_last]:
            x = layer(x)
        return x[:, 1:]

# ---------------------------------------------------------------------------------------------------------------------
# SigLIP

def patchify(images, patch):
    """images (..., C, H, W) -> (..., H/patch * W/patch, patch*patch*C): patches row by row, inside a patch (row,
    column, channel). Raises ValueError where a side is no multiple of `patch`."""
    H, W = images.shape[-2:]
    if H % patch or W % patch:
        raise ValueError(f"patchify: {H}x{W} pixels are no {patch}x{patch} patches: resize to multiples of {patch}")
    x = images.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # (..., C, h, patch, w, patch)
    return x.movedim(-5, -1).transpose(-4, -3).flatten(-5, -4).flatten(-3)

def grid_ids(rows, columns, stride, device=None):
    """Position ids (rows*columns,) of a grid in the top left corner of a table with `stride` columns: row * stride +
    column. Raises ValueError where the grid is larger than the table."""
    if max(rows, columns) > stride:
        raise ValueError(f"a grid of {rows}x{columns} does not fit the {stride}x{stride} position table")
    return (torch.arange(rows, device=device)[:, None] * stride + torch.arange(columns, device=device)).flatten()

class PositionTable(nn.Module):
    """Fixed sine-cosine table (side*side, width) of a grid, for ids of grid_ids: the first half of the channels encodes
    the column, the second the row. BAGEL adds one to what SigLIP saw, and one to the latents it paints. The published
    files hold it rounded to bfloat16; it is computed, and kept in float32 instead."""

    def __init__(self, side, width):
        super().__init__()
        angle = np.arange(side)[:, None] * 10000.0 ** (-np.arange(width // 4) / (width // 4))
        one = np.concatenate([np.sin(angle), np.cos(angle)], 1)  # (side, width/2)
        table = np.concatenate([np.tile(one, (side, 1)), np.repeat(one, side, 0)], 1)
        self.register_buffer("pos_embed", torch.from_numpy(table).float())
        self.side = side

    def forward(self, ids):
        return F.embedding(ids, self.pos_embed)

class SigLIPNaViT(nn.Module):
    """SigLIP's vision tower (arXiv 2303.15343) with a linear patch embedding and positions for pictures of any size, as
    in BAGEL: all layers and the final norm; no pooling, no class token. BAGEL packs pictures of several sizes into one
    row; here a batch holds pictures of one size, which is the same computation without a mask."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.vision_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"patch_embedding": nn.Linear(3 * c.patch ** 2, c.width),
                                         "position_embedding": nn.Embedding(c.positions ** 2, c.width)}),
            "encoder": nn.ModuleDict({"layers": encoder_layers(c, nn.GELU("tanh"))}),
            "post_layernorm": nn.LayerNorm(c.width, eps=c.eps),
        })
        nn.init.normal_(self.vision_model["embeddings"]["position_embedding"].weight, std=c.width ** -0.5)

    def forward(self, patches, position_ids):
        """patches (B, N, patch*patch*3) from patchify, position_ids (N,) or (B, N) from grid_ids -> (B, N, width)."""
        m = self.vision_model
        x = m["embeddings"]["patch_embedding"](patches) + m["embeddings"]["position_embedding"](position_ids)
        for layer in m["encoder"]["layers"]:
            x = layer(x)
        return m["post_layernorm"](x)

# ---------------------------------------------------------------------------------------------------------------------
# preprocessing: PIL image -> normalized tensor, exactly as the published weights were trained

def upright(image):
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # EXIF that nobody can read says nothing about rotation
        return image

def on_white(image):
    """PIL image -> RGB, what is transparent put on white."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white

def as_rgb(image, exif=True):
    """PIL image of any mode -> RGB, transparency on white. exif: turned as EXIF says (False: as stored, as published).
    Gray of 16 bits is scaled to 8: by 16 where no value reaches 4096, as from 12-bit cameras, else by 256."""
    image = upright(image) if exif else image
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)
        image = Image.fromarray((gray >> (4 if gray.max() < 4096 else 8)).clip(0, 255).astype(np.uint8))
    return on_white(image)

def to_pixels(image, mean=0.5, std=0.5):
    """PIL image -> float32 (3, H, W): x/255 normalized with mean and std (one number or three); default: to [-1, 1]."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return ((x - torch.as_tensor(mean).view(-1, 1, 1)) / torch.as_tensor(std).view(-1, 1, 1)).contiguous()

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

def _center_crop(image, size, whole):
    """Shorter side to `size` (bicubic), then the square in the middle. whole: how half an odd margin is rounded."""
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = whole((w - size) / 2), whole((h - size) / 2)
    image = image.convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))

def clip_pixels(image, size=336):
    """CLIP: the margin is rounded down, CLIP's mean and deviation."""
    return to_pixels(_center_crop(image, size, int), mean=CLIP_MEAN, std=CLIP_STD)

def magvit_pixels(image, size):
    """Show-o's image tokenizer: the margin is rounded to even, [-1, 1]."""
    return to_pixels(_center_crop(image, size, round))

def square_pixels(image, size):
    """Show-o's RecA data: resized to a square without cropping (bicubic; the aspect ratio is not kept), [-1, 1]."""
    return to_pixels(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))

def bagel_size(w, h, max_size, min_size, stride, max_pixels=14 * 14 * 9 * 1024):
    """BAGEL's rule for the size of a picture -> (w, h), multiples of `stride`: long side at most max_size, short side
    at least min_size if that is possible, at most max_pixels pixels (scaled by the ratio, not by its root: so the
    weights were trained)."""
    def scaled(s):
        return tuple(max(stride, round(round(v * s) / stride) * stride) for v in (w, h))

    w, h = scaled(max(min(max_size / max(w, h), 1.0), min_size / min(w, h)))
    if w * h > max_pixels:
        w, h = scaled(max_pixels / (w * h))
    if max(w, h) > max_size:
        w, h = scaled(max_size / max(w, h))
    return w, h

def bagel_resize(image, *limits):
    """PIL image -> RGB PIL image of bagel_size(w, h, *limits) (bicubic), transparency on white. The limits are (1024,
    512, 16) for the autoencoder and (980, 224, 14) for SigLIP: in editing benchmarks (980, 378, 14), in RecA (224, 224,
    14)."""
    return on_white(image).resize(bagel_size(*image.size, *limits), Image.Resampling.BICUBIC)

# Harmon's data: Pillow's bicubic (it anti-aliases) and its rounding to 8 bits after every step belong to the recipe.
def preprocess_stretch(image, size):
    """Reconstruction data: stretched (no crop, no pad) to a square of the longer side, then resized."""
    side = max(image.size)
    return square_pixels(image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), size)

def preprocess_pad(image, size):
    """Image-to-text data and questions: padded to a square with gray 127 around (odd margin: less above and left),
    then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square_pixels(square, size)

# ---------------------------------------------------------------------------------------------------------------------
# samplers of all models: everything random of a row comes from its own generator, whatever else is in the batch

def guidance(cfg, default):
    """Scale of classifier-free guidance, None for the default; 1 is none. ValueError if it is no number from 1 on."""
    cfg = default if cfg is None else cfg
    if not 1 <= cfg < math.inf:  # nan is refused, too
        raise ValueError(f"cfg {cfg}: guidance is a finite number of at least 1, and 1 is none")
    return cfg

def row_generators(generator, rows):
    """What samplers take, None (torch's own), one torch.Generator for one row, or a list with one for each row -> list.
    ValueError if their number is another one: rows that share a generator would depend on each other."""
    if generator is None:
        return [torch.default_generator] * rows
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != rows:
        raise ValueError(f"{len(generators)} generators for {rows} rows: give a list with one torch.Generator for each")
    return generators

def draw_rows(draw, generators, *shape, device=None):
    """draw: torch.randn, rand, randperm or the like -> (rows, *shape), each row from its generator and then moved."""
    return torch.stack([draw(*shape, generator=g, device=g.device) for g in generators]).to(device)

def next_token(logits, temperature, generators):
    """logits (B, V) float32 -> ids (B, 1): the likeliest at temperature 0, else drawn."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    rows = zip(torch.softmax(logits / temperature, -1), generators)
    return torch.stack([torch.multinomial(p.to(g.device), 1, generator=g) for p, g in rows]).to(logits.device)

# ---------------------------------------------------------------------------------------------------------------------
# base training from nothing: what CLIP and SigLIP bring from their pre-training, for encoders that bring nothing

def caption_words(tokenizer, captions):
    """n strings -> (n, tokenizer.vocab_size) float32: 1 where the caption has the id."""
    words = torch.zeros(len(captions), tokenizer.vocab_size)
    for row, caption in zip(words, captions):
        row[tokenizer.encode_ordinary(caption)] = 1
    return words

def words_loss(seen, words, embeddings):
    """Is a word in a picture's caption, each word for itself (SigLIP's sigmoid loss, arXiv 2303.15343, with a fixed
    scale and offset). As the words are the language model's own embeddings, pictures and text come to be read alike.

    seen (B, A, D): picture tokens as the language model gets them. words (B, V): 1 where the caption, which must say
    everything, has the word, see caption_words. embeddings (V, D). A word is as like a picture as it is (cosine) to the
    place that fits it best. Words of all or none of the captions, on all processes, are not asked for. -> 0-dim mean"""
    seen, embeddings = F.normalize(seen.float(), dim=-1), F.normalize(embeddings.float(), dim=-1)
    with torch.autocast(seen.device.type, enabled=False):  # these products stay float32
        likeness = torch.stack([place @ embeddings.T for place in seen.unbind(1)]).amax(0)  # (B, V)
    share = words.mean(0)  # (V,): of the captions that have the word
    if dist.is_initialized():
        dist.all_reduce(share)
        share /= dist.get_world_size()
    asked = ((share > 0) & (share < 1)).float().expand_as(words)
    loss = F.binary_cross_entropy_with_logits(20 * (likeness - 0.3), words, weight=asked, reduction="sum")
    return loss / asked.sum().clamp(min=1)

def to_uint8(images):
    """Pictures in [-1, 1] (n, 3, h, w) -> uint8 (n, h, w, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

def to_float(pictures, device="cpu"):
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
