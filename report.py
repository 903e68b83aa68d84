"""A run folder's report.html: one file that opens offline, with all that the run's other files say about it."""
import base64
import html
import json
import os
import pathlib

import checkpoint
from sample import LINE_COLORS

STYLE = """body {font: 15px/1.5 sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222}
table {border-collapse: collapse} td, th {padding: 2px 14px 2px 0; text-align: right; border-bottom: 1px solid #ddd}
td:first-child, th:first-child {text-align: left} pre {background: #f4f4f4; padding: 1em; white-space: pre-wrap}
img {max-width: 100%} figure {display: inline-block; margin: 0} svg text {font-size: 12px; fill: #555}"""
SCORES = {  # row of the table: where its number stands in what evaluate.score_all returns; tasks follow
    "short prompts": "generation score", "short prompts, seen": "generation seen",
    "short prompts, held-out": "generation held_out", "objects in a picture": "generation objects",
    "long prompts": "long score", "long prompts, held-out": "long held_out score", "questions": "questions accuracy",
    "reconstruction": "reconstruction objects", "edits: asked": "editing asked", "edits: kept": "editing kept"}
SIZE, MARGIN = (470, 180), 40  # of a curve, in pixels

def table(before, after):
    """The scores before and after (each a dict, or None), shares of pictures with their 95 % intervals."""
    tasks, lines = (after or {}).get("generation", {}).get("tasks", {}), []
    for name, place in (SCORES | {f"task: {task}": f"generation tasks {task} score" for task in tasks}).items():
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
    return f"<table>{head}{''.join(lines)}</table>" if lines else "<p>Nothing was judged (--eval-n).</p>"

def curve(name, steps, values, color):
    """A line of numbers as inline SVG, from 0 to the largest."""
    (width, height), top = SIZE, max(values) or 1.0
    right, bottom = width - MARGIN, height - MARGIN
    points = [(MARGIN + (right - MARGIN) * (step - steps[0]) / max(1, steps[-1] - steps[0]),
               bottom - (bottom - MARGIN) * value / top) for step, value in zip(steps, values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (f'<figure><figcaption>{name}</figcaption><svg width="{width}" height="{height}">'
            f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#aaa"/>'
            f'<polyline points="{line}" fill="none" stroke="rgb{color}"/><text x="2" y="{MARGIN}">{top:.3g}</text>'
            f'<text x="{MARGIN}" y="{height - 22}">{steps[0]}</text>'
            f'<text x="{right}" y="{height - 22}">{steps[-1]}</text></svg></figure>')

def write(folder, plan=()):
    """Makes folder/report.html of its result.json, log.jsonl and PNGs, and of the lines of --plan."""
    folder, said, drawn = pathlib.Path(folder), html.escape, []
    result = checkpoint.read_json(str(folder / "result.json"))
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, part in enumerate(["loss", *result["args"]["mix"]]):
        logged = [(row["step"], row[part]) for row in rows if part in row]
        drawn += [curve(part, *zip(*logged), LINE_COLORS[i % len(LINE_COLORS)])] if logged else []
    about = [f"{key}: {result[key]}" for key in ("command", "resumed_by", "commit", "torch", "device") if key in result]
    about.append(f"time: {result['seconds'] / 60:.1f} minutes")
    pictures = [f'<h3>{said(path.name)}</h3><img alt="{said(path.name)}" src="data:image/png;base64,'
                f'{base64.b64encode(path.read_bytes()).decode()}">'
                for path in sorted(folder.glob("*.png"), key=os.path.getmtime) if path.name != "loss.png"]
    before = next((scores for step, scores in result["curve"] if step == 0), None)
    sections = {"Run": f"<pre>{said(chr(10).join(about))}</pre>", "Scores": table(before, result["scores"]),
                "Losses": "".join(drawn), "Pictures": "".join(pictures),
                "Plan": f"<pre>{said(chr(10).join(plan) or 'Give --plan to have it here.')}</pre>"}
    title = said(f"{result['arch']}, {result['stage']}: {folder.resolve().name}")
    body = "".join(f"<h2>{name}</h2>{text}" for name, text in sections.items() if text)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    checkpoint.write_text(str(folder / "report.html"),
                          f'<!DOCTYPE html><html lang="en">{head}<body><h1>{title}</h1>{body}</body></html>\n')
