"""Data: text tokenizers, template requests for RecA, real images from folders / tar shards / LLaVA JSON, preprocessing, sample order, and the shape world.

    python data.py --check PATH...       what is in these folders, tar shards or LLaVA JSON files: counts, sizes, captions, problems
    python data.py --build-tokenizer     train the tiny vocabulary again (weights/tokenizer.tiktoken; takes a second)
"""
import argparse
import atexit
import hashlib
import io
import json
import os
import queue
import random
import sys
import tarfile
import threading
import time
import warnings
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import shape_world
from checkpoint import one_line_errors, read_json

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")



class Progress:
    """tqdm on a terminal, plain lines in a log. Iterate over it, or drive it by line(text, done). Silent where `show` is false."""

    def __init__(self, items, title, show=True, total=None, initial=0):
        self.items, self.show = items, show
        self.bar = tqdm(total=total if items is None else len(items), initial=initial, desc=title, dynamic_ncols=True) if show and sys.stderr.isatty() else None

    def __iter__(self):
        for x in self.items:
            yield x
            if self.bar is not None:
                self.bar.update(1)
        self.close()

    def line(self, text, done):
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
            self.bar.write(text)
        elif self.show:
            print(text, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()




# ---------------------------------------------------------------------------------------------------------------------
# Template requests: what stands beside the image in a RecA prompt (arXiv 2509.07295). Many of them, so that the model learns to read the
# image and not one sentence. Ours are short: at tiny scale every text token costs as much as an image token.
RECA_TEMPLATES = [t.strip() for t in """
Describe the image in detail. | Describe this image. | Describe the picture. | Describe this picture in detail. | Describe the scene.
Describe the photo. | Describe all you see. | Describe what you see here. | Describe what this image shows. | Describe every object here.
Describe each object and its place. | Describe the colors and shapes. | Describe the layout. | Describe the whole picture.
Describe the image from left to right. | Describe the image from top to bottom. | Describe the objects in this picture.
Describe this scene in your own words. | Describe the content of the image. | Describe the background too. | Describe it in one sentence.
Describe it in full. | Please describe the image. | Please describe this picture. | Please describe the scene in detail.
Can you describe this image? | Can you describe the picture? | Can you describe what you see? | Could you describe the scene?
Could you describe this photo? | What is in this image? | What is in the picture? | What does this image show?
What does the picture show? | What do you see? | What do you see in this image? | What do you see in the picture? | What can you see here?
What is shown here? | What is in the scene? | What objects are here? | What objects are in the image? | What shapes and colors are here?
What are the objects and where are they? | What does the scene look like? | What does this look like? | What is this a picture of?
What is this a photo of? | What would you say this image shows? | What are the details of this image? | What is the image about?
Which objects do you see? | Which objects are in the picture? | Which shapes are in this image? | Which colors are in this image?
Where is each object? | Where are the objects in this image? | How does this image look? | How would you describe this image?
How would you describe the scene? | How many objects are there, and where? | Tell me what you see. | Tell me about this image.
Tell me about the picture. | Tell me all about this scene. | Tell me what is in the image. | Tell me what this picture shows.
Tell me what is where. | Tell me every detail. | Tell me the details of the image. | Explain the image. | Explain what you see.
Explain this picture in detail. | Explain what is in the scene. | Explain what the image shows. | Give a description of the image.
Give a detailed description. | Give a short description of this picture. | Give a full description of the scene. | Give me the details.
Give the details of this picture. | Give a caption for this image. | Give this picture a caption. | Write a caption.
Write a caption for this image. | Write a detailed caption. | Write a description of the picture. | Write what you see.
Write down all the details. | Write one sentence about this image. | List the objects in the image. | List all you see.
List every object and its color. | List the shapes and their colors. | List the details of the picture. | List what is in the scene.
Name the objects in this picture. | Name every object you see. | Name all shapes and colors. | Name what is in the image.
Name each object and where it is. | Show me in words what you see. | Put this image into words. | Put the picture into words.
Put what you see into words. | Say what you see. | Say what is in the image. | Say what this picture shows. | Say where each object is.
Look at the image and describe it. | Look at this picture. What is there? | Look at the scene and tell me about it.
Look at this image and list the objects. | Go over the image in detail. | Go through the picture and describe it.
Report what is in the image. | Report every object in the scene. | Sum up the image. | Sum up what you see here. | Caption this image.
Caption the picture in detail. | Caption: | Image description: | A description of the image: | In this image there is
In detail, what is here? | In words, what does this show? | The picture shows | This is an image of
I want to know what is in this image. | I would like a description of this picture. | Let me know what you see.
Read the image and describe it. | Detail the picture for me. | Here is a picture. Describe it. | Here is an image. What do you see?
Draw it again in words. | Note every detail of this image.
""".replace("\n", "|").split("|") if t.strip()]

# ---------------------------------------------------------------------------------------------------------------------
# Real images: folders, tar shards, LLaVA JSON. One pass builds an index; pictures are then read at random, shards stay packed.
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 89_478_485                       # Pillow's own line: 256 MB of RGB. A larger file is a mistake or an attack.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)      # open_image refuses them, so no warning on top


class Sample(NamedTuple):
    name: str                                 # for messages: the file, or shard.tar:member
    file: str
    offset: int = 0                           # where the picture's bytes lie in `file`
    size: int = -1                            # how many; -1: to the end
    caption: str = ""                         # only where captions are asked for
    turns: tuple = ()                         # LLaVA JSON: ((question, answer), ...), "<image>" taken out


def open_image(source):
    """Path or bytes of a picture -> RGB PIL image; transparency is put on white, 16-bit grey is scaled to 8 bits. EXIF rotation is not
    applied, as in the published pipelines. FileNotFoundError, or ValueError with the reason (broken, truncated, over 89 megapixels)."""
    name = "picture" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels; make it smaller")
            image.load()
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image") from None
    except Exception as e:                    # a broken file can raise anything in a decoder
        raise ValueError(f"{name}: cannot be read as a picture ({e})") from None


class Images:
    """Pictures under `paths`, at random access: folders (recursive; pictures and tar shards), single pictures, tar shards, LLaVA JSON.

    captions=True reads the .txt or .json (key caption, text or prompt) beside each picture; an empty or missing one counts as broken.
    image_root is the folder of the paths inside LLaVA JSON (default: the folder of the JSON file).
    `images[i]` -> (Sample, RGB PIL image); where i is broken or rejected it is the next good one, so that sample order never depends on
    who reads. `problems` (broken) and `rejected` (a side <= 8 pixels or an aspect ratio >= 10) map names to reasons.
    Raises ValueError as soon as more than max_broken of all are broken (1 counts only), FileNotFoundError for a path that is not there.
    """

    def __init__(self, paths, captions=False, image_root=None, max_broken=0.01):
        self.samples, self.problems, self.rejected, self.text_only, self.stands_for = [], {}, {}, 0, {}
        self.captions, self.image_root, self.max_broken = captions, image_root, max_broken
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            path = os.fspath(path)
            if os.path.isdir(path):
                for folder, folders, files in os.walk(path):
                    folders.sort()
                    for name in sorted(f for f in files if not f.startswith(".")):
                        if name.lower().endswith((*IMAGE_TYPES, ".tar")):
                            self._add(os.path.join(folder, name))
            elif os.path.isfile(path):
                self._add(path)
            else:
                raise FileNotFoundError(f"{path}: no such folder, tar shard, picture or LLaVA JSON file")
        if not self.samples and not self.problems:
            raise ValueError(f"{paths}: no pictures found ({', '.join(IMAGE_TYPES)} in folders or tar shards, or LLaVA JSON)")
        self.total = len(self.samples) + len(self.problems)
        self._check()

    def _add(self, path):
        kind = os.path.splitext(path)[1].lower()
        if kind == ".tar":
            self._add_tar(path)
        elif kind == ".json":
            self._add_llava(path)
        elif kind in IMAGE_TYPES:
            texts = {t: path[:-len(kind)] + t for t in (".txt", ".json")} if self.captions else {}
            self._add_one(Sample(path, path), {t: open(p, "rb").read() for t, p in texts.items() if os.path.isfile(p)})
        else:
            raise ValueError(f"{path}: unknown kind of data; expected a folder, .tar, LLaVA .json or a picture ({', '.join(IMAGE_TYPES)})")

    def _add_one(self, sample, texts):
        """texts: {".txt" or ".json": bytes} beside the picture."""
        if self.captions:
            try:
                caption = texts[".txt"].decode("utf-8-sig") if ".txt" in texts else ""
                if not caption.strip() and ".json" in texts:
                    row = json.loads(texts[".json"])
                    caption = next((row[k] for k in ("caption", "text", "prompt") if isinstance(row.get(k), str)), "")
            except (ValueError, AttributeError) as e:
                self.problems[sample.name] = f"unreadable caption ({e})"
                return
            if not caption.strip():
                self.problems[sample.name] = "empty caption" if texts else "no caption (.txt or .json beside it)"
                return
            sample = sample._replace(caption=" ".join(caption.split()))
        self.samples.append(sample)

    def _add_tar(self, path):
        """A sample is all members that share a key: the member's name up to the first dot of its base name."""
        groups, error, size = {}, "", os.path.getsize(path)
        with open(path, "rb") as f:
            if f.read(2) == b"\x1f\x8b":
                raise ValueError(f"{path}: compressed tar; random access needs a plain one, unpack it with gunzip first")
            f.seek(0)
            try:
                with tarfile.open(fileobj=f, mode="r:") as tar:
                    while (m := tar.next()) is not None:
                        tar.members = []                                          # or it would keep every header
                        folder, base = os.path.split(m.name)
                        key, dot, kind = base.partition(".")
                        if m.isreg() and key:
                            groups.setdefault(os.path.join(folder, key), {})["." + kind.lower()] = (m.name, m.offset_data, m.size)
                    end = tar.offset
            except tarfile.TarError as e:
                error = f" ({e})"
            # tarfile stops without a word at a damaged header or at a cut between members; only a block of zeros is an end
            if error or (f.seek(end), f.read(512))[1] != bytes(512):
                raise ValueError(f"{path}: truncated or damaged tar shard{error}: {size:,} bytes, {len(groups)} samples before the damage; "
                                 "fetch or pack it again")
            for parts in groups.values():
                if kind := next((t for t in IMAGE_TYPES if t in parts), None):
                    name, offset, n = parts[kind]
                    texts = {t: (f.seek(parts[t][1]), f.read(parts[t][2]))[1] for t in (".txt", ".json") if self.captions and t in parts}
                    self._add_one(Sample(f"{path}:{name}", path, offset, n), texts)

    def _add_llava(self, path):
        rows, root = read_json(path), self.image_root or os.path.dirname(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a {type(rows).__name__}, expected LLaVA JSON: a list of {{image, conversations: [{{from, value}}]}}")
        first = len(self.samples)
        for i, row in enumerate(rows):
            try:
                if not row.get("image"):
                    self.text_only += 1
                    continue
                said = [(t["from"], t["value"].replace("<image>", "").strip()) for t in row["conversations"]]
                turns = tuple((q, a) for (who, q), (by, a) in zip(said[::2], said[1::2]) if who == "human" and by == "gpt" and a)
                if len(turns) * 2 != len(said) or not turns:
                    raise ValueError("turns are not human, gpt, human, gpt ... with an answer each")
                file = os.path.join(root, row["image"])
                self.samples.append(Sample(file, file, turns=turns, caption=turns[0][1] if self.captions else ""))
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                self.problems[f"{path}:{i}"] = f"not a LLaVA sample ({type(e).__name__}: {e})"
        some = [s.file for s in self.samples[first:first + 20]]
        if some and not any(map(os.path.isfile, some)):
            raise FileNotFoundError(f"{some[0]}: no such image, nor the other {len(some) - 1} first ones in {path}; "
                                    "set --image-root to their folder")

    def _check(self):
        if len(self.problems) > self.max_broken * self.total:
            first = "; ".join(f"{n} ({why})" for n, why in list(self.problems.items())[:3])
            raise ValueError(f"{len(self.problems)} of {self.total} samples are broken, more than {self.max_broken:.0%}: {first}; "
                             "repair or remove them (python data.py --check PATH lists all)")

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        """Picture i as RGB PIL image, or None if it is broken or rejected (then it stands in `problems` or `rejected`)."""
        s = self.samples[i]
        if s.name in self.problems or s.name in self.rejected:
            return None
        try:
            with open(s.file, "rb") as f:
                f.seek(s.offset)
                image = open_image(f.read(s.size))
        except (ValueError, OSError) as e:
            self.problems[s.name] = str(e).removeprefix("picture: ")
            self._check()
            return None
        if min(image.size) <= 8 or max(image.size) >= 10 * min(image.size):
            self.rejected[s.name] = f"{image.width}x{image.height}: a side of 8 pixels or less, or an aspect ratio of 10 or more"
            return None
        return image

    def __getitem__(self, i):
        for k in range(len(self)):
            j = (i + k) % len(self)
            if (image := self.read(j)) is not None:
                self.stands_for[i] = j
                return self.samples[j], image
        raise ValueError(f"none of {self.total} pictures can be used: {len(self.problems)} broken, {len(self.rejected)} rejected; "
                         "python data.py --check PATH lists them")

    def row(self, i):
        """The row whose picture images[i] is: its text, not row i's, belongs beside that picture."""
        if i not in self.stands_for:
            self[i]
        return self.stands_for[i]


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing as Harmon was trained with it: RGB PIL image -> float32 (3, size, size) in [-1, 1]. Pillow's bicubic (which anti-aliases)
# and its rounding to 8 bits after every step are part of the recipe. Show-o's and BAGEL's stand in vision_encoder.py.
def preprocess_stretch(image, size):
    """Reconstruction data: stretched (no crop, no pad) to a square of the longer side, then resized."""
    square = image.convert("RGB").resize((max(image.size), max(image.size)), Image.Resampling.BICUBIC)
    return to_pixels(square.resize((size, size), Image.Resampling.BICUBIC))


def preprocess_pad(image, size):
    """Image-to-text data and questions: padded to a square with grey 127 around (odd margin: less above and left), then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return to_pixels(square.resize((size, size), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------------------------------------------------------------
# Order and randomness: functions of (seed, step, index), so that nothing depends on the number of ranks or workers and resuming is free.
def _mix(*parts):
    """64 well-mixed bits of the parts. Neighbouring seeds and steps must not give related streams, and torch uses only the low 32 bits."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@lru_cache(8)
def _epoch_order(n, seed, epoch, stream):
    low, high = _mix(n, seed, epoch, stream) & 0xFFFFFFFF, _mix(n, seed, epoch, stream) >> 32
    return torch.from_numpy(np.random.RandomState([low, high]).permutation(n))   # numpy never changes the numbers of RandomState


def batch_indices(n, global_batch, seed, step, stream=""):
    """Indices (global_batch,) int64 into n samples for one step: every epoch is a permutation that depends on (seed, epoch, stream) only;
    a batch may cross into the next one. A rank takes its slice; any step is reached without replay. ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"{n} samples to draw a batch of {global_batch} from; give data with at least one")
    at = torch.arange(step * global_batch, (step + 1) * global_batch)
    return torch.cat([_epoch_order(n, seed, e, stream)[at[at // n == e] % n] for e in range(int(at[0]) // n, int(at[-1]) // n + 1)])


def sample_generator(seed, step, index, stream=""):
    """torch.Generator (CPU) for the randomness of one sample: one for each (seed, step, index in the global batch, stream name)."""
    return torch.Generator().manual_seed(_mix(seed, step, index, stream))


def mix_seed(*parts):
    """63 well-mixed bits of any numbers and strings, for torch.manual_seed."""
    return _mix(*parts) >> 1


def text_rng(*parts):
    """random.Random for the words of one sample."""
    return random.Random(_mix(*parts))



# ---------------------------------------------------------------------------------------------------------------------
# preprocessing: PIL image -> normalised tensor, exactly as the published weights were trained


def to_pixels(image, mean=0.5, std=0.5):
    """PIL image -> float32 (3, H, W), x/255 normalised with mean and std (numbers, or one per channel). The defaults give [-1, 1]."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return ((x - torch.as_tensor(mean).view(-1, 1, 1)) / torch.as_tensor(std).view(-1, 1, 1)).contiguous()


def _resize_shorter(image, size):
    w, h = image.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    return image.resize((w, h), Image.Resampling.BICUBIC)


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image, size=336):
    """CLIP: shorter side to `size` (bicubic), centre crop (odd margins: the smaller one left and above), CLIP's mean and deviation."""
    image = _resize_shorter(image.convert("RGB"), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return to_pixels(image, mean=CLIP_MEAN, std=CLIP_STD)


def magvit_pixels(image, size):
    """Show-o's image tokenizer: as above into [-1, 1]; here an odd margin is halved with rounding to even."""
    image = _resize_shorter(image.convert("RGB"), size)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return to_pixels(image.crop((left, top, left + size, top + size)))


def square_pixels(image, size):
    """Show-o's RecA data: resized to a square without cropping (bicubic; the aspect ratio is not kept), [-1, 1]."""
    return to_pixels(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def bagel_size(w, h, max_size, min_size, stride, max_pixels=14 * 14 * 9 * 1024, num_images=1):
    """BAGEL's rule for the size of a picture -> (w, h), multiples of `stride`: long side at most max_size, short side at least min_size if
    that is possible, at most max_pixels / num_images pixels (scaled by the ratio, not by its root: so the weights were trained)."""
    def scaled(s):
        return tuple(max(stride, round(round(v * s) / stride) * stride) for v in (w, h))

    w, h = scaled(max(min(max_size / max(w, h), 1.0), min_size / min(w, h)))
    if w * h > max_pixels / num_images:
        w, h = scaled(max_pixels / num_images / (w * h))
    if max(w, h) > max_size:
        w, h = scaled(max_size / max(w, h))
    return w, h


def bagel_resize(image, max_size, min_size, stride, max_pixels=14 * 14 * 9 * 1024, num_images=1):
    """PIL image -> RGB PIL image of BAGEL's size (bicubic); transparent pictures are put on white. to_pixels() of it feeds both towers.
    Settings: autoencoder (1024, 512, 16); SigLIP (980, 224, 14), in the editing benchmarks (980, 378, 14), in RecA (224, 224, 14)."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    size = bagel_size(*image.size, max_size, min_size, stride, max_pixels, num_images)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def to_uint8(images):
    """Pictures in [-1, 1] (n, 3, h, w) -> uint8 (n, h, w, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def to_float(pictures, device="cpu"):
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Data: pools of images whose frozen encodings are computed once, and batches that depend on (seed, step, place) alone
class Pools:
    """The images behind each part, and a text for each sample. `pool_of[part]` names the pool; `cache[pool]` holds the model's frozen encodings of it."""

    def __init__(self, args, model, stage, device, rank=0, world=1):
        self.args, self.parts = args, mix(args)
        self.templates = RECA_TEMPLATES[: args.templates or None]
        own = ("captioned" if stage in ("sft", "base") else "real") if args.data else None
        self.pool_of = dict.fromkeys(("recon", "i2t", "words", "uncond", "oracle"), "broad") | dict.fromkeys(("t2i", "align"), "captioned")
        self.pool_of |= {"edit": "edits", "images": own or "crowded"}
        if own:
            self.pool_of |= dict.fromkeys(("t2i", "align", "words", "uncond") if own == "captioned" else ("recon",), own)
        if args.i2t_data:
            self.pool_of["i2t"] = "understanding"
        elif args.config != "tiny" and "i2t" in self.parts:
            raise ValueError(
                f"--config {args.config}: RecA keeps understanding by image-to-text data, so give --i2t-data JSON (or --i2t-weight 0 to go without)"
            )
        if args.understanding != "full" and "recon" in self.parts:
            if args.data or (args.arch == "mar" and args.understanding not in ("shrunk", "scrambled")):
                raise ValueError(
                    f"--understanding {args.understanding}: an ablation of the shape world; --arch mar, whose encoder trains along, has only shrunk and scrambled"
                )
            self.pool_of["recon"] = "altered"  # apart from "broad", whose encodings image-to-text keeps as they are
        need = {self.pool_of[p] for p in self.parts if p in self.pool_of}
        if args.config != "tiny" and (need - {own, "understanding"} or not own):
            raise ValueError(
                f"--config {args.config} draws {getattr(model.config, 'image_size', 512)}-pixel pictures: give --data PATH (folders, tars) and only the parts "
                f"it has data for (--mix; here {', '.join(self.parts)}); the shape world is for tiny"
            )
        sources, self.text = self.shape_world(need - {own})
        if own:
            sources[own] = self.real_images = Images(args.data, captions=own == "captioned")
            self.text[own] = [s.caption for s in self.real_images.samples]
        if args.i2t_data:
            sources["understanding"] = listed = Images(args.i2t_data, captions=True, image_root=args.image_root)
            self.text["understanding"] = [s.turns or ((self.templates[0], s.caption),) for s in listed.samples]
        self.listed = {name: source for name, source in sources.items() if isinstance(source, Images)}
        self.scenes = {name: source for name, source in sources.items() if isinstance(source, shape_world.Scenes)}
        self.cache, self.size, self.sources = {}, {}, {}
        start = time.time()
        need |= {"edit_sources"} & set(sources)
        for name in sorted(need):
            source = sources[name]
            self.size[name] = len(source)
            one = self.encode(model, source, name, stage, device, [0])
            need_bytes = len(source) * sum(v.numel() * v.element_size() for v in one.values())
            if need_bytes <= args.cache_gb * 1e9:
                self.cache[name] = self.encode_all(model, source, name, stage, device, rank, world)
            elif name == "altered":
                raise ValueError(
                    f"--understanding {args.understanding}: its pool must be cached ({need_bytes / 1e9:.1f} GB): raise --cache-gb ({args.cache_gb:g}) or lower --pool"
                )
            else:
                self.sources[name] = source
                if rank == 0:
                    print(
                        f"pool {name}: encodings of {len(source):,} images would take {need_bytes / 1e9:.1f} GB (--cache-gb {args.cache_gb:g}), "
                        f"so each step encodes its own"
                    )
        self.size["text"] = args.pool
        if rank == 0:
            print(
                "pools: " + ", ".join(f"{k} {self.size[k]:,}" for k in sorted(need)) + f" images, frozen encodings computed in {time.time() - start:.1f} s",
                flush=True,
            )

    def shape_world(self, need):
        """-> {pool: its scenes (or pictures)} and {pool: its texts} of the shape world."""
        args, sources, text = self.args, {}, {}
        if "crowded" in need:
            sources["crowded"] = shape_world.crowded_pictures(args.pool, seed=args.seed)
        if {"broad", "altered"} & need or "text" in self.parts:
            sources["broad"] = sources["altered"] = shape_world.Scenes(args.pool, seed=10 + args.seed, captioned=args.pool_without_held_out)
        if "captioned" in need:
            scenes = sources["captioned"] = shape_world.Scenes(args.captioned, seed=20 + args.seed, captioned=True)
            sparse, n = args.sparse_captions, len(scenes)
            bias = dict(shape_world.CAPTION_BIAS, wrong=args.wrong_captions, drop_object=sparse, drop_color=sparse, drop_rare_color=1 - (1 - sparse) / 3)
            text["captioned"] = [
                shape_world.sparse_caption(scenes.scene(i), text_rng(args.seed, i, "caption"), bias, scenes.scene((i + 1) % n)) for i in range(n)
            ]
        if "edits" in need:
            scenes = sources["edit_sources"] = shape_world.Scenes(args.pool, seed=30 + args.seed, captioned=True)
            edits = [shape_world.clean_edit(scenes.scene(i), text_rng(args.seed, i, "edit")) for i in range(len(scenes))]
            text["edits"], sources["edits"] = [e[0] for e in edits], shape_world.Scenes.of([e[1] for e in edits])
        return sources, text

    def pixels(self, model, source, name, rows):
        """Images (n, 3, H, W) in [-1, 1] of some rows of a source, preprocessed as the model was trained to see them."""
        if isinstance(source, shape_world.Scenes):
            return to_float(source[rows].render())
        if isinstance(source, np.ndarray):
            return to_float(source[rows])
        answers = "understand" if self.args.arch != "diffusion" else "recon"  # BAGEL's "understand" keeps proportions
        purpose = {"understanding": answers, "captioned": "generate"}.get(name, "recon")
        return torch.stack([model.preprocess(source[int(j)][1], purpose) for j in rows])

    @torch.no_grad()
    def encode(self, model, source, name, stage, device, rows, show=False):
        """The frozen encodings of some rows, on the CPU."""
        was, chunk = model.training, 256 if getattr(model.config, "image_size", 48) <= 64 else 8
        model.eval()
        starts = Progress(range(0, len(rows), chunk), f"encoding {name}", show)
        chunks = []
        for i in starts:
            pixels = self.pixels(model, source, name, rows[i : i + chunk]).to(device)
            out = model.precompute(pixels, stage)
            if name == "altered":
                index = rows[i : i + chunk]
                full = torch.as_tensor(index) >= round(self.args.altered_share * self.size[name])  # the pool is in no order
                for k, v in self.alter(model, pixels, out, stage, index).items():
                    v[full] = out[k.removeprefix("source_")][full]
                    out[k] = v
            chunks.append({k: v.cpu() for k, v in out.items()})
        model.train(was)
        return {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}

    def alter(self, model, pixels, seen, stage, rows):
        """What stands in RecA's context instead of the picture's full understanding (--understanding): {key: tensor} to overwrite in `seen`."""
        kind, key = self.args.understanding, "features" if "features" in seen else "latents"
        if kind in ("scrambled", "shuffled") and not hasattr(self, "orders"):  # all of them at once, so that row i has the same one on whatever process it is
            generator = sample_generator(self.args.seed, 0, 0, "altered")
            places = 9 if kind == "scrambled" else seen[key].shape[1]
            self.orders = torch.stack([torch.randperm(places, generator=generator) for _ in range(self.size["altered"])])
        if kind in ("shrunk", "scrambled"):  # another picture, before the encoder
            if kind == "shrunk":
                other = F.interpolate(F.avg_pool2d(pixels, 4), scale_factor=4, mode="bilinear")
            else:
                side = pixels.shape[-1] // 3
                cells = F.unfold(pixels, side, stride=side)  # (n, 3 side side, 9)
                order = self.orders[torch.as_tensor(rows)].to(pixels.device)[:, None].expand_as(cells)
                other = F.fold(cells.gather(2, order), pixels.shape[-2:], side, stride=side)
            return {("source_" if key == "latents" else "") + key: model.precompute(other, stage)[key]}
        x = seen[key]  # (n, A, width)
        if kind == "shuffled":
            order = self.orders[torch.as_tensor(rows)].to(x.device)
            return {key: x.gather(1, order[..., None].expand_as(x))}
        if kind == "pooled":
            return {key: x.mean(1, keepdim=True).expand_as(x).clone()}
        if not hasattr(self, "untrained"):
            with torch.random.fork_rng():
                torch.manual_seed(self.args.seed)
                self.untrained = type(model)(model.config, model.tokenizer).to(pixels.device).eval()
        return {key: self.untrained.precompute(pixels, stage)[key]}

    def encode_all(self, model, source, name, stage, device, rank, world):
        """The whole pool: every process encodes its contiguous share, then all share the result."""
        n = len(source)
        share = -(-n // world)
        rows = [min(i, n - 1) for i in range(rank * share, (rank + 1) * share)]  # the last share is filled up, so that all are of one size
        out = self.encode(model, source, name, stage, device, rows, rank == 0)
        for k, v in out.items() if world > 1 else ():
            parts = [torch.empty_like(v, device=device) for _ in range(world)]
            dist.all_gather(parts, v.to(device).contiguous())
            out[k] = torch.cat(parts).cpu()[:n]
        return out

    @torch.no_grad()
    def complete(self, model, tensors, stage):
        """Adds the frozen encodings of images that came as pixels because their pool was too large to cache."""
        for prefix in ("source_", ""):
            if prefix + "pixels_in" in tensors:
                was = model.training
                model.eval()
                tensors.update({prefix + k: v for k, v in model.precompute(tensors.pop(prefix + "pixels_in"), stage).items()})
                model.train(was)
        return tensors

    def fetch(self, model, name, index, prefix=""):
        if name in self.cache:
            return {prefix + k: v[index] for k, v in self.cache[name].items()}
        return {prefix + "pixels_in": self.pixels(model, self.sources[name], name, index)}

    def sample(self, part, i, rng):
        """The text of sample i of a part: a dict for model.collate."""
        pool = self.pool_of.get(part)
        if part in ("t2i", "align", "words", "i2t") and pool in self.listed:
            i = self.listed[pool].row(i)
        if part == "recon":
            # with captions beside it, RecA leaves the unconditional half of guidance to them: it should know the captioned distribution, not the pool's
            return {"prompt": rng.choice(self.templates), "drop": rng.random() < self.args.drop * ("t2i" not in self.parts)}
        if part == "t2i":
            return {"caption": self.text[pool][i], "drop": rng.random() < self.args.drop}
        if part == "words" and pool in self.scenes:  # everything there is to say: what is not in it is not in the picture
            return {"caption": shape_world.dense_caption(self.scenes[pool].scene(i), rng)}
        if part in ("align", "words"):
            return {"caption": self.text[pool][i]}
        if part == "uncond":
            return {"caption": "", "drop": True}
        if part == "oracle":
            scene = self.scenes[pool].scene(i)
            caption = shape_world.dense_caption(scene, rng) if self.args.oracle_captions == "dense" else shape_world.sparse_caption(scene, rng, shape_world.CLEAN_CAPTIONS)
            return {"caption": caption, "drop": rng.random() < self.args.drop}
        if part == "edit":
            return {"instruction": self.text[pool][i], "drop": False}
        if part == "text":
            ground, objects = self.scenes["broad"].scene(i)
            q, answer = shape_world.text_question((ground, objects[:2]), rng)  # two objects: rows stay short, and short rows are what a CPU trains fast
            return {"question": q, "answer": answer}
        if part == "i2t" and pool == "understanding":
            q, answer = rng.choice(self.text[pool][i])
            return {"question": q, "answer": answer}
        if part == "i2t":
            scene = self.scenes[pool].scene(i)
            if len(scene[1]) <= 2 and rng.random() < 0.4:  # the same holds for dense captions
                return {"question": rng.choice(self.templates), "answer": shape_world.dense_caption(scene, rng)}
            return {"turns": [shape_world.question(scene, rng)[:2] for _ in range(self.args.questions)]}
        return {}

    def batch(self, model, step, micro, rank, world):
        """Micro-batch `micro` of optimizer step `step` for this process: {part: tensors}. A pure function of its arguments and --seed."""
        out, seed = {}, self.args.seed
        for part, share in self.parts.items():
            n = round(self.args.batch * share)
            per = n // (world * self.args.accum)
            name = self.pool_of.get(part)
            size = self.size[name if name else "text"]
            places = range((micro * world + rank) * per, (micro * world + rank + 1) * per)
            index = batch_indices(size, n, seed, step, part)[places.start : places.stop]
            encodings = self.fetch(model, name, index) if name else {}  # before the texts: reading a listed picture tells whose text belongs to it
            rows = [self.sample(part, int(i), text_rng(seed, step, part, place)) for i, place in zip(index, places)]
            kind = KIND.get(part, part)
            rate = [sample_generator(seed, step, micro, f"rate-{part}") for _ in places]  # the same numbers for the whole micro-batch, on every process
            if part in ("align", "words"):
                words = torch.zeros(per, model.tokenizer.vocab_size)
                for k, row in enumerate(rows):
                    words[k, model.tokenizer.encode_ordinary(row["caption"])] = 1
                out[part] = {"words": words, **encodings}
                continue
            draws = [model.draw(kind, sample_generator(seed, step, place, part), r) for place, r in zip(places, rate)]
            tensors = {k: torch.stack([d[k] for d in draws]) for k in draws[0]}
            tensors.update(model.collate(kind, rows, self.args.text_length))
            if part == "edit":
                tensors.update(self.fetch(model, "edit_sources", index, "source_"))
            out[part] = tensors | encodings
        return out


def prefetch(make, steps, depth=2):
    """Runs make(step) for each step in a thread, `depth` ahead. Order and content depend on the step alone, so nothing is lost or repeated on resume.
    Returns get() -> the next item, and close(), which ends the thread: one that is still inside torch while Python shuts down aborts the whole process."""
    q, stop = queue.Queue(depth), threading.Event()

    def work():
        for s in steps:
            try:
                item = make(s)
            except BaseException as e:  # handed to the main thread, which raises it where the user sees it
                item = e
            while not stop.is_set():
                try:
                    q.put(item, timeout=0.2)
                    break
                except queue.Full:
                    pass
            if stop.is_set() or isinstance(item, BaseException):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def close():
        stop.set()
        thread.join()
        atexit.unregister(close)

    atexit.register(close)  # for a run that ends with an error

    def get():
        item = q.get()
        if isinstance(item, BaseException):
            raise item
        return item

    return get, close


# ---------------------------------------------------------------------------------------------------------------------
def check(paths, captions=False, image_root=None):
    """Read everything once and print what is there; True if it can be trained on."""
    images = Images(paths, captions, image_root, max_broken=1)
    good = [(images.samples[i], x.size) for i in tqdm(range(len(images)), "reading", disable=None) if (x := images.read(i)) is not None]
    print(f"{images.total} samples: {len(good)} good, {len(images.problems)} broken, {len(images.rejected)} rejected, "
          f"{images.text_only} without an image (left out)")
    for what, v in (("width", [w for _, (w, _) in good]), ("height", [h for _, (_, h) in good])) if good else ():
        print(f"  {what}: smallest {min(v)}, median {sorted(v)[len(v) // 2]}, largest {max(v)} pixels")
    for what, texts in (("captions", [s.caption for s, _ in good if s.caption]), ("turns", [a for s, _ in good for _, a in s.turns])):
        if texts:
            words = sorted(len(t.split()) for t in texts)
            print(f"  {what}: {len(texts)}, {len(set(texts))} distinct, median {words[len(words) // 2]} words, e.g. {texts[0][:80]!r}")
    for title, found in (("broken", images.problems), ("rejected", images.rejected)):
        for name, why in found.items():
            print(f"  {title}: {name}: {why}")
    return bool(good) and len(images.problems) <= 0.01 * images.total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", metavar="PATH", help="folders, tar shards, pictures or LLaVA JSON files to look through")
    parser.add_argument("--captions", action="store_true", help="with --check: every picture must have a caption")
    parser.add_argument("--image-root", help="with --check: folder of the image paths inside LLaVA JSON")
    parser.add_argument("--build-tokenizer", action="store_true", help="train the tiny vocabulary again")
    args = parser.parse_args()
    if args.build_tokenizer:
        build_tokenizer()
    elif args.check:
        sys.exit(0 if check(args.check, args.captions, args.image_root) else 2)
    else:
        parser.print_help()


if __name__ == "__main__":
    one_line_errors(main)
