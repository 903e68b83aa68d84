"""Reading and writing of weight files, and everything that can go wrong with one."""
import argparse
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file

import checkpoint
import text_tokenizer
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

@pytest.fixture
def chosen():
    """Sets --weights for a --ckpt, as the scripts do."""
    yield lambda path, key: checkpoint.choose(argparse.Namespace(ckpt=str(path), weights=key))
    checkpoint.CHOSEN.clear()

def test_state_dicts_of_training_checkpoints(tmp_path, capsys, chosen):
    path, ema = tmp_path / "x.pth", {k: t + 1 for k, t in STATE.items()}
    for key in checkpoint.WRAPPERS:
        torch.save({key: STATE, "optimizer": {"state": {}, "param_groups": []}, "step": 3}, path)
        assert same(read_weights(path)) and capsys.readouterr().err == f"{path}: weights under {key}\n"
    torch.save({"ema": ema, "model": STATE, "shadow": ema, "step": 3}, path)
    assert same(read_weights(path))
    assert capsys.readouterr() == ("", f"{path}: weights under model, not ema (--weights chooses)\n")
    for key in ("ema", "shadow"):
        chosen(path, key)
        assert same(read_weights(path), ema) and f"weights under {key}, not " in capsys.readouterr().err
    chosen(path, "emma")
    with pytest.raises(ValueError, match=f"^{path}: --weights emma: no such state dict in it, only model, ema$"):
        read_weights(path)
    chosen(path, None)
    torch.save({"state_dict": {"module": STATE, "ema": ema}}, path)
    assert same(read_weights(path)) and "state_dict.module, not ema (--weights" in capsys.readouterr().err
    chosen(path, "ema")
    assert same(read_weights(path), ema) and "weights under state_dict.ema, not module" in capsys.readouterr().err
    for name in ("plain.pth", "plain.safetensors", "folder/plain.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (torch.save if name.endswith("pth") else save_file)(STATE, tmp_path / name)
        chosen((tmp_path / name).parent if "/" in name else tmp_path / name, "ema")
        with pytest.raises(ValueError, match="plain.*: --weights ema: no such state dict in it, only one$"):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="^--weights ema chooses among .* --ckpt, and there is none$"):
        checkpoint.choose(argparse.Namespace(ckpt=None, weights="ema"))

def test_prefixes_that_all_names_share_are_left_out(tmp_path):
    for prefix in ("module.", "model.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.model."):
        save_file({prefix + k: t for k, t in STATE.items()}, tmp_path / "x.safetensors")
        torch.save({"ema": {prefix + k: t for k, t in STATE.items()}}, tmp_path / "x.pt")
        assert same(read_weights(tmp_path / "x.safetensors")) and same(read_weights(tmp_path / "x.pt")), prefix
    some = {"model.a": STATE["b"], "lm_head": STATE["a.weight"]}
    save_file(some, tmp_path / "x.safetensors")
    assert same(read_weights(tmp_path / "x.safetensors"), some)
    for i, name in enumerate(some):  # sharded: all names of all files
        save_file({name: some[name]}, tmp_path / f"model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, name in enumerate(some)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(read_weights(tmp_path), some)
    for arch in checkpoint.architectures():  # no model of ours has such names alone: they are never its own
        with torch.device("meta"):
            own = checkpoint.model_file(arch).Model(checkpoint.model_file(arch).CONFIGS["tiny"]).state_dict()
        for prefix in ("", "module.", "model."):
            torch.save({prefix + name: torch.zeros(1) for name in own}, tmp_path / "x.pt")
            assert read_weights(tmp_path / "x.pt").keys() == own.keys()
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    save_file({"model.a": STATE["b"]}, tmp_path / "model.safetensors")  # a folder of ours: its names are what they are
    (tmp_path / "config.json").write_text('{"arch": "x", "config": {}}')
    assert list(read_weights(tmp_path)) == ["model.a"]

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_half_precision_files(name, dtype, tmp_path):
    state = {k: t.to(dtype) for k, t in nn.Linear(30, 20).state_dict().items()}
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    m = nn.Linear(30, 20)
    load_strict(m, read_weights(tmp_path / name))
    assert same(dict(m.state_dict()), {k: t.float() for k, t in state.items()})

def test_two_formats_in_a_folder(tmp_path, capsys):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert same(read_weights(tmp_path))
    assert capsys.readouterr().err == f"{tmp_path}: model.safetensors is read, pytorch_model.bin not\n"
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-1-of-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"old": "pytorch_model-1-of-1.bin"}}')
    assert same(read_weights(tmp_path))
    assert capsys.readouterr().err.endswith("model.safetensors is read, pytorch_model.bin.index.json not\n")

