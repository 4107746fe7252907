"""How fast the GPU can possibly go: what it reaches when it only copies, or only multiplies matrices."""

import torch
import triton
import triton.language as tl

from unsloth_puzzles.bench.timing import event_time


def measure_copy_bandwidth(nbytes: int = 2**30, rounds: int = 20) -> float:
    """The faster of `Tensor.copy_` and a Triton copy kernel.

    Not in a CUDA graph, where a copy node runs on a copy engine at 65 % of the rate; not of zeros, which are faster.

    Args:
        nbytes: Bytes to copy, of random data.
        rounds: Samples of each.

    Returns:
        Bytes/s, read and written.
    """
    source = torch.empty(nbytes // 4, dtype=torch.int32, device="cuda").random_()
    target = torch.empty_like(source)
    grid = (triton.cdiv(source.numel(), 2048),)
    candidates = {"memcpy": lambda: target.copy_(source)}
    if not triton.knobs.runtime.interpret:
        candidates["triton"] = lambda: copy_kernel[grid](source, target, source.numel(), BLOCK=2048, num_warps=8)
    timings = event_time(candidates, rounds=rounds, calls=4)
    return max(found.per_second(2 * nbytes) for found in timings.values())


def measure_matmul_flops(bf16: bool, size: int = 8192, rounds: int = 8) -> dict[str, float]:
    """Rates of torch's (cuBLAS's) products of `size` x `size` matrices of normal random data.

    Args:
        bf16: Measure bfloat16, beside float32 and float16.
        size: Rows and columns.
        rounds: Samples of each.

    Returns:
        FLOP/s by name of the dtype.
    """
    rates = {}
    for dtype in [torch.float32, torch.float16] + [torch.bfloat16] * bf16:
        a, b, out = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(3))
        name = str(dtype).removeprefix("torch.")
        candidate = {name: lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
        rates[name] = event_time(candidate, rounds=rounds, calls=2)[name].per_second(2 * size**3)
    return rates


@triton.jit
def copy_kernel(source_ptr, target_ptr, numel, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < numel
    tl.store(target_ptr + index, tl.load(source_ptr + index, mask=mask), mask=mask)
