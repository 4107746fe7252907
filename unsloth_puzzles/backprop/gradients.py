"""Buffers for the gradients of all chunks: those of rows side by side, all others summed."""

import torch

from unsloth_puzzles.backprop.arguments import Arguments
from unsloth_puzzles.backprop.sums import Sum


class Gradients:
    """Of the hidden states and the function's arguments; the head keeps those of its parameters.

    Args:
        x: [rows, hidden], or None if its gradient is not wanted.
        arguments: Of the whole call.
    """

    def __init__(self, x: torch.Tensor | None, arguments: Arguments):
        of_rows, shared = arguments.divided(arguments.wanted)
        self.x = None if x is None else _zeros(x)
        self.rows = [_zeros(value) if want else None for value, want in zip(arguments.row_args, of_rows, strict=True)]
        self.shared = [
            Sum(value, value.dtype) if want else None for value, want in zip(arguments.shared_args, shared, strict=True)
        ]

    def of_x(self, start: int, rows: int) -> torch.Tensor | None:
        """Where the gradient of `rows` rows of x from `start` on belongs."""
        return None if self.x is None else self.x[start : start + rows]

    def add_x(self, start: int, gradient: torch.Tensor | None, rows: int) -> None:
        """Put a chunk's gradient of x in its place, unless it was made there; None is zero."""
        place = self.of_x(start, rows)
        if place is not None and gradient is None:
            place.zero_()
        elif place is not None and gradient.data_ptr() != place.data_ptr():
            place.copy_(gradient)

    def add_arguments(self, chunk: int, offset: int, found: list[torch.Tensor | None]) -> None:
        """Add a gradient for each argument that wants one, of the rows from `offset` of the `chunk` on."""
        start, found = chunk + offset, iter(found)
        for whole in self.rows:
            if whole is not None and (gradient := next(found)) is not None:
                whole[start : start + len(gradient)] = gradient
        for total in self.shared:
            if total is not None and (gradient := next(found)) is not None:
                total.add(gradient)

    def results(self, leading: torch.Size, arguments: Arguments, scaled: bool) -> tuple[tuple, list[tuple]]:
        """That of x and those of the arguments, each with the power of two that it is multiplied by.

        Args:
            leading: The dimensions of X but its last.
            arguments: Of the whole call.
            scaled: Whether there may be such a power; None stands for 1.
        """
        x = None if self.x is None else self.x.view(*leading, self.x.shape[-1])
        rows = [(one if one is None else one.view(*leading, *one.shape[1:]), None) for one in self.rows]
        shared = []
        for total, value in zip(self.shared, arguments.shared_args, strict=True):
            unused = total is not None and total.total is None
            empty = torch.zeros_like(value) if unused else None
            shared.append((empty, None) if total is None or unused else total.result(value, scaled))
        return (x, None), [*rows, *shared]


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
