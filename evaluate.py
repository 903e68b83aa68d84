"""Scores in the shape world, where the content of every picture is known: an exact judge of pixels, not a detector. And
the public benchmarks: their pictures, drawn for their own scorers, and their questions, asked and scored here.

    python evaluate.py --arch mar                                # the shipped RecA weights
    python evaluate.py --arch diffusion --editing                # edits too, for models that were trained to edit
    python evaluate.py --arch mar --ckpt runs/x --n 1000 --json scores.json

Drawing is scored as in the paper. Short prompts are the six tasks of GenEval (arXiv 2310.11513): single object, two
objects, counting, colors, position, color attribution. Long prompts say everything, as DPG-Bench's do (arXiv
2403.05135): the score is the share of their objects that are drawn right in shape, color, size and place. A third of
the short prompts with two objects, colors, positions or attributes ask for a combination that no training caption ever
named ("held out"), and these are scored apart, as are such objects of long prompts. Held-out attributes are
combinations of shape and color; which shapes stand together is free there, so one in five "seen" prompts of that task
names a held-out pair of shapes. Intervals are 95 % Wilson intervals. Questions are answered greedily; every picture
draws its noise from a generator of its own, so that no score depends on how many are drawn at once.

    python evaluate.py --ckpt runs/x --draw geneval --prompts evaluation_metadata.jsonl --out DIR
    torchrun --nproc_per_node=8 -- evaluate.py --ckpt runs/x --draw dpg --prompts dpg_bench/prompts/ --out DIR
    python evaluate.py --ckpt runs/x --draw gedit --prompts rows.jsonl --images pictures/ --out DIR
    python evaluate.py --verify DIR                              # draws four of its pictures again, counts its files

The scorer reads DIR/images (of gedit: DIR/gen_image), with bare PNGs; DIR/recipe.json says how they were made. The
noise is that of (--seed, name of the file, tile): neither --batch nor torchrun changes a picture (but sums of floats
may, by a level). What is there is not drawn again. torchrun needs the -- to leave our --n alone. dpg makes ELLA's
files, a 2x2 grid for each prompt, dpg-reca those of RecA's copy of the scorer, stem_0.png to stem_3.png; both take the
folder of texts, or JSON {"stem.txt": prompt}. wise takes the files of its legacy or of its verified protocol. gedit
takes the data set's parquet files (with pyarrow), or JSON lines with its fields, where input_image is a path in
--images.

    python evaluate.py --ckpt runs/x --score pope --data coco_pope_random.json coco_pope_popular.json --images val2014/
    python evaluate.py --score mmmu --predictions a/output.json --against b/output.json    # published answers alone

Answers are kept as they come, so that a killed run goes on, and written as the official scorer reads them. Intervals
are 95 % of 1000 resamples of the questions (of MMVP's pairs, of MMBench's groups of rotations); --against compares two
runs, by the same resamples. POPE's sets are a file each, and their mean is told. MMMU takes the hub's parquet files, or
JSON lines with their columns; where a question has several pictures they stand side by side, as one. MM-Vet's answers
are for its server. Whose rules these are stands in benchmarks.py.
"""
import argparse
import hashlib
import json
import math
import os
import pathlib
import random
import shlex
import sys
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import benchmarks
import checkpoint
import shape_world
from benchmarks import DRAWN, SCORED, drawings, source_of, sources_there
from data import json_or_text, open_image, sample_generator, to_float, to_uint8
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
# Public benchmarks: drawn for their own scorers, or asked and scored here by the rules of benchmarks.py

def same_shape(pictures):
    """The numbers of tensors that go into a batch together, in lists: models may keep a picture's proportions."""
    groups = {}
    for i, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(i)
    return groups.values()

