"""Trains unified multimodal models, above all with Reconstruction Alignment (RecA, arXiv 2509.07295). One loop, every architecture, every stage.

    torchrun train.py --arch mar                                          # RecA on the tiny model from the shipped base weights: score before, train, score after
    torchrun --nproc_per_node=2 train.py --arch mar --data photos.tar     # RecA on real images, no captions needed; two processes
    torchrun --nproc_per_node=8 train.py --arch mar --config harmon-1.5b --ckpt harmon_1.5b.pth --tokenizer-ckpt kl16.ckpt \\
             --text-tokenizer qwen.tiktoken --data images/ --i2t-data llava_v1_5_mix665k.json --image-root coco/   # the published run
    torchrun train.py --arch mar --stage tokenizer                        # from nothing: 1. the image autoencoder,
    torchrun train.py --arch mar --stage base                             #               2. a model that understands and draws,
    torchrun train.py --arch mar --stage reca                             #               3. RecA (or --stage sft, the control: keep training on captions)
    torchrun train.py --resume runs/mar-reca                              # continue: same losses, bit for bit, as if it had never stopped

What RecA does: encode an image with the model's own UNDERSTANDING side, put those embeddings in the context like a very dense prompt, and train the GENERATION side to
draw the image again with its ordinary loss (`reca_loss` in each model file). Where understanding shares parameters, image-to-text loss keeps it alive (--i2t-weight).

--batch counts samples per optimizer step and part over all processes; one step is --accum micro-batches, gradients are exchanged in the last one only. Every random
number is a function of (--seed, step, place in the global batch), never of the number of processes or workers, so N processes compute what one would (but for dropout and
the tokenizer stage's posterior noise, which are drawn per process), and a resumed run what an uninterrupted one would.

The run folder (--out) gets model.safetensors + config.json (for sample.py), checkpoint.pt (for --resume), result.json (command, commit, scores), log.jsonl, loss.png,
before_after.png. Ctrl-C and SIGTERM save a checkpoint first.
"""

import argparse
import atexit
import contextlib
import dataclasses
import fractions
import importlib
import json
import math
import os
import queue
import shlex
import shutil
import signal
import sys
import threading
import time

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns once per process that it need not have looked for unused parameters

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import data
import evaluate
import image_tokenizer
import sample

