"""Data: the order of samples, and what a step trains on: people's pictures (photos.py) or those of the shape world.

    python data.py --check PATH...     what is in these folders, tar shards or JSON files, and what is wrong with it
"""
import argparse
import hashlib
import os
import random
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import shape_world
from checkpoint import HERE, one_line_errors
from photos import BLANK, Images, check
from photos import open_image as open_image  # sample.py reads its pictures as training does

# ---------------------------------------------------------------------------------------------------------------------
# Template requests: what stands beside the image in a RecA prompt (arXiv 2509.07295). There are many, so that the
# model learns to read the image and not one sentence, and they are short, because at tiny scale every text token
# costs as much as an image token.

with open(os.path.join(HERE, "weights", "templates.txt"), encoding="utf-8") as lines:
    RECA_TEMPLATES = lines.read().splitlines()

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
        self.cut, self.answered = {}, False  # names of samples of which no answer is left; was there another one?
        start = time.time()
        for name in sorted(sources):
            self.size[name] = len(sources[name])
            self.keep_encodings(name, sources[name])
            self.size[name] = len(sources[name])  # without what was found to be broken
        if rank == 0:
            counts = ", ".join(f"{name} {self.size[name]:,}" for name in sorted(sources))
            print(f"pools: {counts} images, frozen encodings computed in {time.time() - start:.1f} s", flush=True)
            read = [f"{name}: {source.summary(len(source) if name in self.encodings else None)}"
                    for name, source in self.listed.items()]
            if read:
                print("data: " + " | ".join(read), flush=True)

    def sources(self):
        """-> {pool: Scenes, uint8 pictures or Images} and {pool of the shape world: texts}; sets pool_of."""
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
        exif = not getattr(args, "no_exif", False)
        for name in own:
            sources[name] = Images(args.data, captions=captioned, exif=exif)
        if args.i2t_data:
            sources["understanding"] = Images(args.i2t_data, captions=True, image_root=args.image_root, exif=exif)
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
        return self.photo_pixels(name, [source.read(int(row)) or BLANK for row in rows])

    def photo_pixels(self, name, pictures):
        purpose = {"understanding": "i2t", "captioned": "t2i"}.get(name, "recon")
        return torch.stack([self.model.preprocess(picture, purpose) for picture in pictures])

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
        """The whole pool: every process encodes its contiguous share, then all share the result. Of people's pictures
        those remain that can be used."""
        n = len(source)
        share = -(-n // self.world)
        # the last share is filled up, so that all are of one size
        rows = [min(i, n - 1) for i in range(self.rank * share, (self.rank + 1) * share)]
        out = self.encode(name, source, rows, self.rank == 0)
        for k, v in out.items() if self.world > 1 else ():
            parts = [torch.empty_like(v, device=self.device) for _ in range(self.world)]
            dist.all_gather(parts, v.to(self.device).contiguous())
            out[k] = torch.cat(parts).cpu()[:n]
        if isinstance(source, Images) and len(good := source.keep_good()) < n:
            out = {k: v[good] for k, v in out.items()}
        return out

    def fetch(self, name, index, rngs=(), prefix=""):
        """-> index, {name: tensor} of some rows of a pool: encodings, or "pixels_in" for what is still to be encoded.
        Of people's pictures that are not encoded in advance, one that cannot be used gives way to one drawn by its
        place's random.Random, on whatever process: index says which."""
        if name in self.encodings:
            return index, {prefix + k: v[index] for k, v in self.encodings[name].items()}
        source = self.uncached[name]
        if not isinstance(source, Images):
            return index, {prefix + "pixels_in": self.pixels(name, source, index)}
        index, pictures = zip(*[source.read_or_draw(int(i), rng) for i, rng in zip(index, rngs)])
        return index, {prefix + "pixels_in": self.photo_pixels(name, pictures)}

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
        good = (image for i in range(len(photos)) if (image := photos.read(i)) is not None)
        return to_uint8(self.photo_pixels("real", list(islice(good, n)) or [BLANK]))

    # ---- rows

    def row(self, part, i, rng):
        """The text of sample i of a part: a dict for model.collate."""
        args, pool = self.args, self.pool_of.get(part)
        sample = self.listed[pool].samples[i] if pool in self.listed else None
        if part == "recon":
            # where captions stand beside it, they alone teach the unconditional half of guidance
            return {"prompt": rng.choice(RECA_TEMPLATES), "drop": rng.random() < args.drop * ("t2i" not in self.parts)}
        if part == "t2i":
            return {"caption": sample.caption if sample else self.texts[pool][i], "drop": rng.random() < args.drop}
        if part == "uncond":
            return {"caption": "", "drop": True}
        if part == "edit":
            return {"instruction": self.texts[pool][i], "drop": False}
        if part == "words" and pool in self.scenes:  # all there is to say: what is not said is not in the picture
            return {"caption": shape_world.dense_caption(self.scenes[pool].scene(i), rng)}
        if part in ("align", "words"):
            return {"caption": sample.caption if sample else self.texts[pool][i]}
        if part == "text":
            ground, objects = self.scenes["broad"].scene(i)
            # two objects: rows stay short, and short rows are what a CPU trains fast
            question, answer = shape_world.text_question((ground, objects[:2]), rng)
            return {"question": question, "answer": answer}
        if part == "i2t" and sample:  # all turns of a dialogue are one row: later ones refer to what was said before
            return {"turns": list(sample.turns) or [(RECA_TEMPLATES[0], sample.caption)]}
        if part == "i2t":
            scene = self.scenes[pool].scene(i)
            if len(scene[1]) <= 2 and rng.random() < 0.4:  # the same holds for dense captions
                return {"question": rng.choice(RECA_TEMPLATES), "answer": shape_world.dense_caption(scene, rng)}
            return {"turns": [shape_world.question(scene, rng)[:2] for _ in range(args.questions)]}
        return {}

    def sample_numbers(self, step):
        """{part: numbers of all samples in its pool} of a step, for messages."""
        sizes = {part: self.size[self.pool_of.get(part, "text")] for part in self.samples}
        numbers = {part: batch_indices(sizes[part], n, self.args.seed, step, part) for part, n in self.samples.items()}
        return {part: index.tolist() for part, index in numbers.items()}

    def batch(self, step, micro=0):
        """Micro-batch `micro` of optimizer step `step`, for this process: a function of these and of --seed alone."""
        out, seed = {}, self.args.seed
        pad_to = 0 if torch.device(self.device).type == "cpu" else None  # 0: the longest row; GPUs want fixed shapes
        for part, n in self.samples.items():
            per = n // (self.world * self.args.accum)
            first = (micro * self.world + self.rank) * per
            places, name = range(first, first + per), self.pool_of.get(part)
            index, encodings = batch_indices(self.size[name or "text"], n, seed, step, part)[first:first + per], {}
            if name:  # before the texts, which belong to the pictures that are really there
                rngs = [text_rng(seed, step, part, place, "instead") for place in places]
                index, encodings = self.fetch(name, index, rngs)
            if part == "edit":
                encodings |= self.fetch("edit_sources", index, prefix="source_")[1]
            rows = [self.row(part, int(i), text_rng(seed, step, part, place)) for i, place in zip(index, places)]
            generators = [sample_generator(seed, step, place, part) for place in places]
            # what all parts, processes and micro-batches have in common
            shared = sample_generator(seed, step, 0, "shared")
            tensors = self.model.collate(part, rows, generators, shared, pad_to)
            if part == "i2t" and name in self.listed:
                self.count_cut(self.listed[name], index, tensors["labels"])
            out[part] = tensors | encodings
        return out

    def count_cut(self, source, index, labels):
        """Counts samples whose answers the model had to cut, all of them: such a row trains nothing. labels: a row
        each, negative where nothing is predicted. ValueError where the first 32 samples are all of this kind."""
        empty = [source.samples[int(i)].name for i, row in zip(index, labels) if (row < 0).all()]
        if empty and not self.cut and self.rank == 0:
            print(f"warning: {empty[0]}: no answer of it fits into the model's row, so it trains nothing; all such "
                  "samples are counted at the end", flush=True)
        self.cut |= dict.fromkeys(empty)
        self.answered = self.answered or len(empty) < len(labels)
        if not self.answered and len(self.cut) >= min(32, len(source)):
            raise ValueError(f"none of the first {len(self.cut)} samples has an answer that fits into the model's row, "
                             f"e.g. {next(iter(self.cut))}: shorten the questions, or take a larger --config")

    def report(self):
        """What the steps so far could not use: one line, or "". All processes ask together."""
        found = [(self.cut, {n: (s.problems, s.rejected) for n, s in self.listed.items() if n in self.uncached})]
        if self.world > 1:
            found = found * self.world
            dist.all_gather_object(found, found[self.rank])
        lines, cut = [], list(dict.fromkeys(name for names, _ in found for name in names))
        if cut:
            lines.append(f"{len(cut)} samples whose answers did not fit into a row, e.g. {', '.join(cut[:3])}")
        for pool in found[0][1]:
            for what, k in (("broken", 0), ("rejected", 1)):
                if bad := {name: why for _, pools in found for name, why in pools[pool][k].items()}:
                    name, why = next(iter(bad.items()))
                    lines.append(f"{pool}: {len(bad)} {what}, e.g. {name} ({why})")
        return "not trained on: " + "; ".join(lines) if lines else ""

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

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", required=True, metavar="PATH", help="folders, tars, pictures, LLaVA JSON")
    parser.add_argument("--captions", action="store_true", help="every picture must have a caption")
    parser.add_argument("--image-root", help="folder of the image paths inside LLaVA JSON")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # captions and names on terminals that are not UTF-8
    return 0 if check(args.check, args.captions, args.image_root) else 2

if __name__ == "__main__":
    one_line_errors(main)
