"""Files that are broken, foreign or hostile: every reader ends in one line with the path and exit code 2, quickly,
without a traceback and without writing anything. And what good files hold is still read as it is."""
import base64
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import sys

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file

import checkpoint
import data
import evaluate
import image_tokenizer
import sample
import text_tokenizer
import train
from checkpoint import check_state, load_strict, read_weights, verify_checksum, write_checksum
from text_tokenizer import QWEN_SPLIT, load_tokenizer, read_json

ARCHS = checkpoint.architectures()
STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -1.0])}

@pytest.fixture(autouse=True)
def nothing_hangs():
    def stop(*_):
        raise AssertionError("a reader hangs")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

def contents(folder):
    found = {}
    for root, folders, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            found[path] = open(path, "rb").read() if os.path.isfile(path) else None
        found |= dict.fromkeys(os.path.join(root, name) for name in folders)
    return found

@pytest.fixture
def refused(tmp_path, capfd):
    """A function: does `call` end as a script should that cannot use a file?"""
    def check(call, path, *texts, error=ValueError):
        before = contents(tmp_path)
        with pytest.raises(error) as e:
            call()
        said = str(e.value)
        assert str(path) in said and all(text in said for text in texts), said
        assert "\n" not in said and len(said.splitlines()[0]) < 700, said
        assert e.value.__cause__ is None and (e.value.__suppress_context__ or e.value.__context__ is None)
        with pytest.raises(SystemExit) as ended:
            checkpoint.one_line_errors(call)
        out, err = capfd.readouterr()  # also what Rust writes when it panics
        assert ended.value.code == 2 and out == "" and err == f"error: {said}\n", err
        assert contents(tmp_path) == before
    return check

# ---------------------------------------------------------------------------------------------------------------------
# JSON

BAD_JSON = {
    "empty": b"", "cut": b'{"a": [1, 2', "no object": b"hello", "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"), "deep list": b"[" * 100_000, "deep dict": b'{"a":' * 100_000,
    "binary": bytes(range(256)) * 4, "two": b"{} {}", "long number": b"1" * 5000}

@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json(kind, tmp_path, refused):
    (tmp_path / "x.json").write_bytes(BAD_JSON[kind])
    refused(lambda: read_json(tmp_path / "x.json"), tmp_path / "x.json", "not valid JSON", "bytes on disk")

def special_file(path, kind):
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        os.symlink("/dev/zero", path)
    elif kind == "dangling":
        os.symlink("nowhere", path)

READERS = {"read_json": (read_json, "x.json"), "pickle": (read_weights, "x.pt"),
           "safetensors": (read_weights, "x.safetensors"),
           "tokenizer": (load_tokenizer, "x.tiktoken"), "tokenizer.json": (load_tokenizer, "x.json")}

@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling", "missing"])
def test_what_is_no_file(reader, kind, tmp_path, refused):
    call, name = READERS[reader]
    special_file(tmp_path / name, kind)
    refused(lambda: call(tmp_path / name), tmp_path / name, error=(ValueError, FileNotFoundError))

def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}

def test_the_origin_is_kept_on_demand(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_bytes(b"[" * 100_000)
    (tmp_path / "x.safetensors").write_bytes(b"hello")
    for reader, name, origin in ((read_json, "x.json", RecursionError), (read_weights, "x.safetensors", Exception)):
        monkeypatch.setenv("NANORECA_TRACEBACK", "1")
        with pytest.raises(ValueError) as e:
            reader(tmp_path / name)
        assert isinstance(e.value.__cause__, origin)
        with pytest.raises(ValueError):
            checkpoint.one_line_errors(lambda: reader(tmp_path / name))

def write_nothing(temporary):
    raise OSError(28, "No space left on device")

ORIGINS = {  # what rewords an error -> the kind that it rewords
    "picture": (data.open_image, OSError), "no picture": (data.open_image, FileNotFoundError),
    "rows": (lambda path: data.read_rows(str(path)), UnicodeDecodeError),
    "mix": (lambda path: data.read_mix([str(path)]), ValueError),
    "atomic": (lambda path: checkpoint.atomic(path, write_nothing), OSError)}

@pytest.mark.parametrize("name", ORIGINS)
def test_every_reworded_error_keeps_its_origin_on_demand(name, tmp_path, refused, monkeypatch):
    call, kind = ORIGINS[name]
    path = tmp_path / "x.png"
    if name != "no picture":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\xe9" * 40)
    refused(lambda: call(path), path, error=(ValueError, OSError))
    monkeypatch.setenv("NANORECA_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)) as e:
        call(path)
    assert isinstance(e.value.__cause__, kind), repr(e.value.__cause__)

def test_no_error_hides_its_origin_for_good():
    for folder in (checkpoint.HERE, os.path.join(checkpoint.HERE, "custom_kernels")):
        for name in (name for name in os.listdir(folder) if name.endswith(".py")):
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                assert "from None" not in f.read(), name

class PanicException(BaseException):  # as pyo3's: no Exception
    pass

@pytest.mark.parametrize("raised, kind", [
    (RuntimeError("a\nb"), ValueError), (KeyError("a"), ValueError), (TypeError("a"), ValueError),
    (IndexError("a"), ValueError), (RecursionError("a"), ValueError), (PanicException("a"), ValueError),
    (ZeroDivisionError("a"), ValueError), (OSError("a"), OSError),
    (UnicodeDecodeError("utf-8", b"", 0, 1, "a"), ValueError)])
def test_any_class_of_error_becomes_one_line(raised, kind, refused):
    def call():
        with text_tokenizer.reading("x.bin", "cannot be read", ": fetch it again"):
            raise raised
    refused(call, "x.bin: cannot be read (", "): fetch it again", error=kind)

@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError("a"), SystemExit(3), torch.OutOfMemoryError("a"),
                                    FileNotFoundError("y: no such file"), PermissionError(13, "denied", "y")])
