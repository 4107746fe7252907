"""The runs on 1, 2, 4 and 8 GPUs: what is recorded of them, and real ones on a CPU."""

import dataclasses

import pytest

from benchmarks.fsdp2 import scaling
from benchmarks.fsdp2.prediction import Machine, predict
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

GPU = dataclasses.replace(probe(measure=False), matmul_flops={"bfloat16": 6e14})


def fake_run(cases, ranks, timeout):
    """Runs that keep 90 % of the ideal; 70B's layers do not fit one GPU."""
    (case,) = cases
    if "70B" in case["shapes"] and ranks == 1:
        return [{**case, "error": "out of memory"}], None
    rate = 1000.0 * ranks * (0.9 if ranks > 1 else 1)
    run = {**case, "tokens_per_s": rate, "share": 1 / ranks, "peak_gib": [20.0 / ranks, 21.0 / ranks][:ranks]}
    return [run], 3e11 if ranks > 1 else None


def test_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "run_cases", fake_run)
    monkeypatch.setattr(scaling, "probe", lambda measure: GPU)
    path = tmp_path / "scaling.json"
    scaling.measure(path, [4, 1, 2])
    found = Measurements.load(path)
    (four,) = found.find("tokens_per_s_over_one_gpu", "Llama 3.1 8B, 4 GPUs")
    assert four["value"] == pytest.approx(3.6)
    expected = predict("Llama 3.1 8B", 4, Machine("", 3e11, 6e14, 0)).over_one_gpu(4)
    assert four["baselines"] == {"predicted": expected}
    assert found.find("exposed", "Llama 3.1 8B, 2 GPUs")[0]["value"] == pytest.approx(0.1)
    assert found.find("peak_gib", "Llama 3.1 8B, 2 GPUs")[0]["value"] == 10.5
    assert found.find("share", "Llama 3.1 70B, 4 GPUs")[0]["value"] == 0.25
    assert not found.find("tokens_per_s_over_one_gpu", "Llama 3.1 70B, 4 GPUs")  # there is no one GPU to compare with
    assert "SKIPPED: Llama 3.1 70B, 1 GPU: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    "worlds, message",
    [(["2"], "--worlds must hold 1, which the others are compared with"), (["1", "2"], "at most the GPUs here, 1")],
)
def test_wrong_numbers_of_gpus_are_refused(monkeypatch, capsys, worlds, message):
    monkeypatch.setattr("sys.argv", ["scaling", "out.json", "--worlds", *worlds])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        scaling.main()
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_runs_of_one_two_and_four_ranks_on_a_cpu(tmp_path):
    path = tmp_path / "scaling.json"
    scaling.measure(path, [1, 2, 4], tiny=True)
    found = Measurements.load(path)
    assert [one["value"] for one in found.find("share")] == [1, 0.5, 0.25]
    assert all(one["value"] > 0 for one in found.find("tokens_per_s_over_one_gpu"))
