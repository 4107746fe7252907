"""Compiled functions of a class of modules: one for all lengths, and another for what is no number."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer

from unsloth_puzzles.attention.interface import Mask
from unsloth_puzzles.code_object import with_own_code


class Variants:
    """`forward` of a class of modules, compiled once for each answer to the questions below that a call gives.

    Each has a code object of its own: Dynamo keeps compiled code by it, allows eight, and tries them in turn.
    """

    def __init__(self, forward: Callable, name: str, options: dict):
        self.forward, self._name, self._options = forward, name, options
        self._compiled: dict[tuple, Callable] = {}
        self._adapted: WeakKeyDictionary[torch.nn.Module, list[LoraLayer]] = WeakKeyDictionary()

    def __call__(self, module: torch.nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        mark(hidden_states)
        key = (
            torch.is_grad_enabled(),
            hidden_states.requires_grad,  # the first layer's, the embeddings, are not trained
            module.training,
            torch.is_autocast_enabled(hidden_states.device.type),
            _ones(hidden_states, *(kwargs.get("position_embeddings") or ())),
            _kind(kwargs.get("attention_mask"), hidden_states.shape[1]),
            self._adapters(module),
        )
        if key not in self._compiled:
            named = (self._name, "" if key[0] else "_no_grad", "_first" if key[0] and not key[1] else "")
            own = with_own_code(self.forward, "".join(named))  # other users of the class keep theirs
            self._compiled[key] = torch.compile(own, fullgraph=True, options=self._options)
        return self._compiled[key](module, hidden_states, *args, **kwargs)

    def _adapters(self, module: torch.nn.Module) -> tuple:
        """Which adapters `module` computes with, and what of them is no tensor."""
        if module not in self._adapted:
            self._adapted[module] = [part for part in module.modules() if isinstance(part, LoraLayer)]
        return tuple(map(_adapter, self._adapted[module]))


def _adapter(layer: LoraLayer) -> tuple | None:
    if layer.disable_adapters:
        return None
    names = tuple(layer.active_adapters)
    return names, tuple(layer.merged_adapters), *map(layer.r.get, names), *map(layer.scaling.get, names)


def _ones(*tensors: torch.Tensor) -> tuple:
    """Which batch and length are 1: a constant to the compiler. That of positions is, unless documents are packed."""
    return tuple(size == 1 for tensor in tensors for size in tensor.shape[:2])


def _kind(mask: Mask | None, length: int) -> tuple | None:
    """What of a mask is no tensor, and of the length no variable."""
    if mask is None:
        return None
    parts = mask.data if isinstance(mask.data, tuple) else (mask.data,)
    return mask.backend.name, length < mask.backend.splits_at, mask.pattern, tuple(type(part) for part in parts)


def mark(tensor: torch.Tensor) -> None:
    """Batch and length vary; a size of 1 stays a constant, as the compiler has it."""
    torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
