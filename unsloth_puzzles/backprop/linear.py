"""A loss of `linear(hidden_states)` that never holds the logits: chunk by chunk, for any function of them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from unsloth_puzzles.backprop import checks
from unsloth_puzzles.backprop.plan import Plan
from unsloth_puzzles.backprop.scale import scale_in_place
from unsloth_puzzles.backprop.work import Work


def memory_efficient_linear(
    hidden_states: torch.Tensor,
    linear: nn.Module,
    labels: torch.Tensor | None,
    forward_function: Callable,
    *,
    reduction: str = "mean",
    function_takes: str = "logits",
    row_args: tuple = (),
    shared_args: tuple = (),
    normalizer: float | torch.Tensor | str | None = None,
    ignore_index: int | None = -100,
    chunk_size: int | str = "auto",
    accumulate_dtype: torch.dtype | None = None,
    compile: bool = False,
    check_additive: bool = True,
    keep_logits: int | str = 0,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """`forward_function` of `linear(hidden_states)`, with gradients, in the memory of one chunk of logits.

    hidden_states: (..., hidden), a floating dtype. labels: (...), not shifted here; or None. linear: any module that
    maps (rows, hidden) to (rows, vocabulary): `nn.Linear` with or without bias, tied, frozen, LoRA, 4-bit.
    row_args: tensors (..., *) that are cut into the same rows; shared_args: passed whole. Floating tensors among them
    get gradients if they require them.

    forward_function(logits, labels, *row_args, *shared_args) sees 2-D logits (rows, vocabulary) of a chunk, in the
    dtype in which they were projected; the upcast to float32 is its own. With function_takes="linear" it is
    forward_function(batch, linear, labels, *row_args, *shared_args), and projects its (rows, hidden) itself. Its
    derivative comes from autograd. What it returns depends on `reduction`:

    - "mean": the mean over its rows whose label is not `ignore_index`. Chunks are weighted by their number of those.
    - "sum": a sum over its rows, divided by `normalizer` once all are added up: a number, a 0-dim tensor (say
      `num_items_in_batch`), or "labels", the number of labels that are not `ignore_index`.
    - "none": a tensor (rows, ...) or a tuple of them, row by row. They are returned as (..., ...).

    "mean" and "sum" return a 0-dim tensor, float32 or wider; the gradients are made in the forward (three matrix
    products, two if the head is frozen) and multiplied by the upstream gradient in the backward. "none" computes the
    logits again in the backward (one more product), and is exact for any upstream gradients.

    In float16 the gradients of "mean" and "sum" wait for the backward times the power of two next to the divisor, so
    that small ones do not vanish: a function whose slope by a logit passes 2^15 overflows, though its mean would not.

    chunk_size: rows, bytes of logits ("256MiB") or "auto" (see `chunk_rows`). accumulate_dtype: in which the weight's
    gradient is summed over the chunks; None is the weight's own. compile: Inductor fuses the function and its gradient
    into one or two passes over the logits (pass the same function object each time). check_additive: on the first
    call of a function, compare a few rows with their two halves. keep_logits: with "none", this many bytes of logits
    ("1GiB") are kept for the backward instead of being computed again.

    Autocast, dropout in the function or in the head, and gradient checkpointing around the call behave as in eager
    mode. Raises TypeError or ValueError, naming the argument. A label out of range raises ValueError on the CPU and
    fails an assertion on the device on a GPU. `torch.func` transforms raise RuntimeError, and so do create_graph=True
    in the backward, and a second backward unless the graph was retained.
    """
    checks.check_inputs(hidden_states, linear, labels, forward_function, row_args, shared_args)
    plan = Plan(
        reduction, function_takes, len(row_args), normalizer, ignore_index, chunk_size, accumulate_dtype, compile,
        check_additive, keep_logits,
    )  # fmt: skip
    return MemoryEfficientLinear.apply(hidden_states, linear, labels, forward_function, plan, *row_args, *shared_args)


class MemoryEfficientLinear(torch.autograd.Function):
    """The puzzle's skeleton: `MemoryEfficientLinear.apply(X, linear, labels, forward_function)`.

    X: (batch, length, hidden), labels: (batch, length), forward_function(batch, linear, labels): the mean loss of a
    piece, which it projects itself. Use `memory_efficient_linear` for everything else. A module cannot be an input of
    an autograd function, so `apply` hands its trainable parameters over as tensors, and their gradients are returned
    like any input's.
    """

    @classmethod
    @torch.compiler.disable(reason="it loops over chunks and calls autograd; its function is compiled by compile=True")
    def apply(cls, X, linear, labels, forward_function, plan=None, *arguments):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("memory_efficient_linear: torch.func transforms (grad, vmap, jvp) are not supported")
        plan = plan or Plan()
        checks.check_inputs(X, linear, labels, forward_function, (), ())
        if labels is None and (plan.reduction == "mean" or isinstance(plan.normalizer, str)):
            raise ValueError("labels: got None, need labels to count (or reduction='sum' without normalizer='labels')")
        parameters = {name: value for name, value in linear.named_parameters() if value.requires_grad}
        plan = replace(plan, names=tuple(parameters), differentiate=torch.is_grad_enabled())
        result = super().apply(X, linear, labels, forward_function, plan, *parameters.values(), *arguments)
        return result[0] if plan.reduction == "none" and len(result) == 1 else result

    @staticmethod
    def forward(ctx, X, linear, labels, forward_function, plan, *tensors):
        ctx.set_materialize_grads(False)
        work = Work(X, linear, labels, forward_function, plan, tensors, ctx.needs_input_grad)
        ctx.plan = plan
        if plan.reduction == "none":
            results = work.rows()
            ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
            # What the backward needs to do the forward again.
            ctx.linear, ctx.function, ctx.states = linear, forward_function, work.states
            ctx.kept = (work.head, work.kept) if work.kept else None  # and what it need not do again
            ctx.autocast = _autocast_state(X.device.type)
            ctx.other = tuple(None if isinstance(t, torch.Tensor) else t for t in tensors)
            # The frozen parameters only so that autograd notices if they change before the backward.
            frozen = [value for value in linear.parameters() if not value.requires_grad]
            ctx.save_for_backward(X, labels, *(t if isinstance(t, torch.Tensor) else None for t in tensors), *frozen)
            return results
        loss, gradients, ctx.rescale = work.additive()
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():  # once_differentiable lets a gradient pass as a constant if the upstream one is
            raise RuntimeError("memory_efficient_linear: its gradient has no derivative (create_graph=True)")
        # A graph that is kept may be walked again: then what was saved has to stay what it is.
        again = torch._C._autograd._get_current_graph_task_keep_graph()
        if ctx.plan.reduction == "none":
            X, labels, *tensors = ctx.saved_tensors
            # zip ends with `other`: what was saved behind are the frozen parameters
            tensors = [other if given is None else given for given, other in zip(tensors, ctx.other, strict=False)]
            with torch.autocast(**ctx.autocast):
                work = Work(X, ctx.linear, labels, ctx.function, ctx.plan, tuple(tensors), ctx.needs_input_grad, True)
                if ctx.kept and not again:
                    (work.head, work.kept), ctx.kept = ctx.kept, None
                gradients = work.rows_backward(upstream, ctx.states)
        elif upstream[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        else:
            gradients = ctx.saved_tensors
            gradients = [
                g if g is None else scale_in_place(g.clone() if again else g, upstream[0] * rescale)
                for g, rescale in zip(gradients, ctx.rescale, strict=True)
            ]
        return gradients[0], None, None, None, None, *gradients[1:]


def _autocast_state(device_type: str) -> dict:
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }
