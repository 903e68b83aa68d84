"""Text tokenizers: the tiny vocabulary and how it is made, the files of published models, and RecA's templates."""
import base64
import json
import os
import random
import unicodedata

import pytest
import regex
import torch

import shape_world
import text_tokenizer
from data import RECA_TEMPLATES
from text_tokenizer import QWEN_SPLIT, load_tokenizer, read_json
from weights.make_tokenizer import LEADING, WORLD_WORDS, build_tokenizer, train_bpe

WEIGHTS = text_tokenizer.WEIGHTS
# [text, Qwen2.5 ids, phi-1.5 ids]
HARD = read_json(os.path.join(os.path.dirname(__file__), "golden", "tokenizers.json"))

# ---------------------------------------------------------------------------------------------------------------------
# The tiny vocabulary and the templates
def words_are_tokens(tok, text):
    """Is every word and every mark of the text one token?"""
    return len(tok.encode(text)) == len(regex.findall(r"\w+|[^\w\s]", text))

def test_tiny_vocabulary():
    tok = load_tokenizer("tiny")
    assert tok.vocab_size == 1024 and tok is load_tokenizer("tiny")
    assert [tok.special[s] for s in text_tokenizer.TINY_SPECIAL] == list(range(1018, 1024)) and tok.eos == 1018
    for word in WORLD_WORDS:
        assert len(tok.encode(word)) == 1 and len(tok.encode(" " + word)) == 1, word
    for word in LEADING:
        assert len(tok.encode(word)) == 1, word
    for text in ("Generate an image: a small red circle above two blue squares", "make the yellow star purple",
                 "Is the triangle left of the cross?",
                 "a large orange cross at the bottom right, on a gray background"):
        assert words_are_tokens(tok, text), [tok.decode([i]) for i in tok.encode(text)]
    english = open(os.path.join(WEIGHTS, "tokenizer_english.txt"), encoding="utf-8").read()
    assert len(tok.encode(english)) < 2.1 * len(english.split())

def test_every_word_of_the_shape_world_is_one_token():
    tok, rng = load_tokenizer("tiny"), random.Random(0)
    scenes = shape_world.Scenes(400, seed=1)
    texts = [row["prompt"] for row in shape_world.task_prompts(50, 0)]
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        texts += [shape_world.short_caption(scene, rng, scene), shape_world.dense_caption(scene, rng)]
        texts += [shape_world.edit(scene, rng)[0], *shape_world.question(scene, rng)[:2]]
        texts += shape_world.text_question(scene, rng)
    for text in set(texts):
        assert words_are_tokens(tok, text), [tok.decode([i]) for i in tok.encode(text)]

def test_tiny_vocabulary_is_what_the_trainer_makes(tmp_path):
    build_tokenizer(tmp_path / "t.tiktoken")
    shipped = open(os.path.join(WEIGHTS, "tokenizer.tiktoken"), "rb").read()
    assert (tmp_path / "t.tiktoken").read_bytes() == shipped, "run weights/make_tokenizer.py and train all again"

def test_templates():
    tok = load_tokenizer("tiny")
    assert len(set(RECA_TEMPLATES)) == len(RECA_TEMPLATES) >= 100
    assert sum(len(tok.encode(t)) <= 12 for t in RECA_TEMPLATES) >= 100
    assert all(t == t.strip() and t and "|" not in t and "\n" not in t for t in RECA_TEMPLATES)

def test_special_strings():
    tok = load_tokenizer("tiny")
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red<|im_end|>"
    ids = tok.encode(text)
    assert [i for i in ids if i >= 1018] == [1019, 1021, 1023, 1022, 1020]
    plain = tok.encode_ordinary(text)  # what a user types is never a control token
    assert max(plain) < 1018 and tok.decode(plain) == text == tok.decode(ids)
    assert tok.decode(ids, skip_special=True) == "user\nred"
    assert tok.decode([*tok.encode("red"), 5000, 1024]) == "red\ufffd\ufffd"  # ids of a padded embedding table
    assert tok.decode([0x80]) == "\ufffd" and tok.decode([]) == "" and tok.encode("") == []
    assert tok.decode(torch.tensor(tok.encode("two stars"))) == "two stars"

