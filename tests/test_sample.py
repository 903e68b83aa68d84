"""sample.py: what its flags make a model do, found in the model and not by its name; and its pictures."""
import functools
import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import sample
from data import to_float
from shape_world import Scenes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

class Fake(torch.nn.Module):
    """Records its calls; pictures of 8 pixels: what it is given, or random."""

    def __init__(self):
        super().__init__()
        self.calls, self.config = [], SimpleNamespace(cfg=2.0)

    def sampling_steps(self, job):
        return 6

    def preprocess(self, image, purpose):
        self.calls.append((purpose, image.size))
        return to_float(np.array(image.resize((8, 8), Image.NEAREST))[None])[0]

    def generate(self, prompts, cfg=None, steps=None, temperature=1.0, generator=None):
        self.calls.append(("generate", prompts, dict(cfg=cfg, steps=steps, temperature=temperature)))
        return torch.stack([torch.rand(3, 8, 8, generator=g) for g in generator]) * 2 - 1

    def reconstruct(self, images, cfg=None, generator=None):
        return -images

    def edit(self, images, instructions, generator=None):
        self.calls.append(("edit", instructions))
        return -images

    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None):
        self.calls.append(("answer", images.shape, questions, max_new_tokens, temperature))
        return ["blue"]

class Painter(Fake):
    """With the modes that only some models have."""

    def inpaint(self, images, mask, prompts, **how):
        self.calls.append(("inpaint", mask, prompts))
        return torch.where(mask >= 0.5, torch.ones_like(images), images)

    def extrapolate(self, images, prompts, side="right", **how):
        self.calls.append(("extrapolate", side, prompts, how))
        return torch.cat([images, images[..., :4]], 3)

    def generate(self, prompts, generator=None, think=False, **how):
        self.calls.append(("generate", think))
        return super().generate(prompts, generator=generator, **how)

    def answer(self, images, questions, max_new_tokens=32, temperature=0.0, generator=None, think=False):
        return ["I think: blue"] if think else ["blue"]

