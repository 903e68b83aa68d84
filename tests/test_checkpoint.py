"""Reading and writing of weight files, and everything that can go wrong with one."""
import json
import os
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

import checkpoint
from checkpoint import load_strict, read_weights, write_safetensors
from image_tokenizer import LFQConfig, LFQTokenizer

SMALL_LFQ = LFQConfig(ch=16, encoder_ch_mult=(1, 2), encoder_res_blocks=(1, 2), decoder_ch_mult=(1, 1),
                      decoder_res_blocks=(2, 1), bits=5, groups=8)

# ---------------------------------------------------------------------------------------------------------------------
# reading

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}

def same_tensor(got, want):
    return torch.equal(got, want) and got.dtype == want.dtype

def same(got, want=None):
    want = STATE if want is None else want
    return got.keys() == want.keys() and all(same_tensor(got[k], t) for k, t in want.items())

def test_read_every_format(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    torch.save(STATE, tmp_path / "x.pth")
    torch.save(OrderedDict(STATE), tmp_path / "x.pt")
    torch.save({"model": STATE, "optimizer": {"step": 3}, "epoch": 7}, tmp_path / "x.ckpt")
    torch.save({"state_dict": STATE, "hyper_parameters": "x"}, tmp_path / "y.ckpt")
    torch.save(STATE, tmp_path / "x.bin", _use_new_zipfile_serialization=False)  # written before torch 1.6
    for name in ("x.safetensors", "x.pth", "x.pt", "x.ckpt", "y.ckpt", "x.bin"):
        assert same(read_weights(tmp_path / name)), name
        assert same(read_weights(str(tmp_path / name), device=torch.device("cpu"))), name

def test_read_folders(tmp_path):
    one, two, sharded, pickled = (tmp_path / n for n in ("one", "two", "sharded", "pickled"))
    for folder in (one, two, sharded, pickled):
        folder.mkdir()
    save_file(STATE, one / "diffusion_pytorch_model.safetensors")
    (one / "config.json").write_text("{}")
    assert same(read_weights(one))
    save_file(STATE, two / "ae.safetensors")
    save_file(STATE, two / "ema.safetensors")
    with pytest.raises(FileNotFoundError, match="2 weight files.*ae.safetensors.*ema.safetensors.*name the one"):
        read_weights(two)
    save_file({"c": torch.zeros(1)}, two / "model.safetensors")  # the usual name wins
    assert list(read_weights(two)) == ["c"]
    for i, k in enumerate(STATE):
        save_file({k: STATE[k]}, sharded / f"model-{i}.safetensors")
        torch.save({k: STATE[k]}, pickled / f"pytorch_model-{i}.bin")
    for folder, shard, index in ((sharded, "model-{}.safetensors", "model.safetensors.index.json"),
                                 (pickled, "pytorch_model-{}.bin", "pytorch_model.bin.index.json")):
        (folder / index).write_text(json.dumps({"weight_map": {k: shard.format(i) for i, k in enumerate(STATE)}}))
    assert same(read_weights(sharded)) and same(read_weights(pickled))
    os.remove(sharded / "model-1.safetensors")
    with pytest.raises(FileNotFoundError, match="1 of 2 shards.*model-1.safetensors"):
        read_weights(sharded)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty.*0 weight files"):
        read_weights(tmp_path / "empty")

class Surprise:
    """Unpickled by a careless reader, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)

def bad_file(path, kind):
    if kind == "missing":
        return FileNotFoundError, "no such weight file"
    if kind == "kind":
        path.write_text("hello")
        return ValueError, "unknown kind of weight file.*safetensors"
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        return ValueError, "git-lfs pointer"
    if kind == "truncated":
        write_safetensors(path, STATE) if path.suffix == ".safetensors" else torch.save(STATE, path)
        data = path.read_bytes()
        path.write_bytes(data[:len(data) * 2 // 3])
        return ValueError, "not a complete safetensors" if path.suffix == ".safetensors" else "truncated"
    if kind == "empty":
        path.write_bytes(b"")
        return ValueError, "0 bytes on disk"
    if kind == "text":
        path.write_text("<html>Access denied</html>" * 10)
        return ValueError, "260 bytes on disk"
    if kind == "number":
        torch.save({"a": torch.zeros(1), "step": 3}, path)
        return ValueError, "'step' is a int, expected a tensor"
    if kind == "list":
        torch.save([torch.zeros(1)], path)
        return ValueError, "holds a list"
    if kind == "code":
        path.write_bytes(pickle.dumps({"a": Surprise(str(path) + ".folder")}, protocol=2))
        return ValueError, "never executed"

@pytest.mark.parametrize("name, kind", [
    ("x.safetensors", "missing"), ("x.pth", "missing"), ("x.onnx", "kind"), ("x.safetensors", "pointer"),
    ("x.bin", "pointer"), ("x.safetensors", "truncated"), ("x.pth", "truncated"), ("x.safetensors", "empty"),
    ("x.pt", "empty"), ("x.ckpt", "text"), ("x.safetensors", "text"), ("x.pt", "number"), ("x.pt", "list"),
    ("x.pt", "code")])
def test_bad_files_are_named_in_one_line(tmp_path, name, kind):
    error, text = bad_file(tmp_path / name, kind)
    with pytest.raises(error, match=text) as e:
        read_weights(tmp_path / name)
    message = str(e.value)
    assert str(tmp_path / name) in message and "\n" not in message and len(message) < 600
    assert e.value.__suppress_context__ or e.value.__context__ is None
    assert not os.path.exists(str(tmp_path / name) + ".folder")

# ---------------------------------------------------------------------------------------------------------------------
# loading

def test_load_strict_table():
    m = nn.Sequential(OrderedDict(first=nn.Linear(3, 2), second=nn.Linear(2, 30)))
    before = {k: t.clone() for k, t in m.state_dict().items()}
    state = {k: t + 1 for k, t in before.items()}
    state["first.weight"] = torch.zeros(5, 3)
    state["extra.weight"] = state.pop("second.bias")
    state |= {f"more.{i}": torch.zeros(1) for i in range(24)}
    with pytest.raises(ValueError) as e:
        load_strict(m, state, "the toy")
    text = str(e.value)
    counts = "the toy: the weights do not fit (4 keys expected, 28 found; 1 missing, 25 unexpected, 1 of another shape)"
    firsts = (", first missing second.bias expected (30,); unexpected extra.weight found (30,); of another shape "
              "first.weight found (5, 3), expected (2, 3): is it the right file and size? --verbose shows more")
    assert text == counts + firsts
    assert len(e.value.table.splitlines()) == 1 + 1 + 25 + 1 and "  unexpected more.23 found (1,)" in e.value.table
    assert all(torch.equal(t, before[k]) for k, t in m.state_dict().items()), "something was loaded all the same"

@pytest.mark.parametrize("change, text", [({"bias": None}, r"; 1 missing\), first missing bias expected \(2,\):"),
                                          ({"extra": torch.zeros(1)}, r"; 1 unexpected\), first"),
                                          ({"bias": torch.zeros(1)}, r"; 1 of another shape\), first")])
def test_load_strict_each_kind_alone(change, text):
    m = nn.Linear(3, 2)
    state = {k: t for k, t in (m.state_dict() | change).items() if t is not None}
    with pytest.raises(ValueError, match=text):
        load_strict(m, state)

def test_load_strict_dtype_and_meta():
    source = LFQTokenizer(SMALL_LFQ)
    m = LFQTokenizer(SMALL_LFQ).to(torch.bfloat16)
    pointer = m.encoder.conv_in.weight.data_ptr()
    load_strict(m, source.state_dict())
    assert m.encoder.conv_in.weight.dtype == torch.bfloat16 and m.encoder.conv_in.weight.data_ptr() == pointer
    assert torch.equal(m.encoder.conv_in.weight, source.encoder.conv_in.weight.bfloat16())
    with torch.device("meta"):
        m = LFQTokenizer(SMALL_LFQ).to(torch.float16).requires_grad_(False)
    load_strict(m, source.state_dict())
    assert {t.device.type for t in m.state_dict().values()} == {"cpu"} and not m.encoder.conv_in.weight.requires_grad
    assert m.encoder.conv_in.weight.dtype == torch.float16 and m.quantize.power_vals.dtype == torch.int64
    assert isinstance(m.encoder.conv_in.weight, nn.Parameter)
    assert torch.equal(m.encoder.conv_in.weight, source.encoder.conv_in.weight.half())
    with torch.device("meta"):
        m = nn.Linear(2, 2)
        m.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match="table.*compute them"):
        load_strict(m, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})

def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    """Trained in place after loading: the file must stay as it was, and overwriting the file must not change the
    model."""
    for name in ("x.safetensors", "x.pt"):
        path = tmp_path / name
        state = {"weight": torch.ones(64, 64)}
        write_safetensors(path, state) if path.suffix == ".safetensors" else torch.save(state, path)
        with torch.device("meta"):
            m = nn.Linear(64, 64, bias=False)
        load_strict(m, read_weights(path))
        with torch.no_grad():
            m.weight.mul_(3)
        assert torch.equal(read_weights(path)["weight"], torch.ones(64, 64))

# ---------------------------------------------------------------------------------------------------------------------
# writing

def test_write_ties_and_views(tmp_path):
    w = torch.randn(4, 6)
    state = {"embed": w, "head": w, "t": w.t(), "row": w[1], "half": w.bfloat16(), "scalar": torch.tensor(3),
             "param": nn.Parameter(w * 2)}
    write_safetensors(tmp_path / "x.safetensors", state, {"step": "7"})
    assert same(read_weights(tmp_path / "x.safetensors"), {k: t.detach() for k, t in state.items()})
    with safe_open(tmp_path / "x.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt", "step": "7"}
    assert os.listdir(tmp_path) == ["x.safetensors"]
    (tmp_path / "usual").touch()
    modes = [os.stat(tmp_path / name).st_mode for name in ("x.safetensors", "usual")]
    assert modes[0] == modes[1], "others cannot read the file"

@pytest.mark.parametrize("where", ["save_file", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, STATE)

    def fail(*args, **kwargs):
        if where == "save_file":  # half a file, then the disk is full
            with open(args[1], "wb") as f:
                f.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint if where == "save_file" else os, where, fail)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(path, {"other": torch.zeros(3)})
    monkeypatch.undo()
    assert same(read_weights(path)) and os.listdir(tmp_path) == ["x.safetensors"]
