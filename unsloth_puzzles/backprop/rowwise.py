"""Results row by row: computed chunk by chunk, and once more in the backward, but for the logits that were kept."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from unsloth_puzzles.backprop.arguments import Arguments, as_tuple
from unsloth_puzzles.backprop.call import Call, Operands, prepare
from unsloth_puzzles.backprop.chunks import kept_bytes
from unsloth_puzzles.backprop.gradients import Gradients
from unsloth_puzzles.backprop.heads import Head
from unsloth_puzzles.backprop.options import Options
from unsloth_puzzles.backprop.results import check_leaves, check_rows
from unsloth_puzzles.backprop.rng import RandomStates
from unsloth_puzzles.backprop.saved_tensors import no_saved_tensor_hooks
from unsloth_puzzles.backprop.switches import switches


@dataclass
class KeptLogits:
    """The logits and random states that the forward keeps for the backward.

    Attributes:
        states: Of the random number generators, by chunk, and by (chunk, "kept") behind its projection.
        head: Whose leaves the graphs of the kept logits end in; None if none were kept.
        chunks: By number: its rows of x, their logits with the graph, and the logits' memory.
    """

    states: RandomStates
    head: Head | None = None
    chunks: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def take(self) -> "KeptLogits":
        """All of it, of which only the states stay here."""
        taken = KeptLogits(self.states, self.head, self.chunks)
        self.head, self.chunks = None, {}
        return taken


def row_by_row(
    call: Call,
    X: torch.Tensor,
    linear: nn.Module,
    labels: torch.Tensor | None,
    operands: Operands,
    tensors: tuple,
    wanted: tuple[bool, ...],
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The function's results, [..., *] each; the arguments are those of `prepare`, and what it made of them."""
    device_type = X.device.type
    autocast = {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }
    constants = tuple(None if isinstance(value, torch.Tensor) else value for value in tensors)
    again = _Again(linear, call.user_function, call.options, operands, constants, wanted, autocast)
    results = _RowByRow.apply(call, again, X, labels, *tensors)
    return results[0] if len(results) == 1 else results


class _Again(NamedTuple):
    """The part of a call, beside the saved tensors, by which the backward does the forward again."""

    linear: nn.Module
    function: Callable
    options: Options
    operands: Operands
    constants: tuple  # the operands that are no tensors, None elsewhere
    wanted: tuple[bool, ...]
    autocast: dict


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, again, X, labels, *tensors):
        ctx.set_materialize_grads(False)
        results, ctx.kept = row_results(call)
        ctx.switches = None if len(ctx.kept.chunks) == len(call.spans) else switches(again.linear.modules())
        results = tuple(result.view(*X.shape[:-1], *result.shape[1:]) for result in results)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        # The frozen parameters only so that autograd notices if they change before the backward.
        frozen = [value for value in again.linear.parameters() if not value.requires_grad]
        ctx.save_for_backward(X, labels, *(t if isinstance(t, torch.Tensor) else None for t in tensors), *frozen)
        ctx.again = again
        return results

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph must be False, got True: the gradient has no derivative")
        linear, function, options, operands, constants, wanted, autocast = ctx.again
        if ctx.switches not in (None, switches(linear.modules())):
            raise RuntimeError(
                f"linear must be as in its forward, which the backward repeats, got a {type(linear).__name__} that was "
                "switched since between train() and eval() or to other adapters or scales; call backward() before"
            )
        X, labels, *saved = ctx.saved_tensors
        # zip ends with `constants`: what was saved behind are the frozen parameters
        tensors = tuple(other if given is None else given for given, other in zip(saved, constants, strict=False))
        # A graph that is kept may be walked again: then what the forward kept has to stay.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        kept = KeptLogits(ctx.kept.states) if retained else ctx.kept.take()
        leading = X.dim() - 1
        upstream = [None if u is None else u.reshape(-1, *u.shape[leading:]) for u in upstream]  # [rows, *]
        with torch.autocast(**autocast), no_saved_tensor_hooks():
            call = prepare(X, linear, labels, function, options, operands, tensors, wanted, kept.head)
            gradients = row_gradients(call, upstream, kept)
        (of_x, _), of_arguments = gradients.results(X.shape[:-1], call.arguments, scaled=False)
        of_parameters = call.head.results(tensors[: len(operands.parameters)], scaled=False)
        return None, None, of_x, None, *(gradient for gradient, _ in [*of_parameters, *of_arguments])


