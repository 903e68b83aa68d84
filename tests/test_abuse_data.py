"""What people's folders, tars and JSON files really look like: the right value, a count by reason, or one line."""
import gzip
import io
import json
import os
import runpy
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin
from test_data import ROOT, pack, picture, write_folder

import data

def jpeg(color=(9, 9, 9), size=(32, 24), kind="JPEG", **options):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind, **options)
    return out.getvalue()

def talk(*said, keys=("from", "value"), who=("human", "gpt")):
    return [{keys[0]: who[i % 2], keys[1]: text} for i, text in enumerate(said)]

def tree(folder):
    """Everything that is in a folder, to see that nothing changes."""
    return sorted((root, name, os.lstat(os.path.join(root, name)).st_size, os.lstat(os.path.join(root, name)).st_mtime)
                  for root, folders, files in os.walk(folder) for name in folders + files)

def write(folder, files):
    """{name: bytes, str, JSON or ("link", target)} -> the folder."""
    for name, content in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if isinstance(content, tuple):
            os.symlink(content[1], path)
            continue
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        with open(path, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
    return str(folder)

def left_out(images):
    """{reason: how many}, by the first word of each reason."""
    out = {}
    for _, why in images.left_out:
        out[why.split()[0]] = out.get(why.split()[0], 0) + 1
    return out

def base_names(images):
    return [os.path.basename(s.name) for s in images.samples]

# ------------------------------------------------------------------------------------------------ one line, never more
def whole_tar(*members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()

TAR = whole_tar(("a.png", picture(0)), ("b.png", picture(1)))
ROW = {"image": "i.png", "conversations": talk("<image>\nWhat?", "A cat")}
DEEP = "[" * 100_000 + "]" * 100_000
REFUSED = {  # name: (files, what is read, options, the line)
    "tar.gz": ({"s.tar.gz": gzip.compress(TAR)}, "s.tar.gz", {}, "s.tar.gz: unknown kind .*compressed.*gunzip"),
    "tgz": ({"s.tgz": gzip.compress(TAR)}, "s.tgz", {}, "s.tgz: unknown kind .*compressed.*gunzip"),
    "gz named tar": ({"s.tar": gzip.compress(TAR)}, "s.tar", {}, "compressed tar.*gunzip it first"),
    "tar.gz alone in a folder": ({"d/s.TAR.GZ": b"x"}, "d", {}, "no pictures found.*left out: compressed.*: 1, e.g."),
    "HEIC": ({"x.HEIC": b"x"}, "x.HEIC", {}, "x.HEIC: unknown kind .*HEIC.*convert to JPEG"),
    "HEIC alone in a folder": ({"d/x.heif": b"x"}, "d", {}, "no pictures found.*HEIC.*: 1, e.g. .*x.heif"),
    "hidden alone": ({"d/.git/x.png": picture()}, "d", {}, "no pictures found.*left out: hidden.*: 1"),
    "second tar damaged": ({"s.tar": TAR + b"\x55" * 512 + TAR[512:]}, "s.tar", {}, "damaged tar shard.* 2 members"),
    "second tar cut": ({"s.tar": TAR + TAR[:1800]}, "s.tar", {}, "truncated or damaged tar shard"),
    "waste behind a tar": ({"s.tar": TAR + b"waste" * 300}, "s.tar", {}, "truncated or damaged tar shard"),
    "pax bomb": ({"s.tar": whole_tar(("a.png", b"x"))[:156] + b"x" + bytes(99)}, "s.tar", {}, "damaged tar shard"),
    "JSON cut": ({"l.json": json.dumps([ROW] * 3)[:-9]}, "l.json", {}, "not valid JSON.*incomplete, fetch it again"),
    "JSON lines cut": ({"l.json": (json.dumps(ROW) + "\n") * 3 + '{"image', "i.png": picture()}, "l.json", {},
                       "1 of 4 samples are broken.*l.json:3 .*a str, expected an object"),
    "JSON empty": ({"l.json": ""}, "l.json", {}, "l.json: not valid JSON"),
    "JSON deep": ({"l.json": DEEP}, "l.json", {}, "l.json: not valid JSON .*recursion"),
    "JSON in Latin-1": ({"l.json": b'[{"image": "caf\xe9"}]'}, "l.json", {}, "not valid JSON .*0xe9.*convert it to U"),
    "JSON object": ({"l.json": {"data": []}}, "l.json", {}, "a dict, expected LLaVA JSON"),
    "JSON of numbers": ({"l.json": [1, 2]}, "l.json", {}, "2 of 2 samples.*a int, expected an object"),
    "JSON picture missing": ({"l.json": [ROW] * 3 + [dict(ROW, image="gone.png")] * 2, "i.png": picture()}, "l.json",
                             {}, "gone.png: no such image, nor those of 1 other rows of 5 .*set --image-root"),
    "JSON picture a number": ({"l.json": [dict(ROW, image=5)]}, "l.json", {}, "not a LLaVA sample .TypeError"),
    "JSON half a character": ({"l.json": [dict(ROW, conversations=talk("a", "\ud800"))]}, "l.json", {}, "surrogates"),
    "JSON without answers": ({"l.json": [dict(ROW, conversations=talk("a"))]}, "l.json", {}, "turns are not human,"),
    "JSON system turn": ({"l.json": [dict(ROW, conversations=talk("a", "b", who=("system", "gpt")))]}, "l.json", {},
                         "turns are not human, gpt"),
    "JSON of text alone": ({"l.json": [{"conversations": talk("a", "b")}]}, "l.json", {},
                           "no pictures found.*rows without a picture: 1, e.g. .*l.json:0"),
    "caption JSON deep": ({"d/a.png": picture(), "d/a.json": DEEP}, "d", {"captions": True}, "recursion depth"),
    "caption JSON a list": ({"d/a.png": picture(), "d/a.json": "[]"}, "d", {"captions": True}, "a list, expected"),
    "caption in Latin-1": ({"d/a.png": picture(), "d/a.txt": b"caf\xe9"}, "d", {"captions": True},
                           "unreadable.*0xe9.*: convert it to UTF-8"),
    "caption JSON in Latin-1": ({"d/a.png": picture(), "d/a.json": b'{"text": "caf\xe9"}'}, "d", {"captions": True},
                                "unreadable.*0xe9.*: convert it to UTF-8"),
    "caption in UTF-16 cut": ({"d/a.png": picture(), "d/a.txt": "green".encode("utf-16")[:-1]}, "d", {"captions": True},
                              "truncated data.: convert it to UTF-8"),
    "caption in UTF-16 unmarked": ({"d/a.png": picture(), "d/a.txt": "green".encode("utf-16-le")}, "d",
                                   {"captions": True}, "NUL characters: convert it to UTF-8"),
    "caption in UTF-32": ({"d/a.png": picture(), "d/a.txt": "green".encode("utf-32")}, "d", {"captions": True},
                          "NUL characters: convert it to UTF-8"),
    "caption half a character": ({"d/a.png": picture(), "d/a.json": '{"text": "\\ud800"}'}, "d", {"captions": True},
                                 "unreadable caption .*surrogates"),
    "two captions of a key": ({"s.tar": whole_tar(("k.image.png", picture()), ("k.1.txt", b"x"), ("k.2.txt", b"y"))},
                              "s.tar", {"captions": True}, "several captions of its key"),
    "another's caption": ({"s.tar": whole_tar(("k 1.3.png", picture()), ("k 1.4.png", picture()), ("k 1.4.txt", b"x"))},
                          "s.tar", {"captions": True}, "1 of 2 .*k 1.3.png .no caption"),
    "a caption of a like name": ({"d/k.1.png": picture(), "d/k.2.txt": "x"}, "d", {"captions": True}, "no caption"),
    "nowhere": ({}, "nowhere", {}, "nowhere: no such folder"),
    "control characters": ({}, "a\nb\x1b[2J.png", {}, r"a\\nb\\x1b\[2J.png: no such folder")}

@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(name, tmp_path):
    files, path, options, message = REFUSED[name]
    write(tmp_path, files)
    before = tree(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as e:
        data.Images(os.path.join(tmp_path, path), **options)
    assert str(e.value).isprintable() and tree(tmp_path) == before

def test_a_script_ends_with_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    os.mkfifo(tmp_path / "pipe.png")
    write(tmp_path, {"s.tgz": b"x", "l.json": "{"})
    for name in ("pipe.png", "s.tgz", "l.json", "nowhere"):
        monkeypatch.setattr(sys, "argv", ["data.py", "--check", str(tmp_path / name)])
        with pytest.raises(SystemExit) as e:
            data.one_line_errors(data.main)
        said = capsys.readouterr()
        assert e.value.code == 2 and said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1

# ------------------------------------------------------------------------------------------------ one picture
def test_exif_rotation_is_applied_unless_asked_otherwise(tmp_path):
    exif = Image.Exif()
    stored = np.zeros((24, 32, 3), np.uint8)
    stored[:, :16] = 255  # white on the left as stored
    want = {1: (32, 24, "left"), 3: (32, 24, "right"), 6: (24, 32, "top"), 8: (24, 32, "bottom"), 99: (32, 24, "left")}
    for orientation, (w, h, white) in want.items():
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "a.jpg", exif=exif)
        image = np.asarray(data.open_image(str(tmp_path / "a.jpg")))
        sides = {"left": image[:, :8], "right": image[:, -8:], "top": image[:8], "bottom": image[-8:]}
        assert image.shape == (h, w, 3) and sides[white].min() > 200, orientation
        assert data.open_image(str(tmp_path / "a.jpg"), exif=False).size == (32, 24)
        images = data.Images(tmp_path)
        assert images.read(0).size == (w, h) and data.Images(tmp_path, exif=False).read(0).size == (32, 24)
    whole = open(tmp_path / "a.jpg", "rb").read()
    at = whole.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8:])  # EXIF that cannot be read
    assert data.open_image(tmp_path / "a.jpg").size == (32, 24)
    exif[0x0112] = 6
    Image.fromarray(np.full((24, 32), 5000, np.uint16)).save(tmp_path / "deep.png", exif=exif)
    assert data.open_image(tmp_path / "deep.png").size == (24, 32)

