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

The run folder gets model.safetensors + config.json (for sample.py), checkpoint.pt (for --resume), result.json (command,
commit, scores), log.jsonl, loss.png, before_after.png. Ctrl-C, SIGTERM and SIGHUP save a checkpoint first.
"""
import argparse
import contextlib
import fractions
import functools
import json
import math
import os
import signal
import time

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns that it need not have looked for unused parameters

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
import data
import evaluate
import image_tokenizer
import sample
import shape_world
from custom_kernels import Muon, peak_flops, step_if

ALIGN_WEIGHT = 0.25  # a contrast over a batch of 48 starts at log 48, several times the other losses, far from 0

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoint.add_flags(p)
    p.add_argument("--stage", choices=("tokenizer", "base", "sft", "reca"), default="reca")
    p.add_argument("--out", help="run folder (default: runs/ARCH-STAGE, or the next free runs/ARCH-STAGE-N)")
    p.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
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
    add("--ema", type=float, default=0.0, help="decay of averaged weights, e.g. 0.999; 0 = off")
    add("--seed", type=int, default=0)
    add = p.add_argument_group("machine and output").add_argument
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of products; auto: bf16 where a GPU has it")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: published sizes on GPUs")
    add("--checkpoint", choices=("none", "full"), default="none", help="full: recompute activations: slower, smaller")
    add("--cache-gb", type=float, default=8.0, help="host memory for a pool's encodings; larger ones are not kept")
    add("--threads", type=int, help="CPU threads per process")
    add("--cfg", type=float, help="guidance the model is scored at and saved with (default: the checkpoint's)")
    add("--save-every", type=int, default=500)
    add("--log-every", type=int, default=10)
    add("--stop-after", type=int, default=0, help="save a checkpoint and stop after this step, as a signal would")
    add("--log", choices=("wandb", "tensorboard"), help="optional extra logger")
    p.set_defaults(eps=1e-8, warmup_from=1)  # of recipes only
    return p

def parse_args(argv=None):
    """-> args, and a resumed run's state. What is typed wins over recipe or stored arguments, and those over defaults.
    """
    p = parser()
    first = p.parse_args(argv)
    state = checkpoint.read_checkpoint(first.resume) if first.resume else None
    p.set_defaults(**(state["args"] if state else recipe(first)))
    args = p.parse_args(argv)
    for name in ("arch", "config", "stage") if state else ():
        if getattr(args, name) != state["args"][name]:
            raise ValueError(f"--resume {args.resume}: that is a run of --{name} {state['args'][name]}, not "
                             f"{getattr(args, name)}; give it to a new run as --ckpt {args.resume}")
    args.betas, args.mix = tuple(args.betas), data.read_mix(args.mix)
    args.mix = {part: share for part, share in args.mix.items() if loss_weight(args, part) > 0}
    args.out, args.overwrite = first.out or first.resume, first.overwrite
    args.captioned = args.captioned or args.pool
    return args, state

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
    return (drawing | dict(i2t=args.i2t_weight, align=ALIGN_WEIGHT)).get(part, 1.0)

def check_args(args, world):
    checkpoint.check_ranges(args)
    if args.image_root and not any(path.endswith(".json") for path in args.i2t_data or ()):
        raise ValueError(f"--image-root {args.image_root} is for the pictures of an --i2t-data JSON, and there is none")
    if ("images" in args.mix or args.stage == "tokenizer") and (args.stage, [*args.mix]) != ("tokenizer", ["images"]):
        raise ValueError(f"--stage {args.stage} --mix {' '.join(args.mix)}: the tokenizer stage trains images alone")
    if not args.mix:
        raise ValueError("--mix and the weights of the losses leave nothing to train on")
    if "align" in args.mix and args.accum > 1:
        raise ValueError(f"--accum {args.accum}: align contrasts a whole batch: --accum 1, or a --mix without it")
    for part, share in args.mix.items():
        n = round(args.batch * share)
        if n < 1:
            raise ValueError(f"--batch {args.batch} gives {n} {part} samples: raise it, or leave {part} out of --mix")
        if n % (world * args.accum):
            whole = math.lcm(*[fractions.Fraction(s).limit_denominator(100).denominator for s in args.mix.values()])
            raise ValueError(f"--batch {args.batch} gives {n} {part} samples, which {world} processes x --accum "
                             f"{args.accum} cannot share: take a multiple of {whole * world * args.accum}")
    checkpoint.check_device(args.device)
    if args.cfg is not None and args.stage == "tokenizer":
        raise ValueError(f"--cfg {args.cfg:g}: a tokenizer has no guidance")

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
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)
    return rank, world, device

def build(args):
    """The model of this run with the weights it starts from."""
    file = checkpoint.model_file(args.arch)
    tokenizer = file.Model.image_tokenizer  # the frozen autoencoder's name, in the model and in its config
    if args.stage == "tokenizer":
        name = image_tokenizer.tiny_name(getattr(file.CONFIGS["tiny"], tokenizer))
        return image_tokenizer.TokenizerStage(name, args.ckpt)
    if args.stage == "base" and not args.ckpt:
        config, text_tokenizer = file.CONFIGS[args.config], checkpoint.load_tokenizer(args.text_tokenizer or "tiny")
        config, weights = image_tokenizer.trained(config, tokenizer, args.tokenizer_ckpt)
        model = file.Model(config, text_tokenizer)
        checkpoint.load_strict(getattr(model, tokenizer), weights, "the image tokenizer")
    else:
        ckpt = args.ckpt or checkpoint.default_weights(args.arch, "base")
        model = checkpoint.load_model(args.arch, ckpt, args.config, args.tokenizer_ckpt, args.text_tokenizer,
                                      vision_ckpt=args.vision_ckpt)
    model.config.cfg = args.cfg or model.config.cfg
    return model

def make_optimizers(args, model, named):
    """[AdamW], or with --muon-lr [AdamW, Muon]: Muon takes the 2-D weights of numbered modules (blocks, projectors),
    AdamW keeps embeddings, heads, norms and biases."""
    plain = [p for n, p in named if p.ndim < 2 or model.no_decay(n, p)]
    matrices = [(n, p) for n, p in named if p.ndim >= 2 and not model.no_decay(n, p)]
    inside = {n: p for n, p in matrices if args.muon_lr and p.ndim == 2 and any(k.isdigit() for k in n.split("."))}
    decayed = [p for n, p in matrices if n not in inside]
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=plain, weight_decay=0.0)]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=args.lr, betas=args.betas, eps=args.eps,
                                    fused=args.device != "cpu" or None)]
    if inside:
        optimizers.append(Muon(inside.values(), lr=args.muon_lr, weight_decay=args.muon_decay))
    return optimizers

def learning_rate(args, step, lr):
    """Linear warm-up to `lr` (published ones from 0: warmup_from), then constant, or half a cosine to 0."""
    if step < args.warmup:
        return lr * (step + args.warmup_from) / args.warmup
    t = (step - args.warmup) / max(1, args.steps - args.warmup) * (args.schedule == "cosine")
    return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))

class Run:
    """What a run holds. model: as it is saved; forward: as it is called, wrapped for several processes and compiled."""

    def __init__(self, args, state):
        self.args, self.history, self.start, self.ema, self.judging = args, [], 0, None, False
        self.rank, self.world, self.device = setup(args)
        self.lock = checkpoint.claim(args, self.rank, self.world)
        self.about = checkpoint.describe(args, state)  # now: the commit may be another one when the run ends
        self.model = build(args)
        if state is not None:
            checkpoint.load_strict(self.model, state["model"], args.resume)
        self.model.to(self.device)
        self.named = self.model.trainable_parameters(args.stage)
        checkpoint.check_room(self)  # before anything is encoded
        self.weights = {part: loss_weight(args, part) for part in args.mix}
        self.batches = data.Batches(args, self.model, self.device, self.rank, self.world)
        self.optimizers = make_optimizers(args, self.model, self.named)
        if args.ema:
            self.ema = {n: p.detach().clone() for n, p in self.named}
        if state is not None:
            checkpoint.load_state(self, state)
        self.forward = self.wrapped()
        self.skipped, self.streak, self.last_skip = torch.zeros(3, dtype=torch.int64, device=self.device).unbind()
        self.log = checkpoint.Log(args, self.rank == 0, self.start)
        trained, total = sum(p.numel() for _, p in self.named), sum(p.numel() for p in self.model.parameters())
        batch = " + ".join(f"{n} {part}" for part, n in self.batches.samples.items())
        self.log.say(f"{args.arch} {args.config}, stage {args.stage}: {total:,} parameters, {trained:,} train; "
                     f"{self.world} x {self.device.type} in {self.dtype}, {args.steps} steps of {batch}")

    def wrapped(self):
        args, cuda, forward = self.args, self.device.type == "cuda", self.model
        for block in self.model.blocks() if args.checkpoint == "full" else ():
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
        bf16 = args.dtype == "bf16" or (args.dtype == "auto" and cuda and torch.cuda.is_bf16_supported())
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        if self.world > 1:
            forward = DDP(forward, device_ids=[self.device] if cuda else None, find_unused_parameters=True)
        if args.compile == "on" or (args.compile == "auto" and cuda and args.config != "tiny"):  # tiny runs are short
            torch._dynamo.config.suppress_errors = args.compile == "auto"  # then a failing compiler costs speed alone
            forward = torch.compile(forward)
        return forward

def train_step(run, step, micro_batches):
    """One optimizer step over this process's [{part: tensors}] -> ({part: its loss}, gradient norm), both still on the
    device: nothing in a step waits for it."""
    args, parts, M = run.args, list(run.weights), len(micro_batches)
    totals = {part: torch.zeros((), device=run.device) for part in parts}
    torch.manual_seed(data.mix_seed(args.seed, step, run.rank))  # dropout, so that a resumed run draws the same
    counts = global_counts(run, micro_batches)
    for micro, batch in enumerate(micro_batches):
        batch = run.batches.to_device(batch, counts)
        alone = micro < M - 1 and run.world > 1  # gradients are exchanged in the last micro-batch only
        with (run.forward.no_sync() if alone else contextlib.nullcontext(),
              torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32)):
            losses = run.forward(batch)
            loss = sum(run.weights[part] * losses[part] for part in parts) / sum(run.weights.values()) / M
        loss.backward()
        for part in parts:
            totals[part] += losses[part].detach() / M
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in run.named], args.clip if args.clip > 0 else math.inf)
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
        average.lerp_(p.detach(), (1 - run.args.ema) * good)

def global_counts(run, micro_batches):
    """{part: what its loss is divided by}: the targets of the whole step, in all processes and micro-batches, over the
    number of those, since gradients are averaged over those. So a mean over tokens is one over the step's tokens."""
    parts = [part for part, tensors in micro_batches[0].items() if "count" in tensors]
    if not parts:
        return {}
    counts = torch.stack([sum(batch[part]["count"] for batch in micro_batches) for part in parts]).to(run.device)
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
    flops = sum(run.model.flops_per_sample(part) * n for part, n in samples.items())
    r["mfu"] = flops / seconds / run.world / peak_flops(run.device)
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
    """Judges the model on the first process, says and logs it -> scores, or None where there is nothing to judge."""
    args = run.args
    if not args.eval_n or args.config != "tiny" or run.rank > 0:
        return None
    with checkpoint.averaged(run, may_end=True):
        s = evaluate.score_all(run.model, args.eval_n, seed=0, split=args.eval_split,
                               questions=min(400, args.eval_n + 100), editing="edit" in run.weights)
    run.log.write(dict(step=step, scores=s), title + evaluate.report(s))
    run.history.append(dict(step=step, scores=s))
    return s

