"""The 4-bit linear layer: x @ W.T + bias, where W exists only while it is multiplied.

    forward   y  = x @ W.T + bias     de-quantise W, multiply, forget W
    backward  dx = dy @ W             de-quantise W again, multiply, forget W
              db = sum of dy over its rows

Between the two lie only the packed weight and its quantisation state, which are there anyway: 0.52 bytes a weight.
Keeping W would cost 2 more (16-bit), for all layers of the model at once. x is not kept either: W is frozen, so nobody
asks for dW.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch._C import _are_functorch_transforms_active

from unsloth_puzzles.nf4.cache import is_remembered
from unsloth_puzzles.nf4.dequantize import dequantize, is_traced
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import NF4Weight, check, nf4_weight, resolve

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def nf4_linear(x: torch.Tensor, weight, quant_state=None, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ W.T + bias for a frozen bitsandbytes NF4 weight W (QLoRA, arXiv:2305.14314).

    W is de-quantised straight into the dtype it is multiplied in, whatever `quant_state.dtype` is: one rounding.

    Args:
        x: [..., in_features], float16, bfloat16 or float32, on the weight's device. Under `torch.autocast` it is cast
            to the autocast dtype, as by `torch.nn.functional.linear`.
        weight: a bitsandbytes `Linear4bit` (its own bias is then used), a `Params4bit`, or a packed tensor.
        quant_state: the `QuantState` of a packed tensor, shape (out_features, in_features) however the packed data lie.
        bias: [out_features] or None; cast to the dtype of the product.

    Returns:
        [..., out_features] in x's dtype (autocast's under autocast). Gradients reach `x` and `bias`, never the weight.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it is.
    """
    if hasattr(weight, "get_base_layer"):
        raise TypeError(
            "weight must be a Linear4bit, got a PEFT layer, whose adapters would be left out; pass its base layer"
        )
    packed, state = resolve(weight, quant_state)
    if bias is None and isinstance(weight, torch.nn.Module):
        bias = weight.bias
    traced = is_traced(packed)
    with nullcontext() if traced else torch._C.DisableTorchFunctionSubclass():  # see dequantize_nf4
        if traced or not is_remembered(state):  # else `recall` sees whether anything has changed
            check(packed, state)
        _check_input(x, packed, state, bias)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if bias is not None:
        bias = bias.to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        function = _TransformableNF4Linear if _are_functorch_transforms_active() else _NF4Linear
        return function.apply(x, bias, packed, state)
    return F.linear(x, _weight(packed, state, x.dtype), bias)


def _check_input(x, packed, state, bias) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    if x.device != packed.device:
        raise ValueError(f"x must be on the weight's device {packed.device}, got {x.device}")
    if len(state.shape) != 2:
        raise ValueError(f"quant_state.shape must be (out_features, in_features), got {tuple(state.shape)}")
    out_features, in_features = state.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have a last dimension of {in_features} (in_features), got shape {tuple(x.shape)}")
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias must be a tensor, got {type(bias).__name__}")
    if bias is not None and bias.device != x.device:
        raise ValueError(f"bias must be on x's device {x.device}, got {bias.device}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}")


class _NF4Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, packed, state):
        ctx.state = state
        ctx.save_for_backward(packed)
        return F.linear(x, _weight(packed, state, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_output):
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            (packed,) = ctx.saved_tensors
            grad_x = grad_output @ _weight(packed, ctx.state, grad_output.dtype, again_for=grad_output)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None


class _TransformableNF4Linear(torch.autograd.Function):
    """The same for `torch.func`, which needs `setup_context`. PyTorch then inspects the signature in every call."""

    @staticmethod
    def forward(x, bias, packed, state):
        return F.linear(x, _weight(packed, state, x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, packed, ctx.state = inputs
        ctx.save_for_backward(packed)

    backward = _NF4Linear.backward


def _weight(packed, state, dtype: torch.dtype, again_for: torch.Tensor | None = None) -> torch.Tensor:
    """W [out_features, in_features] in `dtype`.

    Traced by a compiler, the backward's call must depend on the gradient. Two equal calls would be merged into one and
    its result kept from forward to backward: torch.compile would hold every W of the model, which this file is against.
    """
    if not is_traced(packed):
        with torch._C.DisableTorchFunctionSubclass():
            return dequantize(packed, state, dtype)
    weight = nf4_weight(packed, state, dtype)
    if again_for is None:
        return torch.ops.unsloth_puzzles.dequantize_nf4(*weight)
    return torch.ops.unsloth_puzzles.dequantize_nf4_again(again_for, *weight)


torch.library.define(
    "unsloth_puzzles::dequantize_nf4_again",
    "(Tensor grad_output, Tensor packed, Tensor absmax, Tensor code, Tensor? code2, Tensor? absmax2, Tensor? offset, "
    "int blocksize, int blocksize2, SymInt[] shape, ScalarType dtype) -> Tensor",
)


@torch.library.impl("unsloth_puzzles::dequantize_nf4_again", ("CUDA", "CPU"))
def _(grad_output, *weight):
    return prepare(NF4Weight(*weight)).run()


@torch.library.register_fake("unsloth_puzzles::dequantize_nf4_again")
def _(grad_output, packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, shape, dtype):
    return torch.empty(shape, dtype=dtype, device=packed.device)
