"""Scores in the shape world, where every picture's content is known: an exact, pixel-level judge instead of a detector.

    python evaluate.py --arch mar                                # shipped RecA weights: six task scores, questions, reconstruction
    python evaluate.py --arch mar --ckpt runs/x --n 1000 --json scores.json
    python evaluate.py --table results                           # tables from the JSON files of finished runs
    python evaluate.py --arch mar --ckpt C --geneval evaluation_metadata.jsonl --out DIR    # pictures in GenEval's folder layout

The six tasks are GenEval's (arXiv 2310.11513): single object, two objects, counting, colours, position, colour attribution. A third of the prompts with
two objects, colours, positions and attributes ask for combinations that no training caption ever named together ("held out"); they are scored apart (attributes: held-out
shape-colour combinations; which shapes stand together is free there, so of its "seen" prompts one in five names a held-out pair of shapes). Intervals are 95 % Wilson.
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

import checkpoint
import data
import shape_world
from data import to_float, to_uint8
from shape_world import Scenes, fulfils, judge, same_objects


def wilson(hits, n, z=1.96):
    """95 % interval of a proportion."""
    if n == 0:
        return float("nan"), float("nan")
    p, d = hits / n, 1 + z * z / n
    centre, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, centre - half), min(1.0, centre + half)


# ----------------------------------------------------------------------------------------------------------------------
# Scores of a model
@torch.no_grad()
def score_generation(model, per_task=50, seed=0, split="test", batch=256, **sampler):
    """Draws one picture for each of 6 * per_task prompts and judges it. Returns a dict: score (mean of the six tasks), seen and held_out (means over the tasks that
    have both), a dict per task, objects per picture; and the pictures (uint8) with their prompt rows."""
    rows = shape_world.task_prompts(per_task, seed, split)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1000 + seed)
    pictures = []
    for i in range(0, len(rows), batch):
        pictures.append(to_uint8(model.generate([r["prompt"] for r in rows[i : i + batch]], generator=generator, **sampler)))
    pictures = np.concatenate(pictures)
    found = judge(pictures)
    ok = np.array([fulfils(o, r) for o, r in zip(found, rows)])
    tasks = {}
    task_of, held = np.array([r["task"] for r in rows]), np.array([r["held_out"] for r in rows])
    for task in shape_world.TASKS:
        part = lambda m: dict(score=float(ok[m].mean()), n=int(m.sum()), interval=wilson(int(ok[m].sum()), int(m.sum())))
        m = task_of == task
        tasks[task] = part(m)
        if held[m].any() and (m & ~held).any():
            tasks[task].update(seen=part(m & ~held), held_out=part(m & held))
    both = [t for t in shape_world.TASKS if "seen" in tasks[t]]
    out = dict(
        score=float(np.mean([tasks[t]["score"] for t in shape_world.TASKS])),
        interval=wilson(int(ok.sum()), len(ok)),
        n=len(rows),
        seen=float(np.mean([tasks[t]["seen"]["score"] for t in both])) if both else float("nan"),
        held_out=float(np.mean([tasks[t]["held_out"]["score"] for t in both])) if both else float("nan"),
        objects=float(np.mean([len(f) for f in found])),
        unknown=float(np.mean([sum(o[0] < 0 for o in f) for f in found])),
        tasks=tasks,
    )
    return out, pictures, rows


@torch.no_grad()
def score_questions(model, n=400, seed=0, batch=256):
    """Exact-match accuracy of short answers about fresh pictures, in all and per kind of question."""
    scenes, rng = Scenes(n, seed=90_000 + seed), random.Random(seed)
    asked = [shape_world.question(scenes.scene(i), rng, shape_world.QUESTION_KINDS[i % len(shape_world.QUESTION_KINDS)]) for i in range(n)]
    images = to_float(scenes.render(), next(model.parameters()).device)
    answers = []
    for i in range(0, n, batch):
        answers += model.answer(images[i : i + batch], [q for q, _, _ in asked[i : i + batch]], max_new_tokens=6)
    ok = np.array([got.strip().lower() == want for got, (_, want, _) in zip(answers, asked)])
    kind = np.array([k for _, _, k in asked])
    return dict(
        accuracy=float(ok.mean()),
        interval=wilson(int(ok.sum()), n),
        n=n,
        kinds={k: float(ok[kind == k].mean()) for k in shape_world.QUESTION_KINDS if (kind == k).any()},
    )


@torch.no_grad()
def score_reconstruction(model, n=128, seed=0, batch=256, **sampler):
    """Pictures through the model's own understanding and back: object agreement (shape, colour, cell), and mean absolute pixel error in grey levels."""
    scenes = Scenes(n, seed=91_000 + seed)
    truth = scenes.render()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(2000 + seed)
    out = np.concatenate(
        [to_uint8(model.reconstruct(to_float(truth[i : i + batch], device), generator=generator, **sampler)) for i in range(0, n, batch)]
    )
    agree = [same_objects(f, scenes.scene(i)) for i, f in enumerate(judge(out))]
    return (
        dict(
            objects=float(np.mean(agree)),
            exact=float(np.mean([x == 1 for x in agree])),
            pixel_error=float(np.abs(out.astype(float) - truth).mean()),
            n=n,
        ),
        out,
        truth,
    )


