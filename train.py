"""Trains unified multimodal models, above all with Reconstruction Alignment (RecA, arXiv 2509.07295).

    torchrun train.py --arch mar                     # RecA on the tiny model from the shipped base: score, train, score
    torchrun --nproc_per_node=2 train.py --arch mar --data photos.tar      # RecA on your own images, without captions
    torchrun --nproc_per_node=8 train.py --arch mar --config harmon-1.5b --ckpt harmon_1.5b.pth --data images/ \\
             --tokenizer-ckpt kl16.ckpt --text-tokenizer qwen.tiktoken --i2t-data llava.json       # the published run
    torchrun train.py --arch mar --stage tokenizer   # from nothing: 1. the image autoencoder,
    torchrun train.py --arch mar --stage base        #               2. a model that understands and draws,
    torchrun train.py --arch mar --stage reca        #               3. RecA (--stage sft, its control: captions alone)
    torchrun train.py --resume runs/mar-reca         # go on: the same losses, bit for bit, as if it had never stopped

RecA puts the embeddings of an image from the model's own UNDERSTANDING side into the context, like a very dense
prompt, and trains the GENERATION side to draw the image again with its ordinary loss (`reca_loss` in each model
file). Where the two share parameters, an image-to-text loss beside it keeps understanding alive.

The model files hold the recipes (`RECIPES[config][stage]`); what is typed wins over them. --batch counts samples per
optimizer step and part, over all processes; a step is --accum micro-batches. Random numbers are functions of (--seed,
step, place in the global batch), so N processes x M micro-batches have the gradients of one (but for dropout and the
tokenizer stage's noise, drawn per process), and a resumed run goes on as if it had never stopped.

Precision: on CPUs everything is fp32; on GPUs weights that train, losses, softmax, norms and diffusion tables are fp32,
products bf16 (autocast) where the GPU has it, and Muon's inside too.

The run folder gets model.safetensors + config.json (for sample.py, on any machine: your own text tokenizer is copied to
text_tokenizer.json), checkpoint.pt (for --resume), result.json (command, commit, scores), log.jsonl, loss.png,
before_after.png, preview-STEP.png (--preview-every), report.html (all of this on one page). Ctrl-C, SIGTERM and SIGHUP
save a checkpoint first.
"""
import argparse
import collections
import contextlib
import datetime
import fractions
import functools
import json
import math
import os
import re
import signal
import time
import warnings

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that it need not have looked for unused parameters

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
import custom_kernels
import data
import evaluate
import image_tokenizer
import sample
import shape_world
from custom_kernels import Muon, add_lora, count_flops, init_lora, merge_lora, peak_bytes, peak_flops, step_if
from custom_kernels.products import use_products

warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # no block writes into what another returned
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is, in one process

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoint.add_flags(p)
    p.add_argument("--stage", choices=("tokenizer", "base", "sft", "reca"), default="reca")
    p.add_argument("--out", help="run folder (default: runs/ARCH-STAGE, or the next free runs/ARCH-STAGE-N)")
    p.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    p.add_argument("--export", nargs=2, metavar=("RUN", "OUT"), help="join the model of a run into a folder")
    p.add_argument("--layout", choices=("ours", "published"), default="ours", help="of --export: for sample.py, or the "
                   "names and files that the original code loads")
    p.add_argument("--resume", metavar="RUN", help="run folder to continue; its arguments are kept unless given again")
    add = p.add_argument_group("your data (default: the shape world)").add_argument
    add("--data", nargs="+", help="images: folders, tar shards, files; captions are read for --stage sft and base only")
    add("--data-weights", nargs="+", type=float, metavar="W", help="how often each of --data is drawn from, at random")
    add("--i2t-data", nargs="+", help="what keeps understanding: LLaVA JSON, or captioned folders and tars")
    add("--no-exif", action="store_true", help="pictures as they lie in their files, not turned as EXIF says")
    add("--image-root", help="folder that the image paths of a LLaVA JSON are relative to")
    add("--workers", type=int, metavar="N", help="processes that read pictures (default 0; GPU runs at size: up to 4)")
    add("--cache", metavar="DIR", help="keep frozen encodings there, of pools of any size, for later runs and --resume")
    shape_world.add_flags(p)
    add = p.add_argument_group("losses and optimization (defaults: the recipe)").add_argument
    add("--mix", nargs="+", metavar="PART=SHARE", help=f"shares of --batch, of the parts {', '.join(data.PARTS)}")
    add("--i2t-weight", type=float, default=1.0, help="of image-to-text; 0 leaves the part out")
    add("--t2i-weight", type=float, default=1.0, help="of text-to-image and edits, the paper's lambda; 0: neither")
    add("--drop", type=float, default=0.1, help="conditioning dropout: share of samples that get the empty prompt")
    add("--steps", type=int, default=300, help="optimizer steps")
    add("--batch", type=int, default=96, help="samples per step and part, over all processes")
    add("--accum", type=int, default=1, help="micro-batches per step: raise it when memory runs out")
    add("--lr", type=float, default=2e-4, help="of AdamW")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW")
    add("--weight-decay", type=float, default=0.02, help="vectors and the model's own exemptions never decay")
    add("--muon-lr", type=float, default=0.0, help="of Muon, for the matrices inside blocks and projectors; 0: none")
    add("--muon-decay", type=float, default=0.02, help="of Muon's matrices: bounds their singular values by 1 / this")
    add("--warmup", type=int, default=20, help="steps")
    add("--schedule", choices=("cosine", "constant"), default="cosine")
    add("--clip", type=float, default=1.0, help="gradient norm; 0 = off")
    add("--lora", type=int, default=0, metavar="R", help="0, or the rank of adapters that train in place of "
        "the linear layers and are saved alone; they want a higher --lr")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, e.g. 0.999; 0 = off")
    add("--seed", type=int, default=0)
    add = p.add_argument_group("machine and output").add_argument
    add("--shard", action="store_true", help="weights and optimizer state in shares over all processes (FSDP2): AdamW")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: published sizes on GPUs")
    add("--recompute", default="none", metavar="none|blocks|N", help="keep no activations of blocks, or of every Nth")
    add("--cache-gb", type=float, default=8.0, help="host memory for a pool's encodings; larger ones are not kept")
    add("--threads", type=int, help="CPU threads per process")
    add("--cfg", type=float, help="guidance the model is scored at and saved with (default: the checkpoint's)")
    add("--save-every", type=int, default=500)
    add("--log-every", type=int, default=10)
    add("--stop-after", type=int, default=0, help="save a checkpoint and stop after this step, as a signal would")
    add("--preview", type=int, help="pictures drawn before, after and on the way, by all processes together; 0: none "
        "(default: 12 drawings or 8 reconstructions; 4 of published sizes, none of these on a CPU)")
    add("--preview-every", type=int, default=0, help="steps between previews on the way, preview-STEP.png; 0: none")
    add("--preview-prompts", metavar="FILE", help="one a line, drawn in the preview instead of what it shows by itself")
    add("--log", choices=("wandb", "tensorboard"), help="optional extra logger")
    add("--plan", nargs="?", const="first", choices=("first", "only"), help="say what the run needs before it; or only")
    add("--plan-on", metavar="NxGB", help="--plan only, for another machine: 8x80 are 8 GPUs of 80 GB")
    p.set_defaults(eps=1e-8, warmup_from=1, horizon=0)  # of recipes only
    return p

