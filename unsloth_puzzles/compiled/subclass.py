"""Subclasses that modules are instances of while a model is compiled.

Exchanging a module's class changes its forward and keeps its parameters, names, hooks and state dict. torch.compile
shares one graph among the modules of a class, which it would not among functions that are set on instances.
"""

import copy
import copyreg


def subclass(cls: type, name: str, **members: object) -> type:
    """Make a subclass of `cls` for `nf4.patch.exchange_classes`.

    A pickled instance is one of the class that it had before: a file must neither need this package nor hold what a
    compiler has made. A copy is an instance of the same class.

    Args:
        cls: the class of a module, perhaps such a subclass itself.
        name: the name of the subclass. Libraries that look for decoder layers do so by the name of their class.
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