def random_texts(n, seed=0):
    rng = random.Random(seed)
    pieces = [" ", "  ", "\t", "\n", "\r\n", "a", "the", " circle", "I'll", "1", "23", ".", "...", "é", "e\u0301",
              "日本", "한", "\u1112\u1161", "😀", "👩\u200d👧", "\u00a0", "\u3000", "ß", "<|", "|>", "١",
              "\x00", "\u0301", "<|im_start|>", "<|endoftext|>"]

    def anything():
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
    for _ in range(n):
        yield "".join(rng.choice(pieces) if rng.random() < 0.7 else anything() for _ in range(rng.randrange(30)))

def test_round_trip_of_any_text():
    tok = load_tokenizer("tiny")
    for text in [*random_texts(2000), *(row[0] for row in HARD)]:
        want = "".join(unicodedata.normalize("NFC", p) if p not in tok.special else p for p in tok.cut_all.split(text))
        assert tok.decode(tok.encode(text)) == want
        assert tok.decode(tok.encode_ordinary(text)) == unicodedata.normalize("NFC", text)
    assert tok.encode("cafe\u0301") == tok.encode("caf\u00e9")

# ---------------------------------------------------------------------------------------------------------------------
# Published vocabularies
def slow_bpe(text, split, ranks):
    """Byte-pair encoding written the slow way, to compare with."""
    out = []
    for piece in regex.findall(split, text):
        parts = [bytes([b]) for b in piece.encode()]
        while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        out += [ranks[p] for p in parts]
    return out