def parse_args(argv=None):
    """-> args, and a resumed run's state. What is typed wins over recipe or stored arguments, and those over defaults.
    """
    p = parser()
    first = p.parse_args(argv)
    first.resume = first.export[0] if first.export else first.resume
    state = checkpoint.read_checkpoint(first.resume) if first.resume else None
    p.set_defaults(**(state["args"] if state else recipe(first)))
    args = p.parse_args(argv)
    for name in ("arch", "config", "stage", "lora") if state else ():
        if getattr(args, name) != state["args"].get(name, 0):  # runs that are older than --lora have none
            raise ValueError(f"--resume {args.resume}: that is a run of --{name} {state['args'][name]}, not "
                             f"{getattr(args, name)}; give it to a new run as --ckpt {args.resume}")
    if args.shard and first.muon_lr:
        raise ValueError(f"--shard with --muon-lr {first.muon_lr:g}: Muon needs whole matrices: leave one of them out")
    if args.shard and state and args.muon_lr:
        raise ValueError(f"--resume {args.resume} --shard: that run trains with Muon, which needs whole matrices")
    args.muon_lr *= not args.shard  # a recipe's Muon gives way to AdamW
    args.betas, args.mix = tuple(args.betas), data.read_mix(args.mix)
    args.mix = {part: share for part, share in args.mix.items() if loss_weight(args, part) > 0}
    args.out, args.overwrite, args.resume = first.out or first.resume, first.overwrite, first.resume
    if args.lora:
        check_lora(args, first.muon_lr, state)
    return args, state

def check_lora(args, muon_lr, state):
    """Errors of --lora, and AdamW in place of a recipe's Muon, which would make B A's factors orthogonal, not B A.
    muon_lr: the typed one."""
    if muon_lr:
        raise ValueError(f"--muon-lr {muon_lr:g}: adapters (--lora {args.lora}) are trained by AdamW: leave it out")
    if args.stage == "tokenizer" or (args.stage == "base" and not args.ckpt):
        raise ValueError(f"--lora {args.lora}: --stage {args.stage} starts from nothing that adapters could be trained "
                         "on: take --stage reca or sft, or give --stage base a --ckpt")
    if state and args.ckpt and not os.path.exists(args.ckpt):
        raise FileNotFoundError(f"--resume {args.resume}: its adapters were trained on --ckpt {args.ckpt}, which is no "
                                "longer there: give --ckpt where it is now")
    if args.muon_lr and int(os.environ.get("RANK", 0)) == 0:
        print(f"--lora {args.lora}: AdamW trains adapters, in place of the recipe's Muon", flush=True)
    args.muon_lr = 0.0

def check_base(args, state):
    """Notes which weights adapters are trained on. ValueError where a resumed run had others."""
    base = args.ckpt or checkpoint.default_weights(args.arch, "base")
    found = checkpoint.weights_hash(base) if args.lora and os.path.exists(base) else None
    noted = state["args"].get("base_sha256") if state else None
    if found and noted not in (None, found):
        raise ValueError(f"--resume {args.resume}: its adapters were trained on weights with the SHA-256 {noted[:16]}, "
                         f"{base} has {found[:16]}: give --ckpt the file that they belong to")
    args.base_sha256 = found

def recipe(args):
    """The recipe of this run, a flat dictionary of flags: RECIPES[config][stage] of the model file."""
    if args.stage == "tokenizer":
        return image_tokenizer.RECIPE
    recipes = checkpoint.model_file(args.arch).RECIPES
    stages = recipes.get(args.config, {})
    if args.stage not in stages:
        raise ValueError(f"--config {args.config} --stage {args.stage}: no such recipe; --arch {args.arch} knows "
                         f"{', '.join(recipes)}, published ones for reca and sft")
    return stages["plain" if args.stage == "reca" and args.data and "plain" in stages else args.stage]

def loss_weight(args, part):
    drawing = dict.fromkeys(("t2i", "edit", "uncond"), args.t2i_weight)
    return (drawing | {"i2t": args.i2t_weight}).get(part, 1.0)

def check_args(args, world):
    checkpoint.check_ranges(args)
    every_nth(args.recompute)
    checkpoint.choose(args)
    if ("images" in args.mix or args.stage == "tokenizer") and (args.stage, [*args.mix]) != ("tokenizer", ["images"]):
        raise ValueError(f"--stage {args.stage} --mix {' '.join(args.mix)}: the tokenizer stage trains images alone")
    if not args.mix:
        raise ValueError("--mix and the weights of the losses leave nothing to train on")
    for part, share in args.mix.items():
        n = round(args.batch * share)
        if n < 1:
            raise ValueError(f"--batch {args.batch} gives {n} {part} samples: raise it, or leave {part} out of --mix")
        if n % (world * args.accum):
            whole = math.lcm(*[fractions.Fraction(s).limit_denominator(100).denominator for s in args.mix.values()])
            raise ValueError(f"--batch {args.batch} gives {n} {part} samples, which {world} processes x --accum "
                             f"{args.accum} cannot share: take a multiple of {whole * world * args.accum}")
    checkpoint.check_device(args.device, args.dtype, args.compile, world)

