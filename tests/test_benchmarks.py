"""The public benchmarks: folders read back as their scorers read them, rules of answers against tables of verdicts."""
import json
import os
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Launch, torchrun

import benchmarks
import checkpoint
import evaluate
from data import sample_generator, to_uint8

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REAL = os.environ.get("BENCHMARKS_DIR", os.path.join(ROOT, "..", "shared", "benchmarks"))  # the published files
shipped = pytest.mark.skipif(not os.path.isdir(checkpoint.default_weights("mar")), reason="weights/mar-reca is absent")

def real(name):
    if not os.path.isfile(os.path.join(REAL, name)):
        pytest.skip(f"no {name}")
    return os.path.join(REAL, name)

class Noise(torch.nn.Module):
    """Draws its generators' noise; edits add some to their source. `rows`: of every call."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.rows = []

    def generate(self, prompts, generator=None, steps=None):
        self.rows.append(len(prompts))
        return torch.stack([torch.rand(3, 8, 8, generator=g) for g in generator]) * 2 - 1

    def edit(self, images, instructions, generator=None):
        self.rows.append(len(images))
        return images * 0.5 + torch.stack([torch.rand(3, 1, 1, generator=g) for g in generator]) * 0.1

    def preprocess(self, image, purpose):
        assert purpose in ("edit", "answer")
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1

@pytest.fixture
def noise(monkeypatch):
    model = Noise()
    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **k: model)
    return model

def of_seed(seed, file, tile=0):
    return to_uint8(Noise().generate([""], [sample_generator(seed, file, tile, "picture")]))[0]

def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and not image.info  # bare
        return np.asarray(image)

def files(folder):
    return {os.path.relpath(os.path.join(at, name), folder): open(os.path.join(at, name), "rb").read()
            for at, _, names in os.walk(folder) for name in names}

def draw(bench, prompts, out, *more):
    argv = ["--draw", bench, "--prompts", *map(str, prompts), "--out", str(out), "--device", "cpu", *more]
    return evaluate.main(argv)

GENEVAL = [dict(tag="colors", include=[{"class": "cat", "count": 1}], prompt=p) for p in ("a cat", "a dog", "cups")]
DPG = {"digits7.txt": "A long text about a digit.", "vrd12.txt": "Überall Licht."}

def write_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path

# ---------------------------------------------------------------------------------------------------------------------
# Layouts, each read as its scorer reads it

def test_geneval(tmp_path, noise, capsys):
    out = tmp_path / "out"
    draw("geneval", [write_lines(tmp_path / "meta.jsonl", GENEVAL)], out, "--seed", "5", "--steps", "3", "--n", "2")
    folders = [name for name in sorted(os.listdir(out / "images")) if name.isdigit()]
    assert folders == ["00000", "00001", "00002"]
    for i, folder in enumerate(folders):
        with open(out / "images" / folder / "metadata.jsonl") as f:
            assert json.load(f) == GENEVAL[i]
        names = sorted(name for name in os.listdir(out / "images" / folder / "samples") if re.match(r"\d+\.png", name))
        assert names == ["0000.png", "0001.png"]
        for name in names:
            file = f"images/{folder}/samples/{name}"
            assert (pixels(out / file) == of_seed(5, file)).all()
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["n"], recipe["seed"], recipe["steps"]) == (2, 5, 3) and "--steps" in recipe["argv"]
    assert recipe["weights"] == checkpoint.weights_hash(checkpoint.default_weights("mar"))
    assert "6 pictures drawn, 0 were there" in capsys.readouterr().out and noise.rows == [6]
    assert sorted(os.listdir(out)) == ["images", "recipe.json"]

def test_geneval_2(tmp_path, noise):
    rows = [dict(prompt=p, atom_count=3, vqa_list=[["Is it?", "yes"]], skills=["count"]) for p in ("é one", "two")]
    draw("geneval2", [write_lines(tmp_path / "data.jsonl", rows)], tmp_path / "out")
    paths = json.loads((tmp_path / "out" / "image_paths.json").read_text())
    assert list(paths) == ["é one", "two"]
    for i, path in enumerate(paths.values()):
        assert os.path.isabs(path) and (pixels(path) == of_seed(0, f"images/{i:05d}.png")).all()

@pytest.mark.parametrize("kind", ["folder", "json"])
def test_dpg(kind, tmp_path, noise):
    """A grid of four tiles in a file named as the prompt's, and no other file there."""
    prompts = tmp_path / "prompts"
    if kind == "folder":
        prompts.mkdir()
        for name, text in DPG.items():
            (prompts / name).write_text(text + "\n", encoding="utf-8-sig")
    else:
        prompts.write_text(json.dumps(DPG))
    seen, generate = [], noise.generate
    noise.generate = lambda prompts, **k: seen.extend(prompts) or generate(prompts, **k)
    draw("dpg", [prompts], tmp_path / "out")
    folder = tmp_path / "out" / "images"
    assert {name.split(".")[0] + ".txt" for name in os.listdir(folder)} == set(DPG)
    assert seen == [text for text in DPG.values() for _ in range(4)]
    for name in os.listdir(folder):
        grid, side = Image.open(folder / name), 8
        assert grid.size == (16, 16)
        for tile, (x, y) in enumerate([(0, 0), (side, 0), (0, side), (side, side)]):
            assert (np.asarray(grid.crop((x, y, x + side, y + side))) == of_seed(0, f"images/{name}", tile)).all()

