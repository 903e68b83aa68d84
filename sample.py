"""Draws pictures, edits them, reconstructs them, answers questions about them.

    python sample.py                                              # a grid from the shipped weights, in seconds
    python sample.py --prompt "a red star above a blue circle" --n 8 --cfg 3
    python sample.py --image photo.png --reconstruct              # through the model's own understanding and back
    python sample.py --image photo.png --question "What color is the star?"
    python sample.py --arch diffusion --image photo.png --edit "Make the star blue."
    python sample.py --arch mar --config harmon-1.5b --ckpt harmon_1.5b.pth --tokenizer-ckpt kl16.ckpt --text-tokenizer qwen.tiktoken

Same arguments and seed, same picture. Pictures go to --out (a PNG); its path is printed. Published checkpoints load by --config and their original files.
"""

import argparse
import math
import os

import numpy as np
import torch

import data
from checkpoint import load_model, one_line_errors
from data import to_uint8

ARCHS = ("mar", "ar", "diffusion")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
def grid(pictures, captions=None, columns=8, scale=3):
    """uint8 pictures (n, h, w, 3) -> one PIL image, each with an optional caption line above it."""
    from PIL import Image, ImageDraw

    n, h, w = len(pictures), pictures.shape[1] * scale, pictures.shape[2] * scale
    head = 26 if captions else 0
    rows = -(-n // columns)
    sheet = Image.new("RGB", (columns * (w + 6) + 6, rows * (h + head + 6) + 6), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, p in enumerate(pictures):
        x, y = 6 + i % columns * (w + 6), 6 + i // columns * (h + head + 6)
        sheet.paste(Image.fromarray(p).resize((w, h), Image.NEAREST), (x, y + head))
        if captions:  # two lines of what fits
            words, lines = captions[i].split(), [""]
            for word in words:
                if draw.textlength(lines[-1] + " " + word) > w and lines[-1]:
                    lines.append("")
                lines[-1] = (lines[-1] + " " + word).strip()
            draw.multiline_text((x, y), "\n".join(lines[:2]), fill=(0, 0, 0), spacing=1)
    return sheet


def plot(series, x_label, size=(720, 400), bottom=0.0):
    """{name: (xs, ys)} -> PIL image with one line each; the y axis starts at `bottom` and leaves out the highest 2 % of each line."""
    from PIL import Image, ImageDraw

    (w, h), m = size, 48
    colors = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
    im = Image.new("RGB", size, "white")
    d = ImageDraw.Draw(im)
    series = {k: v for k, v in series.items() if len(v[0]) > 1}
    if not series:
        return im
    left, right = min(xs[0] for xs, _ in series.values()), max(xs[-1] for xs, _ in series.values())
    top = max(sorted(ys)[math.ceil(0.98 * (len(ys) - 1))] for _, ys in series.values()) * 1.05 or 1.0
    x = lambda v: m + (w - 2 * m) * (v - left) / max(1, right - left)
    y = lambda v: h - m - (h - 2 * m) * min(1.0, max(0.0, (v - bottom) / (top - bottom)))
    for i in range(5):
        at = bottom + (top - bottom) * i / 4
        d.line([(m, y(at)), (w - m, y(at))], fill=(225, 225, 225))
        d.text((4, y(at) - 6), f"{at:.3g}", fill=(90, 90, 90))
        d.text((x(left + (right - left) * i / 4) - 10, h - m + 6), f"{left + (right - left) * i / 4:.0f}", fill=(90, 90, 90))
    at = m
    for j, (name, (xs, ys)) in enumerate(series.items()):
        d.line([(x(a), y(b)) for a, b in zip(xs, ys)], fill=colors[j % len(colors)], width=2)
        d.text((at % (w - 2 * m), 6 + 14 * (at // (w - 2 * m))), name, fill=colors[j % len(colors)])
        at += 24 + int(d.textlength(name))
    d.text((w // 2 - 40, h - 22), x_label, fill=(90, 90, 90))
    return im


def save_png(image, path):
    """Atomic: a reader never sees half a picture."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    tmp = path + ".tmp.png"
    image.save(tmp)
    os.replace(tmp, path)
    return path


DEFAULT_PROMPTS = [
    "a red circle",
    "a blue star",
    "a green square",
    "two yellow triangles",
    "a red star and a blue square",
    "a green triangle above a red square",
    "three circles",
    "a purple circle",
    "a yellow cross left of a blue circle",
    "an orange square",
    "four stars",
    "a blue triangle and a green cross",
    "a circle and a cross",
    "a star below a triangle",
    "a purple star",
    "two green crosses",
]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arch", choices=ARCHS, default="mar")
    p.add_argument("--ckpt", help="folder written by train.py, or a published checkpoint with --config (default: weights/ARCH-reca)")
    p.add_argument("--config", help="published size, e.g. harmon-1.5b; not needed for our own folders")
    p.add_argument("--tokenizer-ckpt", help="published image tokenizer (kl16.ckpt, ae.safetensors, magvitv2)")
    p.add_argument("--vision-ckpt", help="published CLIP file (Show-o CLIP variants)")
    p.add_argument("--text-tokenizer", help="published text tokenizer: folder or file")
    p.add_argument("--prompt", action="append", help="what to draw; may be repeated")
    p.add_argument("--image", help="picture to edit, reconstruct or ask about")
    p.add_argument("--question")
    p.add_argument("--edit", metavar="INSTRUCTION")
    p.add_argument("--reconstruct", action="store_true")
    p.add_argument("--n", type=int, default=1, help="pictures per prompt")
    p.add_argument("--cfg", type=float, help="classifier-free guidance scale; 1 = none (default: the model's)")
    p.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    p.add_argument("--temperature", type=float)
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="sample.png")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args(argv)
    if (args.question or args.edit or args.reconstruct) and not args.image:
        p.error("--question, --edit and --reconstruct need --image FILE")
    if args.image and not (args.question or args.edit or args.reconstruct):
        p.error("--image needs one of --question TEXT, --edit INSTRUCTION, --reconstruct")
    if args.n < 1 or (args.steps is not None and args.steps < 1):
        p.error("--n and --steps must be at least 1")
    return args


@torch.inference_mode()
def main(argv=None):
    args = parse_args(argv)
    model = load_model(
        args.arch,
        args.ckpt,
        args.config,
        args.tokenizer_ckpt,
        args.text_tokenizer,
        args.device,
        torch.bfloat16 if args.device.startswith("cuda") and args.config else None,
        args.vision_ckpt,
    )
    generator = torch.Generator(args.device).manual_seed(args.seed)
    sampler = {k: v for k, v in dict(cfg=args.cfg, steps=args.steps, temperature=args.temperature).items() if v is not None}
    if args.image:
        image = data.open_image(args.image)
        if args.question:
            x = model.preprocess(image, "understand")[None].to(args.device)
            text = {"temperature": args.temperature} if args.temperature is not None else {}
            print(model.answer(x, [args.question], max_new_tokens=args.max_new_tokens, generator=generator, **text)[0])
            return
        x = model.preprocess(image, "reconstruct" if args.reconstruct else "edit")[None].to(args.device).expand(args.n, -1, -1, -1)
        if args.reconstruct:
            out, captions = model.reconstruct(x, generator=generator, **sampler), ["reconstruction"] * args.n
        else:
            out, captions = model.edit(x, [args.edit] * args.n, generator=generator, **sampler), [args.edit] * args.n
        pictures, captions = np.concatenate([to_uint8(x[:1]), to_uint8(out)]), ["source"] + captions
    else:
        captions = [p for p in (args.prompt or DEFAULT_PROMPTS) for _ in range(args.n)]
        pictures = to_uint8(model.generate(captions, generator=generator, **sampler))
    path = save_png(grid(pictures, captions, columns=min(8, len(pictures)), scale=max(1, 144 // pictures.shape[1])), args.out)
    print(f"{len(pictures)} picture{'s' * (len(pictures) > 1)}: {os.path.abspath(path)}")


if __name__ == "__main__":
    one_line_errors(main)
