"""Data: text tokenizers, template requests for RecA, real images from folders / tar shards / LLaVA JSON, preprocessing, sample order.

    python data.py --check PATH...       what is in these folders, tar shards or LLaVA JSON files: counts, sizes, captions, problems
    python data.py --build-tokenizer     train the tiny vocabulary again (weights/tokenizer.tiktoken; takes seconds)
"""
import argparse
import base64
import json
import os
import re
import unicodedata
from collections import Counter
from functools import lru_cache

import tiktoken

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")

# ---------------------------------------------------------------------------------------------------------------------
# Text tokenizers. All are byte-level BPE run by tiktoken from ranks in a local file; nothing is ever downloaded.
# ---------------------------------------------------------------------------------------------------------------------
# The two ways published models cut a text into pieces before BPE.
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What Qwen2.5 adds after its 151,643 BPE ids, in order of id; <tool_call> etc. included, as its published tokenizer does.
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
                "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
                "<|repo_name|>", "<|file_sep|>"]
# phi-1.5 adds runs of 31..2 spaces, then of 9..2 tabs, after GPT-2's 50,257 ids.
PHI_WHITESPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
TINY_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]


class Tokenizer:
    """Text <-> ids: BPE ranks, a split pattern, special strings, and plain added strings (phi's runs of whitespace).

    `special` (dict string -> id) is recognised by `encode` only, `added` by both. Both are cut out longest first BEFORE tiktoken sees
    the text: given overlapping special tokens tiktoken does not take the longest one, and "    " must be one id, not two.
    """

    def __init__(self, ranks, split, special, added=None, nfc=False):
        self.special, self.added, self.nfc = dict(special), dict(added or {}), nfc
        self.bpe = tiktoken.Encoding("local", pat_str=split, mergeable_ranks=ranks, special_tokens={**self.special, **self.added})
        self.vocab_size = max(self.bpe._special_tokens.values(), default=-1) + 1
        self.vocab_size = max(self.vocab_size, max(ranks.values()) + 1)           # number of ids, special ones included
        self.known = set(ranks.values()) | set(self.special.values()) | set(self.added.values())
        self.eos = self.special["<|endoftext|>"]                                  # ends a document; a chat turn ends with <|im_end|>
        longest = lambda strings: re.compile("(" + "|".join(re.escape(s) for s in sorted(strings, key=len, reverse=True)) + ")")
        self.cut_all = longest([*self.special, *self.added])
        self.cut_added = longest(self.added) if self.added else None

    def _encode(self, text, cut, fixed):
        ids = []
        for i, piece in enumerate(cut.split(text) if cut else [text]):            # odd pieces are the strings that were cut out
            if i % 2:
                ids.append(fixed[piece])
            elif piece:
                ids.extend(self.bpe.encode_ordinary(unicodedata.normalize("NFC", piece) if self.nfc else piece))
        return ids

    def encode(self, text):
        """Text -> list of ids; special strings such as <|im_start|> become their one id."""
        return self._encode(text, self.cut_all, {**self.special, **self.added})

    def encode_ordinary(self, text):
        """Text -> list of ids; special strings are spelt out like any other text (for text that users or files bring)."""
        return self._encode(text, self.cut_added, self.added)

    def decode(self, ids, skip_special=False):
        """Ids -> text. Ids outside the vocabulary (embedding tables are padded beyond it) and broken UTF-8 become U+FFFD."""
        drop = set(self.special.values()) if skip_special else ()
        ids = [int(i) for i in ids if int(i) not in drop]
        return b"".join(self.bpe.decode_single_token_bytes(i) if i in self.known else b"\xef\xbf\xbd" for i in ids).decode("utf-8", "replace")


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the file may be incomplete, fetch it again") from None


