"""Four and eight ranks over gloo: bytes, losses and norms beside one process, and runs that go on in other numbers."""

import json

import pytest

from benchmarks.fsdp2.features import LARGEST_DIFFERENCE, LARGEST_NORM_DIFFERENCE, LINEAR, STEPS
from benchmarks.fsdp2.ranks import start_ranks
from tests.fsdp2.test_resume import KINDS, check_resumed

pytestmark = pytest.mark.slow


def run(tmp_path_factory, ranks: int) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    start_ranks("tests.fsdp2.more_ranks", str(out), ranks=ranks, timeout=600, TRITON_INTERPRET="1")
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    (found,) = run(tmp_path_factory, 1)
    return found


@pytest.fixture(scope="module", params=[4, 8])
def many(tmp_path_factory, request):
    return run(tmp_path_factory, request.param)


def test_losses_and_norms_match_one_process(one, many):
    assert len(one["losses"]) == STEPS and one["plain_layers"] == LINEAR
    for found in many:
        assert found["losses"] == pytest.approx(one["losses"], abs=LARGEST_DIFFERENCE)
        assert found["norms"] == pytest.approx(one["norms"], rel=LARGEST_NORM_DIFFERENCE)
        assert min(found["norms"]) > 0


def test_gathering_changes_no_byte(many):
    assert [(found["compared"], found["changed"]) for found in many] == [(LINEAR, 0)] * len(many)


def test_ranks_hold_equal_shares_of_the_bytes_and_unequal_ones_of_the_adapters(one, many):
    assert {found["share"] for found in many} == {1 / len(many)}
    held = [found["trained"] for found in many]
    assert len(set(held)) > 1 and all(found["split"] == 1 for found in many)


@pytest.mark.parametrize("before, after", [(4, 8), (8, 4), (4, 1)])
def test_a_run_goes_on_in_another_number_of_ranks(before, after, architecture, tmp_path):
    check_resumed(architecture, tmp_path, KINDS[1], before, after, rows=8)
