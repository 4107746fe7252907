"""The traps of classifiers and the losses beside transformers', at the notebook's CPU sizes."""

import pytest

from benchmarks.classification.parity import check_losses
from benchmarks.classification.traps import Checkpoints, check_traps


@pytest.fixture(scope="module")
def made() -> Checkpoints:
    return Checkpoints("cpu", layers=1)


def test_ours_falls_into_no_trap(made):
    rows, checks = check_traps(made)
    assert [name for name, good in checks.items() if not good] == [] and len(checks) == 10
    assert [name for name, *_ in rows][:3] == [
        "a head over a 4-bit checkpoint", "LoRA without a task type", "padding = end of text",
    ]  # fmt: skip
    assert len(rows) == 6
    assert "trained: False" in rows[1][1] and "off by 0.00" not in rows[1][1] and "off by 0.00" not in rows[2][1]


def test_losses_are_transformers(made):
    found = check_losses(made, compiled=False, steps=1)
    assert [name for name, good in found.checks.items() if not good] == []
    assert (
        set(found.differences) == {"patched"}
        and found.calls["patched"] >= found.layers > 0 == found.calls["transformers"]
    )
    assert found.graphs is None
