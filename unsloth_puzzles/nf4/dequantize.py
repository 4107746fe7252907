"""bitsandbytes NF4 -> float16, bfloat16 or float32: one kernel launch, one allocation, the same bits.

    dequantize_nf4    finds the packed tensor and its state
    dequantize        recalls the launch of a weight that was checked before; else checks, prepares and remembers it
    Launch.run        allocates the result and enqueues the kernel

In traced code (torch.compile, dispatch modes) the operator `unsloth_puzzles::dequantize_nf4` stands for the last step.
"""

import torch
from torch._C import DisableTorchFunctionSubclass, _are_functorch_transforms_active, _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from unsloth_puzzles.nf4.cache import recall, remember
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import NF4Weight, check, nf4_weight, resolve


def dequantize_nf4(weight, quant_state=None, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """De-quantise a bitsandbytes NF4 weight; bit for bit what `bitsandbytes.functional.dequantize_4bit` gives on CUDA.

    Args:
        weight: a bitsandbytes `Linear4bit`, a `Params4bit`, or a packed tensor of any `quant_storage` dtype, two
            weights a byte, the high nibble first. CPU tensors need Triton's interpreter (TRITON_INTERPRET=1).
        quant_state: the `QuantState` of a packed tensor; by default the one `weight` carries. `absmax` is uint8 with a
            second level (`compress_statistics=True`) or float32; every block size of bitsandbytes is accepted. Its
            `code` is what 4-bit values mean (bitsandbytes has the NF4 table in its kernel and ignores `code`).
        out: where to write, a contiguous tensor of the state's shape and dtype on the weight's device.

    Returns:
        The weight, `quant_state.shape` in `quant_state.dtype`; transposed if the packed tensor is a row [1, n], as
        bitsandbytes does.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    packed, state = resolve(weight, quant_state)
    if is_traced(packed):
        check(packed, state)
        if out is not None:
            _check_out(out, packed, state)
        result = torch.ops.unsloth_puzzles.dequantize_nf4(*nf4_weight(packed, state))
        result = result if out is None else out.copy_(result)
        return result.t() if packed.shape[0] == 1 else result
    with DisableTorchFunctionSubclass():  # else Params4bit sends each attribute and method through Python
        return dequantize(packed, state, out=out, transpose_row=True)


def is_traced(packed: torch.Tensor) -> bool:
    """Whether tensors may stand for others (torch.compile, dispatch modes, torch.func), so that only an op will do."""
    return (
        is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or isinstance(packed, FakeTensor)
    )


def dequantize(
    packed: torch.Tensor, state, dtype: torch.dtype | None = None, out=None, *, transpose_row: bool = False
) -> torch.Tensor:
    """De-quantise a weight, outside of traced code: by the launch that is remembered, or else checked.

    Args:
        packed: the packed tensor, however it lies; torch functions of its class must be disabled.
        state: its `QuantState`.
        dtype: of the result; None for the state's.
        out: where to write, None for a new tensor.
        transpose_row: whether the weight of a packed row is handed out transposed, as bitsandbytes does.

    Returns:
        The weight, `state.shape` in `dtype`.
    """
    launch = recall(packed, state, dtype) if out is None else None
    if launch is not None:  # never of a row
        return launch.run()
    check(packed, state)
    if out is None:
        launch = prepare(nf4_weight(packed, state, dtype))
        remember(launch, packed, state)
        out = launch.run()
    else:
        _check_out(out, packed, state)
        prepare(nf4_weight(packed, state), out).run(out)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)  # or a backward that saved `out` would not notice the write
    return out.t() if transpose_row and packed.shape[0] == 1 else out


def _check_out(out, packed: torch.Tensor, state) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dtype != state.dtype:
        raise TypeError(f"out must have dtype {state.dtype}, got {out.dtype}")
    if out.shape != torch.Size(state.shape):
        raise ValueError(f"out must have shape {tuple(state.shape)}, got {tuple(out.shape)}")
    if out.device != packed.device:
        raise ValueError(f"out must be on the weight's device {packed.device}, got {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError("out must not require gradients, since the kernel writes into it, got requires_grad=True")


# The fields of NF4Weight: an operator takes plain tensors.
torch.library.define(
    "unsloth_puzzles::dequantize_nf4",
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor",
)


@torch.library.impl("unsloth_puzzles::dequantize_nf4", ("CUDA", "CPU"))
def _(*weight):
    return prepare(NF4Weight(*weight)).run()


@torch.library.register_fake("unsloth_puzzles::dequantize_nf4")
def _(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=packed.device)
