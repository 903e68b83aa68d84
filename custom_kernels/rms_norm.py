"""RMS norm, whose backward pass torch fuses on GPUs and where it compiles, and nowhere else."""
import torch
import torch.nn.functional as F

class RMSNormCPU(torch.autograd.Function):
    """F.rms_norm, on CPUs a long chain of small operations, with the backward pass of LayerNorm: the fused one with a
    mean of zero, less its projection onto constants, which RMSNorm does not have."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx, g):
        x, weight, rstd = ctx.saved_tensors
        zero, wanted = torch.zeros_like(rstd), [True, ctx.needs_input_grad[1], False]
        dx, dw, _ = torch.ops.aten.native_layer_norm_backward(g, x, weight.shape, zero, rstd, weight, None, wanted)
        return dx.add_((g @ weight).unsqueeze(-1) * rstd / weight.numel()), dw, None

def rms_norm(x, weight, eps):
    """x (..., W) / sqrt(mean(x^2) + eps) * weight, weight (W,), in the dtype of x."""
    fused = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    return RMSNormCPU.apply(x, weight, eps) if fused else F.rms_norm(x, weight.shape, weight, eps)