def pictures(run):
    """What before_after.png shows: reconstructions (of a user's own pictures, too), or drawings for fixed prompts."""
    source = None
    if run.args.stage == "tokenizer":
        source = shape_world.Scenes(8, seed=777).render()
    elif run.args.data and run.args.stage == "reca":
        source = run.batches.first_pictures(8)
    with checkpoint.averaged(run):
        return sample.show(run.model, source, run.args.seed, run.device)

def save_weights(run, **extra):
    """model.safetensors and config.json, for sample.py, and loss.png."""
    args, model = run.args, run.model.tokenizer if run.args.stage == "tokenizer" else run.model
    with checkpoint.averaged(run):
        checkpoint.check_finite(model.named_parameters(), args.out)
        checkpoint.save_model(model, args.out, args.arch, text_tokenizer=args.text_tokenizer or "tiny", **extra)
    sample.save_png(sample.curves(run.history, run.weights), os.path.join(args.out, "loss.png"))

def stops(run, done, signals):
    """Do all processes stop after this step? They must agree; on GPUs, where asking waits, a signal takes ten steps."""
    planned = done == run.args.stop_after < run.args.steps
    if run.world == 1 or planned or (run.device.type != "cpu" and done % 10):
        return planned or (run.world == 1 and bool(signals))
    flag = torch.tensor(float(bool(signals)), device=run.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)