# RecA as published, per architecture, and what the tiny models of the shape world use instead. Every key is a flag.
# --batch is ours: the release fixes no number of GPUs. BAGEL stops at step 1000, inside its warm-up, as the release's own command does. Show-o's cosine is spread over
# a million steps: over these it is constant.
PUBLISHED = {
    "mar": dict(lr=1e-5, betas=(0.9, 0.95), weight_decay=0.02, warmup=125, clip=1.0, steps=5000, batch=384, i2t_weight=1.0, drop=0.1, schedule="cosine"),
    "ar": dict(lr=5e-7, betas=(0.9, 0.999), weight_decay=0.01, warmup=1000, clip=0.0, steps=5000, batch=16, i2t_weight=1.0, drop=0.0, schedule="constant"),
    "diffusion": dict(lr=4e-5, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-15, warmup=1000, clip=1.0, steps=1000, batch=48, i2t_weight=0.0, drop=0.1, schedule="constant"),
}
TINY = {
    "tokenizer": dict(lr=6e-3, betas=(0.9, 0.95), weight_decay=0.0, warmup=50, clip=1.0, steps=4000, batch=64, i2t_weight=1.0, drop=0.1, schedule="cosine"),
    "base": dict(lr=1e-3, muon_lr=0.02, muon_decay=0.3, betas=(0.9, 0.95), weight_decay=0.02, warmup=100, clip=1.0, steps=5000, batch=48, i2t_weight=1.0, drop=0.1, schedule="cosine"),
    "sft": dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup=20, clip=1.0, steps=300, batch=96, i2t_weight=1.0, drop=0.1, schedule="cosine"),
    "reca": dict(lr=2e-4, betas=(0.9, 0.95), weight_decay=0.02, warmup=20, clip=1.0, steps=300, batch=96, i2t_weight=1.0, drop=0.1, schedule="cosine"),
}
# muon_decay: Muon's steps all have one size, so no singular value grows beyond 1 / muon_decay. In a base with 0.02 the projected picture tokens became a thousand times as
# large as words; then blocks cannot add to them, and features and words are not read alike.
# Tiny models: noise-prediction losses are about 0.05 where cross entropies are about 0.5, so drawing would get a tenth of the shared backbone's gradient. BAGEL's
# drawing has an expert of its own; there the weight only says who shapes the understanding expert (with 8, half the questions stayed at chance).
DRAWING_WEIGHT = {"mar": 8.0, "ar": 1.0, "diffusion": 1.0}
ALIGN_WEIGHT = 0.25  # a contrast over a batch of 48: it starts at log 48 = 3.9, several times the other losses, and never comes near zero
# The parts of a step, and their share of --batch. Loss weights are 1 unless a flag says otherwise.
#   recon   RecA: a picture's own features -> the picture      t2i     caption -> picture
#   i2t     picture -> answer or description                   uncond  empty prompt -> picture, which needs no caption, so any picture will do
#   edit    picture and instruction -> edited picture          text    text alone
#   align   captions to the places of their pictures           words   the same for the words of dense captions, each for itself
MIX = {
    "tokenizer": {"images": 1.0},
    "base": {"t2i": 1.0, "i2t": 1.0, "edit": 0.5, "text": 0.25, "align": 1.0},
    "sft": {"t2i": 1.0, "i2t": 1.0},
    "reca": {"recon": 1.0, "i2t": 1.0},
}
# Where a tiny model's recipe is its own, as its seeds in results/ were run; the numbers are in results/LOG.md.
# Captions stand beside RecA in all three, because features teach that a place is empty unless something is said of that place, and prompts name no places. (Not the whole
# reason: RecA alone also loses where features tell no places.)
# AR base: with align and strong decay together it scored .40 instead of .55 (one seed; which of them does it was not separated).
# AR after it: no i2t, which costs half the compute, changes nothing in drawing and keeps .006 of the questions. 1,200 steps, since RecA and its control still gained after 300
# from the first bases; from bases trained for twice as long neither gains.
# MAR: a base of this recipe answers .97-.99 of the questions (at Muon .02, one question a row and `align`: .81-.86) and reconstructs, it seems by copying place by place,
# which teaches its drawing little; so RecA sees the board's cells in random order (what is there, not where) in half of its pictures, and the others as they are, so that
# it need not forget how to reconstruct.
# BAGEL, for the same reason: the features in random order. Its drawing expert was last trained on captions as poor as these; with Muon; edits so that editing stays.
# Poor captions in both, since there RecA helps most.
POOR_CAPTIONS = dict(sparse_captions=0.6, wrong_captions=0.4)
TINY_OWN = {
    ("ar", "base"): dict(muon_decay=0.02, steps=5500, mix=["t2i=1", "i2t=0.75", "edit=0.75", "text=0.25"]),
    ("ar", "reca"): dict(steps=1200, i2t_weight=0.0, t2i_weight=1.0, mix=["recon=0.5", "t2i=0.5"]),
    ("ar", "sft"): dict(steps=1200, i2t_weight=0.0),
    ("mar", "base"): dict(
        lr=2e-3, muon_lr=0.005, muon_decay=0.1, questions=4, steps=6000, mix=["t2i=1", "i2t=0.75", "edit=0.5", "text=0.25", "words=0.5"], **POOR_CAPTIONS
    ),
    ("mar", "reca"): dict(t2i_weight=1.0, mix=["recon=0.5", "t2i=0.5", "i2t=1"], understanding="scrambled", altered_share=0.5, **POOR_CAPTIONS),
    ("mar", "sft"): dict(**POOR_CAPTIONS),
    ("diffusion", "base"): dict(drop=0.0, steps=3500, mix=["t2i=1", "uncond=0.25", "i2t=1", "edit=0.5", "text=0.25", "align=1"]),
    ("diffusion", "reca"): dict(muon_lr=0.005, steps=400, t2i_weight=1.0, mix=["recon=0.5", "t2i=0.5", "edit=0.25"], understanding="shuffled", **POOR_CAPTIONS),
    ("diffusion", "sft"): dict(muon_lr=0.005, steps=400, mix=["t2i=1", "edit=0.25"], **POOR_CAPTIONS),
}
KIND = {"oracle": "t2i", "uncond": "t2i"}  # parts that are another part's rows with other data
TOKENIZERS = {"mar": ("tiny-kl", "vae"), "ar": ("tiny-lfq", "vq"), "diffusion": ("tiny-kl", "vae")}  # name of the tiny one, attribute of the model
# What reaches RecA's context: all of it; the picture at a quarter of its size; the board's cells, or the features, in random order; their mean; an untrained encoder's
UNDERSTANDING = ("full", "shrunk", "scrambled", "shuffled", "pooled", "random")
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40": 181, "4090": 165, "3090": 71}  # dense bf16, for MFU


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--arch", choices=sample.ARCHS, default="mar")
    g.add_argument("--stage", choices=MIX, default="reca")
    g.add_argument("--config", default="tiny", help="model size: tiny or a published one")
    g.add_argument("--ckpt", help="weights to start from (default: the shipped base for reca and sft)")
    g.add_argument("--tokenizer-ckpt", help="image tokenizer: our folder (base stage) or the published file")
    g.add_argument("--vision-ckpt", help="published CLIP file of the Show-o CLIP variants")
    g.add_argument("--text-tokenizer", help="published text tokenizer; the tiny one is shipped")
    g.add_argument("--out", help="run folder (default runs/ARCH-STAGE)")
    g.add_argument("--resume", metavar="RUN", help="run folder to continue; its arguments are kept unless given again")
    g = p.add_argument_group("data (default: the shape world)")
    g.add_argument(
        "--data", nargs="+", help="images for RecA: folders, tar shards, files; captions are not read (with --stage sft or base: captioned, for text-to-image)"
    )
    g.add_argument("--i2t-data", nargs="+", help="what keeps understanding: LLaVA-style JSON, or captioned folders / tars (default: the shape world for tiny)")
    g.add_argument("--image-root", help="folder that the image paths of a LLaVA JSON are relative to")
    g.add_argument("--pool", type=int, help="shape-world pictures per pool (default 8000; base 40000, tokenizer 20000)")
    g.add_argument("--captioned", type=int, help="size of the captioned shape-world set (default: --pool)")
    g.add_argument("--wrong-captions", type=float, help="share of captions that are false")
    g.add_argument("--sparse-captions", type=float, help="chance with which captions leave an object out, and a colour (rare colours: two thirds of what is left, too)")
    g.add_argument("--pool-without-held-out", action="store_true", help="ablation: leave the held-out combinations out of the unlabelled pool too")
    g = p.add_argument_group("RecA (defaults: published values for published sizes)")
    g.add_argument("--i2t-weight", type=float, help="weight of the image-to-text loss; 0 leaves the part out")
    g.add_argument("--t2i-weight", type=float, help="weight of text-to-image and editing; in RecA the paper's lambda (published: 0, the part is left out)")
    g.add_argument("--drop", type=float, help="conditioning dropout: share of samples that get the empty prompt")
    g.add_argument("--questions", type=int, help="questions about a picture in one image-to-text row, each a turn of its own (shape world)")
    g.add_argument("--templates", type=int, default=0, help="how many template requests to sample from; 0 = all")
    g.add_argument("--grad-scale", type=float, help="gradient scale on the clean features (MAR: 0.1)")
    g.add_argument("--understanding", choices=UNDERSTANDING, help="what of the picture reaches RecA's context (shape world)")
    g.add_argument("--altered-share", type=float, help="for which share of RecA's pictures --understanding holds; the rest are seen in full (default 1; tiny mar, where no --understanding is typed, 0.5)")
    g.add_argument("--oracle-captions", nargs="?", const="dense", choices=("dense", "clean"),
                   help="ablation: RecA's pictures come with a true caption as a t2i prompt instead of features: dense (all there is to say) or "
                        "clean (worded like the judged prompts)")
    g = p.add_argument_group("optimisation")
    for name, kind, text in (
        ("steps", int, "optimizer steps"),
        ("batch", int, "samples per step and part, over all processes"),
        ("lr", float, "of AdamW"),
        ("muon-lr", float, "of Muon for the matrices of blocks and projectors; 0 = AdamW for all (published; tiny: 0.02 in the base stage, diffusion 0.005 after it)"),
        ("muon-decay", float, "weight decay of Muon's matrices; bounds their singular values by 1 / this"),
        ("warmup", int, "steps"),
        ("weight-decay", float, "1-D tensors and the recipe's exemptions never decay"),
        ("clip", float, "gradient norm; 0 = off"),
    ):
        g.add_argument(f"--{name}", type=kind, help=text)
    g.add_argument("--betas", type=float, nargs=2)
    g.add_argument("--eps", type=float, help="of AdamW")
    g.add_argument("--schedule", choices=("cosine", "constant"))
    g.add_argument("--accum", type=int, default=1, help="micro-batches per step: raise it when memory runs out")
    g.add_argument(
        "--text-length",
        type=int,
        help="text tokens per row; N = fixed; 0 = the longest of the batch, for mar and ar rounded up so that shapes take few values (default, but for diffusion on GPU: the config's maximum)",
    )
    g.add_argument("--mix", nargs="+", metavar="PART=SHARE", help="shares of --batch per part, e.g. t2i=1 i2t=0.5 (default: MIX and TINY_OWN above)")
    g.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, e.g. 0.999; 0 = off")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("machine")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    g.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="compute type; weights stay fp32. auto: bf16 on GPUs that have it")
    g.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile; auto: published sizes on GPUs, eager where the compiler fails")
    g.add_argument("--checkpoint", choices=("none", "full"), default="none", help="full: recompute activations in backward, a third slower, far less memory")
    g.add_argument(
        "--cache-gb", type=float, default=8.0, help="host memory for the frozen encodings of one pool of images; a larger pool is encoded step by step"
    )
    g.add_argument("--threads", type=int, help="CPU threads per process")
    g = p.add_argument_group("output")
    g.add_argument("--eval-n", type=int, default=300, help="judged pictures before and after (shape world); 0 = no scores")
    g.add_argument("--eval-every", type=int, default=0, help="also every so many steps")
    g.add_argument("--eval-split", choices=("dev", "test"), default="test", help="dev: prompts for choosing settings")
    g.add_argument("--cfg", type=float, help="guidance the model is scored at and saved with (default: the checkpoint's)")
    g.add_argument("--save-every", type=int, default=500)
    g.add_argument("--log-every", type=int, default=10)
    g.add_argument("--stop-after", type=int, default=0, help="save a checkpoint and stop after this step, as a signal would (0 = run to the end)")
    g.add_argument("--log", choices=("wandb", "tensorboard"), help="optional extra logger")
    args = p.parse_args(argv)
    if args.resume:  # the stored arguments become the defaults; what is typed now wins
        state, out = read_checkpoint(args.resume), args.out
        p.set_defaults(**{"questions": 1, "altered_share": 1.0} | state["args"])  # what older runs did
        args = p.parse_args(argv)
        args.out = out or args.resume
        for name in ("arch", "config", "stage"):
            if getattr(args, name) != state["args"][name]:
                raise ValueError(
                    f"--resume {args.resume}: that is a run of --{name} {state['args'][name]}, not {getattr(args, name)}; give it to a new run as --ckpt {args.resume}"
                )
        return args, state
    recipe = dict(TINY[args.stage] if args.config == "tiny" else PUBLISHED[args.arch], t2i_weight=float(args.stage != "reca"))
    bias = data.CAPTION_BIAS
    recipe = dict(eps=1e-8, questions=1, muon_lr=0.0, muon_decay=0.02, understanding="full", altered_share=1.0, wrong_captions=bias["wrong"], sparse_captions=bias["drop_object"]) | recipe
    if args.config == "tiny":
        recipe["t2i_weight"] *= DRAWING_WEIGHT[args.arch]
        recipe["i2t_weight"] /= DRAWING_WEIGHT[args.arch] if args.stage == "reca" else 1.0
        if args.arch == "diffusion" and args.stage in ("sft", "reca"):
            recipe["i2t_weight"] = 0.0  # the understanding expert is frozen
        if not (args.data and args.stage == "reca"):  # your own images: plain RecA, without the shape world's captions beside it
            recipe |= TINY_OWN.get((args.arch, args.stage), {})
    if args.understanding:  # typed: for all pictures, unless --altered-share says otherwise
        recipe["altered_share"] = 1.0
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.betas = tuple(args.betas)
    args.out = args.out or os.path.join("runs", f"{args.arch}-{args.stage}")
    args.pool = args.pool or {"base": 40000, "tokenizer": 20000}.get(args.stage, 8000)
    args.captioned = args.captioned or args.pool
    args.text_length = 0 if args.text_length is None and args.device == "cpu" else args.text_length
    return args, None