def check_typed(args, argv=None):
    """ValueError for a flag that is typed and would change nothing: it was meant to change something."""
    parts, tokenizer, tiny = set(args.mix), args.stage == "tokenizer", args.config == "tiny"
    own = {"t2i", "words", "uncond"} if args.stage in ("sft", "base") else {"recon", "images"}
    world = parts - (own if args.data else set()) - ({"i2t"} if args.i2t_data else set())  # has its pictures from there
    judged, drawn = tiny and args.eval_n, {"t2i", "edit", "uncond"}
    if lost := sorted(set(data.read_mix(parser().parse_args(argv).mix or {})) - parts):
        raise ValueError(f"--mix {' '.join(lost)}: the weight is 0 here: give --i2t-weight or --t2i-weight, or leave "
                         "this out")
    llava = [path for path in args.i2t_data or () if path.lower().endswith((".json", ".jsonl"))]
    checkpoint.refuse_unused(
        parser(), argv, ("overwrite", not args.resume, "new runs"),
        ("ckpt", not args.resume or args.lora, "new runs"), ("gemm", args.device == "cpu", "CPUs"),
        ("vision-ckpt rest-ckpt", not tiny, "published models"),
        ("config", not tokenizer or tiny, "models"), ("text-tokenizer recompute shard cfg", not tokenizer, "models"),
        ("drop", parts & {"t2i", "recon"}, "t2i and recon"), ("muon-decay", args.muon_lr, "--muon-lr above 0"),
        ("tokenizer-ckpt", not tiny or (args.stage == "base" and not args.ckpt), "published models and new bases"),
        ("data", parts & own, f"parts of --mix that this stage draws from it: {', '.join(sorted(own))}"),
        ("i2t-data", "i2t" in parts, "the part i2t, which --mix or --i2t-weight leaves out"),
        ("i2t-weight", "i2t" in parts, "the part i2t, which --mix leaves out"),
        ("t2i-weight", parts & drawn, "parts that --mix leaves out: t2i, edit, uncond"),
        ("no-exif", args.data or args.i2t_data, "--data and --i2t-data"), ("image-root", llava, "JSON of --i2t-data"),
        ("pool", world, "the shape world"), ("questions", "i2t" in world, "the shape world's part i2t"),
        ("listings", world & {"i2t", "text"}, "the shape world's parts i2t and text"),
        ("exact-captions", "t2i" in world, "the shape world's part t2i"),
        ("eval-n", tiny, "tiny models"), ("eval-every eval-split", judged, "tiny models with --eval-n above 0"))

# ---------------------------------------------------------------------------------------------------------------------
# the machine, the model, the optimizers, one step

def setup(args):
    """Processes, device, threads and seed -> (rank, world, device)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.device == "cuda" or (world > 1 and args.device.startswith("cuda")):
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    if args.threads or device.type == "cpu":  # torchrun sets OMP_NUM_THREADS=1; the cores belong to all processes
        here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // here))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        checkpoint.end_with_launcher()
    if world > 1:  # a sharded checkpoint is written by gloo, while NCCL goes on
        backend = "cpu:gloo,cuda:nccl" if args.shard else "nccl"
        patience = datetime.timedelta(hours=2)  # while the first process judges and saves, the others wait
        dist.init_process_group(backend if device.type == "cuda" else "gloo", timeout=patience)
    if device.type == "cpu":  # the first process's choice is that of all, and of a resumed run
        choice = [use_products("mkl" if (args.gemm, args.compile) == ("auto", "on") else args.gemm)]
        if world > 1:
            dist.broadcast_object_list(choice)
        args.gemm = use_products(*choice)
    torch.manual_seed(args.seed)
    return rank, world, device

def build(args, state=None, prepare=None):
    """The model of this run with the weights it starts from, or of a resumed run's state. prepare: see `place`."""
    file = checkpoint.model_file(args.arch)
    tokenizer = file.Model.image_tokenizer  # the frozen autoencoder's name, in the model and in its config
    if args.stage == "tokenizer":
        name = image_tokenizer.tiny_name(getattr(file.CONFIGS["tiny"], tokenizer))
        model = image_tokenizer.TokenizerStage(name, args.ckpt)
        if state is not None:
            checkpoint.load_strict(model, state["model"], args.resume)
        model.trainable_parameters(args.stage)
        return model.to(args.device)
    if state is not None and not args.lora:
        text_tokenizer = checkpoint.load_tokenizer(checkpoint.tokenizer_of(args.resume, state))
        model = checkpoint.from_parts(args.arch, state["config"], text_tokenizer, state.get("model"), args.resume,
                                      args.device, prepare=prepare)
        if "shards" in state:
            checkpoint.load_trained(model, state, args.resume)
        model.config.cfg = args.cfg or model.config.cfg
        return model
    if args.stage == "base" and not args.ckpt:
        config, text_tokenizer = file.CONFIGS[args.config], checkpoint.load_tokenizer(args.text_tokenizer or "tiny")
        checkpoint.check_vocabulary(config, text_tokenizer, args.text_tokenizer)
        config, weights = image_tokenizer.trained(config, tokenizer, args.tokenizer_ckpt)
        model = file.Model(config, text_tokenizer)
        checkpoint.load_strict(getattr(model, tokenizer), weights, "the image tokenizer")
        model.to(args.device)
        if prepare:
            prepare(model)
    else:
        ckpt = args.ckpt or checkpoint.default_weights(args.arch, "base")
        model = checkpoint.load_model(args.arch, ckpt, args.config, args.tokenizer_ckpt, args.text_tokenizer,
                                      args.device, vision_ckpt=args.vision_ckpt, prepare=prepare, rest=args.rest_ckpt)
    model.config.cfg = args.cfg or model.config.cfg
    if args.lora:
        init_lora(model, data.sample_generator(args.seed, 0, 0, "lora"))
    if args.lora and state is not None:
        checkpoint.load_trained(model, state, args.resume)
    return model

