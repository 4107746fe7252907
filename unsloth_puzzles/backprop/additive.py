"""A loss that is a sum over rows: value and gradients in one pass over the chunks."""

import math
from functools import partial

import torch

from unsloth_puzzles.backprop.arguments import Arguments
from unsloth_puzzles.backprop.call import Call
from unsloth_puzzles.backprop.gradients import Gradients
from unsloth_puzzles.backprop.results import check_leaves


def additive_loss(call: Call) -> tuple[torch.Tensor, Gradients, torch.Tensor]:
    """Go over the chunks once: project, apply the function, and add up its value and its gradients.

    Returns:
        The loss [], float32 or wider; the gradients, if any are wanted; the factor [] by which the backward still has
        to multiply them.
    """
    count, factor, missing = _normalizer(call)
    gradients = Gradients(call.x if call.needs_x else None, call.arguments)
    total = None
    for start, stop in call.spans:
        x = call.leaf(start, stop)  # [chunk, hidden]
        arguments = call.arguments.cut(slice(start, stop))
        if call.options.function_takes == "logits":
            value = _through_logits(call, x, arguments, factor, gradients, start)  # []
        else:
            value = _through_head(call, x, arguments, factor, gradients, start)  # []
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        total = value if total is None else total + value
    if total is None:
        total = torch.zeros((), dtype=torch.promote_types(call.x.dtype, torch.float32), device=call.x.device)
    return total if count is None else torch.where(count == 0, math.nan, total / count), gradients, missing


def _through_logits(call: Call, x, arguments: Arguments, factor, gradients: Gradients, start: int) -> torch.Tensor:
    """One chunk of a function of logits; the gradient overwrites the logits."""
    logits, over = call.head.project(x, call.vocab_size, record=call.differentiate)  # [chunk, vocab], same memory
    if not call.differentiate:
        return call.function.value(over, arguments)
    value = call.function.value_and_gradient(over, arguments, factor, partial(gradients.add_arguments, start))
    if logits.requires_grad:  # else only the function's arguments want gradients
        into = gradients.of_x(start, len(x))
        gradients.add_x(start, call.head.backward(logits, over, x, [], into)[0], len(x))
    return value


def _through_head(call: Call, x, arguments: Arguments, factor, gradients: Gradients, start: int) -> torch.Tensor:
    """One chunk of a function that projects it itself."""
    leaves = arguments.leaves()
    value = call.head.call(call.user_function, x, arguments.labels, *leaves, record=call.differentiate)
    check_leaves(call.user_function, [value], [x, *arguments.chosen(leaves), *call.head.leaves.values()])
    with torch.enable_grad():
        value = call.reduction.contribution(value, arguments.labels)
        scaled = value * factor
    if scaled.requires_grad:
        weight = call.reduction.weight(arguments.labels)
        live = None if weight is None else weight > 0
        of_x, *others = call.head.backward(scaled, None, x, arguments.chosen(leaves), live=live)
        gradients.add_x(start, of_x, len(x))
        gradients.add_arguments(start, 0, others)
    return value.detach()


def _normalizer(call: Call) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The divisor of the loss or None; the factor of a chunk's gradient; what is still missing from the gradients.

    Gradients of a sum over 16 K tokens are of size 1, those of the mean of size 1e-4, where float16 has lost most of
    its digits. So in float16 they are kept times the power of two next to the divisor, which costs no digit.
    """
    labels, given, device = call.arguments.labels, call.options.normalizer, call.x.device
    if call.options.reduction == "mean" or isinstance(given, str):
        count = (labels != call.options.ignore_index).sum()
    elif given is None:
        one = torch.ones((), dtype=torch.float32, device=device)
        return None, one, one
    else:
        dtype = torch.float64 if isinstance(given, float) else None  # else a float is rounded to the default dtype
        count = torch.as_tensor(given, dtype=dtype).to(device, non_blocking=True).reshape(())
    count = count.to(torch.promote_types(call.x.dtype, torch.float32))
    boost = torch.exp2(torch.log2(count.abs()).ceil()) if call.dtype == torch.float16 else torch.ones_like(count)
    nothing = count == 0
    return count, torch.where(nothing, 0, boost / count), torch.where(nothing, 0, 1 / boost)
