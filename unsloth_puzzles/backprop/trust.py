"""Which functions have been tried: each is held against eager mode and its own halves once, not at each step."""

import types
import weakref
from collections.abc import Callable

import torch
from torch import nn

_EMPTY = types.CellType()
_tried: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def is_new(function: Callable, *purpose: str) -> bool:
    """Whether this function is new to `purpose`. A function is known by its code and by what it holds, since a lambda
    is made anew at each step; any other callable by itself."""
    return (purpose, _held(function)) not in _tried.get(_code(function), ())


def trust(function: Callable, *purpose: str) -> None:
    """From now on it is not new."""
    _tried.setdefault(_code(function), set()).add((purpose, _held(function)))


def _code(function: Callable) -> object:
    if hasattr(function, "__code__"):
        return function.__code__
    try:
        weakref.ref(function)
        hash(function)
        return function
    except TypeError:  # a dataclass, or an object with slots
        return type(function)


def _held(function: Callable, depth: int = 4) -> tuple:
    """Return the identities by which functions of one code differ: closure, defaults, the object of a method.

    Functions that it holds are looked into as well, `depth` levels of them.
    """
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != _EMPTY]
    named = [*(getattr(function, "__kwdefaults__", None) or {}).values()]
    if not hasattr(function, "__code__"):
        named += getattr(function, "__dict__", {}).values()
    held = (*cells, *(getattr(function, "__defaults__", None) or ()), *named)
    owner = getattr(function, "__self__", None)
    return (id(owner), _trained(owner), _trained(function), *(_identity(value, depth) for value in held))


def _trained(value: object) -> tuple[bool, ...]:
    """Which parameters of a module want gradients, which may change between two steps."""
    return tuple(one.requires_grad for one in value.parameters()) if isinstance(value, nn.Module) else ()


def _identity(value: object, depth: int) -> object:
    """Equal for values that a function is not tried anew for: tensors and floats may change at each step."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.requires_grad
    if callable(value):
        return id(getattr(value, "__code__", value)), _held(value, depth - 1) if depth else ()
    return value if isinstance(value, int | str | None) else type(value)
