"""Data: text tokenizers, template requests for RecA, real images from folders / tar shards / LLaVA JSON, preprocessing, sample order, and the shape world.

    python data.py --check PATH...       what is in these folders, tar shards or LLaVA JSON files: counts, sizes, captions, problems
    python data.py --build-tokenizer     train the tiny vocabulary again (weights/tokenizer.tiktoken; takes a second)
"""
import argparse
import base64
import hashlib
import io
import json
import os
import random
import re
import sys
import tarfile
import unicodedata
import warnings
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from PIL import Image
from tqdm import tqdm

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")


def atomic(path, write):
    """Call write(binary file) on a temporary name beside `path`, sync it to disk and rename: a crash or a full disk leaves what was there before."""
    tmp = f"{path}.tmp{os.getpid()}"
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror or e}); what was there before is untouched") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def write_text(path, text):
    atomic(path, lambda f: f.write(text.encode()))


def check_device(name):
    """Raises ValueError for a --device that this machine or this torch does not have."""
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"--device {name}: no such device; cpu, cuda, cuda:1 ...") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; give --device cpu, or install a CUDA build")


def one_line_errors(main):
    """Run main() and exit with what it returns; what the user can put right (a missing file, a wrong value, too little memory) ends with its message alone
    and exit code 2. NANORECA_TRACEBACK=1 shows where it came from."""
    try:
        sys.exit(main() or 0)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError) as e:
        if os.environ.get("NANORECA_TRACEBACK"):
            raise
        print(f"error: {e}" if str(e) else f"error: {type(e).__name__}", file=sys.stderr, flush=True)
        sys.exit(2)


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


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the file may be incomplete, fetch it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Text tokenizers. All are byte-level BPE run by tiktoken from ranks in a local file; nothing is ever downloaded.
# The two ways published models cut a text into pieces before BPE.
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TINY_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
# What Qwen2.5 adds after its 151,643 BPE ids, in order of id.
QWEN_SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|>
<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|>
<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
# phi-1.5 adds runs of 31..2 spaces, then of 9..2 tabs, after GPT-2's 50,257 ids.
PHI_WHITESPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]


class Tokenizer:
    """Text <-> ids: BPE ranks, a split pattern, special strings, and plain added strings (phi's runs of whitespace).

    `special` (dict string -> id) is recognised by `encode` only, `added` by both. They are cut out longest first BEFORE tiktoken sees
    the text: given overlapping special tokens, tiktoken does not take the longest one, and four spaces must be one id, not two.
    """

    def __init__(self, ranks, split, special, added=None, nfc=False):
        self.special, self.added, self.nfc = dict(special), dict(added or {}), nfc
        self.fixed = {**self.special, **self.added}
        self.bpe = tiktoken.Encoding("local", pat_str=split, mergeable_ranks=ranks, special_tokens=self.fixed)
        self.known = {*ranks.values(), *self.fixed.values()}
        self.vocab_size = max(self.known) + 1                                    # number of ids, special ones included
        self.eos = self.special["<|endoftext|>"]                                 # ends a document; a chat turn ends with <|im_end|>

        def longest_first(strings):
            return re.compile("(" + "|".join(map(re.escape, sorted(strings, key=len, reverse=True))) + ")") if strings else None
        self.cut_all, self.cut_added = longest_first(self.fixed), longest_first(self.added)

    def _encode(self, text, cut):
        ids = []
        for i, piece in enumerate(cut.split(text) if cut else [text]):           # odd pieces are the strings that were cut out
            if i % 2:
                ids.append(self.fixed[piece])
            elif piece:
                ids.extend(self.bpe.encode_ordinary(unicodedata.normalize("NFC", piece) if self.nfc else piece))
        return ids

    def encode(self, text):
        """Text -> list of ids; special strings such as <|im_start|> become their one id."""
        return self._encode(text, self.cut_all)

    def encode_ordinary(self, text):
        """Text -> list of ids; special strings are spelt out like any other text (for text that users or files bring)."""
        return self._encode(text, self.cut_added)

    def decode(self, ids, skip_special=False):
        """Ids -> text. Ids outside the vocabulary (embedding tables are padded beyond it) and broken UTF-8 become U+FFFD."""
        drop = set(self.special.values()) if skip_special else ()
        parts = [self.bpe.decode_single_token_bytes(i) if i in self.known else b"\xef\xbf\xbd" for i in map(int, ids) if i not in drop]
        return b"".join(parts).decode("utf-8", "replace")


def _read_ranks(path):
    """tiktoken's file format: one `base64-of-the-bytes rank` per line."""
    ranks = {}
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise ValueError(f"{path}: line {n} is {line[:40]!r}, expected a base64 token and its rank; fetch the file again") from None
    if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: {len(ranks)} tokens, ranks are not 0..{len(ranks) - 1}; the file is incomplete, fetch it again")
    return ranks


