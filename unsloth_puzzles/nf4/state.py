"""What bitsandbytes stores beside a packed weight, and what is wrong with it when it does not fit."""

import torch

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FIELDS = ("absmax", "code", "dtype", "shape", "blocksize", "quant_type", "offset", "state2")


def resolve(weight, quant_state=None):
    """Return (packed tensor, QuantState) of a bnb `Linear4bit`, a `Params4bit`, or a packed tensor with its state.

    Raises:
        TypeError: `weight` is neither a tensor nor a module that holds one.
        ValueError: there is no quantisation state, as before bitsandbytes has moved the weight to the GPU.
    """
    packed = weight
    if isinstance(weight, torch.nn.Module):
        packed = getattr(weight, "weight", None)
        if quant_state is None:  # sharding frameworks keep the state on the module alone
            quant_state = getattr(packed, "quant_state", None) or getattr(weight, "quant_state", None)
    elif quant_state is None:
        quant_state = getattr(weight, "quant_state", None)
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"weight: needs a Linear4bit, a Params4bit or a packed tensor, got {type(weight).__name__}")
    if quant_state is None:
        raise ValueError(
            f"quant_state: {type(weight).__name__} carries none; pass the QuantState that quantize_4bit returned, "
            "or move the module to its device first (bitsandbytes quantises it there)"
        )
    return packed, quant_state


def _check_tensor(name: str, tensor, dtype: torch.dtype, device: torch.device, numel: int) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name}: needs a {dtype} tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: needs dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name}: needs the weight's device {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: needs a contiguous tensor, got strides {tensor.stride()}")
    if tensor.numel() < numel:
        raise ValueError(f"{name}: needs at least {numel} elements, got {tensor.numel()}")


def check(packed: torch.Tensor, state) -> None:
    """Raise a TypeError or ValueError that names the argument, unless `packed` and `state` are a whole NF4 weight."""
    if type(state).__name__ != "QuantState" and not all(hasattr(state, field) for field in _FIELDS):
        raise TypeError(f"quant_state: needs a bitsandbytes 4-bit QuantState, got {type(state).__name__}")
    if state.quant_type != "nf4":
        raise ValueError(f"quant_state.quant_type: needs 'nf4', got {state.quant_type!r}")
    if state.dtype not in _DTYPES:
        raise TypeError(f"quant_state.dtype: needs float16, bfloat16 or float32, got {state.dtype}")
    if not isinstance(state.blocksize, int) or state.blocksize not in BLOCKSIZES:
        raise ValueError(f"quant_state.blocksize: needs one of {BLOCKSIZES}, got {state.blocksize!r}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("quant_state: bitsandbytes has re-packed this weight for CPU inference; load it again")
    shape = state.shape
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int | torch.SymInt) and n >= 0 for n in shape):
        raise ValueError(f"quant_state.shape: needs a tuple of integers, none negative, got {shape!r}")
    if packed.dim() == 0 or (packed.shape[0] == 1 and len(shape) > 2):
        raise ValueError(
            f"weight: needs packed data [n, 1], or the row [1, n] of a matrix, got shape {tuple(packed.shape)} "
            f"for weights of shape {tuple(shape)}"
        )
    numel = torch.Size(shape).numel()
    device = packed.device
    stored, needed = packed.numel() * packed.element_size(), -(-numel // 2)
    if not needed <= stored < needed + packed.element_size():
        raise ValueError(
            f"weight: {numel} weights of shape {tuple(state.shape)} need {needed} packed bytes, got {stored} "
            f"(dtype {packed.dtype}, shape {tuple(packed.shape)})"
        )
    if not packed.is_contiguous():
        raise ValueError(f"weight: needs a contiguous packed tensor, got strides {packed.stride()}")
    blocks = -(-numel // state.blocksize)
    state2 = state.state2
    _check_tensor("quant_state.code", state.code, torch.float32, device, 16)
    _check_tensor(
        "quant_state.absmax", state.absmax, torch.uint8 if state2 is not None else torch.float32, device, blocks
    )
    if state2 is not None:
        blocksize2 = state2.blocksize
        if not isinstance(blocksize2, int) or blocksize2 < 1:
            raise ValueError(f"quant_state.state2.blocksize: needs a positive integer, got {blocksize2!r}")
        _check_tensor("quant_state.offset", state.offset, torch.float32, device, 1)
        _check_tensor("quant_state.state2.code", state2.code, torch.float32, device, 256)
        _check_tensor("quant_state.state2.absmax", state2.absmax, torch.float32, device, -(-blocks // blocksize2))


def parts_of(packed: torch.Tensor, state, dtype: torch.dtype) -> tuple:
    """Arguments of the operator `unsloth_puzzles::dequantize_nf4`; a plain absmax has no second level."""
    second, blocksize2 = (None, None, None), 1
    if state.state2 is not None:
        second = (state.state2.code, state.state2.absmax, state.offset)
        blocksize2 = state.state2.blocksize
    return packed, state.absmax, state.code, *second, state.blocksize, blocksize2, state.shape, dtype
