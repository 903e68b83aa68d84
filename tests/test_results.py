"""results/: the tables of both READMEs are what the stored runs give, and every link in a README leads to a file."""
import json
import os
import re

import pytest
from PIL import Image

import shape_world
from results import tables

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "results")
ROWS = {  # the README's rows: folder, the RecA run in it, its architecture
    "MAR": ("mar-poor-captions", "mar", "reca-half"),
    "diffusion": ("diffusion-poor-captions", "diffusion", "reca-shuffled"),
    "AR, longest trained": ("ar-longest-trained", "ar", "reca-half"),
}

def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()

def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]

def short(text):
    """Numbers as the README writes them: .5, not 0.5."""
    return re.sub(r"(?<!\d)0\.", ".", text)

def test_tables_of_the_stored_runs(capsys):
    for folder in ("first", "poor-captions"):
        tables.print_table(os.path.join(RESULTS, "archive", folder))
    out = capsys.readouterr().out
    for arch in ("mar", "ar", "diffusion"):
        for run in ("base", "reca", "sft"):
            assert f"| {arch} | {run} | 3 |" in out  # three seeds, each from a base of its own
    for folder, arch in (("scrambled", "mar"), ("scrambled-ar", "ar")):
        tables.print_table(os.path.join(RESULTS, "archive", folder))
        out = capsys.readouterr().out
        assert all(f"| {arch} | {run} | 3 |" in out for run in ("base", "reca", "reca-full", "sft"))

@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_the_readme_is_what_its_three_folders_give(row):
    folder, arch, label = ROWS[row]
    line = next(line for line in read("README.md").splitlines() if line.startswith(f"| {row} |"))
    runs = tables.read_results(os.path.join(RESULTS, folder))
    assert {a for a, _ in runs} == {arch} and [r["seed"] for r in runs[arch, label]] == [0, 1, 2]
    columns = []
    for name in ("score", "held-out"):
        base, run, control = tables.compared(runs[arch, label], runs, name)
        texts = dict(zip(tables.CHANGES, tables.change_cells(base, run, control)))
        columns.append([texts[c] for c in ("base", "captions alone", "run", "run - base", "run - captions alone")])
    wanted = ["<br>".join(pair) for pair in zip(*columns)]
    base, run, _ = tables.compared(runs[arch, label], runs, "questions")
    wanted.append(f"{sum(base) / 3:.3f} → {sum(run) / 3:.3f}")
    assert cells(line)[1:] == [short(cell) for cell in wanted]

def test_the_tables_of_both_readmes_are_what_the_stored_runs_give(capsys):
    """Every row of results/README.md with three or more ±: its numbers stand side by side in what results/tables.py
    prints, bold where that is. (The README's rows: the test above.)"""
    for folder, _, names in os.walk(RESULTS):
        if any(name.endswith(".json") and name != "speed.json" for name in names):
            tables.print_table(folder)
    printed = short(capsys.readouterr().out)
    rows = [line for line in read("results", "README.md").splitlines() if line[0:1] == "|" and line.count("±") > 2]
    assert len(rows) > 27
    for row in rows:
        numbers = " | ".join(cell for cell in cells(row) if "±" in cell)
        arrows = [cell for cell in cells(row) if "→" in cell]  # questions and so on, beside them
        assert any(numbers in line and all(cell in line for cell in arrows) for line in printed.splitlines()), row

def test_everything_that_the_readmes_name_exists():
    for folder in ("", "results", "weights"):
        text = read(folder, "README.md")
        named = re.findall(r"\]\(([^)#]+)\)", text)
        paths = re.findall(r"`((?:results|weights)/[\w./-]+)`", text)  # these are written from the project's root
        named += [os.path.relpath(os.path.join(ROOT, path), os.path.join(ROOT, folder)) for path in paths]
        for path in named:
            assert path.startswith("https://") or os.path.exists(os.path.join(ROOT, folder, path)), (folder, path)

def test_every_archived_folder_is_explained():
    text = read("results", "README.md")
    for entry in os.scandir(os.path.join(RESULTS, "archive")):
        assert not entry.is_dir() or entry.name == "__pycache__" or f"`{entry.name}`" in text, entry.name

def test_figures_can_be_made_again(tmp_path):
    folders = [os.path.join(RESULTS, folder) for folder, _, _ in ROWS.values()]
    tables.draw_changes(folders, str(tmp_path / "changes.png"))
    tables.draw_figure(os.path.join(RESULTS, "archive", "poor-captions"), str(tmp_path / "curves.png"))
    assert (tmp_path / "changes.png").stat().st_size > 1000 and (tmp_path / "curves.png").stat().st_size > 1000

