"""One call of the op, prepared: inputs flattened to rows, the spans of the chunks, the head and the function."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from unsloth_puzzles.backprop.arguments import Arguments, Reduction
from unsloth_puzzles.backprop.checks import check_labels, features
from unsloth_puzzles.backprop.chunks import chunk_spans
from unsloth_puzzles.backprop.compiled import CompiledFunction, VerifiedFunction, compiled_function
from unsloth_puzzles.backprop.eager import BYTES_PER_LOGIT, EagerFunction
from unsloth_puzzles.backprop.heads import Head
from unsloth_puzzles.backprop.options import Options
from unsloth_puzzles.backprop.trust import is_new

OnLogits = EagerFunction | CompiledFunction | VerifiedFunction  # of one interface, which the first describes
_BYTES_PER_LOGIT_OF_A_WHOLE = 16  # a function that projects itself: a float32 copy, its softmax, both gradients


class Operands(NamedTuple):
    """The kinds of a call's tensors, in order: the head's trained parameters, row arguments, shared arguments."""

    parameters: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class Call:
    """One call of `memory_efficient_linear`, as the loops over its chunks read it.

    Attributes:
        x: [rows, hidden], detached.
        arguments: Labels [rows, ...] or None, row arguments [rows, ...], shared arguments.
        head: The projection, with leaves in place of its trained parameters.
        user_function: As it was given.
        function: `user_function` on logits, eager or compiled.
        reduction: How a chunk's value enters the loss.
        options: As they were given.
        spans: (start, stop) of each chunk's rows.
        dtype: Of the logits.
        vocab_size: Their columns.
        differentiate: Whether any gradient is wanted.
        needs_x: Whether that of `x` is.
    """

    x: torch.Tensor
    arguments: Arguments
    head: Head
    user_function: object
    function: OnLogits
    reduction: Reduction
    options: Options
    spans: list[tuple[int, int]]
    dtype: torch.dtype
    vocab_size: int
    differentiate: bool
    needs_x: bool

    def leaf(self, start: int, stop: int) -> torch.Tensor:
        """A chunk of `x`, [stop - start, hidden], as a leaf if its gradient is wanted."""
        return self.x[start:stop].detach().requires_grad_(self.needs_x)


def prepare(
    X: torch.Tensor,
    linear: nn.Module,
    labels: torch.Tensor | None,
    function,
    options: Options,
    operands: Operands,
    tensors: tuple,
    wanted: tuple[bool, ...],
    head: Head | None = None,
) -> Call:
    """Make the `Call`.

    Args:
        X: [..., hidden].
        linear: The head.
        labels: [...] or None.
        function: The user's.
        options: Of the call.
        operands: What `tensors` are.
        tensors: The head's trained parameters, row arguments [..., *], shared arguments.
        wanted: Whether a gradient is wanted of X and of each of `tensors`.
        head: That of the forward, in a backward that goes on with it.
    """
    leading, count = X.dim() - 1, len(operands.parameters)
    rest = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in tensors[count:])
    flat = tuple(t.reshape(-1, *t.shape[leading:]) for t in rest[: operands.rows])  # [rows, *] each
    flat_labels = None if labels is None else labels.reshape(-1, *labels.shape[leading:])  # [rows, ...]
    arguments = Arguments(flat_labels, flat, rest[operands.rows :], wanted[1 + count :])
    x = X.detach().reshape(-1, X.shape[-1])  # [rows, hidden]
    if head is None:
        head = Head(linear, dict(zip(operands.parameters, tensors, strict=False)), options.accumulate_dtype)
    reduction = Reduction(options.reduction == "mean", options.ignore_index)
    vocab_size, device = _vocab_size(head, x), x.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
    whole = options.function_takes == "linear"
    spare = _BYTES_PER_LOGIT_OF_A_WHOLE if whole else 0 if options.compile else BYTES_PER_LOGIT
    return Call(
        x=x,
        arguments=arguments,
        head=head,
        user_function=function,
        function=_on_logits(function, reduction, options),
        reduction=reduction,
        options=options,
        spans=chunk_spans(options.chunk_size, x, vocab_size, dtype, dtype.itemsize + spare, 4 if whole else 1),
        dtype=dtype,
        vocab_size=vocab_size,
        differentiate=any(wanted),
        needs_x=wanted[0],
    )


def check_all_labels(call: Call) -> None:
    """Labels lie in the vocabulary, or ValueError (on a GPU an assertion on the device)."""
    check_labels(call.arguments.labels, call.vocab_size, call.options.ignore_index)


def _on_logits(function, reduction: Reduction, options: Options) -> OnLogits:
    if not options.compile:
        return EagerFunction(function, reduction)
    compiled = compiled_function(function, reduction)
    if options.check_additive and is_new(function, "compiled", options.reduction):
        return VerifiedFunction(compiled, function, options.reduction)
    if is_new(function, "leaves"):
        return VerifiedFunction(compiled, function, options.reduction, compares=False)
    return compiled


def _vocab_size(head: Head, x: torch.Tensor) -> int:
    size = features(head.linear)[1]
    if size is None:
        with torch.no_grad():
            size = head.call(None, x.new_zeros(1, x.shape[-1])).shape[-1]
    return size
