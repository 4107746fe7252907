"""Draw rows of one kind, with or without images, in groups: less padding, and the same kind on all processes.

    class ByKind(SFTTrainer):
        def _get_train_sampler(self, dataset):
            return KindSampler([has_images(row) for row in dataset], self.args.train_batch_size * world_size)

The sampler is optional: mixed batches are correct without it. A process whose batch is all text leaves the adapters of
the vision tower without gradients. DDP then needs `ddp_find_unused_parameters=True`, which SFTTrainer sets. FSDP2
gathers the tower's weights where the tower runs, so all processes must run it at the same steps: use this sampler.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch

from unsloth_puzzles.vision.conversation import has_images

__all__ = ["KindSampler", "has_images"]


class KindSampler(torch.utils.data.Sampler[int]):
    """Draw indices in groups of `group` consecutive ones. All rows of a group are of one kind.

    The last group of a kind is filled with rows of that kind from the start of its order, or left out.

    Args:
        kinds: The kind of each row of the data set, such as whether it has images.
        group: Number of rows in one step of all processes: batch size per process x processes.
        shuffle: Whether rows and groups come in random order, a new one each epoch (see `set_epoch`).
        seed: Seed of the random order.
        drop_last: Whether to leave out incomplete groups.

    Raises:
        TypeError: `kinds` holds tensors, each of which would be a kind of its own.
        ValueError: `kinds` is empty, `group` is not a positive integer, or no group is left.
    """

    def __init__(
        self,
        kinds: Sequence[Hashable],
        group: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ):
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise ValueError(f"group must be a positive integer, got {group!r}")
        if not len(kinds):
            raise ValueError("kinds must hold one per row, got none")
        self.group, self.shuffle, self.seed, self.drop_last, self.epoch = group, shuffle, seed, drop_last, 0
        self._rows: dict[Hashable, list[int]] = {}
        for index, kind in enumerate(kinds):
            if isinstance(kind, torch.Tensor):  # hashed by identity
                raise TypeError("kinds must be plain values such as bools, got tensors; use .tolist()")
            self._rows.setdefault(kind, []).append(index)
        if not len(self):
            raise ValueError(f"group must be at most the rows of some kind, got {group}; use drop_last=False")

    def set_epoch(self, epoch: int) -> None:
        """Change the random order; accelerate calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        rounding = 0 if self.drop_last else self.group - 1
        return sum((len(rows) + rounding) // self.group for rows in self._rows.values()) * self.group

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups = []
        for rows in self._rows.values():
            rows = [rows[place] for place in self._order(len(rows), generator)]
            whole = len(rows) // self.group * self.group
            if whole < len(rows) and not self.drop_last:
                missing = self.group - (len(rows) - whole)
                rows += (rows * (missing // len(rows) + 1))[:missing]
                whole = len(rows)
            groups += [rows[start : start + self.group] for start in range(0, whole, self.group)]
        for place in self._order(len(groups), generator):
            yield from groups[place]

    def _order(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(count, generator=generator, device="cpu").tolist() if self.shuffle else list(range(count))
