"""What `dequantize_nf4` is held against: the same matrix, de-quantised by what people use today.

All take a bitsandbytes `Linear4bit`. None of them is ours; bitsandbytes and PEFT are imported when called for.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

_current_device = getattr(torch._C, "_cuda_getDevice", None)  # None in builds of PyTorch without CUDA
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def bitsandbytes_dequantize(layer) -> torch.Tensor:
    """`bitsandbytes.functional.dequantize_4bit`: the reference for every bit."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def peft_dequantize(layer) -> torch.Tensor:
    """PEFT's `dequantize_module_weight`, as its LoRA merging uses it."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


def three_launches(layer) -> torch.Tensor:
    """De-quantise as Unsloth did when the puzzle was set: absmax, add the offset, weights; three kernels, two buffers.

    The host code is short: the C functions of bitsandbytes are looked up once, each attribute is read once, and the
    device is switched only if it is not the current one.
    """
    weight = layer.weight
    packed, state = weight.data, weight.quant_state
    index = packed.get_device()
    if _current_device() != index:
        with torch.cuda.device(index):
            return three_launches(layer)
    absmax8, state2, dtype, device = state.absmax, state.state2, state.dtype, packed.device
    weights = torch.empty(state.shape, dtype=dtype, device=device)
    absmax = torch.empty(absmax8.shape, dtype=torch.float32, device=device)
    blocks, numel, address, stream = absmax.numel(), weights.numel(), absmax.data_ptr(), _current_stream(index)
    if numel >= 2**31:
        raise ValueError(f"layer must have fewer than 2^31 weights, which bitsandbytes counts in 32 bits, got {numel}")
    functions = _c_functions()
    functions["absmax"](
        state2.code.data_ptr(), absmax8.data_ptr(), state2.absmax.data_ptr(), address, state2.blocksize, blocks, stream
    )
    absmax += state.offset
    functions[dtype](None, packed.data_ptr(), address, weights.data_ptr(), state.blocksize, numel, stream)
    return weights


@cache
def _c_functions() -> dict[object, Callable[..., None]]:
    """bitsandbytes' C functions by what they de-quantise: code, input, absmax, output, block size, count, stream."""
    from bitsandbytes.functional import lib

    pointer, number = ctypes.c_void_p, ctypes.c_int
    prototype = ctypes.CFUNCTYPE(None, pointer, pointer, pointer, pointer, number, number, pointer)
    names = {
        "absmax": "cdequantize_blockwise_fp32",
        torch.float16: "cdequantize_blockwise_fp16_nf4",
        torch.bfloat16: "cdequantize_blockwise_bf16_nf4",
        torch.float32: "cdequantize_blockwise_fp32_nf4",
    }
    return {key: prototype(ctypes.cast(getattr(lib, name), pointer).value) for key, name in names.items()}


THREE_LAUNCHES = "three bitsandbytes launches (Unsloth's sequence)"


def baselines(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the baselines that can run here, by name. On a CPU bitsandbytes has no kernels to launch."""
    found = {"bitsandbytes": bitsandbytes_dequantize, "PEFT": peft_dequantize}
    return {THREE_LAUNCHES: three_launches, **found} if device == "cuda" else found