def test_what_is_no_fault_of_the_file_passes(raised):
    with pytest.raises(type(raised)) as e, text_tokenizer.reading("x.bin", "cannot be read"):
        raise raised
    assert e.value is raised

@pytest.mark.parametrize("below", ["", "run/sheet.png"])
def test_a_file_where_a_folder_is_needed(below, tmp_path, capfd):
    file = tmp_path / "taken"
    file.write_text("kept")
    with pytest.raises(SystemExit) as ended:
        checkpoint.one_line_errors(lambda: os.makedirs(file / below, exist_ok=True))
    assert ended.value.code == 2 and file.read_text() == "kept"
    assert re.fullmatch(rf"error: {file}\S*: a file stands where a folder is needed: .*\n", capfd.readouterr().err)

# ---------------------------------------------------------------------------------------------------------------------
# config.json of our folders

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of a model of each architecture, whose weights are links, and its config.json."""
    def make(arch):
        path, source = tmp_path_factory.mktemp(arch), checkpoint.default_weights(arch)
        os.symlink(os.path.join(source, "model.safetensors"), path / "model.safetensors")
        return path, read_json(os.path.join(source, "config.json"))
    return {arch: make(arch) for arch in ARCHS}

def changed(meta, field, value):
    meta = json.loads(json.dumps(meta))
    *parents, last = ("config." + field).split(".")
    part = meta
    for name in parents:
        part = part[name]
    part[last] = value
    return meta

def fields(config, kind):
    """Names of the fields, nested ones with dots, whose default is of that type."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from (f"{field.name}.{name}" for name in fields(value, kind))
        elif type(value) is kind:
            yield field.name

WRONG = {int: ["3", 3.0, True, None, [3], {}, -1, 10 ** 12, 10 ** 30, 1e12, float("nan")],
         float: ["3", True, None, [0.5], float("nan"), float("inf"), -float("inf"), -1, -1e-3, 10 ** 400, 1e30],
         bool: [0, 1, "true", None, []], str: [1, None, ["a"], True],
         tuple: [3, "16", None, {"a": 1}, [None], ["1"], [-1] * 2, [10 ** 12], [1] * 65, [[1, 2]], [float("nan")] * 3]}

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_values_of_every_field(arch, kind, folder):
    """Before the weights are looked at, so the whole table takes milliseconds."""
    _, meta = folder[arch]
    tiny = checkpoint.model_file(arch).CONFIGS["tiny"]
    for field in fields(tiny, kind):
        for value in WRONG[kind]:
            with pytest.raises(ValueError) as e:
                checkpoint.from_dict(type(tiny), changed(meta, field, value)["config"], "there/config.json")
            said = str(e.value)
            assert said.startswith("there/config.json: ") and ", expected " in said and "\n" not in said, said
            assert f".{field.split('.')[-1]} is " in said and len(said) < 300, (field, value, said)

@pytest.mark.parametrize("arch", ARCHS)
def test_lists_of_a_fixed_length(arch):
    tiny = checkpoint.model_file(arch).CONFIGS["tiny"]
    for field in fields(tiny, tuple):
        if not field.endswith(checkpoint.PER_LEVEL):
            values = json.loads(json.dumps(dataclasses.asdict(tiny)))
            for change in ([], values[field] * 2, values[field][:-1]):
                with pytest.raises(ValueError, match=f"{field} is .* expected a list of {len(values[field])} numbers"):
                    checkpoint.from_dict(type(tiny), values | {field: change})

@pytest.mark.parametrize("arch", ARCHS)
def test_every_config_survives_its_file(arch):
    for config in checkpoint.model_file(arch).CONFIGS.values():
        assert checkpoint.from_dict(type(config), json.loads(json.dumps(dataclasses.asdict(config)))) == config

WHOLE_FILES = {
    "a list": "[1, 2]", "a number": "3", "no arch": '{"config": {}}', "no config": '{"arch": "mar"}', "cut": None,
    "arch is a number": '{"arch": 3, "config": {}}', "arch is a list": '{"arch": ["mar"], "config": {}}',
    "config is a list": '{"arch": "ARCH", "config": [1]}', "config is null": '{"arch": "ARCH", "config": null}',
    "config is empty": '{"arch": "ARCH", "config": {}}',
    "tokenizer": '{"arch": "x", "config": {}, "text_tokenizer": 5}',
    "deep": '{"arch": "ARCH", "config": ' + "[" * 50_000}

@pytest.mark.parametrize("kind", WHOLE_FILES)
def test_config_files_that_are_none(kind, folder, tmp_path, refused):
    arch = ARCHS[0]
    text = (WHOLE_FILES[kind] or json.dumps(folder[arch][1])[:500]).replace("ARCH", arch)
    shutil.copytree(folder[arch][0], tmp_path / "m", symlinks=True)
    (tmp_path / "m" / "config.json").write_text(text)
    refused(lambda: checkpoint.load_model(arch, str(tmp_path / "m")), tmp_path / "m" / "config.json")

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("field, value, text", [
    ("surprise", 1, "has no field surprise"), ("image_size", 10 ** 12, "image_size is 1000000000000, expected"),
    ("hidden_size", -128, "hidden_size is -128"), ("num_layers", 100_000, "num_layers is 100000, expected"),
    ("num_heads", 7, "num_heads is 7, which does not divide the width 128"), ("num_heads", 0, "num_heads is 0"),
    ("cfg", float("nan"), "cfg is NaN"), ("hidden_size", "128", 'hidden_size is "128"'),
    ("num_layers", 4.0, "num_layers is 4.0, expected a whole number from 1 to 512")])
def test_configs_are_refused_before_anything_is_built(arch, field, value, text, folder, tmp_path, refused, monkeypatch):
    path, meta = folder[arch]
    shutil.copytree(path, tmp_path / "m", symlinks=True)
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed(meta, field, value)))
    monkeypatch.setattr(checkpoint.model_file(arch), "Model", None)  # it is not called
    refused(lambda: checkpoint.load_model(arch, str(tmp_path / "m")), tmp_path / "m" / "config.json", text)

