"""The public benchmarks: folders read back as their scorers read them, rules of answers against tables of verdicts."""
import base64
import csv
import json
import os
import random
import re
import signal
import sys
import time
import types

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
    assert recipe["ckpt"] == checkpoint.weights_hash(checkpoint.default_weights("mar"))
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
    """By one process, or by one that is killed and two that go on: the same files. In batches: the same pictures."""
    rows = [dict(tag="colors", prompt=f"a {color} star") for color in ("red", "blue", "green", "yellow", "purple")]
    meta = write_lines(tmp_path / "meta.jsonl", rows)
    flags = ["--draw", "geneval", "--prompts", meta, "--steps", "4", "--n", "2", "--device", "cpu", "--batch", "1"]
    evaluate.main([*map(str, flags), "--out", str(tmp_path / "one")])
    evaluate.main([*map(str, flags), "--out", str(tmp_path / "many"), "--batch", "7"])
    job = Launch(1, *flags, "--out", tmp_path / "cut", script="evaluate.py")
    end = time.time() + 60
    while len(list(tmp_path.glob("cut/images/*/samples/*.png"))) < 2 and time.time() < end:
        time.sleep(0.01)
    with open(f"/proc/{job.pid}/task/{job.pid}/children") as f:
        os.kill(int(f.read().split()[0]), signal.SIGKILL)
    assert job.wait()[0] == -signal.SIGKILL
    there = len(list(tmp_path.glob("cut/images/*/samples/*.png")))
    assert 2 <= there < 10
    said = torchrun(2, *flags, "--out", tmp_path / "cut", script="evaluate.py")
    drawn, before = zip(*re.findall(r"(\d+) pictures drawn, (\d+) were there", said))
    assert (sum(map(int, drawn)), sum(map(int, before))) == (10 - there, there)
    one, many, cut = (files(tmp_path / name / "images") for name in ("one", "many", "cut"))
    assert len(one) == 15 and one == cut and one.keys() == many.keys()
    for name in (name for name in one if name.endswith(".png")):
        apart = pixels(tmp_path / "one" / "images" / name).astype(int) - pixels(tmp_path / "many" / "images" / name)
        assert abs(apart).max() <= 1, name  # sums of floats have another order in another batch

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

# ---------------------------------------------------------------------------------------------------------------------
# Rules: replies and their verdicts

POPE = {True: ["Yes", "yes", "", "Yes.", "Nope", "NO", "There is. No", "a cat", "Nothing", "None.", "know", "notice",
               "Yes\nno", "It cannot be seen"],
        False: ["No", "no", "No.", "no, there is not", "No, yes", "Yes, not", "There is not a dog.", "I see no dog",
                "Yes no", "not", "Well,no, no"]}

@pytest.mark.parametrize("yes, reply", [(yes, reply) for yes, replies in POPE.items() for reply in replies])
def test_popes_rule(yes, reply):
    assert benchmarks.pope_says_yes(reply) is yes

MMVP = [("A", "A"), ("B", "B"), (" A\n", "A"), ("A. Open", "A"), ("B) Closed", "B"), ("Open", "A"), ("Closed", "B"),
        ("Its door is Open", "A"), ("(a) Open", "A"), ("(b) Closed", "B"), ("", ""), ("a", "a"), ("b", "b"), ("C", "C"),
        ("closed", "closed"), ("Answer: Closed", "A"), ("The door is Closed.", "B"), ("Both Open and Closed", "B"),
        ("It is Open or Closed", "A"), ("(B)", "(B)"), ("1", "1"), ("neither", "neither"), ("An Open door", "A"),
        ("**B**", "**B**")]

@pytest.mark.parametrize("reply, choice", MMVP)
def test_mmvps_rule_without_a_judge(reply, choice):
    assert benchmarks.mmvp_choice(reply, {"A": "Open", "B": "Closed"}) == choice

