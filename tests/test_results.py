"""results/: the README's table is what the stored runs give, and every link in a README leads to a file."""
import json
import os
import re

import pytest
from PIL import Image

from results import tables

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "results")
ROWS = {"MAR": "mar", "AR": "ar", "diffusion": "diffusion", "OpenUni, one seed": "openuni",
        "Janus-Pro": "janus"}  # the README's rows and their folders

def read(*path):
    with open(os.path.join(ROOT, *path), encoding="utf-8") as f:
        return f.read()

def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]

@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_the_readme_is_what_its_folders_give(row):
    runs = tables.read_results(os.path.join(RESULTS, ROWS[row]))
    seeds = [0] if "one seed" in row else [0, 1, 2]
    assert all(sorted(runs[name]) == seeds for name in ("reca", "sft", "reca-whole"))
    line = next(line for line in read("README.md").splitlines() if line.startswith(f"| {row} |"))
    assert cells(line)[1:] == tables.row(runs)
    for seed in seeds:  # all start from the same base
        before = [runs[name][seed]["curve"][0][1] for name in runs]
        assert all(tables.value(s, c) == tables.value(before[0], c) for s in before for c in tables.COLUMNS)

def test_everything_that_the_readmes_name_exists():
    for folder in ("", "results", "weights"):
        text = read(folder, "README.md")
        named = re.findall(r"\]\(([^)#]+)\)", text)
        paths = re.findall(r"`((?:results|weights)/[\w./-]+)`", text)  # these are written from the project's root
        named += [os.path.relpath(os.path.join(ROOT, path), os.path.join(ROOT, folder)) for path in paths]
        for path in named:
            assert path.startswith("https://") or os.path.exists(os.path.join(ROOT, folder, path)), (folder, path)

def scores(value):
    """Made-up scores of a model."""
    return {"generation": {"score": value, "held_out": value / 2, "objects": 2.0},
            "long": {"captioned": {"score": value + 0.2}, "held_out": {"score": value + 0.1}},
            "reconstruction": {"objects": 0.5}, "questions": {"accuracy": 0.9}}

def store(folder, run, seed, before, after):
    result = {"seed": seed, "curve": [(0, scores(before)), (20, scores(after))], "scores": scores(after)}
    (folder / f"{run}_seed{seed}.json").write_text(json.dumps(result))

def test_a_gain_is_bold_where_it_exceeds_twice_its_spread(tmp_path, capsys):
    folder = tmp_path / "mar"
    folder.mkdir()
    for seed, (base, sft, reca) in enumerate([(0.4, 0.41, 0.50), (0.5, 0.52, 0.60), (0.3, 0.30, 0.41)]):
        store(folder, "sft", seed, base, sft)
        store(folder, "reca", seed, base, reca)
        store(folder, "reca-whole", seed, base, base - 0.1 * seed)
    cells = tables.row(tables.read_results(folder))
    assert cells[0] == ".400 ± .100<br>.410 ± .110<br>**.503 ± .095**"  # gains .09, .08, .11
    assert cells[1] == ".200 ± .050<br>.205 ± .055<br>**.252 ± .048**"
    assert cells[4] == ".500 ± .000<br>.500 ± .000<br>.500 ± .000"
    tables.main([str(folder), "--plot", str(tmp_path / "gains.png")])
    printed = capsys.readouterr().out
    assert "| mar | " + " | ".join(cells) in printed and "over captions alone: short +.093 ± .015" in printed
    assert Image.open(tmp_path / "gains.png").width == 1440
    store(folder, "reca", 2, 0.3, 0.32)  # one seed gains little: the spread is large
    assert "**" not in tables.row(tables.read_results(folder))[0]
    alone = tmp_path / "alone"
    alone.mkdir()
    for run in ("sft", "reca", "reca-whole"):  # of one seed nobody knows the spread
        store(alone, run, 0, 0.4, 0.6 if run == "reca" else 0.5)
    assert tables.row(tables.read_results(alone))[0] == ".400<br>.500<br>.600"
    tables.main([str(alone), "--plot", str(tmp_path / "alone.png")])

def test_a_file_that_is_no_scored_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        tables.read_results(tmp_path / "none")
    (tmp_path / "reca_seed0.json").write_text(json.dumps({"curve": [(0, {})], "scores": None}))
    with pytest.raises(ValueError, match="reca_seed0.json: not scored before and after; run train.py with --eval-n"):
        tables.read_results(tmp_path)

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
