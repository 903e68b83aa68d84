"""custom_kernels/products.py: which library multiplies on a CPU changes times, not results."""
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import run
from processes import ROOT

import train
from custom_kernels import products

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")

@needs_onednn
def test_attention_stays_with_mkl_in_both_directions(monkeypatch):
    q, k, v = (torch.randn(2, 2, 9, 32, generator=torch.Generator().manual_seed(i), requires_grad=True)
               for i in range(3))
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    products.use_products("onednn")
    calls, told = [], products.told

    def spy(way):
        calls.append(way)
        told(way)
    monkeypatch.setattr(products, "told", spy)
    loss = products.sdpa(q, k, v).square().sum()
    assert calls == ["mkl", "onednn"]
    got = torch.autograd.grad(loss, (q, k, v))
    assert calls == ["mkl", "onednn"] * 2 and all(map(torch.equal, got, wanted))
    assert torch.backends.mkldnn.matmul.fp32_precision == products.WAYS["onednn"]
    with torch.no_grad():
        products.sdpa(q, k, v)
    assert torch.backends.mkldnn.matmul.fp32_precision == products.WAYS["onednn"]

@needs_onednn
@pytest.mark.parametrize("error, seconds, wanted", [(1e-7, 0.5, "onednn"), (1e-7, 0.9, "mkl"), (1e-3, 0.5, "mkl")])
def test_it_is_chosen_where_it_is_exact_and_faster(error, seconds, wanted, monkeypatch):
    clock, told = [0.0], []
    monkeypatch.setattr(products, "told", told.append)

    def linear(x, w):
        fast = told[-1] == "onednn"
        clock[0] += seconds if fast else 1.0
        return (x.double() @ w.double().T * (1 + error * fast)).float()
    monkeypatch.setattr(products.F, "linear", linear)
    monkeypatch.setattr(products.time, "process_time", lambda: clock[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the check itself takes one
    assert products.use_products("auto") == wanted and told[-1] == products.chosen == wanted
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    if error > 1e-6:  # whoever asks for it, or resumes a run from another processor, is told
        with pytest.raises(ValueError, match="--gemm onednn: off by 1e-03 here .*, take --gemm mkl"):
            products.use_products("onednn")
    else:
        assert products.use_products("onednn") == "onednn"

@pytest.mark.parametrize("ask", ["auto", "onednn"])
def test_without_onednn(ask, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    if ask == "auto":
        assert products.use_products(ask) == "mkl"
    else:
        with pytest.raises(ValueError, match="--gemm onednn: off by 1e\\+00 here .*, take --gemm mkl"):
            products.use_products(ask)

@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_check_ends_in_a_fork_of_a_process_that_has_computed():
    """OpenMP's threads do not survive a fork: whoever waits for them there waits for ever."""
    program = ("import os, signal, torch; from custom_kernels.products import use_products; torch.set_num_threads(2)\n"
               "torch.randn(1024, 512) @ torch.randn(512, 1024); child = os.fork()\n"
               "if child == 0: signal.alarm(30); use_products(); os._exit(0)\n"
               "assert os.waitpid(child, 0)[1] == 0 and torch.get_num_threads() == 2")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

@needs_onednn
def test_training_is_the_same_and_a_resumed_run_keeps_the_choice(tmp_path, capsys):
    losses = {}
    for way in products.WAYS:
        out = tmp_path / way
        flags = ("--pool", "60", "--batch", "8", "--eval-n", "0", "--preview", "0", "--log-every", "1",
                 "--threads", "1")
        run("--arch", "ar", "--steps", "3", "--stop-after", "2", "--gemm", way, *flags, out=out)
        run("--resume", str(out), "--arch", "ar", "--stop-after", "0")
        losses[way] = [json.loads(line)["loss"] for line in open(out / "log.jsonl") if '"loss"' in line]
        printed = capsys.readouterr().out
        assert printed.count(f"torch.float32 ({way})") == 2
    assert losses["onednn"] == pytest.approx(losses["mkl"], rel=1e-4) and len(losses["mkl"]) == 3

def test_it_is_for_cpus():
    args, _ = train.parse_args(["--gemm", "mkl"])
    args.device = "cuda"
    with pytest.raises(ValueError, match="--gemm"):
        train.check_typed(args, ["--gemm", "mkl"])
