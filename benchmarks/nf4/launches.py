"""What one call launches and allocates, counted by PyTorch's profiler and the allocator's statistics.

    python -m benchmarks.nf4.launches

A process of its own: once CUPTI has profiled a process, every later launch in it takes three times as long.
"""

import json

from unsloth_puzzles.bench import child

SECONDS = 240


def count_launches() -> dict[str, dict]:
    """For `dequantize_nf4` and the three launches: {"kernels": names, "allocations": how many}."""
    lines = child.run("benchmarks.nf4.launches", timeout=SECONDS, show=None)
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def main() -> None:
    """Count in this process and print one JSON line."""
    import torch

    from benchmarks.gpu_work import gpu_work
    from benchmarks.nf4.baselines import three_launches
    from benchmarks.nf4.workload import make_layer
    from unsloth_puzzles.bench import memory
    from unsloth_puzzles.nf4 import dequantize_nf4

    layer = make_layer(1024, 4096, torch.float16, "cuda")
    found = {}
    for name, dequantize in (("ours", dequantize_nf4), ("three launches", three_launches)):
        dequantize(layer)  # compile
        requests = memory.allocations(lambda dequantize=dequantize: dequantize(layer))
        kernels = [work.name for work in gpu_work(lambda dequantize=dequantize: dequantize(layer))]
        found[name] = {"kernels": kernels, "allocations": requests}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
