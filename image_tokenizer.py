"""Image tokenizers: the frozen autoencoders that the generators paint through, and the training of the tiny ones.

Four classes cover every tokenizer of the models. `Autoencoder` gives continuous latents: the KL-16 VAE of MAR and
Harmon, the FLUX autoencoder of BAGEL. `LFQTokenizer` gives integer codes: MAGVIT-v2 of Show-o, whose "codebook" is the
sign pattern of a few channels (lookup-free quantization). `VQTokenizer` does, too: VQ-16 of Janus, with a codebook that
was learned. These three are the same convolutional pyramid, and so are the tiny ones for 48x48 pictures, by config.
`DCAutoencoder`, of SANA and OpenUni, gives continuous latents of a 32nd of the picture's side. Module names are the
published state-dict keys: to load is not to translate.

Images are float (B, 3, H, W) in [-1, 1] everywhere in this file.
"""
import os
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
from vision_encoder import preprocess_stretch

# ---------------------------------------------------------------------------------------------------------------------
# configurations and the recipe of the tiny ones

@dataclass
class AutoencoderConfig:
    ch: int = 128  # width at full resolution
    ch_mult: tuple = (1, 1, 2, 2, 4)  # width of each level in units of ch; every further level halves the picture
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    z_channels: int = 16
    resolution: int = 256  # nominal: it only decides which levels the next two lines mean, any size can be encoded
    encoder_attn_resolutions: tuple = (16,)  # an attention block after every ResnetBlock of these levels
    decoder_attn_resolutions: tuple = ()
    quant_conv: bool = True  # 1x1 convolutions on both sides of the latent
    scale: float = 0.2325  # latent = (z - shift) * scale
    shift: float = 0.0
    groups: int = 32  # of the GroupNorms; 0 (tiny): convolutions are 1x1 and norms see the channels of one place only
    patch: int = 1  # patch x patch pixels are folded into channels first
    kl_weight: float = 1e-4  # training only

@dataclass
class LFQConfig:
    ch: int = 128
    encoder_ch_mult: tuple = (1, 2, 2, 4, 4)
    encoder_res_blocks: tuple = (4, 3, 4, 3, 4)
    decoder_ch_mult: tuple = (1, 1, 2, 2, 4)
    decoder_res_blocks: tuple = (4, 4, 3, 4, 3)
    bits: int = 13  # channels of the latent; a token is one of 2**bits codes
    groups: int = 32  # these two as above
    patch: int = 1
    commitment_weight: float = 0.125  # training only, from here on
    entropy_weight: float = 0.1
    l1_weight: float = 1.0
    mse_weight: float = 1.0
    codebook_size = property(lambda self: 2 ** self.bits)

@dataclass
class VQConfig:
    ch: int = 128
    ch_mult: tuple = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # as in AutoencoderConfig; attention in the deepest level alone
    z_channels: int = 256
    codebook_size: int = 16384
    code_width: int = 8

@dataclass
class DCAutoencoderConfig:
    widths: tuple = (128, 256, 512, 512, 1024, 1024)  # of the stages, from full resolution down, half the side each
    encoder_blocks: tuple = (2, 2, 2, 3, 3, 3)
    decoder_blocks: tuple = (3, 3, 3, 3, 3, 3)
    attention_from: int = 3  # the first stage with linear attention; the ones before it are convolutions
    head_dim: int = 32
    z_channels: int = 32
    scale: float = 0.41407  # latent = z * scale

