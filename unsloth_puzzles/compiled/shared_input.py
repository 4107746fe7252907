"""LoRA's first product for all adapters that read the same input, in one.

    [x A_q'  x A_k'  x A_v'] = x [A_q' A_k' A_v']

A product with r columns takes as long as reading x takes. One for each adapter reads x as often, and so does the
backward, for the gradient of each A, and adds to the gradient of x each time. Together they do it once: for query, key
and value a third of the traffic and of the launches, for gate and up (`swiglu.py`) a half.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from inspect import unwrap

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.compiled.lora import plain_adapter, scales_low_rank, takes_low_rank
from unsloth_puzzles.exchange import exchange_classes, subclass

_NAMES = ("q_proj", "k_proj", "v_proj")


def low_rank_products(layers: Sequence[LoraLayer], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """x A' of each layer's one plain adapter, (..., r), of one product."""
    weights = [layer.lora_A[plain_adapter(layer)].weight for layer in layers]
    return linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)


def share_input(model: torch.nn.Module) -> Callable[[], None]:
    """Let query, key and value of each attention in `model` have x A' from one product.

    Attentions that `scale_low_rank` has not been applied to stay as they are, and so
    do calls whose adapters are not plain ones or for which hooks wait.

    Args:
        model: a PEFT model, changed in place.

    Returns:
        A function that undoes it.
    """
    found = [module for module in model.modules() if _shares(module)]
    return exchange_classes((module, _sharing_class(type(module))) for module in found)


def _shares(module: torch.nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in _NAMES]
    code = getattr(unwrap(type(module).forward), "__code__", None)
    # `super()` in a forward takes no stand-in for the module.
    return all(map(scales_low_rank, layers)) and "__class__" not in code.co_freevars


@cache
def _sharing_class(cls: type) -> type:
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        layers = [getattr(self, name) for name in _NAMES]
        if hooked_below(self) or not all(takes_low_rank(layer, hidden_states) for layer in layers):
            return cls.forward(self, hidden_states, *args, **kwargs)
        products = low_rank_products(layers, hidden_states)
        given = [partial(_call, *each, hidden_states) for each in zip(layers, products, strict=True)]
        return cls.forward(StandIn(self, dict(zip(_NAMES, given, strict=True))), hidden_states, *args, **kwargs)

    return subclass(cls, f"SharedInput{cls.__name__}", forward=forward)


def _call(layer: LoraLayer, low_rank: torch.Tensor, shared: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`layer` of x, with its x A' if x is the input that was shared."""
    return layer(x, low_rank=low_rank) if x is shared else layer(x)


class StandIn:
    """A module but for some of its attributes: what a forward is given as `self`."""

    forward = None  # transformers compares it, to checkpoint in the outermost forward of a layer alone

    def __init__(self, module: torch.nn.Module, others: dict[str, object]):
        self._module, self._others = module, others

    def __getattr__(self, name: str):
        return self._others[name] if name in self._others else getattr(self._module, name)
