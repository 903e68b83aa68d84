"""Data: people's pictures, the order of samples, and what a step trains on: these or the shape world.

    python data.py --check PATH...     what is in these folders, shards or JSON files, and what is wrong with it
"""
import argparse
import hashlib
import io
import json
import os
import random
import signal
import stat
import tarfile
import time
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, PngImagePlugin, UnidentifiedImageError, features
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

import shape_world
from checkpoint import HERE, check_disk, one_line_errors, origin, reading, reason_of, refuse_unused, write_safetensors
from vision_encoder import as_rgb, to_float, to_uint8

# ---------------------------------------------------------------------------------------------------------------------
# Pictures that people have: single ones, and in folders, tar shards, parquet and LLaVA JSON

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_TYPES += (".avif",) * bool(features.check("avif"))
TEXT_TYPES = (".txt", ".json")
CAPTION_COLUMNS, PICTURE_COLUMNS = ("caption", "text", "prompt"), ("image", "jpg", "png", "webp")  # of parquet
UNREAD = {(".heic", ".heif", ".hif", ".avif"): "pictures that Pillow here cannot open (HEIC, AVIF: convert to JPEG)",
          (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip"): "compressed or nested archives (only "
          "a plain .tar has random access: gunzip or unpack them)"}
SYSTEM_FOLDERS = ("@eaDir", "#recycle", "__MACOSX")  # thumbnails and waste that file servers and Macs leave behind
MAX_PIXELS = 89_478_485  # Pillow's own line: 256 MB of RGB. A larger file is a mistake or an attack.
MAX_SIDE = int(MAX_PIXELS ** 0.5)  # preprocessing may stretch or pad a picture to a square of its longer side
HIDDEN, NO_FILE = "hidden or system files and folders", "broken links, pipes and devices"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
BLANK = Image.new("RGB", (64, 64))  # stands where a picture cannot be used, until its place is dropped
PROBE = Image.linear_gradient("L").resize((97, 64)).convert("RGB")  # shows what preprocessing does
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_image refuses them: no warning on top
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a long text beside the pixels does no harm

class Sample(NamedTuple):
    name: str  # for messages: the file, or shard.tar:member
    file: str
    offset: int = 0  # where the picture's bytes lie in `file`; in parquet: the row in its group
    size: int = -1  # how many; -1: to the end
    caption: str = ""  # only where captions are asked for
    turns: tuple = ()  # LLaVA JSON: ((question, answer), ...), "<image>" taken out
    group: int = -1  # parquet: the row group

def shown(name):
    """A name of a file as part of one line for any terminal: what cannot be printed is escaped."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)

def key_of(name):
    """webdataset's key: a path up to the first dot of its base name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.partition(".")[0])

def is_hidden(name):
    return (name.startswith(".") and name != "..") or name in SYSTEM_FOLDERS

def kind_of(entry):
    """"folder" or "file", links followed, or why an entry of a folder is left out."""
    try:
        kind = "folder" if entry.is_dir() else "file" if entry.is_file() else NO_FILE
    except OSError:  # a link to itself
        kind = NO_FILE
    return HIDDEN if is_hidden(entry.name) else kind

def why_unread(name):
    return next((why for kinds, why in UNREAD.items() if name.lower().endswith(kinds)), "files of other kinds")

def read_part(file, offset, size):
    with open(file, "rb") as f:
        f.seek(offset)
        return f.read(size)

@lru_cache(2)
def row_group(file, group):
    """The pictures in a row group of a parquet file, which can be read as a whole only: so the last two are kept."""
    from pyarrow.parquet import ParquetFile
    return ParquetFile(file, memory_map=True).read_row_group(group, PICTURE_COLUMNS, use_threads=False).column(0)

def picture_bytes(sample):
    if sample.group < 0:
        return read_part(sample.file, sample.offset, sample.size)
    value = row_group(sample.file, sample.group)[sample.offset].as_py()
    value = value.get("bytes") if isinstance(value, dict) else value
    return value if isinstance(value, bytes) else b""  # a name alone is no picture

def open_image(source, exif=True):
    """Path or bytes of a picture -> RGB PIL image by `as_rgb`, the first frame of several, scaled down to sides of at
    most MAX_SIDE. FileNotFoundError, or ValueError with the reason."""
    name = "picture" if isinstance(source, bytes) else shown(os.fspath(source))
    try:
        if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
            raise ValueError("not a regular file")  # a pipe would wait forever
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} is over {MAX_PIXELS / 1e6:.0f} megapixels")
            image.load()
            image = as_rgb(image, exif)
            image.thumbnail((MAX_SIDE, MAX_SIDE))  # which never enlarges
            return image
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name}: no such image") from origin(e)
    except Exception as e:  # a broken file can raise anything in a decoder, and Pillow's message names an address
        why = "of no kind that Pillow here knows" if isinstance(e, UnidentifiedImageError) else reason_of(e)
        raise ValueError(f"{name}: cannot be read as a picture ({why})") from origin(e)

def encoding_of(raw):
    """Of a text that begins with these bytes: UTF-16 where a byte order mark says so, else UTF-8, never a guess."""
    return "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"

