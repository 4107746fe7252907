"""The passes over the chunks: logits, the user's function, gradients, one chunk after the other."""

import math
from collections.abc import Callable
from functools import cached_property, partial

import torch

from unsloth_puzzles.backprop import checks
from unsloth_puzzles.backprop.chunks import chunk_rows, even_rows, kept_bytes
from unsloth_puzzles.backprop.function import (
    EAGER_BYTES_PER_LOGIT,
    Arguments,
    EagerFunction,
    Reduction,
    as_tuple,
    compiled,
)
from unsloth_puzzles.backprop.heads import Head, forgets
from unsloth_puzzles.backprop.rng import RandomStates
from unsloth_puzzles.backprop.sums import Gradients

_EAGER_WHOLE_BYTES = 16  # per logit: a float32 copy, its softmax, and the gradients of both


class Work:
    """One pass over the chunks: of the forward, or of the backward of per-row results."""

    def __init__(self, X, linear, labels, function, plan, tensors, needs, backward=False):
        self.plan, self.shape = plan, X.shape
        self.x = X.detach().reshape(-1, X.shape[-1])
        count, leading = len(plan.names), X.dim() - 1
        self.parameters = tensors[:count]
        rest = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in tensors[count:])
        flat = lambda t: t.reshape(-1, *t.shape[leading:])  # noqa: E731
        wanted = tuple(needs[5 + count :]) if plan.differentiate else (False,) * len(rest)
        cut = tuple(flat(t) for t in rest[: plan.row_count])
        self.arguments = Arguments(None if labels is None else flat(labels), cut, rest[plan.row_count :], wanted)
        self.head = Head(linear, dict(zip(plan.names, self.parameters, strict=True)), plan.accumulate_dtype)
        self.reduction = Reduction(plan.reduction == "mean", plan.ignore_index)
        self.user_function = function
        self.eager = EagerFunction(function, self.reduction)
        self.function = compiled(function, self.reduction) if plan.compile else self.eager
        # Only where gradients are made: a first call without them leaves the compiled gradient to be looked at later.
        making = plan.differentiate and any(needs) and (plan.reduction != "none" or backward)
        self.verify = (
            making and plan.compile and plan.check_additive and checks.is_new(function, "compiled", plan.reduction)
        )
        self.needs_x = needs[0] and plan.differentiate
        self.differentiate = plan.differentiate and any(needs)
        self.states = RandomStates(X.device)
        self.labels_checked = backward  # the forward has done it
        self.kept: dict[int, tuple] = {}  # by chunk: its rows of x, their logits with the graph, the logits' memory
        self._size_chunks()

    def _size_chunks(self) -> None:
        device = self.x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.x.dtype
        self.dtype = dtype  # of the logits
        self.vocab_size = checks.features(self.head.linear)[1]
        if self.vocab_size is None:
            with torch.no_grad():
                self.vocab_size = self.head.call(None, self.x.new_zeros(1, self.x.shape[-1])).shape[-1]
        spare = 0 if self.plan.compile else EAGER_BYTES_PER_LOGIT
        if self.plan.function_takes == "linear":
            spare = _EAGER_WHOLE_BYTES  # all of a chunk's temporaries at once
        device, hidden = self.x.device, self.x.shape[-1]
        rows = chunk_rows(self.plan.chunk_size, self.vocab_size, dtype, device, dtype.itemsize + spare, hidden)
        if self.plan.chunk_size == "auto":
            rows = max(1, rows // 4) if self.plan.function_takes == "linear" else rows
            rows = even_rows(rows, len(self.x))
        self.spans = [(i, min(i + rows, len(self.x))) for i in range(0, len(self.x), rows)]
        chunks = kept_bytes(self.plan.keep_logits) // (rows * self.vocab_size * dtype.itemsize)
        self.first_kept = max(0, len(self.spans) - chunks) if self.differentiate else len(self.spans)

    def _check_labels(self) -> None:
        """Once, when the first product is under way: a GPU is busy while the host launches these small kernels."""
        if not self.labels_checked:
            checks.check_labels(self.arguments.labels, self.vocab_size, self.plan.ignore_index)
            self.labels_checked = True

    def _logits(self, x: torch.Tensor, record: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of a chunk, with `record` with their graph, and their memory, which the gradient may overwrite."""
        logits = self.head.call(None, x, record=record)
        if logits.shape != (len(x), self.vocab_size):
            need = (len(x), self.vocab_size)
            raise ValueError(f"linear: maps {tuple(x.shape)} to {tuple(logits.shape)}, need {need}")
        self._check_labels()
        return logits, logits.detach() if forgets(logits) else logits.detach().clone()

    def additive(self):
        """The loss; gradients of X, the parameters and the arguments; what each is to be multiplied by."""
        self._try(additive=True)
        total = None
        gradients = Gradients(self)
        for start, stop in self.spans:
            value = self._additive_chunk(start, stop, gradients)
            value = value.to(torch.promote_types(value.dtype, torch.float32))
            total = value if total is None else total + value
        if total is None:
            total = torch.zeros((), device=self.x.device)
        count, _, rescale = self._normalizer
        loss = total if count is None else torch.where(count == 0, math.nan, total / count)
        found, scales = zip(*gradients.results(scaled=True), strict=True)
        return loss, found, [rescale if scale is None else rescale / scale for scale in scales]

    def _additive_chunk(self, start, stop, gradients):
        cut = self.arguments.cut(slice(start, stop))
        x = self.x[start:stop].detach().requires_grad_(self.needs_x)
        if self.plan.function_takes == "linear":
            leaves = cut.leaves()
            value = self._projected(x, cut, leaves, self.differentiate)
            checks.check_scalar(value)
            checks.check_leaves(self.user_function, [value], self._known(x, cut, leaves))
            with torch.enable_grad():
                value = self.reduction.contribution(value, cut.labels)
                scaled = value * self._normalizer[1]
            if scaled.requires_grad:
                weight = self.reduction.weight(cut.labels)
                live = None if weight is None else weight > 0
                found = self.head.backward(scaled, None, x, cut.chosen(leaves), live=live)
                gradients.add(start, stop, found[0], found[1:])
            return value.detach()
        logits, over = self._logits(x, self.differentiate)
        if not self.differentiate:
            return checks.check_scalar(self.function.value(over, cut))
        scale, few = self._normalizer[1], slice(checks.ROWS_TRIED)
        before = over[few].clone() if self.verify else None
        value = self.function.value_and_gradient(over, cut, scale, partial(gradients.add_arguments, start))
        self._verify(over, before, lambda: self.eager.value_and_gradient(before, cut.cut(few), scale, _drop))
        self._head_backward(logits, over, x, start, stop, gradients)
        return value

    def _head_backward(self, logits, over, x, start, stop, gradients) -> None:
        if logits.requires_grad:  # else only the function's arguments want gradients
            gradients.add(start, stop, self.head.backward(logits, over, x, [], gradients.of_x(start, stop))[0], None)

    def _known(self, x, cut, leaves) -> list[torch.Tensor]:
        """The leaves that a gradient is found for, or that are there for nothing else."""
        return [x, *cut.chosen(leaves), *self.head.leaves.values()]

    def _verify(self, gradient: torch.Tensor, before: torch.Tensor | None, overwrite: Callable) -> None:
        """Hold the compiled gradient of a few rows against eager mode's, with which `overwrite` fills `before`."""
        if before is not None:
            self.verify = False
            overwrite()
            checks.check_compiled(gradient[: len(before)], before)
            checks.trust(self.user_function, "compiled", self.plan.reduction)

    def rows(self) -> tuple[torch.Tensor, ...]:
        """Per-row results, with the leading dimensions of X."""
        self._try(additive=False)
        whole: list[torch.Tensor] = []
        for i, (start, stop) in enumerate(self.spans or [(0, 0)]):
            self.states.record(i)
            cut = self.arguments.cut(slice(start, stop))
            if self.first_kept <= i < len(self.spans):
                x = self.x[start:stop].detach().requires_grad_(self.needs_x)
                self.kept[i] = x, *self._logits(x, record=True)
                self.states.record((i, "kept"))  # what the head drew (dropout) is not drawn again
                results = self.function.rows(self.kept[i][-1], cut)
            else:
                with torch.no_grad():
                    results = self._rows_chunk(self.x[start:stop], cut, self.function)
            checks.check_rows(results, stop - start, (stop - start) * self.vocab_size)
            if not whole:
                whole = [result.new_empty(len(self.x), *result.shape[1:]) for result in results]
            for target, result in zip(whole, results, strict=True):
                target[start:stop] = result
        return tuple(target.view(*self.shape[:-1], *target.shape[1:]) for target in whole)

    def rows_backward(self, upstream, states):
        leading = len(self.shape) - 1
        upstream = [None if u is None else u.reshape(-1, *u.shape[leading:]) for u in upstream]
        gradients = Gradients(self)
        if any(slope is not None for slope in upstream):
            with states.replay() as at:
                # Kept chunks first, since they hold memory; else in order, for Inductor tunes for the first's size.
                for i in sorted(range(len(self.spans)), key=lambda i: i not in self.kept):
                    start, stop = self.spans[i]
                    kept = self.kept.pop(i, None)
                    at(i if kept is None else (i, "kept"))
                    slopes = tuple(None if u is None else u[start:stop] for u in upstream)
                    self._rows_backward_chunk(start, stop, slopes, gradients, kept)
        return [found for found, _ in gradients.results(scaled=False)]

    def _rows_backward_chunk(self, start, stop, slopes, gradients, kept):
        cut = self.arguments.cut(slice(start, stop))
        x = self.x[start:stop].detach().requires_grad_(self.needs_x) if kept is None else kept[0]
        if self.plan.function_takes == "linear":
            leaves = cut.leaves()
            results = as_tuple(self._projected(x, cut, leaves, record=True))
            checks.check_leaves(self.user_function, results, self._known(x, cut, leaves))
            pairs = [(r, s) for r, s in zip(results, slopes, strict=True) if s is not None and r.requires_grad]
            if pairs:
                found = self.head.backward([r for r, _ in pairs], [s for _, s in pairs], x, cut.chosen(leaves))
                gradients.add(start, stop, found[0], found[1:])
            return
        logits, over = self._logits(x, record=True) if kept is None else kept[1:]
        few = slice(checks.ROWS_TRIED)
        before = over[few].clone() if self.verify else None
        self.function.rows_gradient(over, cut, slopes, partial(gradients.add_arguments, start))
        part = tuple(None if slope is None else slope[few] for slope in slopes)
        self._verify(over, before, lambda: self.eager.rows_gradient(before, cut.cut(few), part, _drop))
        self._head_backward(logits, over, x, start, stop, gradients)

    def _rows_chunk(self, x, cut, function):
        if self.plan.function_takes == "linear":
            return as_tuple(self._projected(x, cut, cut.all))
        return function.rows(self._logits(x)[1], cut)

    def _projected(self, x, cut, values, record=False):
        self._check_labels()
        return self.head.call(self.user_function, x, cut.labels, *values, record=record)

    @cached_property
    def _normalizer(self):
        """The divisor of the loss or None; the factor of a chunk's gradient; what is still missing from the gradients.

        Gradients of a sum over 16 K tokens are of size 1, those of the mean of size 1e-4, where float16 has lost most
        of its digits. So in float16 they are kept times the power of two next to the divisor, which costs no digit.
        """
        labels, given, device = self.arguments.labels, self.plan.normalizer, self.x.device
        if self.plan.reduction == "mean" or isinstance(given, str):
            count = (labels != self.plan.ignore_index).sum()
        elif given is None:
            one = torch.ones((), device=device)
            return None, one, one
        else:
            count = torch.as_tensor(given).to(device, non_blocking=True).reshape(())
        wide = torch.promote_types(self.x.dtype, torch.float32)
        count = count.to(wide)
        boost = torch.exp2(torch.log2(count.abs()).ceil()) if self.dtype == torch.float16 else torch.ones_like(count)
        nothing = count == 0
        return count, torch.where(nothing, 0, boost / count), torch.where(nothing, 0, 1 / boost)

    def _try(self, additive: bool) -> None:
        """Hold a few rows of a new function against their halves, without moving the random numbers of the run."""
        if not (self.plan.check_additive and self.spans and checks.is_new(self.user_function, self.plan.reduction)):
            return
        whole = self.arguments
        tried = checks.rows_to_try(whole.labels, len(self.x), self.plan.ignore_index, self.x.device)
        if len(tried) < 2:
            return  # nothing to compare; it is new the next time, too

        takes_logits = self.plan.function_takes == "logits"

        def evaluate(start, stop):
            cut = whole.cut(tried[start:stop])
            if takes_logits:
                given = logits[start:stop].clone()
                result = self.user_function(given, cut.labels, *cut.all)
                checks.check_unchanged(given)
            else:
                result = self._projected(self.x[tried[start:stop]], cut, cut.all)
            if additive:
                found = self.reduction.contribution(checks.check_scalar(result), cut.labels)
                return (found.to(result.dtype),)  # which says how far it may be rounded
            results = as_tuple(result)
            checks.check_rows(results, stop - start, (stop - start) * self.vocab_size)
            return results

        with RandomStates(self.x.device).replay(), torch.no_grad():
            logits = self._logits(self.x[tried])[1] if takes_logits else None
            telling = checks.check_additive(evaluate, len(tried), additive, self.dtype)
        if telling:
            checks.trust(self.user_function, self.plan.reduction)


def _drop(start, found) -> None:
    """For gradients of arguments that nobody wants."""
