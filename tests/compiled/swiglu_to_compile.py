"""The kernels of compiled/swiglu_kernels.py as cross-compilation jobs, imported in a process that compiles."""

from itertools import product

from unsloth_puzzles.bench.cross_compile import ARCHITECTURES
from unsloth_puzzles.compiled.swiglu_kernels import TILE, backward_kernel, forward_kernel

SIZES = {"COLUMNS": 8192, "RANK": 16, "PADDED": 16, "INTERPRETED": False}
ROUNDINGS = (False, True)


def jobs(tile: dict = TILE, architectures=ARCHITECTURES) -> list[dict]:
    """Both kernels as a Llama 3.2 1B launches them, in bfloat16, below sm_80 in float16."""
    blocks = {name: value for name, value in tile.items() if name != "num_warps"}
    found = []
    for kernel, rounding in product((forward_kernel, backward_kernel), ROUNDINGS):
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        for sm in architectures:
            dtype = "*fp16" if sm < 80 else "*bf16"
            found.append(
                {
                    "kernel": kernel,
                    "signature": {**dict.fromkeys(pointers, dtype), "rows": "i32"},
                    "constexprs": {**SIZES, **blocks, "EAGER_ROUNDING": rounding},
                    "sm": sm,
                    "divisible": (*pointers, "rows"),
                    "num_warps": tile["num_warps"],
                    "enable_fp_fusion": True,
                    "name": kernel.__name__.strip("_") + (", eager's rounding" if rounding else ""),
                }
            )
    return found


def jobs_for_t4_and_h100() -> list[dict]:
    return jobs(architectures=(75, 90))
