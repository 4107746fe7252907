"""The record of CPU offload: what is kept of a run, and what is no measurement."""

import pytest

from benchmarks.fsdp2 import offload
from benchmarks.fsdp2.sweeps import MOST_HELD_GIB

RUN = {"peak_gib": [3.0, 3.5], "rest_gib": 2.0, "share": 0.5, "held_gib": 0.0}


def test_the_larger_peak_of_two_ranks_is_kept(tmp_path, monkeypatch):
    def run_cases(cases, ranks, timeout, gpus):
        assert cases[0]["offload"] and cases[0]["layers"] == 32 and (ranks, timeout, gpus) == (2, 9, "3")
        return [{**cases[0], **RUN}], 1e9

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(offload, "run_cases", run_cases)
    found = offload.measure(tmp_path / "offload.json", timeout=9)
    assert {one["metric"]: one["value"] for one in found.records} == {"peak_gib": 3.5, "rest_gib": 2.0, "share": 0.5}


@pytest.mark.parametrize(
    "run",
    [
        {"error": "CUDA out of memory"},
        {**RUN, "peak_gib": [None, None]},
        {**RUN, "held_gib": 2 * MOST_HELD_GIB},  # of an earlier model
    ],
)
def test_no_measurement_is_refused(tmp_path, monkeypatch, run):
    monkeypatch.setattr(offload, "run_cases", lambda *arguments: ([run], None))
    with pytest.raises(RuntimeError, match=r"whole model, CPU offload, two ranks on one GPU: "):
        offload.measure(tmp_path / "offload.json")
    assert not (tmp_path / "offload.json").exists()