def _vocab_to_ranks(path, vocab, merges, skip):
    """vocab.json (string -> id) and merges ([left, right], ...) -> {bytes: id}. tiktoken merges the pair of the lowest id first, so ids
    must rise with the merges (true for Qwen2 and GPT-2; checked). Bytes without a printable character stand as U+0100 onwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {**{chr(b): b for b in own}, **{chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(own)))}}
    try:
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in skip}
        order = [ranks[bytes(byte_of[c] for c in left + right)] for left, right in merges]
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: {e} is in no byte-level BPE; vocabulary and merges must be of one Qwen2 or phi-1.5 model") from None
    if order != sorted(order) or len(ranks) != len(set(order)) + 256:
        raise ValueError(f"{path}: {len(ranks)} tokens against 256 bytes + {len(order)} merges, or ids that do not rise with the merges; "
                         "vocabulary and merges must be of one Qwen2 or phi-1.5 model")
    return ranks


@lru_cache(None)
def load_tokenizer(name_or_path="tiny"):
    """"tiny" (ours, 1,024 ids), or a file or folder of Qwen2/2.5 or GPT-2/phi-1.5: tokenizer.json, vocab.json + merges.txt, *.tiktoken.

    The kind is read from the files. GPT-2's vocabulary gets phi-1.5's 38 runs of whitespace, since phi is what uses it here.
    Raises FileNotFoundError (nothing there; says what was looked for) or ValueError (another kind of tokenizer, files that disagree).
    """
    path = os.path.join(WEIGHTS, "tokenizer.tiktoken") if name_or_path == "tiny" else os.fspath(name_or_path)
    partner = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
    if os.path.isdir(path):
        names = ("tokenizer.json", "vocab.json", "encoder.json", "qwen.tiktoken", "tokenizer.tiktoken")
        found = [n for n in names if os.path.isfile(os.path.join(path, n))]
        if not found:
            raise FileNotFoundError(f"{path}: no text tokenizer in this folder; looked for {', '.join(names)}")
        path = os.path.join(path, found[0])
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such text tokenizer; give "tiny", or a folder or file of a Qwen2/2.5 or phi-1.5 tokenizer')
    folder, name = os.path.split(path)
    added, gpt2 = {}, False
    if name.endswith(".tiktoken"):
        ranks = _read_ranks(path)
    elif name in partner:
        merges_path = os.path.join(folder, partner[name])
        if not os.path.isfile(merges_path):
            raise FileNotFoundError(f"{merges_path}: missing; {name} needs {partner[name]} beside it")
        vocab = read_json(path)
        with open(merges_path, encoding="utf-8") as f:
            merges = [line.rstrip("\n").split(" ") for i, line in enumerate(f) if line.strip() and (i or not line.startswith("#version"))]
        gpt2 = "<|endoftext|>" in vocab                                           # Qwen2 keeps its special tokens out of vocab.json
        added = {s: vocab[s] for s in ("<|endoftext|>",) if gpt2}
        ranks = _vocab_to_ranks(path, vocab, merges, skip=added)
    elif name.endswith(".json"):
        file = read_json(path)
        if not isinstance(file, dict) or not {"vocab", "merges"} <= set(file.get("model") or ()):
            raise ValueError(f"{path}: no BPE model with vocab and merges in it; expected the one of a Qwen2/2.5 or phi-1.5 model")
        added = {t["content"]: t["id"] for t in file.get("added_tokens") or ()}
        merges = [m.split(" ") if isinstance(m, str) else m for m in file["model"]["merges"]]
        ranks = _vocab_to_ranks(path, file["model"]["vocab"], merges, skip=added)
        split = json.dumps(file.get("pre_tokenizer"))
        gpt2 = '"ByteLevel"' in split and "Regex" not in split
        if not gpt2 and json.dumps(QWEN_SPLIT) not in split:
            raise ValueError(f"{path}: splits text by {split[:90]}..., which is neither Qwen2's nor GPT-2's way; only these two are read")
    else:
        raise ValueError(f"{path}: unknown kind of text tokenizer; expected tokenizer.json, vocab.json (+ merges.txt) or a .tiktoken file")
    if gpt2:
        special = {s: i for s, i in added.items() if s.strip()}
        runs = {s: i for s, i in added.items() if not s.strip()} or {s: len(ranks) + len(special) + i for i, s in enumerate(PHI_WHITESPACE)}
    else:
        names = TINY_SPECIAL if name.endswith(".tiktoken") and len(ranks) != 151643 else QWEN_SPECIAL
        special, runs = added or {s: len(ranks) + i for i, s in enumerate(names)}, {}
    if missing := [s for s in TINY_SPECIAL[:1 if gpt2 else 3] if s not in special]:
        raise ValueError(f"{path}: special tokens {missing} are missing; expected the tokenizer of a Qwen2/2.5 or phi-1.5 model")
    return Tokenizer(ranks, GPT2_SPLIT if gpt2 else QWEN_SPLIT, special, runs, nfc=not gpt2)


def train_bpe(texts, vocab_size):
    """Byte-pair encoding from weighted texts [(text, weight)] -> {token bytes: rank}, vocab_size ranks (the first 256 are the bytes).

    Counts every neighbouring pair by the BYTES it would make and merges the commonest everywhere (Sennrich et al. 2016): tiktoken looks
    pairs up by their bytes as well, so training and encoding agree. Ties go to the smaller bytes: the same texts give the same file.
    """
    import regex                                                                  # comes with tiktoken
    words = Counter()
    for text, weight in texts:
        for piece in regex.findall(QWEN_SPLIT, unicodedata.normalize("NFC", text)):
            words[piece.encode()] += weight
    words = [([bytes([b]) for b in word], n) for word, n in sorted(words.items())]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for parts, n in words:
            for a, b in zip(parts, parts[1:]):
                pairs[a + b] += n
        if not pairs:
            raise ValueError(f"the texts give only {len(ranks)} tokens, {vocab_size} wanted; give more text or a smaller vocabulary")
        new = min(pairs, key=lambda p: (-pairs[p], p))
        ranks[new] = len(ranks)
        for parts, n in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] + parts[i + 1] == new:
                    parts[i:i + 2] = [new]
                i += 1
    return ranks


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

# What the tiny vocabulary is trained on. Every word of the shape world becomes one token, with a leading space and (at the beginning of an
# answer or an instruction) without; the words of LEADING may start a sentence. weights/tokenizer_english.txt is a page of plain English.
WORLD_WORDS = """circle circles square squares triangle triangles star stars cross crosses shape shapes object objects thing things all only
red green blue yellow purple orange cyan pink white black gray brown color colors small large big medium tiny size bright pale striped
left right above below top bottom middle center corner side between near under over next inside upper lower row column up down
zero one two three four five six none no yes what how many which where is are there does do it its and or of with to at in on into by from
a an the this that not than same other different instead another both empty plain dark light make remove add move change replace turn swap
put delete draw keep image picture photo background ground scene place grid cell everything nothing else first second last""".split()
LEADING = """A An The There This It In On One Two Three Four Five What How Where Which Is Are Make Remove Add Replace Move Does Do
Change Turn Swap Put Delete Draw Yes No Describe Generate Edit Keep Answer Question Red Green Blue Yellow Purple Orange Cyan Pink White
Black Gray Small Large Medium""".split()


def tokenizer_corpus():
    """Weighted texts [(text, weight)] for the tiny vocabulary: the shape world's words first, then the templates, then plain English."""
    texts = [(f" {w}", 400) for w in WORLD_WORDS] + [(w, 200) for w in WORLD_WORDS + LEADING] + [(f" {w}", 100) for w in LEADING[:23]]
    texts += [(s, 200) for s in ("Generate an image:", "Generate an image.", "user", "assistant", "\n\n", "? ", ". ", ", ", "\n", ": ")]
    with open(os.path.join(WEIGHTS, "tokenizer_english.txt"), encoding="utf-8") as f:
        return texts + [(t, 20) for t in RECA_TEMPLATES] + [(f" {f.read()}".replace("\n", " "), 2)]


