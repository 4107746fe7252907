"""The user's function on one chunk of logits: its value, and its gradient by autograd, written over the logits."""

import itertools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from unsloth_puzzles.backprop import checks
from unsloth_puzzles.code_object import with_own_code

_EAGER_PIECES = 8  # an eager function runs on eighths of a chunk: its float32 temporaries are eighths, too
# Inductor tries block sizes: with rows so long its first guess reads them all from memory again in the second pass.
_TUNING = ("coordinate_descent_tuning", "max_autotune_pointwise")
EAGER_BYTES_PER_LOGIT = 16 / _EAGER_PIECES  # float32 copies, softmax and gradients that such a function makes


@dataclass(frozen=True)
class Arguments:
    """What the function gets beside the logits, whole or cut to the rows of a chunk.

    `labels` (rows, ...) or None, `row_args` cut alike, `shared_args` whole; `wanted` says which of row_args +
    shared_args need gradients.
    """

    labels: torch.Tensor | None
    row_args: tuple
    shared_args: tuple
    wanted: tuple[bool, ...]

    def cut(self, rows: slice | torch.Tensor) -> "Arguments":
        labels = None if self.labels is None else self.labels[rows]
        return Arguments(labels, tuple(a[rows] for a in self.row_args), self.shared_args, self.wanted)

    @property
    def all(self) -> tuple:
        return (*self.row_args, *self.shared_args)

    def leaves(self) -> tuple:
        """All of them detached, those that want gradients as leaves."""
        return tuple(
            a.detach().requires_grad_(want) if isinstance(a, torch.Tensor) else a
            for a, want in zip(self.all, self.wanted, strict=True)
        )

    def chosen(self, values: tuple) -> list[torch.Tensor]:
        return [value for value, want in zip(values, self.wanted, strict=True) if want]