def check_args(args, world):
    for name in ("steps", "batch", "accum", "pool", "captioned", "questions", "log_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if not mix(args):
        raise ValueError("--mix and the weights of the losses leave nothing to train on")
    for part, share in mix(args).items():
        n = round(args.batch * share)
        if n < 1:
            raise ValueError(f"--batch {args.batch} gives {n} {part} samples per step: raise --batch, or leave {part} out of --mix")
        if n % (world * args.accum):
            raise ValueError(
                f"--batch {args.batch} gives {n} {part} samples per step, which {world} process{'es' * (world > 1)} x --accum {args.accum} cannot share equally: "
                f"take a multiple of {math.lcm(*[fractions.Fraction(s).limit_denominator(100).denominator for s in mix(args).values()]) * world * args.accum}"
            )
    data.check_device(args.device)
    if args.cfg is not None and args.cfg < 1:
        raise ValueError(f"--cfg {args.cfg:g}: guidance starts at 1, which is none")
    if args.cfg is not None and args.stage == "tokenizer":
        raise ValueError(f"--cfg {args.cfg:g}: a tokenizer has no guidance; it is for the stages base, sft and reca")
    for name in ("drop", "wrong_captions", "sparse_captions", "altered_share"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name):g}: a share, from 0 to 1")
    if args.templates < 0 or args.templates > len(data.RECA_TEMPLATES):
        raise ValueError(f"--templates {args.templates}: there are {len(data.RECA_TEMPLATES)}; 0 means all")


