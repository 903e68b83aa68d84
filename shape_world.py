"""The shape world: an endless supply of pictures whose content is known exactly."""
import random

import numpy as np

# ----------------------------------------------------------------------------------------------------------------------
# The shape world: an endless supply of pictures whose content is known exactly. 48x48 pixels, a 3x3 board of 16-pixel
# cells, 1-4 objects (shape, colour, size, cell, brightness) on a plain ground. Rendering pastes
# pre-drawn sprites (0.1-0.2 ms a picture), so no file is ever downloaded.
CELL, SIDE, MAX_OBJECTS = 16, 3, 4
IMAGE_SIZE = CELL * SIDE
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
GROUNDS = ("white", "gray", "black", "pink")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
NUMBERS = ("zero", "one", "two", "three", "four")
RELATIONS = ("left of", "right of", "above", "below")
COLOR_RGB = np.array([(220, 40, 40), (40, 165, 70), (40, 80, 225), (240, 220, 40), (140, 55, 180), (250, 140, 25)], np.float32)
GROUND_RGB = np.array([(245, 245, 245), (175, 175, 175), (25, 25, 25), (250, 190, 205)], np.float32)
# Never drawn in captioned (text-to-image) pictures, so that a prompt that asks for them tests composition. The unlabelled
# pool and the understanding data hold everything: an understanding encoder has always seen more than captions name.
HELD_OUT_COMBOS = {("circle", "purple"), ("square", "orange"), ("triangle", "blue"), ("star", "green"), ("cross", "red"), ("circle", "yellow")}
HELD_OUT_PAIRS = {frozenset(("circle", "cross")), frozenset(("square", "star"))}
# Web captions name some things rarely and are sometimes wrong. These numbers are that bias, written down once.
CAPTION_BIAS = dict(drop_object=0.25, drop_color=0.25, rare_colors=("purple", "orange"), drop_rare_color=0.75, say_size=0.1,
                    say_ground=0.05, say_relation=0.25, say_count=0.5, wrong=0.15)
CLEAN_CAPTIONS = dict(CAPTION_BIAS, drop_object=0.0, drop_color=0.0, drop_rare_color=0.0, wrong=0.0)  # what could be said, were captions true and complete


