"""Data: pictures from folders, tar shards and LLaVA JSON, the order of samples, and what a step trains on.

    python data.py --check PATH...     what is in these folders, tar shards or JSON files, and what is wrong with it
"""
import argparse
import hashlib
import io
import json
import os
import random
import tarfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import shape_world
from checkpoint import HERE, one_line_errors, read_json
from vision_encoder import on_white

# ---------------------------------------------------------------------------------------------------------------------
# Template requests: what stands beside the image in a RecA prompt (arXiv 2509.07295). There are many, so that the
# model learns to read the image and not one sentence, and they are short, because at tiny scale every text token
# costs as much as an image token.

with open(os.path.join(HERE, "weights", "templates.txt"), encoding="utf-8") as lines:
    RECA_TEMPLATES = lines.read().splitlines()

# ---------------------------------------------------------------------------------------------------------------------
# Real images: folders, tar shards, LLaVA JSON. One pass builds an index; pictures are then read at random, shards
# stay packed.

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 89_478_485  # Pillow's own line: 256 MB of RGB. A larger file is a mistake or an attack.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses them: no warning on top

class Sample(NamedTuple):
    name: str  # for messages: the file, or shard.tar:member
    file: str
    offset: int = 0  # where the picture's bytes lie in `file`
    size: int = -1  # how many; -1: to the end
    caption: str = ""  # only where captions are asked for
    turns: tuple = ()  # LLaVA JSON: ((question, answer), ...), "<image>" taken out

def read_at(f, offset, size):
    f.seek(offset)
    return f.read(size)