def build_tokenizer(path=os.path.join(WEIGHTS, "tokenizer.tiktoken"), vocab_size=1024):
    """Train the tiny vocabulary and write it as base64 rank lines (tiktoken's own file format); the special tokens follow the ranks."""
    ranks = train_bpe(tokenizer_corpus(), vocab_size - len(TINY_SPECIAL))
    with open(path, "w", encoding="ascii") as f:
        f.writelines(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


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


def read_images(paths, **options):
    """(Sample, RGB PIL image) of every good picture once, in order; options and errors as for Images."""
    images = Images(paths, **options)
    for i in range(len(images)):
        if (image := images.read(i)) is not None:
            yield images.samples[i], image


# ---------------------------------------------------------------------------------------------------------------------
# Preprocessing as Harmon was trained with it: RGB PIL image -> float32 (3, size, size) in [-1, 1]. Pillow's bicubic (which anti-aliases)
# and its rounding to 8 bits after every step are part of the recipe. Show-o's and BAGEL's stand in vision_encoder.py.
def to_tensor(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float().div(255).mul(2).sub(1).contiguous()  # (3, H, W)


def preprocess_stretch(image, size):
    """Reconstruction data: stretched (no crop, no pad) to a square of the longer side, then resized."""
    square = image.convert("RGB").resize((max(image.size), max(image.size)), Image.Resampling.BICUBIC)
    return to_tensor(square.resize((size, size), Image.Resampling.BICUBIC))


def preprocess_pad(image, size):
    """Image-to-text data and questions: padded to a square with grey 127 around (odd margin: less above and left), then resized."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return to_tensor(square.resize((size, size), Image.Resampling.BICUBIC))


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