def place(model, args, dtype, sharded):
    """What has to be known of a model before memory is given to it: what trains, in fp32; what is frozen, in bf16 where
    products are; and with --shard which rows of each block this process holds (FSDP2; in nodes, copies between)."""
    named = model.trainable_parameters(args.stage)
    if args.lora:
        add_lora(model, named, args.lora, torch.Generator())
    apart = set(getattr(model, model.image_tokenizer).parameters())  # stays in fp32, and whole: it is small
    if dtype == torch.bfloat16 and args.config != "tiny":
        checkpoint.cast((p for p in model.parameters() if not p.requires_grad and p not in apart), dtype)
    if not sharded:
        return
    world, here = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    mesh = init_device_mesh(torch.device(args.device).type, (world // here, here) if world > here else (world,))
    how = MixedPrecisionPolicy(dtype if dtype != torch.float32 else None, torch.float32, cast_forward_inputs=False)
    for block in model.blocks():
        fully_shard(block, mesh=mesh, mp_policy=how)
    fully_shard(model, mesh=mesh, mp_policy=how, ignored_params=apart)
    for name in ("precompute", "generate", "reconstruct", "edit", "answer"):
        register_fsdp_forward_method(model, name)

def make_optimizers(args, model, named):
    """[AdamW], or with --muon-lr [AdamW, Muon]: Muon takes the 2-D weights of numbered modules (blocks, projectors),
    AdamW keeps embeddings, heads, norms and biases."""
    plain = [p for n, p in named if p.ndim < 2 or model.no_decay(n, p)]
    matrices = [(n, p) for n, p in named if p.ndim >= 2 and not model.no_decay(n, p)]
    inside = {n: p for n, p in matrices if args.muon_lr and p.ndim == 2 and any(k.isdigit() for k in n.split("."))}
    decayed = [p for n, p in matrices if n not in inside]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=args.betas, eps=args.eps,
                                    fused=args.device.startswith("cuda") or None)]
    if inside:
        optimizers.append(Muon(inside.values(), lr=args.muon_lr, weight_decay=args.muon_decay))
    return optimizers

def every_nth(text):
    """--recompute -> which blocks are computed again in the backward pass: every Nth; 0: none. Raises ValueError."""
    words = {"none": 0, "blocks": 1}
    if text not in words and (not text.isdecimal() or int(text) < 1):
        raise ValueError(f"--recompute {text}: expected none, blocks, or N of at least 1: every Nth block")
    return words[text] if text in words else int(text)

def learning_rate(args, step, lr):
    """Linear warm-up to `lr` (published ones from 0: warmup_from), then constant, or half a cosine that is 0 at --steps
    or, where a published run stops before its schedule ends, at `horizon`."""
    if step < args.warmup:
        return lr * (step + args.warmup_from) / args.warmup
    t = (step - args.warmup) / max(1, max(args.steps, args.horizon) - args.warmup) * (args.schedule == "cosine")
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))

class Run:
    """What a run holds. model: as it is saved; forward: as it is called, wrapped for several processes and compiled."""

    def __init__(self, args, state):
        self.args, self.history, self.start, self.ema, self.judging, self.saving = args, [], 0, None, False, None
        self.prompts = preview_prompts(args)
        self.rank, self.world, self.device = setup(args)
        self.sharded = args.shard and self.world > 1
        self.side_group = dist.new_group(backend="gloo") if self.sharded else None
        cuda = self.device.type == "cuda"
        bf16 = args.dtype == "bf16" or (args.dtype == "auto" and cuda and torch.cuda.is_bf16_supported())
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        self.lock = checkpoint.claim(args, self.rank, self.world, state["step"] if state else 0)
        self.about = checkpoint.describe(args, state)  # now: the commit may be another one when the run ends
        self.checkpoint_size = None
        if self.rank == 0:
            check_base(args, state)
        self.model = build(args, state, self.prepare)
        self.checkpoint_size = self.checkpoint_size or check_room(args, machine_of(args), self.rank)
        self.named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.weights = {part: loss_weight(args, part) for part in args.mix}
        self.batches = data.Batches(args, self.model, self.device, self.rank, self.world)
        self.optimizers = make_optimizers(args, self.model, self.named)
        if args.ema:
            self.ema = {n: p.detach().clone() for n, p in self.named}
        if state is not None:
            checkpoint.load_state(self, state)
        known = peak_flops(self.device) < math.inf
        step = count_flops(rehearsal(args)[0], self.batches.batch(0)) if known else 0.0
        self.flops = step * self.world * args.accum
        self.forward = self.wrapped()
        self.skipped, self.streak, self.last_skip = torch.zeros(3, dtype=torch.int64, device=self.device).unbind()
        self.log = checkpoint.Log(args, self.rank == 0, self.start)
        trained, total = sum(p.numel() for _, p in self.named), sum(p.numel() for p in self.model.parameters())
        batch = " + ".join(f"{n} {part}" for part, n in self.batches.samples.items())
        self.log.say(f"{args.arch} {args.config}, stage {args.stage}: {total:,} parameters, {trained:,} train; "
                     f"{self.world} x {self.device.type} in {self.dtype}{f' ({args.gemm})' * (not cuda)}, "
                     f"{args.steps} steps of {batch}")
        if args.shard and not state and recipe(args).get("muon_lr"):
            self.log.say("--shard: AdamW takes the place of the recipe's Muon, which needs whole matrices")

    def prepare(self, model):
        """For a model whose files are found and which has no memory yet."""
        self.checkpoint_size = check_room(self.args, machine_of(self.args), self.rank)
        place(model, self.args, self.dtype, self.sharded)

    def wrapped(self):
        args, cuda, forward = self.args, self.device.type == "cuda", self.model
        every, compiles = every_nth(args.recompute), args.compile == "on"
        if args.compile == "auto" and cuda and args.config != "tiny":  # tiny runs are short
            compiles = torch._dynamo.config.suppress_errors = True  # then a failing compiler costs speed alone
        for block in self.model.blocks() if compiles and self.sharded else ():  # shares are gathered between blocks
            block.forward = torch.compile(block.forward)
        for block in self.model.blocks()[::every] if every else ():
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
        if self.world > 1 and not self.sharded:
            forward = DDP(forward, device_ids=[self.device] if cuda else None, find_unused_parameters=True)
        return custom_kernels.compiled(forward) if compiles and not self.sharded else forward