def test_gray_of_12_and_16_bits(tmp_path):
    for top, want in ((4095, 255), (65535, 255), (4096, 16), (2048, 128), (0, 0)):
        ramp = np.linspace(0, top, 24 * 32).round().astype(np.uint16).reshape(24, 32)
        Image.fromarray(ramp).save(tmp_path / "a.png")
        image = np.asarray(data.open_image(tmp_path / "a.png"))
        assert image.max() == want and image.min() == 0, top
        if top in (4095, 65535):
            assert abs(image[..., 0] - ramp / top * 255).max() <= 1

def test_long_text_beside_the_pixels_is_no_fault(tmp_path):
    for size in (10, 3_000_000, 20_000_000):
        text = PngImagePlugin.PngInfo()
        text.add_text("parameters", "x" * size, zip=True)
        Image.new("RGB", (20, 16), (1, 2, 3)).save(tmp_path / "a.png", pnginfo=text)
        assert data.open_image(tmp_path / "a.png").getpixel((0, 0)) == (1, 2, 3)

def test_the_square_of_the_longer_side_stays_in_bounds(tmp_path, monkeypatch):
    assert data.MAX_SIDE ** 2 <= data.MAX_PIXELS < (data.MAX_SIDE + 1) ** 2
    monkeypatch.setattr(data, "MAX_SIDE", 100)
    for size, want in (((300, 40), (100, 13)), ((40, 300), (13, 100)), ((101, 50), (100, 50)), ((100, 90), (100, 90))):
        (tmp_path / "a.png").write_bytes(picture(0, size))
        assert max(abs(a - b) for a, b in zip(data.open_image(tmp_path / "a.png").size, want)) <= 1