@dataclass(frozen=True)
class Reduction:
    """How a chunk's value enters the loss: as it is, or (`mean`) weighted by the chunk's number of valid labels."""

    mean: bool
    ignore_index: int | None

    def weight(self, labels: torch.Tensor) -> torch.Tensor | None:
        return (labels != self.ignore_index).sum() if self.mean else None

    def contribution(self, value: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """What a chunk's `value` adds to the loss, in float32 or wider: a mean that fits 16 bits may add up to a sum
        that does not. A chunk without valid labels has no mean (0/0); it adds nothing."""
        weight, value = self.weight(labels), value.to(torch.promote_types(value.dtype, torch.float32))
        return value if weight is None else torch.where(weight > 0, value * weight, 0.0)


class EagerFunction:
    """The function as it is, run by autograd in eager mode on pieces of a chunk."""

    def __init__(self, function: Callable, reduction: Reduction):
        self.function, self.reduction = function, reduction

    def value(self, logits: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The chunk's contribution to the loss, before it is normalised: a 0-dim tensor."""
        with torch.no_grad():
            pieces = [_weighted(self.function, self.reduction, *piece) for piece in _pieces(logits, arguments)]
        return torch.stack(pieces).sum()

    def value_and_gradient(self, logits: torch.Tensor, arguments: Arguments, scale: torch.Tensor, add: Callable):
        """The value; `scale` times its gradient is written over `logits`, those of the arguments go to `add`."""
        values = []
        start = 0
        for piece, cut in _pieces(logits, arguments):
            leaf = piece.detach().requires_grad_()
            leaves = cut.leaves()
            with torch.enable_grad():
                value = _weighted(self.function, self.reduction, leaf, cut, leaves)
                inputs = [leaf, *cut.chosen(leaves)]
                scaled = value * scale
            checks.check_leaves(self.function, [value], inputs)
            gradients = _gradients(scaled, inputs, None)
            gradients = _without_nan_of_nothing(gradients, self.reduction, cut.labels)
            piece.copy_(gradients[0])
            add(start, gradients[1:])
            start += len(piece)
            values.append(value.detach())
        return torch.stack(values).sum()

    def rows(self, logits: torch.Tensor, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Per-row results, by the pieces of the backward, so that a function draws the same random numbers there."""
        found = []
        with torch.no_grad():
            for piece, cut in _pieces(logits, arguments) if len(logits) else [(logits, arguments)]:
                found.append(as_tuple(self.function(piece, cut.labels, *cut.all)))
                checks.check_rows(found[-1], len(piece), piece.numel())
        return tuple(torch.cat(results) for results in zip(*found, strict=True))

    def rows_gradient(self, logits: torch.Tensor, arguments: Arguments, upstream: tuple, add: Callable) -> None:
        """`upstream` (one per result, None where there is no gradient) times the Jacobian, over `logits`."""
        start = 0
        for piece, cut in _pieces(logits, arguments):
            stop = start + len(piece)
            leaf = piece.detach().requires_grad_()
            leaves = cut.leaves()
            with torch.enable_grad():
                results = as_tuple(self.function(leaf, cut.labels, *leaves))
            checks.check_leaves(self.function, results, [leaf, *cut.chosen(leaves)])
            kept = [
                (result, slope[start:stop])
                for result, slope in zip(results, upstream, strict=True)
                if slope is not None
            ]
            outputs = [result for result, _ in kept]
            gradients = _gradients(outputs, [leaf, *cut.chosen(leaves)], [slope for _, slope in kept])
            piece.copy_(gradients[0])
            add(start, gradients[1:])
            start = stop


class CompiledFunction(EagerFunction):
    """The same, compiled by Inductor: value and gradient of a whole chunk in one pass over the logits.

    On a GPU the compiled code writes the gradient over the logits itself (an input that it mutates). On the CPU it
    returns the gradient, since Inductor's outer-loop fusion there moves reads of an input behind its overwriting
    (seen in torch 2.11: a cross entropy that took the label's logit from its own gradient).
    """

    def __init__(self, function: Callable, reduction: Reduction):
        super().__init__(function, reduction)
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
            self._compiled[key] = torch.compile(
                with_own_code(program, f"run_{next(_numbers)}"), fullgraph=True, options=options
            )
        return self._compiled[key]


_known: "weakref.WeakKeyDictionary[Callable, dict]" = weakref.WeakKeyDictionary()


def compiled(function: Callable, reduction: Reduction) -> CompiledFunction:
    """The one `CompiledFunction` of this function object and reduction: compiled code lives as long as the function.

    A bound method, which is made anew whenever it is asked for, belongs to its object.
    """
    method = isinstance(function, types.MethodType)
    owner, key = (function.__self__, (function.__func__, reduction)) if method else (function, reduction)
    try:
        known = _known.setdefault(owner, {})
    except TypeError as error:
        kind = type(owner).__name__
        raise TypeError(f"forward_function: {kind} cannot be kept as a key ({error}); pass a function") from error
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


def _value(function, reduction, logits, labels, arguments):
    return _weighted(function, reduction, logits, Arguments(labels, arguments, (), ()), arguments)


def _value_and_gradient(function, reduction, wanted, overwrite, logits, labels, arguments, scale):
    def scaled(logits, *chosen):
        values = _merge(arguments, wanted, chosen)
        value = _weighted(function, reduction, logits, Arguments(labels, values, (), ()), values)
        return value * scale, value

    chosen = [value for value, want in zip(arguments, wanted, strict=True) if want]
    argnums = tuple(range(1 + len(chosen)))
    found, value = torch.func.grad(scaled, argnums=argnums, has_aux=True)(logits, *chosen)
    gradient, *others = _without_nan_of_nothing(found, reduction, labels)
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


def _weighted(function, reduction, logits, arguments, values=None):
    value = function(logits, arguments.labels, *(arguments.all if values is None else values))
    return reduction.contribution(value, arguments.labels)


def _without_nan_of_nothing(gradients, reduction, labels):
    """The gradients of a mean of nothing are 0/0 as well: nothing, too."""
    weight = reduction.weight(labels)
    return gradients if weight is None else [torch.where(weight > 0, gradient, 0.0) for gradient in gradients]


def _gradients(outputs, inputs, slopes) -> list[torch.Tensor]:
    """Like `autograd.grad`, with zeros for an input that the outputs do not depend on."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    recorded = [i for i, output in enumerate(outputs) if output.requires_grad]
    if not recorded:
        return [torch.zeros_like(given) for given in inputs]
    slopes = None if slopes is None else [slopes[i] for i in recorded]
    found = torch.autograd.grad([outputs[i] for i in recorded], inputs, slopes, allow_unused=True)
    return [torch.zeros_like(i) if gradient is None else gradient for i, gradient in zip(inputs, found, strict=True)]


def _pieces(logits: torch.Tensor, arguments: Arguments):
    rows = max(1, -(-len(logits) // _EAGER_PIECES))
    for start in range(0, len(logits), rows):
        stop = min(start + rows, len(logits))
        yield logits[start:stop], arguments.cut(slice(start, stop))


def _marked(logits, arguments, slopes=()):
    """The tensors of a chunk with their rows marked as dynamic: a ragged last chunk is not compiled anew."""
    cut = [logits, *([] if arguments.labels is None else [arguments.labels]), *arguments.row_args, *slopes]
    for tensor in cut:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return logits, arguments.labels, arguments.all


def _merge(values, wanted, chosen):
    replacing = iter(chosen)
    return tuple(next(replacing) if want else value for value, want in zip(values, wanted, strict=True))


def as_tuple(results) -> tuple:
    """The results of a function that may return one alone."""
    return results if isinstance(results, tuple) else tuple(results) if isinstance(results, list) else (results,)


_numbers = itertools.count()
