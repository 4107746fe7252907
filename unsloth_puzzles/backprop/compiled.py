"""The user's function on one chunk of logits, compiled: Inductor fuses it and its gradient into one or two passes."""

import itertools
import types
import weakref
from collections.abc import Callable
from functools import partial

import torch

from unsloth_puzzles.backprop.arguments import Arguments, Reduction, as_tuple
from unsloth_puzzles.backprop.eager import EagerFunction, weighted, without_nan_of_nothing
from unsloth_puzzles.backprop.results import check_compiled
from unsloth_puzzles.backprop.rng import RandomStates
from unsloth_puzzles.backprop.tiles import compile_for_rows
from unsloth_puzzles.backprop.trust import trust
from unsloth_puzzles.code_object import with_own_code

# Inductor tries block sizes where none are given: with rows so long its first guess may read them from memory again.
_TUNING = ("coordinate_descent_tuning", "max_autotune_pointwise")
_FEW = slice(32)  # rows that are compared with eager mode
_known: "weakref.WeakKeyDictionary[Callable, dict]" = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def compiled_function(function: Callable, reduction: Reduction) -> "CompiledFunction":
    """The one `CompiledFunction` of this function object and reduction: compiled code lives as long as the function.

    A bound method, which is made anew whenever it is asked for, belongs to its object.
    """
    method = isinstance(function, types.MethodType)
    owner, key = (function.__self__, (function.__func__, reduction)) if method else (function, reduction)
    try:
        known = _known.setdefault(owner, {})
    except TypeError as error:
        kind = type(owner).__name__
        raise TypeError(
            f"forward_function must be one that can be a key, got a {kind} ({error}); pass a function"
        ) from error
    if key not in known:
        known[key] = CompiledFunction(_Weak(function), reduction)
    return known[key]


class _Weak:
    """Calls a function without keeping it alive, so that a key of `_known` does not live in its own value."""

    def __init__(self, function: Callable):
        method = isinstance(function, types.MethodType)
        self.of_class = function.__func__ if method else None
        self.reference = weakref.ref(function.__self__ if method else function)

    def __call__(self, *arguments):
        alive = self.reference()
        return alive(*arguments) if self.of_class is None else self.of_class(alive, *arguments)


class CompiledFunction:
    """As `EagerFunction`, compiled by Inductor: value and gradient of a whole chunk in one pass over the logits.

    On a GPU the compiled code writes the gradient over the logits itself (an input that it mutates). On the CPU it
    returns the gradient, since Inductor's outer-loop fusion there moves reads of an input behind its overwriting
    (seen in torch 2.11: a cross entropy that took the label's logit from its own gradient).
    """

    def __init__(self, function: Callable, reduction: Reduction):
        self.function, self.reduction = function, reduction
        self._compiled = {}

    def value(self, logits, arguments):
        run = self._get("value", logits, arguments, partial(_value, self.function, self.reduction))
        return run(*_marked(logits, arguments))

    def value_and_gradient(self, logits, arguments, scale, add):
        program = partial(_value_and_gradient, self.function, self.reduction, arguments.wanted, logits.is_cuda)
        run = self._get("gradient", logits, arguments, program)
        value, gradient, others = run(*_marked(logits, arguments), scale)
        if gradient is not None:
            logits.copy_(gradient)
        add(0, others)
        return value

    def rows(self, logits, arguments):
        run = self._get("rows", logits, arguments, partial(_rows, self.function))
        return run(*_marked(logits, arguments))

    def rows_gradient(self, logits, arguments, upstream, add):
        present = tuple(slope is not None for slope in upstream)
        program = partial(_rows_gradient, self.function, arguments.wanted, present, logits.is_cuda)
        run = self._get(("rows gradient", present), logits, arguments, program)
        slopes = tuple(slope for slope in upstream if slope is not None)
        gradient, others = run(*_marked(logits, arguments, slopes), slopes)
        if gradient is not None:
            logits.copy_(gradient)
        add(0, others)

    def _get(self, name: object, logits: torch.Tensor, arguments: Arguments, program: Callable) -> Callable:
        # exp by the hardware's ex2 is off by 2 ulp of float32: 1/30000 of what rounding a gradient to 16 bits costs.
        fast = logits.dtype.itemsize == 2
        device = logits.device.type
        key = name, arguments.wanted, fast, logits.shape[-1], device, torch.is_autocast_enabled(device)
        if key not in self._compiled:
            options = {"use_fast_math": fast, **dict.fromkeys(_TUNING, logits.is_cuda)}
            # By a name of its own, too: another function's vocabulary would make this one's a variable.
            own = with_own_code(program, f"run_{next(_numbers)}")
            self._compiled[key] = compile_for_rows(own, options, logits)
        return self._compiled[key]


