"""Every form in which the kernel is built, as jobs for `bench.cross_compile`: compiled without the GPU they are for."""

import torch

from unsloth_puzzles.nf4.build import PLAIN, POINTERS, Config, constexprs, options
from unsloth_puzzles.nf4.kernel import dequantize_nf4_kernel

ARCHITECTURES = (75, 80, 90, 100, 120)
DTYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
CONFIGS = {"asm": Config(), "plain": PLAIN}


def job(config: Config, dtype: torch.dtype, sm: int, *, nested=True, full=True, aligned=True, name="") -> dict:
    """Arguments of `bench.cross_compile.cross_compile` for one build, with blocks of 64 and 256 weights."""
    types = ("*u8", "*u8" if nested else "*fp32", "*fp32", "*fp32", "*fp32", "*fp32", DTYPES[dtype])
    return {
        "name": name,
        "kernel": dequantize_nf4_kernel,
        "signature": {**dict(zip(POINTERS, types, strict=True)), "numel": "i64"},
        "constexprs": constexprs(config, dtype, 64, 256, sm, NESTED=nested, FULL=full, ALIGNED=aligned),
        "sm": sm,
        "divisible": ("packed_ptr", "out_ptr") if aligned else (),
        **options(config),
    }


def every_job() -> list[dict]:
    """Whole, ragged and unaligned builds of both paths, nested or not, for every dtype and architecture."""
    wheres = {
        "whole": {},
        "ragged": {"full": False},
        "unaligned": {"full": False, "aligned": False},
        "plain absmax": {"nested": False},
    }
    return [
        job(config, dtype, sm, **where, name=f"{path} {str(dtype).removeprefix('torch.')} {kind}")
        for path, config in CONFIGS.items()
        for dtype in DTYPES
        for kind, where in wheres.items()
        for sm in ARCHITECTURES
    ]


def t4_jobs() -> list[dict]:
    """Every build for sm_75, the other table look-ups included."""
    others = {"asm-prmt": Config(lookup="prmt"), "plain-gather": PLAIN._replace(lookup="gather")}
    others["plain-select"] = PLAIN._replace(lookup="select")
    return [
        *(found for found in every_job() if found["sm"] == 75),
        *(
            job(config, dtype, 75, name=f"{path} {str(dtype).removeprefix('torch.')} whole")
            for path, config in others.items()
            for dtype in (torch.float16, torch.bfloat16)
        ),
    ]


def contraction_jobs() -> list[dict]:
    """The plain path for sm_75 with the compiler's fusion of multiply and add forbidden and allowed."""
    return [
        job(PLAIN._replace(fp_fusion=fused), torch.float16, 75, name="fused" if fused else "separate")
        for fused in (False, True)
    ]
