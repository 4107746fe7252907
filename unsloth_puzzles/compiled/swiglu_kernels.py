"""The Triton kernels of `swiglu.py` and the operators that torch.compile knows them by.

    act = silu(gate) * up        gate = g + i_g B_g'        up = u + i_u B_u'

One program computes a tile of `act`. It multiplies the r columns of i_g and i_u by B while it computes the activation:
r products for each element cost a GPU nothing beside the memory traffic.
"""

import torch
import triton
import triton.language as tl

from unsloth_puzzles.nf4.build import INTERPRETED
from unsloth_puzzles.nf4.kernel import round_bfloat16

# 16 elements a thread: no spills from sm_75 on. H200: forward 0.84, backward 0.78 of the copy bandwidth; more tiles a
# program, which then reads A and B once for all of them, are no faster.
TILE = {"BLOCK_M": 16, "BLOCK_N": 128, "num_warps": 4}

torch.library.define(
    "unsloth_puzzles::lora_swiglu",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu, bool eager_rounding) -> Tensor",
)
torch.library.define(
    "unsloth_puzzles::lora_swiglu_backward",
    "(Tensor g, Tensor u, Tensor ig, Tensor iu, Tensor bg, Tensor bu, Tensor d_act, Tensor d_low_rank, Tensor a, "
    "bool eager_rounding) -> (Tensor, Tensor, Tensor)",
)
lora_swiglu = torch.ops.unsloth_puzzles.lora_swiglu
lora_swiglu_backward = torch.ops.unsloth_puzzles.lora_swiglu_backward


@torch.library.impl("unsloth_puzzles::lora_swiglu", ("CUDA", "CPU"))
def _(g, u, ig, iu, bg, bu, eager_rounding):
    """`act`, [..., columns]; the arguments are those of `swiglu.LoraSwiGLU`."""
    g, u, ig, iu, bg, bu = (tensor.contiguous() for tensor in (g, u, ig, iu, bg, bu))
    act = torch.empty_like(g)
    _launch(forward_kernel, g, ig, eager_rounding, g, u, ig, iu, bg, bu, act)
    return act


@torch.library.impl("unsloth_puzzles::lora_swiglu_backward", ("CUDA", "CPU"))
def _(*given):
    """`act` again, and the gradients of g and of u, each [..., columns].

    The gradient of `act` is d_act plus d_low_rank a, by the next frozen layer and by its adapter; d_low_rank is
    [..., r] and a is [r, columns].
    """
    *tensors, eager_rounding = given
    tensors = [tensor.contiguous() for tensor in tensors]
    results = [torch.empty_like(tensors[0]) for _ in range(3)]
    _launch(backward_kernel, tensors[0], tensors[2], eager_rounding, *tensors, *results)
    return tuple(results)


@torch.library.register_fake("unsloth_puzzles::lora_swiglu")
def _(g, u, ig, iu, bg, bu, eager_rounding):
    _check_dtypes(g, u, ig, iu, bg, bu)
    return torch.empty_like(g, memory_format=torch.contiguous_format)


@torch.library.register_fake("unsloth_puzzles::lora_swiglu_backward")
def _(g, *others):
    _check_dtypes(g, *others[:-1])
    return tuple(torch.empty_like(g, memory_format=torch.contiguous_format) for _ in range(3))


def _check_dtypes(*tensors: torch.Tensor) -> None:
    """Refuse mixed dtypes, as the compiler does once; Triton's interpreter would multiply anything."""
    if len(found := {tensor.dtype for tensor in tensors}) > 1:
        raise TypeError(f"the tensors of lora_swiglu must be of one dtype, got {', '.join(map(str, found))}")


def _launch(kernel, like: torch.Tensor, ig: torch.Tensor, eager_rounding: bool, *tensors: torch.Tensor) -> None:
    columns, rank = like.shape[-1], ig.shape[-1]
    rows = like.numel() // columns
    if rows:
        grid = (triton.cdiv(rows, TILE["BLOCK_M"]), triton.cdiv(columns, TILE["BLOCK_N"]))
        padded = max(16, triton.next_power_of_2(rank))  # the least that `tl.dot` multiplies
        sizes = {"COLUMNS": columns, "RANK": rank, "PADDED": padded}
        kernel[grid](*tensors, rows, **sizes, EAGER_ROUNDING=eager_rounding, INTERPRETED=INTERPRETED, **TILE)