class VerifiedFunction:
    """As `CompiledFunction`, whose first gradient is held, for a few rows, against eager mode's.

    Args:
        compiled: What `compiled_function` returned.
        function: The user's, as it was given.
        purpose: Under which it is trusted afterwards.
        compares: False only looks at what the function depends on, which eager mode shows: for one that draws random
            numbers.
    """

    def __init__(self, compiled: CompiledFunction, function: Callable, purpose: str, compares: bool = True):
        self._compiled, self._eager = compiled, EagerFunction(function, compiled.reduction)
        self._purpose, self._compares, self._verified = purpose, compares, False

    def value(self, logits, arguments):
        return self._compiled.value(logits, arguments)

    def rows(self, logits, arguments):
        return self._compiled.rows(logits, arguments)

    def value_and_gradient(self, logits, arguments, scale, add):
        before = self._copy(logits)
        value = self._compiled.value_and_gradient(logits, arguments, scale, add)
        if before is not None:
            with RandomStates(logits.device).replay():
                self._eager.value_and_gradient(before, arguments.cut(_FEW), scale, _drop)
            self._compare(logits, before)
        return value

    def rows_gradient(self, logits, arguments, upstream, add):
        before = self._copy(logits)
        self._compiled.rows_gradient(logits, arguments, upstream, add)
        if before is not None:
            few = tuple(None if slope is None else slope[_FEW] for slope in upstream)
            with RandomStates(logits.device).replay():
                self._eager.rows_gradient(before, arguments.cut(_FEW), few, _drop)
            self._compare(logits, before)

    def _copy(self, logits: torch.Tensor) -> torch.Tensor | None:
        return None if self._verified else logits[_FEW].clone()

    def _compare(self, gradient: torch.Tensor, eager: torch.Tensor) -> None:
        self._verified = not self._compares or check_compiled(gradient[: len(eager)], eager)
        if self._verified and self._compares:
            trust(self._eager.function, "compiled", self._purpose)


def _drop(start, found) -> None:
    """Discard a gradient of an argument: the compiled run has added it."""


def _value(function, reduction, logits, labels, arguments):
    return weighted(function, reduction, logits, Arguments(labels, arguments, (), ()), arguments)


def _value_and_gradient(function, reduction, wanted, overwrite, logits, labels, arguments, scale):
    def scaled(logits, *chosen):
        values = _merge(arguments, wanted, chosen)
        value = weighted(function, reduction, logits, Arguments(labels, values, (), ()), values)
        return value * scale, value

    chosen = [value for value, want in zip(arguments, wanted, strict=True) if want]
    argnums = tuple(range(1 + len(chosen)))
    found, value = torch.func.grad(scaled, argnums=argnums, has_aux=True)(logits, *chosen)
    gradient, *others = without_nan_of_nothing(found, reduction, labels)
    if overwrite:
        logits.copy_(gradient)
        gradient = None
    return value, gradient, others


def _rows(function, logits, labels, arguments):
    return as_tuple(function(logits, labels, *arguments))


def _rows_gradient(function, wanted, present, overwrite, logits, labels, arguments, slopes):
    def results(logits, *chosen):
        values = as_tuple(function(logits, labels, *_merge(arguments, wanted, chosen)))
        return tuple(value for value, kept in zip(values, present, strict=True) if kept)

    chosen = [value for value, want in zip(arguments, wanted, strict=True) if want]
    _, pull_back = torch.func.vjp(results, logits, *chosen)
    gradient, *others = pull_back(slopes)
    if overwrite:
        logits.copy_(gradient)
        gradient = None
    return gradient, others


def _marked(logits, arguments, slopes=()):
    """The tensors of a chunk with their rows marked as dynamic: a ragged last chunk is not compiled anew."""
    cut = [logits, *([] if arguments.labels is None else [arguments.labels]), *arguments.row_args, *slopes]
    for tensor in cut:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return logits, arguments.labels, arguments.all


def _merge(values, wanted, chosen):
    replacing = iter(chosen)
    return tuple(next(replacing) if want else value for value, want in zip(values, wanted, strict=True))