def read_caption(texts):
    """{".txt" or ".json": bytes} -> caption, or "". Of JSON the first of the keys caption, text, prompt that says
    something. ValueError or RecursionError where it cannot be read."""
    text = texts.get(".txt", b"")
    caption = " ".join(text.decode(encoding_of(text)).split())
    if not caption and ".json" in texts:
        row = json.loads(texts[".json"])  # which knows UTF-16, too
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}, expected an object with the key caption, text or prompt")
        said = [" ".join(row[k].split()) for k in ("caption", "text", "prompt") if isinstance(row.get(k), str)]
        caption = next(filter(None, said), "")
    if "\0" in caption:  # UTF-16 without its mark, or UTF-32
        raise ValueError("NUL characters: convert it to UTF-8")
    caption.encode()  # raises where JSON spells half a character, which no tokenizer takes
    return caption

def read_rows(path):
    """The rows of a JSON list or of JSON lines (what is no JSON there comes as a string). ValueError."""
    with reading(shown(path), "not valid JSON", "; the file may be incomplete, fetch it again, or convert it to UTF-8"):
        with open(path, encoding=encoding_of(read_part(path, 0, 2))) as f:
            text = f.read()
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json_or_text(line) for line in text.split("\n") if line.strip()]
            if not rows or not isinstance(rows[0], dict):
                raise
    if isinstance(rows, dict) and {"conversations", "messages"} & set(rows):
        rows = [rows]  # JSON lines with a single one
    if not isinstance(rows, list):
        raise ValueError(f"{shown(path)}: a {type(rows).__name__}, expected LLaVA JSON: a list of "
                         "{image, conversations: [{from, value}]}, or such rows as JSON lines")
    return rows

def json_or_text(line):
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line