def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            data.open_image(path)
    write(tmp_path, {"a.png": picture(), "gone.png": ("link", "nowhere.png"), "self.png": ("link", "self.png"),
                     "zero.png": ("link", "/dev/zero"), "a.txt": "caption"})
    images = data.Images(tmp_path, captions=True)
    assert base_names(images) == ["a.png"] and left_out(images) == {"broken": 4}

@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", picture()[:100], b"%!PS-Adobe-3.0 EPSF-3.0", b"<svg/>",
                                     picture()[:40] + bytes(200), jpeg()[:300], b"GIF89a" + bytes(5)])
def test_broken_pictures_are_counted_with_a_reason(content, tmp_path):
    write(tmp_path, {"a.png": picture(), "b.png": content})
    images = data.Images(tmp_path, max_broken=1)
    assert images.read(0) and images.read(1) is None and len(images.problems) == 1
    assert all(why.isprintable() and " at 0x" not in why for why in images.problems.values())
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert data.Images(tmp_path).read(0)
    with pytest.raises(ValueError, match="1 of 2 samples are broken"):
        data.Images(tmp_path).read(1)

# ------------------------------------------------------------------------------------------------ folders
def test_all_kinds_that_pillow_opens_are_read(tmp_path):
    kinds = {"a.JPG": "JPEG", "b.jfif": "JPEG", "c.png": "PNG", "d.bmp": "BMP", "e.gif": "GIF", "f.tif": "TIFF",
             "g.TIFF": "TIFF", "h.webp": "WEBP", "i.jpe": "JPEG"} | ({"j.avif": "AVIF"} if data.features.check("avif")
                                                                      else {})
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(jpeg((200, 30, 40), kind=kind))
    write(tmp_path, {"k.HEIC": b"x", "l.heif": b"x", "m.tar.gz": b"x", "n.TGZ": b"x", "o.zip": b"x", "p.mp4": b"x",
                     "q.txt": "no picture", "r.json": "{}"})
    images = data.Images(tmp_path)
    assert base_names(images) == list(kinds)
    assert all(abs(np.asarray(images.read(i)).astype(int) - [200, 30, 40]).max() < 12 for i in range(len(images)))
    assert left_out(images) == {"pictures": 2, "compressed": 3, "files": 1}
    for part in ("HEIC, AVIF: convert to JPEG): 2, e.g. ", "k.HEIC", "gunzip or unpack them): 3", "files of other"):
        assert part in images.summary(0)

