"""Scores in the shape world, where the content of every picture is known: an exact judge of pixels, not a detector.

    python evaluate.py --arch mar                                # the shipped RecA weights
    python evaluate.py --arch diffusion --editing                # edits too, for models that were trained to edit
    python evaluate.py --arch mar --ckpt runs/x --n 1000 --json scores.json
    python evaluate.py --arch mar --ckpt C --geneval evaluation_metadata.jsonl --out DIR    # GenEval's pictures

Drawing is scored as in the paper. Short prompts are the six tasks of GenEval (arXiv 2310.11513): single object, two
objects, counting, colors, position, color attribution. Long prompts say everything, as DPG-Bench's do (arXiv
2403.05135): the score is the share of their objects that are drawn right in shape, color, size and place. A third of
the short prompts with two objects, colors, positions or attributes ask for a combination that no training caption ever
named ("held out"), and these are scored apart, as are such objects of long prompts. Held-out attributes are
combinations of shape and color; which shapes stand together is free there, so one in five "seen" prompts of that task
names a held-out pair of shapes. Intervals are 95 % Wilson intervals. Questions are answered greedily; every picture
draws its noise from a generator of its own, so that no score depends on how many are drawn at once.
"""
import argparse
import json
import math
import os
import random
import shlex
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import shape_world
from data import sample_generator, to_float, to_uint8
from shape_world import COMBO_HELD_OUT, QUESTION_KINDS, TASKS, Scenes, fulfils, judge, same_objects

BATCH = 256  # rows in one call of a sampler: how much memory it takes, and nothing else

# ---------------------------------------------------------------------------------------------------------------------
# Helpers of all scores

def wilson(hits, n, z=1.96):
    """(low, high): the 95 % interval of the proportion hits / n; not a number for n = 0."""
    if n == 0:
        return float("nan"), float("nan")
    p, d = hits / n, 1 + z * z / n
    center, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, center - half), min(1.0, center + half)

def share(right, name="score"):
    """Booleans (n,) -> {name: their mean, "n", "interval"}; not a number for n = 0."""
    n, hits = len(right), int(np.sum(right))
    return {name: hits / n if n else float("nan"), "n": n, "interval": wilson(hits, n)}

def in_batches(model, method, *inputs, **options):
    """Results of method(*inputs, **options), BATCH rows of every input, and of an option `generator`, at a time. uint8
    pictures (n, h, w, 3) go in as float ones (n, 3, h, w) on the model's device; lists as they are."""
    device = next(model.parameters()).device
    for i in range(0, len(inputs[0]), BATCH):
        rows, part = [x[i:i + BATCH] for x in inputs], dict(options)
        if "generator" in part:
            part["generator"] = part["generator"][i:i + BATCH]
        yield method(*(to_float(x, device) if isinstance(x, np.ndarray) else x for x in rows), **part)

def draw(model, method, *inputs, generator, **sampler):
    """What a sampler draws for all rows of its inputs, each from its own generator: uint8 pictures (n, h, w, 3)."""
    return np.concatenate([to_uint8(x) for x in in_batches(model, method, *inputs, generator=generator, **sampler)])

def generators(seed, n):
    """One generator for each of n prompts, of which there is one picture."""
    return [sample_generator(seed, number, 0, "picture") for number in range(n)]

# ---------------------------------------------------------------------------------------------------------------------
# The scores

@torch.no_grad()
def score_generation(model, per_task=50, seed=0, split="test", **sampler):
    """Draws one picture for each of 6 * per_task prompts and judges it. Returns a dict: score (mean of the six tasks),
    seen and held_out (means over the tasks that have both), a dict per task, objects per picture and how many of these
    have no known shape; the pictures, uint8 (n, h, w, 3); and their prompt rows."""
    rows = shape_world.task_prompts(per_task, seed, split)
    own = generators(1000 + seed, len(rows))
    pictures = draw(model, model.generate, [r["prompt"] for r in rows], generator=own, **sampler)
    found = judge(pictures)
    right = np.array([fulfils(objects, row) for objects, row in zip(found, rows)])
    task_of, held = np.array([r["task"] for r in rows]), np.array([r["held_out"] for r in rows])
    tasks = {}
    for task in TASKS:
        here = task_of == task
        tasks[task] = share(right[here])
        if held[here].any() and not held[here].all():
            tasks[task].update(seen=share(right[here & ~held]), held_out=share(right[here & held]))
    both = [t for t in tasks.values() if "seen" in t]
    scores = share(right)
    scores.update(score=float(np.mean([t["score"] for t in tasks.values()])), tasks=tasks,
                  objects=float(np.mean([len(objects) for objects in found])),
                  unknown=float(np.mean([sum(o[0] < 0 for o in objects) for objects in found])))
    for part in ("seen", "held_out"):
        scores[part] = float(np.mean([t[part]["score"] for t in both])) if both else float("nan")
    return scores, pictures, rows

