"""Compile the kernel once for each situation, then launch its handle directly.

`kernel[grid](...)` inspects every argument at every call: 20 us on an H200's host, more than the kernel itself runs for
a small matrix. Here a compiled handle is looked up by what it depends on and its C launcher gets plain addresses: 6 us
without checks and allocation, and 4 where a `plan` spares the look-up.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton

from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4.asm import constraints, decode_word
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel

INTERPRETED = triton.knobs.runtime.interpret
MAX_NUMEL = 2**34  # the kernel counts 32-bit words of 8 weights in 32 bits

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
    """The kernel's compile-time arguments; `where` holds NESTED, FULL and ALIGNED, as in the kernel.

    Raises ValueError for look-ups by shuffle with fewer words than threads, or more than two a thread: the table must
    lie across each warp as it is laid out, which is tested for these alone.
    """
    if config.asm and config.lookup == "shuffle" and config.words not in (32 * config.num_warps, 64 * config.num_warps):
        raise ValueError(f"config: needs words of 32 or 64 x num_warps ({config.num_warps}), got {config.words}")
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
    """The compiled kernel for this CUDA device (a `triton.compiler.CompiledKernel`); `where` as in `constexprs`."""
    jit = dequantize_nf4_kernel if where["ALIGNED"] else _unaligned_kernel
    absmax = torch.uint8 if where["NESTED"] else torch.float32
    constants = constexprs(config, dtype, blocksize, blocksize2, capability(device), **where)
    with torch.cuda.device(device):
        pointers = (torch.uint8, absmax, torch.float32, torch.float32, torch.float32, torch.float32, dtype)
        return jit.warmup(*pointers, 0, grid=(1,), **constants, **options(config))


class Handle(NamedTuple):
    """The compiled kernel's C launcher: `enqueue(programs, 1, 1, stream, *before, *addresses, numel, *after)`."""

    enqueue: Callable
    before: tuple
    after: tuple
    compiled: object  # kept: newer releases of Triton unload the module when it goes


def _bind(config: Config, dtype: torch.dtype, blocksize: int, blocksize2: int, device: int, **where) -> Handle:
    compiled = compile_kernel(config, dtype, blocksize, blocksize2, device, **where)
    with torch.cuda.device(device):  # loads the module there
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    constants = (None,) * (len(dequantize_nf4_kernel.arg_names) - len(POINTERS) - 1)  # the launcher ignores them
    if triton.__version__.startswith("3.6.") and run.global_scratch_size == run.profile_scratch_size == 0:
        # Past a Python wrapper that allocates scratch memory. Launch hooks are not called.
        before = (function, False, False, None, None, metadata, None, None, None)
        return Handle(run.launch, before, constants, compiled)
    return Handle(run, (function, metadata, None, None, None), constants, compiled)


_handles: dict[tuple, Handle] = {}
current_device = getattr(torch._C, "_cuda_getDevice", None)  # None in builds of PyTorch without CUDA
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def addresses_of(packed, absmax, code, code2, absmax2, offset) -> tuple[int, ...]:
    """Where the kernel's inputs lie, in its order; what a plain absmax has no use for is `code`, and never read."""
    if offset is None:
        code2 = absmax2 = offset = code
    return (
        packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr(),
    )  # fmt: skip


def handle_for(addresses, out, blocksize: int, blocksize2: int, nested: bool, config: Config) -> Handle:
    """The kernel for these addresses and this output, compiled at the first call that needs it."""
    where = _where(addresses, out, nested, config)
    key = (out.dtype, blocksize, blocksize2, out.get_device(), *where.values(), config)
    if key not in _handles:
        _handles[key] = _bind(config, out.dtype, blocksize, blocksize2, out.get_device(), **where)
    return _handles[key]


def programs_for(out, config: Config) -> int:
    """How many programs de-quantise `out`."""
    return -(-out.numel() // (8 * config.words * config.unroll))


def _where(addresses, out, nested: bool, config: Config) -> dict[str, bool]:
    aligned = not (addresses[0] | out.data_ptr()) & 15  # what is read or written 16 bytes at a time
    full = aligned and not out.numel() % (8 * config.words * config.unroll)
    return {"NESTED": nested, "FULL": full, "ALIGNED": aligned}


def launch(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, out, config=DEFAULT) -> None:
    """Enqueue ONE kernel that de-quantises into `out` (contiguous), on the current stream of its device.

    Arguments are checked by the callers. `code2`, `absmax2`, `offset` are None for a plain float32 `absmax`.
    """
    addresses = addresses_of(packed, absmax, code, code2, absmax2, offset)
    if not all(addresses):
        raise ValueError("weight: needs allocated memory for the packed data and each tensor of quant_state, got none")
    nested = offset is not None
    if INTERPRETED:
        second = (code2, absmax2, offset) if nested else (code, code, code)
        constants = constexprs(config, out.dtype, blocksize, blocksize2, 0, **_where(addresses, out, nested, config))
        tensors = (packed.view(torch.uint8), absmax, code, *second, out)
        dequantize_nf4_kernel[(programs_for(out, config),)](*tensors, out.numel(), **constants)
        return
    handle = handle_for(addresses, out, blocksize, blocksize2, nested, config)
    device = out.get_device()
    with nullcontext() if device == current_device() else torch.cuda.device(device):
        stream = current_stream(device)
        arguments = (*handle.before, *addresses, out.data_ptr(), out.numel(), *handle.after)
        handle.enqueue(programs_for(out, config), 1, 1, stream, *arguments)
