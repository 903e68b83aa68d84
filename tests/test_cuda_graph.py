"""The token sampler as a CUDA graph. Without a GPU a stand-in records the operations of a function and runs them again
on the same tensors, as a graph does: it sees neither Python nor tensors that come later. On a GPU also the real one."""
import contextlib
import functools

import pytest
import torch
from helpers import untrained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model_mar
from custom_kernels import cuda_graph, init_lora, pick
from custom_kernels.cuda_graph import Recorded, graphed
from custom_kernels.diffusion_process import diffusion_step, tables_on
from custom_kernels.lora import add_lora, lora_layers

class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph, and as a context for torch.cuda.graph."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.operations:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                old.copy_(new)

class Stream:
    def wait_stream(self, other):
        pass

@contextlib.contextmanager
def capture(tape, stream, capture_error_mode):
    with tape:
        yield
    for func, _, _, out in tape.operations:  # what is recorded has not been computed
        if not any(result.alias_info for result in func._schema.returns):
            for t in tree_leaves(out):
                t.fill_(float("nan") if t.is_floating_point() else 0)

@pytest.fixture
def gpu(monkeypatch):
    """-> the tapes that are made."""
    tapes = []

    def new_tape():
        tapes.append(Tape())
        return tapes[-1]
    nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
    fakes = dict(CUDAGraph=new_tape, graph=capture, Stream=Stream, stream=nothing, device=nothing,
                 current_stream=Stream)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return tapes

@functools.lru_cache(maxsize=None)
def diffloss():
    return untrained("mar").mar.diffloss

def inputs(n, guided, both=False):
    """Conditions and noise of n tokens; both: noise of the unconditional rows, too."""
    g, c = torch.Generator().manual_seed(n), diffloss().net.config
    C, steps = model_mar.latent_channels(c), len(tables_on(c.num_sampling_steps, "cpu")[2])
    z = torch.randn(n * (1 + guided), c.decoder_dim, generator=g)
    return z, (torch.randn(n, C, generator=g), torch.randn(steps, n * (1 + both), C, generator=g))

def in_order(loss, z, temperature, cfg, noise):
    """What `sample` must give: the plain loop over the kept steps."""
    timesteps = tables_on(loss.spacing, "cpu")[2]
    n = len(z) // 2 if cfg != 1 else len(z)
    x, steps = noise[0].repeat(len(z) // n, 1), noise[1].repeat(1, len(z) // noise[1].shape[1], 1)
    for j, i in enumerate(reversed(range(len(timesteps)))):
        out = loss.net(x[:n].repeat(len(z) // n, 1), torch.tensor([timesteps[i]]), z).float()
        if cfg != 1:
            epsilon, v = out.chunk(2, -1)
            epsilon = epsilon[n:] + cfg * (epsilon[:n] - epsilon[n:])
            out = torch.cat([epsilon.repeat(2, 1), v], -1)
        x = diffusion_step(out, x, i, steps[j], temperature, loss.spacing)[0]
    return x

# ---------------------------------------------------------------------------------------------------------------------
# the function that is recorded

@pytest.mark.parametrize("cfg, both", [(1.0, False), (3.0, False), (3.0, True)])
def test_sampling_is_the_plain_loop(cfg, both):
    z, noise = inputs(6, cfg != 1, both)
    with torch.no_grad():
        want = in_order(diffloss(), z, 0.9, cfg, noise)
    assert torch.equal(diffloss().sample(z, 0.9, cfg, noise), want)

@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_padded_rows_change_nothing(cfg):
    """Sums may be taken in another order where there are more rows; what the rows hold must not matter at all."""
    z, noise = inputs(6, cfg != 1)
    want, seen = diffloss().sample(z, 0.9, cfg, noise), []

    def spoiled(z, x, noise, *numbers):
        seen.append((len(x), x.count_nonzero(1).eq(0).sum().item()))
        z, x, noise = (torch.where(t.abs().sum(-1, keepdim=True) == 0, 7.0, t) for t in (z, x, noise))
        return diffloss().denoise(z, x, noise, *numbers)
    found = [diffloss().sample(z, 0.9, cfg, noise, graph, 4) for graph in (diffloss().denoise, spoiled)]
    assert seen == [(8, 2)] and torch.equal(*found)
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-5)

def test_the_function_draws_nothing():
    z, (x, noise) = inputs(5, True)
    before = torch.get_rng_state()
    with torch.no_grad():
        a, b = (diffloss().denoise(z, x, noise, 1.0, 3.0) for _ in range(2))
        c = diffloss().denoise(z, x, noise, torch.tensor(1.0), torch.tensor(3.0))  # as a graph gets them
    assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)

# ---------------------------------------------------------------------------------------------------------------------
# recording and replaying

@torch.no_grad()
def test_replays_read_the_same_buffers_and_give_copies(gpu):
    graph, given = Recorded(diffloss().denoise), [inputs(4, True), inputs(5, True), inputs(4, True)]
    given[2] = [t + 1 for t in (given[2][0], *given[2][1])]
    made, buffers, before = [], [], given[0][0].clone()
    for (z, *noise), cfg in zip(given, (3.0, 3.0, 2.0)):
        x, noise = noise if len(noise) == 2 else noise[0]
        made.append((graph(z, x, noise, 0.9, cfg), diffloss().denoise(z, x, noise, 0.9, cfg)))
        buffers.append([t.data_ptr() for t in list(graph.graphs.values())[len(made) == 2][1]])
    assert all(torch.equal(a, b) for a, b in made)  # also the first, which later replays must not have overwritten
    assert torch.equal(given[0][0], before)  # nor what was given: buffers are the graph's own
    assert buffers[0] == buffers[2] and [tape.replays for tape in gpu] == [2, 1]

@torch.no_grad()
@pytest.mark.parametrize("rank", [0, 2])
def test_graphs_see_weights_that_change_in_place(gpu, rank):
    """In mixed precision too, whose casts of weights outside of the graph would go away, and with adapters."""
    model = untrained("mar")
    loss, (z, (x, noise)) = model.mar.diffloss, inputs(4, True)
    if rank:
        add_lora(model, model.trainable_parameters("reca"), rank, torch.Generator())
        init_lora(model, torch.Generator())
        assert lora_layers(loss.net)
    for bf16 in (True, False):
        graph = Recorded(loss.denoise)
        for change in (False, True):
            for p in loss.parameters() if change else ():
                p *= 0.9
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss.denoise(z, x, noise, 0.9, 3.0)  # casts weights, as the rest of a model does
                got, plain = graph(z, x, noise, 0.9, 3.0), loss.denoise(z, x, noise, 0.9, 3.0)
            assert torch.equal(got, plain) and got.isfinite().all(), (bf16, change)

@torch.no_grad()
def test_what_no_graph_can_hold_runs_plainly(gpu, monkeypatch):
    z, (x, noise) = inputs(4, True)

    @contextlib.contextmanager
    def refuse(*_, **__):
        with capture(Tape(), None, ""):
            yield
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    graph = Recorded(diffloss().denoise)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="only costs time: operation not permitted when stream is capturing$"):
            got = graph(z, x, noise, 0.9, 3.0)
        again = graph(z, x, noise, 0.9, 3.0)  # without another try
        want = diffloss().denoise(z, x, noise, 0.9, 3.0)
    assert torch.equal(got, want) and torch.equal(again, want) and len(gpu) == 1