MMBENCH = [
    ("A", "A"), ("B.", "B"), ("(C)", "C"), ("D: a green kite", "D"), ("The answer is B", "B"), ("A B", None),
    ("", None), ("B or C", None), ("[A]", "A"), ("*B*", "B"), ("I think it is C", "C"), ("I choose B, in all", "B"),
    ("B because the dog is at the left", None), ("The answer is B because there stands a dog", "B"),
    ("Answer is: C, since a tree is there", "C"), ("a red cat", "A"), ("It is A RED CAT", "A"), ("red", None),
    ("a red cat and a blue dog", None), ("a" * 200 + " a red cat", None), ("b", None), ("E", None), ("{D}", "D"),
    ("A!", "A"), ("A cat is here", "A"), ("The answer is A and not B, A it is", "A"), ("#C", "C"), ("AB", None)]

@pytest.mark.parametrize("reply, choice", MMBENCH)
def test_vlmevalkits_exact_matching(reply, choice):
    options = {"A": "a red cat", "B": "a blue dog", "C": "a tall tree", "D": "a green kite"}
    assert benchmarks.mmbench_choice(reply, options) == choice

MMMU_CHOICES = [  # None: a guess
    ("B", "B"), ("B.", "B"), ("(B)", "B"), ("(A) or (C)", "C"), ("(C) or (A)", "A"), ("A B", "B"), ("B then A", "A"),
    ("The answer is C", "C"), ("C is the answer", "C"), ("'D'", "D"), ("(A) and B", "A"), ("D!?", None), ("D?!", "D"),
    ("B)", None), ("AB", None), ("", None), ("b", None), ("$6", None), ("five words: it is $7", None),
    ("in more than five words it is $7", "B"), ("either $6 or $7, I would not know", "B"), ("E", None),
    ("either $7 or $6, I would not know", "A"), ("A, because", None), ("so A , because", "A"), ("**B**", None),
    ("(A) (B) (A)", "A"), ("it is the long one: NINE DOLLARS", "D"), ("A: $6", None), (",.B.,", "B"),
    ("B.,", "B"), (".B,.", None)]

@pytest.mark.parametrize("reply, choice", MMMU_CHOICES)
def test_mmmus_rule_for_multiple_choice(reply, choice):
    texts, rng = {"A": "$6", "B": "$7", "C": "$8", "D": "nine dollars"}, random.Random(42)
    said, guess = benchmarks.mmmu_choice(reply, list("ABCD"), texts, rng)
    assert guess == (choice is None) and (said == choice or guess)
    assert said == random.Random(42).choice("ABCD") if guess else rng.getstate() == random.Random(42).getstate()

MMMU_OPEN = [
    ("24", "24", True), ("24.0", "24", True), ("24.004", "24", True), ("24.01", "24", False), ("1,000", "1000", True),
    ("it is 1,234.5", "1,234.5", True), ("x = 5", "5", True), ("x = 5\nso y = 7", "7", True), ("", "5", False),
    ("x = 5 m\nso 7", "5", False), ("The answer is 6.", "6", True), ("1e3", "1000", True), ("about 3 of 8", "8", True),
    ("Tampa, Florida", ["Tampa", "Florida"], True), ("in florida", ["Tampa", "Florida"], True), ("-5", "5", False),
    ("Beach", ["Tampa", "Florida"], False), ("The result is mgs", "$MgS$", False), ("mgs", ["$MgS$", "MgS"], True),
    ("so it is not b but c", "c", True), ("abc", "c", False), ("c", "c", True), ("a c", "c", True),
    ("it could be so thus is 7 apples", "7", True), ("answer ", "answer", True), ("The final word is", "word", True),
    ("the answer is so 7 apples", "so", False), ("it is about 1,000 km", "1000", True), ("it is 2e2 km", "200", True),
    ("24/7", ["24/7", "3.429"], True), ("3.43", ["24/7", "3.429"], True), ("therefore .5 m", "0.5", True),
    ("it is :", "it is", True), ("no number", "5", False), ("1.5,", "1.5", True),
    ("is 1.5,2", "1.5", False), ("is 12,5", "5", True)]

@pytest.mark.parametrize("reply, gold, right", MMMU_OPEN)
def test_mmmus_rule_for_short_answers(reply, gold, right):
    assert benchmarks.mmmu_open_right(reply, gold) is right

# ---------------------------------------------------------------------------------------------------------------------
# Scores of published answers

def score(name, *argv):
    return evaluate.main(["--score", name, *map(str, argv)])