def test_linked_folders_are_read_once_and_hidden_ones_never(tmp_path):
    write(tmp_path, {"data/b/1.png": picture(1), "data/.ipynb_checkpoints/1-checkpoint.png": picture(2),
                     "data/@eaDir/1.png": picture(3), "data/__MACOSX/._1.png": b"x", "data/._1.png": b"x",
                     "elsewhere/2.png": picture(4), "elsewhere/inner/3.png": picture(5),
                     "data/a": ("link", "../elsewhere"), "data/c": ("link", "b"), "data/b/up": ("link", ".."),
                     "elsewhere/inner/self": ("link", "../../data/a"), "data/0.png": ("link", "../elsewhere/2.png")})
    images = data.Images(tmp_path / "data")
    assert base_names(images) == ["0.png", "2.png", "3.png", "1.png"] and all(map(images.read, range(4)))
    assert left_out(images) == {"hidden": 4, "folders": 3}
    assert base_names(data.Images([tmp_path / "data", tmp_path / "data"])) == base_names(images)

def test_captions_beside_pictures(tmp_path):
    write(tmp_path, {"I1.PNG": picture(), "I1.TXT": "upper case", "v1.0 cat.jpg": jpeg(), "v1.0 cat.txt": "a cat",
                     "k.image.png": picture(), "k.txt": "by key", "m.png": picture(),
                     "m.json": {"caption": "", "text": " \n", "prompt": "third key"}, "n.png": picture(),
                     "n.json": {"caption": None, "text": "second\nkey"}, "o.png": picture(), "o.txt": "\ufeff  ",
                     "o.json": {"caption": "where the text is empty"}})
    want = {"I1.PNG": "upper case", "k.image.png": "by key", "m.png": "third key", "n.png": "second key",
            "o.png": "where the text is empty", "v1.0 cat.jpg": "a cat"}
    images = data.Images(tmp_path, captions=True)
    assert {os.path.basename(s.name): s.caption for s in images.samples} == want
    for name in want:  # each picture alone, too
        assert data.Images(tmp_path / name, captions=True).samples[0].caption == want[name]