def test_dpg_of_recas_copy(tmp_path, noise):
    """Its key is what stands before the first _ of a file's name."""
    (tmp_path / "prompts.json").write_text(json.dumps(DPG))
    draw("dpg-reca", [tmp_path / "prompts.json"], tmp_path / "out", "--n", "3")
    names = sorted(os.listdir(tmp_path / "out" / "images"))
    assert [name.split("_")[0] + ".txt" for name in names] == [key for key in DPG for _ in range(3)]
    assert len({pixels(tmp_path / "out" / "images" / name).tobytes() for name in names}) == 6

WISE = [("1 400", "401 700", "701 1000", "legacy"), ("1 400", "401 640", "641 1000", "verified"),
        ("1 400", None, None, "legacy or verified"), ("1 400", "401 640", "701 1000", "legacy and verified (mixed"),
        ("1 399", None, None, "legacy and verified (mixed, or cut)")]

@pytest.mark.parametrize("case", WISE)
def test_wise_protocols(case, tmp_path):
    paths = []
    for number, span in enumerate(filter(None, case[:3])):
        low, high = map(int, span.split())
        rows = [dict(Prompt=f"what grows {i}", Category="x", prompt_id=i) for i in range(low, high + 1)]
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(rows))
    assert f"files of the {case[3]}" in benchmarks.wise_protocol(list(map(str, paths)))

