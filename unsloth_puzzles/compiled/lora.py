"""PEFT's LoRA with its scaling s where it is small: on the r columns between A and B.

    y = W x + B (s A x)        PEFT: W x + s (B A x)

In the backward, PEFT's order multiplies the gradient of every output by s. That product is a matrix as large as the
layer's output, written once and read twice: nothing can fuse it into the matrix products that read it. Here they read
the gradient itself. The results are the same bits if s is a power of two; other adapters can be left as they are
(`eager_rounding`).
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.bnb import Linear4bit

from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.exchange import exchange_classes, subclass


def scale_low_rank(model: torch.nn.Module, eager_rounding: bool) -> Callable[[], None]:
    """Let PEFT's LoRA layers over 4-bit linears compute as above.

    Calls that are not plain LoRA (disabled or merged adapters, adapters by row, DoRA and other variants, a bias on B)
    and calls for which hooks wait stay PEFT's.

    Args:
        model: a PEFT model, changed in place.
        eager_rounding: only where s is a power of two, so that each value is rounded as PEFT's is.

    Returns:
        A function that undoes it.
    """
    scaled = _scaled_class(eager_rounding)
    return exchange_classes((module, scaled) for module in model.modules() if type(module) is Linear4bit)


def scales_low_rank(layer: torch.nn.Module) -> bool:
    """Whether `scale_low_rank` has been applied to `layer`, so that its forward takes `low_rank`."""
    return type(layer) in map(_scaled_class, (False, True))


@cache
def _scaled_class(eager_rounding: bool) -> type:
    def forward(self, x: torch.Tensor, *args, low_rank: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """low_rank: x A' of the one active adapter, [..., r], where the caller has it already."""
        if args or kwargs or not _is_plain(self) or hooked_below(self):  # a hook on B would see other numbers
            return Linear4bit.forward(self, x, *args, **kwargs)
        y = self.base_layer(x)  # [..., out_features]
        autocast = torch.is_autocast_enabled(x.device.type)
        for name in _active(self):
            if low_rank is None:
                dropped = self.lora_dropout[name](x if autocast else x.to(self.lora_A[name].weight.dtype))
                y = add_adapter(self, name, y, self.lora_A[name](dropped))
            else:
                y = add_adapter(self, name, y, low_rank)
        return y

    return subclass(Linear4bit, "LowRankScaledLora", forward=forward, eager_rounding=eager_rounding)


def add_adapter(layer: LoraLayer, name: str, y: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
    """Add an adapter's output to the frozen layer's.

    Args:
        layer: holds the adapter.
        name: of the adapter.
        y: the frozen layer's output, (..., out_features).
        low_rank: x A', (..., r).
    """
    return y + layer.lora_B[name](low_rank * layer.scaling[name]).to(y.dtype)


def plain_adapter(layer: LoraLayer) -> str | None:
    """The name of the one adapter that is plain LoRA and active; None if there is none, more than one, or another."""
    names = _active(layer)
    return names[0] if len(names) == 1 and _is_plain(layer) else None


def takes_low_rank(layer: LoraLayer, x: torch.Tensor) -> bool:
    """Whether x A' may be computed outside of `layer`: its one adapter is plain, has no dropout before A, and computes
    in the dtype of x."""
    name = plain_adapter(layer) if isinstance(layer, LoraLayer) else None  # PEFT may have unloaded its adapters
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
