"""A gated MLP whose adapters' outputs exist only where the activation is computed.

    act = silu(g + i_g B_g') * (u + i_u B_u')        g, u: outputs of the frozen layers; i = s x A', rank r columns

PEFT writes i_g B_g' and i_u B_u', matrices as large as g and u, to read them once. r products for each element cost a
GPU nothing beside the memory traffic, so the kernel multiplies while it computes the activation. Its backward makes
them again, takes the gradient of `act` in the two parts it comes in (the frozen layer's and the adapter's below), and
writes the gradients of g and u. Forward and backward of one layer move 9 such matrices instead of 17.
"""

from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl

from unsloth_puzzles.compiled.lora import add_outside, plain_adapter
from unsloth_puzzles.nf4.launch import INTERPRETED
from unsloth_puzzles.nf4.patch import exchange_classes

# 16 elements a thread, which is no spills from sm_75 on; rows of a program, which reads B and A once for all of them.
_TILE = {"BLOCK_M": 16, "BLOCK_N": 128, "TILES": 4, "num_warps": 4}


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which multiplies bfloat16 as though it were an integer
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _columns(COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's columns n, and the place of (r, n) in a B: (columns, r)."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    r = tl.arange(0, PADDED)[:, None]
    return n, n * RANK + r, (n < COLUMNS) & (r < RANK)


@triton.jit
def _rows(tile, n, rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
          TILES: tl.constexpr):  # fmt: skip
    """A tile of this program: the place of (m, n) in a matrix, and of (m, r) in what is inside an adapter."""
    m = (tl.program_id(0) * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    r = tl.arange(0, PADDED)[None, :]
    wide = m.to(tl.int64)
    return wide * COLUMNS + n, (m < rows) & (n < COLUMNS), wide * RANK + r, (m < rows) & (r < RANK)


@triton.jit
def _added(base_ptr, inside_ptr, at, valid, of_rows, in_rows, b, INTERPRETED: tl.constexpr):
    """A frozen layer's output and its adapter's, in float32."""
    base = tl.load(base_ptr + at, valid, 0).to(tl.float32)
    return base + _product(tl.load(inside_ptr + of_rows, in_rows, 0), b, INTERPRETED)


@triton.jit
def _forward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, act_ptr, rows, COLUMNS: tl.constexpr,
                    RANK: tl.constexpr, PADDED: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    n, of_columns, in_columns = _columns(COLUMNS, RANK, PADDED, BLOCK_N)
    bg = tl.load(bg_ptr + of_columns, in_columns, 0)
    bu = tl.load(bu_ptr + of_columns, in_columns, 0)
    for tile in range(TILES):
        at, valid, of_rows, in_rows = _rows(tile, n, rows, COLUMNS, RANK, PADDED, BLOCK_M, TILES)
        gate = _added(g_ptr, ig_ptr, at, valid, of_rows, in_rows, bg, INTERPRETED)
        up = _added(u_ptr, iu_ptr, at, valid, of_rows, in_rows, bu, INTERPRETED)
        tl.store(act_ptr + at, (gate * tl.sigmoid(gate) * up).to(act_ptr.dtype.element_ty), valid)


@triton.jit
def _backward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, d_act_ptr, d_inside_ptr, a_ptr, act_ptr, dg_ptr,
                     du_ptr, rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
                     INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     TILES: tl.constexpr):  # fmt: skip
    n, of_columns, in_columns = _columns(COLUMNS, RANK, PADDED, BLOCK_N)
    bg = tl.load(bg_ptr + of_columns, in_columns, 0)
    bu = tl.load(bu_ptr + of_columns, in_columns, 0)
    a = tl.load(a_ptr + tl.arange(0, PADDED)[:, None] * COLUMNS + n, in_columns, 0)
    element = act_ptr.dtype.element_ty
    for tile in range(TILES):
        at, valid, of_rows, in_rows = _rows(tile, n, rows, COLUMNS, RANK, PADDED, BLOCK_M, TILES)
        gate = _added(g_ptr, ig_ptr, at, valid, of_rows, in_rows, bg, INTERPRETED)
        up = _added(u_ptr, iu_ptr, at, valid, of_rows, in_rows, bu, INTERPRETED)
        d_act = _added(d_act_ptr, d_inside_ptr, at, valid, of_rows, in_rows, a, INTERPRETED)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        tl.store(act_ptr + at, (silu * up).to(element), valid)
        tl.store(du_ptr + at, (d_act * silu).to(element), valid)
        tl.store(dg_ptr + at, (d_act * up * (sigmoid + silu * (1 - sigmoid))).to(element), valid)


def _launch(kernel, like: torch.Tensor, ig: torch.Tensor, *tensors: torch.Tensor) -> None:
    columns, rank = like.shape[-1], ig.shape[-1]
    rows = like.numel() // columns
    if rows:
        grid = (triton.cdiv(rows, _TILE["BLOCK_M"] * _TILE["TILES"]), triton.cdiv(columns, _TILE["BLOCK_N"]))
        padded = max(16, triton.next_power_of_2(rank))  # the least that `tl.dot` multiplies
        kernel[grid](*tensors, rows, COLUMNS=columns, RANK=rank, PADDED=padded, INTERPRETED=INTERPRETED, **_TILE)


torch.library.define(
    "unsloth_puzzles::lora_swiglu",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu) -> Tensor",
)
torch.library.define(
    "unsloth_puzzles::lora_swiglu_backward",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu, Tensor d_act, Tensor d_inside, Tensor a) "
    "-> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("unsloth_puzzles::lora_swiglu", ("CUDA", "CPU"))
