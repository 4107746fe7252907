"""Two ranks over gloo beside one process: losses, gradient norms and bytes, by a plain loop, feature by feature."""

import json

import pytest
import torch

from benchmarks.fsdp2.features import (
    ALONE,
    DORA,
    FEATURES,
    MIXED,
    OVERFLOWING,
    PLAIN,
    REGROUPED,
    SCALER,
    STEPS,
    allowed,
    differences,
    seen,
    unseen,
)  # fmt: skip
from benchmarks.fsdp2.ranks import start_ranks

COMPILED = [name for name, options in FEATURES.items() if options.get("compiled")]
ACCUMULATED = [name for name, options in FEATURES.items() if options.get("accumulation")]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory, 1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory, 2)


def run(tmp_path_factory, ranks: int) -> dict:
    out = tmp_path_factory.mktemp("features") / "out.json"
    start_ranks("benchmarks.fsdp2.features", str(out), ranks=ranks, timeout=900, TRITON_INTERPRET="1")
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", FEATURES)
def test_losses_and_norms_match_one_process(one, two, name):
    (loss, norm), (most, most_norm) = differences(name, two, one), allowed(name, one)
    assert loss <= most and norm <= most_norm
    assert len(two[name]["losses"]) == STEPS and two[name]["losses"][-1] != two[name]["losses"][0]
    assert min(norm for norm in two[name]["norms"] if norm is not None) > 0.1


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_does_what_it_is_for(one, two, name):
    text, good = seen(name, two, one)
    assert text and good is (None if name == "CPU offload" else True)  # all tensors are on the CPU here


def test_the_run_without_a_feature_shows_none(one, two):
    assert unseen(two, one)


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in (PLAIN, "CPU offload")])
def test_a_feature_that_does_nothing_is_noticed(one, two, name):
    assert seen(name, two | {name: two[PLAIN]}, one)[1] is False


@pytest.mark.parametrize("places, good", [(("cpu", "cpu"), True), (("cuda", "cpu"), False), (("cpu", "cuda"), False)])
def test_offload_is_seen_where_there_is_a_gpu(one, two, places, good):
    shards, states = places
    found = two["CPU offload"] | {"device": "cuda", "shards_on": [shards], "states_on": [states]}
    assert seen("CPU offload", two | {"CPU offload": found}, one)[1] is good


def test_one_process_has_the_layers_of_bitsandbytes(one):
    assert {found["plain_layers"] for found in one.values()} == {14}


def test_one_process_in_16_bits_differs_from_float32(one):
    """Or the bound of the mixed-precision runs would prove nothing."""
    assert one.keys() == ALONE.keys()
    assert one[MIXED]["losses"] != one[PLAIN]["losses"] and one[MIXED]["losses"] != one[REGROUPED]["losses"]


def test_magnitudes_of_dora_have_the_gradients_of_one_process(one, two):
    ours, theirs = two[DORA]["magnitudes"], one[DORA]["magnitudes"]
    assert len(ours) == len(theirs) == 14
    for found, expected in zip(map(torch.tensor, ours), map(torch.tensor, theirs), strict=True):
        assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", FEATURES)
def test_each_rank_holds_exactly_half_of_the_bytes(two, name):
    assert two[name]["share"] == 0.5


@pytest.mark.parametrize("name", [name for name in FEATURES if name not in COMPILED])
def test_gathering_changes_no_byte(two, name):
    assert two[name]["compared"] == 14 and two[name]["changed"] == 0


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_reduced_in_float32(two, name):
    assert two[name]["reduced"] == ["torch.float32"]


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_are_reduced_once_a_step(two, name):
    """One reduce-scatter a decoder layer: after the last micro-batch, and none before."""
    assert two[name]["scattered"] == ([0, 2] if name in ACCUMULATED else [2]) * STEPS


def test_an_infinity_on_one_rank_skips_the_step_on_both(one, two):
    """The scale that the first rank holds is halved, though the infinity is in the last rank's share."""
    scales = two[SCALER]["scales"]
    assert scales == one[SCALER]["scales"] and scales[OVERFLOWING] == scales[OVERFLOWING - 1] / 2
    assert two[SCALER]["norms"][OVERFLOWING] is None