def test_mmmu_as_the_official_code_scores_it(capsys, monkeypatch, tmp_path):
    """Subjects in alphabetical order whatever the file's; and its own layout, a file for each subject, read back."""
    monkeypatch.setattr(checkpoint, "load_model", None)  # none is needed
    with open(real("mmmu_llava1.5_13b_outputs.json")) as f:
        outputs = json.load(f)
    score("mmmu", "--predictions", real("mmmu_llava1.5_13b_outputs.json"))
    assert "mmmu: accuracy 0.3667 (" in (said := capsys.readouterr().out) and "  330 / 900, 2 fallbacks\n" in said
    paths = [tmp_path / f"{subject}.json" for subject in reversed(outputs)]
    for path in paths:
        path.write_text(json.dumps(outputs[path.stem]))
    score("mmmu", "--predictions", *paths)
    assert capsys.readouterr().out == said
    sets = benchmarks.questions("mmmu", [], [real("mmmu_llava1.5_13b_outputs.json")])
    replies = benchmarks.read_predictions("mmmu", [real("mmmu_llava1.5_13b_outputs.json")], sets)
    written = benchmarks.write_predictions("mmmu", sets, replies)
    assert {file: json.loads(text) for file, text in written.items()} == {
        f"{subject}/output.json": rows for subject, rows in outputs.items()}

