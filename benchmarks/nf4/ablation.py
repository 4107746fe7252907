"""What each decision of the kernel is worth: variants with one decision changed, timed in one run."""

from functools import partial

import torch

from benchmarks.nf4.baselines import bitsandbytes_dequantize
from benchmarks.nf4.workload import bytes_per_weight, calls, make_layer
from unsloth_puzzles.bench import timing
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.timing import Timing
from unsloth_puzzles.nf4 import dequantize_nf4
from unsloth_puzzles.nf4.build import PLAIN, Config
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import nf4_weight

VARIANTS = {  # (group, name): the first of a group is what the others differ from in one decision
    ("inline PTX", "default: shuffle, evict_first, 2 words per thread"): Config(),
    ("inline PTX", "look-up by prmt"): Config(lookup="prmt"),
    ("inline PTX", "no eviction hints"): Config(evict=""),
    ("inline PTX", "1 word per thread"): Config(unroll=1),
    ("inline PTX", "4 words per thread"): Config(unroll=4),
    ("inline PTX", "128 threads per program, not 512"): Config(words=128, num_warps=4),
    ("plain Triton", "look-up by load, 128 threads"): PLAIN,
    ("plain Triton", "512 threads per program"): PLAIN._replace(words=512, num_warps=16),
    ("plain Triton", "look-up by tl.gather"): PLAIN._replace(lookup="gather"),
    ("plain Triton", "look-up by 15 selects"): PLAIN._replace(lookup="select"),
    ("plain Triton", "contraction allowed (not exact)"): PLAIN._replace(fp_fusion=True),
}
UNALIGNED = ("inline PTX", "1 byte per thread (unaligned memory)")
DEFAULT = next(iter(VARIANTS))
NO_HINTS = ("inline PTX", "no eviction hints")


def measure(
    rows: int, columns: int, dtype: torch.dtype, hardware: Hardware, rounds: int = 15
) -> tuple[dict[tuple[str, str], Timing], dict[str, bool]]:
    """Device time of every variant on weights [rows, columns].

    Returns:
        The timings by group and name, and by name whether a variant gives bitsandbytes' weights, unless it need not.
    """
    moved = bytes_per_weight(dtype) * rows * columns
    layers = [
        make_layer(rows, columns, dtype, "cuda") for _ in range(max(2, timing.rotations(moved, hardware.l2_bytes)))
    ]
    exact = bitsandbytes_dequantize(layers[0])
    same = {
        ", ".join(name): torch.equal(_with_config(layers[0], config), exact)
        for name, config in VARIANTS.items()
        if not config.fp_fusion
    }
    tested = {name: calls(partial(_with_config, config=config), layers) for name, config in VARIANTS.items()}
    shifted = [torch.empty(rows * columns + 1, dtype=dtype, device="cuda")[1:].view(rows, columns) for _ in layers]
    same[", ".join(UNALIGNED)] = torch.equal(dequantize_nf4(layers[0], out=shifted[0]), exact)
    tested[UNALIGNED] = [partial(dequantize_nf4, layer, out=out) for layer, out in zip(layers, shifted, strict=True)]
    return timing.device_time(tested, rounds=rounds), same


def faster_than_default(timings: dict[tuple[str, str], Timing]) -> list[str]:
    """The exact variants whose 90th percentile lies below the default's 10th."""
    exact = [name for name in timings if name not in VARIANTS or not VARIANTS[name].fp_fusion]
    return [", ".join(name) for name in exact if timings[name].high < timings[DEFAULT].low]


def summary(timings: dict[tuple[str, str], Timing]) -> list[str]:
    """Sum up a shape's timings: a line on the eviction hints, and one on the variants that are faster."""
    default, without = timings[DEFAULT], timings[NO_HINTS]
    faster = "; ".join(faster_than_default(timings)) or "none"
    spread = f"{without.low / default.high:.3f} to {without.high / default.low:.3f}"
    return [
        f"without eviction hints {without.median / default.median:.3f}x the default's time ({spread})",
        f"exact variants faster than the default beyond the spread: {faster}",
    ]


def _with_config(layer, config: Config) -> torch.Tensor:
    packed, state = layer.weight.data, layer.weight.quant_state
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda")
    return prepare(nf4_weight(packed, state), out, config).run(out)
