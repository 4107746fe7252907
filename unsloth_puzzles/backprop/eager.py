"""The user's function on one chunk of logits, in eager mode: its value, and autograd's gradient over the logits."""

from collections.abc import Callable

import torch

from unsloth_puzzles.backprop.arguments import Arguments, Reduction, as_tuple
from unsloth_puzzles.backprop.results import check_leaves, check_rows

_PIECES = 8  # the function runs on eighths of a chunk: its float32 temporaries are eighths, too
BYTES_PER_LOGIT = 16 / _PIECES  # float32 copies, softmax and gradients that such a function makes


class EagerFunction:
    """The function as it is, run by autograd in eager mode on pieces of a chunk.

    Args:
        function: `function(logits, labels, *arguments)`, the user's.
        reduction: How its value enters the loss.
    """

    def __init__(self, function: Callable, reduction: Reduction):
        self.function, self.reduction = function, reduction

    def value(self, logits: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """The chunk's contribution to the loss, before it is normalised.

        Args:
            logits: [chunk, vocab].
            arguments: Of the chunk.

        Returns:
            A 0-dim tensor, float32 or wider.
        """
        with torch.no_grad():
            pieces = [weighted(self.function, self.reduction, *piece) for piece in _pieces(logits, arguments)]
        return torch.stack(pieces).sum()  # of one value a piece

    def value_and_gradient(self, logits: torch.Tensor, arguments: Arguments, scale: torch.Tensor, add: Callable):
        """The value, and its gradient times `scale`, which is written over the logits.

        Args:
            logits: [chunk, vocab], overwritten.
            arguments: Of the chunk.
            scale: [].
            add: `add(start, gradients)` takes those of the arguments that want one, of the rows from `start` on.

        Returns:
            As `value`.
        """
        values = []
        start = 0
        for piece, cut in _pieces(logits, arguments):
            leaf = piece.detach().requires_grad_()  # [rows of the piece, vocab]
            leaves = cut.leaves()
            with torch.enable_grad():
                value = weighted(self.function, self.reduction, leaf, cut, leaves)
                inputs = [leaf, *cut.chosen(leaves)]
                scaled = value * scale
            check_leaves(self.function, [value], inputs)
            gradients = _gradients(scaled, inputs, None)
            gradients = without_nan_of_nothing(gradients, self.reduction, cut.labels)
            piece.copy_(gradients[0])
            add(start, gradients[1:])
            start += len(piece)
            values.append(value.detach())
        return torch.stack(values).sum()

    def rows(self, logits: torch.Tensor, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        """Per-row results, by the pieces of the backward, so that a function draws the same random numbers there.

        Args:
            logits: [chunk, vocab].
            arguments: Of the chunk.

        Returns:
            The function's results, [chunk, ...] each.
        """
        found = []
        with torch.no_grad():
            for piece, cut in _pieces(logits, arguments) if len(logits) else [(logits, arguments)]:
                found.append(as_tuple(self.function(piece, cut.labels, *cut.all)))
                check_rows(found[-1], len(piece), piece.numel())
        return tuple(torch.cat(results) for results in zip(*found, strict=True))

    def rows_gradient(self, logits: torch.Tensor, arguments: Arguments, upstream: tuple, add: Callable) -> None:
        """Upstream gradients times the Jacobian, written over the logits.

        Args:
            logits: [chunk, vocab], overwritten.
            arguments: Of the chunk.
            upstream: [chunk, ...] for each result, None where there is no gradient.
            add: As for `value_and_gradient`.
        """
        start = 0
        for piece, cut in _pieces(logits, arguments):
            stop = start + len(piece)
            leaf = piece.detach().requires_grad_()  # [rows of the piece, vocab]
            leaves = cut.leaves()
            with torch.enable_grad():
                results = as_tuple(self.function(leaf, cut.labels, *leaves))
            check_leaves(self.function, results, [leaf, *cut.chosen(leaves)])
            kept = [
                (result, slope[start:stop])  # [rows of the piece, ...] each
                for result, slope in zip(results, upstream, strict=True)
                if slope is not None
            ]
            outputs = [result for result, _ in kept]
            gradients = _gradients(outputs, [leaf, *cut.chosen(leaves)], [slope for _, slope in kept])
            piece.copy_(gradients[0])
            add(start, gradients[1:])
            start = stop


def weighted(function, reduction, logits, arguments, values=None):
    value = function(logits, arguments.labels, *(arguments.all if values is None else values))
    return reduction.contribution(value, arguments.labels)


def without_nan_of_nothing(gradients, reduction, labels):
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
    rows = max(1, -(-len(logits) // _PIECES))
    for start in range(0, len(logits), rows):
        stop = min(start + rows, len(logits))
        yield logits[start:stop], arguments.cut(slice(start, stop))  # [rows of the piece, vocab]