def made_pope(path, n=12):
    rows = [dict(question_id=i + 1, image="x.png", text=f"Is there a {i}?", label="yes" if i < n // 2 else "no")
            for i in range(n)]
    return write_lines(path, rows), rows

def test_pope_counted_by_hand(tmp_path, capsys):
    """6 yes and 6 no: 4 hits, 2 misses, 1 false alarm. The second set: all yes. The mean is of the sets' scores."""
    paths, answers = [], []
    for name, replies in (("random", ["Yes"] * 4 + ["No."] * 3 + ["no"] * 4 + ["yes"]), ("popular", ["Yes"] * 12)):
        path, rows = made_pope(tmp_path / f"{name}.json")
        paths.append(path)
        told = [dict(question_id=row["question_id"], text=reply) for row, reply in zip(rows, replies)]
        answers.append(write_lines(tmp_path / f"{name}.jsonl", told))
    score("pope", "--data", *paths, "--predictions", *answers, "--json", tmp_path / "s.json")
    found = json.loads((tmp_path / "s.json").read_text())["scores"]
    values = {key: {name: round(x[0], 6) for name, x in each.items()} for key, each in found.items()}
    assert values["random"] == {"F1": round(8 / 11, 6), "accuracy": 0.75, "precision": 0.8, "recall": round(4 / 6, 6),
                                "yes": round(5 / 12, 6)}
    assert values["popular"] == {"F1": round(2 / 3, 6), "accuracy": 0.5, "precision": 0.5, "recall": 1.0, "yes": 1.0}
    assert abs(values["mean"]["F1"] - (8 / 11 + 2 / 3) / 2) < 1e-5 and len(capsys.readouterr().out.splitlines()) == 3
    assert all(low <= value <= high for each in found.values() for value, low, high in each.values())
    official = [{k: v for k, v in dict(row, answer=row["text"]).items() if k == "answer"} for row in
                map(json.loads, answers[0].read_text().split("\n")[:12])]  # POPE's own files have no numbers
    write_lines(answers[0], official)
    score("pope", "--data", paths[0], "--predictions", answers[0])
    assert capsys.readouterr().out.startswith("random: F1 0.7273 (")

def test_pope_on_the_published_questions(tmp_path, capsys):
    with open(real("coco_pope_popular.json")) as f:
        rows = [json.loads(line) for line in f]
    replies = ["Yes, there is." if i % 3 else "No." for i in range(len(rows))]
    path = write_lines(tmp_path / "a.jsonl", [dict(question=r["text"], answer=a) for r, a in zip(rows, replies)])
    score("pope", "--data", real("coco_pope_popular.json"), "--predictions", path)
    hit = sum(r["label"] == "yes" and a[0] == "Y" for r, a in zip(rows, replies))
    said = sum(a[0] == "Y" for a in replies)
    line = capsys.readouterr().out
    for text in (f"F1 {2 * hit / (said + 1500):.4f}", f"precision {hit / said:.4f}", f"recall {hit / 1500:.4f}",
                 f"yes {said / 3000:.4f}", "  3000 questions"):
        assert text in line

def test_the_difference_of_two_runs(tmp_path, capsys):
    """Paired: the same answers but for one question differ by exactly that, and alike runs by nothing."""
    path, rows = made_pope(tmp_path / "q.json", 100)
    right = [dict(question_id=row["question_id"], answer=row["label"]) for row in rows]
    a = write_lines(tmp_path / "a.jsonl", right)
    b = write_lines(tmp_path / "b.jsonl", [dict(right[0], answer="no"), *right[1:]])
    score("pope", "--data", path, "--predictions", a, "--against", b)
    first, second, third = capsys.readouterr().out.splitlines()
    assert "accuracy 1.0000 (1.0000 to 1.0000)" in first and second.startswith("against: q: F1 0.98")
    assert "accuracy 0.0100 (0.0000 to 0.03" in third and third.startswith("difference: q: F1 0.0101 (")
    score("pope", "--data", path, "--predictions", a, "--against", a)
    assert "F1 0.0000 (0.0000 to 0.0000)" in capsys.readouterr().out.splitlines()[2]

def test_intervals_have_the_width_of_theirs():
    """Of a mean of n coin flips: 1.96 standard errors; the same seed gives the same."""
    values = np.array([0, 1] * 200)[:, None]
    scored = {"x": (values, benchmarks.accuracy, "")}
    value, low, high = benchmarks.intervals(scored, 0)["x"]["accuracy"]
    assert value == 0.5 and abs(high - low - 2 * 1.96 * 0.5 / 20) < 0.01
    assert benchmarks.intervals(scored, 0) == benchmarks.intervals(scored, 0) != benchmarks.intervals(scored, 1)

WRONG_ANSWERS = [
    ([], "--score pope: give its file of questions as --data"),
    (["--data", "q.json", "--predictions", "short.jsonl"], "short.jsonl: 2 of 12 questions have no answer in their"),
    (["--data", "q.json", "--predictions", "mixed.jsonl"], "mixed.jsonl: 2 of 12 questions have no answer in their"),
    (["--data", "q.json", "--predictions", "none.jsonl"], "none.jsonl: 12 rows have 0 different question_id with a"),
    (["--data", "q.json", "--predictions", "long.jsonl"], "long.jsonl: 13 rows have 13 different question_id with a"),
    (["--data", "q.json", "--predictions", "twice.jsonl"], "twice.jsonl: 12 rows have 11 different question_id with a"),
    (["--data", "q.json", "--predictions", "x.jsonl", "x.jsonl"], "--predictions: 2 files for 1 files of --data"),
    (["--data", "q.json", "q.json", "--predictions", "x", "x"], "--data q.json: another file has this name too"),
    (["--data", "bad.json", "--predictions", "x"], "bad.json: no question in bad 1 (KeyError: 'maybe'"),
    (["--data", "q.json", "--predictions", "x", "--ckpt", "y"], "--ckpt is for models, not for --predictions"),
    (["--data", "q.json", "--device", "cpu"], "x.png: no such picture, nor 11 others of 12; give their folder")]

@pytest.mark.parametrize("argv, message", WRONG_ANSWERS)
def test_wrong_questions_and_answers(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, rows = made_pope(tmp_path / "q.json")
    told = [dict(question_id=row["question_id"], answer="no") for row in rows]
    write_lines(tmp_path / "short.jsonl", told[:10])
    write_lines(tmp_path / "mixed.jsonl", [told[1], told[0], *told[2:]])
    write_lines(tmp_path / "long.jsonl", [dict(row, question_id=i) for i, row in enumerate([*told, told[0]])])
    write_lines(tmp_path / "twice.jsonl", [*told[:11], told[0]])
    write_lines(tmp_path / "none.jsonl", [dict(row, answer=None) for row in told])
    write_lines(tmp_path / "bad.json", [dict(rows[0], label="maybe")])
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        score("pope", *argv)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)

# ---------------------------------------------------------------------------------------------------------------------
# Asking a model

class Oracle(Noise):
    """Replies to (mean gray of the picture, question) what `say` says; keeps what it was asked."""

    def __init__(self, say):
        super().__init__()
        self.say, self.asked, self.limits = say, [], set()

    def answer(self, images, questions, max_new_tokens=32):
        assert len(images) == len(questions) and images.ndim == 4
        grays = ((images.mean((1, 2, 3)) + 1) * 127.5).round().int().tolist()
        self.rows.append(len(images))
        self.limits.add(max_new_tokens)
        self.asked += zip(grays, questions)
        return [f" {self.say(gray, question)}\n" for gray, question in zip(grays, questions)]

def gray(folder, **pictures):
    """{name: level}, of two shapes."""
    folder.mkdir(exist_ok=True)
    for i, (name, level) in enumerate(pictures.items()):
        Image.fromarray(np.full((6, 6 + 2 * (i % 2), 3), level, np.uint8)).save(folder / f"{name}.png")
    return folder

def asked(monkeypatch, say, name, data, images, out, *more):
    model = Oracle(say)
    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **k: model)
    score(name, "--data", *data, "--images", images, "--out", out, "--device", "cpu", *more)
    return model

