"""The table and the plot of finished runs: the numbers of README.md. Run it from the project's root.

    python results/tables.py results/mar results/ar results/diffusion results/openuni results/janus
    python results/tables.py results/mar --plot gains.png

A folder holds the result.json files of one architecture under the names RUN_seedN.json: `reca`, `sft` (the same steps
on captions alone) and `reca-whole` (RecA alone, on whole pictures). Each holds its base's scores, too.
"""
import argparse
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # a script sees only its own folder

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import checkpoint
import sample

COLUMNS = {  # of the table: where a number stands in the scores of a run
    "short": ("generation", "score"),
    "short, held-out": ("generation", "held_out"),
    "long": ("long", "captioned", "score"),
    "long, held-out": ("long", "held_out", "score"),
    "reconstruction": ("reconstruction", "objects"),
    "questions": ("questions", "accuracy"),
}

def read_results(folder):
    """-> {run: {seed: result}} of the files RUN_seedN.json in `folder`. ValueError for a file that was not scored
    before and after, FileNotFoundError for no folder."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder; it holds result.json files, named RUN_seedN.json")
    runs = {}
    for name in sorted(os.listdir(folder)):
        if match := re.fullmatch(r"(.+)_seed(\d+)\.json", name):
            result = checkpoint.read_json(os.path.join(folder, name))
            if len(result.get("curve") or ()) < 2 or any("long" not in scores for _, scores in result["curve"]):
                path = os.path.join(folder, name)
                raise ValueError(f"{path}: not scored before and after; run train.py with --eval-n")
            runs.setdefault(match[1], {})[int(match[2])] = result
    return runs

def value(scores, column):
    for key in COLUMNS[column]:
        scores = scores[key]
    return scores

def columns_of(runs, run, column):
    """-> the bases' numbers and the run's, one per seed."""
    curves = [runs[run][seed]["curve"] for seed in sorted(runs[run])]
    return [value(curve[0][1], column) for curve in curves], [value(curve[-1][1], column) for curve in curves]

def gains(runs, column, run="reca", control="sft"):
    """What a run gains over captions alone, one number per seed: bases differ more than training changes them."""
    return np.subtract(columns_of(runs, run, column)[1], columns_of(runs, control, column)[1])

def deviation(values):
    """Standard deviation over seeds; of one seed infinite, as nothing is known of it."""
    return np.std(values, ddof=1) if len(values) > 1 else np.inf

def spread(values, sign=""):
    """Mean ± standard deviation over seeds; of one seed its number alone."""
    about = f" ± {deviation(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values) + 0.0:{sign}.3f}{about}".replace("0.", ".")

def row(runs):
    """The cells of an architecture's row: of each column base, captions alone and RecA, which is bold where its gain
    over captions alone exceeds twice the gain's spread."""
    cells = []
    for column in COLUMNS:
        base, reca = columns_of(runs, "reca", column)
        gain, text = gains(runs, column), spread(reca)
        text = f"**{text}**" if np.mean(gain) > 2 * deviation(gain) else text
        cells.append("<br>".join([spread(base), spread(columns_of(runs, "sft", column)[1]), text]))
    return cells

def print_table(folder):
    """The row of README.md, then every run with its gain over captions alone."""
    runs = read_results(folder)
    head = ["base<br>captions alone<br>RecA", *COLUMNS]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    print(f"| {os.path.basename(os.path.normpath(folder))} | " + " | ".join(row(runs)) + " |\n")
    for run in runs:
        print(f"{run}: " + "  ".join(f"{c} {spread(columns_of(runs, run, c)[1])}" for c in COLUMNS))
        if run != "sft" and sorted(runs[run]) == sorted(runs["sft"]):
            print("  over captions alone: " + "  ".join(f"{c} {spread(gains(runs, c, run), '+')}" for c in COLUMNS))
        objects = [result["scores"]["generation"]["objects"] for result in runs[run].values()]
        print(f"  objects a picture, short prompts: {spread(objects)}")

def plot(folders, path, scale=2):
    """RecA's gains over captions alone: a dot for each seed, a bar of the mean ± twice the standard deviation, where
    there are several seeds."""
    rows = [(f"{os.path.basename(os.path.normpath(folder))}, {column}", gains(read_results(folder), column))
            for folder in folders for column in list(COLUMNS)[:4]]
    rows = [(title, g, 2 * deviation(g) if len(g) > 1 else 0.0) for title, g in rows]
    ends = [np.mean(g) + side * both for _, g, both in rows for side in (-1, 1)]
    low, high = np.floor(min(0, *ends) / 0.05) * 0.05, np.ceil(max(ends) / 0.05) * 0.05
    left, right, top, height = 170 * scale, 690 * scale, 30 * scale, 24 * scale
    bottom = top + height * len(rows)

    def at(gain):
        return left + (right - left) * (gain - low) / (high - low)

    image = Image.new("RGB", (720 * scale, bottom + 30 * scale), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13 * scale)
    draw.text((left, 6 * scale), "RecA minus captions alone", fill="black", font=font)
    for tick in np.arange(low, high + 0.01, 0.05):
        color = (120, 120, 120) if abs(tick) < 1e-6 else (225, 225, 225)
        draw.line([(at(tick), top), (at(tick), bottom)], fill=color, width=scale)
        draw.text((at(tick), bottom + 4 * scale), f"{tick + 0.0:+.2f}", fill=(90, 90, 90), font=font, anchor="ma")
    for i, (title, values, both) in enumerate(rows):
        y, mean = top + height * (i + 0.5), np.mean(values)
        draw.text((left - 12 * scale, y), title, fill="black", font=font, anchor="rm")
        draw.line([(at(mean - both), y), (at(mean + both), y)], fill=(31, 119, 180), width=2 * scale)
        for x in map(at, values):
            draw.ellipse([x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale], fill=(31, 119, 180))
    sample.save_png(image, path)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="+", help="result.json files of runs, named RUN_seedN.json")
    p.add_argument("--plot", metavar="PNG", help="also draw the gains over captions alone, a dot for each seed")
    args = p.parse_args(argv)
    for folder in args.folder:
        print_table(folder)
    if args.plot:
        plot(args.folder, args.plot)

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
