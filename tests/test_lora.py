"""Adapters: merged = attached, gradients of the chain rule, PEFT's files, sharding, exact resume. And --recompute."""
import collections
import copy
import dataclasses
import json
import os
import re
import signal
import sys
import types

import pytest
import torch
from processes import torchrun
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard

import checkpoint
import data
import sample
import train
from custom_kernels import add_lora, init_lora, load_lora, lora_layers, lora_state

ARCHS = checkpoint.architectures()
SMALL = ["--batch", "4", "--pool", "16", "--eval-n", "0", "--log-every", "1", "--steps", "4", "--warmup", "2",
         "--device", "cpu", "--threads", "1"]

def tiny(arch, **settings):
    """(a model with untrained weights, none of them exactly 0; args; a batch of every part that its RecA trains)"""
    args, _ = train.parse_args(["--arch", arch, *SMALL, "--i2t-weight", "1", "--t2i-weight", "1", "--mix",
                                "recon=1", "t2i=1", "i2t=1"])
    file = checkpoint.model_file(arch)
    torch.manual_seed(0)
    model = file.Model(dataclasses.replace(file.CONFIGS["tiny"], **settings), checkpoint.load_tokenizer("tiny"))
    for name, p in model.named_parameters():
        if not name.startswith(file.Model.image_tokenizer + "."):
            p.data += 0.02 * torch.randn(p.shape)
    model.trainable_parameters("reca")
    batches = data.Batches(args, model)
    return model, args, batches.to_device(batches.batch(0), {})

def adapted(model, rank=3, alpha=6):
    """[(name, parameter)] of new adapters whose product is not 0."""
    named = add_lora(model, model.trainable_parameters("reca"), rank, torch.Generator().manual_seed(1), alpha)
    torch.manual_seed(2)
    for _, p in named:
        p.data += 0.15 * torch.randn(p.shape)
    return named

def losses(model, batch):
    return torch.stack(list(model(batch).values()))

def gradients(model, batch):
    model.zero_grad()
    total = losses(model, batch).sum()
    total.backward()
    return total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize("arch", ARCHS)
def test_merged_is_attached_and_gradients_follow_the_chain_rule(arch, tmp_path):
    """dB = scale dW A' and dA = scale B' dW, with the dW of the merged model: whoever reads a weight, as Harmon's fused
    product of q, k and v does, cannot pass the adapters by."""
    model, _, batch = tiny(arch)
    base, trained = copy.deepcopy(model), {n for n, p in model.named_parameters() if p.requires_grad}
    before = losses(model, batch)
    fresh = add_lora(model, model.trainable_parameters("reca"), 3, torch.Generator().manual_seed(1), 6)
    assert torch.equal(losses(model, batch), before)  # B is 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [n for n, _ in fresh]
    again = copy.deepcopy(base)
    named = adapted(again)
    layers = lora_layers(again)
    uses = collections.Counter(p.data_ptr() for _, p in base.named_parameters(remove_duplicate=False))
    linear = {name: m for name, m in base.named_modules() if type(m) is nn.Linear and f"{name}.weight" in trained}
    assert layers.keys() == {name for name, m in linear.items() if uses[m.weight.data_ptr()] == 1}
    total, found = gradients(again, batch)
    assert found.keys() <= {n for n, _ in named}
    checkpoint.save_adapters(again, tmp_path)
    whole = again.state_dict()
    merged = copy.deepcopy(base)
    checkpoint.load_adapters(merged, str(tmp_path))
    assert merged.state_dict().keys() == base.state_dict().keys() and not lora_layers(merged)
    assert all(torch.equal(whole[k], v) for k, v in base.state_dict().items())  # the base is as it was, by its names
    merged_total, wanted = gradients(merged, batch)
    assert abs(total - before.sum()) > 1e-3 * total and abs(merged_total - total) <= 1e-6 * total
    reached = 0
    for name, layer in layers.items():
        if f"{name}.weight" in wanted:
            dw, a, b = wanted[f"{name}.weight"], layer.lora_A.detach(), layer.lora_B.detach()
            for grad, want in ((layer.lora_A.grad, 2 * b.T @ dw), (layer.lora_B.grad, 2 * dw @ a.T)):
                assert (grad - want).norm() <= 1e-4 * want.norm() + 1e-9, name
                reached += bool(want.norm() > 0)
    assert reached > len(layers)
    if any(name.endswith("self_attn.q_proj") for name in layers):
        assert all(m.lora_B.grad.norm() > 0 for n, m in layers.items() if n.endswith(("q_proj", "k_proj", "v_proj")))