def _(g, u, ig, iu, bg, bu):
    g, u, ig, iu, bg, bu = (tensor.contiguous() for tensor in (g, u, ig, iu, bg, bu))
    act = torch.empty_like(g)
    _launch(_forward_kernel, g, ig, g, u, ig, iu, bg, bu, act)
    return act


@torch.library.impl("unsloth_puzzles::lora_swiglu_backward", ("CUDA", "CPU"))
def _(*tensors):
    tensors = [tensor.contiguous() for tensor in tensors]
    results = [torch.empty_like(tensors[0]) for _ in range(3)]
    _launch(_backward_kernel, tensors[0], tensors[2], *tensors, *results)
    return tuple(results)


@torch.library.register_fake("unsloth_puzzles::lora_swiglu")
def _(g, u, ig, iu, bg, bu):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


@torch.library.register_fake("unsloth_puzzles::lora_swiglu_backward")
def _(g, *others):
    return tuple(torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(3))


class LoraSwiGLU(torch.autograd.Function):
    """(act, act @ a'): the activation, and what the adapter of the next layer makes of it, a: (r, columns).

    g, u: (..., columns); ig, iu: (..., r); bg, bu: (columns, r); all of one dtype.
    """

    @staticmethod
    def forward(g, u, ig, iu, bg, bu, a):
        act = torch.ops.unsloth_puzzles.lora_swiglu(g, u, ig, iu, bg, bu)
        return act, act @ a.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_act, d_inside):
        g, u, ig, iu, bg, bu, a = ctx.saved_tensors
        act, dg, du = torch.ops.unsloth_puzzles.lora_swiglu_backward(g, u, ig, iu, bg, bu, d_act, d_inside, a)
        d_bg, d_bu, d_a = (_over_rows(one, other) for one, other in ((dg, ig), (du, iu), (d_inside, act)))
        return dg, du, dg @ bg, du @ bu, d_bg, d_bu, d_a


def _over_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(..., n), (..., k) -> (n, k), summed over all else."""
    return one.flatten(0, -2).t() @ other.flatten(0, -2)


def fuse_swiglu(model: torch.nn.Module) -> Callable[[], None]:
    """Let the MLPs of `model` (`down_proj(silu(gate_proj(x)) * up_proj(x))`, each layer an NF4 one with an adapter)
    compute as above; returns what undoes it. Others, and calls whose adapters are not plain ones, stay as they are."""
    return exchange_classes((module, _fused_class(type(module))) for module in model.modules() if _is_swiglu(module))


def _is_swiglu(module: torch.nn.Module) -> bool:
    layers = [getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    return silu and all(hasattr(layer, "lora_A") and hasattr(layer, "base_layer") for layer in layers)


@cache
def _fused_class(cls: type) -> type:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if not all(_can_be_inside(layer, x) for layer in (gate, up, down)):
            return cls.forward(self, x)
        g, ig, bg = _parts(gate, x)
        u, iu, bu = _parts(up, x)
        name = plain_adapter(down)
        act, inside = LoraSwiGLU.apply(g, u, ig, iu, bg, bu, down.lora_A[name].weight.to(g.dtype))
        return add_outside(down, name, down.base_layer(act), inside)

    return type(cls.__name__, (cls,), {"forward": forward, "__doc__": cls.__doc__})


def _can_be_inside(layer, x: torch.Tensor) -> bool:
    """A plain adapter that computes in the dtype of x, without dropout between the activation and itself."""
    name = plain_adapter(layer)
    if name is None or not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return False
    return torch.is_autocast_enabled(x.device.type) or layer.lora_A[name].weight.dtype == x.dtype


def _parts(layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The frozen layer's output, the adapter's r columns, and its B, in the dtype of the output."""
    name = plain_adapter(layer)
    base = layer.base_layer(x)
    inside = layer.lora_A[name](x) * layer.scaling[name]
    return base, inside.to(base.dtype), layer.lora_B[name].weight.to(base.dtype)
