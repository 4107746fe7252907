"""Hold a new function against its own halves, once: is it additive over rows, or computed row by row?"""

from collections.abc import Callable

import torch

from unsloth_puzzles.backprop.arguments import as_tuple
from unsloth_puzzles.backprop.call import Call
from unsloth_puzzles.backprop.results import check_rows, check_scalar, check_unchanged
from unsloth_puzzles.backprop.rng import RandomStates
from unsloth_puzzles.backprop.trust import is_new, trust

_ROWS_TRIED = 32
# What the halves of some rows may differ from the whole by, per byte of the result's dtype: the rounding of a sum.
_ADDITIVE = {2: 0.02, 4: 1e-3, 8: 1e-8}


class NotASum(ValueError):
    """The result of a function is not a sum over rows.

    Args:
        message: For the callers of `memory_efficient_linear`.
        found: What was returned, for callers who cannot choose the reduction.
    """

    def __init__(self, message: str, found: str):
        super().__init__(message)
        self.found = found


def try_function(call: Call) -> None:
    """Try a few rows of a function that is new, without moving the random numbers of the run.

    Raises:
        ValueError: The function is not additive over rows, or not computed row by row, as the reduction needs, or it
            writes to the logits.
    """
    options, whole = call.options, call.arguments
    if not (options.check_additive and call.spans and is_new(call.user_function, options.reduction)):
        return
    tried = _rows_to_try(whole.labels, len(call.x), options.ignore_index, call.x.device)
    if len(tried) < 2:
        return  # nothing to compare; it is new the next time, too
    takes_logits, additive = options.function_takes == "logits", options.reduction != "none"

    def evaluate(start: int, stop: int) -> tuple[torch.Tensor, ...]:
        rows = tried[start:stop]
        cut = whole.cut(rows)
        if takes_logits:
            given = logits[start:stop].clone()  # [rows, vocab]
            result = call.user_function(given, cut.labels, *cut.all)
            check_unchanged(given)
        else:
            result = call.head.call(call.user_function, call.x[rows], cut.labels, *cut.all)
        if additive:
            _check_sum(result)
            found = call.reduction.contribution(result, cut.labels)
            return (found.to(result.dtype),)  # which says how far it may be rounded
        results = as_tuple(result)
        check_rows(results, stop - start, (stop - start) * call.vocab_size)
        return results

    with RandomStates(call.x.device).replay(), torch.no_grad():
        logits = call.head.project(call.x[tried], call.vocab_size)[1] if takes_logits else None
        telling = _halves_agree(evaluate, len(tried), additive, call.dtype)
    if telling:
        trust(call.user_function, options.reduction)


def _check_sum(result: object) -> None:
    try:
        check_scalar(result)
    except ValueError as refusal:
        raise NotASum(str(refusal), f"a result of shape {tuple(result.shape)}, {result.dtype}") from None


def _rows_to_try(labels: torch.Tensor | None, rows: int, ignore_index: int | None, device) -> torch.Tensor:
    """Indices of `_ROWS_TRIED` rows: three in four have a label that counts, the rest (in the second half) have not.

    So a function that divides by the wrong number is seen, also where the first rows are all a prompt's.
    """
    if labels is None or ignore_index is None or labels.is_floating_point():
        return torch.arange(min(rows, _ROWS_TRIED), device=device)
    valid = (labels != ignore_index).reshape(rows, -1).any(1)
    most = 3 * _ROWS_TRIED // 4
    counted, ignored = valid.nonzero()[:, 0][:most], (~valid).nonzero()[:, 0][: _ROWS_TRIED - most]
    return torch.cat([counted, ignored]) if len(counted) > 1 else counted[:0]


def _halves_agree(
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
            found = (
                f"a result of {rows} rows {off.item():.3g} away from its halves' {'sum' if additive else 'rows'}, "
                f"of size {size.item():.3g}"
            )
            message = (
                f"forward_function must be {'additive over rows' if additive else 'computed row by row'}, got {found}. "
                "A mean needs reduction='mean' or a sum with a normalizer; "
                "a function that draws random numbers needs check_additive=False"
            )
            raise NotASum(message, found) if additive else ValueError(message)
    return telling