@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(model, *flags) -> the sheet as an array, or None; "PICTURE" and "MASK" stand for files."""
    Image.fromarray(Scenes(1, seed=5).render()[0]).save(tmp_path / "picture.png")
    mask = Image.new("RGB", (48, 48), "black")
    mask.paste("white", (24, 0, 48, 48))
    mask.save(tmp_path / "mask.png")

    def go(model, *flags):
        monkeypatch.setattr(checkpoint, "load_model", lambda *args, **more: model)
        files = {"PICTURE": str(tmp_path / "picture.png"), "MASK": str(tmp_path / "mask.png")}
        out = tmp_path / "out.png"
        out_flag = [] if "--question" in flags else ["--out", str(out)]
        sample.main([*(files.get(f, f) for f in flags), "--device", "cpu", *out_flag])
        return np.asarray(Image.open(out)) if out.exists() else None
    return go

def weights(arch):
    folder = checkpoint.default_weights(arch, "base")
    if not os.path.isdir(folder):
        pytest.skip(f"weights/{arch}-base is not there")
    return ["--arch", arch, "--ckpt", folder, "--device", "cpu"]

def test_sampler_script_same_seed_same_picture(tmp_path, capsys):
    common = weights("mar")
    for name in ("a", "b"):
        out = str(tmp_path / f"{name}.png")
        sample.main([*common, "--prompt", "a red star", "--n", "2", "--seed", "3", "--out", out])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    picture = str(tmp_path / "x.png")
    Image.fromarray(Scenes(1, seed=5).render()[0]).save(picture)
    sample.main([*common, "--image", picture, "--question", "How many objects are there?"])
    assert capsys.readouterr().out.strip()
    sample.main([*common, "--image", picture, "--reconstruct", "--out", str(tmp_path / "c.png")])
    assert Image.open(tmp_path / "c.png").size == (2 * (144 + 6) + 6, 144 + 26 + 12)  # the source beside it
    with pytest.raises(FileNotFoundError, match="nothing.png: no such image"):
        sample.main([*common, "--image", str(tmp_path / "nothing.png"), "--reconstruct"])

@pytest.mark.parametrize("arch", checkpoint.architectures())
def test_every_model_does_what_its_flags_promise(arch, tmp_path, capsys):
    """Real weights, each mode that the model has; those that it lacks end in one line that names the flag."""
    common, picture, mask = weights(arch), str(tmp_path / "x.png"), str(tmp_path / "m.png")
    Image.fromarray(Scenes(1, seed=5).render()[0]).save(picture)
    Image.new("L", (48, 48), 255).save(mask)
    model = checkpoint.load_model(arch, common[3])
    for flags in (["--edit", "Make the background black."], ["--reconstruct"],
                  ["--inpaint", mask, "--prompt", "a star"], ["--extrapolate", "up", "--prompt", "a star"]):
        out = str(tmp_path / f"{flags[0]}.png")
        argv = [*common, "--image", picture, "--steps", "2", "--n", "2", "--out", out, *flags]
        if hasattr(model, flags[0][2:]):
            sample.main(argv)
            assert Image.open(str(tmp_path / f"{flags[0]}_0.png")).text["steps"] == "2"
        else:
            with pytest.raises(ValueError, match=f"^{flags[0]}: --arch {arch} has no such mode$"):
                sample.main(argv)
    sample.main([*common, "--image", picture, "--reconstruct", "--out", out])
    said = Image.open(str(tmp_path / f"{flags[0]}_0.png")).text  # the numbers, though nobody typed them
    wanted = [str(x) for x in (model.config.cfg, model.sampling_steps("reconstruct"), 1.0)]
    assert [said[k] for k in ("cfg", "steps", "temperature")] == wanted and said["steps"].isdecimal()

def test_flags_reach_the_model(run, capsys):
    model = Fake()
    run(model, "--prompt", "a", "--prompt", "b", "--n", "2", "--cfg", "3", "--steps", "5", "--temperature", "0.5")
    assert model.calls == [("generate", ["a", "a", "b", "b"], dict(cfg=3.0, steps=5, temperature=0.5))]
    model = Fake()
    run(model)
    assert model.calls == [("generate", sample.DEFAULT_PROMPTS, dict(cfg=None, steps=None, temperature=1.0))]
    model = Fake()
    capsys.readouterr()
    asked = ["--question", "what?", "--max-new-tokens", "7", "--temperature", "0.25", "--seed", "3"]
    run(model, "--image", "PICTURE", *asked)
    assert model.calls == [("answer", (48, 48)), ("answer", (1, 3, 8, 8), ["what?"], 7, 0.25)]
    assert capsys.readouterr().out == "blue\n"
    model = Fake()
    sheet = run(model, "--image", "PICTURE", "--edit", "more", "--n", "2")
    assert model.calls == [("edit", (48, 48)), ("edit", ["more", "more"])]
    assert sheet.shape == (144 + 26 + 12, 3 * 150 + 6, 3)  # source and two edits
    assert (sheet[32:176, 6:150].astype(int) + sheet[32:176, 156:300] == 255).all()  # this edit is the negative
    model = Fake()
    run(model, "--image", "PICTURE", "--reconstruct")
    assert model.calls == [("reconstruct", (48, 48))]

def test_a_picture_depends_on_nothing_but_its_place(run, tmp_path):
    """--n, --batch and other prompts leave the first picture of a prompt alone; memory has a bound."""
    first = run(Fake(), "--prompt", "a")[32:176, 6:150]
    for flags in (["--n", "8"], ["--n", "8", "--batch", "2"], ["--prompt", "b", "--n", "3", "--batch", "2"]):
        model = Fake()
        assert (run(model, "--prompt", "a", *flags)[32:176, 6:150] == first).all()
        assert "--batch" not in flags or max(len(call[1]) for call in model.calls) == 2
    model = Fake()
    run(model, "--prompt", "a", "--n", "300")
    assert [len(call[1]) for call in model.calls] == [64, 64, 64, 64, 44]
    sheets = [Image.open(tmp_path / f"out{i}.png").size for i in ("", "-2", "-3", "-4", "-5")]
    assert sheets == [(1206, 1414)] * 4 + [(1206, 1062)] and not (tmp_path / "out-6.png").exists()
    assert (tmp_path / "out_299.png").exists() and not (tmp_path / "out_300.png").exists()

def test_each_picture_is_written_as_it_is_and_says_how_it_was_made(run, tmp_path):
    def files():
        return {name for name in os.listdir(tmp_path) if name.startswith("out")}
    flags = ["--prompt", "a", "--prompt", "zwei Sterne \u2605", "--n", "2", "--seed", "7", "--cfg", "3", "--batch", "3"]
    sheet = run(Fake(), *flags)
    assert files() == {"out.png", "out.json"} | {f"out_{i}.png" for i in range(4)}
    wanted = torch.stack([torch.rand(3, 8, 8, generator=g) for g in sample.picture_generators(7, 2, range(4))]) * 2 - 1
    about = json.loads((tmp_path / "out.json").read_text())
    digest = hashlib.sha256(open(checkpoint.default_weights("mar") + "/model.safetensors", "rb").read()).hexdigest()
    assert (about["seed"], about["cfg"], about["steps"], about["weights"]) == (7, 3.0, 6, digest)
    assert "--seed 7" in about["command"]
    for i, picture in enumerate(sample.data.to_uint8(wanted)):
        image = Image.open(tmp_path / f"out_{i}.png")
        assert (np.asarray(image) == picture).all()
        assert (sheet[32:176:18, 6 + 150 * i:150 + 150 * i:18] == picture).all()
        row = dict(prompt=flags[1 + 2 * (i // 2)], prompt_number=i // 2, picture_number=i % 2)
        assert about["pictures"][i] == dict(file=f"out_{i}.png", **row)
        rest = dict(seed="7", cfg="3.0", steps="6", temperature="1.0", weights=digest)
        assert {k: image.text[k] for k in [*row, *rest]} == {k: str(v) for k, v in row.items()} | rest
    monkey = [*flags, "--device", "cpu", "--out", str(tmp_path / "deep" / "er") + "/"]
    sample.main(monkey)
    names = ["00000.png", "00001.png", "00002.png", "00003.png", "sheet.json", "sheet.png"]
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == names
    sample.main([*monkey[:-1], str(tmp_path / "deep" / "er")])  # the folder is there now
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == names

def test_weights_of_a_folder_have_a_hash(tmp_path):
    for name, text in (("b.bin", "b"), ("a.safetensors", "a"), ("notes.txt", "x")):
        (tmp_path / name).write_text(text)
    assert checkpoint.weights_hash(str(tmp_path)) == hashlib.sha256(b"ab").hexdigest()
    assert checkpoint.weights_hash(str(tmp_path / "b.bin")) == hashlib.sha256(b"b").hexdigest()
    (tmp_path / "model.safetensors").write_text("m")
    assert checkpoint.weights_hash(str(tmp_path)) == hashlib.sha256(b"m").hexdigest()

@pytest.mark.parametrize("n, columns", [(64, 8), (5, 5), (192, 16), (1, 1)])
def test_sheets_stay_within_their_size(n, columns):
    pictures = np.zeros((n, 500, 700, 3), np.uint8)
    pictures[:, :250] = 255
    width, height = (sheet := sample.grid(pictures, ["a star"] * n, columns, scale=3)).size
    assert max(width, height) <= sample.SIDE and width > 1500
    middle = np.asarray(sheet)[6 + 26:, 12]
    assert 0.4 < (middle[:(height - 6) // -(-n // columns) - 32] == 0).all(1).mean() < 0.6  # scaled, not cut

def test_before_and_after_go_on_in_further_rows():
    before, after = (np.full((20, 8, 8, 3), value, np.uint8) for value in (50, 100))
    captions = [str(i) for i in range(20)]
    sheet = np.asarray(sample.before_after((before, captions, None), (after, captions, None), "step 5"))
    assert sheet.shape[1] <= sample.SIDE
    h = (sheet.shape[0] - 6) // 4 - 32
    rows = [sheet[6 + 26 + h // 2 + i * (h + 32)] for i in range(4)]
    shares = [[(row == value).all(1).mean() for value in (50, 100)] for row in rows]
    assert shares[0][0] > 0.9 and shares[1][1] > 0.9 and 0.2 < shares[2][0] < 0.25 and 0.2 < shares[3][1] < 0.25

@pytest.mark.parametrize("arch", checkpoint.architectures())
def test_the_first_picture_of_a_prompt_is_always_the_same(arch, tmp_path):
    common, got = weights(arch), []
    for i, flags in enumerate((["--n", "1"], ["--n", "8"], ["--n", "8", "--batch", "2"])):
        out = str(tmp_path / f"{i}.png")
        sample.main([*common, "--prompt", "a red star", "--steps", "3", *flags, "--out", out])
        got.append(np.asarray(Image.open(out)).astype(int)[32:176, 6:150])
    assert all(np.abs(picture - got[0]).max() <= 1 for picture in got)  # floats are added in another order

def test_inpaint_paints_where_the_mask_is_white(run):
    model = Painter()
    sheet = run(model, "--image", "PICTURE", "--inpaint", "MASK", "--prompt", "a star", "--n", "2")
    (name, mask, prompts), purposes = model.calls.pop(), [c[0] for c in model.calls]
    assert name == "inpaint" and prompts == ["a star"] * 2 and purposes == ["t2i", "t2i"]  # cropped in the same way
    assert mask.shape == (2, 1, 8, 8) and mask.dtype == torch.float32
    assert (mask[..., :4] == 0).all() and (mask[..., 4:] == 1).all()
    source, new = sheet[32:176, 6:150], sheet[32:176, 156:300]
    assert (new[:, :72] == source[:, :72]).all() and (new[:, 72:] == 255).all() and not (source[:, 72:] == 255).all()

def test_inpaint_refuses_a_mask_of_another_size(run, tmp_path):
    Image.new("L", (40, 48)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png: 40x48 pixels, expected 48x48"):
        run(Painter(), "--image", "PICTURE", "--inpaint", str(tmp_path / "small.png"), "--prompt", "a star")

def test_extrapolate_shows_the_larger_picture_alone(run):
    model = Painter()
    sheet = run(model, "--image", "PICTURE", "--extrapolate", "right", "--prompt", "a star", "--steps", "4")
    name, side, prompts, how = model.calls[-1]
    assert (name, side, prompts, how["steps"]) == ("extrapolate", "right", ["a star"], 4)
    assert sheet.shape == (144 + 26 + 12, 216 + 12, 3)

def test_think_goes_to_models_that_can(run, capsys):
    model = Painter()
    run(model, "--prompt", "a", "--think")
    assert model.calls[0] == ("generate", True)
    run(model, "--prompt", "a")
    assert model.calls[2] == ("generate", False)
    capsys.readouterr()
    run(model, "--image", "PICTURE", "--question", "what?", "--think")
    assert capsys.readouterr().out == "I think: blue\n"
    for model, flags in ((Fake(), ["--prompt", "a"]), (Painter(), ["--image", "PICTURE", "--reconstruct"])):
        with pytest.raises(ValueError, match="^--think: --arch mar has no such mode$"):
            run(model, *flags, "--think")

def test_explain_is_one_picture(run, tmp_path, capsys):
    """Steps with what is open hatched, then what looks at a word, then where the drawn places look in the source."""
    class Telling(Fake):
        trace = None

        def reconstruct(self, images, **how):
            self.trace.append(["red", "<|end|>", (0, 0, 2, 1), (1, 0, 2, 1)])
            for masked in ([[True], [False]], [[False], [False]]):
                looks = torch.tensor([[0.5, 0.1, 0.0, 0.4], [0.1, 0.1, 0.6, 0.2]])
                self.trace.append(dict(picture=images, masked=torch.tensor(masked), looks=looks, title="step"))
            return images

    sheet = run(Telling(), "--image", "PICTURE", "--reconstruct", "--explain")
    assert sheet.shape == (3 * (144 + 26 + 6) + 6, 2 * (144 + 6) + 6, 3) and os.listdir(tmp_path).count("out.png") == 1
    first, last, word, _, one, other = (sheet[y + 26:y + 170, x:x + 144].astype(int)
                                        for y in (6, 182, 358) for x in (6, 156))
    assert set(np.unique(first[:72])) == {128, 225} and (first[72:] == last[72:]).all()
    for picture, bright in ((word, slice(72)), (one, slice(72, None)), (other, slice(72))):  # red, and pale
        dark = slice(72) if bright.start else slice(72, None)
        assert (picture[bright, :, 0] > picture[bright, :, 1] + 80).all() and np.ptp(picture[dark], axis=2).max() == 0
    with pytest.raises(ValueError, match="^--explain: --arch mar has no such mode: no trace [^\\n]*$"):
        run(Fake(), "--explain", "a star")

WRONG = [
    (["--question", "what?"], "--image FILE and one of"),
    (["--image", "x.png"], "--image FILE and one of"),
    (["--image", "x.png", "--inpaint", "m.png"], "one --prompt goes with --inpaint"),
    (["--image", "x.png", "--extrapolate", "up", "--prompt", "a", "--prompt", "b"], "one --prompt goes with --inpaint"),
    (["--image", "x.png", "--reconstruct", "--prompt", "a"], "none with the other uses"),
    (["--image", "x.png", "--reconstruct", "--edit", "a"], "not allowed with"),
    (["--image", "x.png", "--extrapolate", "behind", "--prompt", "a"], "left"),
    (["--arch", "none"], "invalid choice"),
    (["--explain"], "--explain takes a prompt of its own"),
    (["--explain", "a", "--prompt", "b"], "--explain takes a prompt of its own"),
    (["--explain", "a", "--image", "x.png", "--edit", "b"], "--explain takes a prompt of its own"),
    (["--explain", "--image", "x.png", "--question", "b"], "--explain takes a prompt of its own"),
]

@pytest.mark.parametrize("argv, message", WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_flags_that_do_not_fit_end_in_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        sample.parse_args(argv)
    assert e.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]

@pytest.mark.parametrize("argv", ["--n 0", "--steps 0", "--batch 0", "--cfg 0.5", "--cfg nan", "--temperature -1",
                                  "--max-new-tokens 0", "--seed -1", "--steps 10000000000"])
def test_numbers_out_of_range_end_in_one_line(argv):
    with pytest.raises(ValueError, match=f"^{argv.split()[0]} .*: must be from [^\n]*$"):
        sample.parse_args(argv.split())

def test_error_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as e:
        checkpoint.one_line_errors(functools.partial(sample.main, [*weights("mar"), "--think"]))
    assert (e.value.code, capsys.readouterr().err) == (2, "error: --think: --arch mar has no such mode\n")

def test_grid_and_plot():
    pictures = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    sheet = np.asarray(sample.grid(pictures, columns=3, scale=2))
    assert sheet.shape == (2 * (8 + 6) + 6, 3 * (12 + 6) + 6, 3)
    assert (sheet[20:28:2, 24:36:2] == pictures[4]).all() and (sheet[20:28, 42:54] == 255).all()
    with_words = np.asarray(sample.grid(pictures, ["a red star"] * 5, columns=3, scale=20))
    assert with_words.shape[0] == 2 * (80 + 26 + 6) + 6 and with_words[6:30, 6:120].min() < 100
    plotted = np.asarray(sample.plot({"loss": ([0, 1, 2], [3.0, 2.0, 2.5]), "a point": ([0], [9.0])}, "step"))
    assert plotted.shape == (400, 720, 3)
    assert (plotted == sample.LINE_COLORS[0]).all(2).sum() > 300 and not (plotted == sample.LINE_COLORS[1]).all(2).any()
    assert np.asarray(sample.plot({}, "step")).min() == 255

def test_save_png_keeps_the_old_picture_when_the_disk_is_full(tmp_path, monkeypatch):
    image, path = Image.new("RGB", (4, 4), "red"), str(tmp_path / "deep" / "a.png")
    assert sample.save_png(image, path) == path and Image.open(path).getpixel((0, 0)) == (255, 0, 0)

    def full(temporary, kind, **more):
        with open(temporary, "wb") as f:
            f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(image, "save", full)
    with pytest.raises(OSError, match="a.png: cannot be written"):
        sample.save_png(image, path)
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0) and os.listdir(tmp_path / "deep") == ["a.png"]