TOKENIZERS = {
    "kl16": AutoencoderConfig(),
    "flux": AutoencoderConfig(ch_mult=(1, 2, 4, 4), encoder_attn_resolutions=(), quant_conv=False, scale=0.3611,
                              shift=0.1159),
    "magvitv2": LFQConfig(),
    "vq16": VQConfig(),
    "dc-ae-f32c32": DCAutoencoderConfig(),
    # For 48x48 pictures of the shape world, whose 16x16 cells are independent: a residual MLP per cell (and one
    # attention between cells) is the whole pyramid, and learns on a CPU many times faster than 3x3 convolutions at full
    # resolution. scale 1 because calibrate() makes the latents standard. MSE rules the codes: it asks for the few
    # pixels that part a small star from a triangle, where L1 spends the code on shades of large objects.
    "tiny-kl": AutoencoderConfig(ch=128, ch_mult=(1,), num_res_blocks=1, encoder_attn_resolutions=(), scale=1.0,
                                 groups=0, patch=16),
    "tiny-lfq": LFQConfig(ch=128, encoder_ch_mult=(1,), encoder_res_blocks=(1,), decoder_ch_mult=(1,),
                          decoder_res_blocks=(2,), bits=11, groups=0, patch=16, entropy_weight=0.2, l1_weight=0.25,
                          mse_weight=4.0),
}
TINY_SIZE = 48  # pixels a side of the tiny ones' pictures, as in shape_world.py

RECIPE = {  # of `train.py --stage tokenizer`; the keys are its flags
    "lr": 6e-3,  # a residual MLP bears more than a transformer does, and so it is trained in minutes on a CPU
    "betas": (0.9, 0.95),  # squared gradients are averaged over 20 steps: at this rate they change fast
    "weight_decay": 0.0,  # nothing can be learned by heart: all that a cell can look like is in the pool
    "warmup": 50,  # until those averages hold
    "clip": 1.0,  # for the rare batches of the codes whose gradient is far larger than the rest
    "schedule": "cosine",  # down to zero: exact pixels need small steps at the end
    "steps": 4000,  # so that every picture of the pool is seen 13 times
    "batch": 64,
    "pool": 20000,  # 126,000 objects: some 500 of each combination of shape, size, color and ground
    "mix": {"images": 1.0},  # the only part
}

# ---------------------------------------------------------------------------------------------------------------------
# the convolutional pyramid