def open_image(source):
    """Path or bytes of a picture -> RGB PIL image, transparency on white, 16-bit gray scaled to 8 bits, EXIF rotation
    not applied, as in the published pipelines. FileNotFoundError, or ValueError with the reason."""
    name = "picture" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            image.load()
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return on_white(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image") from None
    except Exception as e:  # a broken file can raise anything in a decoder
        raise ValueError(f"{name}: cannot be read as a picture ({e})") from None

class Images:
    """Pictures at random access: in folders (recursive), tar shards, LLaVA JSON, single files. `images[i]` -> (Sample,
    RGB PIL image), the next good one where i is broken or rejected, so that order never depends on who reads.
    captions=True reads the .txt or .json (key caption, text or prompt) beside each picture; without one it is broken.
    `problems` (broken) and `rejected` (a side <= 8 pixels, an aspect ratio >= 10) map names to reasons. ValueError once
    more than max_broken of all are broken (1: only counted), FileNotFoundError for a path that is not there."""

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
            raise ValueError(f"{paths}: no pictures found ({', '.join(IMAGE_TYPES)}, in folders, tars, LLaVA JSON)")
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
            raise ValueError(f"{path}: unknown kind of data; expected folder, .tar, .json, {', '.join(IMAGE_TYPES)}")

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
                raise ValueError(f"{path}: compressed tar; random access needs a plain one: gunzip it first")
            f.seek(0)
            try:
                with tarfile.open(fileobj=f, mode="r:") as tar:
                    while (m := tar.next()) is not None:
                        tar.members = []  # or it would keep every header
                        folder, base = os.path.split(m.name)
                        key, dot, kind = base.partition(".")
                        if m.isreg() and key:
                            group = groups.setdefault(os.path.join(folder, key), {})
                            group["." + kind.lower()] = (m.name, m.offset_data, m.size)
                    end = tar.offset
            except tarfile.TarError as e:
                error = f" ({e})"
            # tarfile stops without a word at a damaged header or between members; only a block of zeros is an end
            if error or read_at(f, end, 512) != bytes(512):
                raise ValueError(f"{path}: truncated or damaged tar shard{error}: {size:,} bytes, {len(groups)} "
                                 "samples before the damage; fetch or pack it again")
            for parts in groups.values():
                if kind := next((t for t in IMAGE_TYPES if t in parts), None):
                    name, offset, n = parts[kind]
                    beside = [t for t in (".txt", ".json") if self.captions and t in parts]
                    texts = {t: read_at(f, *parts[t][1:]) for t in beside}
                    self._add_one(Sample(f"{path}:{name}", path, offset, n), texts)

    def _add_llava(self, path):
        rows, root = read_json(path), self.image_root or os.path.dirname(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: a {type(rows).__name__}, expected LLaVA JSON: a list of "
                             "{image, conversations: [{from, value}]}")
        first = len(self.samples)
        for i, row in enumerate(rows):
            try:
                if not row.get("image"):
                    self.text_only += 1
                    continue
                said = [(t["from"], t["value"].replace("<image>", "").strip()) for t in row["conversations"]]
                pairs = list(zip(said[::2], said[1::2]))
                turns = tuple((q, a) for (who, q), (by, a) in pairs if (who, by) == ("human", "gpt") and a)
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
            raise ValueError(f"{len(self.problems)} of {self.total} samples are broken, more than "
                             f"{self.max_broken:.0%}: {first}; repair or remove them (python data.py --check PATH "
                             "lists all)")

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        """Picture i as RGB PIL image, or None where it is broken or rejected (see `problems`, `rejected`)."""
        s = self.samples[i]
        if s.name in self.problems or s.name in self.rejected:
            return None
        try:
            with open(s.file, "rb") as f:
                image = open_image(read_at(f, s.offset, s.size))
        except (ValueError, OSError) as e:
            self.problems[s.name] = str(e).removeprefix("picture: ")
            self._check()
            return None
        if min(image.size) <= 8 or max(image.size) >= 10 * min(image.size):
            size = f"{image.width}x{image.height}"
            self.rejected[s.name] = f"{size}: a side of 8 pixels or less, or an aspect ratio of 10 or more"
            return None
        return image

    def __getitem__(self, i):
        for k in range(len(self)):
            j = (i + k) % len(self)
            if (image := self.read(j)) is not None:
                self.stands_for[i] = j
                return self.samples[j], image
        raise ValueError(f"none of {self.total} pictures can be used: {len(self.problems)} broken, "
                         f"{len(self.rejected)} rejected; python data.py --check PATH lists them")

    def row(self, i):
        """The row whose picture images[i] is: its text, not row i's, belongs beside that picture."""
        if i not in self.stands_for:
            self[i]
        return self.stands_for[i]

# ---------------------------------------------------------------------------------------------------------------------
# Order and randomness: functions of (seed, step, index), so that nothing depends on the number of ranks or workers
# and resuming is free.

def _mix(*parts):
    """64 well-mixed bits: neighboring seeds and steps must give unrelated streams, and torch uses the low 32 alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")

@lru_cache(8)
def _epoch_order(n, seed, epoch, stream):
    low, high = _mix(n, seed, epoch, stream) & 0xFFFFFFFF, _mix(n, seed, epoch, stream) >> 32
    return torch.from_numpy(np.random.RandomState([low, high]).permutation(n))  # whose numbers numpy never changes

def batch_indices(n, global_batch, seed, step, stream=""):
    """Indices (global_batch,) int64 into n samples for one step: every epoch is a permutation that depends on (seed,
    epoch, stream) only; a batch may cross into the next one. A rank takes its slice; any step is reached without
    replay. ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"{n} samples to draw a batch of {global_batch} from; give data with at least one")
    at = torch.arange(step * global_batch, (step + 1) * global_batch)
    epochs = range(int(at[0]) // n, int(at[-1]) // n + 1)
    return torch.cat([_epoch_order(n, seed, e, stream)[at[at // n == e] % n] for e in epochs])

def sample_generator(seed, step, index, stream=""):
    """torch.Generator (CPU) for one sample's randomness: of (seed, step, index in the global batch, stream name)."""
    return torch.Generator().manual_seed(_mix(seed, step, index, stream))

def mix_seed(*parts):
    """63 well-mixed bits of any numbers and strings, for torch.manual_seed."""
    return _mix(*parts) >> 1

def text_rng(*parts):
    """random.Random for the words of one sample."""
    return random.Random(_mix(*parts))

def to_uint8(images):
    """Pictures in [-1, 1] (n, 3, h, w) -> uint8 (n, h, w, 3)."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

def to_float(pictures, device="cpu"):
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1

# ---------------------------------------------------------------------------------------------------------------------
# What a step trains on: images whose frozen encodings are computed once, and batches that depend on (seed, step,
# place) alone

def scrambled(model, pixels, encodings, rows, generator):
    """The picture with its nine cells in random order, encoded anew: what there is, but not where. A `view` of
    Batches."""
    side = pixels.shape[-1] // 3
    cells = F.unfold(pixels, side, stride=side)  # (n, 3 side side, 9)
    order = random_orders(rows, 9, generator)[:, None].to(pixels.device).expand_as(cells)
    other = model.precompute(F.fold(cells.gather(2, order), pixels.shape[-2:], side, stride=side))
    if "features" in encodings:
        return {"features": other["features"]}
    return {"source_latents": other["latents"]}  # the target's own latents stay

def shuffled(model, pixels, encodings, rows, generator):
    """The understanding features in random order. A `view` of Batches."""
    if "features" not in encodings:
        raise ValueError("--understanding shuffled: this model's understanding encoder trains along, so there are "
                         "no features to shuffle before it; take scrambled")
    x = encodings["features"]  # (n, tokens, width)
    order = random_orders(rows, x.shape[1], generator).to(x.device)
    return {"features": x.gather(1, order[..., None].expand_as(x))}

def random_orders(rows, places, generator):
    """(len(rows), places): row i has the i-th order that a fresh generator of this seed draws, whoever encodes it."""
    return orders_up_to(1 << max(rows).bit_length(), places, generator.initial_seed())[torch.as_tensor(rows)]

@lru_cache(2)
def orders_up_to(n, places, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(places, generator=generator) for _ in range(n)])

VIEWS = {"full": None, "scrambled": scrambled, "shuffled": shuffled}

PARTS = ("recon", "t2i", "i2t", "edit", "text", "uncond", "align", "words", "images")  # what a step may be made of

def read_mix(mix):
    """["recon=1", ...], or the dictionary itself -> {part: share of --batch}. Raises ValueError."""
    if isinstance(mix, dict):
        return mix
    items, text = [item.partition("=") for item in mix], f"--mix {' '.join(mix)}"
    try:
        out = {part: float(share) for part, _, share in items}
    except ValueError:
        raise ValueError(f"{text}: expected PART=SHARE ..., e.g. t2i=1 i2t=0.5") from None
    if not set(out) <= set(PARTS) or len(out) < len(items):
        raise ValueError(f"{text}: the parts, each at most once, are {', '.join(PARTS)}")
    if not all(0 < share <= 1000 for share in out.values()):
        raise ValueError(f"{text}: shares must be above 0 and at most 1000")
    return out

class Batches:
    """`batch(step)` -> {part: {name: tensor}}, what this process trains on in one micro-batch: frozen encodings, token
    rows, randomness. A part takes its images from a pool (`pool_of`), whose encodings are computed once and kept on the
    CPU, or step by step where they would need more than --cache-gb. view: what RecA's context holds instead of all that
    the model sees of a picture, a function (model, pixels, encodings, rows, generator) -> encodings to replace, for
    --altered-share of the pictures (None: that of --understanding)."""

    def __init__(self, args, model, device="cpu", rank=0, world=1, view=None):
        self.args, self.parts, self.model = args, args.mix, model
        self.device, self.rank, self.world = device, rank, world
        self.samples = {part: round(args.batch * share) for part, share in self.parts.items()}  # of all processes
        self.view = (view or VIEWS[args.understanding]) if "recon" in self.parts else None
        sources, self.texts = self.sources()
        self.encodings, self.uncached, self.size = {}, {}, {"text": args.pool}
        start = time.time()
        for name in sorted(sources):
            self.size[name] = len(sources[name])
            self.keep_encodings(name, sources[name])
        if rank == 0:
            counts = ", ".join(f"{name} {self.size[name]:,}" for name in sorted(sources))
            print(f"pools: {counts} images, frozen encodings computed in {time.time() - start:.1f} s", flush=True)

    def sources(self):
        """-> {pool: Scenes, uint8 pictures or Images} and {pool: texts}; sets pool_of."""
        args, captioned = self.args, self.args.stage in ("sft", "base")
        self.pool_of = {"recon": "broad", "i2t": "broad", "words": "broad", "uncond": "broad", "t2i": "captioned",
                        "align": "captioned", "edit": "edits", "images": "crowded"}
        if args.data and captioned:
            self.pool_of |= dict.fromkeys(("t2i", "align", "words", "uncond"), "captioned")
        elif args.data:
            self.pool_of |= {"recon": "real", "images": "real"}
        if args.i2t_data:
            self.pool_of["i2t"] = "understanding"
        if self.view is not None:
            if args.data:
                raise ValueError(f"--understanding {args.understanding} is for the shape world: leave it out with "
                                 "--data")
            self.pool_of["recon"] = "altered"  # apart from "broad", whose encodings image-to-text keeps as they are
        need = {self.pool_of[part] for part in self.parts if part in self.pool_of}
        own = {"captioned" if captioned else "real"} if args.data else set()
        if args.config != "tiny" and (not own or need - own - {"understanding"}):
            raise ValueError(f"--config {args.config} draws {self.model.config.image_size}-pixel pictures: give "
                             "--data PATH (folders, tars), --i2t-data JSON if i2t is trained, and a --mix of parts "
                             f"that these have data for (here {', '.join(self.parts)}); the shape world is for tiny")
        sources, texts = self.shape_world(need - own)
        for name in own:
            sources[name] = Images(args.data, captions=captioned)
            texts[name] = [s.caption for s in sources[name].samples]
        if args.i2t_data:
            sources["understanding"] = listed = Images(args.i2t_data, captions=True, image_root=args.image_root)
            texts["understanding"] = [s.turns or ((RECA_TEMPLATES[0], s.caption),) for s in listed.samples]
        self.listed = {name: source for name, source in sources.items() if isinstance(source, Images)}
        self.scenes = {name: source for name, source in sources.items() if isinstance(source, shape_world.Scenes)}
        return {name: source for name, source in sources.items() if name in need | {"edit_sources"}}, texts

    def shape_world(self, need):
        """-> {pool: scenes or pictures} and {pool: texts} of the shape world."""
        args, sources, texts = self.args, {}, {}
        if "crowded" in need:
            sources["crowded"] = shape_world.crowded_pictures(args.pool, seed=args.seed)
        if {"broad", "altered"} & need or "text" in self.parts:
            sources["broad"] = sources["altered"] = shape_world.Scenes(args.pool, seed=10 + args.seed)
        if "captioned" in need:
            scenes = sources["captioned"] = shape_world.Scenes(args.captioned, seed=20 + args.seed, captioned=True)
            bias, n = shape_world.caption_bias(args.sparse_captions, args.wrong_captions), len(scenes)
            texts["captioned"] = [shape_world.sparse_caption(scenes.scene(i), text_rng(args.seed, i, "caption"), bias,
                                                             scenes.scene((i + 1) % n)) for i in range(n)]
        if "edits" in need:
            scenes = sources["edit_sources"] = shape_world.Scenes(args.pool, seed=30 + args.seed, captioned=True)
            rngs = [text_rng(args.seed, i, "edit") for i in range(len(scenes))]
            edits = [shape_world.clean_edit(scenes.scene(i), rng) for i, rng in enumerate(rngs)]
            texts["edits"], sources["edits"] = [e[0] for e in edits], shape_world.Scenes.of([e[1] for e in edits])
        return sources, texts

    # ---- encodings

    def keep_encodings(self, name, source):
        """Encodes a pool once, or leaves it to be encoded step by step where it is too large to keep."""
        one = self.encode(name, source, [0])
        gigabytes = len(source) * sum(v.numel() * v.element_size() for v in one.values()) / 1e9
        if gigabytes <= self.args.cache_gb:
            self.encodings[name] = self.encode_all(name, source)
            return
        if name == "altered":
            raise ValueError(f"--understanding {self.args.understanding}: its pool must be cached ({gigabytes:.1f} "
                             f"GB): raise --cache-gb ({self.args.cache_gb:g}) or lower --pool")
        self.uncached[name] = source
        if self.rank == 0:
            print(f"pool {name}: encodings of {len(source):,} images would take {gigabytes:.1f} GB (--cache-gb "
                  f"{self.args.cache_gb:g}), so each step encodes its own")

    def pixels(self, name, source, rows):
        """Images (n, 3, H, W) in [-1, 1] of some rows of a source, as the model was trained to see them."""
        if isinstance(source, shape_world.Scenes):
            return to_float(source[rows].render())
        if isinstance(source, np.ndarray):
            return to_float(source[rows])
        purpose = {"understanding": "i2t", "captioned": "t2i"}.get(name, "recon")
        return torch.stack([self.model.preprocess(source[int(row)][1], purpose) for row in rows])

    @torch.no_grad()
    def encode(self, name, source, rows, show=False):
        """The frozen encodings of some rows, on the CPU."""
        was, chunk = self.model.training, 256 if getattr(self.model.config, "image_size", 48) <= 64 else 8
        self.model.eval()
        chunks = []
        for start in tqdm(range(0, len(rows), chunk), f"encoding {name}", disable=None if show else True):
            some = rows[start:start + chunk]
            pixels = self.pixels(name, source, some).to(self.device)
            encodings = self.model.precompute(pixels)
            if name == "altered":
                encodings |= self.altered(pixels, encodings, some)
            chunks.append({k: v.cpu() for k, v in encodings.items()})
        self.model.train(was)
        return {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}

    def altered(self, pixels, encodings, rows):
        """What the view replaces; the last rows of the pool, which is in no order, keep what they have."""
        generator = sample_generator(self.args.seed, 0, 0, "altered")
        out = self.view(self.model, pixels, encodings, rows, generator)
        full = torch.as_tensor(rows) >= round(self.args.altered_share * self.size["altered"])
        for k, v in out.items():
            v[full] = encodings[k.removeprefix("source_")][full]
        return out

    def encode_all(self, name, source):
        """The whole pool: every process encodes its contiguous share, then all share the result."""
        n = len(source)
        share = -(-n // self.world)
        # the last share is filled up, so that all are of one size
        rows = [min(i, n - 1) for i in range(self.rank * share, (self.rank + 1) * share)]
        out = self.encode(name, source, rows, self.rank == 0)
        if self.world == 1:
            return out
        for k, v in out.items():
            parts = [torch.empty_like(v, device=self.device) for _ in range(self.world)]
            dist.all_gather(parts, v.to(self.device).contiguous())
            out[k] = torch.cat(parts).cpu()[:n]
        return out

    def fetch(self, name, index, prefix=""):
        """{name: tensor} of some rows of a pool: encodings, or "pixels_in" for what is still to be encoded."""
        if name in self.encodings:
            return {prefix + k: v[index] for k, v in self.encodings[name].items()}
        return {prefix + "pixels_in": self.pixels(name, self.uncached[name], index)}

    @torch.no_grad()
    def to_device(self, batch, counts):
        """A batch on the device of the step, with the encodings of what came as pixels and with the step's counts."""
        was, out = self.model.training, {}
        for part, tensors in batch.items():
            tensors = {k: v.to(self.device, non_blocking=True) for k, v in tensors.items()}
            for name in [k for k in tensors if k.endswith("pixels_in")]:
                self.model.eval()
                encodings = self.model.precompute(tensors.pop(name))
                tensors |= {name.removesuffix("pixels_in") + k: v for k, v in encodings.items()}
            out[part] = tensors | ({"count": counts[part]} if part in counts else {})
        self.model.train(was)
        return out

    def first_pictures(self, n):
        """uint8 (n, H, W, 3): the first of the user's own pictures, as RecA is shown them."""
        photos = self.listed["real"]
        first = [self.model.preprocess(photos[i][1], "recon") for i in range(min(n, len(photos)))]
        return to_uint8(torch.stack(first))

    # ---- rows

    def row(self, part, i, rng):
        """The text of sample i of a part: a dict for model.collate."""
        args, pool = self.args, self.pool_of.get(part)
        if pool in self.listed and part != "recon":
            i = self.listed[pool].row(i)
        if part == "recon":
            # where captions stand beside it, they alone teach the unconditional half of guidance
            return {"prompt": rng.choice(RECA_TEMPLATES), "drop": rng.random() < args.drop * ("t2i" not in self.parts)}
        if part == "t2i":
            return {"caption": self.texts[pool][i], "drop": rng.random() < args.drop}
        if part == "uncond":
            return {"caption": "", "drop": True}
        if part == "edit":
            return {"instruction": self.texts[pool][i], "drop": False}
        if part == "words" and pool in self.scenes:  # all there is to say: what is not said is not in the picture
            return {"caption": shape_world.dense_caption(self.scenes[pool].scene(i), rng)}
        if part in ("align", "words"):
            return {"caption": self.texts[pool][i]}
        if part == "text":
            ground, objects = self.scenes["broad"].scene(i)
            # two objects: rows stay short, and short rows are what a CPU trains fast
            question, answer = shape_world.text_question((ground, objects[:2]), rng)
            return {"question": question, "answer": answer}
        if part == "i2t" and pool == "understanding":
            question, answer = rng.choice(self.texts[pool][i])
            return {"question": question, "answer": answer}
        if part == "i2t":
            scene = self.scenes[pool].scene(i)
            if len(scene[1]) <= 2 and rng.random() < 0.4:  # the same holds for dense captions
                return {"question": rng.choice(RECA_TEMPLATES), "answer": shape_world.dense_caption(scene, rng)}
            return {"turns": [shape_world.question(scene, rng)[:2] for _ in range(args.questions)]}
        return {}

    def sample_numbers(self, step):
        """{part: numbers of all samples in its pool} of a step, for messages."""
        sizes = {part: self.size[self.pool_of.get(part, "text")] for part in self.samples}
        return {part: batch_indices(sizes[part], n, self.args.seed, step, part).tolist() for part, n in self.samples.items()}

    def batch(self, step, micro=0):
        """Micro-batch `micro` of optimizer step `step`, for this process: a function of these and of --seed alone."""
        out, seed = {}, self.args.seed
        pad_to = 0 if torch.device(self.device).type == "cpu" else None  # 0: the longest row; GPUs want fixed shapes
        for part, n in self.samples.items():
            per = n // (self.world * self.args.accum)
            first = (micro * self.world + self.rank) * per
            places, name = range(first, first + per), self.pool_of.get(part)
            index = batch_indices(self.size[name or "text"], n, seed, step, part)[first:first + per]
            # before the texts: reading a listed picture tells whose text belongs to it
            encodings = self.fetch(name, index) if name else {}
            if part == "edit":
                encodings |= self.fetch("edit_sources", index, "source_")
            rows = [self.row(part, int(i), text_rng(seed, step, part, place)) for i, place in zip(index, places)]
            generators = [sample_generator(seed, step, place, part) for place in places]
            # what all parts, processes and micro-batches have in common
            shared = sample_generator(seed, step, 0, "shared")
            out[part] = self.model.collate(part, rows, generators, shared, pad_to) | encodings
        return out

def prefetch(make, steps, depth=2):
    """Yields make(step) for each step, made in a thread, `depth` ahead. Order and content depend on the step alone,
    so nothing is lost or repeated on resume. Close the generator before the program ends."""
    pool, ahead = ThreadPoolExecutor(1), deque()
    try:
        for step in steps:
            ahead.append(pool.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:  # a thread that is still inside torch while Python shuts down aborts the process
        pool.shutdown(wait=True, cancel_futures=True)

# ---------------------------------------------------------------------------------------------------------------------

def check(paths, captions=False, image_root=None):
    """Read everything once and print what is there; True if it can be trained on."""
    images = Images(paths, captions, image_root, max_broken=1)
    rows = tqdm(range(len(images)), "reading", disable=None)
    good = [(images.samples[i], image.size) for i in rows if (image := images.read(i)) is not None]
    print(f"{images.total} samples: {len(good)} good, {len(images.problems)} broken, {len(images.rejected)} rejected, "
          f"{images.text_only} without an image (left out)")
    for what, v in (("width", [w for _, (w, _) in good]), ("height", [h for _, (_, h) in good])) if good else ():
        print(f"  {what}: smallest {min(v)}, median {sorted(v)[len(v) // 2]}, largest {max(v)} pixels")
    answers = [answer for s, _ in good for _, answer in s.turns]
    for what, texts in (("captions", [s.caption for s, _ in good if s.caption]), ("turns", answers)):
        if texts:
            words = sorted(len(t.split()) for t in texts)
            print(f"  {what}: {len(texts)}, {len(set(texts))} distinct, median {words[len(words) // 2]} words, "
                  f"e.g. {texts[0][:80]!r}")
    for title, found in (("broken", images.problems), ("rejected", images.rejected)):
        for name, why in found.items():
            print(f"  {title}: {name}: {why}")
    return bool(good) and len(images.problems) <= 0.01 * images.total

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", required=True, metavar="PATH", help="folders, tars, pictures, LLaVA JSON")
    parser.add_argument("--captions", action="store_true", help="every picture must have a caption")
    parser.add_argument("--image-root", help="folder of the image paths inside LLaVA JSON")
    args = parser.parse_args()
    return 0 if check(args.check, args.captions, args.image_root) else 2

if __name__ == "__main__":
    one_line_errors(main)
