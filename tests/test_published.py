"""save_published writes what the original implementations load: their names, shapes, kinds of number and files."""
import dataclasses
import gzip
import json
import os
import re

import pytest
import torch
from helpers import untrained
from safetensors.torch import load_file, save_file

import checkpoint

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "keys")
FILES = {"mar": ["harmon_trained.pth"], "ar": ["pytorch_model.bin", "config.json"], "diffusion": ["ema.safetensors"]}
DTYPES = {"mar": torch.float32, "ar": torch.float32, "diffusion": torch.bfloat16}

def published_keys(name):
    """{key: shape} of a published file: the lists have Harmon with the VAE, which has a file of its own."""
    with gzip.open(os.path.join(GOLDEN, "showo.json.gz" if "show-o" in name else f"{name}.keys.json.gz")) as f:
        keys = json.load(f)
    keys = keys["keys"][keys["same_as"][name]] if "show-o" in name else keys
    return {k: tuple(shape) for k, shape in keys.items() if not k.startswith("vae.")}

@pytest.mark.parametrize("arch, config, names", [
    ("mar", "harmon-0.5b", ["harmon-0.5b"]), ("mar", "harmon-1.5b", ["harmon-1.5b"]),
    ("ar", "show-o-256", ["show-o"]), ("ar", "show-o-512", ["show-o-512x512", "show-o-512x512-wo-llava-tuning"]),
    ("ar", "show-o-clip-256", ["show-o-w-clip-vit", "reca-show-o"]),
    ("ar", "show-o-clip-512", ["show-o-w-clip-vit-512x512", "reca-show-o-512x512"]),
    ("diffusion", "bagel-7b-mot", ["bagel-7b-mot"])])
def test_keys_shapes_and_dtypes_of_published_sizes(arch, config, names):
    file = checkpoint.model_file(arch)
    with torch.device("meta"):
        state = file.Model(file.CONFIGS[config]).published_state()
    assert {t.dtype for t in state.values()} == {DTYPES[arch]}
    for name in names:
        assert {k: tuple(t.shape) for k, t in state.items()} == published_keys(name)

@pytest.fixture(scope="module", params=FILES)
def arch(request):
    return request.param

@pytest.fixture(scope="module")
def model(arch):
    """Its numbers fit into the published file's dtype."""
    model = untrained(arch)
    for name, p in model.named_parameters():
        if not name.startswith(model.image_tokenizer + "."):
            p.data = p.data.bfloat16().float()
    return model

def frozen_file(model, prefix, path):
    state = {k.removeprefix(prefix): t.contiguous() for k, t in model.state_dict().items() if k.startswith(prefix)}
    save_file(state, str(path))
    return path

def frozen_files(model, folder):
    out = {"tokenizer_path": frozen_file(model, model.image_tokenizer + ".", folder / "ae.safetensors")}
    if hasattr(model, "clip"):
        out["vision_path"] = frozen_file(model, "clip.", folder / "clip.safetensors")
    return out

def test_a_wrong_file_of_several_is_named_in_one_line(arch, model, tmp_path, capsys):
    main, frozen = model.save_published(str(tmp_path))[0], frozen_files(model, tmp_path)
    files = [main, *map(str, frozen.values())]
    pickled = str(tmp_path / "harmon.pth")
    torch.save(checkpoint.read_weights(main), pickled)

    def load(path=main):
        return type(model).load_published(path, config=model.config, tokenizer=model.tokenizer, **frozen)
    for file in [*files, pickled]:
        whole = {k: t.clone() for k, t in checkpoint.read_weights(file).items()}
        wrong = {f"wrong.{i}" if i >= len(whole) - 5 else k: t for i, (k, t) in enumerate(whole.items())}
        write = save_file if file.endswith(".safetensors") else torch.save
        os.remove(file)
        write(wrong, file)
        with pytest.raises(ValueError) as e:
            load(pickled if file == pickled else main)
        text = str(e.value)
        assert "\n" not in text and text.startswith(file) and not [other for other in files if other + " " in text[1:]]
        # CLIP's published file has a second tower, which is left out without a word
        assert re.search(r"\(\d+ keys expected, \d+ found; 5 missing(, 5 unexpected)?\), first missing [^;]*; "
                         r"(unexpected|missing) [^;]*; missing [^;]*: is it .* --verbose shows more$", text), text
        assert len(e.value.table.splitlines()) in (6, 11)
        write(whole, file)
    assert ("(a .pth; BAGEL's are ema.safetensors and ae.safetensors)" in text) == (arch == "diffusion")
    capsys.readouterr()
    load(pickled)  # the right tensors are read, whatever they are kept in
    assert ("BAGEL's are ema" in capsys.readouterr().err) == (arch == "diffusion")

def test_what_is_written_is_read_again_bit_for_bit(arch, model, tmp_path):
    paths = model.save_published(str(tmp_path))
    assert paths == [os.path.join(str(tmp_path), name) for name in FILES[arch]]
    assert sorted(os.listdir(tmp_path)) == sorted(FILES[arch])  # nothing else, no temporary file
    with open(paths[0], "rb") as f:
        first = f.read()
    weights = load_file(paths[0]) if paths[0].endswith("safetensors") else torch.load(paths[0], weights_only=True)
    assert weights.keys() == model.published_state().keys() and {t.dtype for t in weights.values()} == {DTYPES[arch]}
    again = type(model).load_published(paths[0], config=model.config, tokenizer=model.tokenizer,
                                       **frozen_files(model, tmp_path))
    own, read = model.state_dict(), again.state_dict()
    assert own.keys() == read.keys() and [k for k in own if not torch.equal(own[k], read[k])] == []
    again.bfloat16().save_published(str(tmp_path))  # of a model that was read and is of another dtype: the same file,
    with open(paths[0], "rb") as f:
        assert f.read() == first
    tensors = {t.data_ptr(): t for t in model.published_state().values()}  # in which tied tensors take no room twice
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < len(first) < 1.3 * size

def test_a_save_that_fails_leaves_the_file_before(arch, model, tmp_path, monkeypatch):
    path = model.save_published(str(tmp_path))[0]
    with open(path, "rb") as f:
        before = f.read()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint.os, "replace", full)
    monkeypatch.setattr(model, "published_state", dict)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        model.save_published(str(tmp_path))
    with open(path, "rb") as f:
        assert f.read() == before
    assert sorted(os.listdir(tmp_path)) == sorted(FILES[arch])

def test_config_that_the_original_code_builds_from(tmp_path):
    file = checkpoint.model_file("ar")
    with torch.device("meta"):
        model = file.Model(file.CONFIGS["show-o-clip-512"])
    model.published_state = dict
    with open(model.save_published(str(tmp_path))[1]) as f:
        about = json.load(f)
    assert about == {
        "_class_name": "Showo", "w_clip_vit": True, "vocab_size": 58498, "llm_vocab_size": 50295,
        "llm_model_path": "microsoft/phi-1_5", "codebook_size": 8192, "num_vq_tokens": 1024, "mask_token_id": 58497,
        "num_new_special_tokens": 10}
    with torch.device("meta"):
        model = file.Model(dataclasses.replace(model.config, w_clip_vit=False, image_size=256))
    model.published_state = dict
    with open(model.save_published(str(tmp_path))[1]) as f:
        assert json.load(f) == about | {"w_clip_vit": False, "num_vq_tokens": 256}
