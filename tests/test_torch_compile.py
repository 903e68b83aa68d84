"""torch.compile of a training step, traced with aot_eager: no break in the graph, and few graphs whatever lengths come,
as each takes a large model minutes. It runs in a process of its own."""
import dataclasses
import functools
import os
import sys
import warnings

import pytest
import torch
from processes import alone
from test_train import ARCHS, SMALL, made
from torch._dynamo.testing import CompileCounterWithBackend

import checkpoint
import custom_kernels

def count(arch):
    """Prints how many graphs 20 steps took, and how many shapes they had. One block is like another."""
    warnings.simplefilter("ignore")
    configs = checkpoint.model_file(arch).CONFIGS
    names = [f.name for f in dataclasses.fields(configs["tiny"])]
    few = {name: 1 for name in names if name.endswith(("num_layers", "depth"))} | {"mask_bucket": 3}
    few = {name: value for name, value in few.items() if name in names}
    configs["tiny"] = dataclasses.replace(configs["tiny"], **few)
    mix = ["--mix", "recon=1", "t2i=1", "i2t=1"]
    _, model, batches = made("--arch", arch, "--stage", "base", *SMALL, *mix, stage="reca")
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile = functools.partial(torch.compile, backend=counter, fullgraph=True)  # a break is an error
    step, shapes = custom_kernels.compiled(model), set()
    for batch in map(batches.batch, range(20)):
        sum(step(batch).values()).backward()
        shapes.add(str({part: {k: v.shape for k, v in tensors.items()} for part, tensors in batch.items()}))
    print(counter.frame_count, len(shapes))

@pytest.mark.parametrize("arch", ARCHS)
def test_a_step_is_one_graph_compiled_twice_at_most(arch):
    """The second graph is that of no visible token; that of a single one does not occur where masked tokens come in
    multiples, as in published sizes."""
    done = alone(os.path.abspath(__file__), arch, PYTHONPATH=checkpoint.HERE, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    graphs, shapes = map(int, done.stdout.split()[-2:])
    assert graphs <= 2 < shapes

if __name__ == "__main__":
    count(sys.argv[1])
