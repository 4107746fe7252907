"""What is refused, and what is tried once before a function is trusted."""

import types
import weakref
from collections.abc import Callable

import torch
from torch import nn

ROWS_TRIED = 32
# What the halves of some rows may differ from the whole by, per byte of the result's dtype: the rounding of a sum.
_ADDITIVE = {2: 0.02, 4: 1e-3, 8: 1e-8}
_EMPTY = types.CellType()
_tried: "weakref.WeakKeyDictionary" = weakref.WeakKeyDictionary()


def check_inputs(hidden_states, linear, labels, forward_function, row_args, shared_args) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the shapes and types fit together."""
    if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
        kind = getattr(hidden_states, "dtype", type(hidden_states).__name__)
        raise TypeError(f"hidden_states: got {kind}, need a tensor of a floating dtype")
    if hidden_states.dim() < 2:
        raise ValueError(f"hidden_states: got shape {tuple(hidden_states.shape)}, need (..., rows, hidden)")
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear: got {type(linear).__name__}, need a torch.nn.Module")
    if not callable(forward_function):
        raise TypeError(f"forward_function: got {type(forward_function).__name__}, need a function")
    for name, values in (("row_args", row_args), ("shared_args", shared_args)):
        if not isinstance(values, tuple | list):
            raise TypeError(f"{name}: got {type(values).__name__}, need a tuple")
    leading = hidden_states.shape[:-1]
    for name, value in (("labels", labels), *((f"row_args[{i}]", value) for i, value in enumerate(row_args))):
        if name == "labels" and value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, need a tensor")
        if value.shape[: len(leading)] != leading:
            need = f"{tuple(leading)} first, as hidden_states {tuple(hidden_states.shape)} has"
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, need {need}")
        if value.device != hidden_states.device:
            raise ValueError(f"{name}: got device {value.device}, need {hidden_states.device}, as hidden_states has")
    if labels is not None and labels.requires_grad:
        raise ValueError("labels: got a tensor that requires grad; pass differentiable targets in row_args")
    width = features(linear)[0]
    if width is not None and width != hidden_states.shape[-1]:
        raise ValueError(f"hidden_states: got hidden size {hidden_states.shape[-1]}, need {width}, as linear has")
    weight = getattr(linear, "weight", None)
    plain = isinstance(linear, nn.Linear) and type(weight) in (torch.Tensor, nn.Parameter)
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    if plain and not autocast and weight.is_floating_point() and weight.dtype != hidden_states.dtype:
        raise ValueError(f"hidden_states: got {hidden_states.dtype}, need {weight.dtype}, as linear.weight has")


def features(linear: nn.Module) -> tuple[int | None, int | None]:
    """(in, out) features as `linear` names them, (None, None) where it names none or its weight has them swapped.

    PEFT makes the tied head's copy of embeddings (`ensure_weight_tying`) with the attributes of the embeddings.
    """
    named = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
    if not all(isinstance(size, int) for size in named):
        return None, None
    weight = getattr(linear, "weight", None)
    dense = isinstance(weight, torch.Tensor) and weight.is_floating_point()
    return (None, None) if dense and weight.shape != named[::-1] else named


def check_labels(labels: torch.Tensor | None, vocab_size: int, ignore_index: int | None) -> None:
    """Integer labels lie in [0, vocab_size) or equal `ignore_index`; with `ignore_index` None they are not looked at.

    On the CPU a ValueError. On a GPU an assertion on the device, which names the labels and makes nothing wait.
    """
    if ignore_index is None or labels is None or labels.is_floating_point() or labels.dtype == torch.bool:
        return
    fit = (((labels >= 0) & (labels < vocab_size)) | (labels == ignore_index)).all()
    need = f"0 to {vocab_size - 1}, or ignore_index ({ignore_index})"
    if labels.is_cuda:
        torch._assert_async(fit, f"labels: need {need}")
    elif not fit:
        outside = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
        raise ValueError(f"labels: got {outside.flatten()[0].item()}, need {need}")


def check_scalar(value: object) -> torch.Tensor:
    """What an additive function must return: a 0-dim floating tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"forward_function: returned {type(value).__name__}, need a tensor")
    if value.dim() or not value.is_floating_point():
        raise ValueError(
            f"forward_function: returned shape {tuple(value.shape)}, {value.dtype}; need a 0-dim floating tensor, "
            "or reduction='none' for per-row results"
        )
    return value


def check_unchanged(logits: torch.Tensor) -> None:
    """Raise ValueError if the function has written to the fresh `logits` that it was given."""
    if not logits.is_inference() and logits._version:  # inference tensors have no version, and no graph either
        raise ValueError(
            "forward_function: changes the logits in place, but they are a leaf of its graph and the op's own buffer; "
            "write z = z / 2, not z.div_(2)"
        )


