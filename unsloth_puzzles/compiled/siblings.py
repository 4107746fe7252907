"""LoRA's first product for all adapters that read the same input, in one.

    [i_q i_k i_v] = x [A_q' A_k' A_v']

A product with r columns takes as long as reading x takes. One for each adapter reads x as often, and so does the
backward, for the gradient of each A, and adds to the gradient of x each time. Together they do it once: for query, key
and value a third of the traffic and of the launches, for gate and up (`swiglu.py`) a half.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear

from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.compiled.lora import can_be_inside, plain_adapter
from unsloth_puzzles.nf4.patch import exchange_classes

_NAMES = ("q_proj", "k_proj", "v_proj")


def insides(layers: Sequence[LoraLayer], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """What the A of each layer's one plain adapter makes of x: (..., r)."""
    weights = [layer.lora_A[plain_adapter(layer)].weight for layer in layers]
    return linear(x, torch.cat(weights)).split([len(weight) for weight in weights], -1)


def share_input(model: torch.nn.Module) -> Callable[[], None]:
    """Let query, key and value of each attention in `model`, which `scale_inside` has been applied to, have their
    insides from one product; returns what undoes it. Adapters that are no plain ones stay as they are."""
    found = [module for module in model.modules() if all(hasattr(getattr(module, n, None), "inside") for n in _NAMES)]
    layers = [getattr(module, name) for module in found for name in _NAMES]
    for layer in layers:
        layer.inside = None  # from now on its own, so that nothing is compiled anew for an attribute that appears
    undo_classes = exchange_classes((module, _sharing_class(type(module))) for module in found)

    def undo() -> None:
        undo_classes()
        for layer in layers:
            del layer.inside

    return undo


@cache
def _sharing_class(cls: type) -> type:
    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        layers = [getattr(self, name) for name in _NAMES]
        if hooked_below(self) or not all(can_be_inside(layer, hidden_states) for layer in layers):
            return cls.forward(self, hidden_states, *args, **kwargs)
        for layer, inside in zip(layers, insides(layers, hidden_states), strict=True):
            layer.inside = hidden_states, inside
        try:
            return cls.forward(self, hidden_states, *args, **kwargs)
        finally:
            for layer in layers:
                layer.inside = None

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})
