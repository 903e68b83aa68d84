"""Reading of real images, preprocessing, the order of samples. The shape world has its own tests."""
import io
import json
import os
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import vision_encoder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = os.path.join(ROOT, "tests", "golden")

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

def good_ones(paths, **options):
    """(Sample, picture) of every good picture once, in order."""
    images = data.Images(paths, **options)
    for i in range(len(images)):
        if (image := images.read(i)) is not None:
            yield images.samples[i], image

def same(image, i, **kw):
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(picture(i, **kw))).convert("RGB")))

def test_tar_shard(tmp_path, monkeypatch):
    shard = pack(tmp_path / "s.tar", [
        ("a/0.v1.json", b"{}"), ("a/0.png", picture(0)), ("a/0.txt", " one\n red\tfox ".encode()),
        ("b/0.webp", picture(1, kind="WEBP")), ("b/0.json", json.dumps({"caption": "zwölf"}).encode()),
        ("c.txt", b"no picture"), ("d.seg.png", picture(9)), ("d.txt", b"d"), ("d.JPG", picture(2, kind="JPEG"))])
    images = data.Images(shard, captions=True)
    assert [s.caption for s in images.samples] == ["one red fox", "zwölf", "d", "d"]  # all pictures of a key are read
    for i in (3, 0, 2, 1):  # any order, nothing is unpacked
        image = images.read(i)
        assert image.mode == "RGB" and same(image, (0, 1, 9, 2)[i], kind=("PNG", "WEBP", "PNG", "JPEG")[i])
        assert images.samples[i].name.startswith(shard + ":")
    # captions are not read where nobody needs them
    assert [s.caption for s, _ in good_ones(shard)] == ["", "", "", ""]
    assert [s.name for s, _ in good_ones(tmp_path)] == [s.name for s in images.samples]     # a folder of shards
    sizes = []

    def opened(content, exif):
        sizes.append(len(content))
        return Image.new("RGB", (9, 9))
    monkeypatch.setattr(data, "open_image", opened)
    images.read(0)
    assert sizes == [len(picture(0))]  # the member's bytes only, not the rest of the shard

def test_folder_and_modes(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True), (tmp_path / "a").mkdir()
    for name, content in (("b/1.png", picture(1)), ("b/c/2.JPEG", picture(2, kind="JPEG")),
                          ("0.webp", picture(0, kind="WEBP")),
                          ("._0.png", b"mac"), ("notes.txt", b"x"), ("a/3.png", picture(3))):
        (tmp_path / name).write_bytes(content)
    found = [os.path.relpath(s.file, tmp_path) for s, _ in good_ones([tmp_path])]
    assert found == ["0.webp", "a/3.png", "b/1.png", "b/c/2.JPEG"]
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