def result(score, curve, seed=0, stage="reca", steps=20):
    """A run's result.json, with made-up scores."""
    def scores(value):
        tasks = {task: {"score": value, "held_out": {"score": value / 4}} for task in shape_world.TASKS}
        return {"generation": {"score": value, "seen": value, "held_out": value / 2, "objects": 2.0,
                               "interval": (value - 0.1, value + 0.1), "tasks": tasks},
                "questions": {"accuracy": 0.9, "interval": (0.8, 0.95)}}

    return json.dumps({"arch": "ar", "stage": stage, "seed": seed, "args": {"steps": steps, "i2t_weight": 0.0},
                       "scores": scores(score), "curve": [(i * 10, scores(value)) for i, value in enumerate(curve)]})

def test_tables_and_figures_over_seeds(tmp_path, capsys):
    runs = [("ar_reca_seed0", 0.5, (0.2, 0.3)), ("ar_reca_seed1", 0.7, (0.2, 0.5)), ("ar_reca_seed2", 0.6, ()),
            ("ar_base_seed0", 0.2, ()), ("ar_base_seed1", 0.3, ()), ("ar_base_seed2", 0.25, ()),
            ("ar_sft_seed1", 0.6, ()), ("ar_sft_seed2", 0.5, ())]
    for name, score, curve in runs:
        (tmp_path / f"{name}.json").write_text(result(score, curve, int(name[-1]), name.split("_")[1]))
    (tmp_path / "ar_sft-long_seed0.json").write_text(result(0.1, (), 0, "sft", 40))  # no control: more steps
    tables.main([str(tmp_path), "--figure", str(tmp_path / "f.png")])
    out = capsys.readouterr().out
    assert "| ar | reca | 3 | 0.60 0.60 0.60 0.60 0.60 0.60 | 0.600 ± 0.100 |" in out and "| ar | base | 3 |" in out
    # captions alone: not of every seed, so not compared with
    assert ("| ar | reca | score | 0.250 ± 0.050 | 0.600 ± 0.100 |  | **+0.350 ± 0.050** |  | 2.00 → 2.00 | "
            "0.900 → 0.900 |  |") in out
    assert "| ar | sft-long | held-out | 0.100 | 0.050 |  | -0.050 |" in out
    (tmp_path / "ar_sft_seed0.json").write_text(result(0.5, (), 0, "sft"))
    tables.print_table(tmp_path)
    out = capsys.readouterr().out
    # 0, .1, .1 over captions alone: less than twice their spread, so not bold
    assert ("| ar | reca | score | 0.250 ± 0.050 | 0.600 ± 0.100 | 0.533 ± 0.058 | **+0.350 ± 0.050** | "
            "+0.067 ± 0.058 |") in out
    assert Image.open(tmp_path / "f.png").size == (720, 400)
    for seed in (1, 2):
        os.remove(tmp_path / f"ar_base_seed{seed}.json")  # one base for all seeds
    tables.print_table(tmp_path)
    out = capsys.readouterr().out
    assert "| ar | reca* | score | 0.200 ± 0.000 | 0.600 ± 0.100 | 0.533 ± 0.058 | **+0.400 ± 0.100** |" in out
    (tmp_path / "ar_zero_seed0.json").write_text('{"arch": "ar", "seed": 0, "scores": null}')  # a run with --eval-n 0
    with pytest.raises(ValueError, match="ar_zero_seed0.json: no judged drawings"):
        tables.print_table(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "ar_base_seed0.json").write_text(result(0.2, ()))
    tables.print_table(tmp_path / "x")
    assert "0.200 (0.100-0.300)" in capsys.readouterr().out  # one seed: its interval
    with pytest.raises(ValueError, match="--eval-every"):
        tables.main([str(tmp_path / "x"), "--figure", str(tmp_path / "g.png")])

def test_table_of_speed():
    """The five rows of custom_kernels/README.md are the numbers of speed.json, which says whose they are."""
    report = json.loads(read("results", "speed.json"))
    assert report["device"] and re.fullmatch(r"[0-9a-f]{7,}", report["commit"])  # no uncommitted code
    rows = [cells(line) for line in read("custom_kernels", "README.md").partition("## On a CPU")[2].splitlines()
            if line.startswith("| ")][2:]
    jobs = [["step mar"], ["step ar"], ["step diffusion"], [f"scores {arch}" for arch in ("mar", "ar", "diffusion")],
            ["encode", "decode"]]
    for row, names in zip(rows, jobs, strict=True):
        found = [report["results"][name] for name in names]
        wanted = [" / ".join(f"{job[key]:,.{digits}f}" for job in found)
                  for key, digits in (("before", 0), ("now", 0), ("ratio", 2))]
        assert row[1:] == wanted, row
