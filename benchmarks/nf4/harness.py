"""The puzzle's own test: an MLP of three 4-bit layers, checked at default tolerances, then timed by the wall clock."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.testing import assert_close

Dequantize = Callable[[nn.Module], torch.Tensor]


class Case(NamedTuple):
    """Batch, sequence length, hidden size, size inside the MLP, seed, dtype."""

    batch: int
    length: int
    hidden: int
    inner: int
    seed: int
    dtype: torch.dtype


OFFICIAL = (
    Case(2, 3333, 2048, 8192, 3407, torch.float16),
    Case(5, 777, 1024, 4096, 3409, torch.bfloat16),
    Case(3, 2048, 4096, 14336, 3408, torch.bfloat16),
)
QUICK = (  # the same test where the kernel is interpreted
    Case(2, 33, 128, 512, 3407, torch.float16),
    Case(3, 20, 256, 512, 3408, torch.float32),
)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), every layer an NF4, double-quantised `bitsandbytes.nn.Linear4bit` without bias."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype):
        import bitsandbytes as bnb

        super().__init__()
        settings = {"bias": False, "compute_dtype": dtype, "compress_statistics": True, "quant_type": "nf4"}
        self.gate = bnb.nn.Linear4bit(hidden, inner, **settings)
        self.up = bnb.nn.Linear4bit(hidden, inner, **settings)
        self.down = bnb.nn.Linear4bit(inner, hidden, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.gate, self.up, self.down


def build(case: Case, device: str) -> tuple[MLP, torch.Tensor]:
    """The case's MLP, quantised on `device`, and its input [batch, length, hidden]."""
    torch.manual_seed(case.seed)
    mlp = MLP(case.hidden, case.inner, case.dtype).to(device)
    for layer in mlp.layers():
        layer.weight.quant_state.dtype = case.dtype
    return mlp, torch.randn(case.batch, case.length, case.hidden, device=device, dtype=case.dtype)


@torch.no_grad()
def check(mlp: MLP, x: torch.Tensor, dequantize: Dequantize, reference: Dequantize) -> None:
    """AssertionError unless the MLP's output through these weights and each matrix are close, at default tolerances."""
    gate, up, down = (dequantize(layer).t() for layer in mlp.layers())
    assert_close((nn.functional.silu(x @ gate) * (x @ up)) @ down, mlp(x))
    for layer in mlp.layers():
        assert_close(dequantize(layer), reference(layer))


def measure(
    candidates: Mapping[str, Dequantize],
    reference: Dequantize,
    cases=OFFICIAL,
    *,
    device: str = "cuda",
    rounds: int = 1000,
    repeats: int = 11,
) -> dict[str, dict[Case, list[float]]]:
    """Seconds for `rounds` rounds (three matrices, a synchronise after each) per candidate and case, `repeats` of each.

    Every candidate is checked twice on every case before anything is timed; the candidates take turns.
    """
    seconds: dict[str, dict[Case, list[float]]] = {name: {} for name in candidates}
    for case in cases:
        mlp, x = build(case, device)
        for dequantize in candidates.values():
            for _ in range(2):
                check(mlp, x, dequantize, reference)
        layers = mlp.layers()
        for _ in range(repeats):
            for name, dequantize in candidates.items():
                seconds[name].setdefault(case, []).append(_timed(layers, dequantize, device, rounds))
    return seconds


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[0], tenths[-1]


def _timed(layers, dequantize: Dequantize, device: str, rounds: int) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(rounds):
        for layer in layers:
            dequantize(layer).t()
            wait()
    return time.perf_counter() - start