def check_rows(results: tuple, rows: int, logits_numel: int) -> None:
    """What a per-row function must return: tensors (rows, ...) that are together smaller than the logits."""
    for result in results:
        if not isinstance(result, torch.Tensor):
            raise TypeError(f"forward_function: returned {type(result).__name__}, need tensors")
        if not result.dim() or result.shape[0] != rows:
            raise ValueError(f"forward_function: returned shape {tuple(result.shape)}, need ({rows}, ...): a row each")
    if rows and sum(result.numel() for result in results) >= logits_numel:
        sizes = ", ".join(str(tuple(result.shape)) for result in results)
        raise ValueError(f"forward_function: returned {sizes}, as large as the logits that must never be kept whole")


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
    """What makes one function of a code differ from another: closure, defaults, the object of a method.

    Functions that it holds are looked into as well, `depth` levels of them.
    """
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != _EMPTY]
    named = [*(getattr(function, "__kwdefaults__", None) or {}).values()]
    if not hasattr(function, "__code__"):
        named += getattr(function, "__dict__", {}).values()
    held = (*cells, *(getattr(function, "__defaults__", None) or ()), *named)
    return (id(getattr(function, "__self__", None)), *(_identity(value, depth) for value in held))


def _identity(value: object, depth: int) -> object:
    """Equal for values that a function is not tried anew for: tensors and floats may change at each step."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.requires_grad
    if callable(value):
        return id(getattr(value, "__code__", value)), _held(value, depth - 1) if depth else ()
    return value if isinstance(value, int | str | None) else type(value)


def check_leaves(function: Callable, outputs: list[torch.Tensor], known: list[torch.Tensor]) -> None:
    """Raise ValueError if `outputs`, the first of this function, depend on a tensor that wants a gradient but is none
    of `known`: a parameter that the function closes over. Its gradient would be lost, for no argument brings it."""
    if not is_new(function, "leaves"):
        return
    waiting, seen = [output.grad_fn for output in outputs if output.grad_fn is not None], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions if following is not None]
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is one for one in known):
            raise ValueError(
                f"forward_function: uses a tensor of shape {tuple(leaf.shape)} that requires grad and is none of its "
                "arguments, so it would get no gradient; pass it in shared_args (or row_args), or detach it"
            )
    trust(function, "leaves")


def check_compiled(gradient: torch.Tensor, eager: torch.Tensor) -> None:
    """Raise RuntimeError unless the compiled code's gradient of a few rows is, but for rounding, that of eager mode."""
    off = (gradient.double() - eager.double()).norm()
    bound = 4 * torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 1e-4
    if not off <= bound * eager.double().norm():
        size = eager.double().norm().item()
        raise RuntimeError(
            f"forward_function: compiled, its gradient is {off.item():.3g} away from eager mode's, of norm {size:.3g}; "
            "use compile=False (or check_additive=False if it draws random numbers)"
        )


def rows_to_try(labels: torch.Tensor | None, rows: int, ignore_index: int | None, device) -> torch.Tensor:
    """Indices of `ROWS_TRIED` rows: three in four have a label that counts, the rest (in the second half) have not.

    So a function that divides by the wrong number is seen, also where the first rows are all a prompt's.
    """
    if labels is None or ignore_index is None or labels.is_floating_point():
        return torch.arange(min(rows, ROWS_TRIED), device=device)
    valid = (labels != ignore_index).reshape(rows, -1).any(1)
    most = 3 * ROWS_TRIED // 4
    counted, ignored = valid.nonzero()[:, 0][:most], (~valid).nonzero()[:, 0][: ROWS_TRIED - most]
    return torch.cat([counted, ignored]) if len(counted) > 1 else counted[:0]


def check_additive(
    evaluate: Callable[[int, int], tuple[torch.Tensor, ...]], rows: int, additive: bool, dtype: torch.dtype
) -> bool:
    """Compare `evaluate(0, n)` with the two halves: their sum, or (`additive` False) their rows one after the other.

    Raises ValueError if they differ by more than rounding. Returns whether they were worth comparing: results that are
    themselves no more than rounding, such as a divergence of equals, say nothing of the function. `evaluate` must take
    the same logits each time, so that no other tiling of a matrix product gets in between. This is the one place that
    waits for the device.
    """
    half, itemsize = rows // 2, dtype.itemsize
    whole, first, second = (evaluate(*span) for span in ((0, rows), (0, half), (half, rows)))
    telling = True
    for together, a, b in zip(whole, first, second, strict=True):
        if not together.is_floating_point():
            continue
        tolerance = _ADDITIVE[min(itemsize, together.dtype.itemsize)]
        parts = a + b if additive else torch.cat([a, b])
        size = (a.abs() + b.abs() if additive else parts.abs()).double().nan_to_num().max()
        off = (together - parts).abs().double().nan_to_num().max()
        finest = min(torch.finfo(together.dtype).eps, torch.finfo(torch.float32).eps)
        if off > tolerance * size and size <= rows * finest:
            telling = False
        elif off > tolerance * size:
            found = f"{off.item():.3g} away from its halves' {'sum' if additive else 'rows'}, of size {size.item():.3g}"
            raise ValueError(
                f"forward_function: a chunk of {rows} rows gives a result {found}: it is not "
                f"{'additive over rows' if additive else 'computed row by row'} (or draws random numbers: then pass "
                "check_additive=False). A mean needs reduction='mean' or a sum with a normalizer"
            )
    return telling
