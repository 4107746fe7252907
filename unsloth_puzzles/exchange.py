"""Exchange the class of modules for a subclass, and take it back.

Exchanging a module's class changes its forward and keeps its parameters, names, hooks and state dict. torch.compile
shares one graph among the modules of a class, which it would not among functions that are set on instances.
"""

import copy
import copyreg
from collections.abc import Callable, Iterable
from types import MethodType

import torch


def exchange_classes(chosen: Iterable[tuple[torch.nn.Module | torch.Tensor, type]]) -> Callable[[], None]:
    """Make modules or tensors instances of other classes.

    Args:
        chosen: pairs of a module or tensor and the class it gets, a subclass of the one that it has.

    Returns:
        What gives each its former class back.
    """
    chosen = list(chosen)
    before = [(one, type(one)) for one, _ in chosen]
    for one, cls in chosen:
        _exchange(one, cls)

    def undo() -> None:
        for one, cls in before:
            _exchange(one, cls)

    return undo


def _exchange(one, cls: type) -> None:
    # accelerate keeps the bound `forward` of the class on the instance.
    kept = [key for key in ("forward", "_old_forward") if is_forward_of(type(one), vars(one).get(key))]
    one.__class__ = cls
    for key in kept:
        setattr(one, key, MethodType(cls.forward, one))


def is_forward_of(cls: type, function) -> bool:
    """Whether `function` is the `forward` of `cls`, bound to some instance."""
    return hasattr(function, "__func__") and function.__func__ is cls.forward


def subclass(cls: type, name: str, **members: object) -> type:
    """Make a subclass of a module's class, for `exchange_classes`.

    A pickled instance is one of the class that it had before: a file must neither need this package nor hold what a
    compiler has made. A copy is an instance of the same class.

    Args:
        cls: the class of a module, perhaps such a subclass itself.
        name: the name of the subclass. Some libraries look for modules by the name of their class.
        **members: what it has of its own, such as `forward`.
    """
    given = {
        "exchanged_from": original_class(cls),
        "__doc__": cls.__doc__,
        # Not of a mixin: for each attribute that is looked up, Dynamo guards every class above the instance's.
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
    }
    return type(name, (cls,), {**given, **members})


def original_class(cls: type) -> type:
    """The class that instances of `cls` had before, if `subclass` made it; else `cls`."""
    return getattr(cls, "exchanged_from", cls)


def _reduce(module, protocol: int) -> tuple:
    return copyreg._reconstructor, (module.exchanged_from, object, None), module.__getstate__()


def _deepcopy(module, memo: dict):
    twin = memo[id(module)] = object.__new__(type(module))
    vars(twin).update(copy.deepcopy(vars(module), memo))
    return twin
