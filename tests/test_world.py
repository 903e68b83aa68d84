"""The shape world and its judge: a score means something only if its judge accepts what is right and nothing else."""
import argparse
import random

import numpy as np
import torch

import data
import evaluate
import shape_world
from shape_world import (
    COLORS,
    GROUNDS,
    HELD_OUT_COMBOS,
    HELD_OUT_PAIRS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scenes,
    fulfils,
    judge,
    same_objects,
)

def test_same_seed_same_pictures():
    a, b = Scenes(50, seed=3), Scenes(50, seed=3)
    assert (a.render() == b.render()).all() and (a.objects == b.objects).all()
    assert (Scenes(50, seed=4).objects != a.objects).any()
    assert (Scenes.of([a.scene(i) for i in range(50)]).render() == a.render()).all()

def test_judge_is_right_on_ground_truth():
    scenes = Scenes(2000, seed=11)
    found = judge(scenes.render())
    exact = np.mean([set(f) == {tuple(o[:4]) for o in scenes.scene(i)[1]} for i, f in enumerate(found)])
    assert exact >= 0.99

def test_judge_survives_noise():
    scenes = Scenes(500, seed=12)
    noisy = np.clip(scenes.render() + np.random.default_rng(0).normal(0, 8, (500, 48, 48, 3)), 0, 255).astype(np.uint8)
    assert np.mean([same_objects(f, scenes.scene(i)) == 1 for i, f in enumerate(judge(noisy))]) >= 0.99

def scene_for(row, rng):
    """A scene that shows what a prompt row asks for, at random cells."""
    objects = [(s, c if c is not None else rng.randrange(len(COLORS))) for s, c in row["objects"]] * row.get("count", 1)
    while True:
        cells = rng.sample(range(9), len(objects))
        if "relation" not in row or shape_world.relation(*cells) == row["relation"]:
            return rng.randrange(4), [(s, c, rng.randrange(2), cell, 15) for (s, c), cell in zip(objects, cells)]

def test_judge_accepts_right_and_rejects_wrong_pictures():
    rng, rows = random.Random(0), shape_world.task_prompts(100, seed=5)
    right = Scenes.of([scene_for(r, rng) for r in rows])
    accepted = [fulfils(f, r) for f, r in zip(judge(right.render()), rows)]
    assert np.mean(accepted) >= 0.99
    wrong = []  # the same scenes, where the first object has a shape that nobody asked for
    for i, r in enumerate(rows):
        ground, objects = right.scene(i)
        spare = rng.choice([s for s in range(len(SHAPES)) if s not in [o.shape for o in objects]])
        wrong.append((ground, [(spare, *objects[0][1:])] + objects[1:]))
    rejected = [not fulfils(f, r) for f, r in zip(judge(Scenes.of(wrong).render()), rows)]
    assert np.mean(rejected) >= 0.99

def test_judge_rejects_wrong_color_count_and_relation():
    def found(*objects):
        return judge(Scenes.of([(0, objects)]).render())[0]
    red_circle, green_circle, blue_star = (0, 0, 1, 0, 15), (0, 1, 1, 0, 15), (3, 2, 1, 2, 15)
    row = dict(objects=[(0, 0)])
    assert fulfils(found(red_circle), row) and not fulfils(found(green_circle), row)
    assert not fulfils(found(red_circle, (0, 0, 1, 4, 15)), dict(objects=[(0, None)], count=3))
    left, both = dict(objects=[(0, None), (3, None)], relation="left of"), found(red_circle, blue_star)
    assert fulfils(both, left) and not fulfils(both, dict(left, relation="above"))
    swapped = dict(objects=[(0, 2), (3, 0)])  # attribution: a blue circle and a red star is another picture
    assert not fulfils(both, swapped)

def test_relations():
    assert [shape_world.relation(0, 2), shape_world.relation(5, 3)] == ["left of", "right of"]
    assert [shape_world.relation(1, 7), shape_world.relation(8, 2)] == ["above", "below"]
    assert shape_world.relation(7, 0) == "below" and shape_world.relation(0, 4) is None  # no direction dominates

def test_a_picture_full_of_random_objects_scores_nothing():
    rows = shape_world.task_prompts(20, seed=0)
    found = judge(shape_world.crowded_pictures(len(rows), seed=0))
    assert np.mean([fulfils(f, r) for f, r in zip(found, rows)]) < 0.1

def test_captioned_scenes_never_hold_held_out_things():
    scenes = Scenes(3000, seed=2, captioned=True)
    for i in range(len(scenes)):
        assert not shape_world.holds_held_out(scenes.scene(i)[1])
    broad = Scenes(3000, seed=2)
    assert sum(shape_world.holds_held_out(broad.scene(i)[1]) for i in range(3000)) > 1000
    names = {(SHAPES[o.shape], COLORS[o.color]) for i in range(3000) for o in broad.scene(i)[1]}
    assert HELD_OUT_COMBOS <= names and len(names) == 30 and len(HELD_OUT_PAIRS) == 2

