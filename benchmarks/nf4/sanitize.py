"""Run the kernels over odd shapes under NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.nf4.sanitize

Every tensor is its own CUDA allocation and has its exact size, so that a byte read or written beyond an end is seen.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor

from unsloth_puzzles.bench import child

TOOLS = ("memcheck", "racecheck", "initcheck")
SECONDS = 300  # a tool
SHAPES = ((1, 1), (1, 7), (3, 5), (33, 77), (64, 128), (129, 1023), (128, 4096))


def sanitizer_errors() -> dict[str, int] | str:
    """Errors that each tool reports, or the reason why none was run."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if not found:
        return "compute-sanitizer is not on this machine"
    environment = child.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def run(tool: str) -> int | str:
        sanitizer = [found, "--tool", tool, "--kernel-regex", "kns=dequantize_nf4", "--error-exitcode", "0"]
        module = "benchmarks.nf4.sanitize"
        try:
            output = "\n".join(child.run(module, timeout=SECONDS, env=environment, under=sanitizer, show=None))
        except child.ChildError as error:
            return f"{tool}: {error}"
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
        if not summary or "every shape ran" not in output:
            return f"{tool} gave no result: {' '.join(output.split())[-300:]}"
        return int(summary.group(1))

    with ThreadPoolExecutor() as pool:
        errors = dict(zip(TOOLS, pool.map(run, TOOLS), strict=True))
    return next((reason for reason in errors.values() if isinstance(reason, str)), errors)


def main() -> None:
    """De-quantise random packed bytes of every shape, dtype and path; data is made on the host, so all else is ours."""
    import torch

    from unsloth_puzzles.nf4.build import PLAIN, Config
    from unsloth_puzzles.nf4.launch import prepare
    from unsloth_puzzles.nf4.state import NF4Weight

    for shape in SHAPES:
        numel = shape[0] * shape[1]
        blocks = -(-numel // 64)
        host = (
            torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8),
            torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            torch.randn(16),
            torch.randn(256),
            torch.rand(-(-blocks // 256)),
            torch.rand(()),
        )
        tensors = [tensor.cuda() for tensor in host]
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            out = torch.empty(shape, dtype=dtype, device="cuda")
            for config in (Config(), PLAIN, Config(words=64, num_warps=2)):
                prepare(NF4Weight(*tensors, 64, 256, out.shape, dtype), out, config).run(out)
            assert torch.isfinite(out.cpu()).all(), f"unwritten values in {shape} {dtype}"
    torch.cuda.synchronize()
    print("every shape ran", flush=True)


if __name__ == "__main__":
    main()