@pytest.mark.parametrize("arch", ARCHS)
def test_a_missing_field_is_not_guessed(arch, folder, tmp_path, refused):
    path, meta = folder[arch]
    shutil.copytree(path, tmp_path / "m", symlinks=True)
    config = {k: v for k, v in meta["config"].items() if k != "cfg"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(meta | {"config": config}))
    refused(lambda: checkpoint.load_model(arch, str(tmp_path / "m")), tmp_path / "m" / "config.json",
            "lacks the field cfg")

@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("change", [{"num_layers": 50}, {"hidden_size": 30_000, "intermediate_size": 999_999},
                                    {"intermediate_size": 1_000_000, "num_layers": 5}])
def test_sizes_that_the_weights_do_not_have_are_never_allocated(arch, change, folder, tmp_path, refused, monkeypatch):
    """Up to 8 TB: the model is built without memory, and what it lacks is named."""
    path, meta = folder[arch]
    shutil.copytree(path, tmp_path / "m", symlinks=True)
    for field, value in change.items():
        meta = changed(meta, field, value)
    (tmp_path / "m" / "config.json").write_text(json.dumps(meta))
    refused(lambda: checkpoint.load_model(arch, str(tmp_path / "m")), tmp_path / "m", "weights do not fit")

@pytest.mark.parametrize("change", [{"max_latent_size": 256, "hidden_size": 32768}, {"hidden_size": 32768},
                                    {"max_latent_size": 255, "hidden_size": 1024}])
def test_fields_that_are_too_much_together_are_refused_before_anything_is_built(change, folder, tmp_path, refused,
                                                                                monkeypatch):
    """Tables of places are computed before the weights are looked at: up to 17 GB."""
    path, meta = folder["diffusion"]
    shutil.copytree(path, tmp_path / "m", symlinks=True)
    for field, value in ({"max_latent_size": 64} | change).items():
        meta = changed(meta, field, value)
    (tmp_path / "m" / "config.json").write_text(json.dumps(meta))
    monkeypatch.setattr(checkpoint.model_file("diffusion"), "Model", None)
    refused(lambda: checkpoint.load_model("diffusion", str(tmp_path / "m")), tmp_path / "m" / "config.json",
            f"and width {change['hidden_size']}, expected at most 4 * 10^7 numbers")

@pytest.mark.parametrize("arch", ARCHS)
def test_tables_of_every_config_are_allowed(arch):
    for config in checkpoint.model_file(arch).CONFIGS.values():
        checkpoint.check_tables(checkpoint.whole_numbers(dataclasses.asdict(config)), "")

@pytest.mark.parametrize("value", ["0", "0,0", "-3", "abc", "1,,2", "2.5", ",", "1001", "600,1",
                                   "9" * 5000, "1," * 999])
def test_numbers_of_sampling_steps_that_are_none(value, folder, tmp_path, refused):
    path, meta = folder["mar"]
    shutil.copytree(path, tmp_path / "m", symlinks=True)
    (tmp_path / "m" / "config.json").write_text(json.dumps(changed(meta, "num_sampling_steps", value)))
    refused(lambda: checkpoint.load_model("mar", str(tmp_path / "m")), tmp_path / "m", "built from its config.json (")

@pytest.mark.parametrize("name, change", [("vae", {"ch": 10 ** 6}), ("vae", {"z_channels": 17}), ("vae", {"groups": 3}),
                                          ("vq", {"ch": 10 ** 6}), ("vq", {"bits": 18}), ("vq", {"patch": 8})])
def test_image_tokenizers_that_their_weights_do_not_have(name, change, tmp_path, refused):
    arch = "ar" if name == "vq" else "mar"
    config = checkpoint.model_file(arch).CONFIGS["tiny"]
    source = os.path.join(checkpoint.HERE, "weights", image_tokenizer.tiny_name(getattr(config, name)))
    os.symlink(os.path.join(source, "model.safetensors"), tmp_path / "model.safetensors")
    meta = read_json(os.path.join(source, "config.json"))
    (tmp_path / "config.json").write_text(json.dumps(meta | {"config": meta["config"] | change}))
    refused(lambda: image_tokenizer.trained(config, name, str(tmp_path)), tmp_path)

@pytest.mark.parametrize("arch", ARCHS)
def test_shipped_weights_load_as_they_are(arch):
    for stage in ("base", "reca"):
        folder = checkpoint.default_weights(arch, stage)
        model, state = checkpoint.load_model(arch, folder), read_weights(folder)
        assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items()) and not model.training
        config = read_json(os.path.join(folder, "config.json"))["config"]
        assert json.loads(json.dumps(dataclasses.asdict(model.config))) == config

# ---------------------------------------------------------------------------------------------------------------------
# weights

NAN, INF = float("nan"), float("inf")
BAD_WEIGHTS = {
    "nan": ({"weight": torch.tensor([[1, NAN, 2], [3, NAN, 4]])}, "weight holds 2 nan or infinite numbers among 6"),
    "inf": ({"bias": torch.tensor([INF, 0])}, "bias holds 1 nan or infinite numbers among 2"),
    "both": ({"bias": torch.tensor([INF, -INF])}, "bias holds 2 nan or infinite"),
    "bfloat16": ({"bias": torch.tensor([NAN, 1]).bfloat16()}, "bias holds 1 nan or infinite"),
    "whole": ({"bias": torch.tensor([1, 2])}, "1 of another type", "bias found whole number, expected float"),
    "truth": ({"weight": torch.ones(2, 3) > 0}, "1 of another type", "weight found whole number, expected float"),
    "complex": ({"bias": torch.zeros(2) * 1j}, "1 of another type", "bias found complex, expected float"),
    "shape": ({"bias": torch.zeros(3)}, "1 of another shape)", "bias found (3,), expected (2,)"),
    "bytes": ({"weight": torch.zeros(2, 3, dtype=torch.uint8)}, "1 of another type")}