def test_captions_are_short_and_poor_or_long_with_few_slips():
    scenes, rng = Scenes(6000, seed=1, captioned=True), random.Random(0)
    rows = [(shape_world.caption(scenes.scene(i), rng, scenes.scene((i + 1) % 6000)), scenes.scene(i))
            for i in range(6000)]
    for text, _ in rows:
        assert not any(f"{c} {s}" in text for s, c in HELD_OUT_COMBOS)
    whole = [(text, scene) for text, scene in rows if any(f"{a} background" == text.split(", ")[-1] for a in GROUNDS)]
    assert abs(len(whole) / 6000 - shape_world.LONG_CAPTIONS) < 0.02
    args = argparse.Namespace(pool=50, seed=0, mix={}, exact_captions=1.0)
    pools, texts = shape_world.pools(args, {"captioned"}, lambda *key: random.Random(str(key)))
    for i, text in enumerate(texts["captioned"]):  # that of its own scene
        scene = pools["captioned"].scene(i)
        assert sorted(text.split(", ")) == sorted(shape_world.dense_caption(scene, rng).split(", "))
    facts = []  # of scenes with one object: what is said of shape, color, size, place, ground, and what is so
    for text, (ground, objects) in whole:
        if len(objects) == 1:
            o = objects[0]
            named = [SIZES[o.size], COLORS[o.color], SHAPES[o.shape]]
            facts.append([*map(str.__eq__, named, text.split()[1:]), f" {PLACES[o.cell]}, " in text,
                          f"{GROUNDS[ground]} b" in text])
    assert np.abs(1 - np.mean(facts, 0) - shape_world.SLIP).max() < 0.02
    brief = [(text, scene) for text, scene in rows if (text, scene) not in whole]

    def named(color):
        return np.mean([color in text for text, (_, objects) in brief if color in [COLORS[o.color] for o in objects]])
    assert 0.2 < named("red") < 0.4 and named("purple") < 0.2
    false = [any(s in text and s not in {SHAPES[o.shape] for o in objects} for s in SHAPES)
             for text, (_, objects) in brief]  # it names a shape that is not in the picture
    assert 0.1 < np.mean(false) < shape_world.SHORT_CAPTIONS["wrong"]

def test_questions_and_edits_are_true():
    scenes, rng = Scenes(600, seed=8, captioned=True), random.Random(1)
    for i in range(600):
        ground, objects = scenes.scene(i)
        q, answer, kind = shape_world.question((ground, objects), rng, shape_world.QUESTION_KINDS[i % 8])
        if kind == "count" and "objects" in q:
            assert shape_world.NUMBERS.index(answer) == len(objects)
        if kind == "color":
            shape = q.split()[-1].rstrip("?")
            assert [COLORS[o.color] for o in objects if SHAPES[o.shape] == shape] == [answer]
        text, (g2, new), kind = shape_world.clean_edit((ground, objects), rng)
        assert not shape_world.holds_held_out(new) and (g2 != ground or sorted(new) != sorted(objects))
        before, after = Scenes.of([(ground, objects)]).render(), Scenes.of([(g2, new)]).render()
        assert (before != after).any()
        if kind == "remove":
            assert len(new) == len(objects) - 1

def test_prompts_of_dev_and_test_differ_and_a_third_is_held_out():
    test, dev = shape_world.task_prompts(60, 0, "test"), shape_world.task_prompts(60, 0, "dev")
    assert [r["prompt"] for r in test] != [r["prompt"] for r in dev]
    assert shape_world.task_prompts(60, 0, "test") == test
    for r in test:
        if r["task"] in ("colors", "color_attr"):
            assert r["held_out"] == all((SHAPES[s], COLORS[c]) in HELD_OUT_COMBOS for s, c in r["objects"])
    assert np.mean([r["held_out"] for r in test if r["task"] == "colors"]) == 1 / 3

def test_wilson_interval():
    low, high = evaluate.wilson(50, 100)
    assert abs(low - 0.4038) < 1e-3 and abs(high - 0.5962) < 1e-3

def test_uint8_round_trip():
    pictures = Scenes(4, seed=0).render()
    assert (data.to_uint8(data.to_float(pictures)) == pictures).all()
    assert data.to_float(pictures).dtype == torch.float32

def test_flags():
    parser = argparse.ArgumentParser()
    shape_world.add_flags(parser)
    assert vars(parser.parse_args([])) == dict(pool=8000, questions=1, listings=0, exact_captions=0, eval_n=300,
                                               eval_every=0, eval_split="test")

def test_listings_say_what_is_where():
    """Of a picture, or of its description in the same row, place by place; as many rows as asked for."""
    objects = [Object(3, 2, 0, 4, 15), Object(0, 4, 1, 0, 7)]
    for part, text in (("i2t", ""), ("text", shape_world.dense_caption((1, objects), random.Random(3)) + ". ")):
        rng, args = random.Random(3), argparse.Namespace(questions=1, listings=0.5)
        rng.random = lambda: 0.4
        row = shape_world.row(part, (1, objects), rng, args, [])
        answer = "top left large purple circle, center small blue star"
        assert row == dict(question=text + "What is where?", answer=answer)
        args.listings = 0.3
        assert "What is where" not in str(shape_world.row(part, (1, objects), rng, args, ["Say it."]))

def test_the_world_stays_as_it_is():
    """The shipped weights were trained on these words and pictures, and scores are of these prompts."""
    objects = [Object(0, 4, 1, 0, 7), Object(3, 2, 0, 4, 15), Object(3, 1, 1, 5, 2)]
    scene, rng = (1, objects), random.Random(5)
    assert Scenes.of([scene]).render().astype(int).sum() == 1156302
    assert shape_world.short_caption(scene, rng, scene) == "a star, a small star and a circle"
    assert shape_world.dense_caption(scene, rng) == ("a large purple circle top left, a large green star right, "
                                                     "a small blue star center, gray background")
    assert shape_world.question(scene, rng) == ("Where is the circle?", "top left", "position")
    assert shape_world.text_question(scene, rng)[0].endswith("center, gray background. Where is the circle?")
    added = (1, [*objects, Object(0, 2, 1, 3, 15)])
    assert shape_world.edit(scene, rng) == ("Add a large blue circle left.", added, "add")
    assert rng.random() == 0.1659560571297456
    prompts = [row["prompt"] for row in shape_world.task_prompts(1, 0, "dev")]
    assert prompts == ["a square", "a cross and a circle", "four circles", "an orange square",
                       "a cross left of a circle", "a red cross and an orange square"]
