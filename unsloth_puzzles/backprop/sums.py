"""The gradient of one tensor, summed over the chunks: in which dtype, and in float16 without overflow."""

import torch

from unsloth_puzzles.backprop.scale import narrow_in_place, scale_in_place
from unsloth_puzzles.device import capability

_VOCABULARY_BLOCK = 8192  # rows of dW that are accumulated at a time where no GEMM accumulates in another dtype
_MOST = 2.0**15  # of a float16 entry: half of what there is room for, since each addition rounds


class Sum:
    """The gradient of `tensor`, summed in `dtype`, or in float32 for a vector: that costs nothing.

    A float16 sum is kept times `scale`, a power of two. It is 1 unless an entry could pass 2^15, and falls then. By
    Hoelder's inequality no entry of G^T X is larger than the largest column sum of |G| times the largest |X|. So
    thousands of rows that pull one way do not overflow, whose mean would fit. The scale stays on the device: nothing
    waits for it.

    Args:
        tensor: Whose gradient it is, of any shape.
        dtype: Of the sum, for a matrix.
    """

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype):
        self.shape, self.device, self.total = tensor.shape, tensor.device, None
        self.dtype = dtype if tensor.dim() > 1 else torch.promote_types(dtype, torch.float32)
        self.scale = None
        if self.dtype == torch.float16:
            self.scale = torch.ones((), dtype=torch.float32, device=tensor.device)
        self._bound = 0.0  # of each entry of the sum, at scale 1

    def add(self, gradient: torch.Tensor) -> None:
        """Add a gradient of the tensor's shape."""
        if self.scale is not None:
            self._make_room(_largest(gradient))
            gradient = gradient * self.scale
        if self.total is None:  # a copy: autograd may give the same tensor to two parameters, or a transposed one
            self.total = gradient.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        else:
            self.total += gradient

    def add_product(self, gradient: torch.Tensor, x: torch.Tensor) -> None:
        """Add gradient^T x.

        Args:
            gradient: [rows, out].
            x: [rows, in], of the same dtype.
        """
        if self.scale is not None:
            columns = torch.linalg.vector_norm(gradient, 1, dim=0, dtype=torch.float32)  # [out]
            self._make_room(_largest(columns) * _largest(x))
            x = x * self.scale
        first = self.total is None
        if first:
            self.total = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        transposed = gradient.t()
        if gradient.dtype == self.dtype:
            torch.mm(transposed, x, out=self.total) if first else self.total.addmm_(transposed, x)
        elif self.dtype == torch.float32 and capability(x.device) >= 80:
            if first:
                torch.mm(transposed, x, out_dtype=torch.float32, out=self.total)
            else:
                torch.addmm(self.total, transposed, x, out_dtype=torch.float32, out=self.total)
        else:  # cuBLAS has no such product below sm_80, nor has the CPU: widen a block of the vocabulary at a time
            x = x.to(self.dtype)
            for start in range(0, self.shape[0], _VOCABULARY_BLOCK):
                rows = slice(start, start + _VOCABULARY_BLOCK)
                block = transposed[rows].to(self.dtype)
                torch.mm(block, x, out=self.total[rows]) if first else self.total[rows].addmm_(block, x)

    def result(self, tensor: torch.Tensor, scaled: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The sum in the dtype that the gradient of `tensor` must have, and the power of two that it is multiplied by.

        Args:
            tensor: Whose gradient it is.
            scaled: Whether there may be such a power. If not, a sum that does not fit is infinite.

        Returns:
            The sum, None if nothing was added; and the power, [], None for 1.
        """
        if self.total is None:
            return None, None
        total, scale = self.total, self.scale
        if total.dtype != tensor.dtype and not _takes(tensor, total.dtype):
            if scaled and tensor.dtype == torch.float16:
                scale = _power(_largest(total))
                scale_in_place(total, scale)
            narrow = total.dtype == torch.float32 and tensor.dtype.itemsize == 2 and total.is_contiguous()
            total = narrow_in_place(total, tensor.dtype) if narrow else total.to(tensor.dtype)
        elif scale is not None and not scaled:
            scale_in_place(total, 1 / scale)
        return total, scale if scaled else None

    def _make_room(self, largest: torch.Tensor) -> None:
        """Lower the scale, if need be, for a summand that has no entry larger than this."""
        self._bound = self._bound + largest
        scale = _power(self._bound)
        if self.total is not None:
            scale_in_place(self.total, scale / self.scale)
        self.scale = scale


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, 0-dim, float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, torch.inf).to(wide) if tensor.numel() else tensor.new_zeros((), dtype=wide)


def _power(largest: torch.Tensor) -> torch.Tensor:
    """The power of two, at most 1, that brings entries of this size below 2^15."""
    return torch.exp2((torch.log2(_MOST / largest)).floor()).clamp(max=1)


def _takes(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the tensor's owner has said that its gradient may have this dtype (`Tensor.grad_dtype`)."""
    return tensor.is_leaf and getattr(tensor, "grad_dtype", tensor.dtype) in (None, dtype)
