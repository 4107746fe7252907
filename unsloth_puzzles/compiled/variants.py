"""Compiled functions of a class of modules: one for all lengths, and another for each compile key."""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from peft.tuners.lora import LoraLayer

from unsloth_puzzles.attention.interface import Mask
from unsloth_puzzles.code_object import with_own_code


class CompileKey(NamedTuple):
    """The facts of a call, beside tensors and lengths, on which its compiled code depends."""

    grad_enabled: bool
    input_requires_grad: bool  # the first layer's input, the embeddings, is not trained
    training: bool
    autocast: bool
    ones: tuple[bool, ...]  # which batch sizes and lengths are 1, a constant to the compiler
    mask: tuple | None  # its non-tensor part
    adapters: tuple  # those that are active, and their non-tensor part


class Variants:
    """`forward` of a class of modules, compiled once for each compile key.

    Each has a code object of its own: Dynamo keeps compiled code by it, allows eight, and tries them in turn.
    """

    def __init__(self, forward: Callable, name: str, options: dict[str, object]):
        """
        Args:
            forward: takes a module and its hidden states, (batch, length, hidden).
            name: of the code objects, before "_first" if the hidden states want no gradient, "_no_grad" without any.
            options: Inductor's.
        """
        self._forward, self._name, self._options = forward, name, options
        self._compiled: dict[CompileKey, Callable] = {}
        # References are weak, because FSDP2 keeps each class that it has sharded, and so this object, to the end.
        self._adapted: WeakKeyDictionary[torch.nn.Module, list[ref[LoraLayer]]] = WeakKeyDictionary()

    def __call__(self, module: torch.nn.Module, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        mark(hidden_states)
        key = CompileKey(
            grad_enabled=torch.is_grad_enabled(),
            input_requires_grad=hidden_states.requires_grad,
            training=module.training,
            autocast=torch.is_autocast_enabled(hidden_states.device.type),
            # Positions have one row, unless documents are packed.
            ones=_ones(hidden_states, *(kwargs.get("position_embeddings") or ())),
            mask=_mask_key(kwargs.get("attention_mask"), hidden_states.shape[1]),
            adapters=tuple(map(_adapter_key, self._adapters(module))),
        )
        if key not in self._compiled:
            own = with_own_code(self._forward, self._name + _suffix(key))  # other users of the class keep theirs
            self._compiled[key] = torch.compile(own, fullgraph=True, options=self._options)
        return self._compiled[key](module, hidden_states, *args, **kwargs)

    def _adapters(self, module: torch.nn.Module) -> list[LoraLayer]:
        if module not in self._adapted:
            self._adapted[module] = [ref(part) for part in module.modules() if isinstance(part, LoraLayer)]
        return [part() for part in self._adapted[module]]


def mark(tensor: torch.Tensor) -> None:
    """Batch and length vary; a size of 1 stays a constant, as the compiler has it."""
    torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))


def _suffix(key: CompileKey) -> str:
    if not key.grad_enabled:
        return "_no_grad"
    return "" if key.input_requires_grad else "_first"


def _ones(*tensors: torch.Tensor) -> tuple[bool, ...]:
    return tuple(size == 1 for tensor in tensors for size in tensor.shape[:2])


def _mask_key(mask: Mask | None, length: int) -> tuple | None:
    """The non-tensor part of a mask, and on which side of its backend's split the length is."""
    if mask is None:
        return None
    parts = mask.data if isinstance(mask.data, tuple) else (mask.data,)
    return mask.backend.name, length < mask.backend.splits_at, mask.pattern, tuple(type(part) for part in parts)


def _adapter_key(layer: LoraLayer) -> tuple | None:
    if layer.disable_adapters:
        return None
    names = tuple(layer.active_adapters)
    return names, tuple(layer.merged_adapters), *map(layer.r.get, names), *map(layer.scaling.get, names)
