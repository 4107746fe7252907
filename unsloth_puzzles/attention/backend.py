"""The description of a backend, by which one is chosen and the others are refused."""

import torch

from unsloth_puzzles.attention.pattern import Batch, Pattern

FEATURES = (
    "window", "documents", "soft cap", "cache", "value heads", "float32", "gradients on a CPU", "without a GPU",
    "fullgraph",
)  # fmt: skip


class Backend:
    """One way to compute attention. All support causal and bidirectional masks, a scale and grouped queries.

    Attributes:
        features: those of `FEATURES` that it has. "cache": other numbers of queries than of keys. "value heads": of
            another size than those of query and key. "fullgraph": it compiles into a layer without a graph break.
        memory: what it takes beside inputs and outputs, in words.
        splits_at: compiled into a layer, it is another code for queries shorter than this.
        takes_empty: whether it runs without rows, queries or keys.
    """

    name: str
    features: frozenset[str]
    memory: str
    splits_at: int = 0
    takes_empty: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        return None

    def refuses(self, pattern: Pattern, batch: Batch) -> str | None:
        """Why it cannot do what is asked, or None. The answer holds whether or not it is installed."""
        if not self.takes_empty and 0 in (batch.size, batch.q_length, batch.kv_length):
            return (
                f"{self.name} cannot do an empty batch, got {batch.size} rows, {batch.q_length} queries and "
                f"{batch.kv_length} keys"
            )
        on_cpu = batch.device.type == "cpu"
        for feature, asked, what in (
            ("window", pattern.window is not None, f"a window ({pattern.window})"),
            ("soft cap", pattern.soft_cap is not None, f"a soft cap ({pattern.soft_cap})"),
            ("documents", batch.documents is not None, "packed documents"),
            ("cache", batch.offset != 0, f"{batch.q_length} queries for {batch.kv_length} keys"),
            (
                "value heads",
                batch.value_head_size not in (None, batch.head_size),
                f"value heads of size {batch.value_head_size} beside {batch.head_size}",
            ),
            ("float32", batch.dtype.itemsize > 2, f"{batch.dtype}".removeprefix("torch.")),
            ("without a GPU", on_cpu, "a CPU"),
            ("gradients on a CPU", on_cpu and batch.gradients, "gradients on a CPU"),
        ):
            if asked and feature not in self.features:
                return f"{self.name} cannot do {what}"
        return None

    def prepare(self, pattern: Pattern, batch: Batch) -> object:
        """Make what `run` needs beside the tensors, once a batch, for every layer."""
        raise NotImplementedError

    def run(self, query, key, value, pattern: Pattern, data, scale: float | None) -> torch.Tensor:
        """Attention of one layer. Query head h uses key head h // (heads // key heads).

        Args:
            query: [batch, heads, q_length, head size].
            key: [batch, key heads, kv_length, head size].
            value: [batch, key heads, kv_length, value's head size].
            pattern: that of `prepare`.
            data: what `prepare` gave.
            scale: what query @ key is multiplied with, None for 1 / sqrt(head size).

        Returns:
            [batch, heads, q_length, value's head size].
        """
        raise NotImplementedError


def repeat_heads(key: torch.Tensor, heads: int) -> torch.Tensor:
    """[batch, key heads, ...] -> [batch, heads, ...], each key head as often as queries use it."""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], dim=1)


def flat_positions(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, length, head size] -> [batch * length, heads, head size], for kernels for packed sequences."""
    return tensor.transpose(1, 2).flatten(0, 1)


def document_starts(batch: Batch) -> torch.Tensor:
    """Where each document of the batch begins in its flat positions.

    Waits for the device, if there are documents: their number is the shape of the result.

    Returns:
        [documents + 1] int32, the number of positions at last.
    """
    length = batch.kv_length
    if batch.documents is None:
        return torch.arange(0, (batch.size + 1) * length, length, dtype=torch.int32, device=batch.device)
    starts = torch.ones_like(batch.documents, dtype=torch.bool)
    starts[:, 1:] = batch.documents.diff(dim=-1) != 0
    found = starts.flatten().nonzero()[:, 0].to(torch.int32)
    return torch.nn.functional.pad(found, (0, 1), value=batch.size * length)
