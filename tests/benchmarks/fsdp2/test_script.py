"""How the benchmark starts the training script."""

import json
import math

import pytest

from benchmarks.fsdp2 import script


@pytest.mark.parametrize("name, gpus", [(script.ONE, "3"), (script.TWO, "3,5")])
def test_each_rank_has_one_gpu(name, gpus, tmp_path, monkeypatch):
    seen = []

    def start_ranks(module, *arguments, **options):
        seen.append(options)
        line = {"loss": 1.0, "grad_norm": 0.1, "seconds": 2.0, "tokens_per_s": 3.0, "peak_gib": [0.5, 0.25]}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        (tmp_path / given["--log-file"]).write_text(json.dumps(line) + "\n" + json.dumps(line | {"loss": 0.5}) + "\n")
        (tmp_path / given["--summary-file"]).write_text('{"share": 0.5}')

    monkeypatch.setattr(script, "start_ranks", start_ranks)
    found = script.run(name, "m", "--length", "8", gpus=gpus, folder=str(tmp_path))
    assert seen[0]["gpus"] == gpus and seen[0]["ranks"] == len(gpus.split(","))
    assert found["losses"] == [1.0, 0.5] and found["peak_gib"] == [0.5, 0.25] and found["share"] == 0.5
    assert found["norms"] == [0.1, 0.1]


def test_runs_side_by_side_have_files_of_their_own(tmp_path, monkeypatch):
    files = []

    def start_ranks(module, *arguments, **options):
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        files.extend([given["--log-file"], given["--summary-file"]])
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "start_ranks", start_ranks)
    for name in script.RUNS:
        with pytest.raises(KeyboardInterrupt):
            script.run(name, "m", gpus="0", folder=str(tmp_path))
    assert len({*files}) == 2 * len(script.RUNS)


def test_differences_of_two_runs():
    one, two = {"losses": [2.0, 1.0], "norms": [0.5, 0.2]}, {"losses": [2.5, 1.0], "norms": [0.5, 0.1]}
    assert script.differences(two, one) == ([0.5, 0.0], [0.0, 0.5])
    skipped = {"losses": [2.0, 1.0], "norms": [math.nan, math.inf]}
    assert script.differences(skipped, skipped)[1] == [0, 0]
    assert script.differences(skipped, one)[1] == script.differences(one, skipped)[1] == [math.inf, math.inf]


@pytest.mark.slow  # the smoke run of the notebook trains so, too
def test_the_trainer_on_two_ranks_of_a_cpu_has_the_losses_of_one_process(tmp_path):
    model = script.tiny_model(tmp_path)
    runs = {
        ranks: script.run_tiny(f"{ranks}", model, ranks=ranks, gpus=None, folder=tmp_path, timeout=300)
        for ranks in (1, 2)
    }
    losses, norms = script.differences(runs[2], runs[1])
    assert max(losses) <= 1e-5 and max(norms) <= 1e-4 and min(runs[1]["norms"]) > 0.01 and len(runs[1]["losses"]) == 3
    assert runs[1]["share"] == 1 and runs[2]["share"] == 0.5 and runs[2]["peak_gib"] == [None, None]


def test_some_lines_of_a_trainer_are_shown(capsys):
    show = script._some_lines("run")
    for step in range(60):
        show(f"  3%| {step}/60 [00:45<44:58]")
        show(f"{{'loss': '{step:.2f}', 'grad_norm': '0.2'}}")
    show("... train at work for 25 s")
    assert capsys.readouterr().out.splitlines() == [
        "run: step 30 of 60, loss 29.00", "run: step 60 of 60, loss 59.00", "run: ... train at work for 25 s",
    ]  # fmt: skip