def test_wise(tmp_path, noise, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, ids in zip(paths, ((1, 2), (401, 700))):
        path.write_text(json.dumps([dict(Prompt=f"what grows {i}", Category="x", prompt_id=i) for i in ids]))
    draw("wise", paths, tmp_path / "out")
    assert set(os.listdir(tmp_path / "out" / "images")) == {"1.png", "2.png", "401.png", "700.png"}
    assert "wise: ids 1-2, 401-700: files of the" in capsys.readouterr().err

def sources(folder, *names):
    """Pictures of several shapes."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8 + 4 * (i % 2), 12, 3), 20 * i, np.uint8)).save(path)

def edited(path, source, seed=0, file=""):
    image = torch.from_numpy(np.array(Image.open(source))).permute(2, 0, 1)[None] / 127.5 - 1
    want = to_uint8(Noise().edit(image, [""], [sample_generator(seed, file, 0, "picture")]))[0]
    return (pixels(path) == want).all()

def test_imgedit(tmp_path, noise):
    edits = {str(i): dict(id=f"animal/{i}.jpg.png", prompt="Make it blue.", edit_type="adjust") for i in range(5)}
    (tmp_path / "basic_edit.json").write_text(json.dumps(edits))
    sources(tmp_path / "root", *[edit["id"] for edit in edits.values()])
    draw("imgedit", [tmp_path / "basic_edit.json"], tmp_path / "out", "--images", str(tmp_path / "root"))
    for key, edit in edits.items():
        file = f"images/{key}.png"
        assert edited(tmp_path / "out" / file, tmp_path / "root" / edit["id"], file=file)
    assert len(os.listdir(tmp_path / "out" / "images")) == 5 and sorted(noise.rows) == [2, 3]

def test_gedit(tmp_path, noise):
    """SAVE/MODEL/fullset/task/language/key.png beside key_SRCIMG.png; the same key may be in both languages."""
    rows = [dict(task_type=task, key="k1", instruction=text, instruction_language=lang, input_image=f"{task}.png")
            for task in ("ps_human", "subject-add") for lang, text in (("en", "add a hat"), ("cn", "加一顶帽子"))]
    sources(tmp_path / "root", "ps_human.png", "subject-add.png")
    draw("gedit", [write_lines(tmp_path / "rows.jsonl", rows)], tmp_path / "out", "--images", str(tmp_path / "root"))
    for row in rows:
        file = f"gen_image/fullset/{row['task_type']}/{row['instruction_language']}/k1.png"
        source = tmp_path / "root" / row["input_image"]
        assert edited(tmp_path / "out" / file, source, file=file)
        kept = pixels(tmp_path / "out" / file.replace("k1.png", "k1_SRCIMG.png"))
        assert (kept == np.asarray(Image.open(source))).all()
    assert len(files(tmp_path / "out")) == 9

def test_the_published_prompt_files(tmp_path):
    def plan(bench, name, n):
        return evaluate.drawings(evaluate.parse_args(["--draw", bench, "--prompts", real(name)] + n))
    each, beside = plan("geneval", "geneval_evaluation_metadata.jsonl", [])
    assert (len(each), len(beside)) == (553 * 4, 553)
    each, beside = plan("dpg", "dpg_prompts.json", [])
    assert (len(each), len(beside)) == (1065, 0) and each[0]["file"].startswith("images/partiprompts")
    assert len({e["file"] for e in plan("dpg-reca", "dpg_prompts.json", ["--n", "2"])[0]}) == 2130

# ---------------------------------------------------------------------------------------------------------------------
# Going on, sharing, verifying

def test_what_is_there_is_not_drawn_again(tmp_path, noise, capsys):
    meta, out = write_lines(tmp_path / "meta.jsonl", GENEVAL), tmp_path / "out"
    draw("geneval", [meta], out)
    before = files(out)
    for name in ("images/00001/samples/0002.png", "images/00002/metadata.jsonl"):
        (out / name).unlink()
    noise.rows.clear()
    draw("geneval", [meta], out, "--batch", "3")
    assert noise.rows == [1] and files(out) == before and "1 pictures drawn, 11 were there" in capsys.readouterr().out
    for other in (["--seed", "1"], ["--steps", "7"], ["--n", "5"]):
        with pytest.raises(ValueError, match=r"recipe.json: made with \w+ [^\n]*, here [^\n]*give another --out"):
            draw("geneval", [meta], out, *other)
    other = write_lines(tmp_path / "other.jsonl", GENEVAL[:2])
    with pytest.raises(ValueError, match="recipe.json: made with geneval "):
        draw("geneval", [other], out)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.png").write_text("")
    with pytest.raises(ValueError, match="foreign: has files, such as x.png, but no recipe.json"):
        draw("geneval", [meta], tmp_path / "foreign")

def test_verify(tmp_path, noise, capsys):
    meta, out = write_lines(tmp_path / "meta.jsonl", GENEVAL), tmp_path / "out"
    draw("geneval", [meta], out, "--n", "1", "--seed", "3")
    capsys.readouterr()
    assert evaluate.main(["--verify", str(out)]) == 0
    assert "3 pictures drawn again" in (said := capsys.readouterr().out)
    assert said.endswith("largest difference 0 of 255; 0 missing; 0 extra\n")
    path = out / "images" / "00001" / "samples" / "0000.png"
    wrong = pixels(path).copy()
    wrong[2, 3, 1] ^= 64
    Image.fromarray(wrong).save(path)
    (out / "images" / "00002" / "samples" / "0000.png").unlink()
    (out / "images" / "notes.txt").write_text("x")
    moved = out.rename(tmp_path / "moved")
    assert evaluate.main(["--verify", str(moved), "--device", "cpu"]) == 1
    assert capsys.readouterr().out.endswith("largest difference 64 of 255; 1 missing (first images/00002/samples/0000."
                                            "png); 1 extra (first images/notes.txt)\n")

@shipped
def test_ranks_batches_and_a_kill_change_no_picture(tmp_path):
    """Three folders: by one process, by two in other batches, and by one that is killed and goes on."""
    rows = [dict(tag="colors", prompt=f"a {color} {shape}") for color in ("red", "blue", "green")
            for shape in ("circle", "star", "square")]
    meta = write_lines(tmp_path / "meta.jsonl", rows)
    flags = ["--draw", "geneval", "--prompts", meta, "--steps", "4", "--n", "2", "--device", "cpu"]
    evaluate.main([*map(str, flags), "--out", str(tmp_path / "one")])
    said = torchrun(2, *flags, "--out", tmp_path / "two", "--batch", "4", script="evaluate.py")
    assert said.count("pictures drawn, 0 were there") == 2
    job = Launch(1, *flags, "--out", tmp_path / "cut", "--batch", "1", script="evaluate.py")
    end = time.time() + 60
    while len(list(tmp_path.glob("cut/images/*/samples/*.png"))) < 3 and time.time() < end:
        time.sleep(0.01)
    os.kill(job.pid, 19)  # the launcher, so that it says nothing
    children = open(f"/proc/{job.pid}/task/{job.pid}/children").read().split()
    os.kill(int(children[0]), 9)
    os.kill(job.pid, 18)
    assert job.wait()[0] == -9
    there = len(list(tmp_path.glob("cut/images/*/samples/*.png")))
    assert 3 <= there < 18
    said = torchrun(1, *flags, "--out", tmp_path / "cut", script="evaluate.py")
    assert f"{18 - there} pictures drawn, {there} were there" in said
    one, two, cut = (files(tmp_path / name / "images") for name in ("one", "two", "cut"))
    assert len(one) == 27 and one == two == cut

# ---------------------------------------------------------------------------------------------------------------------
# Prompt files that are none: one line each

ROW = '{"prompt_id": 1, "Prompt": "x"}'
BAD_FILES = [
    ("geneval", '{"tag": "colors"}', "row 1 has no prompt (1 of 1 rows lack something; --prompts needs prompt in"),
    ("geneval", "", "no rows (0 of 0 rows lack"),
    ("geneval", '{"prompt": "a"}\n{"prompt": 5}', "row 2 has no prompt"),
    ("geneval", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}', "row 3: 'a' was in "),
    ("geneval", '{"prompt": "a"}\n{"prompt', "not a list of rows that --prompts takes"), ("geneval", "[]", "no rows"),
    ("geneval", '["a"]', "row 1 has no prompt"), ("geneval", '{"prompt": "\\ud800"}', "row 1 has no prompt"),
    ("geneval2", '{"prompt": "a"}\n{"prompt": "a"}', "row 2: 'a' was in "),
    ("dpg", '{"a.txt": "x", "a.txt": "y"}', "the key 'a.txt' stands there twice"),
    ("dpg", '["x"]', "not a JSON object"),
    ("dpg", '{"a.txt": ""}', "row 1 has no text"), ("dpg", '{"../a.txt": "x"}', "would be outside of --out"),
    ("wise", f"[{ROW}, {ROW}]", "row 2: '1' was in "), ("wise", '[{"Prompt": "x"}]', "row 1 has no prompt_id"),
    ("imgedit", '{"7": {"id": "x.png", "edit_type": "add"}}', "row 1 has no prompt"),
    ("imgedit", '{"7": {"id": "x.png", "prompt": "y"}}', "x.png: no such picture"),
    ("gedit", '{"key": "k", "task_type": "t", "instruction_language": "en", "instruction": "x"}', "no input_image")]

@pytest.mark.parametrize("bench, text, message", BAD_FILES)
def test_bad_prompt_files(bench, text, message, tmp_path):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        draw(bench, [tmp_path / "p.json"], tmp_path / "out")
    assert message in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "out").exists()

def test_a_byte_order_mark_is_no_content(tmp_path, noise):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "meta.jsonl").write_text(json.dumps(GENEVAL[0]) + "\n" + json.dumps(GENEVAL[1]), encoding=encoding)
        rows = benchmarks.read_rows([str(tmp_path / "meta.jsonl")], "--prompts", ["prompt"], ["prompt"])
        assert rows == GENEVAL[:2]