def test_broken_images_are_counted(tmp_path):
    good = picture(7)
    folder = write_folder(tmp_path / "few", 200, n7=good[:len(good) // 2], n150=b"not a picture")
    assert data.Images(folder).read(7) is None and len(list(good_ones(folder))) == 198
    folder = write_folder(tmp_path / "many", 200, n3=b"", n100=good[:80], n101=b"GIF89a")
    with pytest.raises(ValueError) as e:
        list(good_ones(folder))
    for part in ("3 of 200 samples are broken, more than 1%", "0003.png", "0101.png"):
        assert part in str(e.value)
    assert "--check" in str(e.value) and "\n" not in str(e.value)

def test_odd_sizes_are_rejected_not_broken(tmp_path):
    sizes = {"a": (8, 30), "b": (9, 30), "c": (90, 9), "d": (89, 9), "e": (200, 12)}
    for name, size in sizes.items():
        (tmp_path / f"{name}.png").write_bytes(picture(0, size))
    images = data.Images(tmp_path)
    assert [os.path.basename(images.samples[i].file) for i in range(5) if images.read(i)] == ["b.png", "d.png"]
    assert len(images.rejected) == 3 and not images.problems
    assert images.summary(2).startswith("5 samples: 2 good, 0 broken, 3 rejected, e.g. ")
    assert images.keep_good() == [1, 3] and [os.path.basename(s.file) for s in images.samples] == ["b.png", "d.png"]
    (tmp_path / "b.png").unlink(), (tmp_path / "d.png").unlink()
    with pytest.raises(ValueError, match="none of 3 pictures can be used: 0 broken, 3 rejected"):
        data.Images(tmp_path).read_or_draw(0, data.text_rng(0))

def test_what_stands_in_for_a_bad_picture_is_drawn_for_its_place(tmp_path):
    folder = write_folder(tmp_path / "f", 40, n7=picture(0, (200, 10)))
    images, again = data.Images(folder), data.Images(folder)
    drawn = [images.read_or_draw(7, data.text_rng(0, step))[0] for step in range(60)]
    assert 7 not in drawn and len(set(drawn)) > 20  # not its neighbor each time
    assert drawn == [again.read_or_draw(7, data.text_rng(0, step))[0] for step in range(60)]  # whoever asks
    row, image = images.read_or_draw(8, data.text_rng(0, 1))
    assert row == 8 and same(image, 8)

@pytest.mark.filterwarnings("ignore")
def test_decompression_bomb(tmp_path):
    for name, (w, h) in (("a.png", (10000, 9000)), ("b.png", (30000, 9000))):
        # no pixels follow: it must be refused before any is read
        header = b"IHDR" + struct.pack(">2I5B", w, h, 8, 0, 0, 0, 0)    
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
    for content in (whole[:at[30] + 700], whole[:at[30]], whole[:at[30] + 100], bytes(bad), whole[:at[-1] + 600], b"",
                    b"text" * 1000):
        (tmp_path / "bad.tar").write_bytes(content)
        with pytest.raises(ValueError, match="bad.tar: truncated or damaged tar shard.* before the damage") as e:
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
    rows = [{"id": i, "image": f"img/{i:04d}.png",
             "conversations": talk("<image>\nWhat is it?", f"picture {i}", "Sure?\n<image>", "Yes.")}
            for i in range(119)]
    rows.append({"id": "t", "conversations": talk("2 + 2?", "4")})
    path = llava(tmp_path / "l.json", rows)
    images = data.Images(path)
    assert len(images) == 119 and images.left_out == [(f"{path}:119", "rows without a picture")]
    assert images.samples[5].turns == (("What is it?", "picture 5"), ("Sure?", "Yes.")) and same(images.read(5), 5)
    assert len(data.Images(path, image_root=str(tmp_path))) == 119
    with pytest.raises(FileNotFoundError, match="nor those of 118 other rows of 120 in .*l.json; set --image-root"):
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

# ------------------------------------------------------------------------------------------------ preprocessing
@pytest.mark.parametrize("name, function", [("recon", vision_encoder.preprocess_stretch),
                                            ("und", vision_encoder.preprocess_pad)])
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
    x = vision_encoder.preprocess_pad(image, 5)                                     # 3 rows of grey: 1 above, 2 below
    assert x.shape == (3, 5, 5) and x.dtype == torch.float32
    grey = 127 / 255 * 2 - 1
    assert torch.allclose(x[0, :, 0], torch.tensor([grey, 1, 1, grey, grey]))
    assert torch.allclose(x[1, :, 0], torch.tensor([grey, -1, -1, grey, grey]))
    x = vision_encoder.preprocess_stretch(image, 5)
    assert x.shape == (3, 5, 5) and x[0].min() == 1 and x[1].max() == -1

# ------------------------------------------------------------------------------------------------ order and randomness
def test_every_epoch_is_a_permutation():
    n, batch = 103, 8
    # 8 epochs, batches cross their ends
    seen = torch.cat([data.batch_indices(n, batch, 5, step) for step in range(103)])     
    epochs = seen.view(8, n)
    assert (epochs.sort(1).values == torch.arange(n)).all() and len({tuple(e.tolist()) for e in epochs}) == 8
    # the order does not depend on the batch either
    other = torch.cat([data.batch_indices(n, 2 * batch, 5, step) for step in range(51)]) 
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
    assert data.batch_indices(10, 5, 0, 0).tolist() == FIRST, "the order of samples changed: old runs cannot resume"

def test_sample_generator():
    draw = lambda *a: tuple(torch.randn(4, generator=data.sample_generator(*a)).tolist())
    assert draw(0, 1, 2, "noise") == draw(0, 1, 2, "noise")
    keys = [(seed, step, index, stream) for seed in (0, 1) for step in range(40) for index in range(40)
            for stream in ("", "x")]
    draws = [draw(*k) for k in keys]
    assert len(set(draws)) == len(keys)
    x = torch.tensor(draws)
    assert x.mean().abs() < 0.03 and (x.std() - 1).abs() < 0.03
    # neighbouring seeds are unrelated
    assert torch.corrcoef(x[:, 0].view(2, 40, 40, 2).reshape(2, -1))[0, 1].abs() < 0.06    
