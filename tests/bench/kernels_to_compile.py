"""Small kernels with a known outcome, for test_cross_compile. Imported in a process that compiles, not interprets."""

import triton
import triton.language as tl

from unsloth_puzzles.bench.ceilings import copy_kernel
from unsloth_puzzles.bench.cross_compile import ARCHITECTURES


@triton.jit
def multiply_add(x_ptr, y_ptr, EVICTION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, eviction_policy=EVICTION)
    tl.store(y_ptr + index, x * x + 1.25)


@triton.jit
def sort(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.sort(tl.load(x_ptr + index)))


FLOATS = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
INTEGERS = {"source_ptr": "*i32", "target_ptr": "*i32", "numel": "i32"}


def jobs() -> list[dict]:
    multiply = {"kernel": multiply_add, "signature": FLOATS, "constexprs": {"EVICTION": "evict_first", "BLOCK": 512}}
    many = {"kernel": sort, "signature": FLOATS, "constexprs": {"BLOCK": 1024}, "num_warps": 1, "sm": 75}
    copy = {"kernel": copy_kernel, "signature": INTEGERS, "constexprs": {"BLOCK": 2048}, "divisible": tuple(INTEGERS)}
    return [
        *({**multiply, "name": "fused", "sm": sm, "enable_fp_fusion": True} for sm in ARCHITECTURES),
        *({**multiply, "name": "exact", "sm": sm, "divisible": tuple(FLOATS)} for sm in ARCHITECTURES),
        *({**copy, "name": "copy", "sm": sm} for sm in ARCHITECTURES),
        {**many, "name": "sort"},
        {**many, "name": "sort in 32 registers", "maxnreg": 32},
    ]


def misnamed() -> list[dict]:
    return [{"kernel": sort, "signature": {"x_ptr": "*fp32", "z_ptr": "*fp32"}, "constexprs": {"BLOCK": 64}, "sm": 75}]


def misaligned() -> list[dict]:
    return [{"kernel": sort, "signature": FLOATS, "constexprs": {"BLOCK": 64}, "sm": 75, "divisible": ("BLOCK",)}]
