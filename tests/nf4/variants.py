"""The production kernels as jobs for `unsloth_puzzles.bench.cross_compile`."""

from itertools import product

import torch

from unsloth_puzzles.bench.cross_compile import ARCHITECTURES
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel
from unsloth_puzzles.nf4.launch import PLAIN, Config, constexprs, options

POINTERS = ("packed_ptr", "absmax_ptr", "code_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr", "out_ptr")
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
PATHS = {"asm": Config(), "plain": PLAIN}
# FULL, ALIGNED: whole programs alone; those and a ragged end; pointers that may lie anywhere
SITUATIONS = {"full": (True, True), "ragged": (False, True), "unaligned": (False, False)}


def job(name: str, config: Config, dtype: torch.dtype, sm: int, situation: str, nested: bool = True) -> dict:
    full, aligned = SITUATIONS[situation]
    types = ("u8", "u8" if nested else "fp32", "fp32", "fp32", "fp32", "fp32", TYPES[dtype])
    compile_options = options(config)
    return {
        "name": f"{name} {TYPES[dtype]} {situation} {'nested' if nested else 'single'} sm_{sm}",
        "kernel": dequantize_nf4_kernel,
        "signature": {pointer: f"*{kind}" for pointer, kind in zip(POINTERS, types, strict=True)} | {"numel": "i64"},
        "constexprs": constexprs(config, dtype, 64, 256, sm, NESTED=nested, FULL=full, ALIGNED=aligned),
        "sm": sm,
        "divisible": POINTERS if aligned else (),
        **compile_options,
    }


def jobs() -> list[dict]:
    """Every production kernel on every architecture, and the plain path as contraction would have it."""
    everything = [
        job(path, config, dtype, sm, situation)
        for (path, config), dtype, situation, sm in product(PATHS.items(), TYPES, SITUATIONS, ARCHITECTURES)
    ]
    single = [
        job(path, config, torch.bfloat16, sm, "ragged", nested=False)
        for (path, config), sm in product(PATHS.items(), ARCHITECTURES)
    ]
    return everything + single + [contracted_job()]


def contracted_job() -> dict:
    return job("contracted", PLAIN._replace(fp_fusion=True), torch.bfloat16, 90, "full")


def uncontracted_job() -> list[dict]:
    """One job, for the mutation that switches contraction on."""
    return [job("plain", PLAIN, torch.bfloat16, 90, "full")]