def train_step(run, step, micro_batches):
    """One optimizer step over this process's [{part: tensors}] -> ({part: its loss}, gradient norm), both still on the
    device: nothing in a step waits for it."""
    args, parts, M = run.args, list(run.weights), len(micro_batches)
    totals = {part: torch.zeros((), device=run.device) for part in parts}
    torch.manual_seed(data.mix_seed(args.seed, step, run.rank))  # dropout, so that a resumed run draws the same
    counts = global_counts(run, micro_batches)
    for micro, batch in enumerate(micro_batches):
        batch = run.batches.to_device(batch, counts)
        # DDP exchanges gradients in the last micro-batch only. Sharded ones are summed in each: each process keeps its
        # rows alone, as whole gradients of all that trains (set_requires_gradient_sync) are what --shard cannot hold
        alone = micro < M - 1 and isinstance(run.forward, DDP)
        with (run.forward.no_sync() if alone else contextlib.nullcontext(),
              torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32,
                             cache_enabled=args.recompute == "none")):  # copies of weights take memory
            losses = run.forward(batch)
            if idle := [part for part in parts if not losses[part].requires_grad]:
                raise ValueError(f"--mix: {' and '.join(idle)} would train nothing, as all that they need is frozen in "
                                 f"--stage {args.stage}: leave them out")
            loss = sum(run.weights[part] * losses[part] for part in parts) / sum(run.weights.values()) / M
        loss.backward()
        for part in parts:
            totals[part] += losses[part].detach() / M
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in run.named], args.clip if args.clip > 0 else math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    apply(run, step, torch.isfinite(norm))
    return totals, norm

def apply(run, step, good):
    """Updates weights and averages where the gradient is finite (`good`, on the device); else nothing changes and the
    step is counted, on the device, too: report_step looks at it."""
    run.skipped += ~good
    run.streak.copy_(torch.where(good, 0, run.streak + 1))
    run.last_skip.copy_(torch.where(good, run.last_skip, step))
    for optimizer, peak in zip(run.optimizers, (run.args.lr, run.args.muon_lr)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.args, step, peak)
        step_if(optimizer, good)
    for average, (_, p) in zip((run.ema or {}).values(), run.named):
        checkpoint.own_rows(average)[0].lerp_(checkpoint.own_rows(p.detach())[0], (1 - run.args.ema) * good)

def global_counts(run, micro_batches):
    """{part: what its loss is divided by}: the targets of the whole step, in all processes and micro-batches, over the
    number of those, since gradients are averaged over those. So a mean over tokens is one over the step's tokens."""
    parts = [part for part, tensors in micro_batches[0].items() if "count" in tensors]
    if not parts:
        return {}
    counts = torch.stack([sum(batch[part]["count"] for batch in micro_batches) for part in parts])
    counts = counts.to(run.device, non_blocking=True)  # else this would wait for the step before
    if run.world > 1:
        dist.all_reduce(counts)
    return dict(zip(parts, (counts.clamp(min=1) / (run.world * len(micro_batches))).unbind()))

# ---------------------------------------------------------------------------------------------------------------------
# what is said, judged and saved

def report_step(run, done, totals, norm, seconds):
    """Says and logs a step, with the means over all processes. Raises ValueError where the loss is no number."""
    args, samples, row = run.args, run.batches.samples, torch.stack(list(totals.values()))
    if run.world > 1:
        dist.all_reduce(row)
        row /= run.world
    r = dict(step=done, **dict(zip(totals, row.tolist())))
    r["loss"] = sum(weight * r[part] for part, weight in run.weights.items()) / sum(run.weights.values())
    r |= dict(lr=learning_rate(args, done - 1, args.lr), grad_norm=float(norm), ms=seconds * 1e3)
    r["images_per_s"] = sum(n for part, n in samples.items() if part != "text") / seconds
    r["mfu"] = run.flops / seconds / run.world / peak_flops(run.device)
    if run.streak >= 3:
        numbers = run.batches.sample_numbers(int(run.last_skip))
        raise ValueError(f"{int(run.streak)} steps in a row had a gradient that is not finite, the last, "
                         f"{run.last_skip + 1}, with samples {numbers}: lower --lr; {checkpoint.last_good(args.out)}")
    losses = f"loss {r['loss']:.4f} " + " ".join(f"{part} {r[part]:.4f}" for part in totals)
    losses += f" skipped {int(run.skipped)}" if run.skipped else ""
    run.history.append(r)
    mfu, eta = f" MFU {100 * r['mfu']:.1f}%" if r["mfu"] else "", int(seconds * (args.steps - done))
    run.log.write(r, f"step {done}/{args.steps} {losses} lr {r['lr']:.1e} norm {r['grad_norm']:.2f} {r['ms']:.0f} ms "
                     f"{r['images_per_s']:.0f} img/s{mfu} ETA {eta // 60}:{eta % 60:02d}")

def scores(run, step, title):
    """Judges the model on the first process, or a sharded one on all together, says and logs it -> scores, or None
    where there is nothing to judge."""
    args = run.args
    if not args.eval_n or args.config != "tiny" or (run.rank > 0 and not run.sharded):
        return None
    with checkpoint.averaged(run, may_end=not run.sharded):
        s = evaluate.score_all(run.model, args.eval_n, seed=0, split=args.eval_split,
                               questions=min(400, args.eval_n + 100), editing="edit" in run.weights)
    run.log.write(dict(step=step, scores=s), title + evaluate.report(s))
    run.history.append(dict(step=step, scores=s))
    return s

def preview_prompts(args):
    """The lines of --preview-prompts, or prompts of our own. Raises FileNotFoundError and ValueError."""
    path, lines = args.preview_prompts, sample.DEFAULT_PROMPTS[:8] + sample.DEFAULT_PROMPTS[12:16]
    if path:
        checkpoint.check_file(path, "file of prompts (--preview-prompts)")
        with checkpoint.reading(path, "cannot be read as UTF-8 text"), open(path, encoding="utf-8-sig") as f:
            lines = [line.strip() for line in f if line.strip()]
    if not lines or (path and args.stage == "tokenizer"):
        raise ValueError(f"--preview-prompts {path}: {len(lines)} prompts, --stage {args.stage}: expected one or more, "
                         "one a line, and no such file where a tokenizer is trained")
    return lines