def finish(run, before, sheet, started):
    """The end of a whole run, on the first process: scores, weights, result.json, pictures."""
    args = run.args
    if args.stage == "tokenizer":
        run.model.finish(data.to_float(shape_world.Scenes(4096, seed=args.seed).render(), run.device))
    after = scores(run, args.steps, "after:  ")
    save_weights(run, step=args.steps, scores_before=before, scores_after=after)
    curve = [(r["step"], r["scores"]) for r in run.history if "scores" in r]
    result = dict(run.about, seconds=time.time() - started, curve=curve, scores=after)
    checkpoint.write_text(os.path.join(args.out, "result.json"), json.dumps(result, indent=1, default=str))
    if before and after:
        run.log.say(evaluate.report_change(before, after))
    sample.save_png(sample.before_after(sheet, pictures(run)), os.path.join(args.out, "before_after.png"))
    run.log.say(f"run folder: {args.out} ({', '.join(sorted(os.listdir(args.out)))})")

def main(argv=None):
    started, signals = time.time(), []
    args, state = parse_args(argv)
    check_args(args, int(os.environ.get("WORLD_SIZE", 1)))
    run = Run(args, state)
    del state  # several times the model's size
    before, sheet = next((r["scores"] for r in run.history if r["step"] == 0), None), None
    if run.start:
        run.log.say(f"resumed {args.out} at step {run.start}")
    elif run.rank == 0:
        before = scores(run, 0, "before: ") if args.ckpt or args.stage in ("sft", "reca") else None
        sheet = pictures(run)

    def stop(number, frame):
        signals.append(number)
        if run.judging:
            raise checkpoint.Interrupted
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    done = train(run, signals)
    for number, handler in handlers.items():
        signal.signal(number, handler)  # the last checkpoint is written: from now on a signal simply ends the program
    if done == args.steps and run.rank == 0:
        finish(run, before, sheet, started)
    elif done < args.steps:
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
        halt = stops(run, done, signals)
        saves = halt or done == args.steps or (args.save_every and done % args.save_every == 0)
        if saves and run.rank == 0:
            checkpoint.save_state(run, done)
            if not halt:
                save_weights(run, step=done)
        if halt:
            break
    made.close()
    if line := run.batches.report():
        run.log.say(line)
    return done

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