@lru_cache(None)
def _byte_of():
    """GPT-2's printable stand-ins: character in a vocab.json -> byte. Bytes without a printable character of their own get U+0100 onwards."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [b for b in range(256) if b not in own]
    return {**{chr(b): b for b in own}, **{chr(256 + i): b for i, b in enumerate(other)}}


def _ranks_from_vocab(path, vocab, merges, skip):
    """vocab (string -> id) + merges ([left, right] in order) -> {bytes: id}, checked: tiktoken merges the lowest id first."""
    byte_of = _byte_of()
    try:
        ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in skip}
        order = [ranks[bytes(byte_of[c] for c in left + right)] for left, right in merges]
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: token {e} is not of a byte-level BPE vocabulary, or a merge makes a token that the vocabulary lacks; "
                         "vocab.json and merges.txt must be of the same Qwen2 or GPT-2/phi model") from None
    if order != sorted(order) or len(ranks) != len(set(order)) + 256:
        raise ValueError(f"{path}: {len(ranks)} tokens but 256 bytes + {len(order)} merges, or ids that do not follow the order of the "
                         "merges; the two files must be of the same Qwen2 or GPT-2/phi model")
    return ranks


def _tokenizer_json(path):
    """Hugging Face tokenizer.json -> Tokenizer; the split pattern inside says whether it is Qwen2's or GPT-2's kind."""
    j = _read_json(path)
    model, pre = j.get("model", {}), json.dumps(j.get("pre_tokenizer"))
    if model.get("type", "BPE") != "BPE" or "vocab" not in model:
        raise ValueError(f"{path}: model type {model.get('type')!r}, expected BPE (Qwen2 or GPT-2/phi)")
    added = {t["content"]: t["id"] for t in j.get("added_tokens", [])}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    ranks = _ranks_from_vocab(path, model["vocab"], merges, skip=added)
    if json.dumps(QWEN_SPLIT) in pre:
        return _qwen(path, ranks, added)
    if '"ByteLevel"' in pre and "Regex" not in pre:
        return _phi(path, ranks, added)
    raise ValueError(f"{path}: pre_tokenizer {pre[:80]}... is neither Qwen2's nor GPT-2's; use the tokenizer of a Qwen2/2.5 or phi-1.5 model")


def _qwen(path, ranks, added=None):
    special = added or {s: len(ranks) + i for i, s in enumerate(QWEN_SPECIAL)}
    if missing := [s for s in TINY_SPECIAL[:3] if s not in special]:
        raise ValueError(f"{path}: special tokens {missing} are missing; expected the tokenizer of a Qwen2/2.5 model")
    return Tokenizer(ranks, QWEN_SPLIT, special, nfc=True)


def _phi(path, ranks, added=None):
    special = {s: i for s, i in (added or {}).items() if s.strip()} or {"<|endoftext|>": len(ranks)}
    if "<|endoftext|>" not in special:
        raise ValueError(f"{path}: special token <|endoftext|> is missing; expected the tokenizer of GPT-2 or phi-1.5")
    runs = {s: i for s, i in (added or {}).items() if not s.strip()}
    return Tokenizer(ranks, GPT2_SPLIT, special, runs or {s: len(ranks) + len(special) + i for i, s in enumerate(PHI_WHITESPACE)})


@lru_cache(None)
def load_tokenizer(name_or_path="tiny"):
    """"tiny" (ours, 1,024 ids), or a file or folder of Qwen2/2.5 or GPT-2/phi-1.5: tokenizer.json, vocab.json + merges.txt, *.tiktoken.

    The kind is read from the files. GPT-2 vocabularies get phi-1.5's 38 runs of whitespace, since that is the model that uses them here.
    Raises FileNotFoundError (nothing there, with what was looked for) and ValueError (another kind of tokenizer, files that disagree).
    """
    path = os.path.join(WEIGHTS, "tokenizer.tiktoken") if name_or_path == "tiny" else os.fspath(name_or_path)
    if os.path.isdir(path):
        pairs = [("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("qwen.tiktoken",), ("tokenizer.tiktoken",)]
        found = [p for p in pairs if all(os.path.isfile(os.path.join(path, f)) for f in p)]
        if not found:
            raise FileNotFoundError(f"{path}: no text tokenizer in this folder; looked for " + ", ".join(" + ".join(p) for p in pairs))
        path = os.path.join(path, found[0][0])
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such tokenizer; give \"tiny\", or a folder or file of a Qwen2/2.5 or phi-1.5 tokenizer")
    folder, name = os.path.split(path)
    if name.endswith(".tiktoken"):
        ranks = {}
        with open(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except ValueError:
                    raise ValueError(f"{path}: line {n} is {line[:40]!r}, expected a base64 token and its rank; fetch the file again") from None
        if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path}: {len(ranks)} tokens whose ranks are not 0..{len(ranks) - 1}; the file is incomplete, fetch it again")
        if len(ranks) == 151643:
            return _qwen(path, ranks)
        return Tokenizer(ranks, QWEN_SPLIT, {s: len(ranks) + i for i, s in enumerate(TINY_SPECIAL)}, nfc=True)
    if name in ("merges.txt", "vocab.bpe"):
        name = {"merges.txt": "vocab.json", "vocab.bpe": "encoder.json"}[name]
    if name in ("vocab.json", "encoder.json"):
        merges_path = os.path.join(folder, "merges.txt" if name == "vocab.json" else "vocab.bpe")
        for p in (os.path.join(folder, name), merges_path):
            if not os.path.isfile(p):
                raise FileNotFoundError(f"{p}: missing; a vocabulary of this kind needs {name} and {os.path.basename(merges_path)} in one folder")
        vocab = _read_json(os.path.join(folder, name))
        with open(merges_path, encoding="utf-8") as f:
            merges = [line.rstrip("\r\n").split(" ") for line in f if line.strip() and not line.startswith("#version")]
        gpt2 = "<|endoftext|>" in vocab                                            # Qwen2 keeps its special tokens out of vocab.json
        ranks = _ranks_from_vocab(path, vocab, merges, skip={"<|endoftext|>"})
        return _phi(path, ranks, {"<|endoftext|>": vocab["<|endoftext|>"], **{s: len(vocab) + i for i, s in enumerate(PHI_WHITESPACE)}}
                    if gpt2 else None) if gpt2 else _qwen(path, ranks)
    if name.endswith(".json"):
        return _tokenizer_json(path)
    raise ValueError(f"{path}: unknown kind of tokenizer file; expected tokenizer.json, vocab.json + merges.txt or a .tiktoken file")


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
# ---------------------------------------------------------------------------------------------------------------------
RECA_TEMPLATES = [t.strip() for t in """
Describe the image in detail. | Describe this image. | Describe the picture. | Describe this picture in detail. | Describe the scene.
Describe the photo. | Describe all you see. | Describe what you see here. | Describe what this image shows. | Describe every object here.
Describe each object and its place. | Describe the colors and shapes. | Describe the layout. | Describe the whole picture.
Describe the image from left to right. | Describe the image from top to bottom. | Describe the objects in this picture.
Describe this scene in your own words. | Describe the content of the image. | Describe the background too. | Describe it in one sentence.
Describe it in full. | Please describe the image. | Please describe this picture. | Please describe the scene in detail.
Can you describe this image? | Can you describe the picture? | Can you describe what you see? | Could you describe the scene?
Could you describe this photo? | What is in this image? | What is in the picture? | What does this image show? | What does the picture show?
What do you see? | What do you see in this image? | What do you see in the picture? | What can you see here? | What is shown here?
What is in the scene? | What objects are here? | What objects are in the image? | What shapes and colors are here?
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
Report what is in the image. | Report every object in the scene. | Sum up the image. | Sum up what you see here.
Caption this image. | Caption the picture in detail. | Caption: | Image description: | A description of the image: | In this image there is
In detail, what is here? | In words, what does this show? | The picture shows | This is an image of | I want to know what is in this image.
I would like a description of this picture. | Let me know what you see. | Read the image and describe it. | Detail the picture for me.
Here is a picture. Describe it. | Here is an image. What do you see? | Draw it again in words. | Note every detail of this image.
""".replace("\n", "|").split("|") if t.strip()]

# What the tiny vocabulary is trained on. Every word of the shape world becomes one token, with a leading space and (at the beginning of an
# answer or an instruction) without; the words of LEADING may start a sentence. The English keeps ordinary sentences at two tokens per word.
WORLD_WORDS = """circle circles square squares triangle triangles star stars cross crosses shape shapes object objects thing things all only
red green blue yellow purple orange cyan pink white black gray brown color colors small large big medium tiny size bright pale striped
left right above below top bottom middle center corner side between near under over next inside upper lower row column up down
zero one two three four five six none no yes what how many which where is are there does do it its and or of with to at in on into by from
a an the this that not than same other different instead another both empty plain dark light make remove add move change replace turn swap
put delete draw keep image picture photo background ground scene place grid cell everything nothing else first second last""".split()
LEADING = """A An The There This It In On One Two Three Four Five What How Where Which Is Are Make Remove Add Replace Move Does Do Change Turn
Swap Put Delete Draw Yes No Describe Generate Edit Keep Answer Question Red Green Blue Yellow Purple Orange Cyan Pink White Black
Gray Small Large Medium""".split()
ENGLISH = """
The quick way to learn how something works is to build a small one and to look at it while it runs. People have always drawn the things they
saw: animals, houses, trees, the sea, the sun and the moon, a man on a horse, a woman with a child, a dog under the table. When you read a
book, the words make images in your mind; when you look at a photograph, the image makes words. A model that can do both should be able to
tell you what is in a picture, and to paint what you ask for. "Is it true?" she asked. "I don't know, but we'll find out," he said. They're
going to the city by train because it's late and the road isn't safe at night. She was born in 1984, and her brother came 3 years after
that. There were not many people in the street that morning; only an old man, who sat near the window of the shop and waited for the bus. He
had worked here for over twenty years and would have been happy to go on. Every day has its own weather: rain, wind, snow, or a clear sky
with a few white clouds. Some of them are made of wood, others of glass, stone or metal; they may be round, flat, long, short, old, new, open
or closed. What do you think about that? How long does it take to get there? Which one of these is the best, and why? Let me show you an
example: a cat sits on a mat in front of a brown door, next to a pair of shoes. For each image, give the number of objects, their colors,
sizes and places, the light, and what happens in the background. A bowl of fruit, a red car on the street, a person holding an umbrella, a
group of friends at the beach, food on a plate. I he she they we you me him her them us my your his their our who when why while then so but
if as because until after before again also very too much most more less few any each such own just even still never often here now was were
be been being am have has had having will would can could should may might must did done say says said see seen go gone get got come came
give take made know look looks like want use find tell ask work feel leave call people girl boy bird house tree car bus train city room
table chair window door water hand eye face day night time year life part line text good new little high young great sky grass wall
"""


def tokenizer_corpus():
    """Weighted texts [(text, weight)] for the tiny vocabulary: the shape world's words first, then the templates, then plain English."""
    texts = [(f" {w}", 400) for w in WORLD_WORDS] + [(w, 200) for w in WORLD_WORDS + LEADING] + [(f" {w}", 100) for w in LEADING[:23]]
    texts += [(s, 200) for s in ("Generate an image:", "Generate an image.", "user", "assistant", "\n\n", "? ", ". ", ", ", "\n", ": ")]
    return texts + [(t, 20) for t in RECA_TEMPLATES] + [(ENGLISH.replace("\n", " "), 2)]


def build_tokenizer(path=os.path.join(WEIGHTS, "tokenizer.tiktoken"), vocab_size=1024):
    """Train the tiny vocabulary and write it as base64 rank lines (tiktoken's own file format); the special tokens follow the ranks."""
    ranks = train_bpe(tokenizer_corpus(), vocab_size - len(TINY_SPECIAL))
    with open(path, "w", encoding="ascii") as f:
        f.writelines(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-tokenizer", action="store_true", help="train the tiny vocabulary again")
    args = parser.parse_args()
    if args.build_tokenizer:
        build_tokenizer()


if __name__ == "__main__":
    main()