class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each place of (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

def channels_last(x):
    """(B, C, h, w) with the channels of a place side by side in memory, as convolutions want it on CPUs and GPUs: all
    layers of a pyramid keep what its first one gets."""
    return x.contiguous(memory_format=torch.channels_last)

def norm(groups, c):
    return nn.GroupNorm(groups, c, eps=1e-6) if groups else ChannelNorm(c, eps=1e-6)

def conv(groups, c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1) if groups else nn.Conv2d(c_in, c_out, 1)

class ResnetBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = norm(groups, c_in)
        self.conv1 = conv(groups, c_in, c_out)
        self.norm2 = norm(groups, c_out)
        self.conv2 = conv(groups, c_out, c_out)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h

class AttnBlock(nn.Module):
    """One attention head over all pixels, residual."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(groups, c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # (B, 1, H*W, C), contiguous: strided rows would take SDPA's quadratic path
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))

def _downsample(c):
    pad = nn.ZeroPad2d((0, 1, 0, 1))  # right and below only
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2)))

def _upsample(c):
    return nn.Sequential(OrderedDict(twice=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(c, c, 3, padding=1)))

def _middle(c, groups):
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(c, c, groups), attn_1=AttnBlock(c, groups),
                                     block_2=ResnetBlock(c, c, groups)))

def _level(c_in, width, count, attn, groups):
    """`count` ResnetBlocks, of which the first changes the width, each with an AttnBlock after it if `attn`."""
    level = nn.ModuleDict({"block": nn.ModuleList(), "attn": nn.ModuleList()})
    for i in range(count):
        level["block"].append(ResnetBlock(width if i else c_in, width, groups))
        level["attn"].append(AttnBlock(width, groups) if attn else nn.Identity())
    return level

def _run(level, x):
    """The blocks of a level, each with its attention, and after them what changes the size of the picture."""
    blocks, attention, *resize = level.values()
    for block, attn in zip(blocks, attention):
        x = attn(block(x))
    for layer in resize:
        x = layer(x)
    return x

class Encoder(nn.Module):
    """widths, blocks, attention: channels, number of ResnetBlocks, and whether an AttnBlock follows each; one entry per
    level, from full resolution down."""

    def __init__(self, c_in, ch, widths, blocks, attention, c_out, groups, patch=1):
        super().__init__()
        self.patch = patch
        self.conv_in = conv(groups, c_in * patch * patch, ch)
        self.down = nn.ModuleList()
        for i, (width, count, attn) in enumerate(zip(widths, blocks, attention)):
            level = _level(ch, width, count, attn, groups)
            if i < len(widths) - 1:
                level["downsample"] = _downsample(width)
            ch = width
            self.down.append(level)
        self.mid = _middle(ch, groups)
        self.norm_out = norm(groups, ch)
        self.conv_out = conv(groups, ch, c_out)

    def levels(self):
        """In the order in which they run."""
        return self.down

    def forward(self, x):
        x = self.conv_in(channels_last(F.pixel_unshuffle(x, self.patch)))
        for level in self.levels():
            x = _run(level, x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))

class Decoder(nn.Module):
    """The mirror image; `up.i` is counted from full resolution, as in the encoder, although the last one runs first."""

    def __init__(self, c_in, widths, blocks, attention, c_out, groups, patch=1):
        super().__init__()
        self.patch = patch
        ch = widths[-1]
        self.conv_in = conv(groups, c_in, ch)
        self.mid = _middle(ch, groups)
        self.up = nn.ModuleList()
        for i in reversed(range(len(widths))):
            level = _level(ch, widths[i], blocks[i], attention[i], groups)
            if i > 0:
                level["upsample"] = _upsample(widths[i])
            ch = widths[i]
            self.up.insert(0, level)
        self.norm_out = norm(groups, ch)
        self.conv_out = conv(groups, ch, c_out * patch * patch)

    def levels(self):
        return reversed(self.up)

    def forward(self, z):
        x = self.mid(self.conv_in(channels_last(z)))
        for level in self.levels():
            x = _run(level, x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)

def _rename(pyramid, old, levels):
    """The names of VQ-16's files: `conv_blocks` are the levels in the order in which they run, so that the decoder's
    first is the deepest; a level has `res`; what is in the middle has numbers."""
    levels = [OrderedDict(level.items()) for level in levels]
    pyramid.conv_blocks = nn.ModuleList(nn.ModuleDict({"res": level.pop("block"), **level}) for level in levels)
    pyramid.mid = nn.Sequential(*pyramid.mid)
    delattr(pyramid, old)

class VQEncoder(Encoder):
    def __init__(self, *args):
        super().__init__(*args)
        _rename(self, "down", self.down)

    def levels(self):
        return self.conv_blocks

class VQDecoder(Decoder):
    def __init__(self, *args):
        super().__init__(*args)
        _rename(self, "up", reversed(self.up))

    def levels(self):
        return self.conv_blocks

def _check_images(images, stride):
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < stride:
        raise ValueError(f"images: shape {tuple(images.shape)}, expected (B, 3, H, W), H and W at least {stride}")

# ---------------------------------------------------------------------------------------------------------------------
# the tokenizers on this pyramid: continuous latents and discrete codes

class Autoencoder(nn.Module):
    """Latent diffusion's KL-regularized autoencoder (arXiv 2112.10752): KL-16, FLUX's and the tiny one by config."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        widths, levels = [c.ch * m for m in c.ch_mult], len(c.ch_mult)
        self.stride = c.patch * 2 ** (levels - 1)  # pixels a side of one place of the latents
        attn, up_attn = ([c.resolution >> i in sizes for i in range(levels)]
                         for sizes in (c.encoder_attn_resolutions, c.decoder_attn_resolutions))
        self.encoder = Encoder(3, c.ch, widths, [c.num_res_blocks] * levels, attn, 2 * c.z_channels,
                               c.groups, c.patch)
        self.decoder = Decoder(c.z_channels, widths, [c.num_res_blocks + 1] * levels, up_attn, 3, c.groups,
                               c.patch)
        self.quant_conv = nn.Conv2d(2 * c.z_channels, 2 * c.z_channels, 1) if c.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c.z_channels, c.z_channels, 1) if c.quant_conv else nn.Identity()

    def moments(self, images):
        """images (B, 3, H, W) -> mean and log variance of the posterior: (B, 2*z_channels, H/stride, W/stride)."""
        _check_images(images, self.stride)
        return self.quant_conv(self.encoder(images))

    def encode(self, images, noise=None):
        """images (B, 3, H, W) -> latents (B, z_channels, h, w) as the generators see them: (z - shift) * scale, where z
        is the mean of the posterior (Harmon), or a sample of it if standard normal `noise` of the latents' shape is
        given (BAGEL, also at inference)."""
        mean, logvar = self.moments(images).chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        return (z - self.config.shift) * self.config.scale

    def decode(self, latents):
        """latents (B, z_channels, h, w), scaled as encode() returns them -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale + self.config.shift))

class LFQTokenizer(nn.Module):
    """MAGVIT-v2 (arXiv 2310.05737), lookup-free quantization: a code is the sign pattern of `bits` channels."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        none = [False] * len(c.encoder_ch_mult)
        self.stride = c.patch * 2 ** (len(none) - 1)
        down, up = ([c.ch * m for m in mult] for mult in (c.encoder_ch_mult, c.decoder_ch_mult))
        self.encoder = Encoder(3, c.ch, down, c.encoder_res_blocks, none, c.bits, c.groups, c.patch)
        self.decoder = Decoder(c.bits, up, c.decoder_res_blocks, none, 3, c.groups, c.patch)
        self.encoder.quant_conv = nn.Conv2d(c.bits, c.bits, 1)  # the published files keep these two in there
        self.decoder.post_quant_conv = nn.Conv2d(c.bits, c.bits, 1)
        powers = 2 ** torch.arange(c.bits - 1, -1, -1)  # channel 0 is the most significant bit
        signs = ((torch.arange(2 ** c.bits)[:, None] & powers) > 0).float() * 2 - 1
        self.quantize = nn.Module()  # only the buffers of the published file
        self.quantize.register_buffer("power_vals", powers)  # (bits,) int64
        self.quantize.register_buffer("embedding", signs)  # (2**bits, bits), -1 or +1

    def features(self, images):
        """images (B, 3, H, W) -> the values before quantization (B, bits, H/stride, W/stride)."""
        _check_images(images, self.stride)
        return self.encoder.quant_conv(self.encoder(images))

    def encode(self, images):
        """images (B, 3, H, W) -> codes (B, H/stride, W/stride), int64 in [0, 2**bits). Exactly zero is bit 0."""
        return ((self.features(images) > 0) * self.quantize.power_vals[:, None, None]).sum(1)

    def decode(self, codes):
        """codes (B, h, w) int64 -> images (B, 3, H, W), not clamped."""
        return self.decode_signs(self.quantize.embedding[codes].permute(0, 3, 1, 2))

    def decode_signs(self, q):
        """q (B, bits, h, w) of -1 and +1 -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.decoder.post_quant_conv(q))

    def quantizer_losses(self, z):
        """z (B, bits, h, w), before quantization -> (commitment loss, entropy loss), with the weights of the config.
        Entropy: a bit is +1 with probability softmax(-(z-1)^2, -(z+1)^2) = sigmoid(4z). Each bit of each position
        should be sure of itself (low entropy), while over all positions all codes should be used (high entropy of the
        mean). The published loss counts bits there; codes, if they are few, part bits that flip together."""
        c = self.config
        commitment = c.commitment_weight * (torch.where(z > 0, 1.0, -1.0) - z).square().mean()
        z = z.float().permute(0, 2, 3, 1).flatten(0, 2)  # (N, bits)
        p = torch.sigmoid(4 * z).clamp(1e-6, 1 - 1e-6)  # so that the gradient is finite at 0 and 1
        unsure = -p * p.log() - (1 - p) * (1 - p).log()  # in nats
        ones = (self.quantize.embedding + 1) / 2  # (2**bits, bits)
        with torch.autocast(z.device.type, enabled=False):  # these products stay float32
            codes = torch.exp(F.logsigmoid(4 * z) @ ones.T + F.logsigmoid(-4 * z) @ (1 - ones).T).mean(0)  # (2**bits,)
        used = -(codes * (codes + 1e-9).log()).sum()
        return commitment, c.entropy_weight * (unsure.sum(1).mean() - used)

    def forward(self, images):
        """Training: images -> (reconstruction, commitment loss, entropy loss). The decoder reads signs; its gradient
        passes to the encoder as if quantization were the identity (straight-through)."""
        z = self.features(images)
        q = z + (torch.where(z > 0, 1.0, -1.0) - z).detach()
        return self.decode_signs(q), *self.quantizer_losses(z)

class VQTokenizer(nn.Module):
    """VQ-16 (arXiv 2406.06525), vector quantization: the code of a place is the row of a learned codebook to which it
    has the smallest angle. Frozen: what would train it is left out."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        widths, levels = [c.ch * m for m in c.ch_mult], len(c.ch_mult)
        self.stride, attn = 2 ** (levels - 1), [i == levels - 1 for i in range(levels)]
        self.encoder = VQEncoder(3, c.ch, widths, [c.num_res_blocks] * levels, attn, c.z_channels, 32)
        self.decoder = VQDecoder(c.z_channels, widths, [c.num_res_blocks + 1] * levels, attn, 3, 32)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(c.codebook_size, c.code_width)})
        self.quantize.register_buffer("codebook_used", torch.zeros(65536))  # in the published file, and of no use
        self.quant_conv = nn.Conv2d(c.z_channels, c.code_width, 1)
        self.post_quant_conv = nn.Conv2d(c.code_width, c.z_channels, 1)

    def codebook(self):
        return F.normalize(self.quantize.embedding.weight, dim=-1)  # (codebook_size, code_width), of length 1

    def encode(self, images):
        """images (B, 3, H, W) -> codes (B, H/stride, W/stride), int64."""
        _check_images(images, self.stride)
        z = F.normalize(self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1), dim=-1)  # (B, h, w, code_width)
        return (z @ self.codebook().T).argmax(-1)

    def decode(self, codes):
        """codes (B, h, w) int64 -> images (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(F.embedding(codes, self.codebook()).permute(0, 3, 1, 2)))

# ---------------------------------------------------------------------------------------------------------------------
# DC-AE: 32 times fewer pixels a side

def relu_attention(q, k, v):
    """Linear attention (EfficientViT, arXiv 2205.14756): q, k, v (..., N, d) -> (..., N, d), in the dtype of v.
    The weight of a key is relu(q) . relu(k) instead of exp(q . k): a product, so that all keys are summed up once for
    all queries, at a cost linear in N. These sums over a whole picture need float32."""
    dtype = v.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k, v = F.relu(q.float()), F.relu(k.float()), v.float()
        summed = q @ (k.transpose(-1, -2) @ v)
        weight = q @ k.sum(-2).unsqueeze(-1)  # (..., N, 1)
        return (summed / (weight + 1e-15)).to(dtype)

class ChannelRMSNorm(nn.RMSNorm):
    """RMSNorm over the channels of each place of (B, C, h, w), with a bias."""

    def __init__(self, c):
        super().__init__(c, eps=1e-5)
        self.bias = nn.Parameter(torch.zeros(c))

    def forward(self, x):
        return (super().forward(x.permute(0, 2, 3, 1)) + self.bias).permute(0, 3, 1, 2)

class GatedConv(nn.Module):
    """The feed-forward part: a gated MLP per place, whose hidden layer also sees the eight places around it."""

    def __init__(self, c, hidden, norm=True):
        super().__init__()
        self.conv_inverted = nn.Conv2d(c, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, c, 1, bias=False)
        self.norm = ChannelRMSNorm(c) if norm else nn.Identity()

    def forward(self, x):
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return self.norm(self.conv_point(value * F.silu(gate)))

class MultiscaleAttention(nn.Module):
    """Linear attention of twice C / head_dim heads: half of them see q, k and v mixed over 5x5 places."""

    def __init__(self, c, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c, bias=False) for _ in range(3))
        mix = nn.Conv2d(3 * c, 3 * c, 5, padding=2, groups=3 * c, bias=False)
        point = nn.Conv2d(3 * c, 3 * c, 1, groups=3 * c // head_dim, bias=False)
        self.to_qkv_multiscale = nn.ModuleList([nn.Sequential(OrderedDict(proj_in=mix, proj_out=point))])
        self.to_out = nn.Linear(2 * c, c, bias=False)
        self.norm_out = ChannelRMSNorm(c)

    def forward(self, x):
        rows = x.permute(0, 2, 3, 1)
        qkv = torch.cat([layer(rows) for layer in (self.to_q, self.to_k, self.to_v)], -1).permute(0, 3, 1, 2)
        qkv = torch.cat([qkv, self.to_qkv_multiscale[0](qkv)], 1).flatten(2)  # (B, 6C, h*w)
        # A head takes 3 * head_dim channels in a row: what the layer named to_q makes is q, k and v of the first heads.
        heads = qkv.unflatten(1, (-1, 3 * self.head_dim)).transpose(2, 3)  # (B, 2C / head_dim, h*w, 3 * head_dim)
        out = relu_attention(*heads.chunk(3, -1)).transpose(1, 2).flatten(2)  # (B, h*w, 2C)
        return self.norm_out(self.to_out(out).transpose(1, 2).unflatten(2, x.shape[2:]))

class DCResBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, bias=False)
        self.norm = ChannelRMSNorm(c)

    def forward(self, x):
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))

class EfficientViTBlock(nn.Module):
    def __init__(self, c, head_dim):
        super().__init__()
        self.attn = MultiscaleAttention(c, head_dim)
        self.conv_out = GatedConv(c, 4 * c)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.conv_out(x)

class Shrink(nn.Conv2d):
    """(B, c_in, h, w) -> (B, c_out, h/factor, w/factor). What the convolution learns is added to a fixed shortcut:
    pixels are folded into channels, and of these as many in a row are averaged as it takes."""

    def __init__(self, c_in, c_out, factor=1):
        super().__init__(c_in, c_out, 3, stride=factor, padding=1)

    def forward(self, x):
        folded = F.pixel_unshuffle(x, self.stride[0])
        return super().forward(x) + folded.unflatten(1, (self.out_channels, -1)).mean(2)

class Expand(nn.Conv2d):
    """(B, c_in, h, w) -> (B, c_out, factor*h, factor*w): the way back, with channels repeated, then unfolded."""

    def __init__(self, c_in, c_out, factor=1):
        super().__init__(c_in, c_out, 3, padding=1)
        self.factor = factor

    def forward(self, x):
        repeated = x.repeat_interleave(self.out_channels * self.factor ** 2 // self.in_channels, 1)
        enlarged = F.interpolate(x, scale_factor=float(self.factor))
        return super().forward(enlarged) + F.pixel_shuffle(repeated, self.factor)

def _dc_blocks(config, stage, count):
    width, attends = config.widths[stage], stage >= config.attention_from
    return [EfficientViTBlock(width, config.head_dim) if attends else DCResBlock(width) for _ in range(count)]

def _dc_encoder(c):
    stages = []
    for i, count in enumerate(c.encoder_blocks):
        stages.append(nn.Sequential(*_dc_blocks(c, i, count)))
        if i < len(c.widths) - 1:
            stages[i].append(nn.Sequential(OrderedDict(conv=Shrink(c.widths[i], c.widths[i + 1], 2))))
    return nn.Sequential(OrderedDict(conv_in=nn.Conv2d(3, c.widths[0], 3, padding=1),
                                     down_blocks=nn.Sequential(*stages),
                                     conv_out=Shrink(c.widths[-1], c.z_channels)))

def _dc_decoder(c):
    stages = OrderedDict()  # run in this order, although their names count from full resolution, as in the encoder
    for i in reversed(range(len(c.widths))):
        stages[str(i)] = nn.Sequential(*_dc_blocks(c, i, c.decoder_blocks[i]))
        if i < len(c.widths) - 1:
            stages[str(i)].insert(0, nn.Sequential(OrderedDict(conv=Expand(c.widths[i + 1], c.widths[i], 2))))
    return nn.Sequential(OrderedDict(conv_in=Expand(c.z_channels, c.widths[-1]), up_blocks=nn.Sequential(stages),
                                     norm_out=ChannelRMSNorm(c.widths[0]), relu=nn.ReLU(),
                                     conv_out=nn.Conv2d(c.widths[0], 3, 3, padding=1)))

class DCAutoencoder(nn.Module):
    """DC-AE (arXiv 2410.10733): 32 channels at a 32nd of the picture's side; no posterior, so nothing is sampled."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stride = 2 ** (len(config.widths) - 1)  # pixels a side of one place of the latents
        self.encoder, self.decoder = _dc_encoder(config), _dc_decoder(config)

    def encode(self, images):
        """images (B, 3, H, W) -> latents (B, z_channels, H/stride, W/stride) as the generators see them: z * scale.
        ValueError if a side is not a multiple of the stride."""
        _check_images(images, self.stride)
        h, w = images.shape[2:]
        if h % self.stride or w % self.stride:
            raise ValueError(f"images: {h}x{w} pixels, expected sides that are multiples of {self.stride}: crop them")
        return self.encoder(channels_last(images)) * self.config.scale

    def decode(self, latents):
        """latents (B, z_channels, h, w), scaled as encode() returns them -> images (B, 3, H, W), not clamped."""
        return self.decoder(channels_last(latents / self.config.scale))

