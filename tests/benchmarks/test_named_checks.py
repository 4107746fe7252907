"""Names of passed checks are printed, long lists in groups."""

import pytest

from benchmarks.named_checks import MOST, grouped, judge
from unsloth_puzzles.bench import experiments
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements


def test_passed_and_failed_names_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments, "failures", [])
    results = Measurements(tmp_path / "found.json", probe(measure=False))
    judge(results, "bytes", {"equal": True, "in order": True, "few": False})
    said = capsys.readouterr().out.splitlines()
    assert said == ["bytes: 2 of 3 checks passed", "  FAILED: few", "  passed: equal; in order"]
    assert results.find("checks_passed", "bytes")[0]["value"] == pytest.approx(2 / 3)
    judge(results, "none", {"few": False})
    assert "passed:" not in capsys.readouterr().out


def test_a_long_list_is_grouped_by_the_side_that_says_more():
    names = [f"{kind}, length {length}" for kind in ("causal", "window", "packed") for length in range(5)]
    assert grouped(names[:MOST]) == names[:MOST]
    assert grouped(names) == [f"length {length} (3)" for length in range(5)]
    many = [f"length {length}, {kind}" for length in range(20) for kind in ("window 3, packed", "plain")]
    assert grouped([*many, "no graph"]) == ["window 3, packed (20)", "plain (20)", "no graph"]
    features = [f"{n}: {what}" for n in range(15) for what in ("losses, norms", "bytes")]
    assert grouped(features) == ["losses, norms (15)", "bytes (15)"]