def test_pope_is_asked(tmp_path, monkeypatch, capsys):
    """Questions in batches of one shape; the file that is written is scored alone as the model was."""
    images = gray(tmp_path / "images", dark=10, light=200, gray=100)
    rows = [dict(question_id=i, image=f"{name}.png", text=f"Is it {name}?", label=label)
            for i, (name, label) in enumerate([("dark", "yes"), ("light", "no"), ("gray", "yes"), ("dark", "no")])]
    data, out = write_lines(tmp_path / "coco_pope_random.json", rows), tmp_path / "out"

    def say(level, question):
        return "Yes." if level < 50 else "No, it is not"
    model = asked(monkeypatch, say, "pope", [data], images, out, "--batch", "3")
    assert model.asked[0] == (10, "Is it dark?\nAnswer the question using a single word or phrase.")
    assert sorted(model.rows) == [1, 1, 2] and model.limits == {16} and len(model.asked) == 4
    said = [json.loads(line) for line in (out / "coco_pope_random_answers.jsonl").read_text().splitlines()]
    assert said == [dict(question_id=i, question=row["text"], answer="Yes." if i in (0, 3) else "No, it is not")
                    for i, row in enumerate(rows)]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("coco_pope_random: F1 0.5000 (") and "accuracy 0.5000" in line
    score("pope", "--data", data, "--predictions", out / "coco_pope_random_answers.jsonl")
    assert capsys.readouterr().out.splitlines() == [line]
    assert asked(monkeypatch, None, "pope", [data], images, out).asked == []  # nothing is asked again
    with pytest.raises(ValueError, match=r"recipe.json: made with seed 0, here 1 "):
        asked(monkeypatch, None, "pope", [data], images, out, "--seed", "1")

def test_gqa_is_asked(tmp_path, monkeypatch, capsys):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.full((6, 6, 3), 9, np.uint8)).save(images / "n1.jpg")
    gold = [("red", "query"), ("yes", "verify"), ("blue", "query"), ("x", "query")]
    rows = {f"q{i}": dict(question=f"What {i}?", answer=answer, imageId="n1", isBalanced=i != 3,
                          types=dict(structural=kind)) for i, (answer, kind) in enumerate(gold)}
    (tmp_path / "q.json").write_text(json.dumps(rows))
    asked(monkeypatch, lambda level, question: dict(zip("012", ["Red.", "yes", "a blue one"]))[question[5]], "gqa",
          [tmp_path / "q.json"], images, tmp_path / "out")
    predictions = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert predictions == [dict(questionId=f"q{i}", prediction=p) for i, p in enumerate(["red", "yes", "a blue one"])]
    line = capsys.readouterr().out.splitlines()[-1]
    for text in ("gqa: accuracy 0.6667 (", "open 0.5000 (", "binary 1.0000 (", "2 / 3 balanced questions"):
        assert text in line

