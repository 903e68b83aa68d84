"""A step on the meta device, where tensors have shapes and no numbers: what it holds and computes, in seconds and for
any size. The kernels' references run there; what they would hold that a real device does not is left out."""
import contextlib
import functools
import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from . import pick

PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.bmm}
EXACT = {F.layer_norm, F.group_norm, F.cross_entropy, F.softmax, torch.softmax}

class Held(TorchDispatchMode):
    """Counts the bytes that all tensors but `known` ones hold, now and at most."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = dict.fromkeys((t.untyped_storage()._cdata for t in known), 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = t.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.freed, key)
        return out

    def freed(self, key):
        self.now -= self.sizes.pop(key)

class StandIn(TorchFunctionMode):
    """Meta tensors hold what those of a CPU or GPU would: no scores of attention, but where a CPU drops some; and with
    `low` products are in bf16, as under autocast, which the meta device lacks. keep: weights are cast once. scores:
    attention is the two products that it is, which a counter of operations knows."""

    def __init__(self, gpu=False, low=False, keep=True, scores=False):
        super().__init__()
        self.gpu, self.low, self.keep, self.scores, self.casts, self.own = gpu, low, keep, scores, {}, torch.autocast

    def __enter__(self):
        torch.autocast, pick.META = self.autocast, "cuda" if self.gpu else "cpu"
        return super().__enter__()

    def __exit__(self, *error):
        torch.autocast = self.own
        return super().__exit__(*error)

    @contextlib.contextmanager
    def autocast(self, *args, enabled=True, **kwargs):
        was, self.low = self.low, self.low and enabled
        yield
        self.low = was

    def cast(self, t, dtype):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.dtype == dtype:
            return t
        if not (self.keep and t.is_leaf and t.requires_grad):
            return t.to(dtype)
        if id(t) not in self.casts:
            self.casts[id(t)] = t.to(dtype)
        return self.casts[id(t)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.low and (function in PRODUCTS or function in EXACT):
            dtype = torch.bfloat16 if function in PRODUCTS else torch.float32
            args, kwargs = [self.cast(t, dtype) for t in args], {k: self.cast(t, dtype) for k, t in kwargs.items()}
        if function is F.rms_norm:  # one operation, as ours is on CPUs and torch's on GPUs
            return F.layer_norm(*args, kwargs["weight"], None, kwargs["eps"])
        drops = kwargs.get("dropout_p") and not self.gpu
        if function is not F.scaled_dot_product_attention or drops or self.scores:
            return function(*args, **kwargs)
        q, k, v = args[:3]
        if not self.gpu and q.shape[1] > k.shape[1]:  # the CPU's kernel copies them for each head
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

def rehearse(model, batch, mode):
    """One micro-batch {part: tensors}, encoded, forward and backward -> {part: bytes of the encodings of a picture}."""
    encoded, sizes = {}, {}
    with mode:
        model.eval()
        for part, tensors in batch.items():
            encoded[part] = {k: v.to("meta") for k, v in tensors.items()}
            for name in [k for k in tensors if k.endswith("pixels_in")]:
                pixels, prefix = encoded[part].pop(name), name.removesuffix("pixels_in")
                with torch.no_grad(), mode.autocast(enabled=False):
                    encodings = model.precompute(pixels)
                sizes[part] = sum(t.numel() * t.element_size() for t in encodings.values()) // len(pixels)
                encoded[part] |= {prefix + k: v for k, v in encodings.items()}
        model.train()
        loss = sum(model(encoded).values())
        mode.casts.clear()
        loss.backward()
    return sizes

def count_flops(model, batch):
    """Operations of a micro-batch, forward and backward, by torch's counter: of attention as if nothing were masked,
    and none twice for recomputation."""
    from torch.utils.flop_counter import FlopCounterMode  # which brings Triton along, where there is one
    with FlopCounterMode(display=False) as counter:
        rehearse(model, batch, StandIn(scores=True))
    return counter.get_total_flops()

def peak_bytes(model, batch, gpu, low, every=0, drop=False):
    """-> the most bytes that `rehearse` holds beside weights and their whole gradients, and what it returns. every:
    each such block is recomputed. drop: gradients are not held (they are counted elsewhere, as always there)."""
    mode = StandIn(gpu, low, keep=not every)
    again = functools.partial(checkpoint, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), mode))
    for block in model.blocks()[::every] if every else ():
        block.forward = functools.partial(again, block.forward)

    def forget(p):
        p.grad = None
    trains = [p for p in model.parameters() if p.requires_grad]
    for p in trains if drop else ():
        p.register_post_accumulate_grad_hook(forget)
    with Held([*model.parameters(), *model.buffers()]) as held:
        sizes = rehearse(model, batch, mode)
    least = 0 if gpu else 2 * max(p.numel() for p in trains) * 4  # AdamW's temporary tensors on CPUs
    return max(least, held.peak - (0 if drop else sum(p.numel() * p.element_size() for p in trains))), sizes
