"""LoRA (arXiv 2106.09685): frozen linear layers that learn a product B A beside their weight; names as in PEFT."""
import collections
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

PEFT = "base_model.model."  # before every name in PEFT's files

class LoRALinear(nn.Linear):
    """What `attach` makes of an nn.Linear: W + scale B A, with lora_A (rank, in) and lora_B (out, rank) in fp32. The
    names in the base stay. The sum is made only for code that reads `weight` (a fused product, a tied loss): it takes
    memory, and bf16 rounds small B A off."""

    def merged(self):
        own = self._parameters["weight"]
        return (own + self.scale * self.lora_B @ self.lora_A).to(own.dtype)

    @property
    def weight(self):  # between two uses of a sharded layer FSDP asks for its parameter by this name
        own = self._parameters["weight"]
        return own if isinstance(own, DTensor) else self.merged()

    def forward(self, x):
        low = F.linear(x, self.lora_A.to(x.dtype)) * self.scale
        return F.linear(x, self._parameters["weight"], self.bias) + F.linear(low, self.lora_B.to(low.dtype))

def own_linear(model):
    """{name: nn.Linear} whose weight no other module uses: a tied head is an embedding, too."""
    uses = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and uses[id(m.weight)] == 1}

def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}

def adapters(model):
    """{PEFT's name: parameter}"""
    return {f"{PEFT}{name}.{part}.weight": getattr(layer, part) for name, layer in lora_layers(model).items()
            for part in ("lora_A", "lora_B")}

def attach(layer, rank, alpha):
    """nn.Linear -> LoRALinear, in place. A and B are 0 until `init_lora` or `load_lora`."""
    device, layer.__class__ = layer.weight.device, LoRALinear
    layer.scale = alpha / rank
    layer.lora_A = nn.Parameter(torch.zeros(rank, layer.in_features, device=device))
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))

@torch.no_grad()
def put(p, value):
    """Copies a whole tensor into a parameter, of a sharded one the part that lies here."""
    p.copy_(distribute_tensor(value.to(p.device), p.device_mesh, p.placements) if isinstance(p, DTensor) else value)

def add_lora(model, named, rank, generator, alpha=None):
    """Freezes the model but for new adapters on those linear layers whose own weights are in `named`, [(name,
    parameter)] -> the adapters' [(name, parameter)]. alpha: scale times rank; None: rank, as with Adam the learning
    rate alone can set how fast B A grows. To be called before fully_shard; the model may be on the meta device. Raises
    ValueError where there is no such layer."""
    trained = {id(p) for _, p in named}
    found = [layer for layer in own_linear(model).values() if id(layer.weight) in trained]
    if not found:
        raise ValueError(f"--lora {rank}: none of the {len(named)} tensors that train is a linear layer's own weight")
    model.requires_grad_(False)
    for layer in found:
        attach(layer, rank, alpha or rank)
    init_lora(model, generator)
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

def init_lora(model, generator):
    """As PEFT: A is uniform in +-1 / sqrt(in); B is 0, so that the model starts as the base. generator: on the CPU."""
    for layer in lora_layers(model).values():
        start = torch.empty(layer.lora_A.shape)
        put(layer.lora_A, nn.init.kaiming_uniform_(start, math.sqrt(5), generator=generator))
        put(layer.lora_B, torch.zeros(layer.lora_B.shape))

def lora_state(model):
    """-> {PEFT's name: whole tensor}; of a sharded model a collective."""
    return {k: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for k, p in adapters(model).items()}

def lora_config(model):
    """What adapter_config.json says of a model's adapters. Modules by their whole names: PEFT then adapts no others."""
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    rank = len(layer.lora_A)
    return dict(peft_type="LORA", task_type=None, r=rank, lora_alpha=round(layer.scale * rank), lora_dropout=0.0,
                bias="none", target_modules=list(layers), base_model_name_or_path="", inference_mode=True)

def load_lora(model, state, what, config=None):
    """Loads what `lora_state` gave. With `config`, of an adapter_config.json, the layers that `state` names get their
    adapters first. Raises ValueError, in one line, where names or shapes are not those of the model's adapters."""
    layers, suffix = own_linear(model) if config else {}, ".lora_A.weight"
    for name in [k.removeprefix(PEFT).removesuffix(suffix) for k in state if k.endswith(suffix)]:
        if name in layers:
            attach(layers[name], config["r"], config["lora_alpha"])
    own = adapters(model)
    wrong = [k for k in (own | state) if k not in own or k not in state or own[k].shape != state[k].shape]
    if wrong or not own:
        first = (wrong or ["none"])[0]
        sides = [tuple(side[first].shape) if first in side else "nothing" for side in (state, own)]
        raise ValueError(f"{what}: {len(wrong)} of {len(state)} adapter tensors do not fit the model, first {first}: "
                         f"{sides[0]} found, {sides[1]} expected: is it the base, and the --lora, that they belong to?")
    for name, p in own.items():
        put(p, state[name])

@torch.no_grad()
def merge_lora(model):
    """Adds every B A to its weight, in place, and leaves plain linear layers."""
    for layer in lora_layers(model).values():
        layer._parameters["weight"].copy_(layer.merged())
        del layer.lora_A, layer.lora_B, layer.scale
        layer.__class__ = nn.Linear