def test_mmvp_is_asked(tmp_path, monkeypatch, capsys):
    """Both of a pair count; questions 99 and 100 once more with their labels exchanged."""
    images, lines = tmp_path / "images", ["lndex,Question,Options,Correct Answer"]
    images.mkdir()
    for i in (1, 2, 3, 4, 99, 100):
        Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(images / f"{i}.jpg", quality=100)
        lines.append(f'{i},"Is the door, here, open?",(a) Open (b) Closed,({"ab"[i % 2]})')
    (tmp_path / "Questions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    replies = {1: "B", 2: "A. Open", 3: "B", 4: "(b)", 99: "A", 100: "Closed"}
    model = asked(monkeypatch, lambda level, question: replies[level], "mmvp", [tmp_path / "Questions.csv"], images,
                  tmp_path / "out")
    assert model.asked[0] == (1, "Is the door, here, open?\nA. Open\nB. Closed\nAnswer with the option's letter from "
                              "the given choices directly.")
    line = capsys.readouterr().out.splitlines()[-1]
    for text in ("mmvp: pairs 0.3333 (", "questions 0.5000 (", "4 labels exchanged 0.6667 (", "1 / 3 pairs by"):
        assert text in line
    said = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert said[1] == dict(question_id="2", prompt=model.asked[1][1], answer="(a)", response="A. Open")

def test_mmmu_is_asked(tmp_path, monkeypatch, capsys):
    """The hub's columns; several pictures stand side by side; subjects in alphabetical order."""
    images = gray(tmp_path / "images", a=10, b=200)
    rows = [dict(id="validation_Math_1", question="<image 1> What?", options="['1', \"two's\"]", answer="B",
                 question_type="multiple-choice", image_1="a.png", image_2=None),
            dict(id="validation_Math_2", question="<image 1> or <image 2>?", options="[]", answer="['7', 'seven']",
                 question_type="open", image_1="a.png", image_2="b.png"),
            dict(id="validation_Art_Theory_1", question="Who? <image 1>", options="['1', '2', '3']", answer="C",
                 question_type="multiple-choice", image_1="b.png")]
    replies = {"W": "(B) two's", "<": "It is 7.", "?": "no idea"}
    model = asked(monkeypatch, lambda level, question: replies["?" if "Who" in question else question[0]], "mmmu",
                  [write_lines(tmp_path / "rows.jsonl", rows)], images, tmp_path / "out")
    letter = "\n\nAnswer with the option's letter from the given choices directly."
    assert dict((q, level) for level, q in model.asked) == {
        "What?\n(A) 1\n(B) two's" + letter: 10, "Who? \n(A) 1\n(B) 2\n(C) 3" + letter: 200,
        "<image 1> or <image 2>?\nAnswer the question using a single word or phrase.": 119}  # (6 x 10 + 8 x 200) / 14
    captured = capsys.readouterr()
    guess = random.Random(42).choice("ABC") == "C"
    assert f"{2 + guess} / 3, 1 fallbacks" in captured.out and "1 of 3 questions have several pictures" in captured.err
    said = json.loads((tmp_path / "out" / "Math" / "output.json").read_text())
    assert said[0] == dict(id="validation_Math_1", question_type="multiple-choice", answer="B", all_choices=["A", "B"],
                           index2ans={"A": "1", "B": "two's"}, response="(B) two's")
    assert said[1]["answer"] == ["7", "seven"] and os.path.isfile(tmp_path / "out" / "Art_Theory" / "output.json")
    score("mmmu", "--predictions", *(tmp_path / "out").glob("*/output.json"))
    assert capsys.readouterr().out == captured.out[captured.out.index("mmmu:"):]

def test_mmbench_is_asked(tmp_path, monkeypatch, capsys):
    """A rotation may name the row with its picture; a question counts if all its rotations are right."""
    path = gray(tmp_path / "images", a=10) / "a.png"
    rows = [("7", "look", "What?", "cat", "dog", "", "A", base64.b64encode(path.read_bytes()).decode()),
            ("1000007", "look", "What?", "dog", "cat", "", "B", "7"), ("8", "", "Who?", "x\ty", "he", "she", "C", "7"),
            ("1000008", "", "Who?", "she", "x\ty", "he", "A", "7")]
    columns = ["index", "hint", "question", "A", "B", "C", "answer", "image"]
    with open(tmp_path / "d.tsv", "w", newline="") as f:
        csv.writer(f, dialect="excel-tab").writerows([columns, *rows])

    def say(level, question):  # of the last question's rotations the second is not read
        return "It is a cat" if "cat" in question else "(C)" if "C. she" in question else "maybe"
    model = asked(monkeypatch, say, "mmbench", [tmp_path / "d.tsv"], tmp_path, tmp_path / "out")
    assert model.asked[0] == (10, "look\nWhat?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices "
                              "directly.") and model.asked[2][1].startswith("Who?\nA. x\ty\nB. he\nC. she\nAnswer")
    line = capsys.readouterr().out.splitlines()[-1]
    assert "mmbench: accuracy 0.5000 (" in line and "1 / 2 questions, 1 of 4 replies without a letter" in line
    with open(tmp_path / "out" / "predictions.tsv", newline="") as f:
        said = list(csv.DictReader(f, dialect="excel-tab"))
    assert [row["prediction"] for row in said] == ["It is a cat"] * 2 + ["(C)", "maybe"] and said[2]["A"] == "x\ty"

def test_mmvet_is_asked(tmp_path, monkeypatch, capsys):
    images = gray(tmp_path / "images", v1=10)
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": dict(imagename="v1.png", question="What?", answer="x")}))
    asked(monkeypatch, lambda *_: "A long answer.", "mmvet", [tmp_path / "mm-vet.json"], images, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "answers.json").read_text()) == {"v1_0": "A long answer."}
    assert capsys.readouterr().out.splitlines() == [f"1 answers, as the official scorer reads them: {tmp_path / 'out'}"]

