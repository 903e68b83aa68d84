"""Cross entropy of a linear layer's output.  (The Triton kernels follow below the reference.)"""
import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(hidden, weight, labels, bias=None, ignore_index=-100, count=None):
    """Sum over the rows with labels[i] != ignore_index of -log softmax(hidden @ weight.T + bias)[labels[i]], divided by `count`
    (by the number of those rows where count is None; by 1 where there are none, so that the loss is 0 with gradient 0).
    hidden (N, D), weight (V, D), bias (V,) or None, labels (N,) int64, count a 0-dim tensor or a number. Returns a float32 scalar."""
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # only here is counting the kept rows no host sync
        kept = (labels != ignore_index).nonzero().squeeze(1)
        if kept.numel() < labels.numel():
            hidden, labels = hidden[kept], labels[kept]
    logits = F.linear(hidden, weight, bias).float()
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / ((labels != ignore_index).sum().clamp(min=1) if count is None else count)
