"""Text tokenizers: byte-level BPE run by tiktoken from ranks in a local file; nothing is ever downloaded."""
import base64
import json
import os
import re
import unicodedata
from functools import lru_cache

import tiktoken

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")

def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except ValueError as e:
        raise ValueError(f"{path}: not valid JSON ({e}); the file may be incomplete, fetch it again") from None


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
