"""A function whose many small kernels a GPU gets in one launch, as a CUDA graph."""
import warnings

import torch
from torch.distributed.tensor import DTensor

from . import pick

def graphed(function, module, device):
    """A function of tensors and numbers that reads a module's weights -> itself, Recorded; or None where it is to be
    called as it is: where PICK says so, with gradients, or sharded, as weights are then gathered on the way."""
    plain = pick.choose("denoise", None, device) != "graph" or torch.is_grad_enabled()
    return None if plain or any(isinstance(p, DTensor) for p in module.parameters()) else Recorded(function)

class Recorded:
    """Records a function once for each shape of its inputs, then replays it on buffers of its own. A graph keeps the
    addresses of weights and all that Python chose (precision, adapters): whoever makes one drops it before these may
    change. So the graph of a sampler is made for one call of it."""

    def __init__(self, function):
        self.function, self.graphs = function, {}

    def __call__(self, *inputs):
        given = [x if torch.is_tensor(x) else torch.full((), x, device=inputs[0].device) for x in inputs]
        shapes = tuple((x.shape, x.dtype) for x in given)
        if shapes not in self.graphs:
            try:
                self.graphs[shapes] = record(self.function, [x.clone() for x in given])
            except RuntimeError as e:  # the graph costs memory, and a module may do what no graph can hold
                warnings.warn(f"no CUDA graph, which only costs time: {(str(e).splitlines() or [type(e)])[0]}")
                self.graphs[shapes] = None
            finally:
                torch.clear_autocast_cache()  # casts that a graph made hold nothing before it is replayed
        if self.graphs[shapes] is None:
            return self.function(*inputs)
        graph, buffers, output = self.graphs[shapes]
        for buffer, x in zip(buffers, given):
            buffer.copy_(x)
        graph.replay()
        return output.clone()  # the next replay writes there again

def record(function, buffers):
    """-> the graph of function(*buffers), these buffers, and the tensor that a replay writes."""
    with torch.cuda.device(buffers[0].device):
        graph, stream, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            function(*buffers)  # libraries set themselves up in a first call, which no graph can hold
        here.wait_stream(stream)
        torch.clear_autocast_cache()  # the graph must cast weights itself, not read casts that are dropped later
        # thread_local: another thread may go on pinning the batches of a training
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = function(*buffers)
    return graph, buffers, output
