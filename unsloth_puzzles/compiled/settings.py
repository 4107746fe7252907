"""What is set for a compilation: Inductor's options, and the settings of the process."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as fx_config

from unsloth_puzzles.compiled import autotune

# A step can do without some launches and some of the host's time. Inductor's check of the sizes of all inputs and
# results, 125 of them a layer, is a fifth of that time. Combined kernels do what does not depend on one another, such
# as casting the adapters of a layer, in one launch: 4 of 106 ms a step (H200, 4 x 2048).
_OPTIONS = {"size_asserts": False, "combo_kernels": True}


def inductor_options(*, eager_rounding: bool, max_autotune: bool) -> dict[str, object]:
    """Inductor's options for layers and norm; the arguments are those of `compile_qlora`."""
    # What is fused behind a product of Triton's gets its float32 sums, which eager mode would have rounded.
    rounding = {"emulate_precision_casts": eager_rounding, "epilogue_fusion": not eager_rounding}
    return {**_OPTIONS, **rounding, **(autotune.OPTIONS if max_autotune else {})}


@dataclass
class _Active:
    wanted: dict[str, object]
    products: list[autotune.Product]
    restore: ExitStack
    models: int = 0


_active: _Active | None = None  # the process's: what compiled models share


def set_process(
    activation_memory_budget: float, max_autotune: bool
) -> tuple[list[autotune.Product], Callable[[], None]]:
    """Set what holds for the whole process while a model is compiled.

    The first of several models sets it and the last restores it, in whatever order they are undone.

    Args:
        activation_memory_budget: of Inductor's partitioner, above 0, at most 1.
        max_autotune: let Triton's matrix products compete.

    Returns:
        The list of products that max-autotune fills, and a function that undoes it.

    Raises:
        ValueError: another model is compiled with other values.
    """
    global _active
    wanted = {"activation_memory_budget": activation_memory_budget, "max_autotune": max_autotune}
    if _active is None:
        _active = _set(wanted)
    for name, value in wanted.items():
        if value != _active.wanted[name]:
            raise ValueError(
                f"{name} must be {_active.wanted[name]}, that of a model which is compiled already, got {value}; "
                "undo that model first"
            )
    _active.models += 1
    return _active.products, _leave


def _set(wanted: dict[str, object]) -> _Active:
    with ExitStack() as stack:
        stack.enter_context(functorch_config.patch(activation_memory_budget=wanted["activation_memory_budget"]))
        stack.enter_context(fx_config.patch(use_duck_shape=False))
        # Autograd has a thread for a GPU. A step's Python takes 102 to 120 ms of the host's time if the backward
        # runs there, 94 and steadily so in the thread that calls it (H200, 4 x 64 tokens, with checkpointing).
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        products = stack.enter_context(autotune.triton_competes()) if wanted["max_autotune"] else []
        return _Active(wanted, products, stack.pop_all())


def _leave() -> None:
    global _active
    _active.models -= 1
    if _active.models == 0:
        active, _active = _active, None
        active.restore.close()
