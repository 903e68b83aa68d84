"""evaluate.py: models that do everything right, nothing, or the wrong thing get the scores that they deserve."""
import json
import os
import random

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
import shape_world
from data import to_float
from shape_world import COLORS, COMBO_HELD_OUT, TASKS, Scenes

def scene_for(row, rng):
    """A scene that shows what a prompt row asks for, at random cells."""
    objects = [(s, rng.randrange(len(COLORS)) if c is None else c) for s, c in row["objects"]] * row.get("count", 1)
    while True:
        cells = rng.sample(range(9), len(objects))
        if "relation" not in row or shape_world.relation(*cells) == row["relation"]:
            return 0, [(s, c, rng.randrange(2), cell, 15) for (s, c), cell in zip(objects, cells)]

class Blank(torch.nn.Module):
    """White pictures, no answers. `calls`: (rows, seeds of their generators, options)."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def generate(self, prompts, generator=None, **sampler):
        self.calls.append((len(prompts), [g.initial_seed() for g in generator], sampler))
        return torch.ones(len(prompts), 3, 48, 48)

    def reconstruct(self, images, generator=None):
        return torch.ones_like(images)

    def edit(self, images, instructions, generator=None):
        return self.generate(instructions, generator)

    def answer(self, images, questions, max_new_tokens=32):
        return [""] * len(questions)

class Master(Blank):
    """Knows the prompts, questions and edits of one seed, and draws and answers what is right."""

    def __init__(self, per_task, questions, edits, seed=0, long=24):
        super().__init__()
        rng = random.Random(0)
        prompts, scenes = shape_world.long_prompts(long, seed)
        self.scenes = {prompt: scenes.scene(i) for i, prompt in enumerate(prompts)}
        self.scenes |= {r["prompt"]: scene_for(r, rng) for r in shape_world.task_prompts(per_task, seed)}
        scenes, rng = Scenes(questions, seed=90_000 + seed), random.Random(seed)
        kinds = shape_world.QUESTION_KINDS
        self.answers = [shape_world.question(scenes.scene(i), rng, kinds[i % len(kinds)])[1] for i in range(questions)]
        self.shown = to_float(scenes.render())
        scenes, rng = Scenes(edits, seed=92_000 + seed), random.Random(seed)
        self.edits = [shape_world.edit(scenes.scene(i), rng) for i in range(edits)]

    def generate(self, prompts, generator=None):
        return to_float(Scenes.of([self.scenes[p] for p in prompts]).render())

    def reconstruct(self, images, generator=None):
        return images

    def edit(self, images, instructions, generator=None):
        assert instructions == [e[0] for e in self.edits]
        return to_float(Scenes.of([e[1] for e in self.edits]).render())

    def answer(self, images, questions, max_new_tokens=32):
        assert max_new_tokens == 6 and torch.equal(images, self.shown)
        return [f" {answer.title()}\n" for answer in self.answers]

def test_scores_report_holds_the_numbers():
    s, pictures, rows = evaluate.score_generation(Blank(), per_task=3)
    assert s["score"] == 0 and s["objects"] == 0 and s["n"] == 18 and pictures.shape == (18, 48, 48, 3)
    assert len(rows) == 18 and s["interval"] == evaluate.wilson(0, 18) and s["unknown"] == 0
    assert list(s["tasks"]) == list(TASKS) and all(t["n"] == 3 for t in s["tasks"].values())
    assert {t for t in TASKS if "seen" in s["tasks"][t]} == set(TASKS) - {"single_object", "counting"}
    assert s["tasks"]["colors"]["held_out"] == dict(score=0.0, n=1, interval=evaluate.wilson(0, 1))
    one, _, _ = evaluate.score_generation(Blank(), per_task=1)  # no task has both kinds of prompts
    assert np.isnan(one["seen"]) and np.isnan(one["held_out"]) and one["n"] == 6

def test_a_model_that_does_everything_right_scores_one():
    model = Master(per_task=12, questions=80, edits=192).train()
    scores = evaluate.score_all(model, 72, questions=80, reconstructions=40, editing=True)
    rows = shape_world.task_prompts(12, 0)
    g = scores["generation"]
    assert (g["score"], g["seen"], g["held_out"], g["unknown"]) == (1, 1, 1, 0)
    assert g["objects"] == np.mean([len(r["objects"]) * r.get("count", 1) for r in rows])
    d = scores["long"]
    assert d["score"] == d["captioned"]["score"] == d["held_out"]["score"] == 1 and d["prompts"] == 24
    assert d["n"] == d["captioned"]["n"] + d["held_out"]["n"] == round(24 * d["objects"])
    assert scores["questions"]["accuracy"] == 1 and set(scores["questions"]["kinds"].values()) == {1.0}
    assert scores["reconstruction"] == dict(objects=1, exact=1, pixel_error=0, n=40)
    e = scores["editing"]
    scenes = Scenes(192, seed=92_000)
    stays = np.mean([bool(set(scenes.scene(i)[1]) & set(new)) for i, (_, (_, new), _) in enumerate(model.edits)])
    assert e["asked"] >= 0.99 and e["both"] >= 0.98 and e["n"] == 192
    assert stays - 0.01 <= e["kept"] <= stays < 1  # an edit that leaves no object as it was counts as 0
    assert model.training  # as it was
    text = evaluate.report(scores, "after: ").splitlines()
    first = "after: short prompts 1.000  (95 % 0.949-1.000, 72 pictures)  seen 1.000  held-out 1.000  objects/picture "
    assert text[0].startswith(first)
    assert text[1] == "  " + "  ".join(f"{t} 1.00" for t in TASKS)
    assert text[2].startswith("  long prompts 1.000  (95 % 0.9") and text[2].endswith("captioned 1.000  held-out 1.000")
    assert text[3].startswith("  questions 1.000 (color 1.00 ") and "  reconstruction 1.000  editing asked " in text[3]

def test_a_model_that_does_nothing_scores_nothing():
    scores = evaluate.score_all(Blank(), 12, questions=16, reconstructions=8)
    assert scores["questions"]["accuracy"] == 0 and scores["reconstruction"]["exact"] == 0
    assert scores["reconstruction"]["pixel_error"] > 10 and "editing" not in scores
    short = evaluate.score_all(Blank(), 12, questions=0, reconstructions=0)
    assert set(short) == {"generation", "long", "seconds"} and len(evaluate.report(short).splitlines()) == 3
    assert evaluate.report_change(short, scores) == "change: short +0.000  held-out +0.000  long +0.000"

def test_an_object_of_a_long_prompt_must_be_right_in_all():
    model = Master(1, 1, 1, long=60)
    scenes = dict(model.scenes)
    for field, n in (("shape", 5), ("color", 6), ("size", 2), ("cell", 9)):
        def other(o):
            return o._replace(**{field: (getattr(o, field) + 1) % n})
        wrong = {prompt: (g, [other(objects[0]), *objects[1:]]) for prompt, (g, objects) in scenes.items()
                 if "background" in prompt and (field != "cell" or len(objects) == 1)}
        model.scenes = scenes | wrong
        d = evaluate.score_long(model, 60)[0]
        assert abs(d["score"] - (1 - len(wrong) / d["n"])) < 1e-9, field
    some = shape_world.long_prompts(60, 0)
    assert some[0] == shape_world.long_prompts(60, 0)[0] != shape_world.long_prompts(60, 0, "dev")[0]
    held = [COMBO_HELD_OUT[o.shape, o.color] for i in range(60) for o in some[1].scene(i)[1]]
    assert d["held_out"]["n"] == sum(held) > 10 and d["captioned"]["n"] == len(held) - sum(held)

def test_an_editor_that_changes_nothing_keeps_all_and_does_nothing():
    model = Master(1, 1, 192)
    model.edit = lambda images, instructions, generator=None: images
    scores, pictures, source = evaluate.score_editing(model)
    assert (pictures == source).all() and scores["asked"] < 0.02 and scores["both"] < 0.02
    assert scores["kept"] > 0.9 and set(scores["kinds"]) == {"add", "color", "ground", "remove", "shape", "size"}

def test_every_picture_has_its_own_noise(monkeypatch):
    """Of (seed, number of the prompt), whatever is drawn at once."""
    model = Blank()
    monkeypatch.setattr(evaluate, "BATCH", 256)
    evaluate.score_generation(model, per_task=50, seed=7, cfg=2.0)
    (n, seeds, sampler), (n2, seeds2, sampler2) = model.calls
    assert (n, n2) == (256, 44) and sampler == sampler2 == {"cfg": 2.0}
    assert seeds + seeds2 == [g.initial_seed() for g in evaluate.generators(1007, 300)]
    assert len(set(seeds + seeds2)) == 300
    model.calls.clear()
    evaluate.score_long(model, n=300, seed=7, cfg=2.0)
    seeds = model.calls[0][1] + model.calls[1][1]
    assert seeds == [g.initial_seed() for g in evaluate.generators(4007, 300)]
    model.calls.clear()
    evaluate.score_editing(model, n=8, seed=7)
    assert model.calls[0][:2] == (8, [g.initial_seed() for g in evaluate.generators(3007, 8)])

@pytest.mark.skipif(not os.path.isdir(checkpoint.default_weights("mar")), reason="weights/mar-reca is not there")
@pytest.mark.parametrize("arch", checkpoint.architectures())
def test_scores_do_not_depend_on_how_many_are_drawn_at_once(arch, monkeypatch):
    model, got = checkpoint.load_model(arch, checkpoint.default_weights(arch, "base")), []
    for batch in (5, 32):
        monkeypatch.setattr(evaluate, "BATCH", batch)
        scores = evaluate.score_all(model, 12, questions=0, reconstructions=6, steps=3)
        got.append((scores["generation"], scores["long"], scores["reconstruction"]["objects"]))
    assert str(got[0]) == str(got[1])

@pytest.mark.skipif(not os.path.isdir(checkpoint.default_weights("mar")), reason="weights/mar-reca is not there")
def test_shipped_weights_score_above_chance(capsys, tmp_path):
    evaluate.main(["--arch", "mar", "--n", "24", "--steps", "8", "--device", "cpu", "--json", str(tmp_path / "s.json")])
    record = json.load(open(tmp_path / "s.json"))
    scores = record["scores"]
    assert scores["generation"]["score"] > 0.3 and scores["questions"]["accuracy"] > 0.6
    assert record["arch"] == "mar" and "--steps 8" in record["command"] and record["torch"] == torch.__version__
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == evaluate.report(scores).splitlines() and len(out) == 4 + len(TASKS)
    assert out[4].startswith("  single_object  ") and out[-1].count(" of 2") == 2 and "held-out" in out[-1]

def test_flags_reach_the_scores(monkeypatch):
    seen = []
    monkeypatch.setattr(checkpoint, "load_model", lambda *a, **k: Blank())
    score_all = evaluate.score_all

    def record(model, *args, **options):
        seen.append((args, options))
        return score_all(model, 6, questions=0, reconstructions=0)
    monkeypatch.setattr(evaluate, "score_all", record)
    evaluate.main(["--n", "12", "--seed", "3", "--split", "dev", "--editing", "--cfg", "2", "--device", "cpu"])
    evaluate.main(["--device", "cpu"])
    assert seen == [((12, 3, "dev"), dict(editing=True, cfg=2.0)), ((600, 0, "test"), dict(editing=False))]

WRONG = [
    (["--config", "harmon-1.5b"], ValueError, "--config harmon-1.5b: the judge knows the shape world only"),
    (["--n", "5"], ValueError, "--n 5: at least 6, one for each task"),
    (["--draw", "geneval", "--prompts", "x.jsonl", "--n", "0"], ValueError, "--n 0: must be from 1"),
    (["--draw", "geneval", "--prompts", "no/x.jsonl"], FileNotFoundError, "--prompts no/x.jsonl: no such file"),
    (["--draw", "geneval"], ValueError, "--draw geneval: give its file of prompts as --prompts"),
    (["--ckpt", "no/such/folder"], FileNotFoundError, "no/such/folder: no config.json"),
]

@pytest.mark.parametrize("argv, kind, message", WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_errors_are_one_line(argv, kind, message):
    with pytest.raises(kind) as e:
        evaluate.main([*argv, "--device", "cpu"])
    assert str(e.value).startswith(message) and "\n" not in str(e.value)

def test_changes_and_the_scores_of_a_tokenizer():
    before, after = (dict(generation=dict(score=s, seen=s, held_out=s), questions=dict(accuracy=s))
                     for s in (0.25, 0.5))
    line = "change: short +0.250  held-out +0.250  questions +0.250"
    assert evaluate.report_change(before, after) == line

    class Tokenizer(torch.nn.Module):  # keeps everything, draws nothing
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def reconstruct(self, images, generator=None):
            return images
    scores = evaluate.score_all(Tokenizer(), 8)
    assert evaluate.report(scores) == "reconstruction: objects 1.000, exact 1.000, pixel error 0.00 gray levels"
    assert evaluate.report_change(scores, scores) == "change: reconstruction +0.000"
