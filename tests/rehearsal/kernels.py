"""Kernels for the rehearsal's tests, each compiled for sm_90. Run as a script it compiles those named.

python kernels.py here|worker NAME...     in this process, or in one that it spawns
"""

import multiprocessing
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def copies(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(y_ptr + index, tl.load(x_ptr + index) * 2)


@triton.jit
def needs_sm80(x_ptr, y_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    packed = tl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(y_ptr + index, packed)


@triton.jit
def takes_too_much(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    row, column = index[:, None], index[None, :]
    x = tl.load(x_ptr + row * SIZE + column)
    tl.store(y_ptr + column * SIZE + row, tl.sum(tl.dot(x, tl.trans(x)), axis=1)[:, None] + x)


JOBS = {
    "copies": (copies, {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 512}),
    "needs_sm80": (needs_sm80, {"x_ptr": "*fp32", "y_ptr": "*i32", "BLOCK": "constexpr"}, {"BLOCK": 512}),
    "takes_too_much": (takes_too_much, {"x_ptr": "*fp32", "y_ptr": "*fp32", "SIZE": "constexpr"}, {"SIZE": 128}),
}


def compile_for_sm90(names):
    for name in names:
        kernel, signature, constants = JOBS[name]
        triton.compile(
            ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}
        )


if __name__ == "__main__":
    if sys.argv[1] == "here":
        compile_for_sm90(sys.argv[2:])
    else:
        worker = multiprocessing.get_context("spawn").Process(target=compile_for_sm90, args=(sys.argv[2:],))
        worker.start()
        worker.join()
        sys.exit(worker.exitcode)