@triton.jit(do_not_specialize=["rows"])  # else one more kernel, half a second, for lengths that 16 does not divide
def forward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, act_ptr, rows, COLUMNS: tl.constexpr,
                   RANK: tl.constexpr, PADDED: tl.constexpr, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    matrix, low_rank, b, _ = _places(rows, COLUMNS, RANK, PADDED, BLOCK_M, BLOCK_N)
    g, u = _load(g_ptr, matrix), _load(u_ptr, matrix)  # [BLOCK_M, BLOCK_N]
    gate = _adapted(g, _load(ig_ptr, low_rank), _load(bg_ptr, b), EAGER_ROUNDING, INTERPRETED)
    up = _adapted(u, _load(iu_ptr, low_rank), _load(bu_ptr, b), EAGER_ROUNDING, INTERPRETED)
    silu = _rounded(gate * tl.sigmoid(gate), g.dtype, EAGER_ROUNDING, INTERPRETED)
    tl.store(act_ptr + matrix[0], _to(silu * up, g.dtype, INTERPRETED), matrix[1])


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(g_ptr, u_ptr, ig_ptr, iu_ptr, bg_ptr, bu_ptr, d_act_ptr, d_low_rank_ptr, a_ptr, act_ptr, dg_ptr,
                    du_ptr, rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
                    EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr):  # fmt: skip
    matrix, low_rank, b, a = _places(rows, COLUMNS, RANK, PADDED, BLOCK_M, BLOCK_N)
    g, u, d_act = _load(g_ptr, matrix), _load(u_ptr, matrix), _load(d_act_ptr, matrix)  # [BLOCK_M, BLOCK_N]
    gate = _adapted(g, _load(ig_ptr, low_rank), _load(bg_ptr, b), EAGER_ROUNDING, INTERPRETED)
    up = _adapted(u, _load(iu_ptr, low_rank), _load(bu_ptr, b), EAGER_ROUNDING, INTERPRETED)
    slope = _adapted(d_act, _load(d_low_rank_ptr, low_rank), _load(a_ptr, a), EAGER_ROUNDING, INTERPRETED)
    sigmoid = tl.sigmoid(gate)
    silu = _rounded(gate * sigmoid, g.dtype, EAGER_ROUNDING, INTERPRETED)
    d_silu = _rounded(slope * up, g.dtype, EAGER_ROUNDING, INTERPRETED)
    tl.store(act_ptr + matrix[0], _to(silu * up, g.dtype, INTERPRETED), matrix[1])
    tl.store(du_ptr + matrix[0], _to(slope * silu, g.dtype, INTERPRETED), matrix[1])
    tl.store(dg_ptr + matrix[0], _to(d_silu * sigmoid * (1 + gate * (1 - sigmoid)), g.dtype, INTERPRETED), matrix[1])


@triton.jit
def _places(rows, COLUMNS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr):  # fmt: skip
    """This program's tile: where it lies in a matrix [rows, columns], in low-rank activations [rows, r], in a B
    [columns, r] and in an A [r, columns]; for each its offsets and which of them are valid."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inner, outer = tl.arange(0, PADDED)[None, :], tl.arange(0, PADDED)[:, None]
    wide, in_columns = m.to(tl.int64), (n < COLUMNS) & (outer < RANK)
    matrix = wide * COLUMNS + n, (m < rows) & (n < COLUMNS)
    low_rank = wide * RANK + inner, (m < rows) & (inner < RANK)
    return matrix, low_rank, (n * RANK + outer, in_columns), (outer * COLUMNS + n, in_columns)


@triton.jit
def _load(ptr, place):
    return tl.load(ptr + place[0], place[1], 0)


@triton.jit
def _adapted(base, low_rank, outer, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr):
    """A frozen layer's output and its adapter's, in float32."""
    adapter = _rounded(_product(low_rank, outer, INTERPRETED), base.dtype, EAGER_ROUNDING, INTERPRETED)
    return _rounded(base.to(tl.float32) + adapter, base.dtype, EAGER_ROUNDING, INTERPRETED)


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which multiplies bfloat16 as though it were an integer
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _rounded(value, dtype: tl.constexpr, EAGER_ROUNDING: tl.constexpr, INTERPRETED: tl.constexpr):
    """`value` in float32: as eager mode would have written and read it, or as it is."""
    return _to(value, dtype, INTERPRETED).to(tl.float32) if EAGER_ROUNDING else value


@triton.jit
def _to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:  # which it truncates to
        return round_bfloat16(value)
    return value.to(dtype)
