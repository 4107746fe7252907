"""Weights that are read as float32 rows, a chunk at a time: plain tensors, NF4, and those that adapters change."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch._C import DisableTorchFunctionSubclass

CHUNK = 2**22  # weights of a chunk: 16 MiB of float32, of which a quantiser makes about eight copies


class Weight:
    """A parameter whose values are made when they are asked for.

    Attributes:
        shape: of the whole weight.
    """

    shape: tuple[int, ...]

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """Rows `begin` to `end` (along dimension 0) in float32, on the device of the parameter."""
        raise NotImplementedError

    def close(self) -> None:
        """Free what `rows` keeps from call to call."""

    def chunks(self, multiple: int = 1, limit: int = CHUNK) -> Iterator[torch.Tensor]:
        """All rows in order, in float32 on the CPU.

        Args:
            multiple: the number of rows of a chunk is a multiple of it (the last chunk has what remains).
            limit: the most weights of a chunk, if `multiple` rows are no more.
        """
        total = self.shape[0]
        row = max(1, math.prod(self.shape[1:]))
        step = max(multiple, limit // row // multiple * multiple)
        try:
            for begin in range(0, total, step):
                yield self.rows(begin, min(begin + step, total)).cpu()
        finally:
            self.close()

    def tensor(self) -> torch.Tensor:
        """The whole weight in float32 on the CPU."""
        try:
            return self.rows(0, self.shape[0]).cpu()
        finally:
            self.close()


@dataclass
class Plain(Weight):
    """A floating-point tensor."""

    source: torch.Tensor

    def __post_init__(self):
        self.source = self.source.detach()
        self.shape = tuple(self.source.shape) or (1,)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.source.reshape(self.shape)[begin:end].float()


@dataclass
class NF4(Weight):
    """A bitsandbytes NF4 tensor: the kernel of `unsloth_puzzles.nf4` on a GPU, the same formula on a CPU.

    The kernel writes the whole matrix, which is kept until `close`; the formula reads the rows that are asked for.
    """

    packed: torch.Tensor
    state: object
    _whole: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        from unsloth_puzzles.nf4.state import check

        with DisableTorchFunctionSubclass():
            self.packed = self.packed.detach()
            check(self.packed, self.state)
            if self.packed.dim() == 2 and self.packed.shape[0] == 1:
                raise ValueError(
                    f"model must have NF4 weights as columns, got one packed as {tuple(self.packed.shape)}"
                )
        self.shape = tuple(self.state.shape)

    def rows(self, begin: int, end: int) -> torch.Tensor:
        with DisableTorchFunctionSubclass():
            if self.packed.is_cuda:
                if self._whole is None:
                    from unsloth_puzzles.nf4.dequantize import dequantize

                    self._whole = dequantize(self.packed, self.state, torch.float32)
                return self._whole[begin:end]
            return dequantized_rows(self.packed, self.state, begin, end)

    def close(self) -> None:
        self._whole = None


def dequantized_rows(packed: torch.Tensor, state, begin: int, end: int) -> torch.Tensor:
    """Rows of an NF4 weight by the formula `code[nibble] * absmax` in float32, on the device of `packed`.

    Args:
        packed: two weights a byte, the high nibble first, in any dtype.
        state: its bitsandbytes `QuantState`.
        begin: the first row.
        end: the row after the last one.

    Returns:
        [end - begin, columns] float32.
    """
    columns = math.prod(state.shape[1:])
    first, last = begin * columns, end * columns
    data = packed.contiguous().view(-1).view(torch.uint8)[first // 2 : (last + 1) // 2]
    nibbles = torch.stack([data >> 4, data & 15], dim=-1).view(-1)[first % 2 :][: last - first]
    blocks = torch.arange(first // state.blocksize, (last - 1) // state.blocksize + 1, device=packed.device)
    absmax = state.absmax[blocks]
    if state.state2 is not None:
        second = state.state2
        absmax = second.code[absmax.long()] * second.absmax[blocks // second.blocksize] + state.offset
    weights = state.code[nibbles.int()]  # 64-bit indices would take most of the memory of an export
    scales = absmax.float().repeat_interleave(state.blocksize)[first % state.blocksize :][: last - first]
    return (weights * scales).view(end - begin, *state.shape[1:])


@dataclass
class LowRank(Weight):
    """base + scale * B A, and with DoRA each row scaled to its magnitude.

    `base` and `magnitude` have out rows. An embedding's rows are tokens, so its pair is (A^T, B^T) of PEFT's.
    """

    base: Weight
    pairs: list[tuple[torch.Tensor, torch.Tensor, float]]  # B [rows, r], A [r, columns], scale
    magnitude: torch.Tensor | None = None  # [rows]

    def __post_init__(self):
        self.shape = self.base.shape
        for b, a, _ in self.pairs:
            if (b.shape[0], a.shape[1]) != self.shape:
                need = f"adapters of shape {self.shape} like their layer"
                raise ValueError(f"model must have {need}, got {(b.shape[0], a.shape[1])}")

    def rows(self, begin: int, end: int) -> torch.Tensor:
        weight = self.base.rows(begin, end)
        for b, a, scale in self.pairs:
            weight = weight + scale * (b.detach()[begin:end].float() @ a.detach().float()).to(weight.device)
        if self.magnitude is not None:
            norm = weight.norm(dim=1, keepdim=True)  # of a row alone, so chunks do not change it
            weight = weight * (self.magnitude.detach()[begin:end].float().to(weight.device)[:, None] / norm)
        return weight

    def close(self) -> None:
        self.base.close()


@dataclass
class WithRows(Weight):
    """base with some of its rows replaced, as by `trainable_token_indices` of PEFT."""

    base: Weight
    index: list[int]  # of the replaced rows
    replacement: torch.Tensor  # [rows of `index`, columns]

    def __post_init__(self):
        self.shape = self.base.shape

    def rows(self, begin: int, end: int) -> torch.Tensor:
        weight = self.base.rows(begin, end)
        index = torch.tensor(self.index, device=weight.device)
        inside = (index >= begin) & (index < end)
        rows = self.replacement.detach().to(weight)[inside]
        return weight.index_copy(0, index[inside] - begin, rows)

    def close(self) -> None:
        self.base.close()
