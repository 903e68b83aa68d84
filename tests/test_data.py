"""Text tokenizers, templates, reading of real images, preprocessing, order. The shape world has its own tests."""
import base64
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zlib

import numpy as np
import pytest
import regex
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import data  # noqa: E402

GOLDEN = os.path.join(ROOT, "tests", "golden")
HARD = json.load(open(os.path.join(GOLDEN, "tokenizers.json"), encoding="utf-8"))       # [text, Qwen2.5 ids, phi-1.5 ids]


# ------------------------------------------------------------------------------------------------ tiny vocabulary, templates
def test_tiny_vocabulary():
    tok = data.load_tokenizer("tiny")
    assert tok.vocab_size == 1024 and tok is data.load_tokenizer("tiny")
    assert [tok.special[s] for s in data.TINY_SPECIAL] == list(range(1018, 1024)) and tok.eos == 1018
    for word in data.WORLD_WORDS:
        assert len(tok.encode(word)) == 1 and len(tok.encode(" " + word)) == 1, word
    for word in data.LEADING:
        assert len(tok.encode(word)) == 1, word
    for text in ("Generate an image: a small red circle above two blue squares", "make the yellow star purple",
                 "Is the triangle left of the cross?", "a large orange cross at the bottom right, on a gray background"):
        assert len(tok.encode(text)) == len(regex.findall(r"\w+|[^\w\s]", text)), [tok.decode([i]) for i in tok.encode(text)]
    english = open(os.path.join(data.WEIGHTS, "tokenizer_english.txt"), encoding="utf-8").read()
    assert len(tok.encode(english)) < 2.1 * len(english.split())


def test_every_word_of_the_shape_world_is_one_token():
    tok, rng = data.load_tokenizer("tiny"), random.Random(0)
    scenes = data.Scenes(400, seed=1)
    texts = [row["prompt"] for row in data.task_prompts(50, 0)]
    for i in range(len(scenes)):
        scene = scenes.scene(i)
        texts += [data.sparse_caption(scene, rng), data.dense_caption(scene, rng), data.edit(scene, rng)[0], *data.question(scene, rng)[:2],
                  *data.text_question(scene, rng)]
    for text in set(texts):
        assert len(tok.encode(text)) == len(regex.findall(r"\w+|[^\w\s]", text)), [tok.decode([i]) for i in tok.encode(text)]


def test_tiny_vocabulary_is_what_the_trainer_makes(tmp_path):
    data.build_tokenizer(tmp_path / "t.tiktoken")
    shipped = open(os.path.join(data.WEIGHTS, "tokenizer.tiktoken"), "rb").read()
    assert (tmp_path / "t.tiktoken").read_bytes() == shipped, "run python data.py --build-tokenizer and train the tiny models again"


def test_templates():
    tok = data.load_tokenizer("tiny")
    assert len(set(data.RECA_TEMPLATES)) == len(data.RECA_TEMPLATES) >= 100
    assert sum(len(tok.encode(t)) <= 12 for t in data.RECA_TEMPLATES) >= 100
    assert all(t == t.strip() and t and "|" not in t and "\n" not in t for t in data.RECA_TEMPLATES)


def test_special_strings():
    tok = data.load_tokenizer("tiny")
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>red<|im_end|>"
    ids = tok.encode(text)
    assert [i for i in ids if i >= 1018] == [1019, 1021, 1023, 1022, 1020]
    plain = tok.encode_ordinary(text)                                     # what a user types is never a control token
    assert max(plain) < 1018 and tok.decode(plain) == text == tok.decode(ids)
    assert tok.decode(ids, skip_special=True) == "user\nred"
    assert tok.decode([*tok.encode("red"), 5000, 1024]) == "red\ufffd\ufffd"      # ids of a padded embedding table
    assert tok.decode([0x80]) == "\ufffd" and tok.decode([]) == "" and tok.encode("") == []
    assert tok.decode(torch.tensor(tok.encode("two stars"))) == "two stars"