@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A small vocabulary as Qwen2 and GPT-2 publish theirs: bytes in their order of ids, merges, in every format."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char = {b: chr(b) for b in own}
    char.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in char)})
    order = own + [b for b in range(256) if b not in own]
    text = "the red circle  and\n\n\tthe café of 日本, isn't it?     return\t\tx\n " + " ".join(RECA_TEMPLATES)
    trained = train_bpe([(text, 1)], 500)
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    merges = []
    for token in list(trained)[256:]:  # the last merge that makes it, by the tokens before it
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            i = min((trained.get(a + b, 9999), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(["".join(char[b] for b in p) for p in parts])
        ranks[token] = len(ranks)
    vocab = {"".join(char[b] for b in t): i for t, i in ranks.items()}
    root = tmp_path_factory.mktemp("vocabulary")
    end = {"<|endoftext|>": len(vocab)}
    lines = "#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges)
    for name, v in (("qwen", vocab), ("gpt2", {**vocab, **end}), ("encoder", {**vocab, **end})):
        names = ("encoder.json", "vocab.bpe") if name == "encoder" else ("vocab.json", "merges.txt")
        (root / name).mkdir()
        (root / name / names[0]).write_text(json.dumps(v), encoding="utf-8")
        (root / name / names[1]).write_text(lines, encoding="utf-8")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}}
    pre = {"qwen": {"type": "Sequence", "pretokenizers": [split, byte_level]},
           "gpt2": {"type": "ByteLevel", "add_prefix_space": False}}
    extra = {"qwen": text_tokenizer.QWEN_SPECIAL, "gpt2": ["<|endoftext|>", *text_tokenizer.PHI_WHITESPACE]}
    for name in pre:
        added = [{"content": t, "id": len(vocab) + i} for i, t in enumerate(extra[name])]
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        file = {"model": model, "pre_tokenizer": pre[name], "added_tokens": added}
        (root / f"{name}.json").write_text(json.dumps(file))
    (root / "ours.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in ranks.items()))
    return root, ranks

def test_formats_agree(vocabulary):
    root, ranks = vocabulary
    qwen, qwen_json = load_tokenizer(root / "qwen"), load_tokenizer(root / "qwen.json")
    phi, phi_json = load_tokenizer(root / "gpt2"), load_tokenizer(str(root / "gpt2.json"))
    ours = load_tokenizer(root / "ours.tiktoken")
    n = len(ranks)
    assert qwen.special == qwen_json.special and qwen.special["<|im_end|>"] == n + 2 and qwen.vocab_size == n + 22
    assert phi.fixed == phi_json.fixed and phi.eos == n and phi.vocab_size == n + 39
    assert ours.special["<|image_pad|>"] == n + 5
    assert load_tokenizer(root / "qwen" / "vocab.json").special == qwen.special
    assert load_tokenizer(root / "encoder").fixed == phi.fixed
    for text in [*random_texts(300, 1), *(row[0] for row in HARD)]:
        want = slow_bpe(unicodedata.normalize("NFC", text), QWEN_SPLIT, ranks)
        assert qwen.encode_ordinary(text) == qwen_json.encode_ordinary(text) == ours.encode_ordinary(text) == want
        assert qwen.encode(text) == qwen_json.encode(text)
        assert phi.encode(text) == phi_json.encode(text)
        if not regex.search("  |\t\t", text):
            assert phi.encode_ordinary(text) == slow_bpe(text, text_tokenizer.GPT2_SPLIT, ranks)
        assert phi.decode(phi.encode(text)) == text  # no normalization in GPT-2's kind

def test_special_strings_in_a_file_of_their_own(vocabulary, tmp_path):
    """As InternVL3 has them, 151,665 and on; a file there that is no table is told."""
    root, ranks = vocabulary
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((root / "qwen" / name).read_text(encoding="utf-8"), encoding="utf-8")
    names = [*text_tokenizer.QWEN_SPECIAL, "<img>", "</img>", "<IMG_CONTEXT>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({s: len(ranks) + i for i, s in enumerate(names)}))
    tok = load_tokenizer(tmp_path)
    assert tok.special["<IMG_CONTEXT>"] == len(ranks) + 24 and tok.vocab_size == len(ranks) + 25
    assert tok.encode("<img>")[0] == len(ranks) + 22 and len(tok.encode_ordinary("<img>")) > 1
    for text, said in (("[3]", "no object of strings"), ('{"<img>": 3}', "are missing"), ("{", "not valid JSON")):
        (tmp_path / "added_tokens.json").write_text(text)
        load_tokenizer.cache_clear()
        with pytest.raises(ValueError, match=f"{tmp_path}.*{said}"):
            load_tokenizer(tmp_path)

def test_whitespace_of_phi(vocabulary):
    phi = load_tokenizer(vocabulary[0] / "gpt2")

    def spaces(n):
        return phi.eos + 32 - n

    def tabs(n):
        return phi.eos + 40 - n
    assert phi.encode(" " * 31) == phi.encode_ordinary(" " * 31) == [spaces(31)] and phi.encode("  ") == [spaces(2)]
    assert phi.encode(" " * 70) == [spaces(31), spaces(31), spaces(8)]  # longest first, from the left
    assert phi.encode("\t" * 12) == [tabs(9), tabs(3)]
    assert phi.encode("x" + " " * 4 + "x")[1] == spaces(4)

@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """A tokenizer.json of DeepSeek's kind, made here, as the published file could not be had; and [text, ids], the ids
    those of the Hugging Face tokenizers library for that file."""
    golden = read_json(os.path.join(os.path.dirname(__file__), "golden", "staged_tokenizer.json"))
    path = tmp_path_factory.mktemp("staged") / "tokenizer.json"
    path.write_text(json.dumps(golden["tokenizer"]))
    return path, golden

def test_stages(staged, tmp_path):
    path, golden = staged
    tok = load_tokenizer(path)
    for text, ids in golden["texts"]:
        assert tok.encode(text) == ids, repr(text)
        assert tok.decode(ids) == text  # nothing is normalized
    assert len(tok.stages) == 6 and tok.eos == tok.special["<｜end▁of▁sentence｜>"] and not tok.nfc
    plain = tok.encode_ordinary("<|User|>: 12 ø")
    assert tok.special["<|User|>"] not in plain and tok.decode(plain) == "<|User|>: 12 ø"
    assert plain[-5:] == [*tok.encode(" "), *tok.encode("1"), *tok.encode("2"), *tok.encode(" "), tok.added["ø"]]
    assert text_tokenizer._isolate(r"\s+$", "a  \nb ") == ["a", "  ", "\nb", " "]  # as that library has it
    long = "a b1, " * 40000  # more than is split at once
    assert tok.decode(tok.encode(long)) == long
    (tmp_path / "text_tokenizer.json").write_text(tok.as_file())
    again = load_tokenizer(tmp_path)
    assert all(again.encode(text) == ids for text, ids in golden["texts"]) and again.fixed == tok.fixed

def test_stages_that_are_not_known(staged, tmp_path):
    """Nothing in the file is passed over: what would give other ids is refused."""
    _, golden = staged
    changes = [(0, "behavior", "Removed"), (1, "invert", True), (5, "individual_digits", False),
               (2, "type", "Whitespace"), (6, "use_regex", True), (6, "add_prefix_space", True)]
    for number, (stage, name, value) in enumerate(changes):
        file = json.loads(json.dumps(golden["tokenizer"]))
        file["pre_tokenizer"]["pretokenizers"][stage][name] = value
        (tmp_path / f"{number}.json").write_text(json.dumps(file))
        with pytest.raises(ValueError, match=rf'{number}.json: prepares text by .*"{name}": .*which DeepSeek'):
            load_tokenizer(tmp_path / f"{number}.json")
    for name, normalizer in (("a", {"type": "NFC"}), ("b", {"type": "Sequence", "normalizers": [{"type": "NFC"}]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(golden["tokenizer"] | {"normalizer": normalizer}))
        with pytest.raises(ValueError, match="NFC"):
            load_tokenizer(tmp_path / f"{name}.json")
    file = json.loads(json.dumps(golden["tokenizer"]))
    file["pre_tokenizer"]["pretokenizers"][1]["pattern"]["Regex"] = "("
    (tmp_path / "c.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="c.json: not laid out"):
        load_tokenizer(tmp_path / "c.json")
    (tmp_path / "d.json").write_text(json.dumps(golden["tokenizer"] | {"normalizer": None}))
    assert load_tokenizer(tmp_path / "d.json").stages

@pytest.mark.parametrize("kind, column", [("NANORECA_QWEN", 1), ("NANORECA_PHI", 2)])
def test_published_ids(kind, column):
    """Ids of the Hugging Face tokenizers library for hard strings. The real vocabulary is needed: $NANORECA_QWEN and
    $NANORECA_PHI are paths of a Qwen2.5 and of a phi-1.5 / GPT-2 tokenizer, a file or a folder each."""
    if not os.environ.get(kind):
        pytest.skip(f"{kind} is not set: give the path of that tokenizer's file or folder")
    tok = load_tokenizer(os.environ[kind])
    for row in HARD:
        assert tok.encode(row[0]) == row[column], repr(row[0])
    if column == 1:
        assert tok.encode("<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n") == \
            [151644, 872, 198, 31115, 458, 2168, 13, 151645, 198, 151644, 77091, 198]
        # a blank line is ONE token: never encode piecewise
        assert tok.encode("<|im_start|>user\n\nHi")[:3] == [151644, 872, 271]
    else:
        assert tok.vocab_size == 50295 and tok.eos == 50256

def test_bad_tokenizers(vocabulary, tmp_path):
    root, _ = vocabulary
    cases = []

    def case(message, name, text=None):
        path = tmp_path / name
        if text is not None:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        cases.append((path, message))
    vocab, merges = (root / "qwen" / "vocab.json").read_text(), (root / "qwen" / "merges.txt").read_text()
    case("no such text tokenizer", "nowhere")
    case("merges.txt: missing", "a/vocab.json", vocab)
    case("not valid JSON", "b.json", vocab[:1000])
    case("no BPE model", "c.json", "{}")
    case("unknown kind of text tokenizer", "spiece.model", "")
    case("line 2 is", "d.tiktoken", "IQ== 0\nIg\n")
    case("1 tokens, ranks are not", "e.tiktoken", "IQ== 0\n")
    other = json.loads((root / "qwen.json").read_text())
    other["pre_tokenizer"] = {"type": "Metaspace"}
    case("neither Qwen2's nor GPT-2's", "f.json", json.dumps(other))
    other = json.loads((root / "qwen.json").read_text())
    other["added_tokens"] = other["added_tokens"][:1]
    case("<|im_start|>', '<|im_end|>'] are missing", "g.json", json.dumps(other))
    lines = merges.splitlines()
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "merges.txt").write_text("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), encoding="utf-8")
    case("do not rise with the merges", "h/vocab.json", vocab)
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "merges.txt").write_text("\n".join(lines[:20]), encoding="utf-8")
    case("tokens against 256 bytes + 19 merges", "i/vocab.json", vocab)
    case("no text tokenizer in this folder", "empty/README", "")
    cases[-1] = (tmp_path / "empty", cases[-1][1])
    for path, message in cases:
        with pytest.raises((ValueError, FileNotFoundError)) as e:
            load_tokenizer(path)
        said = str(e.value)
        assert message in said and str(path).split("/")[-1][:5] in said and "\n" not in said, said

def test_train_bpe_asks_for_more_text():
    with pytest.raises(ValueError, match="give only 257 tokens"):
        train_bpe([("aa", 1)], 300)