def picked(monkeypatch, choice="graph"):
    monkeypatch.setitem(pick.PICK, ("denoise", None), (choice, "in a test"))
    monkeypatch.setattr(pick, "FORCED", "")

def test_where_there_is_a_graph(monkeypatch):
    loss, cuda = diffloss(), torch.device("cuda")
    picked(monkeypatch)
    assert graphed(loss.denoise, loss, cuda) is None  # with gradients
    with torch.no_grad():
        assert isinstance(graphed(loss.denoise, loss, cuda), Recorded)
        assert all(graphed(loss.denoise, loss, torch.device(name)) is None for name in ("cpu", "mps"))
        with monkeypatch.context() as context:
            context.setattr(cuda_graph, "DTensor", torch.nn.Parameter)  # as if it were sharded
            assert graphed(loss.denoise, loss, cuda) is None
        picked(monkeypatch, "reference")
        assert graphed(loss.denoise, loss, cuda) is None

def test_a_picture_takes_two_graphs_at_most(gpu, monkeypatch):
    """Whatever numbers of tokens its steps reveal; and it is the picture that is drawn without."""
    model, made = untrained("mar"), []
    options = dict(steps=4, size=96, cfg=3.0, schedule="linear", temperature=0.8)
    for fake in (False, True):
        if fake:
            monkeypatch.setattr(model_mar, "graphed", lambda function, module, device: Recorded(function))
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        made.append(model.generate(["a red star", "a blue circle"], generator=generators, **options))
    assert len(gpu) == 2 and sum(tape.replays for tape in gpu) == 4
    torch.testing.assert_close(*made, rtol=0, atol=1e-3)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bf16", [False, True])
@torch.no_grad()
def test_on_a_gpu_replays_are_the_plain_function(bf16, monkeypatch):
    picked(monkeypatch)
    loss, given = untrained("mar").mar.diffloss.cuda(), [inputs(4, True), inputs(4, True)]
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        graph = graphed(loss.denoise, loss, torch.device("cuda"))
        for shift, (z, (x, noise)) in enumerate(given):
            z, x, noise = (t.cuda() + shift for t in (z, x, noise))
            assert torch.equal(graph(z, x, noise, 0.9, 3.0), loss.denoise(z, x, noise, 0.9, 3.0))
    assert None not in graph.graphs.values()