def build(config):
    """The image tokenizer of a config, untrained."""
    kinds = {AutoencoderConfig: Autoencoder, LFQConfig: LFQTokenizer, VQConfig: VQTokenizer,
             DCAutoencoderConfig: DCAutoencoder}
    return kinds[type(config)](config)

# ---------------------------------------------------------------------------------------------------------------------
# training the tiny ones

def tiny_name(config):
    """The name of the tiny tokenizer that a config is, also its folder under weights/. ValueError for others."""
    for name in ("tiny-kl", "tiny-lfq"):
        if config == TOKENIZERS[name]:
            return name
    raise ValueError(f"{config}: not a tiny image tokenizer; say with --tokenizer-ckpt where its weights are")

def trained(config, name, folder=None):
    """The config of a model with the settings of a trained tiny tokenizer under `name`, and that tokenizer's weights.
    folder: where both are; None: the shipped one."""
    settings = getattr(config, name)
    folder = folder or os.path.join(checkpoint.HERE, "weights", tiny_name(settings))
    settings = checkpoint.from_dict(type(settings), checkpoint.read_config(folder)["config"],
                                    os.path.join(folder, "config.json"))
    weights = checkpoint.read_weights(folder)
    with checkpoint.reading(folder, "no image tokenizer can be built from its config.json"), torch.device("meta"):
        checkpoint.check_keys(build(settings).state_dict(), weights, folder)  # before anything is allocated
    return replace(config, **{name: settings}), weights

