"""The sweep over QLoRA settings: runs kept as they finish, not made twice, failures kept with their reason."""

import json

import pytest

from benchmarks.compiled import sweeps
from benchmarks.compiled.sweeps import RUNS, lengths, measure, run, step_ms, summary

TINY = {"tiny": True, "batch": 2, "lengths": [24, 17, 30], "dtype": "float32"}


@pytest.fixture(scope="module")
def runs():
    """Three at once, one of which fails."""
    broken = {"candidate": "compiled", **TINY, "attention": "xformers"}
    compiled = {"candidate": "compiled", "checkpointing": True, "eager_rounding": False, **TINY}
    return list(run([{"candidate": "eager", **TINY}, broken, compiled]))


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(runs):
    eager = runs[0]
    assert eager["lengths"] == TINY["lengths"] and len(eager["losses"]) == len(eager["step_ms"]) == 3
    assert eager["compilations"] == 0 and eager["captures"] == [] and eager["graph_breaks"] == {}
    assert eager["losses"][0] != eager["losses"][1]


@pytest.mark.slow
def test_the_compiled_run_has_the_same_losses(runs):
    eager, _, compiled = runs
    assert "error" not in compiled, compiled["error"]
    assert eager["eager_rounding"] and not compiled["eager_rounding"]  # given, and said no to
    assert compiled["checkpointing"] and compiled["graph_breaks"] == {} and 0 < compiled["compilations"] <= 8
    for one, other in zip(compiled["losses"], eager["losses"], strict=True):
        assert abs(one - other) <= 2e-6 * other


@pytest.mark.slow
def test_a_failure_is_kept_with_its_reason(runs):
    found = runs[1]
    assert (
        "attention must be one of" in found["error"]
        and "got 'xformers'" in found["error"]
        and "failed" in summary(found)
    )


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_results_that_are_not_finite_are_an_error(number):
    assert sweeps._finite('{"losses": [1.5]}') == {"losses": [1.5]}
    assert sweeps._finite(f'{{"losses": [1.5, {number}]}}') == {"error": f"results must be finite, got {number}"}


def test_finished_runs_are_not_run_again(tmp_path, monkeypatch, capsys):
    made = []

    def fake(group):
        for settings in group:
            made.append(settings)
            failed = {"error": "out of memory"} if settings == {"fails": "once"} and len(made) < 3 else {}
            yield failed or {"step_ms": [9.0, 5.0, 4.0], "peak_gib": None, "compilations": 0, "compile_seconds": 0}

    monkeypatch.setattr(sweeps, "run", fake)
    path = tmp_path / "sub" / "c_sweeps.json"
    good, bad = {"lengths": (3, 2)}, {"fails": "once"}
    first = measure(path, {"good": good, "bad": bad})
    assert first["runs"]["bad"] == {"error": "out of memory", "asked": bad, "together": 1}
    assert json.loads(path.read_text()) == first
    second = measure(path, {"good": good, "bad": bad})
    assert made == [good, bad, bad] and "error" not in second["runs"]["bad"]
    assert "good: 4.5 ms" in capsys.readouterr().out
    measure(path, {"good": {"lengths": (3, 1)}})
    assert made[3:] == [{"lengths": (3, 1)}]  # the name is the same, the settings are not
    for name, other in (("hardware", {**second["hardware"], "name": "another GPU"}), ("sources", "other code")):
        path.write_text(json.dumps({**second, name: other}))
        assert measure(path, {"good": good})["runs"].keys() == {"good"} and made[-1] == good
    assert len(made) == 6


def test_the_settings():
    assert step_ms({"step_ms": [1000.0, 9.0, 1.0, 3.0]}) == (2.0, pytest.approx(1.2), pytest.approx(2.8))
    given = lengths()
    assert len(set(given)) == len(given) == 60 and max(given) == given[0] == 1024
    assert {"eager, without checkpointing", "compiled, with checkpointing", "parity, compiled"} <= RUNS.keys()