def test_captions_in_utf_16_are_read_where_they_are_marked(tmp_path):
    marked = {"a": "gr\u00fcn\r\n \U0001f600", "b": "zw\u00f6lf"}
    marked = {"a": marked["a"].encode("utf-16"), "b": b"\xfe\xff" + marked["b"].encode("utf-16-be")}
    files = {"c.json": '{"caption": "caf\u00e9"}'.encode("utf-16"), "d.txt": "\ufeffplain"}
    files |= {f"{name}.txt": text for name, text in marked.items()} | {f"{name}.png": picture() for name in "abcd"}
    want = ["gr\u00fcn \U0001f600", "zw\u00f6lf", "caf\u00e9", "plain"]
    assert [s.caption for s in data.Images(write(tmp_path / "d", files), captions=True).samples] == want
    pack(tmp_path / "s.tar", [(k, v.encode() if isinstance(v, str) else v) for k, v in sorted(files.items())])
    assert [s.caption for s in data.Images(tmp_path / "s.tar", captions=True).samples] == want

def test_names_are_printable_on_any_terminal(tmp_path, monkeypatch, capsys):
    names = (b"\xff\xfe.png", "zw\u00f6lf.png".encode(), b"two\nlines.png", b"esc\x1b[2J.png", "\u00f6.png".encode())
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as f:
            f.write(picture() if name[:1] == b"z" else b"broken")
    images = data.Images(tmp_path, max_broken=1)
    assert len(images) == 5 and all(s.name.isprintable() for s in images.samples)
    assert sum(images.read(i) is not None for i in range(5)) == 1 and images.summary(1).isprintable()
    path, terminal = os.path.join(ROOT, "data.py"), io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
        patch.setattr(sys, "argv", [path, "--check", str(tmp_path)])
        patch.setattr(sys, "stdout", terminal)
        runpy.run_path(path, run_name="__main__")
    terminal.flush()
    said = terminal.buffer.getvalue()
    assert e.value.code == 2 and b"5 samples: 1 good, 4 broken" in said and not capsys.readouterr().err
    assert rb"\udcff\udcfe.png" in said and rb"two\nlines.png" in said and b"\x1b" not in said and rb"\xf6.png" in said

# ------------------------------------------------------------------------------------------------ tars
def test_names_with_dots_and_several_pictures_of_a_key(tmp_path):
    shard = pack(tmp_path / "s.tar", [
        ("Shot 2024 at 10.30.15.png", picture(0)), ("Shot 2024 at 10.31.07.png", picture(1)), ("v1.0 cat.jpg", jpeg()),
        ("000.image.png", picture(2)), ("000.caption.txt", b"by key"), ("a.jpg", jpeg()), ("a.png", picture(3)),
        ("a.txt", b"both"), ("x.cls", b"3"), ("y.heic", b"x"), ("z.tar", TAR), (".hidden.png", picture()),
        ("__MACOSX/a.png", picture()), ("./sub/b.png", picture(4))])
    images = data.Images(shard)
    assert base_names(images) == ["s.tar:Shot 2024 at 10.30.15.png", "s.tar:Shot 2024 at 10.31.07.png",
                                  "s.tar:v1.0 cat.jpg", "s.tar:000.image.png", "s.tar:a.jpg", "s.tar:a.png", "b.png"]
    assert all(map(images.read, range(7))) and left_out(images) == {"files": 1, "pictures": 1, "compressed": 1,
                                                                    "hidden": 2}
    captioned = data.Images(shard, captions=True, max_broken=1)
    assert [s.caption for s in captioned.samples] == ["by key", "both", "both"] and len(captioned.problems) == 4

