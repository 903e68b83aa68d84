"""lmms_eval_adapter.py: with stand-ins for the package that it is for; where that is installed, by its own command."""
import argparse
import ast
import importlib
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

import checkpoint
import shape_world

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCENES = shape_world.Scenes(4, seed=5)
QUESTIONS = ["Is there a yellow triangle?", "What shape is the blue object?", "How many circles are there?"]
TASK = """
task: three_questions
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, temperature: 0, top_p: 1.0, num_beams: 3, do_sample: false, until: ["\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SHOWN = """
from PIL import Image

def pictures(row):
    return [Image.open(path) for path in row["pictures"]]
"""

class Base:
    """What of lmms_eval's class of models is used."""

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self):
        return self._rank

def module(monkeypatch, name, **names):
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[name].__dict__.update(names)

@pytest.fixture
def adapter(monkeypatch):
    def accelerator(cpu):
        return SimpleNamespace(process_index=0, num_processes=1, device="cpu")
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        module(monkeypatch, name)
    module(monkeypatch, "lmms_eval.api.model", lmms=Base)
    module(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=lambda *args, **names: (args, names))
    module(monkeypatch, "accelerate", Accelerator=accelerator)
    monkeypatch.delitem(sys.modules, "lmms_eval_adapter", raising=False)
    yield importlib.import_module("lmms_eval_adapter")
    del sys.modules["lmms_eval_adapter"]

def pictures():
    return [Image.fromarray(picture) for picture in SCENES.render()[:3]]

def requests(shown, settings=None, questions=QUESTIONS):
    """What lmms-eval hands over for a task whose documents are lists of pictures -> (its documents, requests)."""
    def look(doc):
        return doc
    rows = [(question, settings or {}, look, i, "made", "test") for i, question in enumerate(questions)]
    return {"made": {"test": shown}}, [SimpleNamespace(args=row) for row in rows]

def ask(lm, *args):
    lm.task_dict, rows = requests(*args)
    return lm.generate_until(rows)

def test_answers_are_the_models_own_in_order_for_any_batch(adapter, capsys):
    first, second, third = pictures()
    wide = second.resize((96, 48))  # a size of its own for this model
    shown = [[first], [wide], [third, first], [], [second.convert("RGBA")]]
    questions = QUESTIONS + ["Is a star round?", "<image>\nWhat shape is the blue object?"]
    model = checkpoint.load_model("diffusion")
    wanted = []
    for pics, question in zip(shown, questions):
        picture = model.preprocess(pics[0].convert("RGB"), "answer")[None] if pics else None
        wanted += model.answer(picture, [question.removeprefix("<image>\n")], max_new_tokens=8)
    assert (wanted[0], wanted[2], wanted[4]) == ("no", "one", "circle")
    assert model.preprocess(wide, "answer").shape != model.preprocess(first, "answer").shape
    for batch in (1, 2, "5"):
        lm = adapter.NanoRecA(batch, arch="diffusion")
        assert ask(lm, shown, {"max_new_tokens": 8}, questions) == wanted
        said = capsys.readouterr().err
        assert "1 of 5 questions have several pictures and were answered from the first" in said
        assert "1 of 5 questions have no picture and were answered as texts" in said

def test_settings_of_a_task(adapter, capsys):
    lm, seen = adapter.NanoRecA(8, seed=3, arch="mar"), []

    def answer(images, questions, length, heat, generators):
        seen.append((images.shape, length, heat, [g.initial_seed() for g in generators], questions))
        return [" red\nblue. green"] * len(questions)
    lm.model.answer = answer
    shown = [[picture] for picture in pictures()]
    for until, wanted in ((["\n"], "red"), (".", "red\nblue"), (["", "blue", "d"], "re"), (None, "red\nblue. green")):
        assert ask(lm, shown, {"until": until}) == [wanted] * 3
    ask(lm, shown, {"max_new_tokens": 5, "temperature": 0.5, "top_p": None, "num_beams": 1, "top_k": 7})
    ask(lm, shown, {"temperature": 0.5, "do_sample": False})
    assert [call[1:3] for call in seen] == [(128, 0)] * 4 + [(5, 0.5), (128, 0)] and seen[0][0] == (3, 3, 48, 48)
    assert len(set(seen[4][3])) == 3
    assert re.findall("questions are to have (.*),", capsys.readouterr().err) == ["top_k 7"]
    lm.seed = 4
    ask(lm, shown, {"temperature": 0.5}, ["<image>\nWhat?", *QUESTIONS[1:]])
    assert not set(seen[-1][3]) & set(seen[4][3]) and seen[-1][4] == ["What?", *QUESTIONS[1:]]

