"""Muon: momentum whose matrices are made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""
import math

import torch

class Muon(torch.optim.Optimizer):
    """Coefficients, Nesterov momentum, decay and scale as in torch.optim.Muon, which always iterates in bf16: slow
    where a processor lacks it. Here only CUDA does, and matrices of one shape go together. params: 2-D tensors."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), same in shapes.items():
                for p in same:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in same], [self.state[p]["momentum_buffer"] for p in same]
                bad, decay = getattr(self, "found_inf", None), group["lr"] * group["weight_decay"]
                if bad is not None:  # a 0-dim tensor, 1 where this step is to change nothing, as in torch's fused AdamW
                    grads = [torch.where(bad > 0, buffer, grad) for buffer, grad in zip(buffers, grads)]
                    decay = decay * (1 - bad)
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                x = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))  # (matrices, rows, columns)
                x = orthogonalize(x.bfloat16() if x.is_cuda else x).to(same[0].dtype)
                x = x if bad is None else x * (1 - bad)
                torch._foreach_mul_(same, 1 - decay)
                torch._foreach_add_(same, list(x.unbind()), alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

def orthogonalize(x):
    """(n, rows, columns) -> the same singular vectors, singular values of roughly 1, by five Newton-Schulz steps."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x

def step_if(optimizer, good):
    """optimizer.step() where `good`, a 0-dim bool tensor, is true, else nothing; then the gradients are dropped. On a
    GPU the device decides (fused AdamW and Muon look at `found_inf`), so nobody waits for it."""
    if good.is_cuda:
        optimizer.grad_scale, optimizer.found_inf = None, (~good).float()
    if good.is_cuda or good:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