def test_links_in_tars(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, link, kind in (("d/a.png", None, None), ("d/hard.png", "d/a.png", tarfile.LNKTYPE),
                                 ("d/soft.png", "a.png", tarfile.SYMTYPE), ("soft2.png", "d/soft.png", tarfile.SYMTYPE),
                                 ("gone.png", "nowhere.png", tarfile.SYMTYPE), ("out.png", "/etc/x", tarfile.SYMTYPE),
                                 ("self.png", "self.png", tarfile.SYMTYPE), ("pipe.png", None, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            if kind is None:
                info.size = len(picture())
                tar.addfile(info, io.BytesIO(picture()))
            else:
                info.type, info.linkname = kind, link or ""
                tar.addfile(info)
    images = data.Images(tmp_path / "s.tar")
    assert [s.name.split("s.tar:")[1] for s in images.samples] == ["d/a.png", "d/hard.png", "d/soft.png", "soft2.png"]
    assert len({images.read(i).tobytes() for i in range(4)}) == 1
    assert left_out(images) == {"links": 3, "broken": 1}

def test_tars_one_behind_the_other(tmp_path):
    second = whole_tar(("a.png", picture(2)), ("c.png", picture(3)), ("c.png", picture(4)))
    for middle in (b"", bytes(512), bytes(3 << 20)):
        (tmp_path / "s.tar").write_bytes(TAR + middle + second + TAR)
        images = data.Images(tmp_path / "s.tar")
        names = [s.name.rpartition("s.tar")[2] for s in images.samples]
        assert names == [":a.png", ":b.png", "[2]:a.png", "[2]:c.png", "[3]:a.png", "[3]:b.png"]
        want = [np.asarray(Image.open(io.BytesIO(picture(i)))) for i in (0, 1, 2, 4, 0, 1)]
        assert all(np.array_equal(images.read(i), pixels) for i, pixels in enumerate(want))
        assert left_out(images) == {"members": 1}

# ------------------------------------------------------------------------------------------------ LLaVA JSON
TURNS = (("What?", "A cat"), ("Sure?", "Yes"))
SPELLINGS = {
    "as published": dict(image="i.png", conversations=talk("<image>\nWhat?", "A cat", "Sure?", "Yes")),
    "images, one": dict(images=["i.png"], conversations=talk("What?\n<image>", "A cat", "Sure?", "Yes")),
    "images, a name": dict(images="i.png", messages=talk("What?", "A cat", "Sure?", "Yes")),
    "messages": dict(image="i.png", messages=talk("What?", "A cat", "Sure?", "Yes", keys=("role", "content"),
                                                  who=("user", "assistant"))),
    "parts": dict(images=["i.png"], messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}])}

@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("form", ["list", "lines", "one line", "BOM", "UTF-16"])
def test_every_spelling_of_a_row_is_read(name, form, tmp_path):
    row = SPELLINGS[name]
    text = {"list": json.dumps([row, row]), "lines": json.dumps(row) + "\n\n" + json.dumps(row) + "\n",
            "one line": json.dumps(row), "BOM": "\ufeff" + json.dumps([row, row]),
            "UTF-16": json.dumps([row, row]).encode("utf-16")}[form]
    write(tmp_path, {"l.json": text, "l.jsonl": text, "i.png": picture()})
    for path in ("l.json", "l.jsonl"):
        images = data.Images(tmp_path / path)
        assert [s.turns for s in images.samples] == [TURNS] * (1 if form == "one line" else 2)
        assert images.read(0) and not images.left_out and not images.problems

def test_rows_that_are_no_samples_are_counted_by_reason(tmp_path):
    said = talk("What?", "A cat")
    rows = [dict(conversations=said), dict(image="", conversations=said), dict(image=None, messages=said),
            dict(images=["i.png", "i.png"], conversations=said), dict(image_path="i.png", conversations=said),
            dict(conversations=talk("<image>\nWhat?", "A cat")), dict(images=[], messages=[
                {"role": "user", "content": [{"type": "image_url", "image_url": "i.png"}]}]), dict(video="v.mp4")]
    write(tmp_path, {"l.json": rows + [SPELLINGS["as published"]], "i.png": picture()})
    images = data.Images(tmp_path / "l.json")
    reasons = [why for _, why in images.left_out]
    assert len(images) == 1 and reasons == (["rows without a picture"] * 3 + ["rows with several pictures"]
                                            + ["rows whose picture is not under image or images"] * 4)
    assert [name.rpartition(":")[2] for name, _ in images.left_out] == list("01234567")
    for part in ("rows without a picture: 3, e.g. ", "several pictures: 1, e.g. ", "under image or images: 4, e.g. "):
        assert part in images.summary(1)

def test_all_image_paths_are_looked_up(tmp_path):
    rows = [dict(ROW, image=f"{i}.png") for i in range(300)]
    write(tmp_path, {"l.json": rows, **{f"{i}.png": picture() for i in range(300)}})
    (tmp_path / "7.png").unlink(), (tmp_path / "250.png").unlink(), os.mkfifo(tmp_path / "250.png")
    images = data.Images(tmp_path / "l.json")
    assert len(images) == 298 and images.total == 300 and len(images.problems) == 2
    assert "2 broken, e.g. " in images.summary(298) and "7.png" in images.summary(298)
    for i in (8, 9):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(FileNotFoundError, match="7.png: no such image, nor those of 3 other rows of 300"):
        data.Images(tmp_path / "l.json")
    assert len(data.Images(tmp_path / "l.json", max_broken=1)) == 296

# ------------------------------------------------------------------------------------------------ batches
class Model(torch.nn.Module):
    """Its encodings are the pictures' mean color; a row takes as many whole turns as fit into 20 words."""
    config = SimpleNamespace(image_size=16)

    def preprocess(self, image, purpose):
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) / 127.5 - 1

    def precompute(self, images):
        return {"seen": (images.mean((1, 2, 3)) * 127.5 + 127.5).round()}

    def collate(self, part, rows, generators, shared, pad_to):
        labels = torch.full((len(rows), 20), -100)
        for row, sample in zip(labels, rows):
            at = 0
            for question, answer in sample.get("turns", ()):
                words, answers = len(question.split()), len(answer.split())
                if at + words + answers <= 20:
                    row[at + words:at + words + answers] = 1
                at += words + answers
        return {"rows": rows, "labels": labels, "count": (labels > 0).sum().float()}

