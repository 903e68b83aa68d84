"""Tables and figures of finished runs: the numbers in README.md and results/README.md. Run it from the project's root.

    python results/tables.py results/mar-poor-captions           # every run, and RecA against its base and its control
    python results/tables.py FOLDER --figure curves.png          # score against steps, of runs made with --eval-every
    python results/tables.py FOLDER FOLDER --changes dots.png    # what RecA and captions alone change, a dot per seed

A folder holds the result.json files of runs under the names ARCH_RUN_seedN.json, and no other JSON files.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a script sees only its own folder

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import checkpoint
import sample
import shape_world

def held_out_colors(scores):
    """One object in a color that no captioned picture gives its shape."""
    return scores["generation"]["tasks"]["colors"].get("held_out", {}).get("score")

COLUMNS = {  # of a table: what of a run's scores; None where it was not judged
    "score": lambda s: s["generation"]["score"],
    "seen": lambda s: s["generation"]["seen"],
    "held-out": lambda s: s["generation"]["held_out"],
    "held-out colors": held_out_colors,
    "objects/picture": lambda s: s["generation"]["objects"],
    "questions": lambda s: s.get("questions", {}).get("accuracy"),
    "reconstruction": lambda s: s.get("reconstruction", {}).get("objects"),
    "edits: asked": lambda s: s.get("editing", {}).get("asked"),
    "edits: kept": lambda s: s.get("editing", {}).get("kept"),
}
CHANGES = ("base", "run", "captions alone", "run - base", "run - captions alone")

# ---------------------------------------------------------------------------------------------------------------------
# Runs, and what a run is compared with
def read_results(folder):
    """{(arch, run): [result, ...]}: the files ARCH_RUN_seedN.json of `folder`, each a result.json of train.py. Seeds of
    one run stand together, in order. A file without judged drawings raises a ValueError that names it."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; it holds result.json files, named ARCH_RUN_seedN.json")
    runs = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json"):
            run = checkpoint.read_json(os.path.join(folder, name))
            whole = isinstance(run, dict) and {"arch", "seed"} <= set(run)
            if not whole or "generation" not in (run.get("scores") or {}):
                raise ValueError(f"{os.path.join(folder, name)}: no judged drawings of a model in it; a table is made "
                                 f"from result.json files of runs that were scored (--eval-n), and no other JSON files")
            label = name[:-5].removeprefix(run["arch"] + "_").rsplit("_seed", 1)[0]
            runs.setdefault((run["arch"], label), []).append(run)
    return runs

def base_of(run, runs):
    """What a fine-tuning run is compared with: the run called "base" of its seed, or the only one there is. None for
    that run itself."""
    bases = runs.get((run["arch"], "base"), ())
    base = next((b for b in bases if b["seed"] == run["seed"]), bases[0] if len(bases) == 1 else None)
    return None if base is run else base

def control_of(run, runs):
    """The control of a RecA run: the run on captions alone (stage sft) of the same seed, steps and number of judged
    pictures, with or without image-to-text as the run has it. None where there is none."""
    def asks(args):
        return args.get("i2t_weight", 0) > 0 and any(part.startswith("i2t=") for part in args.get("mix") or ["i2t="])

    def kind(r):
        return r["arch"], r["seed"], r["args"]["steps"], asks(r["args"]), r["scores"]["generation"].get("n")

    if run.get("stage") != "reca":
        return None
    controls = [r for rows in runs.values() for r in rows if r.get("stage") == "sft" and kind(r) == kind(run)]
    return next((r for r in controls if base_of(r, runs)), None)

def compared(results, runs, column):
    """(base, run, control): three lists of one number per seed. None where a seed has no base or a number is missing;
    control is empty where a seed has none."""
    bases, controls = [base_of(r, runs) for r in results], [control_of(r, runs) for r in results]
    if results[0].get("stage") not in ("reca", "sft") or None in bases:
        return None
    values = [[COLUMNS[column](r["scores"]) for r in rows if r is not None] for rows in (bases, results, controls)]
    if any(None in numbers for numbers in values):
        return None
    base, run, control = values
    return base, run, control if len(control) == len(run) else []

# ---------------------------------------------------------------------------------------------------------------------
# Tables
def spread(values, sign="", bold=False):
    """Mean ± standard deviation of some values, as text; one value by itself; nothing of none."""
    if len(values) < 2:
        return "".join(f"{v:{sign}.3f}" for v in values)
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    text = f"{mean.round(3) + 0.0:{sign}.3f} ± {deviation:.3f}"  # + 0.0: no "-0.000"
    return f"**{text}**" if bold and len(values) > 2 and abs(mean) > 2 * deviation else text

def change_cells(base, run, control):
    """The text of the five columns CHANGES. Bases differ more from seed to seed than fine-tuning changes them, so a
    change is taken within each seed; bold: the mean is more than twice the standard deviation over seeds."""
    differences = [spread([b - a for a, b in zip(other, run)], "+", bold=True) for other in (base, control)]
    return [spread(base), spread(run), spread(control), *differences]

