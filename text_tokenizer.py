"""Text tokenizers: byte-level BPE, run by tiktoken from the ranks in a local file; nothing is ever downloaded.

Four kinds are known: ours (weights/tokenizer.tiktoken), Qwen2/2.5's, GPT-2/phi-1.5's and DeepSeek's (Janus). They
differ in the pieces that a text is cut into before BPE (DeepSeek's in several stages) and in their special strings.
Ours and Qwen2's normalize Unicode (NFC).
"""
import base64
import contextlib
import json
import os
import unicodedata
from functools import lru_cache

import regex  # which tiktoken brings
import tiktoken

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TINY_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
# What Qwen2.5 adds after its 151,643 BPE ids, in order of id.
QWEN_SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>
<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>""".split()
# phi-1.5 adds runs of 31..2 spaces, then of 9..2 tabs, after GPT-2's 50,257 ids.
PHI_WHITESPACE = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
DEEPSEEK_EOS = "<｜end▁of▁sentence｜>"  # what tells DeepSeek's kind
NEVER = {0xC0, 0xC1, *range(0xF5, 256)}  # bytes that no text has in UTF-8, for which a vocabulary needs no token
LONGEST = 100_000  # characters that tiktoken gets at once: a million spaces overflow its stack and it panics

def origin(e):
    """What a message for the user is raised from: nothing, or with NANORECA_TRACEBACK=1 the error that it rewords."""
    return e if os.environ.get("NANORECA_TRACEBACK") else None

class BadFile(ValueError):
    """A file that cannot be used, said in one line with its path."""

@contextlib.contextmanager
def reading(path, what, hint=""):
    """Around what other people's code does with a file: whatever it raises becomes a BadFile (an OSError where the
    system refused) of one line, "path: what (reason; size)hint". What names its file already passes as it is, as does a
    lack of memory."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt, SystemExit, BadFile, FileNotFoundError):
        raise
    except BaseException as e:  # not Exception alone: Rust's panics (tiktoken, safetensors) are none
        if getattr(e, "filename", None) or type(e).__name__ == "OutOfMemoryError":
            raise
        kind = OSError if isinstance(e, OSError) else BadFile
        text = (str(e).strip().splitlines() or [""])[0][:160]
        reason = text if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__}: {text}"
        size = f"; {os.path.getsize(path):,} bytes on disk" if os.path.isfile(path) else ""
        raise kind(f"{path}: {what} ({reason}{size}){hint}") from origin(e)

