"""results/: every stored run is what its command would be today, and every table and figure can be made again."""
import glob
import json
import os
import re
import shlex
import types

import pytest

import evaluate
import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = sorted(glob.glob(os.path.join(ROOT, "results", "**", "*.json"), recursive=True))
SAME = ["arch", "stage", "seed", "config", "pool", "captioned", "wrong_captions", "sparse_captions", "pool_without_held_out", "drop", "templates", "grad_scale", "understanding",
        "steps", "batch", "lr", "muon_lr", "warmup", "weight_decay", "clip", "betas", "eps", "schedule", "accum", "ema", "eval_n", "eval_split", "cfg", "questions", "altered_share"]
BEFORE = dict(questions=1, sparse_captions=0.25, understanding="full", altered_share=1.0)  # what runs did that are older than these flags


@pytest.mark.parametrize("path", FILES, ids=[os.path.relpath(p, os.path.join(ROOT, "results")) for p in FILES])
def test_a_stored_command_still_means_what_was_run(path):
    r = json.load(open(path))
    now, _ = train.parse_args(shlex.split(r["command"].split("train.py ")[1]))
    stored = types.SimpleNamespace(**vars(now) | BEFORE | r["args"])
    for k in SAME if stored.understanding != "full" else SAME[:-1]:  # altered_share says nothing where nothing is altered
        a, b = getattr(stored, k), getattr(now, k)
        assert (list(a) == list(b)) if k == "betas" else (a == b), (k, a, b)
    assert train.mix(stored) == train.mix(now) and (not stored.muon_lr or stored.muon_decay == now.muon_decay)
    for part, weight in (("i2t", "i2t_weight"), ("t2i", "t2i_weight"), ("edit", "t2i_weight")):
        assert part not in train.mix(now) or getattr(stored, weight) == getattr(now, weight), (part, stored, now)
    assert os.path.basename(path) == f"{r['arch']}_{os.path.basename(path).split('_')[1]}_seed{r['seed']}.json" and r["commit"]


def test_every_base_that_a_command_names_is_stored_too():
    words = [shlex.split(json.load(open(p))["command"]) for p in FILES]
    outs = [w[w.index("--out") + 1] for w in words]
    runs = {open(p).read() for p in FILES}  # a run may stand in two folders, as it is
    assert len(set(outs)) == len(runs)  # no run writes into another's folder
    for path, w in zip(FILES, words):
        assert "--ckpt" not in w or w[w.index("--ckpt") + 1] in outs, path


def test_tables_of_the_stored_runs(capsys):
    for folder in ("results", "results/poor-captions"):
        evaluate.print_table(os.path.join(ROOT, folder))
    out = capsys.readouterr().out
    for arch in ("mar", "ar", "diffusion"):
        for run in ("base", "reca", "sft"):
            assert f"| {arch} | {run} | 3 |" in out  # three seeds, each from a base of its own
    for folder, arch in (("scrambled", "mar"), ("scrambled-ar", "ar")):
        evaluate.print_table(os.path.join(ROOT, "results", folder))
        out = capsys.readouterr().out
        assert all(f"| {arch} | {run} | 3 |" in out for run in ("base", "reca", "reca-full", "sft"))


def test_the_tables_of_both_readmes_are_what_the_stored_runs_give(capsys):
    """Every row with three or more ± in README.md and results/README.md: its numbers stand side by side in what `evaluate.py --table` prints, bold where that is."""
    for folder in (os.path.join(ROOT, "results"), *(f.path for f in os.scandir(os.path.join(ROOT, "results")) if f.is_dir())):
        evaluate.print_table(folder)
    printed = re.sub(r"(?<!\d)0\.", ".", capsys.readouterr().out)
    rows = []
    for name in ("README.md", os.path.join("results", "README.md")):
        with open(os.path.join(ROOT, name), encoding="utf-8") as f:
            rows += [line for line in f if line.startswith("|") and line.count("±") > 2]
    assert len(rows) > 30
    for row in rows:
        numbers = [cell.strip() for cell in row.split("|") if "±" in cell]
        assert " | ".join(numbers) in printed, row
        if "→" in row:  # questions and so on beside them
            assert any(" | ".join(numbers) in line and all(cell.strip() in line for cell in row.split("|") if "→" in cell) for line in printed.splitlines()), row