@torch.no_grad()
def score_long(model, n=100, seed=0, split="test", **sampler):
    """Draws n complete descriptions: a dict with score (share of their objects that are right in shape, color, size and
    place), captioned and held_out (the same of objects whose combination of shape and color captions hold, and of the
    others), each a `share`, and objects per picture; the pictures, uint8 (n, h, w, 3), and the prompts."""
    prompts, scenes = shape_world.long_prompts(n, seed, split)
    pictures = draw(model, model.generate, prompts, generator=generators(4000 + seed, n), **sampler)
    right, held, found = [], [], judge(pictures)
    for i, drawn in enumerate(found):
        for o in scenes.scene(i)[1]:
            right.append((o.shape, o.color, o.size, o.cell) in drawn)
            held.append(COMBO_HELD_OUT[o.shape, o.color])
    right, held = np.array(right), np.array(held)
    objects = float(np.mean([len(drawn) for drawn in found]))
    return dict(share(right), captioned=share(right[~held]), held_out=share(right[held]), objects=objects,
                prompts=n), pictures, prompts

@torch.no_grad()
def score_questions(model, n=400, seed=0):
    """Exact-match accuracy of short answers about fresh pictures, in all and per kind of question."""
    scenes, rng = Scenes(n, seed=90_000 + seed), random.Random(seed)
    asked = [shape_world.question(scenes.scene(i), rng, QUESTION_KINDS[i % len(QUESTION_KINDS)]) for i in range(n)]
    questions, wanted, kinds = zip(*asked)
    batches = in_batches(model, model.answer, scenes.render(), list(questions), max_new_tokens=6)
    right = np.array([got.strip().lower() == want for got, want in zip(sum(batches, []), wanted)])
    kinds = np.array(kinds)
    each = {kind: float(right[kinds == kind].mean()) for kind in QUESTION_KINDS if kind in kinds}
    return dict(share(right, "accuracy"), kinds=each)

@torch.no_grad()
def score_reconstruction(model, n=128, seed=0, **sampler):
    """Pictures through the model's own understanding and back: a dict with objects (agreement of shape, color and
    cell), exact (share of pictures where all agree) and pixel_error (mean absolute, in levels of 0 to 255); the
    pictures drawn and the true ones, uint8 (n, h, w, 3)."""
    scenes = Scenes(n, seed=91_000 + seed)
    truth = scenes.render()
    pictures = draw(model, model.reconstruct, truth, generator=generators(2000 + seed, n), **sampler)
    agree = np.array([same_objects(found, scenes.scene(i)) for i, found in enumerate(judge(pictures))])
    error = float(np.abs(pictures.astype(float) - truth).mean())
    return dict(objects=float(agree.mean()), exact=float((agree == 1).mean()), pixel_error=error, n=n), pictures, truth

@torch.no_grad()
def score_editing(model, n=192, seed=0, **sampler):
    """Edits by instruction, judged exactly: a dict with asked (the picture holds the object or ground that was asked
    for), kept (share of the other objects that is still there, 0 where an edit leaves none), both (everything is
    right) and kinds (asked, per kind of edit); the pictures drawn and their sources, uint8 (n, h, w, 3)."""
    scenes, rng = Scenes(n, seed=92_000 + seed), random.Random(seed)
    instructions, targets, kinds = zip(*[shape_world.edit(scenes.scene(i), rng) for i in range(n)])
    source, truth = scenes.render(), Scenes.of(targets).render()
    pictures = draw(model, model.edit, source, list(instructions), generator=generators(3000 + seed, n), **sampler)

    def ground(images):  # the median color of each picture: objects cover less than half of it
        return np.median(images.reshape(len(images), -1, 3), axis=1)

    ground_right = np.abs(ground(pictures) - ground(truth)).max(1) < 40
    asked, kept, both = [], [], []
    for i, objects in enumerate(zip(judge(source), judge(truth), judge(pictures))):
        before, after, got = map(set, objects)
        done = after - before <= got and not (before - after) & got
        if kinds[i] == "ground":
            done = ground_right[i]
        stay = before & after
        asked.append(bool(done))
        kept.append(len(stay & got) / max(1, len(stay)))
        both.append(bool(done and got == after and ground_right[i]))
    each = {kind: float(np.mean([a for a, k in zip(asked, kinds) if k == kind])) for kind in sorted(set(kinds))}
    means = dict(asked=float(np.mean(asked)), kept=float(np.mean(kept)), both=float(np.mean(both)))
    return dict(means, n=n, kinds=each), pictures, source

