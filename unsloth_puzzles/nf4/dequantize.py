"""bitsandbytes NF4 -> float16, bfloat16 or float32: one kernel launch, one allocation, the same bits."""

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unsloth_puzzles.nf4.launch import INTERPRETED, MAX_NUMEL, launch
from unsloth_puzzles.nf4.plan import plan_of, remember
from unsloth_puzzles.nf4.state import check, parts_of, resolve


def dequantize_nf4(weight, quant_state=None, *, out=None) -> torch.Tensor:
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
        TypeError, ValueError: naming the argument, what it is and what is needed.
    """
    packed, state = resolve(weight, quant_state)
    if is_traced() or isinstance(packed, FakeTensor):
        check(packed, state)
        result = torch.ops.unsloth_puzzles.dequantize_nf4(*parts_of(packed, state, state.dtype))
        if out is not None:
            _check_out(out, packed, state)
            result = out.copy_(result)
        return result.t() if packed.shape[0] == 1 else result
    if type(packed) is torch.Tensor:
        return _eager(packed, state, out)
    with torch._C.DisableTorchFunctionSubclass():  # else Params4bit sends each attribute and method through Python
        return _eager(packed, state, out)


def is_traced() -> bool:
    """Whether tensors may stand for others (torch.compile, dispatch modes, torch.func), so that only an op will do."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def _eager(packed, state, out) -> torch.Tensor:
    if out is None:
        plan = plan_of(id(state))
        result = None if plan is None else plan.run(packed, state)
        if result is not None:
            return result
    check(packed, state)
    if out is not None:
        _check_out(out, packed, state)
    result = dequantize_parts(*parts_of(packed, state, state.dtype), out)
    if out is None:
        remember(packed, state, result)
    elif not out.is_inference():
        torch.autograd.graph.increment_version(out)  # or a backward that saved `out` would not notice the write
    return result.t() if packed.shape[0] == 1 else result


def _check_out(out, packed, state) -> None:
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out: needs a tensor, got {type(out).__name__}")
    if out.dtype != state.dtype:
        raise TypeError(f"out: needs dtype {state.dtype}, got {out.dtype}")
    if out.shape != torch.Size(state.shape):
        raise ValueError(f"out: needs shape {tuple(state.shape)}, got {tuple(out.shape)}")
    if out.device != packed.device:
        raise ValueError(f"out: needs the weight's device {packed.device}, got {out.device}")
    if not out.is_contiguous():
        raise ValueError(f"out: needs a contiguous tensor, got strides {out.stride()}")
    if out.requires_grad:
        raise ValueError("out: needs a tensor that does not require gradients; the kernel writes into it")


def dequantize_parts(
    packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype, out=None
) -> torch.Tensor:
    """What the operator does: `state.parts_of` -> the weight, or `out` filled with it. The parts are not checked."""
    if is_traceable_wrapper_subclass(packed):
        raise TypeError(f"weight: needs a plain packed tensor, got {type(packed).__name__}; pass its local tensor")
    if not packed.is_cuda and not INTERPRETED:
        raise ValueError(
            f"weight: needs a CUDA tensor, got {packed.device}; on a CPU set TRITON_INTERPRET=1 before importing triton"
        )
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    numel = out.numel()
    if numel >= MAX_NUMEL:
        raise ValueError(f"quant_state.shape: needs fewer than 2^34 weights, got {numel}")
    if numel:
        launch(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, out)
    return out


torch.library.define(
    "unsloth_puzzles::dequantize_nf4",
    "(Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor",
)
torch.library.impl("unsloth_puzzles::dequantize_nf4", ("CUDA", "CPU"), dequantize_parts)


@torch.library.register_fake("unsloth_puzzles::dequantize_nf4")
def _(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=packed.device)