def batches(folder, world=1, rank=0, **settings):
    args = SimpleNamespace(mix={"recon": 1.0, "i2t": 1.0}, batch=8, stage="reca", config="tiny",
                           data=[str(folder)], i2t_data=None, image_root=None, pool=8, seed=3, cache_gb=1,
                           accum=1, drop=0, questions=1, listings=0)
    vars(args).update(settings)
    return data.Batches(args, Model(), "cpu", rank, world)

def gray(i, size=(32, 24)):
    return jpeg((i, i, i), size=size, kind="PNG")

def test_all_turns_of_a_dialogue_are_one_row(tmp_path):
    rows = [dict(image=f"{i}.png", conversations=talk(f"Q{i}?", f"A{i}", "And?", "So.")) for i in range(12)]
    write(tmp_path, {"l.json": rows, **{f"{i}.png": gray(10 * i) for i in range(12)}})
    for gb in (1, 0):
        made = batches(tmp_path, i2t_data=[str(tmp_path / "l.json")], cache_gb=gb).batch(0)["i2t"]
        seen = made["seen"] if gb else Model().precompute(made["pixels_in"])["seen"]
        for row, value in zip(made["rows"], seen.int().tolist()):
            assert row == {"turns": [(f"Q{value // 10}?", f"A{value // 10}"), ("And?", "So.")]}
    folder = write(tmp_path / "f", {f"{i}.png": gray(10 * i) for i in range(12)} | {f"{i}.txt": f"a {i}" for i in
                                                                                    range(12)})
    made = batches(tmp_path, i2t_data=[folder]).batch(0)["i2t"]  # captions: one turn, the request and the caption
    assert [r["turns"] for r in made["rows"]] == [[(data.RECA_TEMPLATES[0], f"a {int(v) // 10}")] for v in made["seen"]]

