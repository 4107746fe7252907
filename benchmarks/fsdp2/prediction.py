"""FSDP2 QLoRA on 1, 2, 4 and 8 GPUs, predicted from bytes and FLOPs.

python -m benchmarks.fsdp2.prediction
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas

from benchmarks.fsdp2.shapes import HEAD_SIZE, SHAPES
from unsloth_puzzles.bench.markdown import table
from unsloth_puzzles.fsdp2.stream import Layout

WORLDS = (1, 2, 4, 8)
ROWS, LENGTH = 4, 2048  # of a GPU's step; tokens of a row
SCRIPT_TOKENS = 1, 512  # rows and tokens of a row of a GPU's step in the notebook
LAYERS = {"Llama 3.1 8B": 32, "Llama 3.1 70B": 80}
VOCABULARY, LORA_RANK = 128256, 16


@dataclass(frozen=True)
class Machine:
    """GPUs of one host: bytes/s that a GPU receives in an all-gather, FLOP/s of its 16-bit products, GiB of memory."""

    name: str
    bandwidth: float
    rate: float
    memory_gib: float


ASSUMED = (Machine("H200s, NVLink", 300e9, 600e12, 139), Machine("T4s, PCIe", 5e9, 25e12, 14.5))


@dataclass(frozen=True)
class Prediction:
    """Of a step: seconds without communication and seconds that communication adds. GiB of weights that a GPU holds."""

    seconds: float
    exposed: float
    gib: float

    def over_one_gpu(self, world: int) -> float:
        """Tokens/s of `world` GPUs, each with as many rows, over one GPU's."""
        return world * self.seconds / (self.seconds + self.exposed)


def linear_shapes(shapes: str) -> list[tuple[int, int]]:
    """[out_features, in_features] of the linear layers of a decoder layer."""
    hidden, inner, _, kv_heads = SHAPES[shapes]
    kv = kv_heads * HEAD_SIZE
    found = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*found, (inner, hidden), (inner, hidden), (hidden, inner)]


def predict(shapes: str, world: int, machine: Machine, rows: int = ROWS, length: int = LENGTH) -> Prediction:
    """A step with activation checkpointing and resharding, from bytes and FLOPs.

    A layer's forward over T tokens takes 2 T FLOPs per weight and 2 T x length x hidden size for causal attention. The
    backward takes twice as long: it computes the forward again and the gradient of the input. A gather runs while the
    layer before it computes. The first gather of the forward and the first of the backward have no such layer. The
    adapters and their gradients travel in float32 with the gathers and as a reduce-scatter.

    Args:
        shapes: A key of LAYERS.
        world: Number of GPUs.
        machine: The GPUs.
        rows: Of a GPU.
        length: Tokens of a row.

    Raises:
        ValueError: Unknown `shapes`, or `world` below 1.
    """
    if shapes not in LAYERS:
        raise ValueError(f"shapes must be one of {', '.join(LAYERS)}, got {shapes!r}")
    if world < 1:
        raise ValueError(f"world must be at least 1, got {world}")
    layers, (hidden, *_), tokens = LAYERS[shapes], SHAPES[shapes], rows * length
    linear = linear_shapes(shapes)
    weights = sum(math.prod(shape) for shape in linear)
    adapters = 4 * LORA_RANK * sum(sum(shape) for shape in linear)  # bytes
    stream = sum(Layout(shape, 64, 256, world).size for shape in linear)
    received = (stream + adapters) * (world - 1) / world
    forward = (2 * tokens * weights + 2 * tokens * length * hidden) / machine.rate
    gather, scatter = received / machine.bandwidth, adapters * (world - 1) / world / machine.bandwidth
    exposed = 2 * gather + scatter  # the last reduce-scatter has nothing to hide behind either
    exposed += (layers - 1) * (max(0.0, gather - forward) + max(0.0, gather + scatter - 2 * forward))
    head = 4 * tokens * VOCABULARY * hidden / machine.rate  # logits and the gradient of the hidden states
    embeddings = 2 * 2 * VOCABULARY * hidden  # two matrices in 16 bits, on each GPU
    gib = (layers * stream / world + embeddings) / 2**30
    return Prediction(3 * layers * forward + head, exposed if world > 1 else 0.0, gib)


def predicted_table(machines: Sequence[Machine] = ASSUMED) -> str:
    """Tokens/s over one GPU, and GiB of weights a GPU, for each of `machines` and WORLDS; * where they do not fit."""
    lines = []
    for machine, shapes, (rows, length) in itertools.product(machines, LAYERS, ((ROWS, LENGTH), SCRIPT_TOKENS)):
        found = {world: predict(shapes, world, machine, rows, length) for world in WORLDS}
        cells = (
            f"{one.over_one_gpu(world):.2f}x, {one.gib:.1f} GiB" + ("*" if one.gib > machine.memory_gib else "")
            for world, one in found.items()
        )
        rates = f"{machine.bandwidth / 1e9:.0f} GB/s, {machine.rate / 1e12:.0f} TFLOP/s"
        lines.append((f"{machine.name}, {rates}", shapes, f"{rows} x {length}", *cells))
    columns = ["assumed", "layer shapes", "tokens of a GPU", *(f"{world} GPU{'s' * (world > 1)}" for world in WORLDS)]
    return table(pandas.DataFrame(lines, columns=columns))


if __name__ == "__main__":
    print(predicted_table())
