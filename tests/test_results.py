"""results/: the tables of both READMEs are what the stored runs give, and every link in a README leads to a file."""
import os
import re

import pytest

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
        if any(name.endswith(".json") for name in names):
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
        named += [os.path.relpath(path, folder or ".") for path in paths]
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