@torch.no_grad()
def score_editing(model, n=192, seed=0, batch=256, **sampler):
    """Instruction edits judged exactly: `asked` = the edited picture holds the requested object or ground, `kept` = agreement of all else, `both` = everything right."""
    scenes, rng = Scenes(n, seed=92_000 + seed), random.Random(seed)
    edits = [shape_world.edit(scenes.scene(i), rng) for i in range(n)]
    source, target = scenes.render(), Scenes.of([e[1] for e in edits])
    truth, device = target.render(), next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(3000 + seed)
    out = np.concatenate(
        [
            to_uint8(
                model.edit(to_float(source[i : i + batch], device), [e[0] for e in edits[i : i + batch]], generator=generator, **sampler)
            )
            for i in range(0, n, batch)
        ]
    )
    found, wanted = judge(out), judge(truth)
    ground = lambda x: np.median(x.reshape(len(x), -1, 3), axis=1)
    ground_ok = np.abs(ground(out) - ground(truth)).max(1) < 40
    asked, kept, both = [], [], []
    for i, (_, new, kind) in enumerate(edits):
        before, after, got = set(judge(source[i : i + 1])[0]), set(wanted[i]), set(found[i])
        changed_ok = ground_ok[i] if kind == "ground" else (after - before) <= got and not (before - after) & got
        stay = before & after
        asked.append(bool(changed_ok))
        kept.append(len(stay & got) / max(1, len(stay)))
        both.append(bool(changed_ok and got == after and ground_ok[i]))
    kinds = sorted({k for _, _, k in edits})
    per = {k: float(np.mean([a for a, e in zip(asked, edits) if e[2] == k])) for k in kinds}
    return dict(asked=float(np.mean(asked)), kept=float(np.mean(kept)), both=float(np.mean(both)), n=n, kinds=per), out, source


