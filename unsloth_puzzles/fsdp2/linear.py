"""The NF4 layer over a byte stream: gather, slice, de-quantise by challenge A's kernel, multiply.

Only the parameter is kept for the backward, which FSDP2 frees after the forward and fills again.
"""

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.tensor import DTensor

import unsloth_puzzles.nf4.linear  # noqa: F401  (registers the operators)
from unsloth_puzzles.fsdp2.launch import dequantize_stream
from unsloth_puzzles.fsdp2.stream import ByteStream, Layout, stream_of
from unsloth_puzzles.nf4.dequantize import is_traced

_OPS = torch.ops.unsloth_puzzles


class StreamLinear4bit(Linear4bit):
    """A bitsandbytes NF4 layer over a byte stream: `weight` is a `ByteStream`, or what FSDP2 has gathered of it.

    Attributes:
        layout: Where the parts of the stream lie.
        code, code2, offset: Buffers, the same on every rank: the NF4 table [16], the table of the absmax [256] and
            their mean [], float32; the last two are None without double quantisation.
    """

    uses_nf4_kernel = True  # `patch_linear4bit` has nothing to exchange here
    packed_by = "pack_nf4"  # for the error of `dequantize_nf4`

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features] -> [..., out_features] in the dtype of x, computed in `compute_dtype`."""
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        return self.multiply(x, self.bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + bias as `forward` computes it."""
        inputs = x if self.compute_dtype is None else x.to(self.compute_dtype)
        if torch.is_autocast_enabled(x.device.type):
            inputs = inputs.to(torch.get_autocast_dtype(x.device.type))
        bias = None if bias is None else bias.to(inputs.dtype)
        tables = self.code, self.code2, self.offset
        return _StreamLinear.apply(inputs, bias, self.weight, *tables, self.layout).to(x.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight, [out_features, in_features] in `dtype`; the stream must be gathered.

        Args:
            dtype: None is `compute_dtype`, or float32 without one.
        """
        dtype = dtype or self.compute_dtype or torch.float32
        return _dequantize(self.weight, self.code, self.code2, self.offset, self.layout, dtype)

    def _apply(self, fn, recurse=True):
        """Refuse a cast.

        A cast to float16 would skip the stream, which already reports float16, but would round the tables.
        """
        if (dtype := fn(self.code).dtype) != self.code.dtype:
            raise TypeError(
                f"dtype must be left out for a packed model, got {dtype}; "
                "cast the model before pack_nf4, or its adapters alone"
            )
        return super()._apply(fn, recurse)

    # The model's state dict names the frozen weight: torch's `ignore_frozen_params` removes a key that must exist. A
    # stub stands for it, so that saving a checkpoint never gathers 4-bit weights.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        nn.Linear._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[prefix + "weight"] = torch.empty(0, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        given = state_dict.pop(prefix + "weight", None)
        own = isinstance(given, DTensor | ByteStream)  # torch fills what a checkpoint lacks with the model's own
        if given is not None and given.numel() and not own:
            errors.append(f"{prefix}weight must be the stub of a packed layer, got a tensor of {tuple(given.shape)}")
        bias = state_dict.get(prefix + "bias")
        wanted = {"weight": given, "bias": bias} if self.bias is not None else {"weight": given}
        missing += [prefix + name for name, one in wanted.items() if strict and one is None]
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)


class _StreamLinear(torch.autograd.Function):
    """x W^T + b. What is kept for the backward is the parameter, never W."""

    @staticmethod
    def forward(ctx, x, bias, weight, code, code2, offset, layout):
        ctx.layout = layout
        ctx.save_for_backward(weight, code, code2, offset)
        return F.linear(x, _dequantize(weight, code, code2, offset, layout, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_output):  # [..., out_features]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight, *tables = ctx.saved_tensors
            grad_x = grad_output @ _dequantize(weight, *tables, ctx.layout, grad_output.dtype, again_for=grad_output)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)  # [out_features]
        return grad_x, grad_bias, None, None, None, None, None


def _dequantize(weight, code, code2, offset, layout: Layout, dtype: torch.dtype, again_for=None) -> torch.Tensor:
    """W [out_features, in_features]; the backward's call depends on the gradient, so that a compiler keeps no W."""
    if weight.is_cuda and not is_traced(weight):
        return dequantize_stream(weight, code, code2, offset, layout, dtype)
    packed, absmax, absmax2 = layout.split(stream_of(weight))  # [n, 1], [blocks], [blocks2] or None
    sizes = layout.blocksize, layout.blocksize2 or 1, layout.shape, dtype
    if again_for is None:
        return _OPS.dequantize_nf4(packed, absmax, code, code2, absmax2, offset, *sizes)
    return _OPS.dequantize_nf4_again(again_for, packed, absmax, code, code2, absmax2, offset, *sizes)
