"""A gated MLP whose adapters' outputs exist only where the activation is computed.

    act = silu(g + i_g B_g') * (u + i_u B_u')        g, u: outputs of the frozen layers; i = s x A', rank r columns

PEFT writes i_g B_g' and i_u B_u', matrices as large as g and u, to read them once. r products for each element cost a
GPU nothing beside the memory traffic, so the kernel multiplies while it computes the activation. Its backward makes
them again, takes the gradient of `act` in the two parts it comes in (the frozen layer's and the adapter's below), and
writes the gradients of g and u. Forward and backward of one layer move 9 such matrices instead of 17.

Values are rounded when they are written. With `eager_rounding` they are also rounded wherever PEFT, which writes them,
rounds (if s is a power of two): the results are eager mode's but for the order of sums.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl

from unsloth_puzzles.compiled.hooks import hooked_below
from unsloth_puzzles.compiled.lora import add_outside, can_be_inside, plain_adapter
from unsloth_puzzles.compiled.siblings import insides
from unsloth_puzzles.nf4.kernel import round_bfloat16
from unsloth_puzzles.nf4.launch import INTERPRETED
from unsloth_puzzles.nf4.patch import exchange_classes

# 16 elements a thread: no spills from sm_75 on. H200: forward 0.84, backward 0.78 of the copy bandwidth; more tiles a
# program, which then reads A and B once for all of them, are no faster.
_TILE = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which multiplies bfloat16 as though it were an integer
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _places(rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """This program's tile: where it lies in a matrix, in what is inside an adapter, in a B and in an A; for each its
    offsets and which of them are valid."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inner, outer = tl.arange(0, PADDED)[None, :], tl.arange(0, PADDED)[:, None]
    wide, in_columns = m.to(tl.int64), (n < COLUMNS) & (outer < RANK)
    matrix = wide * COLUMNS + n, (m < rows) & (n < COLUMNS)
    inside = wide * RANK + inner, (m < rows) & (inner < RANK)
    return matrix, inside, (n * RANK + outer, in_columns), (outer * COLUMNS + n, in_columns)


@triton.jit
def _load(ptr, place):
    return tl.load(ptr + place[0], place[1], 0)


@triton.jit
def _to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # which it truncates to
        return round_bfloat16(value)
    return value.to(dtype)


@triton.jit
def _rounded(value, dtype: tl.constexpr, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr):
    """`value` in float32: as eager mode would have written and read it, or as it is."""
    return _to(value, dtype, INTERPRETED).to(tl.float32) if EAGER_ROUNDING else value


@triton.jit
def _added(base, inside, outside, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr):
    """A frozen layer's output and its adapter's, in float32."""
    adapter = _rounded(_product(inside, outside, INTERPRETED), base.dtype, EAGER_ROUNDING, INTERPRETED)
    return _rounded(base.to(tl.float32) + adapter, base.dtype, EAGER_ROUNDING, INTERPRETED)