def digest(values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()

def claim(args, about):
    """Writes recipe.json in --out. ValueError where the folder holds what came about in another way."""
    path, old = os.path.join(args.out, "recipe.json"), os.listdir(args.out) if os.path.isdir(args.out) else []
    old = [name for name in old if not name.startswith("recipe.json")]  # looked at before the recipe: that comes first
    files = dict(ckpt=args.ckpt or checkpoint.default_weights(args.arch, "base" if args.adapters else "reca"),
                 lora=args.adapters, tokenizer=args.tokenizer_ckpt, vision=args.vision_ckpt)
    recipe = {k: getattr(args, k) for k in ("arch", "config", "weights", "dtype", "seed", "cfg", "steps", "n")}
    recipe |= about | {key: checkpoint.weights_hash(file) for key, file in files.items() if file}
    if os.path.isfile(path):
        before = checkpoint.read_json(path)
        other = [f"{key} {before.get(key)}, here {value}" for key, value in recipe.items() if before.get(key) != value]
        if other:
            raise ValueError(f"{path}: made with {other[0]} ({len(other)} such differences): give another --out, or "
                             "those flags and files to go on")
        return
    if old:
        raise ValueError(f"{args.out}: has files, such as {old[0]}, but no recipe.json: give another --out")
    os.makedirs(args.out, exist_ok=True)
    notes = dict(argv=args.argv, commit=checkpoint.git_commit(), torch=torch.__version__, device=args.device)
    checkpoint.write_text(path, json.dumps(recipe | notes, indent=1))

def write_picture(out, file, picture, rank):
    """Atomic, and what a killed process leaves is in no folder that a scorer reads: some read every file there."""
    part, path = os.path.join(out, f"part-{rank}"), os.path.join(out, file)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    checkpoint.atomic(part, lambda temporary: picture.save(temporary, "png"))
    os.replace(part, path)

def draw_files(model, plan, seed, **sampler):
    """Some of the drawings as PIL images. A picture's noise is that of (seed, name of its file, number of its tile)."""
    own = [sample_generator(seed, each["file"], tile, "picture") for each in plan for tile in range(each["tiles"])]
    texts = [each["prompt"] for each in plan for _ in range(each["tiles"])]
    drawn = [None] * len(texts)
    if plan[0]["source"] is None:
        drawn = list(draw(model, model.generate, texts, generator=own, **sampler))
    else:
        pixels = [model.preprocess(open_image(each["source"]), "edit") for each in plan]
        for here in same_shape(pixels):
            batch = torch.stack([pixels[i] for i in here]).to(next(model.parameters()).device)
            edited = draw(model, model.edit, batch, [texts[i] for i in here], generator=[own[i] for i in here],
                          **sampler)
            for i, picture in zip(here, edited):
                drawn[i] = picture
    images, rest = [], iter(drawn)
    for each in plan:
        tiles = [next(rest) for _ in range(each["tiles"])]
        side = math.isqrt(each["tiles"])
        rows = [np.concatenate(tiles[i:i + side], 1) for i in range(0, len(tiles), side)]
        images.append(Image.fromarray(np.concatenate(rows)))
    return images

@torch.no_grad()
def draw_benchmark(model, args, plan, beside, rank=0, world=1, **sampler):
    """Draws this process's share of what is not there yet; a file that is there is whole."""
    for file, what in list(beside.items())[rank::world]:
        path = os.path.join(args.out, file)
        if not os.path.isfile(path) and file.endswith(".png"):
            write_picture(args.out, file, open_image(what), rank)
        elif not os.path.isfile(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            checkpoint.write_text(path, what)
    mine = plan[rank::world]
    todo = [each for each in mine if not os.path.isfile(os.path.join(args.out, each["file"]))]
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), desc=args.draw, disable=None if rank == 0 else True)
    rows = max(1, args.batch // plan[0]["tiles"])
    for start in range(0, len(todo), rows):
        some = todo[start:start + rows]
        for each, image in zip(some, draw_files(model, some, args.seed, **sampler)):
            write_picture(args.out, each["file"], image, rank)
        bar.update(len(some))
    bar.close()
    folder = os.path.join(args.out, DRAWN[args.draw].get("folder", "images"))
    print(f"{len(todo)} pictures drawn, {len(mine) - len(todo)} were there: {folder}")

@torch.no_grad()
def verify(model, args, plan, beside, rng, **sampler):
    """Draws four random pictures again -> the line that says how they and the list of files differ; is all there?"""
    wanted = {each["file"] for each in plan} | set(beside)
    found = {os.path.relpath(os.path.join(folder, name), args.out) for folder, _, names in os.walk(args.out)
             for name in names if folder != args.out or not name.startswith(("recipe.json", "part-"))}
    there = [each for each in plan if each["file"] in found]
    some, apart = rng.sample(there, min(4, len(there))), []
    for each, image in zip(some, draw_files(model, some, args.seed, **sampler) if some else ()):
        old, new = (np.asarray(x, dtype=int) for x in (open_image(os.path.join(args.out, each["file"])), image))
        apart.append(int(np.abs(old - new).max()) if old.shape == new.shape else 255)
    line = f"{len(some)} pictures drawn again ({', '.join(each['file'] for each in some)}): largest difference "
    line += f"{max(apart, default=0)} of 255"
    for what, files in (("missing", sorted(wanted - found)), ("extra", sorted(found - wanted))):
        line += f"; {len(files)} {what}" + "".join(f" (first {file})" for file in files[:1])
    return line, wanted == found

def side_by_side(pictures, root):
    """Names in `root`, or bytes -> a PIL image; several, as some of MMMU's questions have, stand in a row."""
    images = [open_image(source_of(picture, root)) for picture in pictures]
    height = max(image.height for image in images)
    scaled = [image.resize((max(1, image.width * height // image.height), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    for i, image in enumerate(scaled):
        row.paste(image, (sum(other.width for other in scaled[:i]), 0))
    return images[0] if len(images) == 1 else row

def replies_there(out):
    """{place: reply} of all that any process has answered; a line that a killed one left unfinished is no answer."""
    texts = [path.read_text() for path in sorted(pathlib.Path(out).glob("replies-*.jsonl"))]
    rows = [json_or_text(line) for text in texts for line in text.split("\n")]
    return {row["place"]: row["reply"] for row in rows if isinstance(row, dict)}

@torch.no_grad()
def ask(model, args, sets, rank=0, world=1):
    """Asks this process's share of what has no answer yet -> {set: a reply to each row}, or None where other processes
    are not done: the last one scores."""
    bench, rows = SCORED[args.score], [row for some in sets.values() for row in some]
    mine, there = rows[rank::world], replies_there(args.out)
    todo, device = [row for row in mine if row["place"] not in there], next(model.parameters()).device
    bar = tqdm(total=len(mine), initial=len(mine) - len(todo), desc=args.score, disable=None if rank == 0 else True)
    with open(os.path.join(args.out, f"replies-{rank}.jsonl"), "a") as file:
        file.write("\n")  # ends what a killed process may have left
        for start in range(0, len(todo), args.batch):
            some = todo[start:start + args.batch]
            pixels = [model.preprocess(side_by_side(row["pictures"], args.images), "answer") for row in some]
            for here in same_shape(pixels):
                batch, asked = torch.stack([pixels[i] for i in here]).to(device), [some[i]["asked"] for i in here]
                for i, reply in zip(here, model.answer(batch, asked, max_new_tokens=bench["tokens"])):
                    reply = reply.strip().rstrip(".").lower() if args.score == "gqa" else reply.strip()
                    file.write(json.dumps(dict(place=some[i]["place"], reply=reply)) + "\n")
            file.flush()
            bar.update(len(some))
    bar.close()
    there = replies_there(args.out)
    if all(row["place"] in there for row in rows):
        return {key: [there[row["place"]] for row in some] for key, some in sets.items()}

def report_benchmark(args, sets, replies):
    """Prints the scores, and with --against the differences -> all of them, {title: {score: (value, low, high)}}."""
    def scored(replies):
        return {key: SCORED[args.score]["score"](rows, replies[key]) for key, rows in sets.items()}
    ours, scores = scored(replies), {}
    lines = [("", ours, None)]
    if args.against:
        theirs = scored(benchmarks.read_predictions(args.score, args.against, sets))
        lines += [("against: ", theirs, None), ("difference: ", ours, theirs)]
    for title, one, minus in lines:
        for key, each in benchmarks.intervals(one, args.seed, minus).items():
            numbers = [f"{name} {value:.4f} ({low:.4f} to {high:.4f})" for name, (value, low, high) in each.items()]
            if key in one and minus is None:  # a set, not their mean
                numbers.append(one[key][2])
            print(f"{title}{key}: {'  '.join(numbers)}")
            scores[title + key] = each
    return scores

# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoint.add_flags(p)
    p.add_argument("--lora", dest="adapters", metavar="RUN", help="adapters of a run with --lora, trained on --ckpt")
    p.add_argument("--n", type=int, help="judged pictures (default 600); with --draw: per prompt (default: official)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("dev", "test"), default="test", help="dev: prompts for choosing settings")
    p.add_argument("--editing", action="store_true", help="score edits too: for models that were trained to edit")
    p.add_argument("--cfg", type=float)
    p.add_argument("--steps", type=int)
    p.add_argument("--json", metavar="FILE", help="write all numbers there")
    job = p.add_argument_group("public benchmarks").add_argument
    job("--draw", choices=DRAWN, help="draw a benchmark's --prompts, for its own scorer")
    job("--prompts", nargs="+", metavar="FILE", help="the benchmark's file of prompts, as it is published")
    job("--score", choices=SCORED, help="ask a benchmark's questions and score the answers here")
    job("--data", nargs="+", default=[], metavar="FILE", help="the benchmark's questions, as they are published")
    job("--predictions", nargs="+", metavar="FILE", help="score these published answers, without a model")
    job("--against", nargs="+", metavar="FILE", help="predictions of another run: the difference, too")
    job("--images", metavar="DIR", help="where the pictures are that --prompts or --data name")
    job("--batch", type=int, help="rows at once: memory and speed, not results (default 64; published sizes: 8)")
    job("--out", metavar="DIR", help="pictures, or predictions; what is there stays (default: the benchmark)")
    job("--verify", metavar="DIR", help="draw four pictures of an --out again, and look for missing files")
    args = p.parse_args(argv)
    checkpoint.check_ranges(args)
    checkpoint.choose(args)
    public, draws, asks = args.draw or args.score, bool(args.draw), bool(args.score and not args.predictions)
    several = args.draw and "{picture" in DRAWN[args.draw]["file"]
    checkpoint.refuse_unused(
        p, argv, ("split editing", not public, "the shape world's scores, not for --draw and --score"),
        ("json", not draws, "scores, not for --draw"), ("prompts", draws, "--draw"),
        ("data predictions against", args.score, "--score"), ("cfg steps", not args.score, "pictures, not for --score"),
        ("n", several or not public, "benchmarks with several pictures"),
        ("out batch", draws or asks, "--draw and --score with a model"),
        ("images", asks or draws and "source" in DRAWN[args.draw], "benchmarks of pictures"),
        ("ckpt lora text-tokenizer", not args.predictions, "models, not for --predictions"),
        ("tokenizer-ckpt vision-ckpt rest-ckpt", args.config != "tiny", "published models"),
        ("gemm", args.device == "cpu" and not args.predictions, "models on a CPU"))
    args.out, args.batch = args.out or public, args.batch or (64 if args.config == "tiny" else 8)
    if args.n is None:
        args.n = DRAWN[args.draw].get("n", 1) if draws else 600
    if args.draw and args.score:
        raise ValueError(f"--draw {args.draw} --score {args.score}: one of them at a time")
    if args.draw and not args.prompts:
        raise ValueError(f"--draw {args.draw}: give its file of prompts as --prompts")
    if args.score and not args.data and not (args.score == "mmmu" and args.predictions):
        raise ValueError(f"--score {args.score}: give its file of questions as --data")
    if args.predictions and "score" not in SCORED[args.score]:
        raise ValueError(f"--score {args.score}: only its own server has a rule for --predictions")
    if args.config != "tiny" and not (public or args.verify):
        raise ValueError(f"--config {args.config}: the judge knows the shape world only; give it a benchmark, with "
                         "--draw or --score")
    if args.n < len(TASKS) and not public:
        raise ValueError(f"--n {args.n}: at least 6, one for each task")
    return args

def main_draw(args, rank, world):
    plan, beside = drawings(args)
    if args.draw == "wise":
        checkpoint.remark(benchmarks.wise_protocol(args.prompts))
    model = checkpoint.model_of(args)
    claim(args, {args.draw: digest([[each["file"], each["prompt"]] for each in plan])})
    sampler = {k: v for k, v in dict(cfg=args.cfg, steps=args.steps).items() if v is not None}
    if not args.verify:
        return draw_benchmark(model, args, plan, beside, rank, world, **sampler)
    line, whole = verify(model, args, plan, beside, random.Random(), **sampler)
    print(line)
    return 0 if whole else 1

def main_score(args, rank, world):
    """-> the scores, or None where there are none (yet)."""
    sets = benchmarks.questions(args.score, args.data, args.predictions or ())
    if args.predictions:
        replies = benchmarks.read_predictions(args.score, args.predictions, sets)
        return report_benchmark(args, sets, replies)
    rows = [row for some in sets.values() for row in some]
    sources_there([source_of(picture, args.images) for row in rows for picture in row["pictures"]])
    if several := sum(len(row["pictures"]) > 1 for row in rows):
        checkpoint.remark(f"{several} of {len(rows)} questions have several pictures: shown side by side, as one")
    model = checkpoint.model_of(args)
    claim(args, {args.score: digest([[row["place"], row["asked"]] for row in rows])})
    if replies := ask(model, args, sets, rank, world):
        for file, text in benchmarks.write_predictions(args.score, sets, replies).items():
            path = os.path.join(args.out, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            checkpoint.write_text(path, text)
        print(f"{len(rows)} answers, as the official scorer reads them: {args.out}")
        return report_benchmark(args, sets, replies) if "score" in SCORED[args.score] else None

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args, rank, world = parse_args(argv), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.verify:
        path = os.path.join(args.verify, "recipe.json")
        with checkpoint.reading(path, "no recipe of --draw"):
            argv = [*checkpoint.read_json(path)["argv"], *argv, "--out", args.verify]
        args = parse_args(argv)  # what is typed now wins over the recipe: other places of files, another device
        if not args.draw:
            raise ValueError(f"{path}: of --score {args.score}, there are no pictures to --verify")
    args.argv = list(argv)
    if world > 1:
        checkpoint.end_with_launcher()
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
    if args.draw:
        return main_draw(args, rank, world)
    if args.score:
        scores = main_score(args, rank, world)
    else:
        sampler = {k: v for k, v in dict(cfg=args.cfg, steps=args.steps).items() if v is not None}
        scores = score_all(checkpoint.model_of(args), args.n, args.seed, args.split, editing=args.editing, **sampler)
        print(report(scores))
        print_tasks(scores["generation"]["tasks"])
    if args.json and scores:
        command = "python evaluate.py " + shlex.join(argv)
        record = dict(arch=args.arch, command=command, commit=checkpoint.git_commit(), torch=torch.__version__)
        checkpoint.write_text(args.json, json.dumps(dict(record, scores=scores), indent=1))

def print_tasks(tasks):
    for task, t in tasks.items():
        low, high = t["interval"]
        line = f"  {task:14s} {t['score']:.3f} ({low:.3f}-{high:.3f}, {t['n']} pictures)"
        if "seen" in t:
            line += "".join(f"{before}{t[part]['score']:.3f} of {t[part]['n']}"
                            for before, part in (("  seen ", "seen"), (", held-out ", "held_out")))
        print(line)

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
