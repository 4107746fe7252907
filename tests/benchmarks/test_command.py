"""The command line of a sweep: a file, its records on the screen, and no run without a GPU."""

import pytest

from benchmarks import command
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements


def fake(path, hardware):
    found = Measurements(path, hardware)
    found.add("step_ms", "tiny", 1.23456, "ms", baselines={"stock": 2.5})
    found.save()
    return found


def test_a_sweep_is_kept_and_shown(tmp_path, monkeypatch, capsys):
    path, hardware = tmp_path / "a.json", probe(measure=False)
    monkeypatch.setattr("sys.argv", ["sweeps", str(path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(command, "probe", lambda: hardware)
    command.run_sweep(fake, "Steps.")
    assert capsys.readouterr().out == "step_ms, tiny: 1.235 ms {'stock': 2.5}\n"
    assert len(Measurements.load(path).records) == 1


def test_no_sweep_without_a_gpu(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.json"
    monkeypatch.setattr("sys.argv", ["sweeps", str(path)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.run_sweep(fake, "Steps.")
    assert "torch sees no CUDA GPU" in capsys.readouterr().err and not path.exists()