def llava_row(row):
    """-> (path of its picture, ((question, answer), ...)), or ("", why it is left out). Read are image or
    images, conversations or messages, from and value or role and content. Any of four errors where it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, expected an object")
    image, key = row.get("image") or row.get("images"), "messages" if "messages" in row else "conversations"
    if isinstance(image, list) and len(image) > 1:
        return "", "rows with several pictures"
    if not image:
        others = [k for k in row if any(word in k.lower() for word in ("image", "img", "picture", "video")) and row[k]]
        elsewhere = others or "<image>" in str(row.get(key)) or "'type': 'image" in str(row.get(key))
        return "", "rows whose picture is not under image or images" if elsewhere else "rows without a picture"
    said = []
    for turn in row[key]:
        text = turn["value"] if "value" in turn else turn["content"]
        if isinstance(text, list):
            text = " ".join(part["text"] for part in text if "text" in part)
        text.encode()  # see read_caption
        said.append((ROLES.get(turn.get("from") or turn.get("role")), text.replace("<image>", "").strip()))
    pairs = list(zip(said[::2], said[1::2]))
    turns = tuple((q, a) for (who, q), (by, a) in pairs if (who, by) == ("human", "gpt") and a)
    if len(turns) * 2 != len(said) or not turns:
        raise ValueError("turns are not human, gpt, human, gpt ... with an answer each")
    return image[0] if isinstance(image, list) else image, turns

def after_zeros(f, at):
    """Where the first block of 512 bytes that is not zero begins, from `at` on; None: nowhere."""
    f.seek(at)
    while chunk := f.read(1 << 20):
        if zeros := chunk.lstrip(b"\0"):
            return at + (len(chunk) - len(zeros)) // 512 * 512
        at += len(chunk)

class Images:
    """Pictures at random access: in folders (recursive, links followed), tar shards, parquet, LLaVA JSON, single files;
    `images.read(i)` -> RGB PIL image of images.samples[i]. captions=True reads the .txt or .json beside each picture;
    without one it is broken. exif: see open_image. starts[k]: where the samples of path k begin.
    `problems` (broken) and `rejected` (a side <= 8 pixels, an aspect ratio >= 10) map names to reasons, `left_out`
    lists (name, reason) of what was never a sample. ValueError once more than max_broken of all are broken (1: they
    are only counted), FileNotFoundError for a path that is not there."""

    def __init__(self, paths, captions=False, image_root=None, max_broken=0.01, exif=True):
        self.samples, self.problems, self.rejected, self.left_out = [], {}, {}, []
        self.captions, self.image_root, self.max_broken, self.exif = captions, image_root, max_broken, exif
        self.folders, self.starts = set(), [0]  # the real paths of folders that were read: links may lead in circles
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            self._add(os.fspath(path))
            self.starts.append(len(self.samples))
        self.total = len(self.samples) + len(self.problems)
        if not self.total:
            raise ValueError(f"{shown(str(paths))}: no pictures found ({', '.join(IMAGE_TYPES)}, in folders, tars, "
                             f"parquet, LLaVA JSON){self._left_out()}")
        self._check()

    def _add(self, path):
        stem, kind = os.path.splitext(path)
        if os.path.isdir(path):
            self._add_folder(path)
        elif not os.path.exists(path):
            raise FileNotFoundError(f"{shown(path)}: no such folder, tar shard, picture or LLaVA JSON file")
        elif not os.path.isfile(path):
            raise ValueError(f"{shown(path)}: not a regular file; expected folder, tar shard, picture or LLaVA JSON")
        elif kind.lower() == ".tar":
            self._add_tar(path)
        elif kind.lower() == ".parquet":
            if why := self._add_parquet(path):
                raise ValueError(f"{shown(path)}: left out: {why}")
        elif kind.lower() in (".json", ".jsonl"):
            self._add_llava(path)
        elif kind.lower() in IMAGE_TYPES:
            beside = [base + end for base in (stem, key_of(path)) for t in TEXT_TYPES for end in (t, t.upper())]
            self._add_files({name: (name, 0, -1) for name in [path, *filter(os.path.isfile, beside)]})
        else:
            raise ValueError(f"{shown(path)}: unknown kind of data: {why_unread(path)}; expected folder, .tar, "
                             f".parquet, .json, .jsonl, {', '.join(IMAGE_TYPES)}")

    def _add_folder(self, path):
        todo = [path]
        while todo:
            folder, files, inner = todo.pop(), {}, []
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as e:
                self.problems[shown(folder)] = f"cannot be listed ({e.strerror})"
                continue
            real = os.path.realpath(folder)
            if real in self.folders:
                self.left_out.append((shown(folder), "folders that were read already (links)"))
                continue
            self.folders.add(real)
            for entry in entries:
                kind = kind_of(entry)
                if kind == "folder":
                    inner.append(entry.path)
                elif kind == "file":
                    files[entry.path] = (entry.path, 0, -1)
                else:
                    self.left_out.append((shown(entry.path), kind))
            self._add_files(files)
            todo += reversed(inner)

    def _add_tar(self, path):
        """Reads all tars that lie in the file, one after the other."""
        size, start, part, seen = os.path.getsize(path), 0, 1, 0
        with open(path, "rb") as f:
            if f.read(2) == b"\x1f\x8b":
                raise ValueError(f"{shown(path)}: compressed tar; random access needs a plain one: gunzip it first")
            while start is not None:
                members, error = {}, ""  # name: (offset, size), or the name that a link points to
                label = shown(path) + (f"[{part}]:" if part > 1 else ":")
                f.seek(start)
                try:
                    with tarfile.open(fileobj=f, mode="r:") as tar:
                        while (m := tar.next()) is not None:
                            tar.members = []  # or it would keep every header
                            seen += 1
                            self._add_member(members, m, label)
                        end = tar.offset
                except Exception as e:  # a damaged header can raise anything
                    error = f" ({reason_of(e)})"
                # tarfile stops without a word at a damaged header or between members; only a block of zeros is an end
                if error or read_part(path, end, 512) != bytes(512):
                    raise ValueError(f"{shown(path)}: truncated or damaged tar shard{error}: {size:,} bytes, {seen} "
                                     "members before the damage; fetch or pack it again")
                self._add_members(path, label, members)
                start, part = after_zeros(f, end), part + 1

    def _add_member(self, members, m, label):
        name = os.path.normpath(m.name)
        if any(map(is_hidden, name.split("/"))) and not m.isdir():
            self.left_out.append((label + shown(name), HIDDEN))
        elif m.isreg() or m.islnk() or m.issym():
            if name in members:
                self.left_out.append((label + shown(name), "members that later ones of the same name replace"))
            link = m.linkname if m.islnk() else os.path.join(os.path.dirname(name), m.linkname)
            members[name] = (m.offset_data, m.size) if m.isreg() else os.path.normpath(link)
        elif not m.isdir():
            self.left_out.append((label + shown(name), NO_FILE))

    def _add_members(self, path, label, members):
        files = {}
        for name, where in members.items():
            for _ in range(8):  # links to links; longer chains are circles
                where = members.get(where) if isinstance(where, str) else where
            if isinstance(where, tuple):
                files[name] = (path, *where)
            else:
                self.left_out.append((label + shown(name), "links to nothing in the tar"))
        self._add_files(files, label)

    def _add_files(self, files, label=""):
        """files {name: (file, offset, size)}: those of one folder, or of one tar with its label. A picture's caption
        has its stem or its key, the base name up to the first dot; in tars also another name of that key, which is
        webdataset's rule, but that of no other picture."""
        split = {name: (stem, kind.lower()) for name in files for stem, kind in [os.path.splitext(name)]}
        stems = {stem for stem, kind in split.values() if kind in IMAGE_TYPES}
        own, keyed = {}, {}  # texts by their stem, by their key
        for name, (stem, kind) in split.items() if self.captions else ():
            if kind in TEXT_TYPES:
                own.setdefault(stem, {})[kind] = files[name]
                if label and stem not in stems:
                    keyed.setdefault(key_of(name), {}).setdefault(kind, []).append(files[name])
        for name, where in files.items():
            (stem, kind), key = split[name], key_of(name)
            if kind in IMAGE_TYPES:
                texts = own.get(stem) or own.get(key)
                some = {} if texts else keyed.get(key, {})
                sample = Sample(label + shown(name), *where)
                if any(len(same) > 1 for same in some.values()):
                    self.problems[sample.name] = "several captions of its key, none of its own name"
                else:
                    self._add_one(sample, texts or {kind: same[0] for kind, same in some.items()})
            elif kind == ".tar" and not label:
                self._add_tar(name)
            elif kind == ".parquet" and not label:
                self.left_out += [(shown(name), why)] if (why := self._add_parquet(name)) else []
            elif kind not in TEXT_TYPES:
                self.left_out.append((label + shown(name), why_unread(name)))

    def _add_one(self, sample, texts):
        """texts: {".txt" or ".json": where it lies, or what it says}."""
        try:
            caption = read_caption({k: at if isinstance(at, bytes) else read_part(*at) for k, at in texts.items()})
            problem = "empty caption" if texts else "no caption (.txt or .json beside it)"
        except (ValueError, OSError, RecursionError) as e:
            way_out = ": convert it to UTF-8" * isinstance(e, UnicodeDecodeError)
            caption, problem = "", f"unreadable caption ({reason_of(e)}){way_out}"
        if self.captions and not caption:
            self.problems[sample.name] = problem
        else:
            self.samples.append(sample._replace(caption=caption))

    def _add_parquet(self, path):
        """-> "", or why the file is left out. Of its columns none but the captions are read."""
        rows = count()
        try:
            from pyarrow.parquet import ParquetFile
            file = ParquetFile(path)
            columns = set(file.schema_arrow.names)
            if not columns & set(PICTURE_COLUMNS):
                return f"parquet files without a column {', '.join(PICTURE_COLUMNS)}"
            for group in range(file.num_row_groups):
                texts = file.read_row_group(group, [k for k in CAPTION_COLUMNS if k in columns and self.captions])
                for at, said in enumerate(texts.to_pylist()):
                    sample = Sample(f"{shown(path)}:{next(rows)}", path, at, group=group)
                    said = json.dumps({k: v for k, v in said.items() if isinstance(v, str)})
                    self._add_one(sample, {".json": said.encode()} if self.captions else {})
        except ImportError:
            return "parquet files, for which pyarrow is missing (pip install pyarrow)"
        except Exception as e:  # pyarrow has its own kinds
            raise ValueError(f"{shown(path)}: truncated or damaged parquet file ({reason_of(e)})") from origin(e)
        return ""

    def _add_llava(self, path):
        rows, root, missing = read_rows(path), self.image_root or os.path.dirname(path), []
        is_there = lru_cache(None)(os.path.isfile)  # many rows may share a picture
        for i, row in enumerate(rows):
            try:
                image, turns = llava_row(row)
                file = os.path.join(root, image)
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                self.problems[f"{shown(path)}:{i}"] = f"not a LLaVA sample ({type(e).__name__}: {e})"
                continue
            if not image:
                self.left_out.append((f"{shown(path)}:{i}", turns))
            elif is_there(file):
                caption = turns[0][1] if self.captions else ""
                self.samples.append(Sample(f"{shown(file)} (row {i})", file, turns=turns, caption=caption))
            else:
                missing.append(shown(file))
                self.problems[f"{shown(path)}:{i}"] = f"no such image: {missing[-1]}"
        if len(missing) > self.max_broken * len(rows):
            raise FileNotFoundError(f"{missing[0]}: no such image, nor those of {len(missing) - 1} other rows of "
                                    f"{len(rows)} in {shown(path)}; set --image-root to their folder")

    def _check(self, some_good=True):
        if len(self.problems) > self.max_broken * self.total:
            first = "; ".join(f"{n} ({why})" for n, why in list(self.problems.items())[:3])
            raise ValueError(f"{len(self.problems)} of {self.total} samples are broken, more than "
                             f"{self.max_broken:.0%}: {first}; repair or remove them (python data.py --check PATH "
                             "lists all)")
        if not some_good:
            raise ValueError(f"none of {self.total} pictures can be used: {len(self.problems)} broken, "
                             f"{len(self.rejected)} rejected; python data.py --check PATH lists them")

    def _left_out(self):
        names = {}
        for name, why in self.left_out:
            names.setdefault(why, []).append(name)
        some = [f"{why}: {len(found)}, e.g. {found[0]}" for why, found in names.items()]
        return "; left out: " + "; ".join(some) if some else ""

    def summary(self, good=None):
        """One line: how many samples there are and what is not used, by reason. good: how many were read."""
        used = f"{len(self)} still to be read" if good is None else f"{good} good"
        broken, rejected = (f", e.g. {name} ({why})" if found else "" for found in (self.problems, self.rejected)
                            for name, why in [next(iter(found.items()), ("", ""))])
        return (f"{self.total} samples: {used}, {len(self.problems)} broken{broken}, {len(self.rejected)} "
                f"rejected{rejected}{self._left_out()}")

    def __len__(self):
        return len(self.samples)

    def read(self, i):
        """Picture i as RGB PIL image, or None where it is broken or rejected (see `problems`, `rejected`)."""
        s = self.samples[i]
        if s.name in self.problems or s.name in self.rejected:
            return None
        try:
            image = open_image(picture_bytes(s), self.exif)
        except (ValueError, OSError) as e:
            self.problems[s.name] = str(e).removeprefix("picture: ")
            self._check()
            return None
        w, h = image.size
        if min(w, h) > 8 and max(w, h) < 10 * min(w, h):
            return image
        self.rejected[s.name] = f"{w}x{h}: a side of 8 pixels or less, or an aspect ratio of 10 or more"
        return None

    def read_or_draw(self, i, rng):
        """(i, picture i) or, where it cannot be used, another one of its path that `rng` draws: not its neighbor each
        time. ValueError where none is good."""
        path = np.searchsorted(self.starts, i, "right")
        for _ in range(20 * len(self) + 20):  # what is known to be bad is not read again
            if (image := self.read(i)) is not None:
                return i, image
            i = rng.randrange(self.starts[path - 1], self.starts[path])
        self._check(False)

    def keep_good(self):
        """After all were read: drops the samples that are broken or rejected, whichever process found that -> the
        indices of the others. ValueError as in __init__, for all processes together, and where none is good."""
        if dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, (self.problems, self.rejected))
            self.problems, self.rejected = ({k: v for each in found for k, v in each[n].items()} for n in (0, 1))
        good = [i for i, s in enumerate(self.samples) if s.name not in self.problems and s.name not in self.rejected]
        self._check(bool(good))
        self.samples, self.starts = [self.samples[i] for i in good], np.searchsorted(good, self.starts).tolist()
        return good

