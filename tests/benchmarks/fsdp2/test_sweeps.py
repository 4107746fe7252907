"""The comparison of one GPU and several: what it records of runs, and runs of two ranks on a CPU."""

import json

import pytest

from benchmarks.fsdp2 import sweeps
from unsloth_puzzles.bench.record import Measurements


def fake_run(cases, ranks, timeout, gpus=None):
    """Runs whose steps take 100 ms on one GPU and 110 ms on two; in 8 rows the memory does not suffice."""
    found = []
    for case in cases:
        if case["rows"] == 8:
            found.append({**case, "error": "out of memory"})
            continue
        step = 100.0 if ranks == 1 else 110.0
        drift = 1e-3 * (2 * (ranks > 1) + (case.get("accumulation", 1) > 1))
        found.append(
            {
                **case, "step_ms": [900.0, 500.0, step, step], "tokens_per_s": case["rows"] * ranks * 2048 / step * 1e3,
                "peak_gib": [3.0, 4.0][:ranks], "rest_gib": 2.0, "share": 1 / ranks, "losses": [2.0, 1.0 + drift],
                "compilations": 6, "graph_breaks": 0, "held_gib": 1.0 if case["rows"] == 2 else 0.01,
            }
        )  # fmt: skip
    return found, 2e11 if ranks > 1 else None


def test_records(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "run_cases", fake_run)
    path = tmp_path / "sweeps.json"
    sweeps.measure(path, 2)
    found = Measurements.load(path)
    (scaling,) = found.find("scaling", "compiled, 4 rows a GPU")
    assert scaling["value"] == pytest.approx(2 / 1.1)
    assert found.find("step_over_one_gpu", "uncompiled, 1 rows a GPU")[0]["value"] == pytest.approx(1.1)
    assert not found.find("scaling", "compiled, 8 rows a GPU")  # it had no memory
    (apart,) = found.find("loss_difference", "bfloat16, seed 3")
    assert apart["value"] == pytest.approx(2e-3) and [*apart["baselines"].values()] == [pytest.approx(1e-3)]
    assert found.find("peak_gib", "whole model, CPU offload")[0]["value"] == 4.0
    assert found.find("scaling", "compiled, 2 rows a GPU") and not found.find("peak_gib", "compiled, 2 rows a GPU")
    assert found.find("gather_bytes_per_s")[0]["value"] == 2e11
    assert found.find("compilations", "50 lengths")[0]["value"] == 6


def test_fewer_gpus_than_ranks_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sweeps", "out.json", "--ranks", "2"])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        sweeps.main()
    assert "--ranks must be at most the GPUs here, 1, got 2" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_two_ranks_on_a_cpu(tmp_path):
    path = tmp_path / "sweeps.json"
    sweeps.measure(path, 2, tiny=True)
    records = json.loads(path.read_text())["records"]
    assert {record["value"] for record in records if record["metric"] == "share"} == {0.5}
    assert all(record["value"] <= 1e-5 for record in records if record["metric"] == "loss_difference")
    assert len([record for record in records if record["metric"] == "scaling"]) == len(sweeps.ROWS)