def test_a_kill_loses_no_answer(tmp_path, monkeypatch, capsys):
    """What was answered is not asked again, half a line is; two processes share the questions, and one of them, which
    finds all answered, scores."""
    images = gray(tmp_path / "images", x=10)
    data, rows = made_pope(tmp_path / "q.json", 10)
    sets, args = benchmarks.questions("pope", [str(data)]), evaluate.parse_args(
        ["--score", "pope", "--data", str(data), "--images", str(images), "--batch", "2"])
    args.out, model = str(tmp_path), Oracle(lambda level, question: "yes")
    assert evaluate.ask(model, args, sets, 1, 2) is None and len(model.asked) == 5
    path = tmp_path / "replies-1.jsonl"
    path.write_text(path.read_text()[:-20])
    assert evaluate.ask(model, args, sets, 0, 2) is None and len(model.asked) == 10
    assert evaluate.ask(model, args, sets, 1, 2) == {"q": ["yes"] * 10} and len(model.asked) == 11

def test_parquet_needs_pyarrow_only_where_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"x.parquet: not a list of rows [^\n]*: pip install pyarrow$"):
        benchmarks.read_file(str(tmp_path / "x.parquet"), "--data")
    image = gray(tmp_path / "images", a=10) / "a.png"
    row = dict(id="validation_Art_1", question="<image 1> What?", options="['1', '2']", answer="A", image_2=None,
               question_type="multiple-choice", image_1=dict(bytes=image.read_bytes(), path="a.png"))

    class ParquetFile:
        def __init__(self, path):
            self.to_pylist, self.read = (lambda: [dict(row)]), (lambda: self)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=ParquetFile))
    model = asked(monkeypatch, lambda *_: "A", "mmmu", [tmp_path / "x.parquet"], tmp_path, tmp_path / "out")
    assert model.asked[0][0] == 10

@shipped
def test_a_real_model_is_asked(tmp_path, capsys):
    """In whatever batches, the shipped one gives the same answers."""
    shape_world_scenes = evaluate.Scenes(4, seed=5).render()
    rows = []
    for i, picture in enumerate(shape_world_scenes):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        rows += [dict(question_id=2 * i + j, image=f"{i}.png", text=text, label="no")
                 for j, text in enumerate(("Is there a star?", "What color is the ground?"))]
    data, said = write_lines(tmp_path / "q.json", rows), []
    for batch in (3, 64):
        score("pope", "--data", data, "--images", tmp_path, "--out", tmp_path / str(batch), "--batch", batch, "--arch",
              "ar", "--device", "cpu")
        said.append((tmp_path / str(batch) / "q_answers.jsonl").read_text())
    assert said[0] == said[1] and len(said[0].splitlines()) == 8
