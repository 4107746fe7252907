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

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
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

    The gradients of a layer that does anything else with it depend on its values: one that normalises it (Olmo 2), that
    multiplies it by a gate or a trained number, or that clamps the sum in float16. Checked by the graph that autograd
    records of the layer's forward, in each dtype and mode, with functions of one number for all that it is made of.
    """
    fused = [one for one in layer.modules() if getattr(type(one), "fuses_swiglu", False)]
    name = next((name for name, child in layer.named_children() if [child] == fused), None)
    if name is None:
        return None
    try:
        added = (_adds(layer, name, dtype, training) for dtype in _DTYPES for training in (False, True))
        return name if all(added) else None
    except Exception:  # of whatever kind: it needs more of its parts or its input than a plain layer does
        return None


def _adds(layer: torch.nn.Module, mlp: str, dtype: torch.dtype, training: bool) -> bool:
    x, of_mlp = (torch.linspace(-2, to, 12, dtype=dtype, device="cpu").view(1, 3, 4).requires_grad_() for to in (1, 3))
    parts = {name: partial(_differentiable, "attn" in name) for name, _ in layer.named_children()}
    with torch.enable_grad():
        parts |= {mlp: lambda *_, **__: of_mlp, "training": training}
        output = type(layer).forward(StandIn(layer, parts), x)
    return isinstance(output, torch.Tensor) and output.shape == x.shape and _path(output.grad_fn, of_mlp) == "added"


def _differentiable(is_attention: bool, *args: object, **kwargs: object):
    """A function of the first tensor that is given, whose gradient needs its values."""
    x = next(one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)).tanh()
    return (x, None) if is_attention else x


def _path(node: object, leaf: torch.Tensor) -> str | None:
    """How `leaf` enters the result of an autograd node: "added", "read", or None if it does not.

    Added, if no gradient depends on its values: by sums, and by products with what wants no gradient.
    """
    if node is None:
        return None
    if hasattr(node, "variable"):
        return "added" if node.variable is leaf else None
    below = [one for one, _ in node.next_functions if one is not None]
    found = {_path(one, leaf) for one in below} - {None}
    if not found:
        return None
    sum_of = node.name() in ("AddBackward0", "SubBackward0")
    scaled = node.name() == "MulBackward0" and len(below) == 1
    return "added" if found == {"added"} and (sum_of or scaled) else "read"