@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux")
def test_weights_are_mapped_and_not_read(tmp_path):
    """Neither kind of file takes memory before its tensors are looked at."""
    def resident():
        with open("/proc/self/status") as lines:
            return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile"))) / 1024
    state, kept = {f"{i}": torch.full((2 ** 22,), float(i)) for i in range(6)}, []  # 96 MB
    save_file(state, tmp_path / "x.safetensors")
    torch.save({"model": state}, tmp_path / "x.pth")
    del state
    for name in ("x.safetensors", "x.pth"):
        before = resident()
        kept.append(read_weights(tmp_path / name))
        assert resident() - before < 20, name
        assert kept[-1]["5"].mean() == 5

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

def test_the_table_is_for_those_who_ask(monkeypatch, capsys):
    def main():
        load_strict(nn.Linear(3, 2), {f"more.{i}": torch.zeros(1) for i in range(9)}, "the toy")
    for argv, lines in (([], 1), (["--verbose"], 1 + 11)):
        monkeypatch.setattr(sys, "argv", ["x.py", *argv])
        with pytest.raises(SystemExit):
            checkpoint.one_line_errors(main)
        assert len(capsys.readouterr().err.splitlines()) == lines

def test_of_joined_files_the_wrong_one_is_named():
    own = {"vae.a": torch.zeros(1), "vae.b": torch.zeros(1), "llm.a": torch.zeros(1)}
    what = {"vae.": "kl16.ckpt", "": "harmon.pth"}
    m = nn.ModuleDict({part: nn.Module() for part in ("vae", "llm")})
    for name in own:
        m[name[:3]].register_buffer(name[4:], torch.ones(1))
    for wrong, message in (
            ({"vae.b": None}, r"^kl16.ckpt: .*\(2 keys expected, 1 found; 1 missing\), first missing vae.b expected"),
            ({"llm.a": None}, r"^harmon.pth: .*\(1 keys expected, 0 found; 1 missing\), first missing llm.a expected"),
            ({"more": torch.zeros(1)}, r"^harmon.pth: .*; 1 unexpected\)"),
            ({"vae.a": torch.full((1,), float("nan"))}, "^kl16.ckpt: vae.a holds 1 nan")):
        with pytest.raises(ValueError, match=message):
            load_strict(m, {k: t for k, t in (own | wrong).items() if t is not None}, what)
    load_strict(m, own, what)
    assert not m["llm"].a.any()

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
    with pytest.raises(ValueError, match="table.*compute them when"):
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

# ---------------------------------------------------------------------------------------------------------------------
# run folders and published models

@pytest.mark.parametrize("arch", checkpoint.architectures())
def test_a_run_folder_works_from_anywhere(arch, tmp_path, monkeypatch):
    """Its text tokenizer was a typed path that is gone, and it is of another size than tiny."""
    module, own = checkpoint.model_file(arch), tmp_path / "own.tiktoken"
    tiny = module.CONFIGS["tiny"]
    monkeypatch.setitem(module.CONFIGS, "mini", dataclasses.replace(tiny, num_layers=tiny.num_layers + 1))
    shutil.copy(os.path.join(checkpoint.HERE, "weights", "tokenizer.tiktoken"), own)
    model = module.Model(module.CONFIGS["mini"], checkpoint.load_tokenizer(str(own)))
    checkpoint.save_model(model, tmp_path / "run", arch, size="mini", step=3)
    assert str(tmp_path) not in (tmp_path / "run" / "config.json").read_text()
    own.unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    checkpoint.load_tokenizer.cache_clear()
    monkeypatch.chdir(tmp_path)
    for config in (None, "tiny", "mini"):
        got = checkpoint.load_model(arch, "moved", config)
        assert same(got.state_dict(), model.state_dict()) and got.config == model.config
    text = "Ünder <|im_start|>  three stars<|im_end|>"
    assert got.tokenizer is not checkpoint.load_tokenizer("tiny")
    assert got.tokenizer.encode(text) == checkpoint.load_tokenizer("tiny").encode(text)
    half = checkpoint.load_model(arch, "moved", dtype=torch.bfloat16)
    kept = {p.dtype for p in getattr(half, half.image_tokenizer).parameters()}
    assert kept == {torch.float32} and torch.bfloat16 in {p.dtype for p in half.parameters()}
    published = next(name for name in module.CONFIGS if name not in ("tiny", "mini"))
    for ckpt in ("moved", None):  # None: the shipped weights
        with pytest.raises(ValueError, match=f"^--config {published} needs --ckpt, the published file .* of size "):
            checkpoint.load_model(arch, ckpt, published)