def _sprites():
    """Alpha masks (shape, size, CELL, CELL), drawn at 8x and averaged, so that edges are anti-aliased."""
    s = 8
    v, u = np.meshgrid(*[(np.arange(CELL * s) + 0.5) / s - CELL / 2] * 2, indexing="ij")
    angle, radius = np.arctan2(u, -v), np.hypot(u, v)
    spoke = np.abs((angle / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2 * np.pi / 5  # angle to the nearest of five tips
    out = np.zeros((len(SHAPES), len(SIZES), CELL, CELL), np.float32)
    for j, r in enumerate((4.6, 6.9)):
        inner, tip = 0.42 * r, 1.12 * r  # a star is five wedges: straight edges from each tip to the notches beside it
        edge = inner * tip * np.sin(np.pi / 5) / (tip * np.sin(spoke) + inner * np.sin(np.pi / 5 - spoke))
        masks = (radius < r, np.maximum(abs(u), abs(v)) < 0.88 * r, (v < 0.8 * r) & (abs(u) * 1.75 < v + 0.98 * r),
                 radius < edge, (np.minimum(abs(u), abs(v)) < 0.3 * r) & (np.maximum(abs(u), abs(v)) < r))
        for i, m in enumerate(masks):
            out[i, j] = m.reshape(CELL, s, CELL, s).mean((1, 3))
    return out


SPRITES = _sprites()


class Scenes:
    """`n` scenes as arrays: ground (n,), count (n,), objects (n, 4, 5) with columns shape, color, size, cell, shade (0-15); unused rows
    are -1. captioned=True leaves out the held-out combinations and pairs. Same (n, seed, captioned) -> same scenes."""

    def __init__(self, n=0, seed=0, captioned=False, ground=None, count=None, objects=None):
        if objects is not None:
            self.ground, self.count, self.objects = ground, count, objects
            return
        rng = np.random.default_rng([seed, int(captioned)])
        self.ground = rng.integers(len(GROUNDS), size=n).astype(np.int8)
        self.count = rng.choice(4, size=n, p=(0.25, 0.35, 0.25, 0.15)).astype(np.int8) + 1
        draw = lambda k: rng.integers(k, size=(n, MAX_OBJECTS))
        shape, color = draw(len(SHAPES)), draw(len(COLORS))
        same_shape, same_color = rng.random(n) < 0.35, rng.random(n) < 0.2  # so that "three stars" is something to be seen
        shape[same_shape], color[same_color] = shape[same_shape, :1], color[same_color, :1]
        if captioned:  # redraw what the captioned set must not hold (vectorised rejection: a few rounds end it)
            combo = np.array([[(s, c) in HELD_OUT_COMBOS for c in COLORS] for s in SHAPES])
            pair = np.array([[frozenset((s, t)) in HELD_OUT_PAIRS for t in SHAPES] for s in SHAPES])
            while True:
                used = np.arange(MAX_OBJECTS) < self.count[:, None]
                bad = combo[shape, color] & used
                bad |= (pair[shape[:, :, None], shape[:, None, :]] & used[:, None, :]).any(2) & used
                rows = bad.any(1)
                if not rows.any():
                    break
                shape[rows], color[rows] = rng.integers(len(SHAPES), size=(rows.sum(), MAX_OBJECTS)), rng.integers(len(COLORS), size=(rows.sum(), MAX_OBJECTS))
                again = rows & same_shape
                shape[again] = shape[again, :1]
        cell = rng.permuted(np.tile(np.arange(SIDE * SIDE), (n, 1)), axis=1)[:, :MAX_OBJECTS]
        self.objects = np.stack([shape, color, draw(len(SIZES)), cell, draw(16)], 2).astype(np.int8)
        self.objects[np.arange(MAX_OBJECTS) >= self.count[:, None]] = -1

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        index = np.atleast_1d(index)
        return Scenes(ground=self.ground[index], count=self.count[index], objects=self.objects[index])

    def scene(self, i):
        """(ground, [(shape, color, size, cell, shade), ...]) of scene i as plain Python integers."""
        return int(self.ground[i]), [tuple(o) for o in self.objects[i, :self.count[i]].tolist()]

    @staticmethod
    def of(scenes):
        """The opposite of `scene`: a list of (ground, objects) back to arrays."""
        objects = np.full((len(scenes), MAX_OBJECTS, 5), -1, np.int8)
        for i, (_, obs) in enumerate(scenes):
            if obs:
                objects[i, :len(obs)] = obs
        return Scenes(ground=np.array([g for g, _ in scenes], np.int8), count=np.array([len(o) for _, o in scenes], np.int8), objects=objects)

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
        board = cells.reshape(n, SIDE, SIDE, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
        return np.rint(board).astype(np.uint8).reshape(n, IMAGE_SIZE, IMAGE_SIZE, 3)


def holds_held_out(objects):
    """True if the objects hold a combination or pair that captioned pictures never show."""
    shapes = {SHAPES[o[0]] for o in objects}
    return any((SHAPES[o[0]], COLORS[o[1]]) in HELD_OUT_COMBOS for o in objects) or any(p <= shapes for p in HELD_OUT_PAIRS)


def crowded_pictures(n, seed):
    """uint8 pictures (n, 48, 48, 3) with every cell filled with probability 0.7: what the image tokenizers train on (four times the objects of a scene)."""
    rng = np.random.default_rng([seed, 7])
    ground = GROUND_RGB[rng.integers(len(GROUNDS), size=n)][:, None, None, None]
    draw = lambda k: rng.integers(k, size=(n, SIDE * SIDE))
    alpha = SPRITES[draw(len(SHAPES)), draw(len(SIZES))] * (rng.random((n, SIDE * SIDE, 1, 1)) < 0.7)
    rgb = COLOR_RGB[draw(len(COLORS))] * (0.8 + 0.2 * draw(16)[..., None] / 15)
    cells = ground * (1 - alpha[..., None]) + rgb[:, :, None, None] * alpha[..., None]
    board = cells.reshape(n, SIDE, SIDE, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.rint(board).astype(np.uint8).reshape(n, IMAGE_SIZE, IMAGE_SIZE, 3)


def a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def relation(a_cell, b_cell):
    """The relation of cell a to cell b where one direction clearly dominates, else None."""
    dy, dx = a_cell // SIDE - b_cell // SIDE, a_cell % SIDE - b_cell % SIDE
    if abs(dx) == abs(dy):
        return None
    return RELATIONS[int(dx > 0)] if abs(dx) > abs(dy) else RELATIONS[2 + int(dy > 0)]


def sparse_caption(scene, rng, bias=CAPTION_BIAS, other=None):
    """A caption as the web writes them: objects, colours, sizes and grounds left out, some named rarely, and with probability bias["wrong"] false
    (half the time an attribute is swapped, half the time it is the caption of `other`, another scene). rng: random.Random."""
    ground, objects = scene
    if rng.random() < bias["wrong"]:
        if other is not None and rng.random() < 0.5:
            ground, objects = other
        else:
            i, column = rng.randrange(len(objects)), rng.randrange(2)
            o = list(objects[i])
            o[column] = rng.randrange((len(SHAPES), len(COLORS))[column])
            swapped = objects[:i] + [tuple(o)] + objects[i + 1:]
            if not holds_held_out(swapped):
                objects = swapped
    objects = rng.sample(objects, len(objects))
    while len(objects) > 1 and rng.random() < bias["drop_object"]:
        objects.pop()

    def noun(o, plural=False):
        color = COLORS[o[1]]
        drop = bias["drop_rare_color"] if color in bias["rare_colors"] else bias["drop_color"]
        words = ([SIZES[o[2]]] if rng.random() < bias["say_size"] else []) + ([] if rng.random() < drop else [color])
        return " ".join(words + [SHAPES[o[0]] + ("es" if plural and SHAPES[o[0]] == "cross" else "s" if plural else "")])

    kinds = {o[0] for o in objects}
    if len(objects) > 1 and len(kinds) == 1 and rng.random() < bias["say_count"]:
        same = len({o[1] for o in objects}) == 1
        text = NUMBERS[len(objects)] + " " + (noun(objects[0], True) if same else SHAPES[objects[0][0]] + ("es" if SHAPES[objects[0][0]] == "cross" else "s"))
    elif len(objects) == 2 and rng.random() < bias["say_relation"] * 2 and relation(objects[0][3], objects[1][3]):
        text = f"{a(noun(objects[0]))} {relation(objects[0][3], objects[1][3])} {a(noun(objects[1]))}"
    else:
        names = [a(noun(o)) for o in objects]
        text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return text + (f" on a {GROUNDS[ground]} background" if rng.random() < bias["say_ground"] else "")


def full_name(o):
    return f"{SIZES[o[2]]} {COLORS[o[1]]} {SHAPES[o[0]]}"


def dense_caption(scene, rng):
    """Everything there is to say (except brightness), objects in random order."""
    ground, objects = scene
    parts = [f"{a(full_name(o))} {PLACES[o[3]]}" for o in rng.sample(objects, len(objects))]
    return ", ".join(parts) + f", {GROUNDS[ground]} background"


QUESTION_KINDS = ("color", "shape", "count", "position", "size", "ground", "exists", "relation")


def question(scene, rng, kind=None):
    """(question, answer, kind) with a one- or two-word answer that the scene determines. `kind` is tried first; where the scene has no such question, another."""
    ground, objects = scene
    shapes, combos = [o[0] for o in objects], [(o[0], o[1]) for o in objects]
    unique = [o for o in objects if shapes.count(o[0]) == 1]
    kinds = rng.sample(QUESTION_KINDS, len(QUESTION_KINDS))
    for kind in ([kind] if kind else []) + kinds:
        if kind == "ground":
            return "What color is the background?", GROUNDS[ground], kind
        if kind == "count":
            if rng.random() < 0.4:
                return "How many objects are there?", NUMBERS[len(objects)], kind
            s = rng.choice(shapes) if rng.random() < 0.7 else rng.randrange(len(SHAPES))
            return f"How many {SHAPES[s]}{'es' if SHAPES[s] == 'cross' else 's'} are there?", NUMBERS[shapes.count(s)], kind
        if kind == "exists":
            s, c = rng.choice(combos) if rng.random() < 0.5 else (rng.choice(shapes), rng.randrange(len(COLORS)))
            return f"Is there {a(COLORS[c] + ' ' + SHAPES[s])}?", "yes" if (s, c) in combos else "no", kind
        if kind == "shape":
            single = [o for o in objects if sum(p[1] == o[1] for p in objects) == 1]
            if single:
                o = rng.choice(single)
                return f"What shape is the {COLORS[o[1]]} object?", SHAPES[o[0]], kind
        elif kind == "relation":
            if len(unique) >= 2:
                o, p = rng.sample(unique, 2)
                if relation(o[3], p[3]):
                    asked = relation(o[3], p[3]) if rng.random() < 0.5 else rng.choice(RELATIONS)
                    return f"Is the {SHAPES[o[0]]} {asked} the {SHAPES[p[0]]}?", "yes" if asked == relation(o[3], p[3]) else "no", kind
        elif unique:
            o = rng.choice(unique)
            if kind == "color":
                return f"What color is the {SHAPES[o[0]]}?", COLORS[o[1]], kind
            if kind == "position":
                return f"Where is the {SHAPES[o[0]]}?", PLACES[o[3]], kind
            return f"What size is the {SHAPES[o[0]]}?", SIZES[o[2]], kind


def text_question(scene, rng):
    """A question about a WRITTEN scene: what a pre-trained language model brings to a real unified model."""
    ground, objects = scene
    if len(objects) >= 2 and rng.random() < 0.5 and relation(objects[0][3], objects[1][3]) and objects[0][0] != objects[1][0]:
        o, p = objects[:2]
        text = f"{a(COLORS[o[1]] + ' ' + SHAPES[o[0]])} {relation(o[3], p[3])} {a(COLORS[p[1]] + ' ' + SHAPES[p[0]])}"
        q, answer, _ = rng.choice([(f"What color is the {SHAPES[x[0]]}?", COLORS[x[1]], 0) for x in (o, p)]
                                  + [(f"What is {relation(o[3], p[3])} the {SHAPES[p[0]]}?", SHAPES[o[0]], 0), ("How many objects are there?", "two", 0)])
    else:
        text = dense_caption(scene, rng)
        q, answer, _ = question(scene, rng)
    return f"{text}. {q}", answer


def edit(scene, rng):
    """(instruction, edited scene, kind): one change, the rest of the picture stays pixel for pixel."""
    ground, objects = scene
    shapes = [o[0] for o in objects]
    unique = [i for i, o in enumerate(objects) if shapes.count(o[0]) == 1]
    kind = rng.choice(("color", "shape", "remove", "add", "ground", "size"))
    new = [list(o) for o in objects]
    if kind == "ground" or (kind != "add" and not unique) or (kind == "remove" and len(objects) == 1) or (kind == "add" and len(objects) == MAX_OBJECTS):
        g = rng.choice([k for k in range(len(GROUNDS)) if k != ground])
        return f"Make the background {GROUNDS[g]}.", (g, list(objects)), "ground"
    if kind == "add":
        cell = rng.choice([c for c in range(SIDE * SIDE) if c not in [o[3] for o in objects]])
        o = (rng.randrange(len(SHAPES)), rng.randrange(len(COLORS)), rng.randrange(2), cell, 15)
        return f"Add {a(full_name(o))} {PLACES[cell]}.", (ground, list(objects) + [o]), kind
    i = rng.choice(unique)
    name = f"the {COLORS[new[i][1]]} {SHAPES[new[i][0]]}" if rng.random() < 0.5 else f"the {SHAPES[new[i][0]]}"
    if kind == "remove":
        del new[i]
        return f"Remove {name}.", (ground, [tuple(o) for o in new]), kind
    column, names = {"color": (1, COLORS), "shape": (0, SHAPES), "size": (2, SIZES)}[kind]
    value = rng.choice([k for k in range(len(names)) if k != new[i][column]])
    new[i][column] = value
    text = f"Replace {name} with {a(SHAPES[value])}." if kind == "shape" else f"Make {name} {names[value]}."
    return text, (ground, [tuple(o) for o in new]), kind


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def task_prompts(per_task, seed, split="test"):
    """GenEval's six tasks in the shape world: a list of dicts task, prompt, held_out (asks for something that no caption ever named together) and what the
    judge checks. `split` "dev" is for choosing settings, "test" for reported numbers; they differ in their random stream."""
    rng = random.Random(f"prompts-{split}-{seed}")
    out = []
    plural = lambda s: SHAPES[s] + ("es" if SHAPES[s] == "cross" else "s")
    for task in TASKS:
        for i in range(per_task):
            s, t = rng.sample(range(len(SHAPES)), 2)
            c, d = rng.sample(range(len(COLORS)), 2)
            want = i % 3 == 0  # a third of the prompts ask for a held-out combination, where the task has one
            combos = [(p, q) for p in range(len(SHAPES)) for q in range(len(COLORS)) if ((SHAPES[p], COLORS[q]) in HELD_OUT_COMBOS) == want]
            pairs = [(p, q) for p in range(len(SHAPES)) for q in range(len(SHAPES)) if p != q and (frozenset((SHAPES[p], SHAPES[q])) in HELD_OUT_PAIRS) == want]
            row = dict(task=task, held_out=want and task not in ("single_object", "counting"))
            if task == "single_object":
                row.update(prompt=a(SHAPES[s]), objects=[(s, None)])
            elif task == "two_object":
                s, t = rng.choice(pairs)
                row.update(prompt=f"{a(SHAPES[s])} and {a(SHAPES[t])}", objects=[(s, None), (t, None)])
            elif task == "counting":
                n = rng.randint(2, 4)
                row.update(prompt=f"{NUMBERS[n]} {plural(s)}", objects=[(s, None)], count=n)
            elif task == "colors":
                s, c = rng.choice(combos)
                row.update(prompt=a(f"{COLORS[c]} {SHAPES[s]}"), objects=[(s, c)])
            elif task == "position":
                s, t = rng.choice(pairs)
                r = rng.choice(RELATIONS)
                row.update(prompt=f"{a(SHAPES[s])} {r} {a(SHAPES[t])}", objects=[(s, None), (t, None)], relation=r)
            else:
                s, c = rng.choice(combos)
                t, d = rng.choice([x for x in combos if x[0] != s and x[1] != c])
                row.update(prompt=f"{a(COLORS[c] + ' ' + SHAPES[s])} and {a(COLORS[d] + ' ' + SHAPES[t])}", objects=[(s, c), (t, d)])
            out.append(row)
    return out


def clean_edit(scene, rng):
    """An edit whose result holds no held-out combination: instructions are captions too."""
    while True:
        text, new, kind = edit(scene, rng)
        if not holds_held_out(new[1]):
            return text, new, kind


# ----------------------------------------------------------------------------------------------------------------------
# The judge
def judge(images):
    """What is in each picture. images uint8 (n, 48, 48, 3) -> a list per picture of (shape, color, size, cell); shape or color is -1 where something is
    there but fits no template or palette colour.

    Every cell is fitted by ground + alpha * (colour - ground) for all ten sprites (shape, size) at once: with y = pixels - ground, the best colour of a
    sprite is a least-squares projection, so the explained energy is (alpha . y)^2 / alpha . alpha, one matrix product. The ground is the picture's median colour
    (objects cover less than half). A cell counts as filled above 14 grey levels RMS, as a known shape if its sprite explains 80 % of the energy.
    """
    n = len(images)
    x = images.astype(np.float32)
    ground = np.median(x.reshape(n, -1, 3), axis=1)  # (n, 3)
    y = x - ground[:, None, None]
    y = y.reshape(n, SIDE, CELL, SIDE, CELL, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n * SIDE * SIDE, 3, CELL * CELL)
    alpha = SPRITES.reshape(-1, CELL * CELL)  # (10, 256)
    norm = (alpha**2).sum(1)
    energy = (y**2).sum((1, 2))
    filled = np.flatnonzero(energy / (3 * CELL * CELL) > 14.0**2)
    dot = y[filled] @ alpha.T  # (f, 3, 10)
    explained = (dot**2).sum(1) / norm
    best = explained.argmax(1)
    rows = np.arange(len(filled))
    rgb = ground[filled // (SIDE * SIDE)] + dot[rows, :, best] / norm[best, None]
    shade = np.clip((rgb @ COLOR_RGB.T) / (COLOR_RGB**2).sum(1), 0.75, 1.0)  # brightness that fits each palette colour best
    distance = np.linalg.norm(rgb[:, None] - shade[..., None] * COLOR_RGB, axis=2)  # (f, colours)
    color = np.where(distance.min(1) < 70, distance.argmin(1), -1)
    shape, size = best // len(SIZES), best % len(SIZES)
    shape = np.where(explained[rows, best] / energy[filled] > 0.8, shape, -1)
    out = [[] for _ in range(n)]
    for cell, s, c, z in zip(filled.tolist(), shape.tolist(), color.tolist(), size.tolist()):
        out[cell // (SIDE * SIDE)].append((s, c, z, cell % (SIDE * SIDE)))
    return out


def fulfils(objects, row):
    """Does a judged picture show what the prompt row asks for? GenEval's rules: everything named must be there, counts must be exact, more may be there; but a
    picture with more objects than this world ever holds fails, or one random object in every cell would score .38."""
    if len(objects) > MAX_OBJECTS:
        return False
    found = [[o for o in objects if o[0] == s and (c is None or o[1] == c)] for s, c in row["objects"]]
    if "count" in row:
        return len(found[0]) == row["count"]
    if "relation" in row:
        return any(relation(o[3], p[3]) == row["relation"] for o in found[0] for p in found[1])
    return all(found)


def same_objects(found, scene):
    """Share of the scene's objects that were found with shape, colour and cell right, over all that is there or was found (intersection over union)."""
    truth = {(o[0], o[1], o[3]) for o in scene[1]}
    got = {(o[0], o[1], o[3]) for o in found}
    return len(truth & got) / max(1, len(truth | got))
