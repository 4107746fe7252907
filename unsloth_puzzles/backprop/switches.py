"""What a module is switched to: training or evaluation, and which of PEFT's adapters it uses, with which scale."""

from collections.abc import Iterable

from torch import nn

# Of PEFT's `BaseTunerLayer`, its LoRA layers and wrappers, and of `nn.Dropout`.
_NAMES = ("training", "p", "scaling", "merged_adapters", "_active_adapter", "_disable_adapters")


def switches(modules: Iterable[nn.Module]) -> list[tuple[object, ...]]:
    """The settings of `modules` that decide what they compute and that are no tensors, to be compared with others.

    A forward that is repeated in the backward repeats nothing else if one of them has changed since.
    """
    found = []
    for module in modules:
        own = vars(module)
        if "scaling" in own or "merged_adapters" in own or "_active_adapter" in own or "_disable_adapters" in own:
            found.append(tuple(_setting(module, name) for name in _NAMES))
        else:  # most modules; a layer's backward waits for this
            found.append((module.training, _plain(own.get("p"))))
    return found


def _setting(module: nn.Module, name: str) -> object:
    value = vars(module).get(name)
    if value is None:
        value = getattr(type(module), name, None)  # PEFT's defaults are the class's
    if name == "_active_adapter":  # one by name, or several
        return (value,) if isinstance(value, str) else tuple(value or ())
    if isinstance(value, dict):
        return tuple((key, _plain(one)) for key, one in value.items())
    return tuple(value) if isinstance(value, list) else _plain(value)


def _plain(value: object) -> object:
    """Itself, or which object it is: tensors are not compared."""
    return value if value is None or isinstance(value, int | float | str) else id(value)
