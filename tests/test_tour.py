"""TOUR.md: its drawings are the masks that the models use, its names exist, its exercises apply and run."""
import contextlib
import functools
import glob
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

if __name__ != "__main__":  # see run_exercises
    from helpers import untrained

    import checkpoint
    import data

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOUR = ""
if __name__ != "__main__":
    with open(os.path.join(ROOT, "TOUR.md"), encoding="utf-8") as f:
        TOUR = f.read()

# ---------------------------------------------------------------------------------------------------------------------
# what may see what in a row of RecA

def masks_of(arch, monkeypatch):
    """The row of one picture of RecA -> what collate made of it, and the (lo, hi) that its layers really got."""
    file, model, seen = checkpoint.model_file(arch), untrained(arch), []
    make = file.attention_plan

    def plan(lo, hi, keys):
        seen.append((lo[0], hi[0]))
        return make(lo, hi, keys)
    monkeypatch.setattr(file, "attention_plan", plan)
    sample = {"prompt": data.RECA_TEMPLATES[0], "drop": False}
    row = model.collate("recon", [sample], [torch.Generator()], torch.Generator().manual_seed(3), 0)
    batch = {**row, **model.precompute(torch.zeros(1, 3, 48, 48))}
    model({"recon": batch})
    return model, batch, seen

def slots_of_mar(monkeypatch):
    model, row, [(lo, hi), *_] = masks_of("mar", monkeypatch)
    ids, S = row["ids"][0].tolist(), model.config.buffer_size
    before = ids.index(-200)
    names = (["<|im_start|> user"] * before + ["clean features, buffers"] * (9 + S)
             + ["request, assistant"] * (len(ids) - before - 1)
             + ["visible latents, buffers"] * (row["visible"].shape[1] + S))
    return names, lo, hi, range(int(row["pads"]), len(names))

def slots_of_ar(monkeypatch):
    model, row, [(lo, hi), *_] = masks_of("ar", monkeypatch)
    N, A, n = 9, row["features"].shape[1], int(row["lengths"])
    names = (["[eoi]"] + ["codes, some masked"] * N + ["[soi]"] + ["CLIP features"] * A + ["[mmu] [soi]"] * 2
             + ["[eoi] bos request eos"] * (n - 2))
    published = [*range(N + 2 + A, N + 4 + A), *range(N + 2, N + 2 + A), *range(N + 4 + A, len(names)), N + 1,
                 *range(1, N + 1), 0]
    return names, lo, hi, published

def slots_of_diffusion(monkeypatch):
    model, row, [und, gen] = masks_of("diffusion", monkeypatch)
    order = torch.arange(row["ids"].shape[1] + row["gen_pos"].shape[1])
    order = row["order"][0] if "order" in row else order
    lo, hi = (torch.cat(pair)[order] for pair in zip(und, gen))
    ids, c = row["ids"][0].tolist(), model.config
    features = [id >= c.vocab_size for id in ids]
    markers = [id in c.special[2:] for id in ids]
    names = []
    for i, id in enumerate(ids):
        first = any(features[i:])
        names.append("SigLIP features" if features[i] else "markers of the picture seen" if markers[i] and first
                     else "markers of the one painted" if markers[i] else "request")
    names += ["latents, noisy"] * row["gen_pos"].shape[1]
    return [names[i] for i in order.tolist()], lo, hi, range(int(row["start"]), len(names))

def slots_of_openuni(monkeypatch):
    model, row, seen = masks_of("openuni", monkeypatch)
    slots = [id == model.marks[4] for id in row["ids"][0].tolist()]
    names = ["InternViT features" if slot else "request, <img>" if True in slots[:i] else "<|im_start|> user <img>"
             for i, slot in enumerate(slots)] + ["queries"] * model.config.queries
    (lo, hi), (after, before) = seen[0], next(pair for pair in seen if len(pair[0]) == model.config.queries)
    return names, torch.cat([lo, after]), torch.cat([hi, before]), range(int(row["pads"]), len(names))

def slots_of_janus(monkeypatch):
    model, row, [(lo, hi), *_] = masks_of("janus", monkeypatch)
    slots = [id == model.marks.slot for id in row["ids"][0].tolist()]
    names = ["SigLIP features" if slot else "[end] request [begin]" if True in slots[:i] else "bos user [begin]"
             for i, slot in enumerate(slots)] + ["codes but the last"] * (row["codes"].shape[1] - 1)
    return names, lo, hi, range(int(row["pads"]), len(names))

def drawn(names, lo, hi, order):
    """A table of the kinds of slots in a row's order: does each see all of a kind (#), itself and what is before (/),
    or nothing (.)?"""
    kinds = list(dict.fromkeys(names[i] for i in order))
    places = {kind: torch.tensor([i for i in order if names[i] == kind]) for kind in kinds}
    letters = "abcdefghij"[:len(kinds)]
    lines = [f"{'':34s}sees  " + " ".join(letters)]
    for letter, kind in zip(letters, kinds):
        cells = []
        for other in kinds:
            keys = places[other]
            sees = (keys >= lo[places[kind]][:, None]) & (keys < hi[places[kind]][:, None])  # (queries, keys)
            causal = kind == other and torch.equal(sees, torch.ones_like(sees).tril())
            cells.append("#" if sees.all() else "." if not sees.any() else "/" if causal else "?")
        lines.append(f"{letter}  {f'{len(places[kind]):3d} {kind}':37s}" + " ".join(cells))
    return "\n".join(lines)

