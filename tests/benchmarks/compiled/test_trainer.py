"""The Trainer run, tiny and on the CPU: what it returns; the compiled one is run by the notebook's test."""

import pytest

from benchmarks.compiled.sweeps import TRAINER, run, summary
from benchmarks.compiled.trainer import AFTERWARDS, Batches, measure


@pytest.mark.slow
def test_the_uncompiled_run_in_a_process_of_its_own():
    (found,) = run([{**TRAINER["trainer, eager"], "steps": 3, "longest": 30, "tiny": True}])
    assert len(set(found["lengths"])) == 3 and len(found["losses"]) == 3 + AFTERWARDS + 1
    assert found["losses"][0] != found["losses"][-1]
    assert len(found["gradient_norms"]) == 3 and min(found["gradient_norms"]) > 0
    assert found["limits"] == {"suppress_errors": False, "recompile_limit": 8, "accumulated_recompile_limit": 256}
    for prefix in ("", "later_"):
        assert found[f"{prefix}compilations"] == 0 and found[f"{prefix}captures"] == []
    assert summary(found).startswith("7 losses, 0 compilations in")


def test_batches_and_bad_input():
    rows = list(Batches(3, 30, packed=True))
    assert [row["input_ids"].shape for row in rows] == [(2, n) for n in Batches(3, 30).lengths]
    assert (rows[0]["position_ids"] == 0).sum() == 4 and "position_ids" not in next(iter(Batches(3, 30)))
    with pytest.raises(ValueError, match=r"^candidate must be one of 'eager', 'compiled', got 'fast'"):
        measure("fast")
