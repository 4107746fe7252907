"""What the user's function may return, and what its results may depend on."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from unsloth_puzzles.backprop.trust import is_new, trust


def check_scalar(value: object) -> torch.Tensor:
    """Refuse the result of an additive function unless it is a 0-dim floating tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"forward_function must return a tensor, got {type(value).__name__}")
    if value.dim() or not value.is_floating_point():
        raise ValueError(
            f"forward_function must return a 0-dim floating tensor, got shape {tuple(value.shape)}, {value.dtype}; "
            "per-row results need reduction='none'"
        )
    return value


def check_unchanged(logits: torch.Tensor) -> None:
    """Raise ValueError if the function has written to the fresh `logits` that it was given."""
    if not logits.is_inference() and logits._version:  # inference tensors have no version, and no graph either
        raise ValueError(
            "forward_function must not change the logits in place, got one that does: they are a leaf of its graph and "
            "the op's own buffer; write z = z / 2, not z.div_(2)"
        )


def check_rows(results: tuple, rows: int, logits_numel: int) -> None:
    """Refuse the results of a per-row function unless they are (rows, ...), together smaller than the logits."""
    for result in results:
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"forward_function must return tensors, got {type(result).__name__}")
        if not result.dim() or result.shape[0] != rows:
            raise ValueError(f"forward_function must return ({rows}, ...), a row each, got shape {tuple(result.shape)}")
    if rows and sum(result.numel() for result in results) >= logits_numel:
        sizes = ", ".join(str(tuple(result.shape)) for result in results)
        raise ValueError(f"forward_function must return less than the logits, which are never kept whole, got {sizes}")


def check_leaves(function: Callable, outputs: list[torch.Tensor], known: list[torch.Tensor]) -> None:
    """Raise ValueError if `outputs`, the first of this function, depend on a tensor that wants a gradient but is none
    of `known`: a parameter that the function closes over. Its gradient would be lost, for no argument brings it."""
    if not is_new(function, "leaves"):
        return
    if all(output.grad_fn is None for output in outputs):  # nothing was recorded, so nothing can be said of it
        return
    if (leaf := _unknown_leaf(outputs, known)) is not None:
        raise ValueError(
            f"forward_function must get what it differentiates as arguments, got a tensor {tuple(leaf.shape)} that "
            "requires grad and is none of them; detach it, or pass it in shared_args or row_args of "
            "memory_efficient_linear"
        )
    trust(function, "leaves")


def check_head(outputs: torch.Tensor | Sequence[torch.Tensor], known: list[torch.Tensor]) -> None:
    """Raise ValueError if what a head made depends on a tensor that wants a gradient but is none of `known`."""
    if (leaf := _unknown_leaf([outputs] if isinstance(outputs, torch.Tensor) else outputs, known)) is not None:
        raise ValueError(
            f"linear must have what it differentiates as parameters, got a tensor {tuple(leaf.shape)} that requires "
            "grad and is none of them; make it an attribute of the module, as a nn.Parameter or in a submodule"
        )


def check_buffers(head: nn.Module, versions: list[tuple[torch.Tensor, int]]) -> None:
    """Raise ValueError if the buffers of `head` are not of their `versions`: each chunk would change them once more."""
    if any(buffer._version != version for buffer, version in versions):
        raise ValueError(
            f"linear must not change its buffers in a forward, which runs once a chunk, got a {type(head).__name__} "
            "that does; call its eval(), or remove the parametrization, such as spectral_norm"
        )


def _unknown_leaf(outputs: Sequence[torch.Tensor], known: list[torch.Tensor]) -> torch.Tensor | None:
    """A leaf of the graph of `outputs` that is none of `known`."""
    waiting, seen = [output.grad_fn for output in outputs if output.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is one for one in known):
            return leaf
    return None


def check_compiled(gradient: torch.Tensor, eager: torch.Tensor) -> bool:
    """Compare the compiled code's gradient of a few rows with that of eager mode.

    Args:
        gradient: [rows, vocab], of the compiled code.
        eager: [rows, vocab].

    Returns:
        Whether that says anything: False where neither is finite, as after an overflow.

    Raises:
        RuntimeError: They differ by more than rounding.
    """
    if not (gradient.isfinite().all() or eager.isfinite().all()):
        return False
    off = (gradient.double() - eager.double()).norm()
    bound = 4 * torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 1e-4
    if not off <= bound * eager.double().norm():
        size = eager.double().norm().item()
        raise RuntimeError(
            f"forward_function must have eager mode's gradient, of norm {size:.3g}, got one {off.item():.3g} away; "
            "use compile=False (or check_additive=False if it draws random numbers)"
        )
    return True