@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_bad_numbers_in_weights(name, device, kind, tmp_path, refused):
    change, *texts = BAD_WEIGHTS[kind]
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(STATE | change, path)
    with torch.device(device):
        model = nn.Linear(3, 2)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    refused(lambda: load_strict(model, read_weights(path), str(path)), path, *texts)
    assert device == "meta" or all(torch.equal(t, before[k]) for k, t in model.state_dict().items())

def test_good_numbers_in_weights(tmp_path):
    """Their sum may overflow, or they may be of another width: they are numbers all the same."""
    large = {"weight": torch.full((2, 3), 3e38), "bias": torch.tensor([-3e38, 1e-45])}
    others = [{k: t.to(dtype) for k, t in STATE.items()} for dtype in (torch.float64, torch.half, torch.float8_e4m3fn)]
    for i, state in enumerate([large, *others]):
        save_file(state, tmp_path / f"{i}.safetensors")
        for device in ("cpu", "meta"):
            with torch.device(device):
                model = nn.Linear(3, 2)
            load_strict(model, read_weights(tmp_path / f"{i}.safetensors"))
            assert all(torch.equal(t, state[k].float()) for k, t in model.state_dict().items())
    with torch.device("meta"):
        model = nn.Linear(3, 2).half()
    with pytest.raises(ValueError, match=r"weight holds 6 .* read as torch.float16"):  # too large for it
        load_strict(model, large)

BAD_PICKLES = {"sparse": ({"a": torch.zeros(3, 3).to_sparse()}, "sparse"),
               "empty": ({"a": torch.zeros(2, device="meta")}, "meta"),
               "numbered": ({1: torch.zeros(2)}, "entry 1"), "list": ({"a": [torch.zeros(2)]}, "entry 'a' is a list"),
               "tensor": (torch.zeros(3), "holds a Tensor"),
               "none": (None, "holds a NoneType"),
               "nested": ({"model": {"a": {"b": torch.zeros(1)}}}, "entry 'a' is a dict")}

@pytest.mark.parametrize("kind", BAD_PICKLES)
def test_pickles_that_hold_other_things(kind, tmp_path, refused):
    torch.save(BAD_PICKLES[kind][0], tmp_path / "x.pt")
    refused(lambda: read_weights(tmp_path / "x.pt"), tmp_path / "x.pt", BAD_PICKLES[kind][1])

def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data

BAD_SAFETENSORS = {
    "empty": b"", "short": b"\x01", "no JSON": header(b"{hello}"), "list": header(b"[]"),
    "long": (2 ** 63).to_bytes(8, "little") + b"{}",
    "type": header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "range": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000]}}', bytes(4)),
    "product": header(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,65536],"data_offsets":[0,4]}}', bytes(4)),
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', bytes(4)),
    "deep": header(b'{"a":' * 20_000), "bytes": bytes(range(256)) * 3}

@pytest.mark.parametrize("kind", BAD_SAFETENSORS)
def test_safetensors_with_bad_headers(kind, tmp_path, refused):
    path = tmp_path / "x.safetensors"
    path.write_bytes(BAD_SAFETENSORS[kind])
    refused(lambda: read_weights(path), path, "not a complete safetensors file")

INDEXES = {
    "no map": '{"metadata": {}}', "list": "[]", "map is a list": '{"weight_map": ["a"]}',
    "map is empty": '{"weight_map": {}}',
    "number": '{"weight_map": {"a": 3}}', "null": '{"weight_map": {"a": null}}',
    "list of files": '{"weight_map": {"a": ["s.safetensors"]}}',
    "parent": '{"weight_map": {"a": "../x/s.safetensors"}}', "absolute": '{"weight_map": {"a": "/etc/s.safetensors"}}',
    "folder below": '{"weight_map": {"a": "b/s.safetensors"}}', "text": "hello", "cut": '{"weight_map": {"a"',
    "missing": '{"weight_map": {"a": "t.safetensors"}}',
    "other kind": '{"weight_map": {"a": "model.safetensors.index.json"}}',
    "promise": '{"weight_map": {"a": "s.safetensors", "c": "s.safetensors", "d": "s.safetensors"}}'}

@pytest.mark.parametrize("kind", INDEXES)
def test_bad_shard_indexes(kind, tmp_path, refused):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1), "b": torch.ones(1)}, tmp_path / name / "s.safetensors")
    (tmp_path / "y" / "model.safetensors.index.json").write_text(INDEXES[kind])
    text = "s.safetensors: lacks 2 tensors that the folder's index says it holds, first c" if kind == "promise" else ""
    refused(lambda: read_weights(tmp_path / "y"), tmp_path / "y", text, error=(ValueError, FileNotFoundError))

def test_folders_of_folders_end(tmp_path, refused):
    os.symlink(".", tmp_path / "model.safetensors")  # a folder that is said to be in itself
    refused(lambda: read_weights(tmp_path), tmp_path, "0 weight files", error=FileNotFoundError)

# ---------------------------------------------------------------------------------------------------------------------
# text tokenizers

LETTERS = [*range(33, 127), *range(161, 173), *range(174, 256)]
CHARS = [chr(b) for b in LETTERS] + [chr(256 + i) for i in range(256 - len(LETTERS))]
SPLIT = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}}
PRE = {"type": "Sequence", "pretokenizers": [SPLIT, {"type": "ByteLevel"}]}

def good_file():
    """The content of a tokenizer.json of Qwen2's kind with two merges."""
    vocab = {c: i for i, c in enumerate([*CHARS, "ab", "abc"])}
    added = [{"content": s, "id": 258 + i} for i, s in enumerate(text_tokenizer.TINY_SPECIAL)]
    return {"model": {"vocab": vocab, "merges": ["a b", "ab c"]}, "added_tokens": added, "pre_tokenizer": PRE}