@pytest.mark.parametrize("arch", ["ar", "mar"])
def test_published_files_as_people_have_them(arch, tmp_path, chosen):
    """Trained by others: half precision, under a name, behind DDP's prefix; joined with files of their own."""
    module, path = checkpoint.model_file(arch), str(tmp_path / "x.pth")
    model = module.Model(module.CONFIGS["tiny"], checkpoint.load_tokenizer("tiny")).bfloat16().float()
    names = [name for name in (model.image_tokenizer, "clip") if hasattr(model, name)]
    parts = {name: getattr(model, name).state_dict() for name in names}
    own = {k: t.bfloat16() for k, t in model.state_dict().items() if k.split(".")[0] not in parts}
    torch.save({"model": {k: t * 0 for k, t in own.items()}, "ema": {f"module.{k}": t for k, t in own.items()}}, path)
    for name, state in parts.items():
        torch.save({"state_dict": state}, tmp_path / f"{name}.ckpt")
    files = dict(tokenizer_path=str(tmp_path / f"{model.image_tokenizer}.ckpt"),
                 vision_path=str(tmp_path / "clip.ckpt") if "clip" in parts else None)
    for key, same_weights in (("ema", True), (None, False)):
        chosen(path, key)
        got = module.Model.load_published(path, module.CONFIGS["tiny"], tokenizer=model.tokenizer, **files)
        assert same(got.state_dict(), model.state_dict()) == same_weights

def test_every_kind_of_tokenizer_goes_into_one_file(tmp_path):
    ranks = {bytes([b]): b for b in range(256)} | {b"st": 256, b"ar": 257}
    for nfc, special, added in ((True, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
                                (False, ["<|endoftext|>"], ["    ", "  "])):
        fixed = {s: 258 + i for i, s in enumerate(special + added)}
        split = text_tokenizer.QWEN_SPLIT if nfc else text_tokenizer.GPT2_SPLIT
        tok = text_tokenizer.Tokenizer(ranks, split, {s: fixed[s] for s in special}, {s: fixed[s] for s in added}, nfc)
        folder = tmp_path / str(nfc)
        folder.mkdir()
        (folder / "text_tokenizer.json").write_text(tok.as_file())
        got = checkpoint.load_tokenizer(str(folder))
        assert (got.special, got.added, got.vocab_size, got.nfc) == (tok.special, tok.added, tok.vocab_size, nfc)
        for text in ("a star  and     <|endoftext|>", "e\u0301 <|im_end|>'LL"):
            assert got.encode(text) == tok.encode(text) and got.encode_ordinary(text) == tok.encode_ordinary(text)
    short = json.loads(tok.as_file())["tokens"][1:]
    for i, change in enumerate((dict(tokens=5), dict(tokens=["!"]), dict(tokens=[]), dict(tokens=short), dict(added=3),
                                dict(added={"": 258}), dict(gpt2=None))):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(json.loads(tok.as_file()) | change))
        with pytest.raises(ValueError, match=f"^{path}: [^\n]*$"):
            checkpoint.load_tokenizer(str(path))

@pytest.mark.parametrize("arch", checkpoint.architectures())
def test_a_model_refuses_the_tokenizer_of_another(arch):
    module = checkpoint.model_file(arch)
    phi = types.SimpleNamespace(special={"<|endoftext|>": 5}, eos=5, vocab_size=1000)
    with torch.device("meta"), pytest.raises(ValueError, match=r"^text tokenizer with[^\n]*--text-tokenizer\)$"):
        module.Model(module.CONFIGS["tiny"], phi)

def test_one_default_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    (tmp_path / "config.json").write_text('{"arch": "x", "config": {}, "size": "large"}')
    for dtype, device, config, ckpt, bf16 in (
            ("auto", "cpu", "large", None, False), ("auto", "cuda:0", "large", None, True),
            ("auto", "cuda", "tiny", None, False), ("auto", "cuda", "tiny", str(tmp_path), True),
            ("auto", "cpu", "tiny", str(tmp_path), False), ("bf16", "cpu", "tiny", None, True),
            ("fp32", "cuda", "large", None, False)):
        args = argparse.Namespace(dtype=dtype, device=device, config=config, ckpt=ckpt)
        assert checkpoint.dtype_of(args) == (torch.bfloat16 if bf16 else None), args

def test_what_repeats_a_run_is_true(tmp_path, monkeypatch):
    """The launcher that was used, and whether the files are those of the commit."""
    args = argparse.Namespace(device="cpu", arch="mar", stage="reca", seed=0)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "my runs"])
    for env, want in (({}, "python"), ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
                      ({"WORLD_SIZE": "2"}, "torchrun --nproc_per_node=2")):
        with monkeypatch.context() as patch:
            for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in env.items():
                patch.setenv(name, value)
            assert checkpoint.describe(args)["command"] == f"{want} train.py --out 'my runs'"
    monkeypatch.setattr(checkpoint, "HERE", str(tmp_path))
    assert checkpoint.git_commit() == "unknown"
    (tmp_path / "a").write_text("1")
    for words in ("init -q", "add a", "-c user.name=x -c user.email=x commit -qm x"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    clean = checkpoint.git_commit()
    (tmp_path / "a").write_text("2")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and checkpoint.git_commit() == f"{clean}-dirty"