@triton.jit(do_not_specialize=["rows"])  # else one more kernel, half a second, for lengths that 16 does not divide
def _forward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, act_ptr, rows, COLUMNS: tl.constexpr,
                    RANK: tl.constexpr, PADDED: tl.constexpr, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    matrix, inside, b, _ = _places(rows, COLUMNS, RANK, PADDED, BLOCK_M, BLOCK_N)
    g, u = _load(g_ptr, matrix), _load(u_ptr, matrix)
    gate = _added(g, _load(ig_ptr, inside), _load(bg_ptr, b), EAGER_ROUNDING, INTERPRETED)
    up = _added(u, _load(iu_ptr, inside), _load(bu_ptr, b), EAGER_ROUNDING, INTERPRETED)
    silu = _rounded(gate * tl.sigmoid(gate), g.dtype, EAGER_ROUNDING, INTERPRETED)
    tl.store(act_ptr + matrix[0], _to(silu * up, g.dtype, INTERPRETED), matrix[1])


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, d_act_ptr, d_inside_ptr, a_ptr, act_ptr, dg_ptr,
                     du_ptr, rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
                     EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
                     BLOCK_N: tl.constexpr):  # fmt: skip
    matrix, inside, b, a = _places(rows, COLUMNS, RANK, PADDED, BLOCK_M, BLOCK_N)
    g, u, d_act = _load(g_ptr, matrix), _load(u_ptr, matrix), _load(d_act_ptr, matrix)
    gate = _added(g, _load(ig_ptr, inside), _load(bg_ptr, b), EAGER_ROUNDING, INTERPRETED)
    up = _added(u, _load(iu_ptr, inside), _load(bu_ptr, b), EAGER_ROUNDING, INTERPRETED)
    slope = _added(d_act, _load(d_inside_ptr, inside), _load(a_ptr, a), EAGER_ROUNDING, INTERPRETED)
    sigmoid = tl.sigmoid(gate)
    silu = _rounded(gate * sigmoid, g.dtype, EAGER_ROUNDING, INTERPRETED)
    d_silu = _rounded(slope * up, g.dtype, EAGER_ROUNDING, INTERPRETED)
    tl.store(act_ptr + matrix[0], _to(silu * up, g.dtype, INTERPRETED), matrix[1])
    tl.store(du_ptr + matrix[0], _to(slope * silu, g.dtype, INTERPRETED), matrix[1])
    tl.store(dg_ptr + matrix[0], _to(d_silu * sigmoid * (1 + gate * (1 - sigmoid)), g.dtype, INTERPRETED), matrix[1])


def _launch(kernel, like: torch.Tensor, ig: torch.Tensor, eager_rounding: bool, *tensors: torch.Tensor) -> None:
    columns, rank = like.shape[-1], ig.shape[-1]
    rows = like.numel() // columns
    if rows:
        grid = (triton.cdiv(rows, _TILE["BLOCK_M"]), triton.cdiv(columns, _TILE["BLOCK_N"]))
        padded = max(16, triton.next_power_of_2(rank))  # the least that `tl.dot` multiplies
        sizes = {"COLUMNS": columns, "RANK": rank, "PADDED": padded}
        kernel[grid](*tensors, rows, **sizes, EAGER_ROUNDING=eager_rounding, INTERPRETED=INTERPRETED, **_TILE)


torch.library.define(
    "unsloth_puzzles::lora_swiglu",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu, bool eager_rounding) -> Tensor",
)
torch.library.define(
    "unsloth_puzzles::lora_swiglu_backward",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu, Tensor d_act, Tensor d_inside, Tensor a, "
    "bool eager_rounding) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("unsloth_puzzles::lora_swiglu", ("CUDA", "CPU"))
def _(g, u, ig, iu, bg, bu, eager_rounding):
    g, u, ig, iu, bg, bu = (tensor.contiguous() for tensor in (g, u, ig, iu, bg, bu))
    act = torch.empty_like(g)
    _launch(_forward_kernel, g, ig, eager_rounding, g, u, ig, iu, bg, bu, act)
    return act


@torch.library.impl("unsloth_puzzles::lora_swiglu_backward", ("CUDA", "CPU"))
def _(*given):
    *tensors, eager_rounding = given
    tensors = [tensor.contiguous() for tensor in tensors]
    results = [torch.empty_like(tensors[0]) for _ in range(3)]
    _launch(_backward_kernel, tensors[0], tensors[2], eager_rounding, *tensors, *results)
    return tuple(results)


def _check_dtypes(*tensors) -> None:
    """What the compiler asks once; Triton's interpreter would multiply anything."""
    if len(found := {tensor.dtype for tensor in tensors}) > 1:
        raise TypeError(f"lora_swiglu: got {', '.join(map(str, found))}, need one dtype")


@torch.library.register_fake("unsloth_puzzles::lora_swiglu")
def _(g, u, ig, iu, bg, bu, eager_rounding):
    _check_dtypes(g, u, ig, iu, bg, bu)
    return torch.empty_like(g, memory_format=torch.contiguous_format)


@torch.library.register_fake("unsloth_puzzles::lora_swiglu_backward")
def _(g, *others):
    _check_dtypes(g, *others[:-1])
    return tuple(torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(3))


class LoraSwiGLU(torch.autograd.Function):
    """(act, act @ a'): the activation, and what the adapter of the next layer makes of it, a: (r, columns).

    g, u: (..., columns); ig, iu: (..., r); bg, bu: (columns, r); all of one dtype. eager_rounding: above.
    """

    @staticmethod
    def forward(g, u, ig, iu, bg, bu, a, eager_rounding):
        act = torch.ops.unsloth_puzzles.lora_swiglu(g, u, ig, iu, bg, bu, eager_rounding)
        return act, act @ a.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eager_rounding = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_act, d_inside):
        g, u, ig, iu, bg, bu, a = ctx.saved_tensors
        d_inside = d_inside.to(g.dtype)  # autocast's, where g is in float32
        given = (g, u, ig, iu, bg, bu, d_act, d_inside, a, ctx.eager_rounding)
        act, dg, du = torch.ops.unsloth_puzzles.lora_swiglu_backward(*given)
        d_bg, d_bu, d_a = (_over_rows(one, other) for one, other in ((dg, ig), (du, iu), (d_inside, act)))
        return dg, du, dg @ bg, du @ bu, d_bg, d_bu, d_a, None


