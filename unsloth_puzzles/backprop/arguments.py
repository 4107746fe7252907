"""What a function gets beside the logits, and how its value enters the loss."""

from dataclasses import dataclass

import torch

from unsloth_puzzles.backprop.results import check_scalar


@dataclass(frozen=True)
class Arguments:
    """The arguments of the function beside the logits, whole or cut to the rows of a chunk.

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

    def divided(self, values: tuple) -> tuple[tuple, tuple]:
        """`values`, one for each argument, as those of the row arguments and those of the shared ones."""
        return values[: len(self.row_args)], values[len(self.row_args) :]

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
        """Return the part of the loss that a chunk's `value` is, in float32 or wider.

        A mean that fits 16 bits may add up to a sum that does not. A chunk without valid labels has no mean (0/0); it
        adds nothing.
        """
        check_scalar(value)
        weight, value = self.weight(labels), value.to(torch.promote_types(value.dtype, torch.float32))
        return value if weight is None else torch.where(weight > 0, value * weight, 0.0)


def as_tuple(results) -> tuple:
    """The results of a function that may return one alone."""
    return results if isinstance(results, tuple) else tuple(results) if isinstance(results, list) else (results,)
