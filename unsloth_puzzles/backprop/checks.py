"""What the public functions refuse of their inputs."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def check_inputs(hidden_states, linear, labels, forward_function, row_args, shared_args) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the shapes and types fit together."""
    if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
        kind = getattr(hidden_states, "dtype", type(hidden_states).__name__)
        raise TypeError(f"hidden_states must be a tensor of a floating dtype, got {kind}")
    if hidden_states.dim() < 2:
        raise ValueError(f"hidden_states must have shape (..., rows, hidden), got {tuple(hidden_states.shape)}")
    if not isinstance(linear, nn.Module):
        raise TypeError(f"linear must be a torch.nn.Module, got {type(linear).__name__}")
    if not callable(forward_function):
        raise TypeError(f"forward_function must be a function, got {type(forward_function).__name__}")
    for name, values in (("row_args", row_args), ("shared_args", shared_args)):
        if not isinstance(values, tuple | list):
            raise TypeError(f"{name} must be a tuple, got {type(values).__name__}")
    for i, value in enumerate(shared_args):
        inside = [] if isinstance(value, torch.Tensor) else tree_leaves(value)
        if any(isinstance(one, torch.Tensor) and one.requires_grad for one in inside):
            raise ValueError(
                f"shared_args[{i}] must be a tensor to get a gradient, got a {type(value).__name__} with one that "
                "requires grad; pass that tensor itself, or detach it"
            )
    leading = hidden_states.shape[:-1]
    for name, value in (("labels", labels), *((f"row_args[{i}]", value) for i, value in enumerate(row_args))):
        if name == "labels" and value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.shape[: len(leading)] != leading:
            need = f"{tuple(leading)}, as that of hidden_states {tuple(hidden_states.shape)} does"
            raise ValueError(f"{name} must have a shape that begins with {need}, got {tuple(value.shape)}")
        if value.device != hidden_states.device:
            raise ValueError(f"{name} must be on {hidden_states.device} with hidden_states, got {value.device}")
    if labels is not None and labels.requires_grad:
        raise ValueError(
            "labels must not require grad, got a tensor that does; pass differentiable targets in row_args"
        )
    width = features(linear)[0]
    if width is not None and width != hidden_states.shape[-1]:
        raise ValueError(f"hidden_states must have the hidden size of linear, {width}, got {hidden_states.shape[-1]}")
    weight = getattr(linear, "weight", None)
    plain = isinstance(linear, nn.Linear) and type(weight) in (torch.Tensor, nn.Parameter)
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    if plain and not autocast and weight.is_floating_point() and weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"hidden_states must have the dtype of linear.weight, {weight.dtype}, got {hidden_states.dtype}"
        )


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
        torch._assert_async(fit, f"labels must be {need}")
    elif not fit:
        outside = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
        raise ValueError(f"labels must be {need}, got {outside.flatten()[0].item()}")


def check_ignore_index(function: Callable, ignore_index: int) -> None:
    """Raise ValueError if a function ignores another label than the one that is not counted.

    Its value and the number of labels by which it is divided would be of different rows.
    """
    for own in _ignored_by(function):
        if isinstance(own, int) and own != ignore_index:
            raise ValueError(
                f"forward_function must ignore the label that does not count, ignore_index = {ignore_index}, got one "
                f"that ignores {own}"
            )


def _ignored_by(function: Callable) -> Iterator[object]:
    """The values of `ignore_index` of a function, of what `functools.partial` binds to it, and of a module."""
    yield getattr(function, "ignore_index", None)
    bound = (function.func, function.args, function.keywords) if isinstance(function, partial) else (function, (), {})
    try:
        given = inspect.signature(bound[0]).bind_partial(*bound[1], **bound[2])
    except (TypeError, ValueError):  # a builtin
        return
    given.apply_defaults()
    yield given.arguments.get("ignore_index")
    for one in bound[1]:
        if callable(one):
            yield from _ignored_by(one)
