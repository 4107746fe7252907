"""How the kernel is built: its configuration, Triton's compile-time arguments, and the compilation itself."""

from typing import NamedTuple

import torch
import triton

from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4.asm import constraints, decode_word
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel

INTERPRETED = triton.knobs.runtime.interpret
POINTERS = ("packed_ptr", "absmax_ptr", "code_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "out_ptr")
# For packed or output memory that is not 16-byte aligned: the same source, compiled with no assumption about it.
_unaligned_kernel = triton.jit(
    dequantize_nf4_kernel.fn, do_not_specialize=["numel"], do_not_specialize_on_alignment=list(POINTERS)
)


class Config(NamedTuple):
    """How the kernel is built. All but `fp_fusion` change speed alone, never a bit of the result."""

    asm: bool = True  # inline PTX; plain Triton otherwise
    lookup: str = "shuffle"  # of the 4-bit code: "shuffle" or "prmt" in PTX; "load", "gather" or "select" in Triton
    evict: str = "evict_first"  # cache policy of the packed loads and of the stores
    words: int = 512  # 32-bit words a program handles at a time, one a thread
    unroll: int = 2  # how often; all loads are issued before the first store
    num_warps: int = 16
    fp_fusion: bool = False  # True contracts code2 * absmax2 + offset, which is NOT exact: to show what it does


PLAIN = Config(asm=False, lookup="load", words=128, num_warps=4)
DEFAULT = PLAIN if INTERPRETED else Config()  # the interpreter cannot run PTX


def constexprs(config: Config, dtype: torch.dtype, blocksize: int, blocksize2: int, sm: int, **where) -> dict:
    """The kernel's compile-time arguments.

    Args:
        config: the configuration.
        dtype: of the output.
        blocksize, blocksize2: as in `NF4Weight`.
        sm: compute capability of the GPU, 75 for 7.5.
        where: NESTED, FULL and ALIGNED, as in the kernel.

    Raises:
        ValueError: look-ups by shuffle with fewer words than threads, or more than two a thread: the table must lie
            across each warp as it is laid out, which is tested for these alone.
    """
    if config.asm and config.lookup == "shuffle" and config.words not in (32 * config.num_warps, 64 * config.num_warps):
        raise ValueError(f"config.words must be 32 or 64 x num_warps ({config.num_warps}), got {config.words}")
    name = str(dtype).removeprefix("torch.")
    return {
        "BLOCKSIZE": blocksize,
        "BLOCKSIZE2": blocksize2,
        **where,
        "WORDS": config.words,
        "UNROLL": config.unroll,
        "ASM": decode_word(name, sm, config.lookup) if config.asm else "",
        "CONSTRAINTS": constraints(name),
        "LOOKUP": config.lookup,
        "EVICT": config.evict,
        "SOFTWARE_BF16": sm < 80,
    }


def options(config: Config) -> dict:
    """Triton's compile options."""
    return {"num_warps": config.num_warps, "enable_fp_fusion": config.fp_fusion}


def compile_kernel(config: Config, dtype: torch.dtype, blocksize: int, blocksize2: int, device: int, **where):
    """Compile the kernel for a CUDA device.

    Args:
        config, dtype, blocksize, blocksize2, where: as in `constexprs`.
        device: index of the CUDA device.

    Returns:
        A `triton.compiler.CompiledKernel`.
    """
    constants = constexprs(config, dtype, blocksize, blocksize2, capability(device), **where)
    with torch.cuda.device(device):
        pointers = pointer_types(dtype, where["NESTED"])
        return chosen_kernel(where["ALIGNED"]).warmup(*pointers, 0, grid=(1,), **constants, **options(config))


def chosen_kernel(aligned: bool):
    """The kernel whose pointers to what is read and written 16 bytes at a time are aligned so, or the other one."""
    return dequantize_nf4_kernel if aligned else _unaligned_kernel


def pointer_types(dtype: torch.dtype, nested: bool) -> tuple[torch.dtype, ...]:
    """Return the dtypes that the kernel's pointers point to, in the order of `POINTERS`."""
    absmax = torch.uint8 if nested else torch.float32
    return torch.uint8, absmax, torch.float32, torch.float32, torch.float32, torch.float32, dtype
