"""The shape world: an endless supply of small pictures whose content is known exactly, so that claims can be checked.

A picture has 48 x 48 pixels: a board of 3 x 3 cells on a ground of one color (4 grounds), with 1-4 objects in cells of
their own. An object has a shape (5), a color (6), a size (2), a cell (9) and a brightness (16 steps, never named in a
text). Pictures are put together from sprites in well under a millisecond; nothing is downloaded.
A scene also gives text: captions with the faults of the web's, complete descriptions, questions with their answers, and
editing instructions. `task_prompts` asks for pictures as GenEval does, and `judge` says what a drawn picture shows.

Held out: 6 of the 30 combinations of shape and color and 2 of the 10 pairs of shapes never occur in captioned pictures
or in edits to be learned. A third of the prompts that can ask for them do: this tests composition. Pictures without
captions hold everything, since an understanding encoder has always seen more than captions name.
Below, a scene is (ground, [Object, ...]), and `rng` is a random.Random: the same seed gives the same text.
"""
import random
from collections import namedtuple
from functools import partial

import numpy as np

CELL, SIDE = 16, 3  # pixels along a cell, cells along the board
MAX_OBJECTS = 4  # of nine cells, so that the ground covers over half of every picture
IMAGE_SIZE = CELL * SIDE
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
GROUNDS = ("white", "gray", "black", "pink")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
NAMES = {"shape": SHAPES, "color": COLORS, "size": SIZES}
# Colors that the judge can tell apart at every brightness (0.8 to 1) and on every ground.
COLOR_RGB = np.array([(220, 40, 40), (40, 165, 70), (40, 80, 225), (240, 220, 40), (140, 55, 180), (250, 140, 25)],
                     np.float32)
GROUND_RGB = np.array([(245, 245, 245), (175, 175, 175), (25, 25, 25), (250, 190, 205)], np.float32)
# Each color is held out with one shape, each shape with one or two colors: captions show all of them, in other company.
HELD_OUT_COMBOS = {("circle", "purple"), ("circle", "yellow"), ("square", "orange"), ("triangle", "blue"),
                   ("star", "green"), ("cross", "red")}
HELD_OUT_PAIRS = {frozenset(("circle", "cross")), frozenset(("square", "star"))}
COMBO_HELD_OUT = np.array([[(s, c) in HELD_OUT_COMBOS for c in COLORS] for s in SHAPES])  # (shape, color)
PAIR_HELD_OUT = np.array([[frozenset((s, t)) in HELD_OUT_PAIRS for t in SHAPES] for s in SHAPES])  # (shape, shape)
# Captions of the web: a third tells everything with few slips, as recaptioned sets do, for without it no model follows
# a long prompt. The rest names little, some things hardly ever, and is often false: there RecA has most to give.
LONG_CAPTIONS, SLIP = 0.35, 0.05  # the share of the long ones; the chance that one of their facts is wrong
SHORT_CAPTIONS = dict(drop_object=0.6, drop_color=0.6, rare_colors=("purple", "orange"), drop_rare_color=0.87,
                      say_size=0.1, say_ground=0.05, say_relation=0.25, say_count=0.5, wrong=0.4)

# ---------------------------------------------------------------------------------------------------------------------
# Scenes and pictures

Object = namedtuple("Object", "shape color size cell shade")  # indices of SHAPES ... PLACES; a brightness from 0 to 15

