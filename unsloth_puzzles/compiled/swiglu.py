"""A gated MLP whose adapters' outputs exist only where the activation is computed.

    act = silu(g + i_g B_g') * (u + i_u B_u')        g, u: outputs of the frozen layers; i = s x A', rank r columns

PEFT writes i_g B_g' and i_u B_u', matrices as large as g and u, to read them once. Here the kernel of the activation
makes them. Its backward makes them again, takes the gradient of `act` in the two parts it comes in (the frozen layer's
and the adapter's below), and writes the gradients of g and u. Forward and backward of one layer move 9 such matrices
instead of 17.

Values are rounded when they are written. With `eager_rounding` they are also rounded wherever PEFT, which writes them,
rounds (if s is a power of two): the results are eager mode's but for the order of sums.
"""

from collections.abc import Callable
from functools import cache

import torch
from peft.tuners.lora.bnb import Linear4bit
from torch.nn.functional import silu

from unsloth_puzzles.compiled.checks import draws
from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.compiled.lora import add_adapter, plain_adapter, takes_low_rank
from unsloth_puzzles.compiled.shared_input import StandIn, low_rank_products
from unsloth_puzzles.compiled.swiglu_kernels import lora_swiglu, lora_swiglu_backward
from unsloth_puzzles.compiled.unread import Unread
from unsloth_puzzles.exchange import exchange_classes, subclass


def fuse_swiglu(model: torch.nn.Module, eager_rounding: bool) -> Callable[[], None]:
    """Let the MLPs of `model` compute as above.

    These are the MLPs whose forward is `down_proj(silu(gate_proj(x)) * up_proj(x))`, also in training mode, with an
    adapter on each of the three NF4 layers. Others stay as they are, and so do calls whose adapters are not plain LoRA
    or for which hooks wait.

    Args:
        model: a PEFT model, changed in place.
        eager_rounding: round wherever PEFT rounds.

    Returns:
        A function that undoes it.
    """
    found = [module for module in model.modules() if _is_swiglu(module)]
    return exchange_classes((module, _fused_class(type(module), eager_rounding)) for module in found)


class LoraSwiGLU(torch.autograd.Function):
    """The activation, and what the adapter of the next layer makes of it: (act, act a').

    Args:
        g, u: outputs of the frozen layers gate and up, (..., columns).
        ig, iu: the low-rank activations of their adapters, scaled, (..., r).
        bg, bu: the B of their adapters, (columns, r).
        a: the A of the next layer's adapter, (r, columns). All of one dtype.
        eager_rounding: bool, above.

    Returns:
        act, (..., columns), and act a', (..., r).

    Raises:
        TypeError: under torch.compile, if the tensors differ in dtype.
    """

    @staticmethod
    def forward(g, u, ig, iu, bg, bu, a, eager_rounding):
        act = lora_swiglu(g, u, ig, iu, bg, bu, eager_rounding)  # [..., columns]
        return act, act @ a.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eager_rounding = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_act, d_low_rank):
        g, u, ig, iu, bg, bu, a = ctx.saved_tensors
        d_low_rank = d_low_rank.to(g.dtype)  # [..., r]; autocast's, where g is in float32
        given = (g, u, ig, iu, bg, bu, d_act, d_low_rank, a, ctx.eager_rounding)
        act, dg, du = lora_swiglu_backward(*given)  # [..., columns] each
        d_bg, d_bu, d_a = (_over_rows(one, other) for one, other in ((dg, ig), (du, iu), (d_low_rank, act)))
        return dg, du, dg @ bg, du @ bu, d_bg, d_bu, d_a, None


def _over_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """[..., n], [..., k] -> [n, k], summed over all else."""
    return one.flatten(0, -2).t() @ other.flatten(0, -2)


@cache
def _fused_class(cls: type, eager_rounding: bool) -> type:
    def forward(self, x: torch.Tensor, unread: bool = False) -> torch.Tensor:
        """unread: nobody reads the output, only its backward is to come."""
        gate, up, down = layers = (self.gate_proj, self.up_proj, self.down_proj)
        fits = all(takes_low_rank(layer, x) for layer in layers) and len({_rank(layer) for layer in layers}) == 1
        if not fits or hooked_below(self):
            return cls.forward(self, x)
        of_gate, of_up = low_rank_products((gate, up), x)  # [..., r]
        (g, ig, bg), (u, iu, bu) = _parts(gate, x, of_gate), _parts(up, x, of_up)
        name = plain_adapter(down)
        a = down.lora_A[name].weight.to(g.dtype)
        act, low_rank = LoraSwiGLU.apply(g, u, ig, iu, bg, bu, a, eager_rounding)
        y = down.base_layer(act)  # [..., hidden]
        return add_adapter(down, name, Unread.apply(y, act) if unread else y, low_rank)

    return subclass(cls, f"Fused{cls.__name__}", forward=forward, fuses_swiglu=True)


def _rank(layer) -> int:
    return layer.r[plain_adapter(layer)]


def _parts(layer, x: torch.Tensor, low_rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The frozen layer's output, the adapter's r columns, scaled, and its B, in the dtype of the output."""
    name, base = plain_adapter(layer), layer.base_layer(x)
    return base, (low_rank * layer.scaling[name]).to(base.dtype), layer.lora_B[name].weight.to(base.dtype)


def _is_swiglu(module: torch.nn.Module) -> bool:
    # Other kinds of adapters also have a `lora_A`, of another type.
    layers = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    activation = type(getattr(module, "act_fn", None)).__name__
    adapted = all(isinstance(layer, Linear4bit) for layer in layers)
    return adapted and activation in ("SiLU", "SiLUActivation") and _is_formula(module)


def _is_formula(module: torch.nn.Module) -> bool:
    """Whether the forward of `module`, with functions of one number for its three layers, is what is fused here."""
    gate, up, down = (lambda x: 2 * x - 1), (lambda x: x.square() + 3), (lambda x: 5 * x + 2)
    layers = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    # A model that was just loaded is in eval mode, in which dropout would not show.
    if draws(one for name, one in module.named_children() if name not in layers):
        return False
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, device="cpu")
    expected = down(silu(gate(x)) * up(x))
    try:
        with torch.random.fork_rng(devices=()):
            found = type(module).forward(StandIn(module, {**layers, "training": True}), x)
    except Exception:  # of whatever kind: it needs more of its layers or its input than the formula does
        return False
    return isinstance(found, torch.Tensor) and found.shape == x.shape and bool((found - expected).abs().max() < 1e-12)
