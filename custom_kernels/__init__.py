"""What models call: plain functions that pick an implementation (pick.py says which and why); and Muon and LoRA.

Each module holds the plain PyTorch reference, which is the specification, beside the Triton kernels that compute the
same and the function that picks. README.md here lists what was tested and how."""
from .attention import attention, attention_plan
from .diffusion_loss import add_noise, diffusion_loss_rows, diffusion_tables, flow_loss_rows
from .linear_cross_entropy import linear_cross_entropy
from .lora import add_lora, init_lora, load_lora, lora_config, lora_layers, lora_state, merge_lora
from .muon import Muon, step_if
from .pick import compiled, peak_flops
from .rehearsal import count_flops, peak_bytes
from .rms_norm import rms_norm

__all__ = ["Muon", "add_lora", "add_noise", "attention", "attention_plan", "compiled", "count_flops",
           "diffusion_loss_rows", "diffusion_tables", "flow_loss_rows", "init_lora", "linear_cross_entropy",
           "load_lora", "lora_config", "lora_layers", "lora_state", "merge_lora", "peak_bytes", "peak_flops",
           "rms_norm", "step_if"]
