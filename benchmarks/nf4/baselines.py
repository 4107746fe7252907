"""What `dequantize_nf4` is held against: the same matrix, de-quantised by what people use today.

All take a bitsandbytes `Linear4bit`. None of them is ours; bitsandbytes and PEFT are imported when called for.
"""

import ctypes
from collections.abc import Callable

import torch


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

    bitsandbytes' own C functions are called directly, with as little Python around them as they need.
    """
    from bitsandbytes.functional import lib

    packed, state = layer.weight.data, layer.weight.quant_state
    if state.shape.numel() >= 2**31:
        raise ValueError(
            f"layer must have fewer than 2^31 weights, which bitsandbytes counts in 32 bits, got {state.shape}"
        )
    device, stream = packed.device, torch._C._cuda_getCurrentRawStream(packed.device.index)
    absmax = torch.empty(state.absmax.numel(), dtype=torch.float32, device=device)
    weights = torch.empty(state.shape, dtype=state.dtype, device=device)
    with torch.cuda.device(device):
        lib.cdequantize_blockwise_fp32(
            _address(state.state2.code),
            _address(state.absmax),
            _address(state.state2.absmax),
            _address(absmax),
            ctypes.c_int(state.state2.blocksize),
            ctypes.c_int(absmax.numel()),
            ctypes.c_void_p(stream),
        )
        absmax += state.offset
        kind = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[state.dtype]
        getattr(lib, f"cdequantize_blockwise_{kind}_nf4")(
            ctypes.c_void_p(0),
            _address(packed),
            _address(absmax),
            _address(weights),
            ctypes.c_int(state.blocksize),
            ctypes.c_int(weights.numel()),
            ctypes.c_void_p(stream),
        )
    return weights


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


THREE_LAUNCHES = "three bitsandbytes launches (Unsloth's sequence)"


def baselines(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """What can run here, by name. On a CPU bitsandbytes has no kernels to launch."""
    found = {"bitsandbytes": bitsandbytes_dequantize, "PEFT": peft_dequantize}
    return {THREE_LAUNCHES: three_launches, **found} if device == "cuda" else found