def test_a_small_tokenizer(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(good_file()))
    tok = load_tokenizer(tmp_path / "t.json")
    assert tok.encode("abcab!<|im_end|>") == [257, 256, 0, 260] and tok.vocab_size == 264
    assert tok.decode([257, 256, 0]) == "abcab!"

def edited(change):
    file = good_file()
    change(file, file["model"]["vocab"], file["model"]["merges"], file["added_tokens"])
    return file

BAD_TOKENIZERS = {
    "no byte": lambda f, v, m, a: v.pop("!"), "letter": lambda f, v, m, a: v.pop("a"),
    "double id": lambda f, v, m, a: v.update({"!": 5}), "negative id": lambda f, v, m, a: v.update({"!": -1}),
    "huge id": lambda f, v, m, a: v.update({"!": 2 ** 40}), "text id": lambda f, v, m, a: v.update({"!": "0"}),
    "fraction": lambda f, v, m, a: v.update({"!": 0.0}), "no id": lambda f, v, m, a: v.update({"!": None}),
    "true id": lambda f, v, m, a: v.update({'"': True}), "gap": lambda f, v, m, a: v.update({"abc": 300}),
    "unknown merge": lambda f, v, m, a: m.append("q z"), "unknown part": lambda f, v, m, a: m.__setitem__(1, "a bc"),
    "three parts": lambda f, v, m, a: m.append("a b c"), "one part": lambda f, v, m, a: m.append("a"),
    "merge of numbers": lambda f, v, m, a: m.append([1, 2]), "merge is null": lambda f, v, m, a: m.append(None),
    "order": lambda f, v, m, a: m.reverse(), "no merges": lambda f, v, m, a: m.clear(),
    "merges is a number": lambda f, v, m, a: f["model"].update(merges=3),
    "vocab is a list": lambda f, v, m, a: f["model"].update(vocab=[1]),
    "model is a list": lambda f, v, m, a: f.update(model=["vocab", "merges"]),
    "model is a number": lambda f, v, m, a: f.update(model=3),
    "special is lost": lambda f, v, m, a: a.pop(2), "special twice": lambda f, v, m, a: a[1].update(id=258),
    "special far": lambda f, v, m, a: a[1].update(id=10 ** 9),
    "special is a text": lambda f, v, m, a: a[1].update(id="259"),
    "special on a byte": lambda f, v, m, a: a[1].update(id=7), "special is a list": lambda f, v, m, a: a.append([1]),
    "special has no id": lambda f, v, m, a: a[1].pop("id"),
    "special is empty": lambda f, v, m, a: a.append({"content": "", "id": 264}),
    "special is numbered": lambda f, v, m, a: a.append({"content": 5, "id": 264}),
    "empty token": lambda f, v, m, a: v.update({"": 258}),
    "strange letter": lambda f, v, m, a: v.update({"\u3042": 258}),
    "specials are a number": lambda f, v, m, a: f.update(added_tokens=5),
    "split": lambda f, v, m, a: f.update(pre_tokenizer=None)}

@pytest.mark.parametrize("kind", BAD_TOKENIZERS)
def test_bad_tokenizer_json(kind, tmp_path, refused):
    (tmp_path / "t.json").write_text(json.dumps(edited(BAD_TOKENIZERS[kind])))
    refused(lambda: load_tokenizer(str(tmp_path / "t.json")), tmp_path / "t.json")

@pytest.mark.parametrize("kind", BAD_JSON)
def test_tokenizers_that_are_no_json(kind, tmp_path, refused):
    (tmp_path / "vocab.json").write_bytes(BAD_JSON[kind])
    (tmp_path / "merges.txt").write_text("a b\n")
    refused(lambda: load_tokenizer(str(tmp_path)), tmp_path / "vocab.json")

@pytest.mark.parametrize("merges", [b"", b"\xff\xfe\x00", b"a b\nq z\n", b"a\n", bytes(range(256))])
def test_bad_merges(merges, tmp_path, refused):
    (tmp_path / "vocab.json").write_text(json.dumps(good_file()["model"]["vocab"]))
    (tmp_path / "merges.txt").write_bytes(merges)
    refused(lambda: load_tokenizer(str(tmp_path)), tmp_path)

def tiktoken_lines():
    return [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)] + ["YWI= 256"]

BAD_TIKTOKEN = {
    "empty": lambda lines: b"", "binary": lambda lines: bytes(range(256)) * 5, "one line": lambda lines: b"x" * 100_000,
    "cut": lambda lines: "\n".join(lines)[:1000].encode(), "JSON": lambda lines: b'{"a": 1}',
    "base64": lambda lines: "\n".join(["I 0", *lines[1:]]).encode(),
    "negative": lambda lines: "\n".join(["AA== -1", *lines[1:]]).encode(),
    "no byte": lambda lines: "\n".join(["YWJj 0", *lines[1:]]).encode(),
    "twice": lambda lines: "\n".join([*lines, "YWJj 256"]).encode(),
    "gap": lambda lines: "\n".join([*lines, "YWJj 300"]).encode(),
    "huge": lambda lines: "\n".join([*lines, f"YWJj {10 ** 30}"]).encode(),
    "fraction": lambda lines: "\n".join([*lines, "YWJj 257.0"]).encode()}

@pytest.mark.parametrize("kind", BAD_TIKTOKEN)
def test_bad_tiktoken_files(kind, tmp_path, refused):
    (tmp_path / "t.tiktoken").write_bytes(BAD_TIKTOKEN[kind](tiktoken_lines()))
    refused(lambda: load_tokenizer(str(tmp_path / "t.tiktoken")), tmp_path / "t.tiktoken")