def test_a_tied_head_and_a_frozen_tokenizer_get_no_adapters():
    model, _, _ = tiny("mar")
    adapted(model)
    assert not [n for n in lora_layers(model) if "lm_head" in n or n.startswith("vae.")]
    with pytest.raises(ValueError, match="--lora 3: none of the 1 tensors that train is a linear layer's own weight"):
        add_lora(model, [("llm.lm_head.weight", model.llm.lm_head.weight)], 3, torch.Generator())

def test_a_bf16_base_keeps_what_is_smaller_than_its_rounding():
    model = nn.Sequential(nn.Linear(64, 64, bias=False).bfloat16())
    named = add_lora(model, list(model.named_parameters()), 2, torch.Generator().manual_seed(0))
    layer, signs = model[0], torch.tensor([1.0, -1.0]).repeat(32)
    layer._parameters["weight"].data.fill_(1.0)
    layer.lora_A.data.copy_(0.02 * signs.expand(2, -1))
    layer.lora_B.data.fill_(0.02)  # B A is +-0.0008, less than half of bf16's step below 1
    assert torch.equal(layer.weight, torch.ones(64, 64)) and layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        out = model(8 * signs.bfloat16()[None])  # W x = 0
    assert torch.allclose(out.float(), torch.tensor(8 * 64 * 0.0008), rtol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        model(signs[None]).square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.norm() > 0 for _, p in named)
    assert layer._parameters["weight"].grad is None

def sharded(folder):
    """In each of two processes."""
    torch.distributed.init_process_group("gloo")
    for arch in ARCHS:
        model, _, batch = tiny(arch)
        named = adapted(model)
        for block in model.blocks():
            fully_shard(block)
        fully_shard(model)
        _, found = gradients(model, batch)
        found = {n: g.full_tensor() for n, g in found.items()}
        state = lora_state(model)
        init_lora(model, torch.Generator().manual_seed(1))
        fresh = lora_state(model)
        load_lora(model, state, "state")
        same = all(torch.equal(state[k], v) for k, v in lora_state(model).items())
        if torch.distributed.get_rank() == 0:
            torch.save((found, state, fresh, same, len(named)), f"{folder}/{arch}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

def test_two_sharded_processes_have_the_gradients_of_one(tmp_path):
    torchrun(2, tmp_path, script=os.path.abspath(__file__))
    for arch in ARCHS:
        found, state, fresh, same, count = torch.load(tmp_path / f"{arch}.pt")
        model, _, batch = tiny(arch)
        named = adapted(model)
        assert same and count == len(named) == len(state)
        assert all(torch.equal(state[k], v) for k, v in lora_state(model).items())
        _, wanted = gradients(model, batch)
        norm = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert wanted.keys() == found.keys()
        assert all((found[n] - g).norm() <= 1e-6 * norm for n, g in wanted.items()), arch
        init_lora(model, torch.Generator().manual_seed(1))
        assert all(torch.equal(fresh[k], v) for k, v in lora_state(model).items())

def run(*argv, out):
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    try:
        return train.main([*argv, "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
        for s, h in handlers.items():
            signal.signal(s, h)

def steps(folder):
    rows = [json.loads(line) for line in open(folder / "log.jsonl")]
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in rows}

def test_a_run_saves_adapters_alone_and_resumes_exactly(tmp_path, capsys):
    base, whole, cut = tmp_path / "base", tmp_path / "whole", tmp_path / "cut"
    assert run("--arch", "mar", "--stage", "base", *SMALL, "--steps", "1", out=base) == 0
    lora = ["--arch", "mar", "--ckpt", str(base), *SMALL, "--lora", "2", "--lr", "1e-2", "--ema", "0.5"]
    assert run(*lora, out=whole) == 0
    assert run(*lora, "--stop-after", "2", out=cut) == 0
    os.rename(base, tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"adapters were trained on --ckpt .*base, which is no longer there"):
        run("--resume", str(cut), out=cut)
    other = checkpoint.default_weights("mar", "base")  # of the same names and shapes
    with pytest.raises(ValueError, match=rf"trained on weights with the SHA-256 \w{{16}}, {other} has \w{{16}}: give"):
        run("--resume", str(cut), "--stop-after", "0", "--ckpt", other, out=cut)
    assert run("--resume", str(cut), "--stop-after", "0", "--ckpt", str(tmp_path / "moved"), out=cut) == 0
    assert steps(cut) == steps(whole) and len(steps(cut)) == 4
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (cut, whole))
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], v) for k, v in b[part].items())
    files = os.listdir(whole)
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json"} <= set(files)
    assert "model.safetensors" not in files
    size = os.path.getsize(tmp_path / "moved" / "model.safetensors")
    assert os.path.getsize(whole / "adapter_model.safetensors") < size / 20
    assert os.path.getsize(whole / "checkpoint.pt") < size / 5
    assert str(tmp_path) not in (whole / "config.json").read_text() + (whole / "adapter_config.json").read_text()
    settings = json.load(open(whole / "adapter_config.json"))
    assert settings["peft_type"] == "LORA" and settings["r"] == settings["lora_alpha"] == 2
    with safe_open(whole / "adapter_model.safetensors", "pt") as f:
        names = {re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", k).groups(): f.get_tensor(k)
                 for k in f.keys()}
    assert names.keys() == {(name, part) for name in settings["target_modules"] for part in "AB"}
    merged = checkpoint.load_model("mar", str(tmp_path / "moved"), adapters=str(whole))
    plain = checkpoint.load_model("mar", str(tmp_path / "moved")).state_dict()
    for name in settings["target_modules"]:
        assert torch.equal(names[name, "A"], b["ema"][f"{name}.lora_A"])
        wanted = plain[f"{name}.weight"] + names[name, "B"] @ names[name, "A"]
        assert torch.allclose(merged.state_dict()[f"{name}.weight"], wanted, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"whole: a run with --lora, .*its base as --ckpt, and --lora .*whole"):
        sample.main(["--arch", "mar", "--ckpt", str(whole)])
    sample.main(["--arch", "mar", "--ckpt", str(tmp_path / "moved"), "--lora", str(whole), "--prompt", "a star",
                 "--device", "cpu", "--out", str(tmp_path / "star.png")])
    assert (tmp_path / "star.png").exists()

