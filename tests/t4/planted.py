"""Kernels that a T4 cannot have, compiled for a newer GPU here or in a worker: what a rehearsal must catch."""

import multiprocessing
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def fits(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.load(x_ptr + index, index < n) * 2, index < n)


@triton.jit
def takes_too_much_shared_memory(a_ptr, b_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr):
    n, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(a_ptr + n[:, None] * K + k), tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + n[:, None] * N + n, tl.dot(a, b))


@triton.jit
def rounds_as_no_t4_can(x_ptr, out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    both = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr + index, both)


def compile_for_an_h100(name: str) -> None:
    kernel, types, constants = {
        "fits": (fits, {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"}, {"BLOCK": 128}),
        "takes_too_much_shared_memory": (
            takes_too_much_shared_memory,
            {"a_ptr": "*fp32", "b_ptr": "*fp32", "out_ptr": "*fp32"},
            {"N": 16, "K": 1024},
        ),
        "rounds_as_no_t4_can": (rounds_as_no_t4_can, {"x_ptr": "*fp32", "out_ptr": "*i32"}, {"BLOCK": 128}),
    }[name]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))


def main(where: str, *names: str) -> None:
    if where == "here":
        for name in names:
            compile_for_an_h100(name)
    else:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.map(compile_for_an_h100, names)


if __name__ == "__main__":
    main(*sys.argv[1:])
