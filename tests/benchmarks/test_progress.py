"""Progress is a line every `SILENCE` seconds, of a Trainer or of any work."""

import threading
import time
import types

import pytest

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


def test_work_says_how_long_it_has_been_going_on(capsys):
    with progress.at_work("answers", silence=0.1):
        time.sleep(0.35)
    lines = capsys.readouterr().out.splitlines()
    assert lines and {*lines} == {"... answers: at work for 0 s"}


def test_work_that_is_short_or_fails_leaves_no_thread(capsys):
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"^bad$"), progress.at_work("answers", silence=60):
        raise ValueError("bad")
    assert threading.active_count() == before and not capsys.readouterr().out