def _sprites():
    """Alpha masks (shape, size, CELL, CELL), drawn at 8 times the size and averaged, so that edges are anti-aliased."""
    zoom = 8
    v, u = np.meshgrid(*[(np.arange(CELL * zoom) + 0.5) / zoom - CELL / 2] * 2, indexing="ij")
    angle, radius = np.arctan2(u, -v), np.hypot(u, v)
    spoke = np.abs((angle / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2 * np.pi / 5  # angle to the nearest of five tips
    out = np.zeros((len(SHAPES), len(SIZES), CELL, CELL), np.float32)
    for j, r in enumerate((4.6, 6.9)):  # in pixels
        inner, tip = 0.42 * r, 1.12 * r  # a star is five wedges: straight edges from each tip to the notches beside it
        edge = inner * tip * np.sin(np.pi / 5) / (tip * np.sin(spoke) + inner * np.sin(np.pi / 5 - spoke))
        masks = (radius < r, np.maximum(abs(u), abs(v)) < 0.88 * r, (v < 0.8 * r) & (abs(u) * 1.75 < v + 0.98 * r),
                 radius < edge, (np.minimum(abs(u), abs(v)) < 0.3 * r) & (np.maximum(abs(u), abs(v)) < r))
        for i, mask in enumerate(masks):
            out[i, j] = mask.reshape(CELL, zoom, CELL, zoom).mean((1, 3))
    return out

SPRITES = _sprites()

def _pictures(cells):
    """Cells (n, 9, CELL, CELL, 3), floats from 0 to 255 -> uint8 pictures (n, 48, 48, 3)."""
    board = cells.reshape(-1, SIDE, SIDE, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.rint(board).astype(np.uint8).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)

class Scenes:
    """`n` scenes as arrays: ground (n,), count (n,), objects (n, 4, 5) whose columns are Object's; unused rows are -1.
    captioned=True leaves out what is held out. The same (n, seed, captioned) give the same scenes."""

    def __init__(self, n=0, seed=0, captioned=False, ground=None, count=None, objects=None):
        if objects is not None:
            self.ground, self.count, self.objects = ground, count, objects
            return
        rng = np.random.default_rng([seed, int(captioned)])
        draw = partial(rng.integers, size=(n, MAX_OBJECTS))
        self.ground = rng.integers(len(GROUNDS), size=n).astype(np.int8)
        self.count = rng.choice(4, size=n, p=(0.25, 0.35, 0.25, 0.15)).astype(np.int8) + 1
        shape, color = draw(len(SHAPES)), draw(len(COLORS))
        same_shape, same_color = rng.random(n) < 0.35, rng.random(n) < 0.2  # so that there are "three stars" to be seen
        shape[same_shape], color[same_color] = shape[same_shape, :1], color[same_color, :1]
        while captioned and (rows := self._held_out_rows(shape, color)).any():  # a few rounds end it
            size = rows.sum(), MAX_OBJECTS
            shape[rows], color[rows] = rng.integers(len(SHAPES), size=size), rng.integers(len(COLORS), size=size)
            again = rows & same_shape
            shape[again] = shape[again, :1]
        cell = rng.permuted(np.tile(np.arange(SIDE * SIDE), (n, 1)), axis=1)[:, :MAX_OBJECTS]
        self.objects = np.stack([shape, color, draw(len(SIZES)), cell, draw(16)], 2).astype(np.int8)
        self.objects[np.arange(MAX_OBJECTS) >= self.count[:, None]] = -1

    def _held_out_rows(self, shape, color):
        """Which scenes (n,) hold something held out; shape, color: (n, 4), those of unused objects included."""
        used = np.arange(MAX_OBJECTS) < self.count[:, None]
        pairs = PAIR_HELD_OUT[shape[:, :, None], shape[:, None, :]] & used[:, None, :]  # (n, 4, 4)
        return ((COMBO_HELD_OUT[shape, color] | pairs.any(2)) & used).any(1)

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        index = np.atleast_1d(index)
        return Scenes(ground=self.ground[index], count=self.count[index], objects=self.objects[index])

    def scene(self, i):
        """(ground, [Object, ...]) of scene i, in plain Python integers."""
        return int(self.ground[i]), [Object(*o) for o in self.objects[i, :self.count[i]].tolist()]

    @staticmethod
    def of(scenes):
        """The opposite of `scene`: a list of (ground, objects) -> Scenes."""
        objects = np.full((len(scenes), MAX_OBJECTS, 5), -1, np.int8)
        for i, (_, these) in enumerate(scenes):
            if these:
                objects[i, :len(these)] = these
        return Scenes(ground=np.array([ground for ground, _ in scenes], np.int8),
                      count=np.array([len(these) for _, these in scenes], np.int8), objects=objects)

    def render(self):
        """uint8 pictures (n, 48, 48, 3)."""
        n = len(self)
        cells = np.broadcast_to(GROUND_RGB[self.ground][:, None, None, None], (n, SIDE * SIDE, CELL, CELL, 3)).copy()
        for k in range(MAX_OBJECTS):
            rows = np.flatnonzero(self.count > k)
            shape, color, size, cell, shade = self.objects[rows, k].astype(np.int64).T
            alpha = SPRITES[shape, size][..., None]
            rgb = COLOR_RGB[color] * (0.8 + 0.2 * shade[:, None] / 15)
            cells[rows, cell] = cells[rows, cell] * (1 - alpha) + rgb[:, None, None] * alpha
        return _pictures(cells)

def crowded_pictures(n, seed):
    """uint8 pictures (n, 48, 48, 3), every cell filled with probability 0.7: more to learn for an image tokenizer."""
    rng = np.random.default_rng([seed, 7])
    draw = partial(rng.integers, size=(n, SIDE * SIDE))
    ground = GROUND_RGB[rng.integers(len(GROUNDS), size=n)][:, None, None, None]
    alpha = SPRITES[draw(len(SHAPES)), draw(len(SIZES))] * (rng.random((n, SIDE * SIDE, 1, 1)) < 0.7)
    rgb = COLOR_RGB[draw(len(COLORS))] * (0.8 + 0.2 * draw(16)[..., None] / 15)
    return _pictures(ground * (1 - alpha[..., None]) + rgb[:, :, None, None] * alpha[..., None])

def holds_held_out(objects):
    """True if the objects hold a combination or a pair that captioned pictures never show."""
    return (any(COMBO_HELD_OUT[o.shape, o.color] for o in objects)
            or any(PAIR_HELD_OUT[o.shape, p.shape] for o in objects for p in objects))

def relation(cell, other):
    """Where `cell` lies, seen from the cell `other`: one of RELATIONS if one direction clearly dominates, else None."""
    dy, dx = cell // SIDE - other // SIDE, cell % SIDE - other % SIDE
    if abs(dx) == abs(dy):
        return None
    return RELATIONS[int(dx > 0)] if abs(dx) > abs(dy) else RELATIONS[2 + int(dy > 0)]

# ---------------------------------------------------------------------------------------------------------------------
# Captions

def a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words

def plural(noun):
    return noun + ("es" if noun.endswith("cross") else "s")

def name(shape, color=None):
    return SHAPES[shape] if color is None else f"{COLORS[color]} {SHAPES[shape]}"

def full_name(o):
    return f"{SIZES[o.size]} {name(o.shape, o.color)}"

def caption(scene, rng, other, exact=0.0):
    """A caption as web data has them: a long one or a short one. other: another scene, whose caption this may be.
    exact: the share of captions that say everything, and nothing that is wrong."""
    if exact and rng.random() < exact:
        return dense_caption(scene, rng)
    if rng.random() < LONG_CAPTIONS:
        return dense_caption(with_slips(scene, rng), rng)
    return short_caption(scene, rng, other)

def with_slips(scene, rng):
    """The scene of somebody who gets each fact wrong with the chance SLIP, but never names what is held out."""
    ground, objects = scene
    objects, values = list(objects), dict(shape=len(SHAPES), color=len(COLORS), size=len(SIZES), cell=SIDE * SIDE)
    for i in range(len(objects)):
        for field, n in values.items():
            if rng.random() < SLIP:
                taken = [o.cell for o in objects] if field == "cell" else [getattr(objects[i], field)]
                slip = objects[i]._replace(**{field: rng.choice([k for k in range(n) if k not in taken])})
                if not holds_held_out([*objects[:i], slip, *objects[i + 1:]]):
                    objects[i] = slip
    if rng.random() < SLIP:
        ground = rng.choice([g for g in range(len(GROUNDS)) if g != ground])
    return ground, objects

def short_caption(scene, rng, other, bias=SHORT_CAPTIONS):
    """Much is left out, and with the chance bias["wrong"] it is false: half of those are captions of `other`, another
    scene; in the rest a shape or a color is drawn anew, unless the result is held out."""
    ground, objects = scene
    if rng.random() < bias["wrong"]:
        if rng.random() < 0.5:
            ground, objects = other
        else:
            i, field = rng.randrange(len(objects)), rng.choice(("shape", "color"))
            swapped = list(objects)
            swapped[i] = objects[i]._replace(**{field: rng.randrange(len(NAMES[field]))})
            if not holds_held_out(swapped):
                objects = swapped
    objects = rng.sample(objects, len(objects))
    while len(objects) > 1 and rng.random() < bias["drop_object"]:
        objects.pop()

    def noun(o):
        size = SIZES[o.size] + " " if rng.random() < bias["say_size"] else ""
        drop = bias["drop_rare_color"] if COLORS[o.color] in bias["rare_colors"] else bias["drop_color"]
        return size + name(o.shape, None if rng.random() < drop else o.color)
    first = objects[0]
    of_one_shape = len(objects) > 1 and all(o.shape == first.shape for o in objects)
    if of_one_shape and rng.random() < bias["say_count"]:
        of_one_color = all(o.color == first.color for o in objects)
        text = f"{NUMBERS[len(objects)]} {plural(noun(first) if of_one_color else name(first.shape))}"
    elif (len(objects) == 2 and rng.random() < bias["say_relation"] * 2
          and (where := relation(first.cell, objects[1].cell))):
        text = f"{a(noun(first))} {where} {a(noun(objects[1]))}"
    else:
        names = [a(noun(o)) for o in objects]
        text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return text + (f" on a {GROUNDS[ground]} background" if rng.random() < bias["say_ground"] else "")

def dense_caption(scene, rng):
    """Everything there is to say (except brightness), objects in random order."""
    ground, objects = scene
    parts = [f"{a(full_name(o))} {PLACES[o.cell]}" for o in rng.sample(objects, len(objects))]
    return ", ".join(parts) + f", {GROUNDS[ground]} background"

# ---------------------------------------------------------------------------------------------------------------------
# Questions and edits

QUESTION_KINDS = ("color", "shape", "count", "position", "size", "ground", "exists", "relation")

def question(scene, rng, kind=None):
    """(question, answer, kind) with an answer of one or two words that the scene determines. `kind` is tried first;
    where the scene has no such question, the others follow in random order."""
    ground, objects = scene
    shapes, colors = [o.shape for o in objects], [o.color for o in objects]
    alone = [o for o in objects if shapes.count(o.shape) == 1]  # "the star" must mean one object
    for kind in ([kind] if kind else []) + rng.sample(QUESTION_KINDS, len(QUESTION_KINDS)):
        if kind == "ground":
            return "What color is the background?", GROUNDS[ground], kind
        if kind == "count":
            if rng.random() < 0.4:
                return "How many objects are there?", NUMBERS[len(objects)], kind
            shape = rng.choice(shapes) if rng.random() < 0.7 else rng.randrange(len(SHAPES))
            return f"How many {plural(SHAPES[shape])} are there?", NUMBERS[shapes.count(shape)], kind
        if kind == "exists":
            combos = list(zip(shapes, colors))
            asked = rng.choice(combos) if rng.random() < 0.5 else (rng.choice(shapes), rng.randrange(len(COLORS)))
            return f"Is there {a(name(*asked))}?", "yes" if asked in combos else "no", kind
        if kind == "shape" and (single := [o for o in objects if colors.count(o.color) == 1]):
            one = rng.choice(single)
            return f"What shape is the {COLORS[one.color]} object?", SHAPES[one.shape], kind
        if kind == "relation" and len(alone) >= 2:
            one, other = rng.sample(alone, 2)
            if where := relation(one.cell, other.cell):
                asked = where if rng.random() < 0.5 else rng.choice(RELATIONS)
                text = f"Is the {SHAPES[one.shape]} {asked} the {SHAPES[other.shape]}?"
                return text, "yes" if asked == where else "no", kind
        if kind in ("color", "position", "size") and alone:
            one = rng.choice(alone)
            asked, answer = {"color": ("What color is", COLORS[one.color]), "position": ("Where is", PLACES[one.cell]),
                             "size": ("What size is", SIZES[one.size])}[kind]
            return f"{asked} the {SHAPES[one.shape]}?", answer, kind

def text_question(scene, rng):
    """(text and question, answer) about a WRITTEN scene: what a real model's language part has learned before."""
    ground, objects = scene
    if (len(objects) >= 2 and rng.random() < 0.5 and (where := relation(objects[0].cell, objects[1].cell))
            and objects[0].shape != objects[1].shape):
        one, other = objects[:2]
        text = f"{a(name(one.shape, one.color))} {where} {a(name(other.shape, other.color))}"
        asked, answer = rng.choice([(f"What color is the {SHAPES[one.shape]}?", COLORS[one.color]),
                                    (f"What color is the {SHAPES[other.shape]}?", COLORS[other.color]),
                                    (f"What is {where} the {SHAPES[other.shape]}?", SHAPES[one.shape]),
                                    ("How many objects are there?", "two")])
    else:
        text = dense_caption(scene, rng)
        asked, answer, _ = question(scene, rng)
    return f"{text}. {asked}", answer

def listing(scene, rng, written):
    """(question, answer): what is where, place by place, of a picture or of its written description."""
    objects = sorted(scene[1], key=lambda o: o.cell)
    text = dense_caption(scene, rng) + ". " if written else ""
    return text + "What is where?", ", ".join(f"{PLACES[o.cell]} {full_name(o)}" for o in objects)

def edit(scene, rng):
    """(instruction, edited scene, kind): one change; the rest of the picture stays pixel for pixel."""
    ground, objects = scene
    shapes = [o.shape for o in objects]
    alone = [o for o in objects if shapes.count(o.shape) == 1]
    kind = rng.choice(("color", "shape", "remove", "add", "ground", "size"))
    possible = len(objects) < MAX_OBJECTS if kind == "add" else alone and (kind != "remove" or len(objects) > 1)
    if kind == "ground" or not possible:
        new = rng.choice([g for g in range(len(GROUNDS)) if g != ground])
        return f"Make the background {GROUNDS[new]}.", (new, list(objects)), "ground"
    if kind == "add":
        cell = rng.choice([c for c in range(SIDE * SIDE) if c not in [o.cell for o in objects]])
        new = Object(rng.randrange(len(SHAPES)), rng.randrange(len(COLORS)), rng.randrange(len(SIZES)), cell, 15)
        return f"Add {a(full_name(new))} {PLACES[cell]}.", (ground, [*objects, new]), kind
    old = rng.choice(alone)
    the = "the " + name(old.shape, old.color if rng.random() < 0.5 else None)
    if kind == "remove":
        return f"Remove {the}.", (ground, [o for o in objects if o is not old]), kind
    value = rng.choice([k for k in range(len(NAMES[kind])) if k != getattr(old, kind)])
    new = old._replace(**{kind: value})
    text = f"Replace {the} with {a(SHAPES[value])}." if kind == "shape" else f"Make {the} {NAMES[kind][value]}."
    return text, (ground, [new if o is old else o for o in objects]), kind

def clean_edit(scene, rng):
    """An edit whose result holds nothing that is held out, for training: instructions are captions too."""
    while True:
        text, new, kind = edit(scene, rng)
        if not holds_held_out(new[1]):
            return text, new, kind

# ---------------------------------------------------------------------------------------------------------------------
# Prompts for judged pictures

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

def task_prompts(per_task, seed, split="test"):
    """GenEval's six tasks in the shape world: a list of 6 * per_task dicts.
    Keys: task, prompt, held_out (asks for what no caption names together) and what `fulfils` looks for: objects
    [(shape, color or None), ...] and a count or relation. split: "dev" to choose settings, "test" for the report."""
    rng = random.Random(f"prompts-{split}-{seed}")
    all_shapes, all_colors = range(len(SHAPES)), range(len(COLORS))
    out = []
    for task in TASKS:
        for i in range(per_task):
            shape, _ = rng.sample(all_shapes, 2)
            rng.sample(all_colors, 2)  # not used, but it is part of the stream of random numbers that makes the prompts
            want = i % 3 == 0  # a third of the prompts ask for what is held out, where the task has such a thing
            combos = [(s, c) for s in all_shapes for c in all_colors if COMBO_HELD_OUT[s, c] == want]
            pairs = [(s, t) for s in all_shapes for t in all_shapes if s != t and PAIR_HELD_OUT[s, t] == want]
            row = dict(task=task, held_out=want and task not in ("single_object", "counting"))
            if task in ("single_object", "counting"):
                objects = [(shape, None)]
            elif task in ("two_object", "position"):
                objects = [(s, None) for s in rng.choice(pairs)]
            else:
                objects = [rng.choice(combos)]
            if task == "color_attr":
                shape, color = objects[0]
                objects.append(rng.choice([(s, c) for s, c in combos if s != shape and c != color]))
            link = "and"
            if task == "position":
                link = row["relation"] = rng.choice(RELATIONS)
            row.update(objects=objects, prompt=f" {link} ".join(a(name(*what)) for what in objects))
            if task == "counting":
                row["count"] = rng.randint(2, 4)
                row["prompt"] = f"{NUMBERS[row['count']]} {plural(name(shape))}"
            out.append(row)
    return out

def long_prompts(n, seed, split="test"):
    """Complete descriptions, as DPG-Bench's prompts are: n prompts and their Scenes, of all combinations."""
    scenes = Scenes(n, seed=93_000 + seed + 500_000 * (split == "dev"))
    rng = random.Random(f"long-{split}-{seed}")
    return [dense_caption(scenes.scene(i), rng) for i in range(n)], scenes

# ---------------------------------------------------------------------------------------------------------------------
# The judge

def judge(images):
    """What is in each picture: images uint8 (n, 48, 48, 3) -> for each picture a list of (shape, color, size, cell).
    Shape or color is -1 where something is there but fits no sprite or no color of the palette. Every cell is fitted
    by ground + alpha * (color - ground) for all ten sprites (shape, size) at once: with y = pixels - ground, the best
    color of a sprite is a least-squares projection, which explains the energy (alpha . y)^2 / alpha . alpha."""
    n = len(images)
    pixels = images.astype(np.float32)
    ground = np.median(pixels.reshape(n, -1, 3), axis=1)  # (n, 3); objects cover less than half of a picture
    y = (pixels - ground[:, None, None]).reshape(n, SIDE, CELL, SIDE, CELL, 3)
    y = y.transpose(0, 1, 3, 5, 2, 4).reshape(n * SIDE * SIDE, 3, CELL * CELL)
    alpha = SPRITES.reshape(-1, CELL * CELL)  # (10, 256)
    norm = (alpha**2).sum(1)
    energy = (y**2).sum((1, 2))
    filled = np.flatnonzero(energy / (3 * CELL * CELL) > 14.0**2)  # f cells with over 14 gray levels RMS
    dot = y[filled] @ alpha.T  # (f, 3, 10)
    explained = (dot**2).sum(1) / norm
    best = explained.argmax(1)
    rows = np.arange(len(filled))
    rgb = ground[filled // (SIDE * SIDE)] + dot[rows, :, best] / norm[best, None]
    shade = np.clip((rgb @ COLOR_RGB.T) / (COLOR_RGB**2).sum(1), 0.75, 1.0)  # the brightness that fits each color best
    distance = np.linalg.norm(rgb[:, None] - shade[..., None] * COLOR_RGB, axis=2)  # (f, colors)
    color = np.where(distance.min(1) < 70, distance.argmin(1), -1)
    shape, size = best // len(SIZES), best % len(SIZES)
    shape = np.where(explained[rows, best] / energy[filled] > 0.8, shape, -1)  # it explains 80 % of the energy
    found = [[] for _ in range(n)]
    for cell, *what in zip(filled.tolist(), shape.tolist(), color.tolist(), size.tolist()):
        found[cell // (SIDE * SIDE)].append((*what, cell % (SIDE * SIDE)))
    return found

def fulfils(found, row):
    """Does a judged picture show what a row of `task_prompts` asks for? found: what `judge` says of one picture.
    GenEval's rules: everything named must be there, counts must be exact, more may be there. But a picture with more
    objects than this world ever holds fails, or a board full of random objects would fulfil many prompts."""
    if len(found) > MAX_OBJECTS:
        return False
    cells = [[cell for s, c, _, cell in found if s == shape and color in (None, c)] for shape, color in row["objects"]]
    if "count" in row:
        return len(cells[0]) == row["count"]
    if "relation" in row:
        return any(relation(cell, other) == row["relation"] for cell in cells[0] for other in cells[1])
    return all(cells)

def same_objects(found, scene):
    """Intersection over union of a scene's objects and those that `judge` found, told by shape, color and cell."""
    truth = {(o.shape, o.color, o.cell) for o in scene[1]}
    got = {(shape, color, cell) for shape, color, _, cell in found}
    return len(truth & got) / max(1, len(truth | got))

# ---------------------------------------------------------------------------------------------------------------------
# What train.py trains on

def pools(args, need, text_rng):
    """-> {pool: scenes or pictures} and {pool: texts}, of the pools named in `need`; text_rng(...): a random.Random."""
    sources, texts = {}, {}
    if "crowded" in need:
        sources["crowded"] = crowded_pictures(args.pool, seed=args.seed)
    if "broad" in need or "text" in args.mix:
        sources["broad"] = Scenes(args.pool, seed=10 + args.seed)
    if "captioned" in need:
        scenes = sources["captioned"] = Scenes(args.pool, seed=20 + args.seed, captioned=True)
        texts["captioned"] = [caption(scenes.scene(i), text_rng(args.seed, i, "caption"),
                                      scenes.scene((i + 1) % args.pool), args.exact_captions) for i in range(args.pool)]
    if "edits" in need:
        scenes = sources["edit_sources"] = Scenes(args.pool, seed=30 + args.seed, captioned=True)
        edits = [clean_edit(scenes.scene(i), text_rng(args.seed, i, "edit")) for i in range(len(scenes))]
        texts["edits"], sources["edits"] = [e[0] for e in edits], Scenes.of([e[1] for e in edits])
    return sources, texts

def row(part, scene, rng, args, requests):
    """What a row of "words", "text" or "i2t" says of a scene. Rows stay short: a CPU trains them fast. args: the flags
    below; requests: what asks for a description."""
    if part == "words":  # all there is to say: what is not said is not in the picture
        return {"caption": dense_caption(scene, rng)}
    if args.listings and rng.random() < args.listings:
        return dict(zip(("question", "answer"), listing(scene, rng, part == "text")))
    if part == "text":
        return dict(zip(("question", "answer"), text_question((scene[0], scene[1][:2]), rng)))
    if len(scene[1]) <= 2 and rng.random() < 0.4:
        return {"question": rng.choice(requests), "answer": dense_caption(scene, rng)}
    return {"turns": [question(scene, rng)[:2] for _ in range(args.questions)]}

# ---------------------------------------------------------------------------------------------------------------------
# The flags of train.py that belong to this world

def add_flags(parser):
    """Adds them to an argparse parser, as one group."""
    add = parser.add_argument_group("shape world (practice pictures, used where no data is given)").add_argument
    add("--pool", type=int, default=8000, metavar="N", help="pictures per pool (default 8000)")
    add("--questions", type=int, default=1, metavar="N", help="questions about a picture in one row (default 1)")
    add("--listings", type=float, default=0.0, metavar="SHARE", help="of the rows with questions, how many ask for all "
        "that is in a picture or a text, place by place (default 0)")
    add("--exact-captions", type=float, default=0.0, metavar="SHARE", help="captions with all there is to say and "
        "without a fault (default 0)")
    add("--eval-n", type=int, default=300, metavar="N", help="pictures judged before and after (default 300; 0: none)")
    add("--eval-every", type=int, default=0, metavar="N", help="also judge every N steps (default 0: never)")
    add("--eval-split", choices=("dev", "test"), default="test", help="dev: prompts to choose settings (default test)")