def test_a_dialogue_without_an_answer_left_is_counted_and_named(tmp_path, capsys):
    long = "why " * 50
    rows = [dict(image="i.png", conversations=talk(long if i in (3, 5) else "Q?", "A.")) for i in range(40)]
    write(tmp_path, {"l.json": rows, "i.png": picture()})
    made = batches(tmp_path, i2t_data=[str(tmp_path / "l.json")])
    capsys.readouterr()
    for step in range(10):  # two epochs: each sample counts once
        made.batch(step)
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count("\n") == 1 and "i.png (row " in said
    assert made.report().startswith("not trained on: 2 samples whose answers did not fit into a row, e.g. ")
    assert "(row 3)" in made.report() and "(row 5)" in made.report()
    for row in rows:
        row["conversations"][0]["value"] = long
    write(tmp_path, {"l.json": rows})
    made = batches(tmp_path, i2t_data=[str(tmp_path / "l.json")])
    with pytest.raises(ValueError, match="none of the first 32 samples has an answer that fits"):
        for step in range(10):
            made.batch(step)
    assert batches(tmp_path).report() == ""

def test_the_order_runs_over_good_pictures(tmp_path, capsys):
    folder = write_folder(tmp_path / "f", 0)
    write(folder, {f"{i:02d}.png": gray(4 * i) for i in range(40)} | {"07.png": gray(0, (200, 12))})
    want = {4.0 * i for i in range(40)} - {28.0}
    made = batches(folder)
    said = capsys.readouterr().out
    assert "data: real: 40 samples: 39 good, 0 broken, 1 rejected, e.g. " in said and "aspect ratio" in said
    assert made.size["real"] == 39
    seen = torch.cat([made.batch(step)["recon"]["seen"] for step in range(39)]).tolist()
    assert {v: seen.count(v) for v in want} == dict.fromkeys(want, 8) and len(seen) == 39 * 8
    assert made.first_pictures(9).mean((1, 2, 3)).tolist() == [4.0 * i for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]

    def pixels(step, **how):  # not encoded in advance: what is bad gives way to one drawn for its place
        made = batches(folder, cache_gb=0, **how).batch(step)["recon"]["pixels_in"]
        return Model().precompute(made)["seen"]
    many = torch.cat([pixels(step) for step in range(20)])
    assert set(many.tolist()) <= want and len(many) == 160
    for step in range(5):
        halves = [pixels(step, world=2, rank=rank) for rank in (0, 1)]
        assert torch.equal(torch.cat(halves), pixels(step))
    made = batches(folder, cache_gb=0)
    assert "data: real: 40 samples: 40 still to be read" in capsys.readouterr().out
    for step in range(5):
        made.batch(step)
    assert made.report().startswith("not trained on: real: 1 rejected, e.g. ")

def test_the_share_of_broken_pictures_counts_over_all_processes(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "f", 200, n3=b"", n150=b"", n151=b"")
    halves = [data.Images(folder), data.Images(folder)]
    for rank, images in enumerate(halves):
        for i in range(100 * rank, 100 * rank + 100):
            images.read(i)  # 1 and 2 of 200: neither process alone is over 1 %
    found = [(images.problems, images.rejected) for images in halves]
    monkeypatch.setattr(data.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(data.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(data.dist, "all_gather_object", lambda out, mine: out.__setitem__(slice(None), found))
    lines = []
    for images in halves:
        with pytest.raises(ValueError, match="3 of 200 samples are broken, more than 1%.*0003.*0150.*0151") as e:
            images.keep_good()
        lines.append(str(e.value))
    assert lines[0] == lines[1]
    halves[0].max_broken = 0.02
    assert halves[0].keep_good() == [i for i in range(200) if i not in (3, 150, 151)] and len(halves[0]) == 197

@pytest.mark.parametrize("mix", [["recon=1", "recon=2"], ["recon=nan"], ["recon=-1"], ["recon"], ["rekon=1"],
                                 ["t2i=inf"], ["recon=1="], ["=1"]])
def test_mixes_that_make_no_sense(mix):
    with pytest.raises(ValueError, match="--mix ") as e:
        data.read_mix(mix)
    assert "\n" not in str(e.value)
