"""The record of the script's speed: which runs are compared, and what is kept of them."""

import pytest

from benchmarks.fsdp2 import script, script_speed
from unsloth_puzzles.fsdp2.flags import parse


def test_runs_take_turns_and_ratios_are_of_a_round(tmp_path, monkeypatch):
    kernels, seconds = [], {"ours": iter([0.1, 0.2, 0.3]), "bitsandbytes": iter([0.2, 0.3, 0.33])}

    def run_uncompiled(kernel, model, *flags, folder, timeout):
        kernels.append(kernel)
        assert flags[:2] == ("--layers", "8") and timeout == 9
        return {"seconds": next(seconds[kernel])}

    monkeypatch.setattr(script, "run_uncompiled", run_uncompiled)
    found = script_speed.measure(tmp_path / "speed.json", rounds=3, timeout=9)
    assert kernels == ["ours", "bitsandbytes", "bitsandbytes", "ours", "ours", "bitsandbytes"]
    (step,), (ratio,) = found.find("step_ms"), found.find("script_speedup")
    assert (step["value"], step["low"], step["high"]) == pytest.approx((200, 100, 300))
    assert step["baselines"]["bitsandbytes"] == pytest.approx(300)
    assert (ratio["value"], ratio["low"], ratio["high"]) == pytest.approx((1.5, 1.1, 2.0))
    assert "random weights" in step["case"] and (tmp_path / "speed.json").exists()


@pytest.mark.parametrize("kernel", ["ours", "bitsandbytes"])
def test_the_script_takes_the_flags(tmp_path, monkeypatch, kernel):
    given = []

    def start_ranks(module, *arguments, ranks, **options):
        given.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "start_ranks", start_ranks)
    with pytest.raises(KeyboardInterrupt):
        script.run_uncompiled(kernel, "m", "--rows", "1", folder=str(tmp_path))
    options = parse(given)
    assert (options.dequantize, options.compile, options.rows, options.checkpointing) == (kernel, False, 1, True)
