"""A layer that runs again only for its backward: the product that only its output depends on is not computed.

    y = x + down(act)        dL/dact = dL/dy W'

The backward of a checkpointed layer repeats the forward to have its graph, and drops y. The gradients need the weight
of `down` and not its result, which is more than a quarter of the arithmetic of a Llama's layer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import product, repeat

import torch

from unsloth_puzzles.compiled.shared_input import StandIn

_VALUES = (0.0, 1.0, -6e4, math.inf, math.nan)  # float16 holds them
_unread: ContextVar[torch.nn.Module | None] = ContextVar("unread", default=None)  # this thread's: others go forward


@contextmanager
def output_unread(layer: torch.nn.Module | None) -> Iterator[None]:
    """Within, `layer` may compute no more than the backward of its output needs: the values that it returns are wrong.

    Args:
        layer: whose output nothing reads, neither a hook nor a forward around its own; None for none.
    """
    token = _unread.set(layer)
    try:
        yield
    finally:
        _unread.reset(token)


def is_unread(layer: torch.nn.Module) -> bool:
    """Whether this thread is within `output_unread` of this layer."""
    return _unread.get() is layer


class Unread(torch.autograd.Function):
    """A tensor of the shape and dtype of `output`, with its gradient, whose values come from `x`, what it was made of.

    Under torch.compile nothing then needs the values of `output`, so they are not computed. Those of `x` are: were they
    not, the compiler would move the whole forward into the backward and keep more of it.
    """

    @staticmethod
    def forward(output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return x[..., :1].to(output.dtype).expand(output.shape).contiguous()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def added_mlp(layer: torch.nn.Module) -> str | None:
    """The name of a decoder layer's fused MLP, if no gradient depends on the values of the MLP's output.

    So it is in a layer that adds the output, perhaps times a constant, to its own, and not in one that normalises it
    (Olmo 2), gates it or clamps the sum. Checked with the layer's forward, in each dtype and mode, with functions of
    one number for all that it is made of: its gradients must be the same whatever values the MLP gives, even NaN.
    """
    fused = [one for one in layer.modules() if getattr(type(one), "fuses_swiglu", False)]
    name = next((name for name, child in layer.named_children() if [child] == fused), None)
    if name is None:
        return None
    try:
        for dtype, training in product((torch.float32, torch.float16, torch.bfloat16), (False, True)):
            expected, *others = (_gradients(layer, name, value, dtype, training) for value in _VALUES)
            if not all(map(_same, others, repeat(expected))):
                return None
    except Exception:  # of whatever kind: it needs more of its parts or its input than a plain layer does
        return None
    return name


def _gradients(layer: torch.nn.Module, mlp: str, value: float, dtype: torch.dtype, training: bool) -> tuple:
    """Those of the input and of the layer's own parameters, if the MLP gives `value` for everything."""
    x = torch.linspace(-2, 1, 12, dtype=dtype, device="cpu").view(1, 3, 4).requires_grad_()
    own = {name: one.detach().cpu().requires_grad_() for name, one in layer._parameters.items() if one is not None}
    parts = {name: partial(_curved, "attn" in name) for name, _ in layer.named_children()}
    parts |= {**own, mlp: lambda x: _Valued.apply(x.square(), value), "training": training}
    with torch.enable_grad(), torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)  # the CPU's alone
        output = type(layer).forward(StandIn(layer, parts), x)
        upstream = torch.linspace(1, 2, 12, dtype=dtype, device="cpu").view(output.shape)  # a tensor's, not a tuple's
        return torch.autograd.grad(output, (x, *own.values()), upstream, allow_unused=True)


def _same(one: tuple, other: tuple) -> bool:
    return all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


class _Valued(torch.autograd.Function):
    """A tensor like `x` that is `value` everywhere, with the gradient of `x`."""

    @staticmethod
    def forward(ctx, x, value):
        return torch.full_like(x, value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _curved(is_attention: bool, *args: object, **kwargs: object):
    """A function of the first tensor that is given, whose gradient depends on its values."""
    x = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)).tanh()
    return (x, None) if is_attention else x
