"""The policy for what fails: in cells that a real IPython shell runs, and for checks by name."""

import math

import pytest
from IPython.core.interactiveshell import InteractiveShell

from unsloth_puzzles.bench import child, experiments
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

MACHINE = Hardware("NVIDIA Test", "cuda", 90, 1, 8.0, 2, 1, True, False)


@pytest.fixture
def shell(monkeypatch):
    monkeypatch.setattr(experiments, "failures", [])
    made = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: made)
    experiments.watch(quiet_seconds=0.2)
    return made


def test_error_is_printed_and_recorded_and_the_next_cell_runs(shell, capsys):
    done = shell.run_cell("import math\ntable = {}\ntable['bare products'] += 1\nprint('not reached')")
    assert done.success  # so that "Run all" goes on
    said = capsys.readouterr().out
    assert "FAILED: table = {}" in said and "KeyError: 'bare products'" in said and "not reached" not in said
    assert "Traceback" not in said
    assert experiments.failures == [("table = {}", "KeyError: 'bare products'")]
    assert experiments.report() == "Errors and failed checks:\n\n- `table = {}`: KeyError: 'bare products'"
    assert shell.run_cell("print('the next')").success and "the next" in capsys.readouterr().out


def test_failed_cell_loses_its_new_names_only(shell):
    shell.run_cell("kept = [1]")
    shell.run_cell("half = object()\nkept.append(2)\n1 / 0")
    assert "half" not in shell.user_ns and shell.user_ns["kept"] == [1, 2]


def test_failed_cell_keeps_imports_and_definitions(shell):
    shell.run_cell("import json\nfrom math import sqrt\ndef f(): return 1\nclass A: pass\n1 / 0")
    assert shell.run_cell("json.dumps(f() + sqrt(4)), A()").success and len(experiments.failures) == 1


def test_failed_cell_frees_its_memory(shell):
    """Also what a function's frame held, which a traceback would keep."""
    shell.run_cell(
        "import weakref, torch\n"
        "seen = []\n"
        "def experiment():\n"
        "    tensor = torch.ones(10)\n"
        "    seen.append(weakref.ref(tensor))\n"
        "    raise torch.OutOfMemoryError('out of memory. Tried to allocate')\n"
    )
    shell.run_cell("global_one = torch.ones(10)\nseen.append(weakref.ref(global_one))\nexperiment()")
    assert [ref() for ref in shell.user_ns["seen"]] == [None, None]
    assert experiments.failures[0][1].startswith("OutOfMemoryError: out of memory")


def test_interrupt_stops_the_notebook_and_ends_processes(shell, monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(child, "end_all", lambda: ended.append(True))
    done = shell.run_cell("raise KeyboardInterrupt")
    assert not done.success and ended == [True] and experiments.failures == []


def test_silent_cell_reports_progress(shell, capsys):
    shell.run_cell("import time\ntime.sleep(0.7)")
    assert "... at work for" in capsys.readouterr().out
    shell.run_cell("time.sleep(0.01)")
    assert capsys.readouterr().out == ""


def test_second_watch_changes_nothing(shell, capsys):
    experiments.watch()
    shell.run_cell("1 / 0")
    assert capsys.readouterr().out.count("FAILED") == 1 and len(experiments.failures) == 1


def test_watch_is_refused_without_ipython(monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: None)
    with pytest.raises(RuntimeError, match="must be called in an IPython shell"):
        experiments.watch()


def test_judge_records_the_share_and_lists_failed_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "failures", [])
    results = Measurements(tmp_path / "x.json", MACHINE)
    experiments.judge(results, "all well", {"a": True, "b": True})
    experiments.judge(results, "one bad", {"a": True, "b": False, "c": math.nan == math.nan, "d": True})
    assert [found["value"] for found in results.find("checks_passed")] == [1, 0.5]
    said = capsys.readouterr().out
    assert "all well: 2 of 2 checks passed\n" in said
    assert "one bad: 2 of 4 checks passed\n  FAILED: b\n  FAILED: c\n" in said
    assert experiments.report() == "Errors and failed checks:\n\n- `one bad`: 2 of 4 checks failed: b; c"


def test_judge_without_checks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="checks must not be empty"):
        experiments.judge(Measurements(tmp_path / "x.json", MACHINE), "nothing", {})


def test_report_without_failures_says_so(monkeypatch):
    monkeypatch.setattr(experiments, "failures", [])
    assert experiments.report() == "Errors and failed checks: none."


def test_failed_prints_and_records_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "failures", [])
    experiments.failed("full, ours", ValueError("losses must be finite\nsecond line"))
    experiments.failed("full, standard", "out of memory")
    said = "FAILED: full, ours: ValueError: losses must be finite\nFAILED: full, standard: out of memory\n"
    assert capsys.readouterr().out == said
    assert experiments.report().endswith("- `full, standard`: out of memory")