def _over_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(..., n), (..., k) -> (n, k), summed over all else."""
    return one.flatten(0, -2).t() @ other.flatten(0, -2)


def fuse_swiglu(model: torch.nn.Module, eager_rounding: bool) -> Callable[[], None]:
    """Let the MLPs of `model` (`down_proj(silu(gate_proj(x)) * up_proj(x))`, each layer an NF4 one with an adapter)
    compute as above; returns what undoes it. Others, and calls whose adapters are not plain ones or for which hooks
    wait, stay as they are."""
    found = [module for module in model.modules() if _is_swiglu(module)]
    return exchange_classes((module, _fused_class(type(module), eager_rounding)) for module in found)


def _is_swiglu(module: torch.nn.Module) -> bool:
    from peft.tuners.lora.bnb import Linear4bit  # other kinds of adapters also have a `lora_A`, of another type

    layers = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(isinstance(layer, Linear4bit) for layer in layers) and _is_formula(module)


def _is_formula(module: torch.nn.Module) -> bool:
    """Whether the forward of `module`, with functions of one number for its three layers, is what is fused here."""
    stand_in = _StandIn(module)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, device="cpu")
    expected = stand_in.down_proj(torch.nn.functional.silu(stand_in.gate_proj(x)) * stand_in.up_proj(x))
    try:
        found = type(module).forward(stand_in, x)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == x.shape and bool((found - expected).abs().max() < 1e-12)


class _StandIn:
    """A module but for its layers."""

    def __init__(self, module: torch.nn.Module):
        self._module = module

    def gate_proj(self, x):
        return 2 * x - 1

    def up_proj(self, x):
        return x.square() + 3

    def down_proj(self, x):
        return 5 * x + 2

    def __getattr__(self, name: str):
        return getattr(self._module, name)


@cache
def _fused_class(cls: type, eager_rounding: bool) -> type:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        layers = (gate, up, down)
        fits = all(can_be_inside(layer, x) for layer in layers) and len({_rank(layer) for layer in layers}) == 1
        if not fits or hooked_below(self):
            return cls.forward(self, x)
        (g, ig, bg), (u, iu, bu) = (
            _parts(layer, x, i) for layer, i in zip((gate, up), insides((gate, up), x), strict=True)
        )
        name = plain_adapter(down)
        a = down.lora_A[name].weight.to(g.dtype)
        act, inside = LoraSwiGLU.apply(g, u, ig, iu, bg, bu, a, eager_rounding)
        return add_outside(down, name, down.base_layer(act), inside)

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})


def _rank(layer) -> int:
    return layer.r[plain_adapter(layer)]


def _parts(layer, x: torch.Tensor, inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The frozen layer's output, the adapter's r columns, and its B, in the dtype of the output."""
    name, base = plain_adapter(layer), layer.base_layer(x)
    return base, (inside * layer.scaling[name]).to(base.dtype), layer.lora_B[name].weight.to(base.dtype)