def tokenizer_loss(model, images):
    """images (B, 3, H, W) -> (scalar loss, {name: detached scalar}): L1 + MSE per pixel (flat drawings need no
    perceptual or adversarial term); for an Autoencoder, whose posterior noise comes from torch's global generator,
    kl_weight * KL per latent number; for an LFQTokenizer its commitment and entropy losses."""
    c = model.config
    if isinstance(model, Autoencoder):
        mean, logvar = model.moments(images).chunk(2, dim=1)
        z = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, device=mean.device).to(mean)
        recon = model.decode((z - c.shift) * c.scale)
        l1_weight, mse_weight = 1.0, 1.0
        parts = {"kl": c.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()}
    else:
        recon, commitment, entropy = model(images)
        l1_weight, mse_weight = c.l1_weight, c.mse_weight
        parts = {"commitment": commitment, "entropy": entropy}
    error = recon - images
    parts = {"l1": l1_weight * error.abs().mean(), "mse": mse_weight * error.square().mean(), **parts}
    return sum(parts.values()), {name: part.detach() for name, part in parts.items()}

@torch.no_grad()
def calibrate(model, images):
    """Makes the latents of a tiny-kl easy to diffuse: afterwards encode(images) has mean 0 and standard deviation 1 in
    every channel, and decode(encode(x)) is what it was, through changes of the two 1x1 convolutions alone. Raises
    ValueError on a dead latent."""
    z = model.moments(images).float().chunk(2, dim=1)[0]  # (N, C, h, w)
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3), correction=0)
    if std.min() < 1e-6:
        raise ValueError(f"calibrate: latent channel {int(std.argmin())} is constant: lower kl_weight or train longer")
    channels = len(mean)
    model.post_quant_conv.bias += model.post_quant_conv.weight[:, :, 0, 0] @ mean
    model.post_quant_conv.weight *= std[:, None, None]  # over input channels
    model.quant_conv.weight[:channels] /= std[:, None, None, None]
    model.quant_conv.bias[:channels] = (model.quant_conv.bias[:channels] - mean) / std
    model.quant_conv.bias[channels:] -= 2 * std.log()  # the posterior's log variance shrinks with its mean

