"""PEFT's LoRA with its scaling s where it is small: on the r columns between A and B.

    y = W x + B (s A x)        PEFT: W x + s (B A x)

Differentiated, PEFT's order multiplies the gradient of every output by s, and that product is a matrix of its own, as
large as the layer's output, written once and read twice: nothing can fuse it into the matrix products that read it.
Here the gradient itself is what they read. For an s that is a power of two the results are the same bits.
"""

from collections.abc import Callable
from functools import cache

import torch
from peft.tuners.lora import LoraLayer

from unsloth_puzzles.nf4.patch import exchange_classes


def scale_inside(model: torch.nn.Module) -> Callable[[], None]:
    """Let PEFT's LoRA layers over 4-bit linears compute as above; returns what undoes it.

    A layer's class is exchanged for a subclass, so that equal layers still share one graph. Calls that are not plain
    LoRA (disabled or merged adapters, adapters by row, DoRA and other variants, a bias on B) stay PEFT's.
    """
    from peft.tuners.lora.bnb import Linear4bit

    scaled = _scaled_inside()
    return exchange_classes((module, scaled) for module in model.modules() if type(module) is Linear4bit)


@cache
def _scaled_inside() -> type:
    from peft.tuners.lora.bnb import Linear4bit as cls

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs or not _is_plain(self):
            return cls.forward(self, x, *args, **kwargs)
        result = self.base_layer(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        for name in self.active_adapters:
            if name in self.lora_A:
                dropped = self.lora_dropout[name](x if autocast else x.to(self.lora_A[name].weight.dtype))
                result = add_outside(self, name, result, self.lora_A[name](dropped))
        return result

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})


def add_outside(layer: LoraLayer, name: str, result: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The frozen layer's `result` and the adapter's, from the r columns `inside` that its A has made."""
    return result + layer.lora_B[name](inside * layer.scaling[name]).to(result.dtype)


def plain_adapter(layer: LoraLayer) -> str | None:
    """The name of the one adapter that is plain LoRA and active; None if there is none, more than one, or another."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return names[0] if len(names) == 1 and _is_plain(layer) else None


def _is_plain(layer: LoraLayer) -> bool:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    odd = any(name in layer.lora_variant or layer.lora_B[name].bias is not None for name in names)
    return not (layer.disable_adapters or layer.merged or odd)