# ---------------------------------------------------------------------------------------------------------------------
# Order and randomness: of (seed, step, index), whatever the number of ranks or workers; so resuming is free

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

# ---------------------------------------------------------------------------------------------------------------------
# How batches come in time: made ahead in processes or a thread, from encodings that are kept on the disk

def worker_count(args, device):
    """--workers; where it was not given 0, but up to 4 on GPUs at published sizes."""
    if (given := getattr(args, "workers", 0)) is None and args.config != "tiny" and torch.device(device).type == "cuda":
        return max(1, min(4, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return given or 0

def on_its_own(worker):
    """A signal reaches a whole group of processes, but workers end after their run: when it says so, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

def prefetch(make, items, workers=0, pin=False, depth=2):
    """Yields make(item) for each item, in order, made ahead: in a thread, or in so many processes, which are forked and
    so share this one's memory. pin: for copies to a GPU. Close the generator before the program ends."""
    if workers:
        import resource  # not on Windows; each tensor on its way is an open file
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    made = iter(DataLoader(items, None, num_workers=workers, collate_fn=make, pin_memory=pin, worker_init_fn=on_its_own,
                           multiprocessing_context="fork" if workers else None, generator=torch.Generator()))
    pool, ahead = ThreadPoolExecutor(1), deque()
    try:
        for _ in items:
            ahead.append(pool.submit(next, made))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        yield from (future.result() for future in ahead)
    finally:  # a thread that is still inside torch while Python shuts down aborts the process
        pool.shutdown(wait=True, cancel_futures=True)

SHARD = 512  # rows in a file of --cache

def cache_key(model, stage, source, example):
    """A hash of all that the encodings of a data.Images depend on: the weights of precompute that nobody trains, the
    settings, preprocessing (example: what it made of a fixed picture), and the files: names, sizes, times of change."""
    key, stat_of = hashlib.sha256(), lru_cache(None)(os.stat)
    encoders = getattr(model, "encoders", None)  # the submodules that precompute uses; None: any
    for name, t in model.state_dict(keep_vars=True).items():
        if not t.requires_grad and (encoders is None or name.split(".")[0] in encoders):
            t = getattr(t, "full_tensor", t.detach)().cpu().contiguous().flatten()  # full_tensor: of a sharded model
            key.update(f"{name} {t.dtype}".encode() + t.view(torch.uint8).numpy().tobytes())
    settings = {k: v for k, v in vars(model.config).items() if k != "cfg"}, stage, source.exif
    key.update(repr(settings).encode() + example.numpy().tobytes())
    for s in source.samples:
        found = stat_of(s.file)
        about = os.path.abspath(s.file), found.st_size, found.st_mtime_ns, s.offset, s.size, s.group
        key.update(repr(about).encode())
    return key.hexdigest()[:20]

def packed(encodings):
    """As they are kept on the disk: floats as bf16, codes in 16 bits where they fit."""
    codes = {k: v for k, v in encodings.items() if v.dtype == torch.int64 and 0 <= v.min() and v.max() < 1 << 16}
    floats = {k: v.bfloat16() for k, v in encodings.items() if v.is_floating_point()}
    return encodings | floats | {k: v.to(torch.uint16) for k, v in codes.items()}

def checksum(tensors, row):
    return zlib.crc32(b"".join(tensors[k][row:row + 1].view(torch.uint8).numpy().tobytes() for k in sorted(tensors)))

class Cache:
    """Frozen encodings of n pictures on the disk, in files that are there whole or not at all and are mapped, not read.
    Each row has a checksum, since nobody reads a whole file before a run. ValueError for a damaged one."""

    def __init__(self, folder, n):
        self.paths = [os.path.join(folder, f"{start:09d}.safetensors") for start in range(0, n, SHARD)]
        self.size, self.shards, self.good, self.types = SHARD, [], [], {}

    def write(self, shard, encodings, verdicts):
        """verdicts: {name: why} of the pictures among these rows that are broken, and of those that are rejected."""
        tensors, types = packed(encodings), {k: str(v.dtype).removeprefix("torch.") for k, v in encodings.items()}
        sums = torch.tensor([checksum(tensors, row) for row in range(len(next(iter(tensors.values()))))])
        write_safetensors(self.paths[shard], tensors | {"sums": sums}, {"about": json.dumps([types, verdicts])})

    def open(self, source):
        """Maps all files, and drops from `source` (a data.Images) what could not be used."""
        for path in self.paths:
            with reading(path, "damaged file of --cache", ": delete it"), safe_open(path, "pt") as f:
                self.shards.append({k: f.get_tensor(k) for k in f.keys()})
                self.types, (broken, rejected) = json.loads(f.metadata()["about"])
            source.problems |= broken
            source.rejected |= rejected
        self.good = source.keep_good()

    def rows(self, index):
        """{name: tensor} of some of the good pictures, in the types that the model made."""
        found = []
        for shard, row in (divmod(self.good[int(i)], self.size) for i in index):
            sums, tensors = self.shards[shard]["sums"], {k: self.shards[shard][k] for k in self.types}
            if checksum(tensors, row) != sums[row]:
                raise ValueError(f"{self.paths[shard]}: damaged file of --cache (row {row}): delete it")
            found.append({k: tensors[k][row].to(getattr(torch, kind)) for k, kind in self.types.items()})
        return {k: torch.stack([row[k] for row in found]) for k in self.types}

# ---------------------------------------------------------------------------------------------------------------------
# What a step trains on: images whose frozen encodings are computed once, and batches that depend on (seed, step,
# place) alone. RecA's requests stand beside the image in its prompt (arXiv 2509.07295): many, so that the model learns
# to read the image and not one sentence, and short, because at tiny scale a text token costs as much as an image token.

with open(os.path.join(HERE, "weights", "templates.txt"), encoding="utf-8") as lines:
    RECA_TEMPLATES = lines.read().splitlines()

PARTS = ("recon", "t2i", "i2t", "edit", "text", "uncond", "words", "images")  # what a step may be made of

def read_mix(mix):
    """["recon=1", ...], or the dictionary itself -> {part: share of --batch}. Raises ValueError."""
    if isinstance(mix, dict):
        return mix
    try:
        out = {part: float(share) for part, _, share in (item.partition("=") for item in mix)}
        if len(out) < len(mix) or not set(out) <= set(PARTS) or not all(0 < share <= 1000 for share in out.values()):
            raise ValueError
    except ValueError as e:
        raise ValueError(f"--mix {' '.join(mix)}: expected PART=SHARE ..., e.g. t2i=1 i2t=0.5: shares above 0, at most "
                         f"1000, of {', '.join(PARTS)}, each at most once") from origin(e)
    return out

def sent(batch, device, stream=None):
    """A batch {part: {name: tensor}} on the device. stream: of CUDA, for these copies alone. A step is asked for while
    the one before is still computed, and then its copies need not stand in line behind that."""
    with torch.cuda.stream(stream) if stream else nullcontext():
        batch = {part: {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
                 for part, tensors in batch.items()}
    if stream:
        here = torch.cuda.current_stream(device)
        here.wait_stream(stream)
        for t in (t for tensors in batch.values() for t in tensors.values()):
            t.record_stream(here)  # until then the copies' stream must not use this memory again
    return batch

class Batches:
    """`batch(step)` -> {part: {name: tensor}}, what this process trains on in one micro-batch: frozen encodings, token
    rows, randomness. A part takes its images from a pool (`pool_of`), whose encodings are computed once and kept in
    --cache or on the CPU, or step by step where they would need more than --cache-gb."""

    def __init__(self, args, model, device="cpu", rank=0, world=1):
        self.args, self.parts, self.model = args, args.mix, model
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.samples = {part: round(args.batch * share) for part, share in self.parts.items()}  # of all processes
        self.workers = worker_count(args, device)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # of copies to it
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
            if self.listed:
                print("data: " + " | ".join(f"{name}: {s.summary(len(s) if name in self.encodings else None)}"
                                            for name, s in self.listed.items()), flush=True)

    def sources(self):
        """-> {pool: Scenes, uint8 pictures or Images} and {pool of the shape world: texts}; sets pool_of."""
        args, captioned = self.args, self.args.stage in ("sft", "base")
        self.pool_of = {"recon": "broad", "i2t": "broad", "words": "broad", "uncond": "broad", "t2i": "captioned",
                        "edit": "edits", "images": "crowded"}
        own, self.weights = {"captioned" if captioned else "real"} if args.data else set(), {}
        if weights := getattr(args, "data_weights", None):
            if len(weights) != len(args.data or ()) or not all(0 < weight < float("inf") for weight in weights):
                raise ValueError(f"--data-weights {' '.join(map(str, weights))}: {len(weights)} numbers for "
                                 f"{len(args.data or ())} paths of --data; give one above 0 for each")
            self.weights = dict.fromkeys(own, weights)
        for name in own:
            parts = ("t2i", "words", "uncond") if captioned else ("recon", "images")
            self.pool_of |= dict.fromkeys(parts, name)
        if args.i2t_data:
            self.pool_of["i2t"] = "understanding"
        need = {self.pool_of[part] for part in self.parts if part in self.pool_of}
        if args.config != "tiny" and (not own or need - own - {"understanding"}):
            raise ValueError(f"--config {args.config} draws {self.model.config.image_size}-pixel pictures: give "
                             "--data PATH (folders, tars), --i2t-data JSON if i2t is trained, and a --mix of parts "
                             f"that these have data for (here {', '.join(self.parts)}); the shape world is for tiny")
        sources, texts = shape_world.pools(args, need - own, text_rng)
        exif = not getattr(args, "no_exif", False)
        for name in own:
            sources[name] = Images(args.data, captions=captioned, exif=exif)
        if args.i2t_data:
            sources["understanding"] = Images(args.i2t_data, captions=True, image_root=args.image_root, exif=exif)
        self.listed = {name: source for name, source in sources.items() if isinstance(source, Images)}
        self.scenes = {name: source for name, source in sources.items() if isinstance(source, shape_world.Scenes)}
        return {name: source for name, source in sources.items() if name in need | {"edit_sources"}}, texts

    def keep_encodings(self, name, source):
        """Encodes a pool once, or leaves it to be encoded step by step where it is too large to keep."""
        if isinstance(source, Images) and getattr(self.args, "cache", None):
            self.encodings[name] = self.cached(name, source)
            return
        one = self.encode(name, source, [0])
        gigabytes = len(source) * sum(v.numel() * v.element_size() for v in one.values()) / 1e9
        if gigabytes <= self.args.cache_gb:
            self.encodings[name] = self.encode_all(name, source)
            return
        self.uncached[name] = source
        if self.rank == 0:
            print(f"pool {name}: encodings of {len(source):,} images would take {gigabytes:.1f} GB (--cache-gb "
                  f"{self.args.cache_gb:g}), so each step encodes its own")

    def pixels(self, name, source, rows):
        """Images (n, 3, H, W) in [-1, 1] of some rows of a source, as the model was trained to see them."""
        if isinstance(source, Images):
            return self.photo_pixels(name, [source.read(int(row)) or BLANK for row in rows])
        return to_float(source[rows] if isinstance(source, np.ndarray) else source[rows].render())

    def photo_pixels(self, name, pictures):
        purpose = {"understanding": "i2t", "captioned": "t2i"}.get(name, "recon")
        return torch.stack([self.model.preprocess(picture, purpose) for picture in pictures])

    @torch.no_grad()
    def encode(self, name, source, rows, show=False):
        """The frozen encodings of some rows, on the CPU."""
        was, chunk = self.model.training, 256 if getattr(self.model.config, "image_size", 48) <= 64 else 8
        self.model.eval()
        chunks, pieces = [], [rows[start:start + chunk] for start in range(0, len(rows), chunk)]
        made = self.ahead(partial(self.pixels, name, source), pieces)
        for _, pixels in zip(tqdm(pieces, f"encoding {name}", disable=None if show else True), made):
            encodings = self.model.precompute(pixels.to(self.device, non_blocking=True))
            chunks.append({k: v.cpu() for k, v in encodings.items()})
        self.model.train(was)
        return {k: torch.cat([c[k] for c in chunks]) for k in chunks[0]}

    def encode_all(self, name, source):
        """The whole pool: every process encodes its contiguous share, then all share the result. Of people's pictures
        those remain that can be used."""
        n = len(source)
        share = -(-n // self.world)
        rows = [min(i, n - 1) for i in range(self.rank * share, (self.rank + 1) * share)]  # the last share: filled up
        out = self.encode(name, source, rows, self.rank == 0)
        for k, v in out.items() if self.world > 1 else ():
            parts = [torch.empty_like(v, device=self.device) for _ in range(self.world)]
            dist.all_gather(parts, v.to(self.device).contiguous())
            out[k] = torch.cat(parts).cpu()[:n]
        if isinstance(source, Images) and len(good := source.keep_good()) < n:
            out = {k: v[good] for k, v in out.items()}
        return out

    def cached(self, name, source):
        """The pool in --cache: each process encodes its share of the files that are not there yet, all read all."""
        key = cache_key(self.model, self.args.stage, source, self.photo_pixels(name, [PROBE]))
        n, folder = len(source), os.path.join(self.args.cache, f"{name}-{key}")
        cache = Cache(folder, n)
        os.makedirs(folder, exist_ok=True)
        todo = [[shard for shard, path in enumerate(cache.paths) if not os.path.exists(path)]]
        if self.world > 1:
            dist.broadcast_object_list(todo)
        [todo] = todo
        for at in tqdm(range(0, len(todo), self.world), f"files of {folder}", disable=None if self.rank == 0 else True):
            shard = todo[min(at + self.rank, len(todo) - 1)]  # a sharded model encodes on all processes or on none
            rows = range(n)[shard * cache.size:(shard + 1) * cache.size]
            encodings = self.encode(name, source, [*rows] + [n - 1] * (cache.size - len(rows)) * (self.world > 1))
            encodings = {k: v[:len(rows)] for k, v in encodings.items()}
            if at == self.rank == 0:
                need = len(todo) * sum(v.numel() * v.element_size() for v in packed(encodings).values())
                check_disk(folder, need, "the cache of encodings", "--cache")
                print(f"{folder}: {need / 1e9:.3g} GB of encodings will be kept, for later runs, too", flush=True)
            if at + self.rank < len(todo):
                names = {source.samples[i].name for i in rows}
                found = [{n: d[n] for n in names & d.keys()} for d in (source.problems, source.rejected)]
                cache.write(shard, encodings, found)
            if self.world > 1:
                dist.barrier()
        cache.open(source)
        return cache

    def fetch(self, name, index, rngs=(), prefix=""):
        """-> index, {name: tensor} of some rows of a pool: encodings, or "pixels_in" for what is still to be encoded.
        Of people's pictures that are not encoded in advance, one that cannot be used gives way to one drawn by its
        place's random.Random, on whatever process: index says which."""
        if kept := self.encodings.get(name):
            some = kept.rows(index) if isinstance(kept, Cache) else {k: v[index] for k, v in kept.items()}
            return index, {prefix + k: v for k, v in some.items()}
        source = self.uncached[name]
        if not isinstance(source, Images):
            return index, {prefix + "pixels_in": self.pixels(name, source, index)}
        index, pictures = zip(*[source.read_or_draw(int(i), rng) for i, rng in zip(index, rngs)])
        return index, {prefix + "pixels_in": self.photo_pixels(name, pictures)}

    @torch.no_grad()
    def to_device(self, batch, counts):
        """A batch on the device of the step, with the encodings of what came as pixels and with the step's counts."""
        was, out = self.model.training, {}
        for part, tensors in sent(batch, self.device, self.stream).items():
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

    def row(self, part, i, rng):
        """The text of sample i of a part: a dict for model.collate."""
        args, pool = self.args, self.pool_of.get(part)
        sample = self.listed[pool].samples[i] if pool in self.listed else None
        if part in ("words", "text", "i2t") and (pool or "broad") in self.scenes:
            return shape_world.row(part, self.scenes[pool or "broad"].scene(i), rng, args, RECA_TEMPLATES)
        if part == "recon":
            # where captions stand beside it, they alone teach the unconditional half of guidance
            return {"prompt": rng.choice(RECA_TEMPLATES), "drop": rng.random() < args.drop * ("t2i" not in self.parts)}
        if part == "t2i":
            return {"caption": sample.caption if sample else self.texts[pool][i], "drop": rng.random() < args.drop}
        if part == "uncond":
            return {"caption": "", "drop": True}
        if part == "edit":
            return {"instruction": self.texts[pool][i], "drop": False}
        if part == "words":
            return {"caption": sample.caption if sample else self.texts[pool][i]}
        if part == "i2t" and sample:  # all turns of a dialogue are one row: later ones refer to what was said before
            return {"turns": list(sample.turns) or [(RECA_TEMPLATES[0], sample.caption)]}
        return {}

    def sample_numbers(self, step):
        """{part: numbers of all samples in its pool} of a step, for messages."""
        return {part: self.numbers(part, step).tolist() for part in self.samples}

    def numbers(self, part, step):
        """Those of the samples of a part, on all processes: from epochs, or with --data-weights as they fall."""
        n, pool, seed = self.samples[part], self.pool_of.get(part, "text"), self.args.seed
        if pool not in self.weights:
            return batch_indices(self.size[pool], n, seed, step, part)
        starts, weights, numbers = self.listed[pool].starts, self.weights[pool], []
        for rng in (text_rng(seed, step, part, place, "source") for place in range(n)):
            [path] = rng.choices(range(len(weights)), weights)
            if starts[path] == starts[path + 1]:
                raise ValueError(f"--data-weights: no picture of {self.args.data[path]} can be used")
            numbers.append(rng.randrange(starts[path], starts[path + 1]))
        return torch.tensor(numbers)

    def found(self):
        return [self.cut, *(d for source in self.listed.values() for d in (source.problems, source.rejected))]

    def ahead(self, make, items):
        """As `prefetch`, with --workers. What they find out about samples is known here with the item, too."""
        def told(item):
            before = [len(d) for d in self.found()]
            try:
                made = make(item)
            except Exception as e:  # as it is: DataLoader would make a page of text of it
                made = e
            return made, [list(islice(d.items(), n, None)) for d, n in zip(self.found(), before)]
        for made, news in prefetch(told, items, self.workers * (len(items) > 1), self.device.type == "cuda"):
            for d, new in zip(self.found(), news):
                d.update(new)
            for source in self.listed.values():
                source._check()
            if isinstance(made, Exception):
                raise made
            yield made

    def batch(self, step, micro=0):
        """Micro-batch `micro` of optimizer step `step`, for this process: a function of these and of --seed alone."""
        out, seed = {}, self.args.seed
        pad_to = 0 if self.device.type == "cpu" else None  # 0: the longest row; GPUs want fixed shapes
        for part, n in self.samples.items():
            per = n // (self.world * self.args.accum)
            first = (micro * self.world + self.rank) * per
            places, name = range(first, first + per), self.pool_of.get(part)
            index, encodings = self.numbers(part, step)[first:first + per], {}
            if name:  # before the texts, which belong to the pictures that are really there
                rngs = [text_rng(seed, step, part, place, "instead") for place in places]
                index, encodings = self.fetch(name, index, rngs)
            if part == "edit":
                encodings |= self.fetch("edit_sources", index, prefix="source_")[1]
            rows = [self.row(part, int(i), text_rng(seed, step, part, place)) for i, place in zip(index, places)]
            generators = [sample_generator(seed, step, place, part) for place in places]
            shared = sample_generator(seed, step, 0, "shared")  # by all parts, processes and micro-batches
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
        cut = list(dict.fromkeys(name for names, _ in found for name in names))
        lines = [f"{len(cut)} samples whose answers did not fit into a row, e.g. {', '.join(cut[:3])}"] if cut else []
        for pool in found[0][1]:
            for what, k in (("broken", 0), ("rejected", 1)):
                if bad := {name: why for _, pools in found for name, why in pools[pool][k].items()}:
                    name, why = next(iter(bad.items()))
                    lines.append(f"{pool}: {len(bad)} {what}, e.g. {name} ({why})")
        return "not trained on: " + "; ".join(lines) if lines else ""

def check(paths, captions=False, image_root=None):
    """Read everything once and print what is there; True if it can be trained on."""
    images = Images(paths, captions, image_root, max_broken=1)
    rows = tqdm(range(len(images)), "reading", disable=None)
    good = [(images.samples[i], image.size) for i in rows if (image := images.read(i)) is not None]
    print(images.summary(len(good)))
    for what, v in (("width", [w for _, (w, _) in good]), ("height", [h for _, (_, h) in good])) if good else ():
        print(f"  {what}: smallest {min(v)}, median {sorted(v)[len(v) // 2]}, largest {max(v)} pixels")
    answers = [answer for s, _ in good for _, answer in s.turns]
    for what, texts in (("captions", [s.caption for s, _ in good if s.caption]), ("turns", answers)):
        if texts:
            words = sorted(len(t.split()) for t in texts)
            print(f"  {what}: {len(texts)}, {len(set(texts))} distinct, median {words[len(words) // 2]} words, "
                  f"e.g. {texts[0][:80]!r}")
    for title, found in (("broken", images.problems), ("rejected", images.rejected), ("left out", images.left_out)):
        for name, why in dict(found).items():
            print(f"  {title}: {name}: {why}")
    return bool(good) and len(images.problems) <= 0.01 * images.total

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="+", required=True, metavar="PATH", help="folders, tars, pictures, LLaVA JSON")
    parser.add_argument("--captions", action="store_true", help="every picture must have a caption")
    parser.add_argument("--image-root", help="folder of the image paths inside LLaVA JSON")
    args = parser.parse_args()
    llava = [path for path in args.check if path.lower().endswith((".json", ".jsonl"))]
    refuse_unused(parser, None, ("image-root", llava, "LLaVA JSON"),
                  ("captions", len(llava) < len(args.check), "folders, tars and parquet files"))
    return 0 if check(args.check, args.captions, args.image_root) else 2

if __name__ == "__main__":
    one_line_errors(main)