def check_file(path, what="file"):
    """Raises FileNotFoundError where nothing is, BadFile for a folder, a pipe or a device (which never ends)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such {what}")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise BadFile(f"{path}: {kind}, expected a {what}, an ordinary file")

def read_json(path):
    """What a JSON file holds. Raises FileNotFoundError, or BadFile where it is no JSON."""
    check_file(path)
    with reading(path, "not valid JSON", "; the file may be incomplete, fetch it again"):
        with open(path, encoding="utf-8-sig") as f:  # a byte order mark, as Windows' editors write it, is no content
            return json.load(f)

def _wrong(path, why):
    return BadFile(f"{path}: {why}; expected whole, unchanged files of one Qwen2/2.5, phi-1.5 or DeepSeek tokenizer")

def _any_of(strings):
    ordered = sorted(strings, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, ordered)) + ")") if ordered else None

def _isolate(stage, text):
    """-> the pieces of a text, matches of the pattern and what is between them. $ ends a line, as in tokenizer.json."""
    cuts = [at for match in regex.finditer(stage, text, regex.M) for at in match.span()]
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)]) if start < end]

class Tokenizer:
    """Text <-> ids: BPE ranks, what splits text (a pattern, or a tuple of stages, each of which cuts what the last one
    left), special strings, and plain added strings (phi's runs of whitespace). `special` (dict string -> id) is
    recognized by `encode` only, `added` by both ways to encode. They are cut out, the longest first, BEFORE tiktoken
    sees the text: of overlapping special strings tiktoken does not take the longest one, and four spaces must be one
    id, not two."""

    def __init__(self, ranks, split, special, added=None, nfc=False, eos="<|endoftext|>"):
        self.special, self.added, self.nfc, self.ranks = dict(special), dict(added or {}), nfc, ranks
        self.fixed, self.stages = {**self.special, **self.added}, split if isinstance(split, tuple) else ()
        self.bpe = tiktoken.Encoding("local", pat_str="(?s:.+)" if self.stages else split, mergeable_ranks=ranks,
                                     special_tokens=self.fixed)
        self.known = {*ranks.values(), *self.fixed.values()}
        self.vocab_size = max(self.known) + 1     # number of ids, special ones included
        self.eos = self.special[eos]  # ends a document; a chat turn ends with <|im_end|>
        self.cut_all, self.cut_added = _any_of(self.fixed), _any_of(self.added)

    def as_file(self):
        """All of it in one text, which load_tokenizer reads from a text_tokenizer.json."""
        tokens = [base64.b64encode(token).decode() for token in sorted(self.ranks, key=self.ranks.get)]
        return json.dumps(dict(gpt2=not self.nfc, added=self.fixed, tokens=tokens, stages=self.stages))

    def _encode(self, text, cut):
        ids = []
        for i, piece in enumerate(cut.split(text) if cut else [text]):
            if i % 2:  # odd pieces are the strings that were cut out
                ids.append(self.fixed[piece])
                continue
            piece = unicodedata.normalize("NFC", piece) if self.nfc else piece
            pieces = [piece[start:start + LONGEST] for start in range(0, len(piece), LONGEST)]
            for stage in self.stages:
                pieces = [part for whole in pieces for part in _isolate(stage, whole)]
            ids += [i for part in pieces for i in self.bpe.encode_ordinary(part)]
        return ids

    def encode(self, text):
        """Text -> list of ids; special strings such as <|im_start|> become their one id."""
        return self._encode(text, self.cut_all)

    def encode_ordinary(self, text):
        """Text -> list of ids; special strings are spelled out like any other text (for text of users or files)."""
        return self._encode(text, self.cut_added)

    def decode(self, ids, skip_special=False):
        """Ids -> text. Unknown ids (embedding tables are padded beyond the vocabulary) and bad UTF-8 become U+FFFD."""
        drop = set(self.special.values()) if skip_special else ()
        kept = [i for i in map(int, ids) if i not in drop]
        parts = [self.bpe.decode_single_token_bytes(i) if i in self.known else b"\xef\xbf\xbd" for i in kept]
        return b"".join(parts).decode("utf-8", "replace")

def _check_ids(path, ranks, fixed):
    """tiktoken panics where ids are no numbers or not unique, and later where a byte is unknown."""
    if lost := [b for b in range(256) if bytes([b]) not in ranks and b not in NEVER]:
        raise _wrong(path, f"{len(lost)} of 256 bytes have no token, first {bytes(lost[:1])!r}")
    ids = [*ranks.values(), *fixed.values()]
    if odd := [i for i in ids if type(i) is not int or not 0 <= i < len(ids)]:
        raise _wrong(path, f"{len(ids)} tokens, one with id {str(odd[0])[:40]!r}: ids go from 0 to {len(ids) - 1}")
    if len(set(ids)) != len(ids) or max(ranks.values()) != len(ranks) - 1:
        raise _wrong(path, f"{len(ids)} tokens have {len(set(ids))} different ids, or special ones do not come last")

def _read_ranks(path):
    """tiktoken's file format, one `base64-of-the-bytes rank` per line -> {bytes: rank}. Raises ValueError."""
    ranks = {}
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as e:
                raise _wrong(path, f"line {n} is {line[:40]!r}, not a base64 token and its rank") from origin(e)
    if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        raise _wrong(path, f"{len(ranks)} tokens, ranks are not 0..{len(ranks) - 1} (256 at least)")
    return ranks

def _vocab_to_ranks(path, vocab, merges, skip):
    """vocab (string -> id) and merges ([left, right], ...) -> {bytes: id}; `skip`: strings that are no BPE tokens.
    tiktoken merges the pair of the lowest id first, so ids must rise with the merges (true for Qwen2 and GPT-2, and
    checked). Bytes without a printable character are written as U+0100 onwards. Raises ValueError."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = sorted(set(range(256)) - set(printable))
    byte_of = {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}

    def rank(token):
        raw = bytes(byte_of.get(c, 0) for c in token)
        if not token or raw not in ranks or any(c not in byte_of for c in token):
            raise _wrong(path, f"the merges name {token[:40]!r}, which is no token of the vocabulary")
        return ranks[raw]
    if unknown := [t for t in vocab if t not in skip and (not t or any(c not in byte_of for c in t))]:
        raise _wrong(path, f"{unknown[0][:40]!r} is in no byte-level BPE")
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocab.items() if token not in skip}
    if odd := [m for m in merges if len(m) != 2]:
        raise _wrong(path, f"merge {str(odd[0])[:60]!r} is not of two tokens")
    order = [(rank(left + right), rank(left), rank(right))[0] for left, right in merges]
    singles = sum(len(token) == 1 for token in ranks)
    if order != sorted(order) or len(ranks) != len(set(order)) + singles:
        raise _wrong(path, f"{len(ranks)} tokens against {singles} bytes + {len(order)} merges, or ids that do not "
                           "rise with the merges")
    return ranks

def _read_stages(path, file):
    """tokenizer.json, whose pre-tokenizer is a Sequence -> the patterns of its stages. ValueError for unknown ones."""
    *stages, last = file["pre_tokenizer"]["pretokenizers"]
    known = dict(type="Split", behavior="Isolated", invert=False), dict(type="Digits", individual_digits=True)
    odd = [stage for stage in stages if {k: v for k, v in stage.items() if k != "pattern"} not in known]
    odd += [last] * (last["type"] != "ByteLevel" or last["use_regex"] or last["add_prefix_space"])
    normalizer = file.get("normalizer") or {"normalizers": []}
    if odd := odd + normalizer.get("normalizers", [normalizer]):
        raise _wrong(path, f"prepares text by {json.dumps(odd)[:200]}, which DeepSeek's does not")
    patterns = (stage["pattern"]["Regex"] if "pattern" in stage else r"\p{N}" for stage in stages)
    return tuple(regex.compile(pattern).pattern for pattern in patterns)

def _read_vocab(path):
    """vocab.json + merges.txt, encoder.json + vocab.bpe, tokenizer.json or what Tokenizer.as_file made -> (ranks, added
    strings, how text is split)."""
    file, (folder, name) = read_json(path), os.path.split(path)
    if name in ("vocab.json", "encoder.json"):
        merges_path = os.path.join(folder, "merges.txt" if name == "vocab.json" else "vocab.bpe")
        if not os.path.isfile(merges_path):
            raise FileNotFoundError(f"{merges_path}: missing; {name} needs it beside it")
        with reading(merges_path, "not a list of merges"), open(merges_path, encoding="utf-8") as f:
            lines = f.read().split("\n")
        merges = [line.split(" ") for line in lines[lines[0].startswith("#version"):] if line.strip()]
        added = {s: i for s, i in file.items() if s == "<|endoftext|>"}  # Qwen2 keeps its special strings elsewhere,
        beside = os.path.join(folder, "added_tokens.json")  # as InternVL3 does, which has more of them
        elsewhere = read_json(beside) if not added and os.path.isfile(beside) else {}
        if not isinstance(elsewhere, dict):
            raise _wrong(beside, "no object of strings and their ids")
        return _vocab_to_ranks(path, file, merges, skip=added), added or elsewhere, GPT2_SPLIT if added else QWEN_SPLIT
    if isinstance(file, dict) and "tokens" in file:
        tokens = [base64.b64decode(token, validate=True) for token in file["tokens"]]
        split = tuple(file.get("stages", ())) or (GPT2_SPLIT if file["gpt2"] else QWEN_SPLIT)
        return {token: i for i, token in enumerate(tokens)}, {s: i for s, i in file["added"].items() if s}, split
    if not isinstance(file, dict) or not {"vocab", "merges"} <= set(file.get("model") or ()):
        raise _wrong(path, "no BPE model with vocab and merges in it")
    added = {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
    if not all(isinstance(s, str) and s for s in added):
        raise _wrong(path, "one of the added tokens has no text")
    merges = [m.split(" ") if isinstance(m, str) else m for m in file["model"]["merges"]]
    split = json.dumps(file.get("pre_tokenizer"))
    how = GPT2_SPLIT if '"ByteLevel"' in split and "Regex" not in split else QWEN_SPLIT
    if DEEPSEEK_EOS in added:
        how = _read_stages(path, file)
    elif how == QWEN_SPLIT and json.dumps(QWEN_SPLIT) not in split:
        raise _wrong(path, f"splits text by {split[:90]}..., which is neither Qwen2's nor GPT-2's way")
    return _vocab_to_ranks(path, file["model"]["vocab"], merges, skip=added), added, how

@lru_cache(None)
def load_tokenizer(name_or_path="tiny"):
    """"tiny" (ours, 1,024 ids), or a file or folder of Qwen2/2.5, GPT-2/phi-1.5 or DeepSeek -> Tokenizer, its kind seen
    from the files. GPT-2's vocabulary gets phi-1.5's 38 runs of whitespace, since phi is what uses it here. Raises
    FileNotFoundError (says what was looked for) or ValueError (another kind of tokenizer, files that disagree)."""
    path = os.path.join(WEIGHTS, "tokenizer.tiktoken") if name_or_path == "tiny" else os.fspath(name_or_path)
    if os.path.isdir(path):
        names = ("text_tokenizer.json", "tokenizer.json", "vocab.json", "encoder.json", "qwen.tiktoken",
                 "tokenizer.tiktoken")
        found = [os.path.join(path, name) for name in names if os.path.isfile(os.path.join(path, name))]
        if not found:
            raise FileNotFoundError(f"{path}: no text tokenizer in this folder; looked for {', '.join(names)}")
        path = found[0]
    check_file(path, 'text tokenizer ("tiny", or a file or folder of Qwen2/2.5, phi-1.5 or DeepSeek)')
    if not path.endswith((".tiktoken", ".json")):
        raise _wrong(path, "unknown kind of text tokenizer, not .json or .tiktoken")
    with reading(path, "not laid out as the files of a text tokenizer are"):
        ranks, added, split = _read_vocab(path) if path.endswith(".json") else (_read_ranks(path), {}, QWEN_SPLIT)
    n = len(ranks)
    special = {s: i for s, i in added.items() if len(s.strip()) > 1}
    runs = {s: i for s, i in added.items() if s not in special}  # and the letters that stand for NEVER in DeepSeek's
    if split == GPT2_SPLIT:
        runs = runs or {s: n + len(special) + i for i, s in enumerate(PHI_WHITESPACE)}
    elif split == QWEN_SPLIT and not added:
        names = TINY_SPECIAL if path.endswith(".tiktoken") and n != 151643 else QWEN_SPECIAL
        special = {s: n + i for i, s in enumerate(names)}
    needed = {GPT2_SPLIT: TINY_SPECIAL[:1], QWEN_SPLIT: TINY_SPECIAL[:3]}.get(split, [DEEPSEEK_EOS])
    if missing := [s for s in needed if s not in special]:
        raise _wrong(path, f"special tokens {missing} are missing")
    _check_ids(path, ranks, {**special, **runs})
    return Tokenizer(ranks, split, special, runs, nfc=split == QWEN_SPLIT, eos=needed[0])
