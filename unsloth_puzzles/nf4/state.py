"""What bitsandbytes stores beside a packed NF4 weight: found, checked, and brought into one typed state."""

from typing import NamedTuple

import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FIELDS = ("absmax", "code", "dtype", "shape", "blocksize", "quant_type", "offset", "state2")


class NF4Weight(NamedTuple):
    """A packed weight and all that de-quantises it, in the order of the operator's arguments.

    weight = code[nibble] * absmax, and if absmax is quantised itself (nested), absmax = code2[q] * absmax2 + offset.
    """

    packed: torch.Tensor  # two weights a byte, the high nibble first; any dtype and shape, contiguous
    absmax: torch.Tensor  # [blocks], blocks = ceil(numel / blocksize): uint8 if nested, else float32
    code: torch.Tensor  # [16] float32: what each 4-bit value means
    code2: torch.Tensor | None  # [256] float32: what each uint8 absmax means; None if not nested
    absmax2: torch.Tensor | None  # [ceil(blocks / blocksize2)] float32; None if not nested
    offset: torch.Tensor | None  # scalar float32, on the device: reading it would synchronise; None if not nested
    blocksize: int  # weights that share an absmax
    blocksize2: int  # absmax values that share an absmax2; 1 if not nested
    shape: torch.Size  # of the de-quantised weight
    dtype: torch.dtype  # of the de-quantised weight: float16, bfloat16 or float32


def nf4_weight(packed: torch.Tensor, state, dtype: torch.dtype | None = None) -> NF4Weight:
    """The typed state of a packed tensor and its `QuantState`, to be de-quantised in `dtype` (None: the state's).

    Nothing is checked: see `check`.
    """
    dtype = state.dtype if dtype is None else dtype
    state2 = state.state2
    if state2 is None:
        return NF4Weight(packed, state.absmax, state.code, None, None, None, state.blocksize, 1, state.shape, dtype)
    return NF4Weight(
        packed, state.absmax, state.code, state2.code, state2.absmax, state.offset, state.blocksize, state2.blocksize,
        state.shape, dtype,
    )  # fmt: skip


def resolve(weight, quant_state=None):
    """Find the packed tensor and its quantisation state.

    Args:
        weight: a bitsandbytes `Linear4bit`, a `Params4bit`, or a packed tensor.
        quant_state: the `QuantState` of a packed tensor; None for the one that `weight` carries.

    Returns:
        (packed tensor, QuantState), neither of them checked.

    Raises:
        TypeError: `weight` is neither a tensor nor a module that holds one.
        ValueError: there is no quantisation state, as before bitsandbytes has moved the weight to the GPU, or while the
            layer is packed for FSDP2.
    """
    packed = weight
    if isinstance(weight, torch.nn.Module):
        packed = getattr(weight, "weight", None)
        if quant_state is None:  # sharding frameworks keep the state on the module alone
            quant_state = getattr(packed, "quant_state", None) or getattr(weight, "quant_state", None)
    elif quant_state is None:
        quant_state = getattr(weight, "quant_state", None)
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"weight must be a Linear4bit, a Params4bit or a packed tensor, got {type(weight).__name__}")
    if quant_state is None:
        instead = (
            "pass the one that quantize_4bit returned, or move the module to its device first (bitsandbytes quantises "
            "it there)"
        )
        if packer := getattr(type(weight), "packed_by", None):  # of FSDP2's packed layers, which `fsdp2` defines
            instead = f"undo {packer} first"
        raise ValueError(
            f"quant_state must be a bitsandbytes QuantState, got none with {type(weight).__name__}; {instead}"
        )
    return packed, quant_state


def check(packed: torch.Tensor, state) -> None:
    """Check that `packed` and `state` are a whole NF4 weight.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    if type(state).__name__ != "QuantState" and not all(hasattr(state, field) for field in _FIELDS):
        raise TypeError(f"quant_state must be a bitsandbytes 4-bit QuantState, got {type(state).__name__}")
    if state.quant_type != "nf4":
        raise ValueError(f"quant_state.quant_type must be 'nf4', got {state.quant_type!r}")
    if state.dtype not in _DTYPES:
        raise TypeError(f"quant_state.dtype must be float16, bfloat16 or float32, got {state.dtype}")
    if not isinstance(state.blocksize, int) or state.blocksize not in BLOCKSIZES:
        raise ValueError(f"quant_state.blocksize must be one of {BLOCKSIZES}, got {state.blocksize!r}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "quant_state must be in bitsandbytes' GPU format, got one re-packed for CPU inference; load the model again"
        )
    shape = state.shape
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int | torch.SymInt) and n >= 0 for n in shape):
        raise ValueError(f"quant_state.shape must be a tuple of integers, none negative, got {shape!r}")
    _check_packed(packed, torch.Size(shape))
    numel, device, state2 = torch.Size(shape).numel(), packed.device, state.state2
    blocks = -(-numel // state.blocksize)
    _check_tensor("quant_state.code", state.code, torch.float32, device, 16)
    if state2 is None:
        _check_tensor("quant_state.absmax", state.absmax, torch.float32, device, blocks)
        return
    _check_tensor("quant_state.absmax", state.absmax, torch.uint8, device, blocks)
    blocksize2 = state2.blocksize
    if not isinstance(blocksize2, int) or blocksize2 < 1:
        raise ValueError(f"quant_state.state2.blocksize must be a positive integer, got {blocksize2!r}")
    _check_tensor("quant_state.offset", state.offset, torch.float32, device, 1)
    _check_tensor("quant_state.state2.code", state2.code, torch.float32, device, 256)
    _check_tensor("quant_state.state2.absmax", state2.absmax, torch.float32, device, -(-blocks // blocksize2))


def _check_packed(packed: torch.Tensor, shape: torch.Size) -> None:
    if packed.dim() == 0 or (packed.shape[0] == 1 and len(shape) > 2):
        raise ValueError(
            f"weight must be packed data [n, 1], or the row [1, n] of a matrix, got shape {tuple(packed.shape)} "
            f"for weights of shape {tuple(shape)}"
        )
    stored, needed = packed.numel() * packed.element_size(), -(-shape.numel() // 2)
    if not needed <= stored < needed + packed.element_size():
        raise ValueError(
            f"weight must be {needed} packed bytes for {shape.numel()} weights of shape {tuple(shape)}, got {stored} "
            f"(dtype {packed.dtype}, shape {tuple(packed.shape)})"
        )
    if not packed.is_contiguous():
        raise ValueError(f"weight must be a contiguous packed tensor, got strides {packed.stride()}")


def _check_tensor(name: str, tensor, dtype: torch.dtype, device: torch.device, numel: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a {dtype} tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on the weight's device {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if tensor.numel() < numel:
        raise ValueError(f"{name} must have at least {numel} elements, got {tensor.numel()}")
