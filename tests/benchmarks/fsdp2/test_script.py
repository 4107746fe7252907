"""How the benchmark starts the training script."""

import json

import pytest

from benchmarks.fsdp2 import script


@pytest.mark.parametrize("name, gpus", [(script.ONE, "3"), (script.TWO, "3,5")])
def test_each_rank_has_one_gpu(name, gpus, tmp_path, monkeypatch):
    seen = []

    def start_ranks(module, *arguments, **options):
        seen.append(options)
        line = {"loss": 1.0, "seconds": 2.0, "tokens_per_s": 3.0, "peak_gib": [0.5, 0.25]}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        (tmp_path / given["--log-file"]).write_text(json.dumps(line) + "\n" + json.dumps(line | {"loss": 0.5}) + "\n")
        (tmp_path / given["--summary-file"]).write_text('{"share": 0.5}')

    monkeypatch.setattr(script, "start_ranks", start_ranks)
    found = script.run(name, "m", "--length", "8", gpus=gpus, folder=str(tmp_path))
    assert seen[0]["gpus"] == gpus and seen[0]["ranks"] == len(gpus.split(","))
    assert found["losses"] == [1.0, 0.5] and found["peak_gib"] == [0.5, 0.25] and found["share"] == 0.5


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


def test_some_lines_of_a_trainer_are_shown(capsys):
    show = script._some_lines("run")
    for step in range(40):
        show(f"  3%| {step}/60 [00:45<44:58]")
        show(f"{{'loss': '{step:.2f}', 'grad_norm': '0.2'}}")
    show("... train at work for 25 s")
    assert capsys.readouterr().out.splitlines() == [
        "run: step 20 of 60, loss 19.00", "run: step 40 of 60, loss 39.00", "run: ... train at work for 25 s",
    ]  # fmt: skip