@pytest.mark.parametrize("arch", ARCHS)
def test_tokenizer_and_model_belong_together(arch, tmp_path, refused, monkeypatch):
    """Ids beyond the embedding table, or a table that is mostly unused: the tokenizer is another model's."""
    module, ckpt = checkpoint.model_file(arch), checkpoint.default_weights(arch)
    lines = tiktoken_lines()[:256]
    lines += [f"{base64.b64encode(b'a' + bytes([i // 256, i % 256])).decode()} {256 + i}" for i in range(1000)]
    (tmp_path / "large.tiktoken").write_text("\n".join(lines))
    (tmp_path / "small.tiktoken").write_text("\n".join(lines[:300]))
    for name, n in (("large", 1262), ("small", 306)):
        path = str(tmp_path / f"{name}.tiktoken")
        refused(lambda: checkpoint.load_model(arch, ckpt, text_tokenizer=path), ckpt,
                f"text tokenizer has {n:,} ids, the model's vocabulary 1,024")
        args, _ = train.parse_args(["--arch", arch, "--stage", "base", "--text-tokenizer", path])
        refused(lambda: train.build(args), path, f"text tokenizer has {n:,} ids, the model's vocabulary 1,024")
    published = next(name for name in module.CONFIGS if name != "tiny")
    path = str(tmp_path / "small.tiktoken")
    refused(lambda: checkpoint.load_model(arch, "nowhere", published, text_tokenizer=path), path, "306 ids")
    for size in (151_665, 50_295):  # Qwen2.5 and phi-1.5, whose tables are padded
        for config in module.CONFIGS.values():
            own = getattr(config, "text_vocab", None) or config.vocab_size
            if 0 <= own - size < 1000:
                checkpoint.check_vocabulary(config, type("Tokenizer", (), {"vocab_size": size}), "")
                break

@pytest.mark.parametrize("text", [" " * 1_000_000, "\n" * 500_000, "a" * 300_000, "\t " * 300_000, "\u0301" * 200_000])
def test_endless_texts_are_encoded(text, capfd):
    tok = load_tokenizer("tiny")
    assert tok.decode(tok.encode(text)) == tok.decode(tok.encode_ordinary(text)) == text
    assert capfd.readouterr() == ("", "")

# ---------------------------------------------------------------------------------------------------------------------
# checkpoint.pt: its checksum and what is in it

def test_checksum(tmp_path, refused):
    path, new = tmp_path / "checkpoint.pt", tmp_path / "new"
    path.write_bytes(b"first" * 1000)
    assert "no checkpoint.pt.sha256" in verify_checksum(path) and "\n" not in verify_checksum(path)
    for content in (b"first" * 1000, b"second" * 1000):
        new.write_bytes(content)
        write_checksum(new, path)
        if content.startswith(b"first"):
            os.replace(new, path)
        assert verify_checksum(path) == ""  # also between the checksum and the renaming, where a run may be killed
    os.replace(new, path)
    assert verify_checksum(path) == ""
    good = path.read_bytes()
    for at, bit in ((0, 1), (3000, 16), (5999, 128)):
        bad = bytearray(good)
        bad[at] ^= bit
        path.write_bytes(bad)
        refused(lambda: verify_checksum(path), path, "SHA-256 is not in checkpoint.pt.sha256")
    for bad in (b"", good[:-1], good + b"\0"):
        path.write_bytes(bad)
        refused(lambda: verify_checksum(path), path, "SHA-256 is not in")
    path.write_bytes(good)
    for i in range(20):
        new.write_bytes(bytes([i]))
        write_checksum(new, path)
    assert len((tmp_path / "checkpoint.pt.sha256").read_text().splitlines()) == 8

def run_state(**change):
    tensor = torch.zeros(2)
    state = dict(step=3, args={"steps": 5}, config={}, model={"a": tensor}, ema=None,
                 history=[{"step": 1, "recon": 0.5}],
                 optimizers=[{"state": {0: {"exp_avg": tensor}}, "param_groups": [{"params": [0]}]}])
    return {k: v for k, v in (state | change).items() if v != "gone"}

BAD_STATES = {
    "step": ["gone", "3", 3.0, True, -1, None], "args": ["gone", [], None], "history": ["gone", {}, [3], [{}]],
    "model": ["gone", None, [], {"a": 3}], "ema": [[], {"a": [1]}, 0.99],
    "optimizers": ["gone", {}, [3], [{}], [{"state": {}}]]}

@pytest.mark.parametrize("key", BAD_STATES)
def test_schema_of_a_run(key, refused):
    for value in BAD_STATES[key]:
        refused(lambda: check_state(run_state(**{key: value}), "r/checkpoint.pt"), f"r/checkpoint.pt: {key} missing")

def test_schema_of_a_good_run(refused):
    for change in ({}, {"ema": {"a": torch.zeros(2)}}, {"step": 0, "history": []}, {"optimizers": []}):
        check_state(run_state(**change), "r/checkpoint.pt")
    for state in ([], None, {}, torch.zeros(1)):
        refused(lambda: check_state(state, "r/checkpoint.pt"), "step, args, model, config, optimizers")

# ---------------------------------------------------------------------------------------------------------------------
# flags: every one that is a number, and those that would be ignored

def check_train(argv):
    args = train.parse_args(argv)[0]
    train.check_args(args, 1)
    train.check_typed(args, argv)
    return args

PARSERS = {"train": check_train, "sample": sample.parse_args, "evaluate": evaluate.parse_args}
HELD = [(script, name) for script in PARSERS for name in vars(PARSERS[script]([])) if name in checkpoint.RANGES]

def bad_numbers(name):
    low, high = checkpoint.RANGES[name]
    return [f"{low - 1:g}", f"{high + 1 if high > 1 else high + 0.001:.17g}", "nan", "none"]

@pytest.mark.parametrize("script, name", HELD)
def test_every_number_is_held_to_its_range(script, name, capfd):
    """Below, above, nan and no number: one line (argparse's own after its usage) and exit code 2."""
    flag = f"--{name.replace('_', '-')}"
    for text in bad_numbers(name):
        values = [text, text] if name == "betas" else [text]
        with pytest.raises((ValueError, SystemExit)) as e:
            PARSERS[script]([flag, *values])
        last = capfd.readouterr().err.strip().splitlines()[-1:]
        if isinstance(e.value, SystemExit):
            assert e.value.code == 2 and f"argument {flag}: " in last[0]
        else:
            assert str(e.value).startswith(f"{flag} ") and ": must be from " in str(e.value)
            assert "\n" not in str(e.value)