def random_texts(n, seed=0):
    rng = random.Random(seed)
    pieces = [" ", "  ", "\t", "\n", "\r\n", "a", "the", " circle", "I'll", "1", "23", ".", "...", "é", "e\u0301", "日本", "한", "\u1112\u1161",
              "😀", "👩\u200d👧", "\u00a0", "\u3000", "ß", "<|", "|>", "١", "\x00", "\u0301", "<|im_start|>", "<|endoftext|>"]
    for _ in range(n):
        anything = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))
        yield "".join(rng.choice(pieces) if rng.random() < 0.7 else anything() for _ in range(rng.randrange(30)))


def test_round_trip_of_any_text():
    tok = data.load_tokenizer("tiny")
    for text in [*random_texts(2000), *(row[0] for row in HARD)]:
        want = "".join(unicodedata.normalize("NFC", p) if p not in tok.special else p for p in tok.cut_all.split(text))
        assert tok.decode(tok.encode(text)) == want
        assert tok.decode(tok.encode_ordinary(text)) == unicodedata.normalize("NFC", text)
    assert tok.encode("cafe\u0301") == tok.encode("caf\u00e9")


# ------------------------------------------------------------------------------------------------ published vocabularies
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
    """A small vocabulary as Qwen2 and GPT-2 publish theirs: bytes in their order of ids, merges, in every file format."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char = {b: chr(b) for b in own}
    char.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in char)})
    order = own + [b for b in range(256) if b not in own]
    text = "the red circle  and\n\n\tthe café of 日本, isn't it?     return\t\tx\n " + " ".join(data.RECA_TEMPLATES)
    trained = data.train_bpe([(text, 1)], 500)
    ranks = {bytes([b]): i for i, b in enumerate(order)}
    merges = []
    for token in list(trained)[256:]:
        parts = [bytes([b]) for b in token]                               # the last merge that makes it, by the tokens before it
        while len(parts) > 2:
            i = min((trained.get(a + b, 9999), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(["".join(char[b] for b in p) for p in parts])
        ranks[token] = len(ranks)
    vocab = {"".join(char[b] for b in t): i for t, i in ranks.items()}
    root = tmp_path_factory.mktemp("vocabulary")
    end = {"<|endoftext|>": len(vocab)}
    for name, v in (("qwen", vocab), ("gpt2", {**vocab, **end})):
        (root / name).mkdir()
        (root / name / "vocab.json").write_text(json.dumps(v), encoding="utf-8")
        (root / name / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in merges), encoding="utf-8")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pre = {"qwen": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": data.QWEN_SPLIT}}, byte_level]},
           "gpt2": {"type": "ByteLevel", "add_prefix_space": False}}
    extra = {"qwen": data.QWEN_SPECIAL, "gpt2": ["<|endoftext|>", *data.PHI_WHITESPACE]}
    for name in pre:
        added = [{"content": t, "id": len(vocab) + i} for i, t in enumerate(extra[name])]
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        (root / f"{name}.json").write_text(json.dumps({"model": model, "pre_tokenizer": pre[name], "added_tokens": added}))
    (root / "ours.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for t, i in ranks.items()))
    return root, ranks


def test_formats_agree(vocabulary):
    root, ranks = vocabulary
    qwen, qwen_json = data.load_tokenizer(root / "qwen"), data.load_tokenizer(root / "qwen.json")
    phi, phi_json = data.load_tokenizer(root / "gpt2"), data.load_tokenizer(str(root / "gpt2.json"))
    ours = data.load_tokenizer(root / "ours.tiktoken")
    n = len(ranks)
    assert qwen.special == qwen_json.special and qwen.special["<|im_end|>"] == n + 2 and qwen.vocab_size == n + 22
    assert phi.fixed == phi_json.fixed and phi.eos == n and phi.vocab_size == n + 39 and ours.special["<|image_pad|>"] == n + 5
    assert data.load_tokenizer(root / "qwen" / "vocab.json").special == qwen.special
    for text in [*random_texts(300, 1), *(row[0] for row in HARD)]:
        want = slow_bpe(unicodedata.normalize("NFC", text), data.QWEN_SPLIT, ranks)
        assert qwen.encode_ordinary(text) == qwen_json.encode_ordinary(text) == ours.encode_ordinary(text) == want
        assert qwen.encode(text) == qwen_json.encode(text)
        assert phi.encode(text) == phi_json.encode(text)
        if not regex.search("  |\t\t", text):
            assert phi.encode_ordinary(text) == slow_bpe(text, data.GPT2_SPLIT, ranks)
        assert phi.decode(phi.encode(text)) == text                                # no normalisation in GPT-2's kind


def test_whitespace_of_phi(vocabulary):
    phi = data.load_tokenizer(vocabulary[0] / "gpt2")
    spaces, tabs = (lambda n: phi.eos + 32 - n), (lambda n: phi.eos + 40 - n)
    assert phi.encode(" " * 31) == phi.encode_ordinary(" " * 31) == [spaces(31)] and phi.encode("  ") == [spaces(2)]
    assert phi.encode(" " * 70) == [spaces(31), spaces(31), spaces(8)]                     # longest first, from the left
    assert phi.encode("\t" * 12) == [tabs(9), tabs(3)]
    assert phi.encode("x" + " " * 4 + "x")[1] == spaces(4)


@pytest.mark.parametrize("kind, column", [("NANORECA_QWEN", 1), ("NANORECA_PHI", 2)])
def test_published_ids(kind, column):
    """Ids of the Hugging Face tokenizers library for hard strings; needs the real vocabulary: a path in $NANORECA_QWEN / $NANORECA_PHI."""
    if not os.environ.get(kind):
        pytest.skip(f"{kind} not set: give the path of a {'Qwen2.5' if column == 1 else 'phi-1.5 / GPT-2'} tokenizer file or folder")
    tok = data.load_tokenizer(os.environ[kind])
    for row in HARD:
        assert tok.encode(row[0]) == row[column], repr(row[0])
    if column == 1:
        assert tok.encode("<|im_start|>user\nGenerate an image.<|im_end|>\n<|im_start|>assistant\n") == \
            [151644, 872, 198, 31115, 458, 2168, 13, 151645, 198, 151644, 77091, 198]
        assert tok.encode("<|im_start|>user\n\nHi")[:3] == [151644, 872, 271]      # a blank line is ONE token: never encode piecewise
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
            data.load_tokenizer(path)
        assert message in str(e.value) and str(path).split("/")[-1][:5] in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_train_bpe_asks_for_more_text():
    with pytest.raises(ValueError, match="give only 257 tokens"):
        data.train_bpe([("aa", 1)], 300)


# ------------------------------------------------------------------------------------------------ reading of images
def picture(i=0, size=(20, 16), mode="RGB", kind="PNG"):
    noise = np.random.default_rng(i).integers(256, size=(size[1], size[0], len(mode)), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(out, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return out.getvalue()


def pack(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def same(image, i, **kw):
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(picture(i, **kw))).convert("RGB")))


def test_tar_shard(tmp_path, monkeypatch):
    shard = pack(tmp_path / "s.tar", [
        ("a/0.v1.json", b"{}"), ("a/0.png", picture(0)), ("a/0.txt", " one\n red\tfox ".encode()),
        ("b/0.webp", picture(1, kind="WEBP")), ("b/0.json", json.dumps({"caption": "zwölf"}).encode()),
        ("c.txt", b"no picture"), ("d.seg.png", picture(9)), ("d.txt", b"d"), ("d.JPG", picture(2, kind="JPEG"))])
    images = data.Images(shard, captions=True)
    assert len(images) == 3 and [s.caption for s in images.samples] == ["one red fox", "zwölf", "d"]
    for i in (2, 0, 1):                                                   # any order, nothing is unpacked
        sample, image = images[i]
        assert image.mode == "RGB" and same(image, i, kind=("PNG", "WEBP", "JPEG")[i]) and sample.name.startswith(shard + ":")
    assert [s.caption for s, _ in data.read_images(shard)] == ["", "", ""]   # captions are not read where nobody needs them
    assert [s.name for s, _ in data.read_images(tmp_path)] == [s.name for s in images.samples]     # a folder of shards
    monkeypatch.setattr(data, "open_image", lambda content: sizes.append(len(content)) or Image.new("RGB", (9, 9)))
    sizes = []
    images.read(0)
    assert sizes == [len(picture(0))]                                     # the member's bytes only, not the rest of the shard


def test_folder_and_modes(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True), (tmp_path / "a").mkdir()
    for name, content in (("b/1.png", picture(1)), ("b/c/2.JPEG", picture(2, kind="JPEG")), ("0.webp", picture(0, kind="WEBP")),
                          ("._0.png", b"mac"), ("notes.txt", b"x"), ("a/3.png", picture(3))):
        (tmp_path / name).write_bytes(content)
    assert [os.path.relpath(s.file, tmp_path) for s, _ in data.read_images([tmp_path])] == ["0.webp", "a/3.png", "b/1.png", "b/c/2.JPEG"]
    clear = np.zeros((12, 12, 4), np.uint8)
    clear[:, 6:] = (200, 0, 0, 128)
    Image.fromarray(clear).save(tmp_path / "alpha.png")
    pixels = np.asarray(data.open_image(tmp_path / "alpha.png"))
    assert pixels[0, 0].tolist() == [255, 255, 255] and abs(pixels[0, 11].astype(int) - [227, 127, 127]).max() <= 1
    palette = Image.new("P", (12, 12), 1)
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    assert np.asarray(data.open_image(tmp_path / "p.png")).min() == 255
    Image.fromarray(np.full((12, 12), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(data.open_image(str(tmp_path / "deep.png")))[0, 0].tolist() == [128, 128, 128]
    for mode in ("L", "LA", "CMYK", "1"):
        Image.new(mode, (12, 12)).save(tmp_path / "m.tiff")
        assert data.open_image(tmp_path / "m.tiff").mode == "RGB"


def write_folder(path, n, **broken):
    path.mkdir(parents=True)
    for i in range(n):
        (path / f"{i:04d}.png").write_bytes(broken.get(f"n{i}", picture(i)))
        (path / f"{i:04d}.txt").write_text(f"picture {i}")
    return path


def test_broken_images_are_counted_and_stepped_over(tmp_path):
    good = picture(7)
    folder = write_folder(tmp_path / "few", 200, n7=good[:len(good) // 2], n150=b"not a picture")
    images = data.Images(folder)
    sample, image = images[7]                                             # the next good one stands in, whoever asks
    assert sample.name.endswith("0008.png") and same(image, 8)
    assert len(list(data.read_images(folder))) == 198
    folder = write_folder(tmp_path / "many", 200, n3=b"", n100=good[:80], n101=b"GIF89a")
    with pytest.raises(ValueError) as e:
        list(data.read_images(folder))
    assert "3 of 200 samples are broken, more than 1%" in str(e.value) and "0003.png" in str(e.value) and "0101.png" in str(e.value)
    assert "--check" in str(e.value) and "\n" not in str(e.value)


def test_odd_sizes_are_rejected_not_broken(tmp_path):
    sizes = {"a": (8, 30), "b": (9, 30), "c": (90, 9), "d": (89, 9), "e": (200, 12)}
    for name, size in sizes.items():
        (tmp_path / f"{name}.png").write_bytes(picture(0, size))
    images = data.Images(tmp_path)
    assert [os.path.basename(images.samples[i].file) for i in range(5) if images.read(i)] == ["b.png", "d.png"]
    assert len(images.rejected) == 3 and not images.problems
    assert [images.row(i) for i in range(5)] == [1, 1, 3, 3, 1] and images[4][0] is images.samples[images.row(4)]
    (tmp_path / "b.png").unlink(), (tmp_path / "d.png").unlink()
    with pytest.raises(ValueError, match="none of 3 pictures can be used: 0 broken, 3 rejected"):
        data.Images(tmp_path)[0]


@pytest.mark.filterwarnings("ignore")
def test_decompression_bomb(tmp_path):
    for name, (w, h) in (("a.png", (10000, 9000)), ("b.png", (30000, 9000))):
        header = b"IHDR" + struct.pack(">2I5B", w, h, 8, 0, 0, 0, 0)      # no pixels follow: it must be refused before any is read
        crc = struct.pack(">I", zlib.crc32(header))
        (tmp_path / name).write_bytes(picture()[:12] + header + crc + picture()[33:])
        with pytest.raises(ValueError, match=r"a.png.*10000x9000 is over 89 megapixels|b.png.*bomb"):
            data.open_image(tmp_path / name)
    images = data.Images(tmp_path, max_broken=1)
    assert images.read(0) is None and images.read(1) is None and len(images.problems) == 2


def test_empty_captions(tmp_path):
    folder = write_folder(tmp_path / "f", 300)
    (folder / "0004.txt").write_text(" \n")
    (folder / "0005.txt").unlink()
    (folder / "0006.txt").write_bytes(b"\xff\xfe broken")
    assert len(data.Images(folder)) == 300                                # nobody needs them
    images = data.Images(folder, captions=True)
    assert len(images) == 297
    assert [w.split(" (")[0] for w in images.problems.values()] == ["empty caption", "no caption", "unreadable caption"]
    (folder / "0007.txt").write_text("")
    with pytest.raises(ValueError, match=r"4 of 300 samples are broken, more than 1%: .*0004.png \(empty caption\)"):
        data.Images(folder, captions=True)


def test_damaged_tars(tmp_path):
    members = [(f"{i:03d}.png", picture(i)) for i in range(50)]
    whole = open(pack(tmp_path / "whole.tar", members), "rb").read()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        at = [m.offset for m in tar.getmembers()]
    bad = bytearray(whole)
    bad[at[20]:at[20] + 300] = b"\x55" * 300
    for content in (whole[:at[30] + 700], whole[:at[30]], whole[:at[30] + 100], bytes(bad), whole[:at[-1] + 600], b"", b"text" * 1000):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(ValueError, match="bad.tar: truncated or damaged tar shard.* samples before the damage") as e:
            data.Images(tmp_path / "bad.tar")
        assert "\n" not in str(e.value)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(__file__)
    with pytest.raises(ValueError, match="compressed tar.*gunzip"):
        data.Images(tmp_path / "z.tar")


def llava(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_llava(tmp_path):
    write_folder(tmp_path / "img", 120)
    talk = lambda *said: [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(said)]
    rows = [{"id": i, "image": f"img/{i:04d}.png", "conversations": talk("<image>\nWhat is it?", f"picture {i}", "Sure?\n<image>", "Yes.")}
            for i in range(119)]
    rows.append({"id": "t", "conversations": talk("2 + 2?", "4")})
    path = llava(tmp_path / "l.json", rows)
    images = data.Images(path)
    assert len(images) == 119 and images.text_only == 1
    sample, image = images[5]
    assert sample.turns == (("What is it?", "picture 5"), ("Sure?", "Yes.")) and same(image, 5)
    assert len(data.Images(path, image_root=str(tmp_path))) == 119
    with pytest.raises(FileNotFoundError, match="other 19 first ones in .*l.json; set --image-root"):
        data.Images(path, image_root=str(tmp_path / "elsewhere"))
    rows[7] = {"image": "img/0007.png", "conversations": talk("a", "")}
    assert data.Images(llava(tmp_path / "l.json", rows)).problems == {
        f"{path}:7": "not a LLaVA sample (ValueError: turns are not human, gpt, human, gpt ... with an answer each)"}
    rows[8] = {"image": "img/0008.png"}
    with pytest.raises(ValueError, match="2 of 119 samples are broken.*KeyError: 'conversations'"):
        data.Images(llava(tmp_path / "l.json", rows))
    with pytest.raises(ValueError, match="a dict, expected LLaVA JSON"):
        data.Images(llava(tmp_path / "x.json", {}))


def test_missing_paths(tmp_path):
    for path, message in (("nowhere.tar", "no such folder"), ("nowhere", "no such folder")):
        with pytest.raises(FileNotFoundError, match=message):
            data.Images(tmp_path / path)
    with pytest.raises(ValueError, match="no pictures found"):
        data.Images(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="unknown kind of data"):
        data.Images(tmp_path / "x.zip")
    with pytest.raises(FileNotFoundError, match="no such image"):
        data.open_image(tmp_path / "x.png")


def test_check_command(tmp_path, monkeypatch, capsys):
    folder = write_folder(tmp_path / "f", 60)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", "--check", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            data.one_line_errors(data.main)
        return e.value.code, capsys.readouterr().out
    code, out = run(folder, "--captions")
    assert code == 0 and "60 samples: 60 good, 0 broken" in out and "captions: 60, 60 distinct" in out
    (folder / "0003.png").write_bytes(b"x")
    code, out = run(folder)
    assert code == 2 and "broken: " in out and "0003.png" in out
    p = subprocess.run([sys.executable, os.path.join(ROOT, "data.py"), "--check", str(tmp_path / "none")], capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and p.stderr.startswith("error: ") and "no such folder" in p.stderr


# ------------------------------------------------------------------------------------------------ preprocessing
@pytest.mark.parametrize("name, function", [("recon", data.preprocess_stretch), ("und", data.preprocess_pad)])
def test_preprocessing_golden(name, function):
    from safetensors import safe_open
    path = os.path.join(os.environ.get("PARITY_DIR", GOLDEN), "harmon", "cases.safetensors")
    if not os.path.isfile(path):
        pytest.skip(f"preproc.{name}: {path} is not there")
    with safe_open(path, "pt") as cases:
        if f"preproc.{name}.in.image_uint8" not in cases.keys():
            pytest.skip(f"preproc.{name}: not in {path}")
        image = Image.fromarray(cases.get_tensor(f"preproc.{name}.in.image_uint8").numpy())
        want = cases.get_tensor(f"preproc.{name}.out.pixel_values")
    got = function(image, want.shape[-1])
    worst = (got - want).abs().max().item()
    assert worst <= 1e-6, f"preproc.{name}  NOT OK  max difference {worst:.3g}  tolerance 1e-6"


def test_preprocessing_by_hand():
    image = Image.new("RGB", (5, 2), (255, 0, 0))
    x = data.preprocess_pad(image, 5)                                     # 3 rows of grey: 1 above, 2 below
    assert x.shape == (3, 5, 5) and x.dtype == torch.float32
    grey = 127 / 255 * 2 - 1
    assert torch.allclose(x[0, :, 0], torch.tensor([grey, 1, 1, grey, grey]))
    assert torch.allclose(x[1, :, 0], torch.tensor([grey, -1, -1, grey, grey]))
    x = data.preprocess_stretch(image, 5)
    assert x.shape == (3, 5, 5) and x[0].min() == 1 and x[1].max() == -1


# ------------------------------------------------------------------------------------------------ order and randomness
def test_every_epoch_is_a_permutation():
    n, batch = 103, 8
    seen = torch.cat([data.batch_indices(n, batch, 5, step) for step in range(103)])       # 8 epochs, batches cross their ends
    epochs = seen.view(8, n)
    assert (epochs.sort(1).values == torch.arange(n)).all() and len({tuple(e.tolist()) for e in epochs}) == 8
    other = torch.cat([data.batch_indices(n, 2 * batch, 5, step) for step in range(51)])   # the order does not depend on the batch either
    assert torch.equal(other, seen[:len(other)])
    assert data.batch_indices(3, 10, 0, 7).shape == (10,)                                  # smaller than one batch
    with pytest.raises(ValueError, match="0 samples"):
        data.batch_indices(0, 8, 0, 0)


FIRST = [5, 6, 4, 3, 8]


def test_order_needs_no_replay_and_no_state():
    want = [data.batch_indices(1000, 32, 1, s) for s in range(200)]
    data._epoch_order.cache_clear()
    torch.manual_seed(3), np.random.seed(3)
    assert all(torch.equal(data.batch_indices(1000, 32, 1, s), want[s]) for s in (199, 0, 57, 130))
    assert not torch.equal(data.batch_indices(1000, 32, 2, 0), want[0])
    assert not torch.equal(data.batch_indices(1000, 32, 1, 0, "t2i"), want[0])
    assert data.batch_indices(10, 5, 0, 0).tolist() == FIRST, "the order of samples changed: old runs no longer resume as they were"


def test_sample_generator():
    draw = lambda *a: tuple(torch.randn(4, generator=data.sample_generator(*a)).tolist())
    assert draw(0, 1, 2, "noise") == draw(0, 1, 2, "noise")
    keys = [(seed, step, index, stream) for seed in (0, 1) for step in range(40) for index in range(40) for stream in ("", "x")]
    draws = [draw(*k) for k in keys]
    assert len(set(draws)) == len(keys)
    x = torch.tensor(draws)
    assert x.mean().abs() < 0.03 and (x.std() - 1).abs() < 0.03
    assert torch.corrcoef(x[:, 0].view(2, 40, 40, 2).reshape(2, -1))[0, 1].abs() < 0.06      # neighbouring seeds are unrelated