SLOTS = {"mar": slots_of_mar, "ar": slots_of_ar, "diffusion": slots_of_diffusion, "openuni": slots_of_openuni,
         "janus": slots_of_janus}

@pytest.mark.parametrize("arch", SLOTS)
def test_what_sees_what_is_drawn_as_it_is(arch, monkeypatch):
    table = drawn(*SLOTS[arch](monkeypatch))
    assert "?" not in table and textwrap.indent(table, "    ") in TOUR, f"\n{table}"

# ---------------------------------------------------------------------------------------------------------------------
# names, and the exercises

def test_every_name_of_the_tour_exists():
    files = {os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "*.py"))} - {"lmms_eval_adapter"}
    modules = [importlib.import_module(name) for name in [*files, "custom_kernels"]]
    owners = {name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)}
    owners |= {module.__name__: module for module in modules}
    named = re.findall(r"`([A-Za-z]\w*)\.(\w+)(?:\(\))?`", TOUR)
    named = [(owner, name) for owner, name in named if name not in ("py", "md", "html", "png", "json", "patch")]
    assert len(named) > 60
    for owner, name in named:
        assert owner in owners and hasattr(owners[owner], name), f"{owner}.{name}"
    for path in re.findall(r"`([\w/]+\.(?:py|md|patch))`", TOUR):
        assert os.path.exists(os.path.join(ROOT, path)) or path == "model_narrow.py", path

def test_the_tour_keeps_its_budget():
    """250 lines, none over 300 characters but those of tables, no number of a line of code."""
    lines = TOUR.splitlines()
    assert len(lines) <= 250, len(lines)
    assert not [line for line in lines if len(line) > 300 and not line.startswith("|")]
    assert not re.search(r"\.py:\d|\blines? \d", TOUR)

PATCHES = sorted(os.path.basename(path) for path in glob.glob(os.path.join(ROOT, "tests", "exercises", "*.patch")))
SMALL = {"train.py": "--steps 2 --batch 8 --pool 8 --eval-n 0 --preview 0 --threads 1 --device cpu --gemm mkl",
         "evaluate.py": "--n 6 --steps 2 --device cpu --gemm mkl"}

def commands():
    """{patch: the commands of its exercise in TOUR.md, each an argv}."""
    found = {}
    for section in re.split(r"^\*\*\d+\. ", TOUR, flags=re.M)[1:]:
        [patch] = re.findall(r"`tests/exercises/([\w-]+\.patch)`", section)
        lines = re.findall(r"^    (?:OMP_NUM_THREADS=1 )?(?:python|torchrun) (.*)$", section, re.M)
        found[patch] = [shlex.split(line) for line in lines]
    return found

def test_ten_exercises_of_at_most_15_lines():
    assert len(PATCHES) == 10 and list(commands()) == PATCHES and all(commands().values())
    for name in PATCHES:
        with open(os.path.join(ROOT, "tests", "exercises", name), encoding="utf-8") as f:
            lines = f.read().splitlines()
        for sign in "+-":
            assert sum(line.startswith(sign) and not line.startswith(3 * sign) for line in lines) <= 15, name

def run_exercises(todo):
    """In a copy of the product, in a process of its own: each patch alone, two steps of its first command."""
    for patch, script, argv in todo:
        subprocess.run(["git", "apply", patch], check=True)
        for name in [name for name, module in sys.modules.items()
                     if (getattr(module, "__file__", None) or "").startswith(os.getcwd())]:
            del sys.modules[name]
        importlib.invalidate_caches()
        evaluate = importlib.import_module("evaluate")
        evaluate.score_all = functools.partial(evaluate.score_all, questions=6, reconstructions=6)
        main = importlib.import_module(script.removesuffix(".py")).main
        with contextlib.redirect_stdout(sys.stderr):
            code = main(argv)
        print(patch, code or 0, flush=True)
        subprocess.run(["git", "apply", "-R", patch], check=True)

def test_every_exercise_applies_and_runs(tmp_path):
    for path in [*glob.glob(os.path.join(ROOT, "*.py")), os.path.join(ROOT, "tests", "test_tour.py")]:
        shutil.copy(path, tmp_path)
    shutil.copytree(os.path.join(ROOT, "custom_kernels"), tmp_path / "custom_kernels")
    os.symlink(os.path.join(ROOT, "weights"), tmp_path / "weights")
    todo = []
    for patch, [(script, *argv), *_] in commands().items():
        out = ["--out", str(tmp_path / "runs" / patch)] * (script == "train.py")
        todo.append([os.path.join(ROOT, "tests", "exercises", patch), script, [*argv, *SMALL[script].split(), *out]])
    env = dict(os.environ, PYTHONPATH=str(tmp_path), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "test_tour.py", json.dumps(todo)], cwd=tmp_path, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [word for patch, *_ in todo for word in (patch, "0")]
    assert "step 2/2" in done.stderr and "cfg 8: short prompts" in done.stderr

if __name__ == "__main__":
    run_exercises(json.loads(sys.argv[1]))