def pictures(run):
    """A preview -> (pictures uint8, captions, source), or None for --preview 0: reconstructions (of a user's own
    pictures, too), or drawings for prompts. To be called by all processes: each draws its share, and equally many, so
    that sharded ones keep step; what a picture shows depends on its place alone."""
    args, source, prompts = run.args, None, run.prompts
    own = args.stage == "reca" and args.data and not args.preview_prompts
    large, n = args.config != "tiny", args.preview
    if n is None:
        n = (0 if run.device.type == "cpu" else 4) if large else 8 if own or args.stage == "tokenizer" else 12
    if n == 0:
        return None
    if args.stage == "tokenizer":
        source = shape_world.Scenes(n, seed=777).render()
    elif own:
        source = run.batches.first_pictures(n)
        n = len(source)
    captions = [prompts[i % len(prompts)] if source is None else "" for i in range(n)]
    mine = [(run.rank + run.world * i) % n for i in range(-(-n // run.world))]
    with checkpoint.averaged(run, may_end=run.world == 1):
        shares = [sample.show(run.model, captions, source, args.seed, mine, run.device, 4 if large else 16)]
    if run.world > 1:
        shares *= run.world
        dist.all_gather_object(shares, shares[0])
    return np.stack([shares[i % run.world][i // run.world] for i in range(n)]), captions, source

def save_preview(run, before, after, name, now="after"):
    if after and run.rank == 0:
        sample.save_png(sample.before_after(before, after, now), os.path.join(run.args.out, name))

def save_weights(run, **extra):
    """model.safetensors, or adapters, and config.json, for sample.py, and loss.png. Of a sharded run all processes call
    it: adapters are joined from their rows."""
    args, model = run.args, run.model.tokenizer if run.args.stage == "tokenizer" else run.model
    if run.rank == 0:
        sample.save_png(sample.curves(run.history, run.weights), os.path.join(args.out, "loss.png"))
    if run.sharded and not args.lora:
        return run.log.say(f"the weights are in shares: python train.py --export {args.out} FOLDER joins them")
    with checkpoint.averaged(run):
        checkpoint.check_finite(model.named_parameters(), args.out)
        checkpoint.save_model(model, args.out, args.arch, size=args.config, **extra)

def stops(run, done, signals):
    """Do all processes stop after this step? They must agree; on GPUs, where asking waits, a signal takes ten steps."""
    planned = done == run.args.stop_after < run.args.steps
    if run.world == 1 or planned or (run.device.type != "cpu" and done % 10):
        return planned or (run.world == 1 and bool(signals))
    flag = torch.tensor(float(bool(signals)), device=run.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)

def finish(run, before, sheet, started):
    """The end of a whole run: scores, weights, result.json, pictures. All processes call it, to draw together."""
    args = run.args
    if args.stage == "tokenizer":
        run.model.finish(data.to_float(shape_world.Scenes(4096, seed=args.seed).render(), run.device))
    after = scores(run, args.steps, "after:  ")
    if run.rank == 0 or run.sharded:
        save_weights(run, step=args.steps, scores_before=before, scores_after=after)
    if run.rank == 0:
        curve = [(r["step"], r["scores"]) for r in run.history if "scores" in r]
        result = dict(run.about, seconds=round(time.time() - started, 1), curve=curve, scores=after)
        checkpoint.write_text(os.path.join(args.out, "result.json"), json.dumps(result, indent=1, default=str))
    if before and after:
        run.log.say(evaluate.report_change(before, after))
    save_preview(run, sheet, pictures(run), "before_after.png")
    if run.rank == 0:
        sample.write_report(args.out, planned(args))
        run.log.say(f"run folder: {args.out} ({', '.join(sorted(os.listdir(args.out)))})")

def planned(args):
    """The lines of --plan for the page of a run, where they were asked for or take no time."""
    try:
        return plan(args, machine_of(args)) if args.plan or args.config == "tiny" and args.eval_n else ()
    except Exception as e:  # an own model that needs real numbers: no reason to end a finished run with an error
        return [f"no plan: {checkpoint.reason_of(e)}"]

def export(args, state):
    """Writes the model of a run, with averaged weights where it has them, as one piece."""
    run, folder = args.export
    args.device = "cpu"
    check_base(args, state)
    dtype = torch.bfloat16 if state["bf16"] else torch.float32  # of what is frozen, as it was trained with
    model = build(args, state, functools.partial(place, args=args, dtype=dtype, sharded=False))
    parameters = {f"ema.{name}": p.detach() for name, p in model.named_parameters()}
    for name, average in (state["ema"] or {}).items():
        parameters[f"ema.{name}"].copy_(average)
    if "shards" in state:
        path = os.path.join(run, state["shards"])
        averaged = checkpoint.shard_names(path)
        checkpoint.load_shards(path, {name: p for name, p in parameters.items() if name in averaged})
    checkpoint.check_finite(model.named_parameters(), run)
    merge_lora(model)
    if args.layout == "ours":
        checkpoint.save_model(model, folder, args.arch, size=args.config, step=state["step"])
    else:
        os.makedirs(folder, exist_ok=True)
        model.save_published(folder)
    print(f"{run}, step {state['step']}: {folder} ({', '.join(sorted(os.listdir(folder)))})")

def main(argv=None):
    started, signals = time.time(), []
    args, state = parse_args(argv)
    if args.export:
        return export(args, state)
    machine = machine_of(args)
    check_args(args, machine.world)
    check_typed(args, argv)
    if (args.plan or args.plan_on) and int(os.environ.get("RANK", 0)) == 0:
        print("\n".join(plan(args, machine)), flush=True)
    if args.plan == "only" or args.plan_on:
        return 0
    run = Run(args, state)
    del state  # several times the model's size
    before, sheet = next((r["scores"] for r in run.history if r["step"] == 0), None), None
    if run.start:
        run.log.say(f"resumed {args.out} at step {run.start}")
    else:
        before = scores(run, 0, "before: ") if args.ckpt or args.stage in ("sft", "reca") else None
        sheet = pictures(run)

    def stop(number, frame):
        signals.append(number)
        if run.judging:
            raise checkpoint.Interrupted
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    done = train(run, signals)
    checkpoint.settle(run)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # the last checkpoint is written: from now on a signal simply ends the program
    if done == args.steps:
        finish(run, before, sheet, started)
    else:
        why = [signal.Signals(number).name for number in signals] or ["--stop-after"]
        run.log.say(f"stopped by {why[0]} after step {done}: checkpoint saved, continue with --resume {args.out}"
                    + " --stop-after 0" * (done == args.stop_after))
    run.log.close()
    code = 0 if done in (args.steps, args.stop_after) else 128 + (signals + [signal.SIGTERM])[0]
    if run.world > 1:
        dist.barrier()
        os._exit(code)  # DDP's end and gloo's threads may wait for each other, so neither is taken apart
    return code

def train(run, signals):
    """The loop -> the last step that was done."""
    args, clock, since, done = run.args, time.time(), run.start, run.start
    run.model.train()
    steps = range(run.start, args.steps)
    made = run.batches.ahead(lambda step: [run.batches.batch(step, micro) for micro in range(args.accum)], steps)
    for done, micro_batches in enumerate(made, run.start + 1):
        totals, norm = train_step(run, done - 1, micro_batches)
        if done % args.log_every == 0 or done in (args.steps, run.start + 1):
            report_step(run, done, totals, norm, (time.time() - clock) / (done - since))
            clock, since = time.time(), done
        if args.eval_every and done % args.eval_every == 0 and done < args.steps:
            with contextlib.suppress(checkpoint.Interrupted):
                scores(run, done, f"step {done}: ")
            clock, since = time.time(), done
        if args.preview_every and done % args.preview_every == 0 and done < args.steps:
            with contextlib.suppress(checkpoint.Interrupted):
                save_preview(run, None, pictures(run), f"preview-{done}.png", f"step {done}")
            clock, since = time.time(), done
        halt = stops(run, done, signals)
        saves = halt or done == args.steps or (args.save_every and done % args.save_every == 0)
        if saves and (run.rank == 0 or run.sharded):
            checkpoint.save_state(run, done)
            if args.lora or not (halt or run.sharded):  # adapters are small
                save_weights(run, step=done)
        if halt:
            break
    made.close()
    if line := run.batches.report():
        run.log.say(line)
    return done

# ---------------------------------------------------------------------------------------------------------------------
# --plan: what a run needs, rehearsed on the meta device, where tensors have shapes and no numbers

MFU = 0.4  # assumed for times: what large models reach on good hardware
LONGEST = 2000  # words: more than fit into any row
Machine = collections.namedtuple("Machine", "world here gpu room peak name")  # here: processes of a node; room: of one

def machine_of(args):
    """The Machine that --plan-on names, or this one. Its GB are 10^9 bytes: cards have 7 % more, which CUDA takes."""
    checkpoint.check_device(args.device)
    device, world = torch.device(args.device), int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if not args.plan_on:
        room = checkpoint.free_memory(device) / (1 if device.type == "cuda" else here)
        return Machine(world, here, device.type == "cuda", room, peak_flops(device), f"{world} x {device.type}")
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.plan_on)
    if not found:
        raise ValueError(f"--plan-on {args.plan_on}: expected GPUs x GB of each, e.g. 8x80")
    world, gb = int(found[1]), int(found[2])
    return Machine(world, min(world, 8), True, 1e9 * gb, 989e12 if gb >= 80 else 165e12, f"{world} x GPU of {gb} GB")

def rehearsal(args, low=False):
    """-> the run's model on the meta device, in the types that it trains in (low: what is frozen is bf16), [(name,
    parameter)] of what trains, and the parameters of the frozen autoencoder, which is never cast or sharded."""
    file, folder = checkpoint.model_file(args.arch), args.ckpt or ""
    config = file.CONFIGS[args.config]
    ours = args.config == "tiny" and args.stage != "tokenizer"
    if ours and os.path.isfile(os.path.join(folder, "config.json")):  # of any size
        config = checkpoint.from_dict(type(config), checkpoint.read_config(folder)["config"], folder)
    with torch.device("meta"):
        if args.stage == "tokenizer":
            name = image_tokenizer.tiny_name(getattr(file.CONFIGS["tiny"], file.Model.image_tokenizer))
            model = image_tokenizer.TokenizerStage(name)
            return model, model.trainable_parameters(args.stage), []
        model = file.Model(config).to("meta")
    model.tokenizer = checkpoint.load_tokenizer("tiny")  # any will do
    named, apart = model.trainable_parameters(args.stage), list(getattr(model, model.image_tokenizer).parameters())
    if getattr(args, "lora", 0):
        named = custom_kernels.add_lora(model, named, args.lora, torch.Generator())
    if low and args.config != "tiny":
        lower(model, apart + [p for _, p in named])
    return model, named, apart

def lower(model, but):
    but = {id(p) for p in but}
    for p in model.parameters():
        p.data = p.data if id(p) in but else p.data.bfloat16()

def rehearsal_batch(model, part, n, text):
    """What `data.Batches.batch` gives for n samples of a part, their texts of so many words, no picture encoded yet."""
    words, generators = "star " * text, [torch.Generator() for _ in range(n)]
    sample = dict(caption=words, prompt=data.RECA_TEMPLATES[0], instruction="Make it red.", question="What?",
                  answer=words)
    batch = model.collate(part, [sample] * n, generators, torch.Generator().manual_seed(0))
    picture = model.preprocess(Image.new("RGB", (64, 64)), part if part in ("t2i", "i2t") else "recon")
    for prefix in {"edit": ("", "source_"), "text": ()}.get(part, ("",)):
        batch[prefix + "pixels_in"] = picture.expand(n, -1, -1, -1)
    return batch

def samples_of(args, shares=1):
    return {part: round(args.batch * share) // shares for part, share in args.mix.items()}

def needs(args, machine, text):
    """-> {item: bytes of one process}, bytes of a checkpoint, {part: bytes of the encodings of a picture}, parameters
    that train, all of them. text: words of captions and answers; 0: no activations."""
    low, shard, size = machine.gpu and args.dtype != "fp32", getattr(args, "shard", False), checkpoint.size_of
    model, named, apart = rehearsal(args, low)
    trains, share, sizes = [p for _, p in named], machine.here if shard else 1, {}
    plain = argparse.Namespace(**vars(args) | dict(device="cpu", muon_lr=0 if shard else args.muon_lr))
    muon = sum(size(group["params"]) for o in make_optimizers(plain, model, named)[1:] for group in o.param_groups)
    trained, whole, tokenizer = size(trains), size([*model.parameters(), *model.buffers()]), size(apart)
    state, averages = 2 * trained - muon, trained * bool(args.ema)  # AdamW keeps two moments, Muon one
    items = {"weights that train": trained / share, "gradients": trained / share, "optimizer state": state / share,
             "averages (--ema)": averages / share,
             "frozen weights": (whole - trained - tokenizer) / share + tokenizer}
    counts = sum(p.numel() for p in trains), sum(p.numel() for p in model.parameters())
    if shard:  # whole are what is in no block, a block and the next one; and gradients until they are summed, in fp32
        if low:
            lower(model, apart)
        blocks = [list(block.parameters()) for block in model.blocks()]
        inside = {id(p) for group in [apart, *blocks] for p in group}
        rest = [p for p in model.parameters() if id(p) not in inside]
        items["gathered weights"] = size(rest) + 2 * max(map(size, blocks))
        summed = ([p for p in group if p.requires_grad] for group in [rest, *blocks])
        items["gradients to be summed"] = max(size(group) + 4 * sum(p.numel() for p in group) for group in summed)
    elif machine.world > 1:
        items["buckets of DDP"] = trained
    if text:
        batch = {part: rehearsal_batch(model, part, n, text)
                 for part, n in samples_of(args, machine.world * args.accum).items()}
        recompute = str(getattr(args, "recompute", "none"))
        every = int(recompute) if recompute.isdigit() else int(recompute == "blocks")
        items["activations"], sizes = peak_bytes(model, batch, machine.gpu, low, every, drop=shard or args.accum > 1)
    disk = (trained if getattr(args, "lora", 0) else whole) + state + averages
    return {name: n for name, n in items.items() if n}, disk, sizes, *counts

def verdict(args, machine, total, text):
    """Whether a run fits that needs `total` bytes; if not, with which flags it would."""
    if total <= machine.room:
        return f"fits, {(machine.room - total) / 1e9:.1f} GB are left of {machine.room / 1e9:.1f}"
    said = f"does not fit, {(total - machine.room) / 1e9:.1f} GB more than {machine.room / 1e9:.1f}; "
    blocks, shard = dict(recompute="blocks"), dict(shard=True) if machine.world > 1 else {}
    per = math.gcd(*samples_of(args).values()) // (machine.world * args.accum)
    for tried in ({}, blocks, shard, shard | blocks, shard | blocks | dict(lora=16)):
        there = argparse.Namespace(**vars(args) | tried)
        room = machine.room - sum(needs(there, machine, 0)[0].values())
        more = needs(there, machine, text)[0]["activations"] if room > 0 else math.inf
        for parts in [n for n in range(1, per + 1) if per % n == 0 and more <= room * n]:
            flags = tried | (dict(accum=args.accum * parts) if parts > 1 else {})
            less = sum(needs(argparse.Namespace(**vars(args) | flags), machine, text)[0].values())
            if less <= machine.room:
                flags = " ".join(f"--{k} {v}".removesuffix(" True") for k, v in flags.items())
                return said + f"{flags} needs {less / 1e9:.1f}"
    return said + "take a smaller --config, or a larger machine"

def plan(args, machine):
    """-> the lines of --plan. Texts are as long as rows may be, so memory and time are what a run needs at most. Memory
    is what tensors hold: on CPUs the C library may keep some of what was freed on top of that."""
    items, disk, sizes, trained, whole = needs(args, machine, LONGEST)
    model, samples, total = rehearsal(args)[0], samples_of(args), sum(items.values())
    flops = {part: count_flops(model, {part: rehearsal_batch(model, part, 1, LONGEST)}) for part in args.mix}
    step = sum(n * flops[part] for part, n in samples.items())
    each = ", ".join(f"{part} {n / 1e12:,.3g} T" for part, n in flops.items())
    lines = [f"plan of {args.arch} {args.config}, stage {args.stage}, on {machine.name}: computed, not measured",
             f"  parameters: {trained / 1e6:,.1f} million train, {(whole - trained) / 1e6:,.1f} million are frozen",
             f"  operations, forward and backward: {each} per sample; {step / 1e12:,.5g} TFLOP per step of "
             + " + ".join(f"{n} {part}" for part, n in samples.items()),
             f"  memory of one process, 1/{args.accum * machine.world} of a step at a time, texts of full length, GB:"]
    lines += [f"    {name:24s}{n / 1e9:9.3f}" for name, n in items.items()]
    lines += [f"    {'together':24s}{total / 1e9:9.3f}: {verdict(args, machine, total, LONGEST)}",
              f"  disk: {disk / 1e9:.2f} GB per checkpoint; encodings of a picture, of which the host keeps up to "
              f"--cache-gb {args.cache_gb:g}: " + ", ".join(f"{part} {n / 1e3:,.0f} kB" for part, n in sizes.items())]
    if 0 < machine.peak < math.inf:
        hours = args.steps * step / (machine.world * machine.peak * MFU) / 3600
        lines.append(f"  time: {hours:,.1f} hours for {args.steps:,} steps at {MFU:.0%} of {machine.peak / 1e12:.0f} "
                     "TFLOP/s per GPU, which is assumed")
    return lines

def check_room(args, machine, rank):
    """-> the bytes of a checkpoint. Raises ValueError where the run cannot fit, however short its texts are, on the
    disk or in memory. Tiny models are not rehearsed for it: what they need is small."""
    text = int(args.config != "tiny")
    items, disk, *_ = needs(args, machine, text)
    if rank == 0:
        checkpoint.check_disk(args.out, disk)
    if (total := sum(items.values())) > machine.room:
        raise ValueError(f"memory: {total / 1e9:.1f} GB in each process: {verdict(args, machine, total, text)} "
                         "(--plan only says for what)")
    return disk

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