def test_what_cannot_be_is_one_line(adapter, capsys):
    lm = adapter.NanoRecA(arch="ar")
    with pytest.raises(ValueError, match="^made, question 0: shows str, expected PIL images"):
        ask(lm, [["film.mp4"]], {}, ["What?"])
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError, match="output_type generate_until"):
            getattr(lm, name)([])
    for batch in ("auto", 0, "-1"):
        with pytest.raises(ValueError, match=f"^--batch_size {batch}: must be a number"):
            adapter.NanoRecA(batch)
    for flag, value, said in (("arch", "vae", "--arch: invalid choice"), ("chkpt", 3, "arguments: --chkpt=3"),
                              ("tokenizer", "x", "arguments: --tokenizer=x")):
        with pytest.raises(SystemExit):
            adapter.NanoRecA(**{flag: value})
        assert said in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="nowhere: no config.json"):
        adapter.NanoRecA(ckpt="nowhere")
    with pytest.raises(ValueError, match="--config harmon-1.5b needs --ckpt"):
        adapter.NanoRecA(config="harmon-1.5b")

def test_the_docstring_lists_every_flag(adapter):
    parser = argparse.ArgumentParser(add_help=False)
    checkpoint.add_flags(parser)
    listed = re.search(r"key=value: (.*?) Start", adapter.__doc__, re.S).group(1)
    for flag in vars(parser.parse_args([])).keys() - {"device", "verbose"}:  # which lmms-eval has of its own
        assert re.search(rf"\b{flag}\b", listed), flag

def test_the_entry_point_and_its_class_exist():
    """Without importing the file, for which the package would be needed."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as f:
        project = tomllib.load(f)["project"]
    assert [r.split("=")[0] for r in project["optional-dependencies"]["lmms-eval"]][0] == "lmms-eval"
    file, name = project["entry-points"]["lmms_eval.models"]["nanoreca"].split(":")
    with open(os.path.join(ROOT, file + ".py")) as f:
        nodes = ast.parse(f.read()).body
    manifest = next(n.value for n in nodes if isinstance(n, ast.Assign) and n.targets[0].id == name)
    path = next(k.value.value for k in manifest.keywords if k.arg == "simple_class_path")
    assert path in [f"{file}.{node.name}" for node in nodes if isinstance(node, ast.ClassDef)]

def test_the_snippet_for_vlmevalkit(adapter, monkeypatch, tmp_path):
    ran, known = [], {}
    for name in ("vlmeval", "vlmeval.vlm"):
        module(monkeypatch, name)
    module(monkeypatch, "vlmeval.config", supported_VLM=known)
    sys.modules["vlmeval"].config = sys.modules["vlmeval.config"]
    module(monkeypatch, "vlmeval.vlm.base", BaseModel=object)
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: ran.append((path, run_name)))
    snippet = textwrap.dedent(re.search(r"^    import runpy.*", adapter.__doc__, re.M | re.S).group(0))
    assert snippet.count('"runs/mar-reca"') == 1
    exec(snippet.replace('"runs/mar-reca"', 'device="cpu"'), {})
    assert ran == [("run.py", "__main__")]
    pictures()[1].save(tmp_path / "1.png")
    model = known["nanoreca"]()
    shown = [{"type": "image", "value": str(tmp_path / "1.png")}]
    assert model.generate_inner(shown + [{"type": "text", "value": QUESTIONS[1]}]) == "circle"
    assert isinstance(model.generate_inner([{"type": "text", "value": QUESTIONS[1]}]), str)

@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval is not installed")
def test_three_questions_by_lmms_evals_own_command(tmp_path):
    """One of the three wanted answers is false, so the score is 2/3. No network."""
    rows = []
    for i, (picture, question, answer) in enumerate(zip(pictures(), QUESTIONS, ("no", "circle", "seven"))):
        picture.save(tmp_path / f"{i}.png")
        rows.append(dict(question=question, answer=answer, pictures=[str(tmp_path / f"{i}.png")] * (1 + (i == 2))))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "three.yaml").write_text(TASK.replace("ROWS", str(tmp_path / "rows.jsonl")))
    (tmp_path / "shown.py").write_text(SHOWN)
    command = [sys.executable, "-m", "lmms_eval", "--model", "nanoreca", "--model_args", "arch=mar", "--device", "cpu",
               "--include_path", str(tmp_path), "--tasks", "three_questions", "--batch_size", "2", "--log_samples",
               "--output_path", str(tmp_path / "out")]
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"), OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    for said in ("1 of 3 questions have several pictures", "3 of 3 questions are to have num_beams 3"):
        assert said in done.stderr
    found = {path.name.split("_", 2)[-1]: path for path in (tmp_path / "out").rglob("*.json*")}
    scores = json.loads(found["results.json"].read_text())["results"]["three_questions"]
    assert scores["exact_match,none"] == pytest.approx(2 / 3)
    samples = map(json.loads, found["samples_three_questions.jsonl"].read_text().splitlines())
    assert [sample["filtered_resps"] for sample in samples] == ["no", "circle", "one"]
