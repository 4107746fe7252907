"""A Trainer's progress is a line every `SILENCE` seconds."""

import types

from benchmarks import progress


def test_a_line_every_so_often(monkeypatch, capsys):
    now = iter([0.0, 1.0, 21.0, 21.0, 22.0, 42.0, 42.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(now)))
    callback = progress.Progress("training")
    for step in (10, 20, 30, 40):
        callback.on_log(None, types.SimpleNamespace(global_step=step, max_steps=200), None, logs={"loss": 1 / step})
    callback.on_log(None, None, None, logs={"train_runtime": 3.0})
    assert capsys.readouterr().out.splitlines() == [
        "... training: step 20 of 200, loss 0.050",
        "... training: step 40 of 200, loss 0.025",
    ]