def mix(args):
    """{part: share of --batch} of this run."""
    parts = dict(MIX[args.stage])
    if args.mix:
        try:
            parts = {part: float(share) for part, share in (item.split("=") for item in args.mix)}
        except ValueError:
            raise ValueError(f"--mix {' '.join(args.mix)}: expected PART=SHARE ..., e.g. t2i=1 i2t=0.5") from None
        if not set(parts) <= {"recon", "t2i", "uncond", "i2t", "edit", "text", "align", "words"}:
            raise ValueError(f"--mix {' '.join(args.mix)}: the parts are recon, t2i, uncond, i2t, edit, text, align, words")
    if args.stage == "reca" and args.t2i_weight > 0:
        if not args.mix:  # a typed mix is taken as it stands
            parts.setdefault("t2i", 1.0)
    elif args.stage == "reca":  # drawing from anything but features has no weight: plain RecA
        parts = {part: share for part, share in parts.items() if part not in ("t2i", "edit", "uncond")}
    if args.i2t_weight == 0:
        parts.pop("i2t", None)
    if args.oracle_captions:
        if "recon" not in parts:
            raise ValueError("--oracle-captions stand in the place of features: it needs --stage reca with recon in its --mix")
        parts["oracle"] = parts.pop("recon")
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer stage in the clothes of a model, so that the loop below trains it like the others
class TokenizerStage(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.config = image_tokenizer.TOKENIZERS[name]
        self.tokenizer = (image_tokenizer.LFQTokenizer if "lfq" in name else image_tokenizer.Autoencoder)(self.config)

    def trainable_parameters(self, stage):
        return list(self.named_parameters())

    def no_decay(self, name, p):
        return p.ndim < 2

    def precompute(self, images, stage="tokenizer"):
        return {"images": ((images + 1) * 127.5).round().byte()}

    def collate(self, part, samples, pad_to=None):
        return {}

    def target_count(self, part, tensors):
        return None

    def draw(self, part, generator, rate_generator):
        return {}

    def preprocess(self, image, purpose):
        return data.preprocess_stretch(image, data.IMAGE_SIZE)

    def forward(self, batch):
        images = batch["images"]["images"].float() / 127.5 - 1
        return {"images": image_tokenizer.tokenizer_loss(self.tokenizer, images, None)[0]}  # None: the global generator, which the loop seeds per step

    @torch.no_grad()
    def reconstruct(self, images, generator=None):
        return self.tokenizer.decode(self.tokenizer.encode(images))

    def flops_per_sample(self, part):
        return 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Data: pools of images whose frozen encodings are computed once, and batches that depend on (seed, step, place) alone
class Pools:
    """The images behind each part, and a text for each sample. `pool_of[part]` names the pool; `cache[pool]` holds the model's frozen encodings of it."""

    def __init__(self, args, model, stage, device, rank=0, world=1):
        self.args, self.parts = args, mix(args)
        self.templates = data.RECA_TEMPLATES[: args.templates or None]
        own = ("captioned" if stage in ("sft", "base") else "real") if args.data else None
        self.pool_of = dict.fromkeys(("recon", "i2t", "words", "uncond", "oracle"), "broad") | dict.fromkeys(("t2i", "align"), "captioned")
        self.pool_of |= {"edit": "edits", "images": own or "crowded"}
        if own:
            self.pool_of |= dict.fromkeys(("t2i", "align", "words", "uncond") if own == "captioned" else ("recon",), own)
        if args.i2t_data:
            self.pool_of["i2t"] = "understanding"
        elif args.config != "tiny" and "i2t" in self.parts:
            raise ValueError(
                f"--config {args.config}: RecA keeps understanding by image-to-text data, so give --i2t-data JSON (or --i2t-weight 0 to go without)"
            )
        if args.understanding != "full" and "recon" in self.parts:
            if args.data or (args.arch == "mar" and args.understanding not in ("shrunk", "scrambled")):
                raise ValueError(
                    f"--understanding {args.understanding}: an ablation of the shape world; --arch mar, whose encoder trains along, has only shrunk and scrambled"
                )
            self.pool_of["recon"] = "altered"  # apart from "broad", whose encodings image-to-text keeps as they are
        need = {self.pool_of[p] for p in self.parts if p in self.pool_of}
        if args.config != "tiny" and (need - {own, "understanding"} or not own):
            raise ValueError(
                f"--config {args.config} draws {getattr(model.config, 'image_size', 512)}-pixel pictures: give --data PATH (folders, tars) and only the parts "
                f"it has data for (--mix; here {', '.join(self.parts)}); the shape world is for tiny"
            )
        sources, self.text = self.shape_world(need - {own})
        if own:
            sources[own] = self.real_images = data.Images(args.data, captions=own == "captioned")
            self.text[own] = [s.caption for s in self.real_images.samples]
        if args.i2t_data:
            sources["understanding"] = listed = data.Images(args.i2t_data, captions=True, image_root=args.image_root)
            self.text["understanding"] = [s.turns or ((self.templates[0], s.caption),) for s in listed.samples]
        self.listed = {name: source for name, source in sources.items() if isinstance(source, data.Images)}
        self.scenes = {name: source for name, source in sources.items() if isinstance(source, data.Scenes)}
        self.cache, self.size, self.sources = {}, {}, {}
        start = time.time()
        need |= {"edit_sources"} & set(sources)
        for name in sorted(need):
            source = sources[name]
            self.size[name] = len(source)
            one = self.encode(model, source, name, stage, device, [0])
            need_bytes = len(source) * sum(v.numel() * v.element_size() for v in one.values())
            if need_bytes <= args.cache_gb * 1e9:
                self.cache[name] = self.encode_all(model, source, name, stage, device, rank, world)
            elif name == "altered":
                raise ValueError(
                    f"--understanding {args.understanding}: its pool must be cached ({need_bytes / 1e9:.1f} GB): raise --cache-gb ({args.cache_gb:g}) or lower --pool"
                )
            else:
                self.sources[name] = source
                if rank == 0:
                    print(
                        f"pool {name}: encodings of {len(source):,} images would take {need_bytes / 1e9:.1f} GB (--cache-gb {args.cache_gb:g}), "
                        f"so each step encodes its own"
                    )
        self.size["text"] = args.pool
        if rank == 0:
            print(
                "pools: " + ", ".join(f"{k} {self.size[k]:,}" for k in sorted(need)) + f" images, frozen encodings computed in {time.time() - start:.1f} s",
                flush=True,
            )

    def shape_world(self, need):
        """-> {pool: its scenes (or pictures)} and {pool: its texts} of the shape world."""
        args, sources, text = self.args, {}, {}
        if "crowded" in need:
            sources["crowded"] = data.crowded_pictures(args.pool, seed=args.seed)
        if {"broad", "altered"} & need or "text" in self.parts:
            sources["broad"] = sources["altered"] = data.Scenes(args.pool, seed=10 + args.seed, captioned=args.pool_without_held_out)
        if "captioned" in need:
            scenes = sources["captioned"] = data.Scenes(args.captioned, seed=20 + args.seed, captioned=True)
            sparse, n = args.sparse_captions, len(scenes)
            bias = dict(data.CAPTION_BIAS, wrong=args.wrong_captions, drop_object=sparse, drop_color=sparse, drop_rare_color=1 - (1 - sparse) / 3)
            text["captioned"] = [
                data.sparse_caption(scenes.scene(i), data.text_rng(args.seed, i, "caption"), bias, scenes.scene((i + 1) % n)) for i in range(n)
            ]
        if "edits" in need:
            scenes = sources["edit_sources"] = data.Scenes(args.pool, seed=30 + args.seed, captioned=True)
            edits = [data.clean_edit(scenes.scene(i), data.text_rng(args.seed, i, "edit")) for i in range(len(scenes))]
            text["edits"], sources["edits"] = [e[0] for e in edits], data.Scenes.of([e[1] for e in edits])
        return sources, text

    def pixels(self, model, source, name, rows):
        """Images (n, 3, H, W) in [-1, 1] of some rows of a source, preprocessed as the model was trained to see them."""
        if isinstance(source, data.Scenes):
            return evaluate.to_float(source[rows].render())
        if isinstance(source, np.ndarray):
            return evaluate.to_float(source[rows])
        answers = "understand" if self.args.arch != "diffusion" else "recon"  # BAGEL's "understand" keeps proportions
        purpose = {"understanding": answers, "captioned": "generate"}.get(name, "recon")
        return torch.stack([model.preprocess(source[int(j)][1], purpose) for j in rows])

    @torch.no_grad()
    def encode(self, model, source, name, stage, device, rows, show=False):
        """The frozen encodings of some rows, on the CPU."""
        was, chunk = model.training, 256 if getattr(model.config, "image_size", 48) <= 64 else 8
        model.eval()
        starts = data.Progress(range(0, len(rows), chunk), f"encoding {name}", show)
        chunks = []
        for i in starts:
            pixels = self.pixels(model, source, name, rows[i : i + chunk]).to(device)
            out = model.precompute(pixels, stage)
            if name == "altered":
                index = rows[i : i + chunk]
                full = torch.as_tensor(index) >= round(self.args.altered_share * self.size[name])  # the pool is in no order
                for k, v in self.alter(model, pixels, out, stage, index).items():
                    v[full] = out[k.removeprefix("source_")][full]
                    out[k] = v
            chunks.append({k: v.cpu() for k, v in out.items()})
        model.train(was)
        return {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}

    def alter(self, model, pixels, seen, stage, rows):
        """What stands in RecA's context instead of the picture's full understanding (--understanding): {key: tensor} to overwrite in `seen`."""
        kind, key = self.args.understanding, "features" if "features" in seen else "latents"
        if kind in ("scrambled", "shuffled") and not hasattr(self, "orders"):  # all of them at once, so that row i has the same one on whatever process it is
            generator = data.sample_generator(self.args.seed, 0, 0, "altered")
            places = 9 if kind == "scrambled" else seen[key].shape[1]
            self.orders = torch.stack([torch.randperm(places, generator=generator) for _ in range(self.size["altered"])])
        if kind in ("shrunk", "scrambled"):  # another picture, before the encoder
            if kind == "shrunk":
                other = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")
            else:
                side = pixels.shape[-1] // 3
                cells = F.unfold(pixels, side, stride=side)  # (n, 3 side side, 9)
                order = self.orders[torch.as_tensor(rows)].to(pixels.device)[:, None].expand_as(cells)
                other = F.fold(cells.gather(2, order), pixels.shape[-2:], side, stride=side)
            return {("source_" if key == "latents" else "") + key: model.precompute(other, stage)[key]}
        x = seen[key]  # (n, A, width)
        if kind == "shuffled":
            order = self.orders[torch.as_tensor(rows)].to(x.device)
            return {key: x.gather(1, order[..., None].expand_as(x))}
        if kind == "pooled":
            return {key: x.mean(1, keepdim=True).expand_as(x).clone()}
        if not hasattr(self, "untrained"):
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                self.untrained = type(model)(model.config, model.tokenizer).to(pixels.device).eval()
        return {key: self.untrained.precompute(pixels, stage)[key]}

    def encode_all(self, model, source, name, stage, device, rank, world):
        """The whole pool: every process encodes its contiguous share, then all share the result."""
        n = len(source)
        share = -(-n // world)
        rows = [min(i, n - 1) for i in range(rank * share, (rank + 1) * share)]  # the last share is filled up, so that all are of one size
        out = self.encode(model, source, name, stage, device, rows, rank == 0)
        for k, v in out.items() if world > 1 else ():
            parts = [torch.empty_like(v, device=device) for _ in range(world)]
            dist.all_gather(parts, v.to(device).contiguous())
            out[k] = torch.cat(parts).cpu()[:n]
        return out

    @torch.no_grad()
    def complete(self, model, tensors, stage):
        """Adds the frozen encodings of images that came as pixels because their pool was too large to cache."""
        for prefix in ("source_", ""):
            if prefix + "pixels_in" in tensors:
                was = model.training
                model.eval()
                tensors.update({prefix + k: v for k, v in model.precompute(tensors.pop(prefix + "pixels_in"), stage).items()})
                model.train(was)
        return tensors

    def fetch(self, model, name, index, prefix=""):
        if name in self.cache:
            return {prefix + k: v[index] for k, v in self.cache[name].items()}
        return {prefix + "pixels_in": self.pixels(model, self.sources[name], name, index)}

    def sample(self, part, i, rng):
        """The text of sample i of a part: a dict for model.collate."""
        pool = self.pool_of.get(part)
        if part in ("t2i", "align", "words", "i2t") and pool in self.listed:
            i = self.listed[pool].row(i)
        if part == "recon":
            # with captions beside it, RecA leaves the unconditional half of guidance to them: it should know the captioned distribution, not the pool's
            return {"prompt": rng.choice(self.templates), "drop": rng.random() < self.args.drop * ("t2i" not in self.parts)}
        if part == "t2i":
            return {"caption": self.text[pool][i], "drop": rng.random() < self.args.drop}
        if part == "words" and pool in self.scenes:  # everything there is to say: what is not in it is not in the picture
            return {"caption": data.dense_caption(self.scenes[pool].scene(i), rng)}
        if part in ("align", "words"):
            return {"caption": self.text[pool][i]}
        if part == "uncond":
            return {"caption": "", "drop": True}
        if part == "oracle":
            scene = self.scenes[pool].scene(i)
            caption = data.dense_caption(scene, rng) if self.args.oracle_captions == "dense" else data.sparse_caption(scene, rng, data.CLEAN_CAPTIONS)
            return {"caption": caption, "drop": rng.random() < self.args.drop}
        if part == "edit":
            return {"instruction": self.text[pool][i], "drop": False}
        if part == "text":
            ground, objects = self.scenes["broad"].scene(i)
            q, answer = data.text_question((ground, objects[:2]), rng)  # two objects: rows stay short, and short rows are what a CPU trains fast
            return {"question": q, "answer": answer}
        if part == "i2t" and pool == "understanding":
            q, answer = rng.choice(self.text[pool][i])
            return {"question": q, "answer": answer}
        if part == "i2t":
            scene = self.scenes[pool].scene(i)
            if len(scene[1]) <= 2 and rng.random() < 0.4:  # the same holds for dense captions
                return {"question": rng.choice(self.templates), "answer": data.dense_caption(scene, rng)}
            return {"turns": [data.question(scene, rng)[:2] for _ in range(self.args.questions)]}
        return {}

    def batch(self, model, step, micro, rank, world):
        """Micro-batch `micro` of optimizer step `step` for this process: {part: tensors}. A pure function of its arguments and --seed."""
        out, seed = {}, self.args.seed
        for part, share in self.parts.items():
            n = round(self.args.batch * share)
            per = n // (world * self.args.accum)
            name = self.pool_of.get(part)
            size = self.size[name if name else "text"]
            places = range((micro * world + rank) * per, (micro * world + rank + 1) * per)
            index = data.batch_indices(size, n, seed, step, part)[places.start : places.stop]
            encodings = self.fetch(model, name, index) if name else {}  # before the texts: reading a listed picture tells whose text belongs to it
            rows = [self.sample(part, int(i), data.text_rng(seed, step, part, place)) for i, place in zip(index, places)]
            kind = KIND.get(part, part)
            rate = [data.sample_generator(seed, step, micro, f"rate-{part}") for _ in places]  # the same numbers for the whole micro-batch, on every process
            if part in ("align", "words"):
                words = torch.zeros(per, model.tokenizer.vocab_size)
                for k, row in enumerate(rows):
                    words[k, model.tokenizer.encode_ordinary(row["caption"])] = 1
                out[part] = {"words": words, **encodings}
                continue
            draws = [model.draw(kind, data.sample_generator(seed, step, place, part), r) for place, r in zip(places, rate)]
            tensors = {k: torch.stack([d[k] for d in draws]) for k in draws[0]}
            tensors.update(model.collate(kind, rows, self.args.text_length))
            if part == "edit":
                tensors.update(self.fetch(model, "edit_sources", index, "source_"))
            out[part] = tensors | encodings
        return out


def prefetch(make, steps, depth=2):
    """Runs make(step) for each step in a thread, `depth` ahead. Order and content depend on the step alone, so nothing is lost or repeated on resume.
    Returns get() -> the next item, and close(), which ends the thread: one that is still inside torch while Python shuts down aborts the whole process."""
    q, stop = queue.Queue(depth), threading.Event()

    def work():
        for s in steps:
            try:
                item = make(s)
            except BaseException as e:  # handed to the main thread, which raises it where the user sees it
                item = e
            while not stop.is_set():
                try:
                    q.put(item, timeout=0.2)
                    break
                except queue.Full:
                    pass
            if stop.is_set() or isinstance(item, BaseException):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def close():
        stop.set()
        thread.join()
        atexit.unregister(close)

    atexit.register(close)  # for a run that ends with an error

    def get():
        item = q.get()
        if isinstance(item, BaseException):
            raise item
        return item

    return get, close


# ----------------------------------------------------------------------------------------------------------------------
# Model, optimizer, checkpoints
def build(args, device):
    """The model of this run with its starting weights."""
    if args.stage == "tokenizer":
        model = TokenizerStage(TOKENIZERS[args.arch][0])
        if args.ckpt:
            image_tokenizer.load_strict(model.tokenizer, image_tokenizer.read_weights(args.ckpt), args.ckpt)
        return model
    if args.stage == "base" and not args.ckpt:
        module = importlib.import_module(sample.ARCHS[args.arch])
        if args.config not in module.CONFIGS:
            raise ValueError(f"--config {args.config}: --arch {args.arch} knows {', '.join(module.CONFIGS)}")
        config = module.CONFIGS[args.config]
        name, attribute = TOKENIZERS[args.arch]
        folder = args.tokenizer_ckpt or os.path.join(sample.HERE, "weights", name)
        vae = sample.from_dict(type(getattr(config, attribute)), sample.read_config(folder)["config"])
        model = module.Model(dataclasses.replace(config, **{attribute: vae}), data.load_tokenizer(args.text_tokenizer or "tiny"))
        image_tokenizer.load_strict(getattr(model, attribute), image_tokenizer.read_weights(folder), folder)
        return model
    ckpt = args.ckpt or sample.default_weights(args.arch, "base")
    return sample.load_model(args.arch, ckpt, args.config, args.tokenizer_ckpt, args.text_tokenizer, vision_ckpt=args.vision_ckpt)


def save_weights(args, model, **extra):
    if args.stage == "tokenizer":
        os.makedirs(args.out, exist_ok=True)
        image_tokenizer.write_safetensors(os.path.join(args.out, "model.safetensors"), model.tokenizer.state_dict())
        data.write_text(
            os.path.join(args.out, "config.json"), json.dumps(dict(arch=args.arch, config=dataclasses.asdict(model.tokenizer.config), **extra), indent=1)
        )
    else:
        sample.save_model(model, args.out, args.arch, text_tokenizer=args.text_tokenizer or "tiny", **extra)


def save_checkpoint(args, step, model, optimizers, ema, history):
    """checkpoint.pt for --resume: weights, optimizers, position (each step seeds itself from it). Written under a temporary name, synced, renamed: a crash leaves
    the old one."""
    state = dict(
        step=step,
        args=vars(args),
        model=model.state_dict(),
        optimizers=[o.state_dict() for o in optimizers],
        ema=ema,
        history=history,
    )
    path = os.path.join(args.out, "checkpoint.pt")
    need = sum(t.numel() * t.element_size() for t in model.state_dict().values()) * 4
    free = shutil.disk_usage(args.out).free
    if need > free:
        raise ValueError(
            f"{path}: the checkpoint needs about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: make room or give --out on another disk "
            f"(the last checkpoint is untouched)"
        )
    data.atomic(path, lambda f: torch.save(state, f))


def read_checkpoint(folder):
    path = os.path.join(folder, "checkpoint.pt")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--resume {folder}: no checkpoint.pt there; give the run folder of a run that saved one")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError(f"{path}: cannot be read ({str(e).splitlines()[0][:120]}): it is truncated or not a checkpoint of train.py") from None


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal by five Newton-Schulz steps (Jordan et al. 2024); coefficients, Nesterov momentum, decay and scale as in
    torch.optim.Muon, which always iterates in bf16: on a processor without bf16 products that is two thirds of a tiny model's step. Here the products are fp32 on
    CPUs, bf16 on GPUs, and matrices of one shape go together. params: 2-D tensors."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # (matrices, rows, columns)
                x = orthogonalize(x if x.device.type == "cpu" else x.bfloat16()).to(same[0].dtype)
                torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(same, list(x.unbind()), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))


def orthogonalize(x):
    """(n, rows, columns) -> the same singular vectors with singular values of roughly 1, in the dtype of x."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(args, model, named):
    """[AdamW], or with --muon-lr [AdamW, Muon]: Muon takes the 2-D weights of numbered modules (blocks, projectors),
    AdamW keeps embeddings, heads, norms and biases. At these sizes a base model needs about half the samples with it."""
    hidden = [(n, p) for n, p in named if args.muon_lr and p.ndim == 2 and any(k.isdigit() for k in n.split(".")) and not model.no_decay(n, p)]
    taken = {n for n, _ in hidden}
    decay = [p for n, p in named if n not in taken and p.ndim >= 2 and not model.no_decay(n, p)]
    rest = [p for n, p in named if p.ndim < 2 or model.no_decay(n, p)]
    groups = [g for g in (dict(params=decay, weight_decay=args.weight_decay), dict(params=rest, weight_decay=0.0)) if g["params"]]
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=args.betas, eps=args.eps, fused=args.device != "cpu" or None)]
    if hidden:
        optimizers.append(Muon([p for _, p in hidden], lr=args.muon_lr, weight_decay=args.muon_decay))
    return optimizers


def learning_rate(args, step, lr):
    """Linear warm-up to `lr`, then constant, or half a cosine to zero, as Harmon and Show-o were trained."""
    if step < args.warmup:
        return lr * (step + 1) / args.warmup
    if args.schedule == "constant":
        return lr
    t = (step - args.warmup) / max(1, args.steps - args.warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def activation_checkpointing(model):
    """Recomputes every transformer block in the backward pass instead of keeping its activations."""
    from torch.utils.checkpoint import checkpoint

    for name, m in model.named_modules():
        if name.rpartition(".")[2].isdigit() and name.rpartition(".")[0].endswith(("layers", "blocks")):
            m.forward = (lambda f: lambda *a, **k: checkpoint(f, *a, use_reentrant=False, **k))(m.forward)


def check_memory(args, named, model):
    """fp32 weights and gradients of what trains, two Adam moments, weights of the rest; activations come on top."""
    need = 16 * sum(p.numel() for _, p in named) + 4 * (sum(p.numel() for p in model.parameters()) - sum(p.numel() for _, p in named))
    if args.device.startswith("cuda"):
        free = torch.cuda.mem_get_info()[0]
    else:
        known = {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= set(getattr(os, "sysconf_names", ()))  # macOS does not say
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else need
    if need > free:
        raise ValueError(
            f"--config {args.config} --stage {args.stage} needs {need / 1e9:.1f} GB for weights, gradients and Adam before any activation, {free / 1e9:.1f} GB are free: "
            f"take a smaller --config, or a larger machine"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and lines
def plot_curves(path, history, keys):
    """Loss curves as a PNG: one line per part, smoothed."""
    series = {}
    for k in keys:
        rows = [r for r in history if k in r and "loss" in r]
        smooth = []
        for r in rows:
            smooth.append(r[k] if not smooth else 0.9 * smooth[-1] + 0.1 * r[k])
        series[k] = [r["step"] for r in rows], smooth
    sample.save_png(sample.plot(series, "optimizer step"), path)


def pictures_of(args, model, device, real):
    """What goes into before_after.png: drawings for fixed prompts (shape world), or reconstructions of the first images of --data."""
    g = torch.Generator(device).manual_seed(args.seed)
    if args.stage == "tokenizer" or real is not None:
        source = real[:8] if real is not None else data.Scenes(8, seed=777).render()
        x = evaluate.to_float(source, device)
        return evaluate.to_uint8(model.reconstruct(x, generator=g)), ["reconstruction"] * len(x), source
    prompts = sample.DEFAULT_PROMPTS[:8] + sample.DEFAULT_PROMPTS[12:16]
    return evaluate.to_uint8(model.generate(prompts, generator=g)), prompts, None


@torch.no_grad()
def look(args, model, device, real):
    was = model.training
    model.eval()
    out = pictures_of(args, model, device, real)
    model.train(was)
    return out


def scores(args, model):
    """Numbers before and after: the judge's for models, reconstruction only for tokenizers. None where the shape world does not apply."""
    if not args.eval_n or args.config != "tiny":
        return None, None
    if args.stage == "tokenizer":
        r = evaluate.score_reconstruction(model, args.eval_n)[0]
        return r, f"reconstruction: objects {r['objects']:.3f}, exact pictures {r['exact']:.3f}, pixel error {r['pixel_error']:.2f} grey levels"
    s = evaluate.score_all(model, args.eval_n, seed=0, split=args.eval_split, questions=min(400, args.eval_n + 100), editing=args.arch == "diffusion")[0]
    return s, evaluate.report(s)


def meta(args, world):
    """What is needed to repeat a run: run.json holds this, result.json this and the scores (results/ is made of those)."""
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    command = f"torchrun{f' --nproc_per_node={world}' * (world > 1)} train.py {shlex.join(sys.argv[1:])}"
    here = dict(commit=sample.git_commit(), torch=torch.__version__, world=world, device=device)
    return dict(arch=args.arch, stage=args.stage, seed=args.seed, command=command, **here, args=vars(args))


# ----------------------------------------------------------------------------------------------------------------------
def main(argv=None):
    started = time.time()
    args, state = parse_args(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_args(args, world)
    about = meta(args, world)  # now: the commit may be another one when the run ends
    if args.device == "cuda" or (world > 1 and args.device.startswith("cuda")):
        args.device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0))}"
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    device = torch.device(args.device)
    if args.threads or device.type == "cpu":  # torchrun sets OMP_NUM_THREADS=1; the cores belong to all processes together
        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)))))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    main_process = rank == 0
    say = lambda *a: print(*a, flush=True) if main_process else None
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True

    model = build(args, device)
    if state is not None:
        model.load_state_dict(state["model"])
    if args.grad_scale is not None and hasattr(model.config, "grad_scale"):
        model.config.grad_scale = args.grad_scale
    if args.cfg is not None:
        model.config.cfg = args.cfg
    model.to(device)
    named = model.trainable_parameters(args.stage)
    check_memory(args, named, model)
    pools = Pools(args, model, args.stage, device, rank, world)
    optimizers = make_optimizers(args, model, named)
    start, history, ema = 0, [], None
    if args.ema:
        ema = {n: p.detach().clone() for n, p in named}
    if state is not None:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            typed = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]  # what is typed now wins over what was saved
            optimizer.load_state_dict(saved)
            for group, settings in zip(optimizer.param_groups, typed):
                group.update(settings)
        start, history = state["step"], state["history"]
        for n, v in ((state["ema"] or {}) if ema else {}).items():
            ema[n].copy_(v)
        say(f"resumed {args.out} at step {start}")
    if args.checkpoint == "full":
        activation_checkpointing(model)
    bf16 = args.dtype == "bf16" or (args.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    precision = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else contextlib.nullcontext
    run = DDP(model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True) if world > 1 else model
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda" and args.config != "tiny"):  # a tiny run is over before its shapes are compiled
        torch._dynamo.config.suppress_errors = args.compile == "auto"  # where nobody asked for it, a compiler that fails costs a warning and speed, not the run
        run = torch.compile(run)
    weights = {"i2t": args.i2t_weight, "t2i": args.t2i_weight, "uncond": args.t2i_weight, "edit": args.t2i_weight, "align": ALIGN_WEIGHT}
    parts = list(pools.parts)
    weights = {p: weights.get(p, 1.0) for p in parts}

    os.makedirs(args.out, exist_ok=True)
    trained, total = sum(p.numel() for _, p in named), sum(p.numel() for p in model.parameters())
    say(
        f"{args.arch} {args.config}, stage {args.stage}: {total:,} parameters, {trained:,} train; {world} process{'es' * (world > 1)} on {device.type} "
        f"({'bf16' if bf16 else 'fp32'}), "
        f"{args.steps} steps of " + " + ".join(f"{round(args.batch * s)} {p}" for p, s in pools.parts.items())
    )
    real = None
    if args.data and args.stage == "reca":  # the first pictures, for before_after.png
        real = evaluate.to_uint8(torch.stack([model.preprocess(pools.real_images[i][1], "recon") for i in range(min(8, len(pools.real_images)))]))
    log = None
    before = None
    if main_process:
        log = open(os.path.join(args.out, "log.jsonl"), "a" if state is not None else "w")
        if state is None:
            data.write_text(os.path.join(args.out, "run.json"), json.dumps(about, indent=1, default=str))
            untrained = args.stage in ("base", "tokenizer") and not args.ckpt  # nothing to judge yet
            before, text = (None, None) if untrained else scores(args, model)
            if before:
                say("before: " + text)
                log.write(json.dumps(dict(step=0, scores=before)) + "\n")
                history.append(dict(step=0, scores=before))
            old_pictures = look(args, model, device, real)
            sample.save_png(sample.grid(old_pictures[0], old_pictures[1]), os.path.join(args.out, "before.png"))
    extra_log = None
    if main_process and args.log == "wandb":
        import wandb

        extra_log = wandb.init(project="nanoreca", name=os.path.basename(args.out), config=vars(args)).log
    elif main_process and args.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(args.out)
        extra_log = lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items() if k != "step"]

    stopped, handlers = [], {}
    for sig in (signal.SIGINT, signal.SIGTERM):
        handlers[sig] = signal.signal(sig, lambda number, frame: stopped.append(number))
    get, end_prefetch = prefetch(lambda s: [pools.batch(model, s, m, rank, world) for m in range(args.accum)], range(start, args.steps))
    model.train()
    flops = sum(model.flops_per_sample(KIND.get(p, p)) * round(args.batch * s) for p, s in pools.parts.items() if p not in ("align", "words"))
    peak = next((v for k, v in PEAK_TFLOPS.items() if device.type == "cuda" and k in torch.cuda.get_device_name(device)), 0) * 1e12 * world
    bar = data.Progress(None, f"{args.arch} {args.stage}", main_process, total=args.steps, initial=start)
    clock, since, step = time.time(), start, start
    images = sum(round(args.batch * s) for p, s in pools.parts.items() if p != "text")
    for step in range(start, args.steps):
        lr = learning_rate(args, step, args.lr)
        for optimizer, peak_lr in zip(optimizers, (args.lr, args.muon_lr)):
            for g in optimizer.param_groups:
                g["lr"] = learning_rate(args, step, peak_lr)
        torch.manual_seed(data.mix_seed(args.seed, step, rank))  # dropout and posterior noise, so that a resumed run draws the same
        totals = {p: torch.zeros((), device=device) for p in parts}
        for micro, batch in enumerate(get()):
            batch = {p: {k: v.to(device, non_blocking=True) for k, v in t.items()} for p, t in batch.items()}
            batch = {p: pools.complete(model, t, args.stage) for p, t in batch.items()}
            for p, t in batch.items() if world > 1 else ():  # means over tokens are means over the GLOBAL micro-batch, whatever process holds how many
                count = None if p in ("align", "words") else model.target_count(KIND.get(p, p), t)  # these gather the global batch themselves
                if count is not None:
                    dist.all_reduce(count)
                    t["count"] = count.clamp(min=1) / world
            sync = micro == args.accum - 1
            with contextlib.nullcontext() if sync or world == 1 else run.no_sync(), precision():
                losses = run(batch)
                loss = sum(weights[p] * losses[p] for p in parts) / sum(weights.values()) / args.accum
            loss.backward()
            for p in parts:
                totals[p] += losses[p].detach() / args.accum
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], args.clip if args.clip > 0 else math.inf)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            torch._foreach_lerp_(list(ema.values()), [p.detach() for _, p in named], 1 - args.ema)
        done = step + 1

        if done % args.log_every == 0 or done == args.steps or done == start + 1:
            row = torch.stack([totals[p] for p in parts])
            if world > 1:
                dist.all_reduce(row)
                row /= world
            seconds = (time.time() - clock) / (done - since)
            clock, since = time.time(), done
            r = dict(step=done, **{p: v for p, v in zip(parts, row.tolist())})
            r["loss"] = sum(weights[p] * r[p] for p in parts) / sum(weights.values())
            r.update(lr=lr, grad_norm=float(norm), ms=seconds * 1e3, images_per_s=images / seconds)
            if peak:
                r["mfu"] = flops / seconds / peak
            if not math.isfinite(r["loss"]):
                raise ValueError(
                    f"step {done}: the loss is {r['loss']} ({', '.join(f'{p} {r[p]:.3g}' for p in parts)}): lower --lr ({args.lr:g}); "
                    f"the last checkpoint is untouched"
                )
            history.append(r)
            eta = seconds * (args.steps - done)
            text = " ".join(f"{p} {r[p]:.4f}" for p in parts) + f" lr {lr:.1e} norm {r['grad_norm']:.2f} {r['ms']:.0f} ms {r['images_per_s']:.0f} img/s"
            text += f" MFU {100 * r['mfu']:.1f}%" if peak else ""
            if main_process:
                log.write(json.dumps(r) + "\n")
                log.flush()
                bar.line(f"step {done}/{args.steps} loss {r['loss']:.4f} {text} ETA {int(eta // 60)}:{int(eta % 60):02d}", done)
                if extra_log:
                    extra_log(r)
        if args.eval_every and done % args.eval_every == 0 and done < args.steps and main_process:
            s, text = scores(args, model)
            if s:
                log.write(json.dumps(dict(step=done, scores=s)) + "\n")
                history.append(dict(step=done, scores=s))
                bar.line(f"step {done}: {text}", done)
            clock, since = time.time(), done
        halt = bool(stopped) or done == args.stop_after < args.steps
        if world > 1 and (device.type == "cpu" or done % 10 == 0):  # all processes stop at the same step
            flag = torch.tensor(float(halt), device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            halt = bool(flag)
        elif world > 1:
            halt = done == args.stop_after < args.steps  # a signal waits for the next tenth step, this every process knows
        if main_process and (halt or done == args.steps or (args.save_every and done % args.save_every == 0)):
            save_checkpoint(args, done, model, optimizers, ema, history)
            if not halt:
                save_weights(args, model, step=done)
                plot_curves(os.path.join(args.out, "loss.png"), history, parts)
        if halt:
            bar.close()
            end_prefetch()
            why = signal.Signals(stopped[0]).name if stopped else "--stop-after" if done == args.stop_after else "another process"
            say(
                f"stopped by {why} after step {done}: checkpoint saved, continue with --resume {args.out}"
                + (" --stop-after 0" if done == args.stop_after else "")
            )
            if world > 1:
                dist.destroy_process_group()
            return 0 if done == args.stop_after else 128 + (stopped[0] if stopped else signal.SIGTERM)
    bar.close()
    end_prefetch()
    for sig, handler in handlers.items():  # the last checkpoint is written: from here on a signal simply ends the program
        signal.signal(sig, handler)

    if main_process:
        if ema:
            with torch.no_grad():
                for n, p in named:
                    p.copy_(ema[n])
        if args.stage == "tokenizer" and isinstance(model.tokenizer, image_tokenizer.Autoencoder):
            image_tokenizer.calibrate(model.tokenizer, evaluate.to_float(data.Scenes(4096, seed=args.seed).render(), device))
        after, text = scores(args, model)
        before = before or next((r["scores"] for r in history if r.get("step") == 0 and "scores" in r), None)
        save_weights(args, model, step=args.steps, scores_before=before, scores_after=after)
        result = dict(about, seconds=time.time() - started, curve=[(r["step"], r["scores"]) for r in history if "scores" in r], scores=after)
        data.write_text(os.path.join(args.out, "result.json"), json.dumps(result, indent=1, default=str))
        if after:
            log.write(json.dumps(dict(step=args.steps, scores=after)) + "\n")
            say("after:  " + text)
            if before and "generation" in before:
                b, a = before["generation"], after["generation"]
                say(
                    f"change: score {a['score'] - b['score']:+.3f}  seen {a['seen'] - b['seen']:+.3f}  held-out {a['held_out'] - b['held_out']:+.3f}"
                    + (f"  questions {after['questions']['accuracy'] - before['questions']['accuracy']:+.3f}" if "questions" in after else "")
                )
        new, captions, source = look(args, model, device, real)
        sheets = ([source] if source is not None else []) + ([old_pictures[0]] if state is None else []) + [new]
        names = (["source"] if source is not None else []) + (["before"] if state is None else []) + ["after"]
        n = len(new)
        sample.save_png(
            sample.grid(
                np.concatenate(sheets),
                [f"{name}: {captions[i] if source is None else ''}" for name in names for i in range(n)],
                columns=n,
                scale=max(1, 120 // new.shape[1]),
            ),
            os.path.join(args.out, "before_after.png"),
        )
        plot_curves(os.path.join(args.out, "loss.png"), history, parts)
        log.close()
        say(f"run folder: {args.out} (model.safetensors, config.json, checkpoint.pt, result.json, log.jsonl, loss.png, before_after.png)")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    data.one_line_errors(main)