def score_all(model, n=300, seed=0, split="test", questions=400, reconstructions=128, editing=False, **sampler):
    """All scores in one dict (what train.py prints before and after). n: short prompts, a third as many long ones;
    questions, reconstructions: how many, 0 for none; editing: for models that were trained to edit. An image tokenizer,
    which draws nothing, is scored by what it keeps."""
    start, was_training = time.time(), model.training
    model.eval()
    if not hasattr(model, "generate"):
        questions, reconstructions, scores = 0, n, {}
    else:
        scores = dict(generation=score_generation(model, max(1, n // len(TASKS)), seed, split, **sampler)[0],
                      long=score_long(model, max(1, n // 3), seed, split, **sampler)[0])
    if questions:
        scores["questions"] = score_questions(model, questions, seed)
    if reconstructions:
        scores["reconstruction"] = score_reconstruction(model, reconstructions, seed, **sampler)[0]
    if editing:
        scores["editing"] = score_editing(model, seed=seed, **sampler)[0]
    model.train(was_training)
    scores["seconds"] = time.time() - start
    return scores

def report(scores, title=""):
    """The lines that a person reads."""
    if "generation" not in scores:
        line = "reconstruction: objects {objects:.3f}, exact {exact:.3f}, pixel error {pixel_error:.2f} gray levels"
        return title + line.format(**scores["reconstruction"])
    def about(score):
        return "{:.3f}  (95 % {:.3f}-{:.3f}, ".format(score["score"], *score["interval"])

    g = scores["generation"]
    lines = [f"{title}short prompts {about(g)}{g['n']} pictures)  seen {g['seen']:.3f}  held-out {g['held_out']:.3f}  "
             f"objects/picture {g['objects']:.2f}",
             "  " + "  ".join(f"{task} {g['tasks'][task]['score']:.2f}" for task in TASKS)]
    if "long" in scores:
        d = scores["long"]
        lines.append(f"  long prompts {about(d)}{d['n']} objects)  captioned {d['captioned']['score']:.3f}  "
                     f"held-out {d['held_out']['score']:.3f}")
    tail = []
    if "questions" in scores:
        q = scores["questions"]
        tail.append(f"questions {q['accuracy']:.3f} (" + " ".join(f"{k} {v:.2f}" for k, v in q["kinds"].items()) + ")")
    if "reconstruction" in scores:
        tail.append(f"reconstruction {scores['reconstruction']['objects']:.3f}")
    if "editing" in scores:
        tail.append("editing asked {asked:.3f} kept {kept:.3f} both {both:.3f}".format(**scores["editing"]))
    return "\n".join(lines + ["  " + "  ".join(tail)] * bool(tail))

def report_change(before, after):
    """The line that compares two score_all's."""
    names = {"short": ("generation", "score"), "held-out": ("generation", "held_out"), "long": ("long", "score"),
             "reconstruction": ("reconstruction", "objects"), "questions": ("questions", "accuracy")}
    changes = {name: after[of][key] - before[of][key] for name, (of, key) in names.items()
               if of in after and of in before}
    return "change: " + "  ".join(f"{name} {change:+.3f}" for name, change in changes.items())

# ---------------------------------------------------------------------------------------------------------------------
# GenEval, and the command line

def export_geneval(model, prompts_file, out, n=4, seed=0, **sampler):
    """n pictures for each prompt in the folder layout of GenEval's own scorer (00000/metadata.jsonl,
    00000/samples/0000.png), with the recipe beside them in recipe.json. prompts_file: GenEval's
    evaluation_metadata.jsonl, one JSON object with a "prompt" per line. A picture's noise is that of (seed, number of
    the prompt, number of the picture). FileNotFoundError where prompts_file is missing, ValueError where it is not
    such lines."""
    if not os.path.isfile(prompts_file):
        raise FileNotFoundError(f"--geneval {prompts_file}: no such file; it is GenEval's evaluation_metadata.jsonl")
    with checkpoint.reading(prompts_file, "not lines of JSON with a prompt each"), open(prompts_file, "rb") as f:
        rows = [json.loads(line) for line in f if line.strip()]
        if not rows or not all(row["prompt"].strip().encode() for row in rows):
            raise ValueError("an empty prompt, or none at all")
    for i, row in enumerate(tqdm(rows, "GenEval prompts", disable=None)):
        folder = os.path.join(out, f"{i:05d}")
        os.makedirs(os.path.join(folder, "samples"), exist_ok=True)
        checkpoint.write_text(os.path.join(folder, "metadata.jsonl"), json.dumps(row))
        own = [sample_generator(seed, i, j, "picture") for j in range(n)]
        for j, picture in enumerate(draw(model, model.generate, [row["prompt"]] * n, generator=own, **sampler)):
            Image.fromarray(picture).save(os.path.join(folder, "samples", f"{j:04d}.png"))
    recipe = dict(argv=sys.argv[1:], n=n, seed=seed, torch=torch.__version__, **sampler)
    checkpoint.write_text(os.path.join(out, "recipe.json"), json.dumps(recipe, indent=1))
    print(f"{len(rows)} prompts x {n} pictures: {out}")

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoint.add_flags(p)
    p.add_argument("--lora", dest="adapters", metavar="RUN", help="adapters of a run with --lora, trained on --ckpt")
    p.add_argument("--n", type=int, help="judged pictures (default 600); with --geneval: per prompt (default 4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("dev", "test"), default="test", help="dev: prompts for choosing settings")
    p.add_argument("--editing", action="store_true", help="score edits too: for models that were trained to edit")
    p.add_argument("--cfg", type=float)
    p.add_argument("--steps", type=int)
    p.add_argument("--json", metavar="FILE", help="write all numbers there")
    p.add_argument("--geneval", metavar="JSONL", help="draw GenEval's prompts instead, in its folders, under --out")
    p.add_argument("--out", default="geneval")
    args = p.parse_args(argv)
    checkpoint.check_ranges(args)
    checkpoint.choose(args)
    checkpoint.refuse_unused(
        p, argv, ("split editing json", not args.geneval, "the shape world's scores, not for --geneval"),
        ("out", args.geneval, "--geneval"), ("tokenizer-ckpt vision-ckpt", args.config != "tiny", "published models"),
        ("gemm", args.device == "cpu", "CPUs"))
    if args.n is None:
        args.n = 4 if args.geneval else 600
    if args.config != "tiny" and not args.geneval:
        raise ValueError(f"--config {args.config}: the judge knows the shape world only; draw GenEval's prompts with "
                         "--geneval FILE and score them with its own tools")
    if args.n < (1 if args.geneval else len(TASKS)):
        raise ValueError(f"--n {args.n}: at least 1 picture per prompt with --geneval, else 6, one for each task")
    return args

def main(argv=None):
    args = parse_args(argv)
    model = checkpoint.model_of(args)
    sampler = {k: v for k, v in dict(cfg=args.cfg, steps=args.steps).items() if v is not None}
    if args.geneval:
        return export_geneval(model, args.geneval, args.out, args.n, args.seed, **sampler)
    scores = score_all(model, args.n, args.seed, args.split, editing=args.editing, **sampler)
    print(report(scores))
    for task, t in scores["generation"]["tasks"].items():
        low, high = t["interval"]
        line = f"  {task:14s} {t['score']:.3f} ({low:.3f}-{high:.3f}, {t['n']} pictures)"
        if "seen" in t:
            line += "".join(f"{before}{t[part]['score']:.3f} of {t[part]['n']}"
                            for before, part in (("  seen ", "seen"), (", held-out ", "held_out")))
        print(line)
    if args.json:
        command = "python evaluate.py " + shlex.join(sys.argv[1:] if argv is None else argv)
        record = dict(arch=args.arch, command=command, commit=checkpoint.git_commit(), torch=torch.__version__)
        checkpoint.write_text(args.json, json.dumps(dict(record, scores=scores), indent=1))

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
