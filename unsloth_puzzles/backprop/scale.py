"""In place, on tensors too large to have twice: multiply by a scalar on the device; narrow float32 to 16 bits."""

import torch
import triton
import triton.language as tl

from unsloth_puzzles.device import capability

_BLOCK = 4096  # values at a time: 8 KB or 16 KB, enough in flight to reach the copy bandwidth
_PROGRAMS = 2048  # at most: enough to fill any GPU, few enough to cost nothing where there is nothing to do
_PIECE = 2**22  # values at a time where Triton does not run: a float32 temporary of 16 MB


def scale_in_place(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a tensor by a scalar that is on its device.

    The product is formed in float32 (float64 for float64) and rounded once. `Tensor.mul_` would round the factor to
    the tensor's dtype first: 1/3 in bfloat16 is 0.3340. On a GPU the kernel reads the factor itself, so nothing waits
    for the device, and returns at once when it is 1: a loss that is the root of the graph costs no pass over dW.

    Args:
        tensor: Contiguous, any floating dtype and shape; overwritten.
        factor: 0-dim, a floating dtype, on the device of `tensor`.

    Returns:
        `tensor`.
    """
    if tensor.dtype == torch.float64 or not _triton_runs(tensor):
        exact = torch.promote_types(tensor.dtype, torch.float32)
        for piece in tensor.view(-1).split(_PIECE):
            piece.copy_(piece.to(exact) * factor.to(exact))
        return tensor
    numel = tensor.numel()
    if numel:
        with torch.cuda.device(tensor.device):
            programs = min(_PROGRAMS, triton.cdiv(numel, _BLOCK))
            _scale[(programs,)](tensor, factor.to(torch.float32), numel, BLOCK=_BLOCK, num_warps=8)
    return tensor


def narrow_in_place(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a float32 tensor to 16 bits, in the first half of its own memory.

    The values are converted in runs of doubling length: the values [n, 2n) lie at bytes [4n, 8n) and go to [2n, 4n),
    which no later run reads and which does not overlap them. So 2.0 GiB of float32 gradient become bfloat16 without
    another 1.0 GiB at the peak.

    Args:
        tensor: Contiguous float32, any shape; not to be used afterwards.
        dtype: float16 or bfloat16.

    Returns:
        A tensor of the same shape in `dtype`, which keeps the whole storage alive.

    Raises:
        ValueError: `tensor` is not float32, or `dtype` not of 16 bits.
    """
    if tensor.dtype != torch.float32 or dtype.itemsize != 2:
        raise ValueError(f"tensor must be float32, to be narrowed to a 16-bit dtype, got {tensor.dtype} and {dtype}")
    wide = tensor.view(-1)
    narrow = wide.view(dtype)[: wide.numel()]
    done = min(1024, wide.numel())
    narrow[:done] = wide[:done].to(dtype)  # by way of a temporary: this run overlaps its own target
    while done < wide.numel():
        stop = min(2 * done, wide.numel())
        narrow[done:stop].copy_(wide[done:stop])
        done = stop
    return narrow.view(tensor.shape)


def _triton_runs(tensor: torch.Tensor) -> bool:
    """Below sm_80 Triton has no conversion to bfloat16; its interpreter truncates there."""
    if not tensor.is_cuda or triton.knobs.runtime.interpret or not tensor.is_contiguous():
        return False
    return tensor.dtype != torch.bfloat16 or capability(tensor.device) >= 80


@triton.jit
def _scale(tensor_ptr, factor_ptr, numel, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        while start < numel:
            index = start + tl.arange(0, BLOCK)
            mask = index < numel
            value = tl.load(tensor_ptr + index, mask=mask).to(tl.float32) * factor
            tl.store(tensor_ptr + index, value.to(tensor_ptr.dtype.element_ty), mask=mask)
            start += stride
