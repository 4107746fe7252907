"""Decoder layers and the final norm as subclasses whose forward is compiled."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from unsloth_puzzles.attention.interface import Mask
from unsloth_puzzles.attention.models import LENGTHS, check_lengths
from unsloth_puzzles.compiled.checks import uses
from unsloth_puzzles.compiled.hooks import hidden, hooked_below, search
from unsloth_puzzles.compiled.shared_input import StandIn
from unsloth_puzzles.compiled.unread import added_mlp, is_unread
from unsloth_puzzles.compiled.variants import Variants, mark
from unsloth_puzzles.exchange import exchange_classes, subclass
from unsloth_puzzles.kv_cache import CACHE_NAMES, given_cache


def compile_layers(layers: Sequence[torch.nn.Module], options: dict[str, object]) -> Callable[[], None]:
    """Let decoder layers run compiled: one function for all layers of a class that are alike (see `Variants`).

    Calls with a KV cache run as before. So does a layer with hooks inside for as long as they are there, with a
    warning.

    Args:
        layers: of transformers, changed in place.
        options: Inductor's.

    Returns:
        A function that undoes it.
    """
    classes, chosen = {}, []
    for layer in layers:
        kind = type(layer), added_mlp(layer)
        if kind not in classes:
            classes[kind] = _compiled_layer(*kind, uses(layer, "position_ids"), options)
        chosen.append((layer, classes[kind]))
    return exchange_classes(chosen)


def compile_norm(norm: torch.nn.Module, options: dict[str, object]) -> Callable[[], None]:
    """Let the final norm run compiled, but for calls in which hooks inside wait.

    Args:
        norm: changed in place.
        options: Inductor's.

    Returns:
        A function that undoes it.
    """
    cls = type(norm)
    variants = Variants(cls.forward, "norm", options)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return cls.forward(self, hidden_states) if hooked_below(self) else variants(self, hidden_states)

    return exchange_classes([(norm, subclass(cls, f"Compiled{cls.__name__}", forward=forward))])


def _compiled_layer(cls: type, added: str | None, takes_positions: bool, options: dict[str, object]) -> type:
    variants = Variants(cls.forward, cls.__name__, options)
    unread = variants if added is None else Variants(_without_output(cls, added), f"{cls.__name__}_again", options)
    # Arguments that the mask or the embeddings already cover, or that concern only the layer's caller, are dropped,
    # because compiled code would have a guard on each.
    unused = ["use_cache", *CACHE_NAMES, "output_hidden_states", *LENGTHS]
    if not takes_positions:
        unused.append("position_ids")

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:  # [batch, length, hidden]
        if given_cache(kwargs) is not None:
            if self.training and torch.is_grad_enabled():
                text = "a call with a KV cache is not compiled; pass use_cache=False"
                warnings.warn(f"use_cache: {text}", stacklevel=2)
            return cls.forward(self, hidden_states, *args, **kwargs)
        place, idle = search(self)
        if place is not None:
            warnings.warn(f"hooks: on {place}; meanwhile {cls.__name__} is not compiled", stacklevel=2)
            return cls.forward(self, hidden_states, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, Mask):
            raise ValueError(
                f"attention_mask must be 2-D (padding at the ends of rows) or left to position_ids, got "
                f"{type(mask).__name__}"
            )
        check_lengths(mask, kwargs)
        kwargs = {name: given for name, given in kwargs.items() if name not in unused}
        for tensor in (*(kwargs.get("position_embeddings") or ()), kwargs.get("position_ids")):
            if tensor is not None:
                mark(tensor)
        with hidden(idle) if idle else nullcontext():
            return (unread if is_unread(self) else variants)(self, hidden_states, *args, **kwargs)

    # accelerate, FSDP and PEFT look for decoder layers by the name of their class (`_no_split_modules`).
    return subclass(cls, cls.__name__, forward=forward)


def _without_output(cls: type, mlp: str) -> Callable:
    """The forward of a layer that only adds the output of its `mlp`, for its graph alone."""

    def forward(self, *args, **kwargs):
        parts = {mlp: partial(getattr(self, mlp), unread=True)}
        return cls.forward(StandIn(self, parts), *args, **kwargs)

    return forward
