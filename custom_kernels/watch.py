"""What attention looks at, for pictures of it (sample.py --explain): never in training, where it would cost memory."""
import contextlib

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from . import pick

class Watch(TorchFunctionMode):
    """While it lasts, `seen` gets the weights of every attention: a mean over heads, (B, queries, keys). On a GPU, too,
    attention is PyTorch's then, which is what can be watched."""

    def __enter__(self):
        self.seen, self.forced, pick.FORCED = [], pick.FORCED, "reference"
        return super().__enter__()

    def __exit__(self, *error):
        pick.FORCED = self.forced
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            each = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
            self.seen.append(function(q, k, each, **kwargs).float().mean(1))  # whose values are the weights
        return function(*args, **kwargs)

def watching(on):
    """A context that gives a Watch, or one that does nothing."""
    return Watch() if on else contextlib.nullcontext()

def boxes(h, w):
    """What a trace calls the places of a grid of h x w, in raster order: (row, column, rows, columns)."""
    return [(row, column, h, w) for row in range(h) for column in range(w)]