class TokenizerStage(nn.Module):
    """A tokenizer in the clothes of a model, so that train.py's one loop trains it: the methods are those of a model
    file. Its one part is "images", pictures that need no text."""

    def __init__(self, name, ckpt=None):
        super().__init__()
        self.config = TOKENIZERS[name]
        self.tokenizer = build(self.config)
        if ckpt:
            checkpoint.load_strict(self.tokenizer, checkpoint.read_weights(ckpt), ckpt)

    def forward(self, batch):
        """{"images": precompute's tensors} -> {"images": loss}."""
        images = batch["images"]["images"].float() / 127.5 - 1
        return {"images": tokenizer_loss(self.tokenizer, images)[0]}

    @torch.no_grad()
    def reconstruct(self, images, generator=None):
        """images (B, 3, H, W) -> what is left of them after encoding and decoding, without randomness."""
        return self.tokenizer.decode(self.tokenizer.encode(images))

    def finish(self, images):
        """After training: calibrates an Autoencoder on images (N, 3, H, W). Codes need nothing."""
        if isinstance(self.tokenizer, Autoencoder):
            calibrate(self.tokenizer, images)

    def trainable_parameters(self, stage):
        return list(self.named_parameters())

    def no_decay(self, name, p):
        return p.ndim < 2

    def blocks(self):
        return []  # too small to shard or recompute

    def preprocess(self, image, purpose):
        return preprocess_stretch(image, TINY_SIZE)

    def precompute(self, images):
        """(N, 3, H, W) in [-1, 1] -> the same as bytes: nothing is frozen, and a batch carries the pictures."""
        return {"images": ((images + 1) * 127.5).round().byte()}

    def collate(self, part, samples, generators, shared, pad_to=None):
        return {}  # the loss, a mean over pictures of one size, needs nothing beside them
