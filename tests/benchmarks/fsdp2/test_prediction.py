"""The curve over GPUs that bytes and FLOPs predict."""

import math

import pytest

from benchmarks.fsdp2.prediction import (
    LAYERS,
    LENGTH,
    ROWS,
    WORLDS,
    Machine,
    linear_shapes,
    predict,
    predicted_table,
)  # fmt: skip

FAST, SLOW = Machine("fast", 300e9, 600e12, 139), Machine("slow", 1e9, 600e12, 139)


def test_weights_of_a_layer_are_llamas():
    """8.03 and 70.6 billion weights are the models' sizes, with embedding and head of 128256 tokens."""
    for shapes, hidden, billions in (("Llama 3.1 8B", 4096, 8.03), ("Llama 3.1 70B", 8192, 70.55)):
        linear = LAYERS[shapes] * sum(map(math.prod, linear_shapes(shapes)))
        assert (linear + 2 * 128256 * hidden) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("shapes", LAYERS)
def test_one_gpu_communicates_nothing(shapes):
    found = predict(shapes, 1, SLOW)
    assert found.exposed == 0 and found.over_one_gpu(1) == 1


@pytest.mark.parametrize("machine", [FAST, SLOW])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_exposed_time_is_that_of_two_streams_that_wait_for_each_other(machine, world):
    """Played event by event: a layer needs its gather, and a gather starts with the computation of the layer before."""
    shapes, tokens = "Llama 3.1 8B", ROWS * LENGTH
    layers, weights = LAYERS[shapes], sum(map(math.prod, linear_shapes(shapes)))
    adapters = 4 * 16 * sum(map(sum, linear_shapes(shapes)))
    scale_bytes = weights / 64 + 4 * weights / 64 / 256  # a byte a block of 64, four bytes a group of 256 blocks
    received = (weights / 2 + scale_bytes + adapters) * (world - 1) / world
    gather, scatter = received / machine.bandwidth, adapters * (world - 1) / world / machine.bandwidth
    forward = (2 * tokens * weights + 2 * tokens * LENGTH * 4096) / machine.rate
    now = gather
    for layer in range(layers):
        now += forward if layer == layers - 1 else max(forward, gather)
    now += gather
    for layer in range(layers):
        now += 2 * forward if layer == layers - 1 else max(2 * forward, gather + scatter)
    now += scatter
    assert predict(shapes, world, machine).exposed == pytest.approx(now - 3 * layers * forward, rel=1e-6)


def test_table_marks_weights_that_do_not_fit():
    lines = [line for line in predicted_table().splitlines() if "T4s" in line and "70B" in line]
    assert len(lines) == 2
    for line in lines:
        assert [cell.strip().endswith("*") for cell in line.split("|")[4:-1]] == [True, True, False, False]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"shapes must be one of Llama 3\.1 8B, Llama 3\.1 70B, got 'tiny'"):
        predict("tiny", 2, FAST)
    with pytest.raises(ValueError, match="world must be at least 1, got 0"):
        predict("Llama 3.1 8B", 0, FAST)
