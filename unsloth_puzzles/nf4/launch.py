"""Compile the kernel once for each situation, then launch its handle directly.

`kernel[grid](...)` inspects every argument at every call: 20 us on an H200's host, more than the kernel itself runs for
a small matrix. Here a compiled handle is looked up by what it depends on and its C launcher gets plain addresses: 4 us.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from unsloth_puzzles.nf4.asm import constraints, decode_word
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel

INTERPRETED = triton.knobs.runtime.interpret
MAX_NUMEL = 2**34  # the kernel counts 32-bit words of 8 weights in 32 bits

POINTERS = ("packed_ptr", "absmax_ptr", "code_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "out_ptr")
# For pointers that are not 16-byte aligned: the same source, compiled with no assumption about them.
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
    """The kernel's compile-time arguments; `where` holds NESTED, FULL and ALIGNED."""
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
    """The compiled kernel for this CUDA device (a `triton.compiler.CompiledKernel`)."""
    major, minor = torch.cuda.get_device_capability(device)
    jit = dequantize_nf4_kernel if where["ALIGNED"] else _unaligned_kernel
    absmax = torch.uint8 if where["NESTED"] else torch.float32
    constants = constexprs(config, dtype, blocksize, blocksize2, 10 * major + minor, **where)
    with torch.cuda.device(device):
        pointers = (torch.uint8, absmax, torch.float32, torch.float32, torch.float32, torch.float32, dtype)
        return jit.warmup(*pointers, 0, grid=(1,), **constants, **options(config))


def _bind(config: Config, dtype: torch.dtype, blocksize: int, blocksize2: int, device: int, **where) -> Callable:
    """A function (programs, stream, *addresses, numel) that enqueues the kernel."""
    compiled = compile_kernel(config, dtype, blocksize, blocksize2, device, **where)
    with torch.cuda.device(device):  # loads the module there
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    constants = (None,) * (len(dequantize_nf4_kernel.arg_names) - len(POINTERS) - 1)  # the launcher ignores them
    if triton.__version__.startswith("3.6."):  # past a Python wrapper that allocates scratch memory; there is none here
        assert run.global_scratch_size == run.profile_scratch_size == 0
        enqueue = run.launch
        settings = (function, False, False, None, None, metadata, None, None, None)
    else:
        enqueue = run
        settings = (function, metadata, None, None, None)

    def launch(programs, stream, packed, absmax, code, code2, absmax2, offset, out, numel):
        enqueue(
            programs, 1, 1, stream, *settings,
            packed, absmax, code, code2, absmax2, offset, out, numel, *constants,
        )  # fmt: skip

    return launch


def _interpret(
    config: Config, packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, out, programs, **where
):
    nested = where["NESTED"]
    second = (code2, absmax2, offset) if nested else (code, code, code)
    tensors = (packed.view(torch.uint8), absmax, code, *second, out)
    constants = constexprs(config, out.dtype, blocksize, blocksize2, 0, **where)
    dequantize_nf4_kernel[(programs,)](*tensors, out.numel(), **constants)


_launches: dict[Config, dict[tuple, Callable]] = {DEFAULT: {}}
_default_launches = _launches[DEFAULT]
_current_device = torch._C._cuda_getDevice if hasattr(torch._C, "_cuda_getDevice") else None
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launch(packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, out, config=DEFAULT) -> None:
    """Enqueue ONE kernel that de-quantises into `out` (contiguous), on the current stream of its device.

    Arguments are checked by the callers. `code2`, `absmax2`, `offset` are None for a plain float32 `absmax`.
    """
    numel = out.numel()
    weights = 8 * config.words * config.unroll  # a program
    nested = offset is not None
    p, a, c, o = packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), out.data_ptr()
    c2, a2, f = (code2.data_ptr(), absmax2.data_ptr(), offset.data_ptr()) if nested else (c, c, c)
    aligned = not (p | a | c | c2 | a2 | f | o) & 15
    full = aligned and not numel % weights
    programs = -(-numel // weights)
    if INTERPRETED:
        where = {"NESTED": nested, "FULL": full, "ALIGNED": aligned}
        _interpret(config, packed, absmax, code, code2, absmax2, offset, blocksize, blocksize2, out, programs, **where)
        return
    device = out.get_device()
    launches = _default_launches if config is DEFAULT else _launches.setdefault(config, {})  # hashing takes 0.3 us
    key = (out.dtype, blocksize, blocksize2, device, nested, full, aligned)
    enqueue = launches.get(key)
    if enqueue is None:
        enqueue = launches[key] = _bind(
            config, out.dtype, blocksize, blocksize2, device, NESTED=nested, FULL=full, ALIGNED=aligned
        )
    if device == _current_device():
        enqueue(programs, _current_stream(device), p, a, c, c2, a2, f, o, numel)
    else:
        with torch.cuda.device(device):
            enqueue(programs, _current_stream(device), p, a, c, c2, a2, f, o, numel)