def test_every_flag_that_is_a_number_has_a_range(monkeypatch):
    parsers, refuse = [train.parser()], checkpoint.refuse_unused
    monkeypatch.setattr(checkpoint, "refuse_unused", lambda p, *more: (parsers.append(p), refuse(p, *more)))
    sample.parse_args([]), evaluate.parse_args([])
    assert len(parsers) == 3 and len(HELD) > 35
    assert {a.dest for p in parsers for a in p._actions if a.type in (int, float)} == set(checkpoint.RANGES)

UNUSED = {  # what is typed, and the flag that would change nothing
    "train": [
        ("--resume RUN --ckpt x", "ckpt"), ("--resume RUN --overwrite", "overwrite"),
        ("--vision-ckpt x", "vision-ckpt"), ("--rest-ckpt x y", "rest-ckpt"),
        ("--stage tokenizer --config CONFIG", "config"), ("--stage tokenizer --text-tokenizer x", "text-tokenizer"),
        ("--stage tokenizer --recompute blocks", "recompute"), ("--stage tokenizer --drop 0.5", "drop"),
        ("--stage tokenizer --i2t-data x.json", "i2t-data"),
        ("--stage tokenizer --eval-split dev --eval-n 0", "eval-split"),
        ("--stage tokenizer --pool 9 --data x", "pool"),
        ("--tokenizer-ckpt x", "tokenizer-ckpt"), ("--stage base --ckpt x --tokenizer-ckpt y", "tokenizer-ckpt"),
        ("--muon-decay 0.1 --arch ar", "muon-decay"), ("--muon-decay 0.1 --muon-lr 0", "muon-decay"),
        ("--data x --mix i2t=1", "data"), ("--stage sft --data x --mix i2t=1 edit=1", "data"),
        ("--i2t-data x --mix recon=1", "i2t-data"), ("--i2t-data x --i2t-weight 0", "i2t-data"),
        ("--arch ar --i2t-data x", "i2t-data"), ("--arch diffusion --data x --i2t-data y", "i2t-data"),
        ("--i2t-weight 0.5 --mix recon=1", "i2t-weight"), ("--t2i-weight 0.5 --mix recon=1", "t2i-weight"),
        ("--drop 0.5 --mix i2t=1", "drop"), ("--no-exif", "no-exif"), ("--image-root x", "image-root"),
        ("--image-root x --i2t-data folder", "image-root"), ("--image-root x --data x.json", "image-root"),
        ("--data x --i2t-data y --pool 9", "pool"), ("--arch diffusion --data x --pool 9", "pool"),
        ("--data x --questions 2 --i2t-data y", "questions"), ("--mix recon=1 --questions 2", "questions"),
        ("--mix t2i=1 --t2i-weight 1 --pool 9 --data x", "data"),
        ("--config CONFIG --eval-n 9", "eval-n"), ("--config CONFIG --eval-every 9", "eval-every"),
        ("--eval-n 0 --eval-every 9", "eval-every"), ("--eval-n 0 --eval-split dev", "eval-split")],
    "sample": [
        *((f"--image x --question q --{flag}", flag.split()[0]) for flag in (
            "n 3", "batch 8", "steps 5", "cfg 2", "out x.png", "seed 1", "tokenizer-ckpt y", "vision-ckpt y",
            "rest-ckpt y")),
        ("--explain x --n 2", "n"), ("--explain x --batch 2", "batch"),
        ("--max-new-tokens 5", "max-new-tokens"), ("--image x --edit y --max-new-tokens 5", "max-new-tokens"),
        ("--no-exif --prompt x", "no-exif"), ("--ckpt x --tokenizer-ckpt y", "tokenizer-ckpt")],
    "evaluate": [*((f"--draw geneval --prompts x --{flag}", flag.split()[0]) for flag in (
                    "split dev", "editing", "json y", "images z")), ("--draw wise --prompts x --n 2", "n"),
                 ("--out x", "out"), ("--prompts x", "prompts"), ("--images x", "images"), ("--batch 5", "batch"),
                 ("--tokenizer-ckpt x", "tokenizer-ckpt"),
                 ("--vision-ckpt x", "vision-ckpt"), ("--rest-ckpt x", "rest-ckpt")]}
USED = {
    "train": [
        "", "--i2t-weight 0 --t2i-weight 0 --mix recon=1", "--eval-n 0 --eval-every 0", "--stage tokenizer --data x",
        "--config tiny --stage tokenizer", "--stage base --tokenizer-ckpt x --text-tokenizer y", "--text-tokenizer y",
        "--config CONFIG --ckpt a --tokenizer-ckpt b --vision-ckpt c --text-tokenizer d --data e --eval-n 0 "
        "--rest-ckpt f g",
        "--data x --pool 9 --questions 2 --drop 0.2 --no-exif", "--data x --i2t-data y.JSONL --image-root z --no-exif",
        "--stage sft --data x --i2t-data y --i2t-weight 1 --mix t2i=1 i2t=1", "--stage tokenizer --pool 9 --eval-n 9",
        "--stage base --muon-decay 0.1 --arch ar",
        "--stage sft --pool 9 --eval-n 6",
        "--eval-n 6 --eval-every 3 --eval-split dev"],
    "sample": ["", "--prompt a --n 2 --batch 3 --cfg 2 --steps 3 --seed 1 --temperature 0.5 --out x",
               "--image x --question q --max-new-tokens 3 --temperature 0.5 --seed 1 --no-exif",
               "--explain x --cfg 2 --steps 3 --seed 1 --out y", "--image x --explain --edit y --no-exif",
               "--image x --reconstruct --no-exif --n 2 --cfg 1", "--image x --question q --think",
               "--config CONFIG --tokenizer-ckpt a --vision-ckpt b --text-tokenizer c"],
    "evaluate": ["", "--split dev --editing --json x --cfg 2", "--draw geneval --prompts x --out y --n 2 --steps 3",
                 "--draw gedit --prompts x --images y --batch 2", "--draw dpg-reca --prompts x --n 2"]}