ERRORS = [
    (["--lora", "4", "--muon-lr", "0.1"], r"--muon-lr 0.1: adapters \(--lora 4\) are trained by AdamW"),
    (["--lora", "4", "--stage", "base"], r"--lora 4: --stage base starts from nothing"),
    (["--lora", "4", "--stage", "tokenizer"], r"--lora 4: --stage tokenizer starts from nothing"),
    (["--lora", "5000"], r"--lora 5000: must be from 0 to 4096"),
    (["--recompute", "0"], r"--recompute 0: expected none, blocks, or N"),
    (["--recompute", "some"], r"--recompute some: expected none, blocks, or N"),
]

@pytest.mark.parametrize("argv, message", ERRORS, ids=[" ".join(argv) for argv, _ in ERRORS])
def test_one_line_errors(argv, message, capsys):
    with pytest.raises(ValueError, match=message) as e:
        train.check_args(train.parse_args(argv)[0], 1)
    assert "\n" not in str(e.value)

def test_a_recipes_muon_makes_room(capsys):
    args, _ = train.parse_args(["--arch", "diffusion", "--lora", "4"])
    assert args.muon_lr == 0 and capsys.readouterr().out.count("\n") == 1
    assert train.parse_args(["--arch", "diffusion"])[0].muon_lr > 0

def test_adapters_of_another_model_or_kind_are_refused(tmp_path):
    model, other = tiny("mar")[0], tiny("ar")[0]
    adapted(other)
    with pytest.raises(FileNotFoundError, match="--lora .*: no adapter_config.json there"):
        checkpoint.load_adapters(model, str(tmp_path))
    checkpoint.save_adapters(other, tmp_path)
    with pytest.raises(ValueError, match=r"adapter tensors do not fit the model, first base_model.*nothing expected"):
        checkpoint.load_adapters(model, str(tmp_path))
    for wrong in (dict(r=0), dict(r="x"), dict(use_dora=True), dict(lora_alpha=None)):
        settings = json.load(open(tmp_path / "adapter_config.json"))
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(ValueError, match="expected r, lora_alpha and plain LoRA") as e:
            checkpoint.load_adapters(model, str(tmp_path))
        assert "\n" not in str(e.value)
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))

@pytest.mark.parametrize("arch", ARCHS)
def test_recomputed_blocks_change_nothing(arch):
    """Dropout, too: the random numbers of the forward pass come again."""
    found = {}
    for recompute in ("none", "blocks", "3"):
        model, args, batch = tiny(arch, **{"dropout": 0.3} if arch == "mar" else {})
        args.recompute, blocks, calls = recompute, model.blocks(), []
        for block in blocks:
            forward = block.forward
            def counted(*args, forward=forward, **more):
                calls.append(torch.is_grad_enabled())
                return forward(*args, **more)
            block.forward = counted
        run = types.SimpleNamespace(args=args, model=model, device=torch.device("cpu"), world=1)
        forward = train.Run.wrapped(run)
        torch.manual_seed(5)
        found[recompute] = gradients(forward, batch), len(calls)
    (loss, wanted), calls = found["none"]
    for name, more in (("blocks", 2), ("3", None)):
        (other, got), n = found[name]
        assert torch.equal(loss, other) and all(torch.equal(wanted[k], g) for k, g in got.items()), name
        assert n > calls and wanted.keys() == got.keys()
    assert found["3"][1] < found["blocks"][1]

if __name__ == "__main__":
    sharded(sys.argv[1])