def print_table(folder):
    """Prints two Markdown tables of the runs in `folder`: every run with all its columns, and the changes."""
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
        tasks = [[r["scores"]["generation"]["tasks"][t]["score"] for r in results] for t in shape_world.TASKS]
        means = " ".join(f"{np.mean(scores):.2f}" for scores in tasks)
        print(f"| {arch} | {label} | {len(results)} | {means} | " + " | ".join(cells) + " |")
    print(f"\ntasks: {', '.join(shape_world.TASKS)}. ±: standard deviation over seeds; of a single run, its 95 % "
          f"interval in brackets.\n")
    print_changes(runs)

def print_changes(runs):
    """Prints a row for each number of each fine-tuning run whose seeds all have a base: base, the run, the same steps
    on captions alone (means over seeds), and the changes."""
    columns = ["arch", "run", "", *CHANGES, "objects/picture", "questions", "reconstruction"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for (arch, label), results in runs.items():
        before_after = []
        for name, digits in (("objects/picture", 2), ("questions", 3), ("reconstruction", 2)):
            found = compared(results, runs, name)
            before_after.append(" → ".join(f"{np.mean(v):.{digits}f}" for v in found[:2]) if found else "")
        borrowed = "*" * any(b is not None and b["seed"] != r["seed"] for r in results for b in [base_of(r, runs)])
        for i, name in enumerate(("score", "held-out", "held-out colors")):
            if found := compared(results, runs, name):
                cells = change_cells(*found) + (before_after if i == 0 else [""] * 3)
                print(f"| {arch} | {label}{borrowed} | {name} | " + " | ".join(cells) + " |")
    print("\nbold: more than twice the standard deviation over seeds. *: from the only base there is.")

# ---------------------------------------------------------------------------------------------------------------------
# Figures
def draw_figure(folder, path, key="score"):
    """Score against optimizer steps, a line per run that was scored on the way (--eval-every), mean over seeds."""
    lines = {}
    for (arch, label), results in read_results(folder).items():
        curves = []
        for r in results:
            if len(r.get("curve", ())) > 1:
                last = {r["args"]["steps"]: r["scores"]["generation"][key]}
                curves.append({step: s["generation"][key] for step, s in r["curve"]} | last)
        steps = sorted(set.intersection(*map(set, curves))) if curves else []
        if len(steps) > 2:
            lines[f"{arch} {label}"] = (steps, [float(np.mean([c[s] for c in curves])) for s in steps])
    if not lines:
        raise ValueError(f"--figure: no run in {folder} was scored on the way; train with --eval-every N")
    lowest = min(min(ys) for _, ys in lines.values())
    sample.save_png(sample.plot(lines, "optimizer step", bottom=0.9 * lowest), path)

def draw_changes(folders, path, scale=2):
    """Change from the base, one dot per seed, of each RecA run that has a control, and of that control: two rows for
    each run, the score and the held-out prompts. `scale`: pixels per unit of the layout below."""
    rows = []
    for folder in folders:
        runs = read_results(folder)
        for (arch, label), results in runs.items():
            for name in ("score", "held-out"):
                found = compared(results, runs, name)
                if found and found[2]:
                    base, run, control = map(np.array, found)
                    rows.append((f"{arch}, {name}", run - base, control - base))
    if not rows:
        raise ValueError(f"--changes: no RecA run with a base and a control in {', '.join(folders)}")
    values = np.concatenate([np.concatenate(changes) for _, *changes in rows])
    low, high = np.floor(values.min() / 0.05) * 0.05, np.ceil(values.max() / 0.05) * 0.05
    left, right, top, height = 130, 690, 34, 26

    def at(value):
        return scale * (left + (right - left) * (value - low) / (high - low))

    image = Image.new("RGB", (720 * scale, (top + height * len(rows) + 30) * scale), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13 * scale)
    bottom = scale * (top + height * len(rows))
    for tick in np.arange(low, high + 0.01, 0.05):
        color = (120, 120, 120) if abs(tick) < 1e-6 else (225, 225, 225)
        draw.line([(at(tick), scale * top), (at(tick), bottom)], fill=color, width=scale)
        draw.text((at(tick), bottom + 4 * scale), f"{tick + 0.0:+.2f}", fill=(90, 90, 90), font=font, anchor="ma")
    for i, (title, run, control) in enumerate(rows):
        y = scale * (top + height * (i + 0.5))
        draw.text((scale * (left - 12), y), title, fill=(0, 0, 0), font=font, anchor="rm")
        for values, color, shift in ((run, (31, 119, 180), -4), (control, (255, 127, 14), 4)):
            for value in values:
                x, middle, radius = at(value), y + shift * scale, 4 * scale
                draw.ellipse([x - radius, middle - radius, x + radius, middle + radius], fill=color)
    draw.text((scale * left, scale * 8), "RecA beside captions, minus base", fill=(31, 119, 180), font=font)
    draw.text((scale * (left + 260), scale * 8), "captions alone, minus base", fill=(255, 127, 14), font=font)
    sample.save_png(image, path)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="+", help="result.json files of runs, named ARCH_RUN_seedN.json")
    p.add_argument("--figure", metavar="PNG", help="also draw score against optimizer steps, of the first folder")
    p.add_argument("--changes", metavar="PNG", help="also draw changes from the base, a dot per seed, of all folders")
    args = p.parse_args(argv)
    for folder in args.folder:
        print_table(folder)
    if args.figure:
        draw_figure(args.folder[0], args.figure)
    if args.changes:
        draw_changes(args.folder, args.changes)

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
