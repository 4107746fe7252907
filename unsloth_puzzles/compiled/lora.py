"""PEFT's LoRA with its scaling s where it is small: on the r columns between A and B.

    y = W x + B (s A x)        PEFT: W x + s (B A x)

Differentiated, PEFT's order multiplies the gradient of every output by s, and that product is a matrix of its own, as
large as the layer's output, written once and read twice: nothing can fuse it into the matrix products that read it.
Here the gradient itself is what they read. For an s that is a power of two the results are the same bits; other
adapters can be left as they are (`eager_rounding`).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from peft.tuners.lora import LoraLayer

from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.nf4.patch import exchange_classes


def scale_inside(model: torch.nn.Module, eager_rounding: bool) -> Callable[[], None]:
    """Let PEFT's LoRA layers over 4-bit linears compute as above; returns what undoes it.

    eager_rounding: only where s is a power of two, so that each value is rounded as PEFT's is.

    A layer's class is exchanged for a subclass, so that equal layers still share one graph. Calls that are not plain
    LoRA (disabled or merged adapters, adapters by row, DoRA and other variants, a bias on B) or in which hooks wait
    stay PEFT's.
    """
    from peft.tuners.lora.bnb import Linear4bit

    scaled = _scaled_inside(eager_rounding)
    return exchange_classes((module, scaled) for module in model.modules() if type(module) is Linear4bit)


@cache
def _scaled_inside(eager_rounding: bool) -> type:
    from peft.tuners.lora.bnb import Linear4bit as cls

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not _is_plain(self) or hooked_below(self):  # a hook on B would see other numbers
            return cls.forward(self, x, *args, **kwargs)
        result, shared = self.base_layer(x), self.inside
        autocast = torch.is_autocast_enabled(x.device.type)
        for name in _active(self):
            if shared is not None and shared[0] is x:
                inside = shared[1]
            else:
                dropped = self.lora_dropout[name](x if autocast else x.to(self.lora_A[name].weight.dtype))
                inside = self.lora_A[name](dropped)
            result = add_outside(self, name, result, inside)
        return result

    # inside: (x, what A makes of it), where that is known already.
    added = {"forward": forward, "inside": None, "eager_rounding": eager_rounding, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), added)


def add_outside(layer: LoraLayer, name: str, result: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The frozen layer's `result` and the adapter's, from the r columns `inside` that its A has made."""
    return result + layer.lora_B[name](inside * layer.scaling[name]).to(result.dtype)


def plain_adapter(layer: LoraLayer) -> str | None:
    """The name of the one adapter that is plain LoRA and active; None if there is none, more than one, or another."""
    names = _active(layer)
    return names[0] if len(names) == 1 and _is_plain(layer) else None


def can_be_inside(layer, x: torch.Tensor) -> bool:
    """Whether its adapter is a plain one that computes in the dtype of x, without dropout between x and itself."""
    name = plain_adapter(layer)
    if name is None or not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return False
    return torch.is_autocast_enabled(x.device.type) or layer.lora_A[name].weight.dtype == x.dtype


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _is_plain(layer: LoraLayer) -> bool:
    names = _active(layer)
    odd = any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names)
    if getattr(layer, "eager_rounding", False):
        odd = odd or any(math.frexp(layer.scaling[name])[0] != 0.5 for name in names)
    return not (layer.disable_adapters or layer.merged or odd)