def typed(script, text, tmp_path):
    published = next(name for name in checkpoint.model_file("mar").CONFIGS if name != "tiny")
    if "--resume" in text:
        torch.save(run_state(args=vars(train.parse_args([])[0]), history=[]), tmp_path / "checkpoint.pt")
    PARSERS[script](shlex.split(text.replace("CONFIG", published).replace("RUN", str(tmp_path))))

@pytest.mark.parametrize("script, text, flag", [(script, *case) for script, cases in UNUSED.items() for case in cases])
def test_flags_that_would_be_ignored_are_refused(script, text, flag, tmp_path):
    with pytest.raises(ValueError, match=rf"^--{flag} is for [^\n]*: here it would change nothing, leave it out$"):
        typed(script, text, tmp_path)

@pytest.mark.parametrize("text, part", [
    ("--arch ar --mix recon=1 i2t=1", "i2t"), ("--mix recon=1 t2i=1 edit=1 --t2i-weight 0", "edit t2i"),
    ("--config CONFIG --data x --mix recon=1 t2i=1", "t2i"), ("--data x --mix recon=1 uncond=1", "uncond")])
def test_parts_whose_weight_is_0_are_not_dropped_without_a_word(text, part, tmp_path):
    with pytest.raises(ValueError, match=f"^--mix {part}: the weight is 0 here: give [^\n]*$"):
        typed("train", text, tmp_path)

@pytest.mark.parametrize("script, text", [(script, text) for script, cases in USED.items() for text in cases])
def test_flags_that_do_something_are_not(script, text, tmp_path):
    typed(script, text, tmp_path)

def test_no_command_of_the_documents_has_a_flag_too_many(tmp_path):
    seen = 0
    for path in ("README.md", "weights/README.md", "results/README.md"):
        with open(os.path.join(checkpoint.HERE, path), encoding="utf-8") as f:
            text = re.sub(r"\\\n\s*", " ", f.read())
        for script, argv in re.findall(r"(train|sample|evaluate)\.py((?: [^\n`]*)?)", text):
            if argv.startswith(" --") and not re.search("--resume|--export", argv):
                typed(script, argv.partition("#")[0], tmp_path)
                seen += 1
    assert seen >= 15

SCRIPTS = {"train": train.main, "sample": sample.main, "evaluate": evaluate.main}

@pytest.mark.parametrize("script", SCRIPTS)
def test_devices_that_are_not_here(script, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device, text in (("mps", "sees 0 of that kind; give --device cpu"), ("mps:3", "sees 0"), ("xpu", "no such"),
                         ("cuda:99", "of that kind"), ("", "no such device; cpu, cuda, cuda:1, mps")):
        refused(lambda: SCRIPTS[script](["--device", device]), f"--device {device}", text)

EVALUATE = [  # what is typed, and the line
    ("--n 5", "--n 5: at least 6, one for each task"), ("--cfg nan", "--cfg nan: must be from"),
    ("--ckpt no/such", "no/such: no config.json there"), ("--ckpt file", "file: no config.json there"),
    ("--ckpt folder", "folder/config.json: not valid JSON"), ("--lora no/such", "--lora no/such: no adapter_config"),
    ("--draw geneval --prompts no/x", "--prompts no/x: no such file"), ("--weights x", "--weights x chooses among"),
    ("--draw wise --prompts folder", "--prompts folder: no such file"), ("--verify folder", "folder/recipe.json: no"),
    ("--draw geneval --prompts file", "file: not a list of rows that --prompts takes"),
    ("--config no-such", "--config no-such: the judge knows"), ("--text-tokenizer no/such", "no/such")]

@pytest.mark.parametrize("text, message", EVALUATE)
def test_bad_inputs_of_evaluate(text, message, tmp_path, refused, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{")
    (tmp_path / "file").write_text("two cats")
    monkeypatch.chdir(tmp_path)
    refused(lambda: evaluate.main([*text.split(), "--arch", "ar", "--device", "cpu"]), message,
            error=(ValueError, OSError))

CHECK = [("--image-root . --check folder", "--image-root is for LLaVA JSON: here it would change nothing"),
         ("--image-root . --check folder x.tar x.json.png", "--image-root is for LLaVA JSON: here it would"),
         ("--captions --check x.json", "--captions is for folders, tars and parquet files: here it would"),
         ("--captions --check x.jsonl X.JSON", "--captions is for folders, tars and parquet files: here it would"),
         ("--image-root . --check x.json gone", "gone: no such folder"), ("--check folder", "no pictures found")]

@pytest.mark.parametrize("text, message", CHECK)
def test_bad_flags_of_check(text, message, tmp_path, refused, monkeypatch):
    (tmp_path / "folder").mkdir()
    row = {"image": "a.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    (tmp_path / "x.json").write_text(json.dumps([row]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *text.split()])
    refused(data.main, message, error=(ValueError, OSError))

BAD_PROMPTS = {"no prompt": '{"tag": "counting"}', "a number": '{"prompt": 5}', "empty": "", "blank": '{"prompt": " "}',
               "no JSON": "two cats", "a list": '["two cats"]', "cut": '{"prompt": "two cats"}\n{"prompt',
               "half a character": '{"prompt": "\\ud800"}', "deep": "[" * 100_000}

@pytest.mark.parametrize("kind", BAD_PROMPTS)
def test_prompts_of_geneval_that_are_none(kind, tmp_path, refused):
    (tmp_path / "p.jsonl").write_text(BAD_PROMPTS[kind])
    argv = ["--draw", "geneval", "--prompts", str(tmp_path / "p.jsonl"), "--device", "cpu"]
    refused(lambda: evaluate.main(argv), tmp_path / "p.jsonl", "prompt")
