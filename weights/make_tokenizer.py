"""Trains the tiny vocabulary again and writes weights/tokenizer.tiktoken: the same bytes each time, in about a second.

    python weights/make_tokenizer.py
"""
import base64
import os
import sys
import unicodedata
from collections import Counter

import regex  # comes with tiktoken

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from data import RECA_TEMPLATES  # noqa: E402
from text_tokenizer import QWEN_SPLIT, TINY_SPECIAL, WEIGHTS  # noqa: E402

# Every word of the shape world becomes one token, with a leading space and (at the beginning of an answer or an
# instruction) without; the words of LEADING may start a sentence.
WORLD_WORDS = """circle circles square squares triangle triangles star stars cross crosses shape shapes object objects
thing things all only red green blue yellow purple orange cyan pink white black gray brown color colors small large
big medium tiny size bright pale striped left right above below top bottom middle center corner side between near
under over next inside upper lower row column up down zero one two three four five six none no yes what how many which
where is are there does do it its and or of with to at in on into by from a an the this that not than same other
different instead another both empty plain dark light make remove add move change replace turn swap put delete draw
keep image picture photo background ground scene place grid cell everything nothing else first second last""".split()
LEADING = """A An The There This It In On One Two Three Four Five What How Where Which Is Are Make Remove Add Replace
Move Does Do Change Turn Swap Put Delete Draw Yes No Describe Generate Edit Keep Answer Question Red Green Blue Yellow
Purple Orange Cyan Pink White Black Gray Small Large Medium""".split()

def train_bpe(texts, vocab_size):
    """Byte-pair encoding from weighted texts [(text, weight)] -> {token bytes: rank}; ranks 0-255 are the bytes.

    Counts every neighboring pair by the BYTES it would make and merges the commonest everywhere (Sennrich et al.,
    2016): tiktoken looks pairs up by their bytes as well, so training and encoding agree. Ties go to the smaller bytes,
    so that the same texts give the same file. Raises ValueError where the texts give fewer than `vocab_size` tokens.
    """
    counts = Counter()
    for text, weight in texts:
        for piece in regex.findall(QWEN_SPLIT, unicodedata.normalize("NFC", text)):
            counts[piece.encode()] += weight
    words = [([bytes([b]) for b in word], n) for word, n in sorted(counts.items())]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for parts, n in words:
            for left, right in zip(parts, parts[1:]):
                pairs[left + right] += n
        if not pairs:
            raise ValueError(f"the texts give only {len(ranks)} tokens, {vocab_size} wanted; give more text")
        new = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[new] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if parts[i] + parts[i + 1] == new:
                    parts[i:i + 2] = [new]
                i += 1
    return ranks

def tokenizer_corpus():
    """Weighted texts [(text, weight)]: the shape world's words first, then RecA's templates, then a page of English."""
    texts = [(f" {w}", 400) for w in WORLD_WORDS] + [(w, 200) for w in WORLD_WORDS + LEADING]
    texts += [(f" {w}", 100) for w in LEADING[:23]]  # what may also follow another sentence
    marks = ("Generate an image:", "Generate an image.", "user", "assistant", "\n\n", "? ", ". ", ", ", "\n", ": ")
    texts += [(s, 200) for s in marks] + [(t, 20) for t in RECA_TEMPLATES]
    with open(os.path.join(WEIGHTS, "tokenizer_english.txt"), encoding="utf-8") as f:
        return texts + [(f" {f.read()}".replace("\n", " "), 2)]

def build_tokenizer(path=os.path.join(WEIGHTS, "tokenizer.tiktoken"), vocab_size=1024):
    """Writes the vocabulary as base64 rank lines (tiktoken's own file format); the special strings follow the ranks."""
    ranks = train_bpe(tokenizer_corpus(), vocab_size - len(TINY_SPECIAL))
    with open(path, "w", encoding="ascii") as f:
        f.writelines(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())

if __name__ == "__main__":
    build_tokenizer()