def score_all(model, n=300, seed=0, split="test", questions=400, reconstructions=128, editing=False, **sampler):
    """Everything above in one dict (what train.py prints before and after); and the generated pictures with their rows for a grid."""
    t = time.time()
    was = model.training
    model.eval()
    generation, pictures, rows = score_generation(model, max(1, n // len(shape_world.TASKS)), seed, split, **sampler)
    out = dict(generation=generation)
    if questions:
        out["questions"] = score_questions(model, questions, seed)
    if reconstructions:
        out["reconstruction"] = score_reconstruction(model, reconstructions, seed, **sampler)[0]
    if editing:
        out["editing"] = score_editing(model, seed=seed, **sampler)[0]
    model.train(was)
    out["seconds"] = time.time() - t
    return out, pictures, rows


def report(scores, title=""):
    """The lines that a person reads."""
    g = scores["generation"]
    lines = [
        f"{title}score {g['score']:.3f}  (95 % {g['interval'][0]:.3f}-{g['interval'][1]:.3f}, {g['n']} pictures)  "
        f"seen {g['seen']:.3f}  held-out {g['held_out']:.3f}  objects/picture {g['objects']:.2f}"
    ]
    lines.append("  " + "  ".join(f"{t} {g['tasks'][t]['score']:.2f}" for t in shape_world.TASKS))
    tail = []
    if "questions" in scores:
        q = scores["questions"]
        tail.append(f"questions {q['accuracy']:.3f} (" + " ".join(f"{k} {v:.2f}" for k, v in q["kinds"].items()) + ")")
    if "reconstruction" in scores:
        tail.append(f"reconstruction {scores['reconstruction']['objects']:.3f}")
    if "editing" in scores:
        tail.append(
            f"editing asked {scores['editing']['asked']:.3f} kept {scores['editing']['kept']:.3f} both {scores['editing']['both']:.3f}"
        )
    if tail:
        lines.append("  " + "  ".join(tail))
    return "\n".join(lines)


def export_geneval(model, prompts_file, out, n=4, seed=0, **sampler):
    """Pictures in the folder layout of GenEval's own scorer (00000/metadata.jsonl, 00000/samples/0000.png), with the recipe beside them in recipe.json.
    prompts_file: GenEval's evaluation_metadata.jsonl, one JSON object with a "prompt" per line. The seed starts anew for each prompt."""
    from PIL import Image

    if not os.path.isfile(prompts_file):
        raise FileNotFoundError(f"--geneval {prompts_file}: no such file; it is GenEval's evaluation_metadata.jsonl")
    with open(prompts_file, encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    device = next(model.parameters()).device
    for i, row in enumerate(data.Progress(rows, "GenEval prompts")):
        folder = os.path.join(out, f"{i:05d}", "samples")
        os.makedirs(folder, exist_ok=True)
        checkpoint.write_text(os.path.join(out, f"{i:05d}", "metadata.jsonl"), json.dumps(row))
        pictures = to_uint8(model.generate([row["prompt"]] * n, generator=torch.Generator(device).manual_seed(seed), **sampler))
        for j, p in enumerate(pictures):
            Image.fromarray(p).save(os.path.join(folder, f"{j:04d}.png"))
    checkpoint.write_text(
        os.path.join(out, "recipe.json"), json.dumps(dict(argv=sys.argv[1:], n=n, seed=seed, torch=torch.__version__, **sampler), indent=1)
    )
    print(f"{len(rows)} prompts x {n} pictures: {out}")


COLUMNS = {  # of a table: what of a run's scores; None where it was not judged
    "score": lambda s: s["generation"]["score"],
    "seen": lambda s: s["generation"]["seen"],
    "held-out": lambda s: s["generation"]["held_out"],
    "held-out colors": lambda s: s["generation"]["tasks"]["colors"].get("held_out", {}).get("score"),  # one object in a color that no caption gave its shape
    "objects/picture": lambda s: s["generation"]["objects"],
    "questions": lambda s: s.get("questions", {}).get("accuracy"),
    "reconstruction": lambda s: s.get("reconstruction", {}).get("objects"),
    "edits: asked": lambda s: s.get("editing", {}).get("asked"),
    "edits: kept": lambda s: s.get("editing", {}).get("kept"),
}


def read_results(folder):
    """{(arch, run): [result, ...]}: the files of `folder`, ARCH_RUN_seedN.json as train.py's result.json holds them; seeds of one run together."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"--table {folder}: no such folder; it holds the result.json files of runs, named ARCH_RUN_seedN.json")
    runs = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            r = checkpoint.read_json(os.path.join(folder, name))
            if not isinstance(r, dict) or not {"arch", "seed"} <= set(r) or "generation" not in (r.get("scores") or {}):
                raise ValueError(
                    f"{os.path.join(folder, name)}: no judged drawings of a model in it; --table reads the result.json of runs that were scored (--eval-n), "
                    f"from a folder with nothing else in it"
                )
            label = name[:-5].removeprefix(r["arch"] + "_").rsplit("_seed", 1)[0]
            runs.setdefault((r["arch"], label), []).append(r)
    return runs


def base_of(run, runs):
    """The run a fine-tuning run is compared with: the one called "base" of its seed, or the only one there is; None for that run itself."""
    bases = runs.get((run["arch"], "base"), ())
    base = next((b for b in bases if b["seed"] == run["seed"]), bases[0] if len(bases) == 1 else None)
    return None if base is run else base


def control_of(run, runs):
    """The control of a RecA run: the run on captions alone (stage sft) of the same seed, steps and judged pictures, with or without image-to-text as it; None where
    there is none."""
    i2t = lambda a: a.get("i2t_weight", 0) > 0 and any(part.startswith("i2t=") for part in a.get("mix") or ["i2t="])
    same = lambda r: (r["arch"], r["seed"], r["args"]["steps"], i2t(r["args"]), r["scores"]["generation"].get("n"))
    if run.get("stage") == "reca":
        return next((r for rows in runs.values() for r in rows if r.get("stage") == "sft" and same(r) == same(run) and base_of(r, runs)), None)


def print_table(folder):
    """Two Markdown tables of the runs in `folder`: every run with all its columns; and every RecA run against its seed's own base and against captions alone."""
    runs = read_results(folder)
    columns = ["arch", "run", "seeds", "tasks", *COLUMNS]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for (arch, label), results in runs.items():
        cells = []
        for name, value in COLUMNS.items():
            values = [v for r in results if (v := value(r["scores"])) is not None]
            group = {"score": "generation", "questions": "questions"}.get(name)
            low, high = results[0]["scores"][group]["interval"] if values and group else (0, 0)
            cells.append(spread(values) + (f" ({low:.3f}-{high:.3f})" if high and len(values) == 1 else ""))
        tasks = " ".join(f"{np.mean([r['scores']['generation']['tasks'][t]['score'] for r in results]):.2f}" for t in shape_world.TASKS)
        print(f"| {arch} | {label} | {len(results)} | {tasks} | " + " | ".join(cells) + " |")
    print(f"\ntasks: {', '.join(shape_world.TASKS)}. ±: standard deviation over seeds; of a single run, its 95 % interval in brackets.\n")
    print_changes(runs)


def print_changes(runs):
    """A row for each RecA run whose seeds all have a base, and for each number: base, the run, the same steps on captions alone (means over seeds), and the changes. Bases differ more from seed to seed than
    fine-tuning changes them, so changes are taken within each seed; bold: the mean is more than twice their standard deviation over seeds. Also for captions alone."""
    columns = ["arch", "run", "", "base", "run", "captions alone", "run - base", "run - captions alone", "objects/picture", "questions", "reconstruction"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for (arch, label), results in runs.items():
        bases, controls = [base_of(r, runs) for r in results], [control_of(r, runs) for r in results]
        if results[0].get("stage") not in ("reca", "sft") or None in bases:
            continue
        borrowed = "*" * any(b["seed"] != r["seed"] for b, r in zip(bases, results))
        before_after = []
        for name, digits in (("objects/picture", 2), ("questions", 3), ("reconstruction", 2)):
            values = [[COLUMNS[name](r["scores"]) for r in rows] for rows in (bases, results)]
            before_after.append("" if None in sum(values, []) else " → ".join(f"{np.mean(v):.{digits}f}" for v in values))
        for i, name in enumerate(("score", "held-out", "held-out colors")):
            base, run, control = ([COLUMNS[name](r["scores"]) for r in rows if r is not None] for rows in (bases, results, controls))
            if None in base + run + control:
                continue
            control = control if len(control) == len(run) else []
            cells = [spread(base), spread(run), spread(control)] + [spread([b - a for a, b in zip(other, run)], "+", bold=True) for other in (base, control)]
            print(f"| {arch} | {label}{borrowed} | {name} | " + " | ".join(cells + (before_after if i == 0 else [""] * 3)) + " |")
    print("\nbold: more than twice the standard deviation over seeds. *: from the only base there is.")


def spread(values, sign="", bold=False):
    """Mean ± standard deviation of some values, as text; of one its own; nothing of none."""
    if len(values) < 2:
        return "".join(f"{v:{sign}.3f}" for v in values)
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    text = f"{mean.round(3) + 0.0:{sign}.3f} ± {deviation:.3f}"  # + 0.0: no "-0.000"
    return f"**{text}**" if bold and len(values) > 2 and abs(mean) > 2 * deviation else text


def draw_figure(folder, path, key="score"):
    """Score against optimizer steps, one line per run that was scored on the way (train.py --eval-every), mean over seeds, as a PNG."""
    import sample

    lines = {}
    for (arch, label), results in read_results(folder).items():
        runs = [r for r in results if len(r.get("curve", ())) > 1]
        curves = [dict((step, s["generation"][key]) for step, s in r["curve"]) | {r["args"]["steps"]: r["scores"]["generation"][key]} for r in runs]
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if len(steps) > 2:
            lines[f"{arch} {label}"] = (steps, [float(np.mean([c[s] for c in curves])) for s in steps])
    if not lines:
        raise ValueError(f"--figure: no run in {folder} was scored on the way; train with --eval-every N")
    lowest = min(min(ys) for _, ys in lines.values())
    sample.save_png(sample.plot(lines, "optimizer step", bottom=0.9 * lowest), path)


def main(argv=None):
    import sample

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=("mar", "ar", "diffusion"), default="mar")
    p.add_argument("--ckpt", help="folder written by train.py, or a published checkpoint with --config (default: weights/ARCH-reca)")
    p.add_argument("--config")
    p.add_argument("--tokenizer-ckpt")
    p.add_argument("--vision-ckpt")
    p.add_argument("--text-tokenizer")
    p.add_argument("--n", type=int, help="judged pictures, a sixth per task (default 600); with --geneval: pictures per prompt (default 4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--split", choices=("dev", "test"), default="test", help="dev: prompts for choosing settings; test: for reporting")
    p.add_argument("--cfg", type=float)
    p.add_argument("--steps", type=int)
    p.add_argument("--json", metavar="FILE", help="write all numbers there")
    p.add_argument("--grid", metavar="FILE", help="write a grid of judged pictures there")
    p.add_argument("--table", metavar="FOLDER", help="print a table from the JSON files in FOLDER (result.json of runs, as ARCH_RUN_seedN.json) and stop")
    p.add_argument("--figure", metavar="PNG", help="with --table: also draw score against steps")
    p.add_argument("--geneval", metavar="JSONL", help="draw GenEval's prompts into its folder layout under --out instead of judging here")
    p.add_argument("--out", default="geneval")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if args.table:
        return print_table(args.table) or (args.figure and draw_figure(args.table, args.figure))
    args.n = (4 if args.geneval else 600) if args.n is None else args.n
    if args.config not in (None, "tiny") and not args.geneval:
        raise ValueError(f"--config {args.config}: the judge knows the shape world only; draw GenEval's prompts with --geneval FILE and score them with its own tools")
    if args.n < 6 and not args.geneval:
        raise ValueError(f"--n {args.n}: at least 6, one picture for each task")
    model = checkpoint.load_model(
        args.arch, args.ckpt, args.config, args.tokenizer_ckpt, args.text_tokenizer, args.device, vision_ckpt=args.vision_ckpt
    )
    sampler = {k: v for k, v in dict(cfg=args.cfg, steps=args.steps).items() if v is not None}
    if args.geneval:
        return export_geneval(model, args.geneval, args.out, args.n, args.seed, **sampler)
    scores, pictures, rows = score_all(model, args.n, args.seed, args.split, editing=args.arch == "diffusion", **sampler)
    print(report(scores))
    for task, t in scores["generation"]["tasks"].items():
        line = f"  {task:14s} {t['score']:.3f} ({t['interval'][0]:.3f}-{t['interval'][1]:.3f}, {t['n']} pictures)"
        print(
            line
            + (
                f"  seen {t['seen']['score']:.3f} of {t['seen']['n']}, held-out {t['held_out']['score']:.3f} of {t['held_out']['n']}"
                if "seen" in t
                else ""
            )
        )
    if args.json:
        checkpoint.write_text(
            args.json, json.dumps(
                dict(arch=args.arch, command="python evaluate.py " + shlex.join(sys.argv[1:]), commit=checkpoint.git_commit(), torch=torch.__version__, scores=scores), indent=1
            )
        )
    if args.grid:
        keep = np.linspace(0, len(rows) - 1, 24).astype(int)
        sample.save_png(sample.grid(pictures[keep], [rows[i]["prompt"] for i in keep]), args.grid)


if __name__ == "__main__":
    checkpoint.one_line_errors(main)
