"""A layer that runs again only for its backward: the product that only its output depends on is not computed.

    y = x + down(act)        dL/dact = dL/dy W'

The backward of a checkpointed layer repeats the forward to have its graph, and drops y. The gradients need the weight
of `down` and not its result, which is a fifth of a Llama's forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch

from unsloth_puzzles.compiled.shared_input import StandIn

_unread = ContextVar("unread", default=False)  # of this thread: another may be in its forward


@contextmanager
def output_unread() -> Iterator[None]:
    """Within, compiled layers may compute no more than the backward of their output needs; its values may be wrong."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def is_unread() -> bool:
    """Whether this thread is within `output_unread`."""
    return _unread.get()


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
    """The name of a decoder layer's fused MLP, if the layer only adds its output, perhaps times a constant, to its own.

    The gradients of a layer that does anything else with it, such as Olmo 2's, which normalises it, depend on its
    values. Checked by running the layer's forward with functions of one number for all that it is made of: its output
    must be an affine function of the MLP's.
    """
    fused = [one for one in layer.modules() if getattr(type(one), "fuses_swiglu", False)]
    name = next((name for name, child in layer.named_children() if [child] == fused), None)
    if name is None:
        return None
    x = torch.linspace(-2, 1, 12, dtype=torch.float64, device="cpu").view(1, 3, 4)
    others = {other: partial(_curved, "attn" in other) for other, _ in layer.named_children()}
    try:
        none, once, twice = (
            type(layer).forward(StandIn(layer, {**others, name: partial(_scaled, scale)}), x) for scale in range(3)
        )
        affine = (twice - 2 * once + none).abs().max() < 1e-12 < (once - none).abs().min()
    except Exception:  # of whatever kind: it needs more of its parts or its input than a plain layer does
        return None
    return name if affine else None


def _scaled(scale: int, x: torch.Tensor) -> torch.Tensor:
    return scale * (x.square() + 0.5)


def _curved(is_attention: bool, *args: object, **kwargs: object):
    """A function of the first tensor that is given, such that what goes through it is not affine."""
    x = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)).tanh()
    return (x, None) if is_attention else x