def row_results(call: Call) -> tuple[list[torch.Tensor], KeptLogits]:
    """The results [rows, ...] of the function over all chunks."""
    kept = KeptLogits(RandomStates(call.x.device))
    first_kept = _first_kept(call)
    whole: list[torch.Tensor] = []
    for i, (start, stop) in enumerate(call.spans or [(0, 0)]):
        kept.states.record(i)
        arguments = call.arguments.cut(slice(start, stop))
        if first_kept <= i < len(call.spans):
            x = call.leaf(start, stop)  # [chunk, hidden]
            kept.head = call.head
            kept.chunks[i] = x, *call.head.project(x, call.vocab_size, record=True)
            kept.states.record((i, "kept"))  # what the head drew (dropout) is not drawn again
            results = call.function.rows(kept.chunks[i][-1], arguments)
        else:
            with torch.no_grad():
                results = _results(call, call.x[start:stop], arguments)
        check_rows(results, stop - start, (stop - start) * call.vocab_size)
        whole = whole or [result.new_empty(len(call.x), *result.shape[1:]) for result in results]
        for target, result in zip(whole, results, strict=True):
            target[start:stop] = result
    return whole, kept


def row_gradients(call: Call, upstream: list[torch.Tensor | None], kept: KeptLogits) -> Gradients:
    """Upstream gradients, [rows, ...] or None for each result, times the Jacobian."""
    gradients = Gradients(call.x if call.needs_x else None, call.arguments)
    if all(slope is None for slope in upstream):
        return gradients
    with kept.states.replay() as at:
        # Kept chunks first, since they hold memory; else in order, for Inductor tunes for the first's size.
        for i in sorted(range(len(call.spans)), key=lambda i: i not in kept.chunks):
            start, stop = call.spans[i]
            chunk = kept.chunks.pop(i, None)
            at(i if chunk is None else (i, "kept"))
            slopes = tuple(None if u is None else u[start:stop] for u in upstream)  # [chunk, ...]
            arguments = call.arguments.cut(slice(start, stop))
            chunk = chunk or (call.leaf(start, stop),)
            if call.options.function_takes == "logits":
                _rows_by_logits(call, chunk, arguments, slopes, gradients, start)
            else:
                _rows_by_head(call, chunk, arguments, slopes, gradients, start)
    return gradients


def _results(call: Call, x: torch.Tensor, arguments: Arguments) -> tuple[torch.Tensor, ...]:
    if call.options.function_takes == "linear":
        return as_tuple(call.head.call(call.user_function, x, arguments.labels, *arguments.all))
    return call.function.rows(call.head.project(x, call.vocab_size)[1], arguments)


def _rows_by_logits(call: Call, chunk: tuple, arguments: Arguments, slopes, gradients: Gradients, start: int) -> None:
    """One chunk of a function of logits; the gradient overwrites the logits."""
    x, *projected = chunk
    logits, over = projected or call.head.project(x, call.vocab_size, record=True)  # [chunk, vocab], same memory
    call.function.rows_gradient(over, arguments, slopes, partial(gradients.add_arguments, start))
    if logits.requires_grad:
        into = gradients.of_x(start, len(x))
        gradients.add_x(start, call.head.backward(logits, over, x, [], into)[0], len(x))


def _rows_by_head(call: Call, chunk: tuple, arguments: Arguments, slopes, gradients: Gradients, start: int) -> None:
    """One chunk of a function that projects it itself."""
    (x,), leaves = chunk, arguments.leaves()
    results = as_tuple(call.head.call(call.user_function, x, arguments.labels, *leaves, record=True))
    check_leaves(call.user_function, results, [x, *arguments.chosen(leaves), *call.head.leaves.values()])
    pairs = [(r, s) for r, s in zip(results, slopes, strict=True) if s is not None and r.requires_grad]
    if pairs:
        outputs, given = zip(*pairs, strict=True)
        of_x, *others = call.head.backward(outputs, given, x, arguments.chosen(leaves))
        gradients.add_x(start, of_x, len(x))
        gradients.add_arguments(start, 0, others)


def _first_kept(call: Call) -> int:
    """The first chunk whose logits are kept for the backward: the last ones are, as many as `keep_logits` has room."""
    if not call.differentiate or not call.spans:
        return len(call.spans)
    rows = call.spans[0][1] - call.spans[0][0]
    chunks = kept_bytes(call.options.keep_logits) // (rows * call.vocab_size * call.dtype.itemsize)
    return max(0, len(call.spans) - chunks)
