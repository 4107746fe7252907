"""The rows of hidden states that have a label: the others need no work of the head."""

from typing import NamedTuple

import torch

from unsloth_puzzles.backprop.losses import IGNORED


class LabelledRows(NamedTuple):
    """Places of labels that are not ignored.

    Attributes:
        places: [rows] int64, in the flattened labels.
        shape: Of the labels.
    """

    places: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, labels: torch.Tensor) -> "LabelledRows":
        """Find them. The host waits for the device, since their number is not known before."""
        return cls((labels != IGNORED).flatten().nonzero().squeeze(-1), labels.shape)

    def to(self, device: torch.device) -> "LabelledRows":
        return self._replace(places=self.places.to(device))

    def choose(self, values: torch.Tensor) -> torch.Tensor:
        """The rows of `values` [*shape, ...], as [rows, ...]."""
        return values.flatten(0, len(self.shape) - 1).index_select(0, self.places)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """`values` [rows] at their places of a tensor of `shape`, 0 elsewhere."""
        return values.new_zeros(self.shape.numel()).index_copy(0, self.places, values).reshape(self.shape)
