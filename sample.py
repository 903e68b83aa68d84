"""Draws pictures, edits, reconstructs and extends them, answers questions about them.

    python sample.py                                              # a grid from the shipped weights, in seconds
    python sample.py --prompt "a red star above a blue circle" --n 8 --cfg 3
    python sample.py --image photo.png --reconstruct              # through the model's own understanding and back
    python sample.py --image photo.png --question "What color is the star?"
    python sample.py --explain "a red star above a blue circle"   # how this picture comes about, in one PNG
    python sample.py --arch diffusion --image photo.png --edit "Make the star blue."
    python sample.py --arch ar --image photo.png --inpaint mask.png --prompt "a red star"
    python sample.py --arch mar --config harmon-1.5b --ckpt harmon_1.5b.pth --tokenizer-ckpt kl16.ckpt \\
        --text-tokenizer qwen.tiktoken

The same seed gives the same pictures: the noise of each is that of (--seed, its prompt's number, its own number), so
more pictures or another --batch change none. --out name.png makes name_0.png, name_1.png and so on; beside them
name.png, a sheet of all (more than 64 go into further ones, name-2.png ...), and name.json, which says how they were
made, as the text in each PNG does. --out DIR/ makes DIR/00000.png ..., DIR/sheet.png and DIR/sheet.json. Published
checkpoints load by --config and their original files, run folders of any size by --ckpt alone. --inpaint, --extrapolate
and --think are not for every --arch. --explain shows the picture after each step, what is still open hatched; then, for
each word, which of the places that are drawn look at it (red: most; the share of their attention is a mean of layers,
heads and steps); and with --image and --edit or --reconstruct, where each drawn place looks in that picture.
"""
import argparse
import base64
import html
import inspect
import json
import math
import os
import pathlib
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import checkpoint
import data

DEFAULT_PROMPTS = [
    "a red circle", "a blue star", "a green square", "two yellow triangles", "a red star and a blue square",
    "a green triangle above a red square", "three circles", "a purple circle", "a yellow cross left of a blue circle",
    "an orange square", "four stars", "a blue triangle and a green cross", "a circle and a cross",
    "a star below a triangle", "a purple star", "two green crosses"]
LINE_COLORS = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
GRAY, PALE = (90, 90, 90), (225, 225, 225)
FRAMES, WORDS, CELLS = 16, 24, 16  # steps, words and places in the picture of --explain, at most
SHEET, SIDE = 64, 2000  # pictures in a sheet, and its pixels a side, at most: memory has a bound, and viewers open it

# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def grid(pictures, captions=None, columns=8, scale=3):
    """n uint8 pictures (h, w, 3) -> one PIL image, each with an optional caption (two lines of what fits) above it;
    pictures are scaled down where it would have more than SIDE pixels a side."""
    n, (h, w, _), head, gap = len(pictures), pictures[0].shape, 26 if captions else 0, 6
    rows = -(-n // columns)
    room = min(((SIDE - gap) // columns - gap) / w, ((SIDE - gap) // rows - head - gap) / h)
    scale, how = (scale, Image.NEAREST) if scale <= room else (room, Image.BOX)
    h, w = max(1, int(h * scale)), max(1, int(w * scale))
    size = columns * (w + gap) + gap, rows * (h + head + gap) + gap
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + head + gap)
        sheet.paste(Image.fromarray(picture).resize((w, h), how), (x, y + head))
        lines = [""]
        for word in captions[i].split() if captions else ():
            if lines[-1] and pen.textlength(f"{lines[-1]} {word}") > w:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        pen.multiline_text((x, y), "\n".join(lines[:2]), fill="black", spacing=1)
    return sheet

def plot(series, x_label, size=(720, 400), bottom=0.0):
    """{name: (xs, ys)} -> PIL image with a line each. The y axis starts at `bottom` and leaves out the highest 2 % of
    each line; a line of a single point is left out."""
    (width, height), margin = size, 48
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    series = {name: line for name, line in series.items() if len(line[0]) > 1}
    if not series:
        return image
    left, right = min(xs[0] for xs, _ in series.values()), max(xs[-1] for xs, _ in series.values())
    top = max(sorted(ys)[math.ceil(0.98 * (len(ys) - 1))] for _, ys in series.values()) * 1.05 or 1.0

    def place(x, y):  # of a point, in pixels
        across, up = (x - left) / max(1, right - left), min(1.0, max(0.0, (y - bottom) / (top - bottom)))
        return margin + (width - 2 * margin) * across, height - margin - (height - 2 * margin) * up

    for i in range(5):  # ticks
        x, y = left + (right - left) * i / 4, bottom + (top - bottom) * i / 4
        across, up = place(x, y)
        pen.line([(margin, up), (width - margin, up)], fill=PALE)
        pen.text((4, up - 6), f"{y:.3g}", fill=GRAY)
        pen.text((across - 10, height - margin + 6), f"{x:.0f}", fill=GRAY)
    at, room = margin, width - 2 * margin  # where the next name is written: in lines of `room` pixels
    for j, (name, (xs, ys)) in enumerate(series.items()):
        color = LINE_COLORS[j % len(LINE_COLORS)]
        pen.line([place(x, y) for x, y in zip(xs, ys)], fill=color, width=2)
        pen.text((at % room, 6 + 14 * (at // room)), name, fill=color)
        at += 24 + int(pen.textlength(name))
    pen.text((width // 2 - 40, height - 22), x_label, fill=GRAY)
    return image

def curves(history, parts):
    """Loss curves of a run, one smoothed line per part -> PIL image."""
    series = {}
    for part in parts:
        rows, smooth = [row for row in history if part in row], []
        for row in rows:
            smooth.append(0.9 * smooth[-1] + 0.1 * row[part] if smooth else row[part])
        series[part] = [row["step"] for row in rows], smooth
    return plot(series, "optimizer step")

def picture_generators(seed, n, places):
    """A generator for each of some places in the row of all pictures, n of every prompt. They live on the CPU, so that
    pictures do not depend on the device."""
    return [data.sample_generator(seed, place // n, place % n, "picture") for place in places]

@torch.no_grad()
def show(model, captions, source, seed, places, device="cpu", batch=16):
    """Some pictures of what a run looks like now, uint8 (len(places), h, w, 3), `batch` drawn at once: at these places
    in the row of `captions`, or, unless it is None, of `source`, uint8 (n, h, w, 3), which are reconstructed."""
    was_training, drawn = model.training, []
    model.eval()
    for start in range(0, len(places), batch):
        here = places[start:start + batch]
        own = picture_generators(seed, 1, here)
        if source is None:
            out = model.generate([captions[place] for place in here], generator=own)
        else:
            out = model.reconstruct(data.to_float(source[here], device), generator=own)
        drawn.append(data.to_uint8(out))
    model.train(was_training)
    return np.concatenate(drawn)

def before_after(before, after, now="after"):
    """Two results of train.pictures, the first perhaps None -> one PIL image with a row each, below a row of the
    sources; more than 16 pictures go on in further rows."""
    pictures, captions, source = after
    rows = {"source": source, "before": before and before[0], now: pictures}
    rows, n = {name: row for name, row in rows.items() if row is not None}, len(captions)
    columns = min(16, n)
    places = [(name, i) for start in range(0, n, columns) for name in rows for i in range(start, start + columns)]
    blank = np.full_like(pictures[0], 255)
    return grid([rows[name][i] if i < n else blank for name, i in places],
                [f"{name}: {captions[i]}" if i < n else "" for name, i in places], columns,
                scale=max(1, 120 // pictures.shape[1]))

def box(picture, place):
    """The part of a picture (h, w, 3) at a place (row, column, rows, columns) of a grid, as a view."""
    (row, column, rows, columns), (h, w, _) = place, picture.shape
    return picture[row * h // rows:(row + 1) * h // rows, column * w // columns:(column + 1) * w // columns]

def hatched(picture, masked):
    """A copy of a picture with stripes where masked (rows, columns) is True."""
    out = picture.copy()
    for row, column in np.argwhere(masked):
        part = box(out, (row, column, *masked.shape))
        part[...] = np.where(np.add(*np.indices(part.shape[:2])) // 2 % 3 == 0, 128, 225)[..., None]
    return out

def heated(picture, places, weights):
    """A pale copy of a picture, red where the weights of these places are large beside each other."""
    heat = np.zeros(picture.shape[:2])
    for place, weight in zip(places, weights):  # of several grids, perhaps
        part = box(heat[..., None], place)
        part += weight / part.size
    heat = 0.65 * (heat - heat.min())[..., None] / max(np.ptp(heat), 1e-9)
    pale = 160 + 0.35 * picture.mean(-1, keepdims=True)
    return (pale * (1 - heat) + np.array([215, 30, 30]) * heat).round().astype(np.uint8)

def some(items, n):
    """n of the items, evenly, with the first and the last; all, if they are fewer."""
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, n)] if len(items) > n else list(items)

def explanation(trace, source=None):
    """What a model's `trace` noted while it drew one picture, and the source uint8 (h, w, 3), if there is one -> PIL
    image: rows of the steps, of what looks at each word, and of where each drawn place looks in the source."""
    slots, *steps = trace
    pictures = [data.to_uint8(step["picture"])[0] for step in steps]
    frames = [(picture if step["masked"] is None else hatched(picture, step["masked"].cpu().numpy()), step["title"])
              for picture, step in zip(pictures, steps)]
    last, looks = pictures[-1], torch.stack([step["looks"][:, :len(slots)].float() for step in steps])
    looks = looks.nanmean(0).cpu().numpy()  # (places, slots)
    n, (h, w, _) = len(looks), last.shape
    columns = round((n * w / h) ** 0.5)
    places = [(i // columns, i % columns, n // columns, columns) for i in range(n)]
    words = [j for j, slot in enumerate(slots) if isinstance(slot, str) and re.search(r"\w", slot) and slot[:2] != "<|"]
    seen = [j for j, slot in enumerate(slots) if isinstance(slot, tuple)]
    kinds = [some(frames, FRAMES), [], []]
    for j in some(words, WORDS):
        title = f'attention to "{slots[j].strip()}": {looks[:, j].mean():.1%}'
        kinds[1].append((heated(last, places, looks[:, j]), title))
    for i in some(range(n), CELLS) if seen else ():
        title = f"of row {places[i][0] + 1}, column {places[i][1] + 1}: {looks[i, seen].sum():.1%}"
        kinds[2].append((heated(source, [slots[j] for j in seen], looks[i, seen]), title))
    across = min(9, len(kinds[0]))
    blank = np.full_like(last, 255), ""
    shown = [each for kind in kinds for each in kind + [blank] * (-len(kind) % across)]  # each kind begins a row
    shown = [(np.asarray(Image.fromarray(picture).resize((w, h), Image.NEAREST)), title) for picture, title in shown]
    return grid(*zip(*shown), columns=across, scale=max(1, 144 // h))

def save_png(image, path, about=None):
    """Atomic: a reader never sees half a picture. about: {key: value} for the file's text. Makes the folder; returns
    the path."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    text = PngInfo()
    for key, value in (about or {}).items():
        text.add_text(key, str(value))
    checkpoint.atomic(path, lambda f: image.save(f, "png", pnginfo=text))
    return path

def save_sheet(pictures, captions, out, number):
    """Saves sheet `number` of pictures, the first as `out`, the next as OUT-2.png; returns the path."""
    name, ending = os.path.splitext(out)
    sheet = grid(pictures, captions, min(8, len(pictures)), scale=max(1, 144 // pictures[0].shape[0]))
    return save_png(sheet, out if number == 1 else f"{name}-{number}{ending}")

# ---------------------------------------------------------------------------------------------------------------------
# A run folder's report.html: one file that opens offline, with all that the run's other files say

PAGE_STYLE = """body {font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse} td, th {padding: 2px 14px 2px 0; text-align: right; border-bottom: 1px solid #ddd}
td:first-child, th:first-child {text-align: left} pre {background: #f4f4f4; padding: 1em; white-space: pre-wrap}
img {max-width: 100%} figure {display: inline-block; margin: 0} svg text {font-size: 12px; fill: #555}"""
PAGE_SCORES = {  # row of the table: where its number stands in what evaluate.score_all returns; tasks follow
    "short prompts": "generation score", "short prompts, seen": "generation seen",
    "short prompts, held-out": "generation held_out", "objects in a picture": "generation objects",
    "long prompts": "long score", "long prompts, held-out": "long held_out score", "questions": "questions accuracy",
    "reconstruction": "reconstruction objects", "edits: asked": "editing asked", "edits: kept": "editing kept"}
PAGE_NOTE = """<p>Short prompts: GenEval's six tasks. Long: objects that are right in shape, color, size and place.
Held-out: what no caption shows. Reconstruction: how much of objects comes back through understanding.</p>"""
CURVE_SIZE, MARGIN = (470, 180), 40  # of a curve on the page, in pixels

def score_table(before, after):
    """The scores before and after (each a dict, or None), shares of pictures with their 95 % intervals."""
    tasks, lines = (after or {}).get("generation", {}).get("tasks", {}), []
    for name, place in (PAGE_SCORES | {f"task: {task}": f"generation tasks {task} score" for task in tasks}).items():
        cells, numbers, (*path, key) = [name], [], place.split()
        for scores in (before, after):
            for part in path:
                scores = (scores or {}).get(part, {})
            whole = key in ("score", "accuracy") and "interval" in scores  # the interval is that of this number
            numbers += [scores[key]] if key in scores else []
            cells.append((f"{scores[key]:.3f}" if key in scores else "")
                         + (" ({:.3f} to {:.3f})".format(*scores["interval"]) if whole else ""))
        cells.append(f"{numbers[1] - numbers[0]:+.3f}" if len(numbers) == 2 else "")
        lines += ["<tr><td>" + "</td><td>".join(cells) + "</td></tr>"] * bool(numbers)
    head = "<tr><th></th><th>before</th><th>after</th><th>change</th></tr>"
    return f"<table>{head}{''.join(lines)}</table>{PAGE_NOTE}" if lines else "<p>Nothing was judged (--eval-n).</p>"

def svg_curve(name, steps, values, color):
    """A line of numbers as inline SVG, from 0 to the largest."""
    (width, height), top = CURVE_SIZE, max(values) or 1.0
    right, bottom = width - MARGIN, height - MARGIN
    points = [(MARGIN + (right - MARGIN) * (step - steps[0]) / max(1, steps[-1] - steps[0]),
               bottom - (bottom - MARGIN) * value / top) for step, value in zip(steps, values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (f'<figure><figcaption>{name}</figcaption><svg width="{width}" height="{height}">'
            f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#aaa"/>'
            f'<polyline points="{line}" fill="none" stroke="rgb{color}"/><text x="2" y="{MARGIN}">{top:.3g}</text>'
            f'<text x="{MARGIN}" y="{height - 22}">{steps[0]}</text>'
            f'<text x="{right}" y="{height - 22}">{steps[-1]}</text></svg></figure>')

def write_report(folder, plan=()):
    """Makes folder/report.html of its result.json, log.jsonl and PNGs, and of the lines of --plan."""
    folder, said, drawn = pathlib.Path(folder), html.escape, []
    result = checkpoint.read_json(str(folder / "result.json"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, part in enumerate(["loss", *result["args"]["mix"]]):
        logged = [(row["step"], row[part]) for row in rows if part in row]
        drawn += [svg_curve(part, *zip(*logged), LINE_COLORS[i % len(LINE_COLORS)])] if logged else []
    about = [f"{k}: {result[k]}" for k in "command resumed_by commit torch device seconds".split() if k in result]
    pictures = [f'<h3>{said(path.name)}</h3><img alt="{said(path.name)}" src="data:image/png;base64,'
                f'{base64.b64encode(path.read_bytes()).decode()}">'
                for path in sorted(folder.glob("*.png"), key=os.path.getmtime) if path.name != "loss.png"]
    before = next((scores for step, scores in result["curve"] if step == 0), None)
    sections = {"Run": f"<pre>{said(chr(10).join(about))}</pre>", "Scores": score_table(before, result["scores"]),
                "Losses": "".join(drawn), "Pictures": "".join(pictures),
                "Plan": f"<pre>{said(chr(10).join(plan) or 'Give --plan to have it here.')}</pre>"}
    title = said(f"{result['arch']}, {result['stage']}: {folder.resolve().name}")
    body = "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{PAGE_STYLE}</style></head>'
    checkpoint.write_text(str(folder / "report.html"),
                          f'<!DOCTYPE html><html lang="en">{head}<body><h1>{title}</h1>{body}</body></html>\n')

# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    checkpoint.add_flags(p)
    p.add_argument("--lora", dest="adapters", metavar="RUN", help="adapters of a run with --lora, trained on --ckpt")
    p.add_argument("--prompt", action="append", help="what to draw; may be repeated, but not with --image")
    p.add_argument("--explain", nargs="?", const="", metavar="PROMPT", help="how one picture comes about: for PROMPT, "
                   "or, without it, for --image and --edit or --reconstruct")
    p.add_argument("--image", help="picture for one of the next five flags")
    p.add_argument("--no-exif", action="store_true", help="do not turn --image as its EXIF says, as published")
    job = p.add_mutually_exclusive_group()
    job.add_argument("--question", help="answered in words")
    job.add_argument("--edit", metavar="INSTRUCTION")
    job.add_argument("--reconstruct", action="store_true")
    job.add_argument("--inpaint", metavar="MASK", help="paint --prompt where this mask is white; as large as --image")
    job.add_argument("--extrapolate", choices=("left", "right", "up", "down"), help="go on with --prompt on that side")
    p.add_argument("--think", action="store_true", help="let the model write a plan, or its reasons, first")
    p.add_argument("--n", type=int, default=1, help="pictures per prompt")
    p.add_argument("--batch", type=int, default=64, help="pictures drawn at once: memory and speed, not what they show")
    p.add_argument("--cfg", type=float, help="classifier-free guidance scale; 1 = none (default: the model's)")
    p.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    p.add_argument("--temperature", type=float)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="sample.png", help="a PNG, or a folder: a name with / at its end")
    args = p.parse_args(argv)
    checkpoint.check_ranges(args)
    checkpoint.choose(args)
    painting, explains = args.inpaint or args.extrapolate, args.explain is not None
    if explains and (bool(args.explain) == bool(args.edit or args.reconstruct) or args.prompt or args.question):
        p.error("--explain takes a prompt of its own, or goes with --image and one of --edit, --reconstruct")
    args.prompt = [args.explain] if args.explain else args.prompt
    if bool(args.image) != bool(args.question or args.edit or args.reconstruct or painting):
        p.error("--image FILE and one of --question, --edit, --reconstruct, --inpaint, --extrapolate need each other")
    if args.image and len(args.prompt or ()) != bool(painting):
        p.error("one --prompt goes with --inpaint and --extrapolate, none with the other uses of --image")
    checkpoint.refuse_unused(
        p, argv, ("n batch steps cfg out", not args.question, "pictures, not for --question"),
        ("n batch", not explains, "several pictures, not for --explain"),
        ("seed", not args.question or args.temperature, "pictures, and for answers with a --temperature above 0"),
        ("max-new-tokens", args.question, "--question"), ("no-exif", args.image, "--image"),
        ("tokenizer-ckpt vision-ckpt rest-ckpt", args.config != "tiny", "published models"),
        ("gemm", args.device == "cpu", "CPUs"))
    return args

def call(model, args, name, *inputs, **options):
    """model.name(*inputs, **options), thinking first for --think. ValueError where the model has no such mode."""
    method = getattr(model, name, None)
    if method is None:
        raise ValueError(f"--{name}: --arch {args.arch} has no such mode")
    if args.think:
        if "think" not in inspect.signature(method).parameters:
            raise ValueError(f"--think: --arch {args.arch} has no such mode")
        options["think"] = True
    return method(*inputs, **options)

def drawing(model, args):
    """What the flags ask for -> (source, a picture uint8 or None; a caption for each picture; a function of some of the
    captions and sampler options that draws as many pictures)."""
    if not args.image:
        captions = [prompt for prompt in args.prompt or DEFAULT_PROMPTS for _ in range(args.n)]
        return None, captions, lambda texts, **options: call(model, args, "generate", texts, **options)
    image = data.open_image(args.image, exif=not args.no_exif)
    purpose = "t2i" if args.prompt else "edit"  # published inpainting crops its pictures as those that captions draw
    pixels = model.preprocess(image, "reconstruct" if args.reconstruct else purpose)[None].to(args.device)
    mask = inpainting_mask(model, args, image).to(args.device) if args.inpaint else None

    def draw(texts, **options):
        source = pixels.expand(len(texts), -1, -1, -1)
        if args.inpaint:
            return call(model, args, "inpaint", source, mask.expand(len(texts), -1, -1, -1), texts, **options)
        if args.extrapolate:
            return call(model, args, "extrapolate", source, texts, args.extrapolate, **options)
        if args.edit:
            return call(model, args, "edit", source, texts, **options)
        return call(model, args, "reconstruct", source, **options)

    captions = [args.prompt[0] if args.prompt else args.edit or "reconstruction"] * args.n
    # the source of an extrapolation is a part of every result, and smaller: not shown beside it
    return None if args.extrapolate else data.to_uint8(pixels)[0], captions, draw

def inpainting_mask(model, args, image):
    """-> (1, 1, H, W) in [0, 1], cropped as the picture is."""
    mask = data.open_image(args.inpaint, exif=not args.no_exif).convert("L").convert("RGB")
    if mask.size != image.size:
        raise ValueError(f"--inpaint {args.inpaint}: {mask.width}x{mask.height} pixels, expected "
                         f"{image.width}x{image.height}, as --image has: the two are cropped in the same way")
    return (model.preprocess(mask, "t2i")[None, :1] + 1) / 2

def out_path(out, place=None):
    """Where the picture at a place goes, or, for None, the sheet: into the folder --out, or to that file or beside."""
    if os.path.isdir(out) or out.endswith(("/", os.sep)):
        return os.path.join(out, "sheet.png" if place is None else f"{place:05d}.png")
    return out if place is None else f"{os.path.splitext(out)[0]}_{place}.png"

@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    model = checkpoint.model_of(args)
    options = {k: v for k in ("cfg", "steps", "temperature") if (v := getattr(args, k)) is not None}
    if args.question:
        picture = model.preprocess(data.open_image(args.image, exif=not args.no_exif), "answer")[None].to(args.device)
        answers = call(model, args, "answer", picture, [args.question], max_new_tokens=args.max_new_tokens,
                       generator=picture_generators(args.seed, args.n, [0]), **options)
        return print(answers[0])
    if args.explain is not None and not hasattr(model, "trace"):
        raise ValueError(f"--explain: --arch {args.arch} has no such mode: no trace (see tests/test_contract.py)")
    source, captions, draw = drawing(model, args)
    about = dict(arch=args.arch, config=args.config, seed=args.seed, commit=checkpoint.git_commit())
    job = next((job for job in ("edit", "reconstruct", "inpaint", "extrapolate") if getattr(args, job)), "generate")
    about |= dict(cfg=model.config.cfg, steps=model.sampling_steps(job), temperature=1.0) | options
    hashed = ThreadPoolExecutor(1).submit(checkpoint.weights_hash, args.ckpt or checkpoint.default_weights(args.arch))
    if args.explain is not None:
        model.trace = []
        draw(captions, generator=picture_generators(args.seed, 1, [0]), **options)
        about |= dict(prompt=captions[0], weights=hashed.result())
        return print(save_png(explanation(model.trace, source), out_path(args.out), about))
    shown, titles, paths, rows = [], [], [], []  # of the sheet that is being filled; all sheets; all pictures
    if source is not None:
        shown, titles = [source], ["source"]
    for start in range(0, len(captions), args.batch):
        texts = captions[start:start + args.batch]
        places = range(start, start + len(texts))
        pictures = data.to_uint8(draw(texts, generator=picture_generators(args.seed, args.n, places), **options))
        about["weights"] = hashed.result()
        for place, text, picture in zip(places, texts, pictures):
            row = dict(prompt=text, prompt_number=place // args.n, picture_number=place % args.n)
            path = save_png(Image.fromarray(picture), out_path(args.out, place), row | about)
            rows.append(dict(file=os.path.basename(path), **row))
        shown += list(pictures)
        titles += texts
        last = start + args.batch >= len(captions)
        while shown and (last or len(shown) >= SHEET):
            paths.append(save_sheet(shown[:SHEET], titles[:SHEET], out_path(args.out), len(paths) + 1))
            shown, titles = shown[SHEET:], titles[SHEET:]
    about["command"] = "python sample.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    checkpoint.write_text(os.path.splitext(paths[0])[0] + ".json", json.dumps(dict(about, pictures=rows), indent=1))
    count = len(captions) + (source is not None)
    print(f"{count} picture{'s' * (count > 1)}: {os.path.abspath(paths[0])}"
          + f" to {os.path.basename(paths[-1])}" * (len(paths) > 1))

if __name__ == "__main__":
    checkpoint.one_line_errors(main)
