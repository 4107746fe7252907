"""Jobs side by side: results and errors by name, and no process that outlives an error."""

import threading

import pytest

from benchmarks.at_once import all_at_once, at_once
from unsloth_puzzles.bench import child


@pytest.mark.parametrize("together", [True, False])
def test_jobs_yield_results_and_errors_by_name(together):
    def fail():
        raise child.ChildError("it failed", "")

    found = dict(at_once({"one": lambda: 1, "broken": fail, "two": lambda: 2}, together=together))
    assert found["one"] == 1 and found["two"] == 2 and isinstance(found["broken"], child.ChildError)


def test_jobs_run_side_by_side():
    barrier = threading.Barrier(2, timeout=20)
    found = dict(at_once({"one": barrier.wait, "two": barrier.wait}))
    assert sorted(found.values()) == [0, 1]


def test_another_error_ends_all_processes(monkeypatch):
    ended = []
    monkeypatch.setattr(child, "end_all", lambda: ended.append(True))
    with pytest.raises(ZeroDivisionError):
        list(at_once({"one": lambda: 1 / 0}))
    assert ended == [True]


def test_first_error_is_raised_when_all_results_are_wanted():
    def fail():
        raise child.ChildError("it failed", "")

    with pytest.raises(child.ChildError, match="it failed"):
        all_at_once({"one": lambda: 1, "broken": fail})
    assert all_at_once({"one": lambda: 1, "two": lambda: 2}, together=False) == {"one": 1, "two": 2}
