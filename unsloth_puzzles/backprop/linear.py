"""A loss of `linear(hidden_states)` that never holds the logits: chunk by chunk, for any function of them."""

from collections.abc import Callable

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from unsloth_puzzles.backprop.additive import additive_loss
from unsloth_puzzles.backprop.call import Operands, check_all_labels, prepare
from unsloth_puzzles.backprop.checks import check_ignore_index, check_inputs
from unsloth_puzzles.backprop.heads import lock_of
from unsloth_puzzles.backprop.options import Options
from unsloth_puzzles.backprop.rowwise import row_by_row
from unsloth_puzzles.backprop.saved_tensors import no_saved_tensor_hooks
from unsloth_puzzles.backprop.scale import scale_in_place
from unsloth_puzzles.backprop.trial import try_function


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

    Args:
        hidden_states: [..., hidden], a floating dtype.
        linear: Any module that maps [rows, hidden] to [rows, vocab]: `nn.Linear` with or without bias, tied, frozen,
            LoRA, 4-bit.
        labels: [...], not shifted here; or None. Integers of any dtype reach the function in int64.
        forward_function: `forward_function(logits, labels, *row_args, *shared_args)` sees the logits [rows, vocab] of
            a chunk, in the dtype in which they were projected; the upcast to float32 is its own. Its derivative comes
            from autograd.
        reduction: What `forward_function` returns.
            "mean": the mean over its rows whose label is not `ignore_index`. Chunks are weighted by the number of
            those. "sum": a sum over its rows, which is divided by `normalizer` once all are added up. "none": a tensor
            [rows, *] or a tuple of them, row by row.
        function_takes: "logits", or "linear" for `forward_function(batch, linear, labels, *row_args, *shared_args)`,
            which projects its [rows, hidden] itself.
        row_args: Tensors [..., *] that are cut into the same rows. Floating ones get gradients if they require them.
        shared_args: Passed whole. Floating tensors among them get gradients if they require them.
        normalizer: With "sum" a number, a 0-dim tensor (say `num_items_in_batch`), or "labels", the number of labels
            that are not `ignore_index`.
        ignore_index: The label that does not count. That of `forward_function`, if it has one, must be the same.
        chunk_size: Rows, bytes of logits ("256MiB") or "auto" (see `chunk_rows`).
        accumulate_dtype: In which the weight's gradient is summed over the chunks; None is the weight's own.
        compile: Let Inductor fuse the function and its gradient into one or two passes over the logits. Pass the same
            function object each time.
        check_additive: On the first call of a function, compare a few rows with their two halves.
        keep_logits: With "none", this many bytes of logits ("1GiB") are kept for the backward instead of being
            computed again.

    Returns:
        "mean" and "sum": a 0-dim tensor, float32 or wider. The gradients are made in the forward (three matrix
        products, two if the head is frozen) and multiplied by the upstream gradient in the backward. "none": what the
        function returns, as [..., *]. The logits are computed again in the backward (one more product), which is exact
        for any upstream gradients.

    Raises:
        TypeError, ValueError: Naming the argument. A label out of range raises ValueError on the CPU and fails an
            assertion on the device on a GPU.
        RuntimeError: Under `torch.func` transforms, for create_graph=True in the backward, and for a second backward
            unless the graph was retained.

    Autocast, dropout in the function or in the head, and gradient checkpointing around the call behave as in eager
    mode. In float16 the saved gradients of "mean" and "sum" are scaled by the divisor, rounded up to a power of two, so
    that small ones do not vanish: a function whose slope by a logit passes 2^15 overflows, though its mean would not.
    """
    options = Options(
        reduction=reduction,
        function_takes=function_takes,
        normalizer=normalizer,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        accumulate_dtype=accumulate_dtype,
        compile=compile,
        check_additive=check_additive,
        keep_logits=keep_logits,
    )
    return MemoryEfficientLinear.apply(hidden_states, linear, labels, forward_function, options, row_args, shared_args)


class MemoryEfficientLinear(torch.autograd.Function):
    """The puzzle's skeleton: `MemoryEfficientLinear.apply(X, linear, labels, forward_function)`.

    X: [batch, length, hidden], labels: [batch, length], forward_function(batch, linear, labels): the mean loss of a
    piece, which it projects itself. The functions of `losses` take (logits, labels) instead and belong to
    `memory_efficient_linear`. Use that for everything else, too: `options`, `row_args` and `shared_args` are internal.
    A module cannot be an input of an autograd function, so `apply` hands its trainable parameters over as tensors, and
    their gradients are returned like any input's.
    """

    @classmethod
    @torch.compiler.disable(reason="it loops over chunks and calls autograd; its function is compiled by compile=True")
    def apply(cls, X, linear, labels, forward_function, options=None, row_args=(), shared_args=()):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("hidden_states must be plain, got a tensor of torch.func (grad, vmap, jvp)")
        options = options or Options()
        if isinstance(linear, OptimizedModule):  # Dynamo cannot trace through what collects the weight's gradients
            linear = linear._orig_mod
        check_inputs(X, linear, labels, forward_function, row_args, shared_args)
        if labels is None and options.counts_labels:
            raise ValueError(
                "labels must be a tensor, got None: they are counted (reduction='sum' with a number needs none)"
            )
        if labels is not None and options.ignore_index is not None:
            check_ignore_index(forward_function, options.ignore_index)
        with lock_of(linear):
            trained = {name: value for name, value in linear.named_parameters() if value.requires_grad}
        operands = Operands(tuple(trained), len(row_args))
        tensors = (*trained.values(), *row_args, *shared_args)
        differentiate = torch.is_grad_enabled()
        wanted = tuple(differentiate and getattr(tensor, "requires_grad", False) for tensor in (X, *tensors))
        if labels is not None and not labels.is_floating_point() and labels.dtype != torch.bool:
            labels = labels.long()  # -100, or a large vocabulary, would wrap around in a narrower dtype
        call = prepare(X, linear, labels, forward_function, options, operands, tensors, wanted)
        check_all_labels(call)
        try_function(call)
        if options.reduction == "none":
            return row_by_row(call, X, linear, labels, operands, tensors, wanted)
        return super().apply(call, X, *tensors)

    @staticmethod
    @torch.compiler.disable  # Dynamo calls the forward of an autograd function itself, past `apply`
    def forward(ctx, call, X, *tensors):
        ctx.set_materialize_grads(False)
        with no_saved_tensor_hooks():
            loss, gradients, missing = additive_loss(call)
        (of_x, scale), of_arguments = gradients.results(X.shape[:-1], call.arguments, scaled=True)
        of_parameters = call.head.results(tensors[: len(call.head.leaves)], scaled=True)
        found = [(of_x, scale), *of_parameters, *of_arguments]
        ctx.save_for_backward(*(gradient for gradient, _ in found))
        ctx.factors = [missing if scale is None else missing / scale for _, scale in found]
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # once_differentiable lets a gradient pass as a constant if the upstream one is
            raise RuntimeError("create_graph must be False, got True: the gradient has no derivative")
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        # A graph that is kept may be walked again: then what was saved has to stay what it is.
        retained = torch._C._autograd._get_current_graph_task_keep_graph()
        gradients = [
            g if g is None else scale_in_place(g.clone() if retained else g, upstream * factor)
            for g, factor in zip(ctx.saved_tensors, ctx.factors, strict=True)
        ]
        return None, *gradients
