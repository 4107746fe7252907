"""Releases: a stamp that is complete and agrees with the notebook, of a run whose code the slow tests passed."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT, build
from tools.release import (
    MEASUREMENTS,
    SCORECARD,
    STAMP,
    describe,
    inconsistencies,
    passed_tests,
    publish,
    said_of_tests,
    show_scorecard,
    stamp,
)
from unsloth_puzzles.bench import experiments
from unsloth_puzzles.bench.code_digest import code_digest
from unsloth_puzzles.bench.hardware import Hardware
from unsloth_puzzles.bench.record import Measurements

GPU = Hardware("NVIDIA Test", "cuda", 90, 1, 8.0, 2, 1, True, False)


def executed(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, execution_count=n) for n, source in enumerate(sources, 1)]
    return nbformat.v4.new_notebook(cells=cells)


def test_committed_notebook_is_a_complete_release() -> None:
    assert inconsistencies(nbformat.read(ROOT / NOTEBOOK, as_version=4)) == []


def test_inconsistencies_name_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(experiments, "failures", [])
    experiments.judge(Measurements(tmp_path / "x.json", GPU), "a case", {"a check": False})
    failed_check = capsys.readouterr().out
    node = executed("%%writefile unsloth_puzzles/a.py\nx = 1", "print(1)")
    assert "metadata must hold 'release'" in inconsistencies(node)[0]
    stamp(node, "c0ffee", "2026-11-28", "NVIDIA Test", "not run")
    assert inconsistencies(node) == [] and node.metadata[STAMP]["hardware"] == "NVIDIA Test"
    node.cells[0].source += "  # the number"
    assert inconsistencies(node) == []
    node.cells[0].source = "%%writefile unsloth_puzzles/a.py\nx = 2"
    assert inconsistencies(node) == ["the files that it writes are not those of its stamp"]
    node.cells[0].source = "%%writefile unsloth_puzzles/a.py\nx = 1"
    node.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="FAILED: C: out of memory\n")]
    assert any("an experiment failed" in line for line in inconsistencies(node))
    node.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=failed_check)]
    assert any("an experiment failed" in line for line in inconsistencies(node))
    node.cells[1].execution_count = None
    assert any("was not executed" in line for line in inconsistencies(node))


DIGEST = code_digest({})  # of a notebook that writes no file
TESTS = {"passed": 7, "skipped": 2, "date": "2026-11-27", "hardware": "CPU"}


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A run of a notebook of one cell with what it measured, and a checkout with the record of its tests."""
    run, root = tmp_path / "run", tmp_path / "root"
    for place in (run, root):
        (place / MEASUREMENTS).mkdir(parents=True)
    results = Measurements(run / MEASUREMENTS / "a_nf4.json", GPU)
    results.date, results.digest = "2026-11-28", DIGEST
    results.add("kernel_launches", "one call", 1, "kernels")
    results.save()
    nbformat.write(executed("print(1)"), run / NOTEBOOK)
    keep_tests(root)
    return run, root


def keep_tests(root: Path, **changed: object) -> None:
    kept = {**TESTS, "hardware": {"name": "CPU"}, "failed": 0, "digest": DIGEST, **changed}
    (root / MEASUREMENTS / "tests.json").write_text(json.dumps(kept))


def test_publish_replaces_notebook_resources_and_measurements(places: tuple[Path, Path]) -> None:
    run, root = places
    (run / "resources/figure.png").write_bytes(b"png")
    (root / MEASUREMENTS / "c_compile.json").write_text("of another run")
    (root / MEASUREMENTS / "e_backprop_sweeps.json").write_text("sweeps")
    (root / "resources/no_longer_drawn.png").write_bytes(b"old")
    assert publish(run, root) == []
    assert [path.name for path in (root / "resources").rglob("*.png")] == ["figure.png"]
    kept = sorted(path.name for path in (root / MEASUREMENTS).iterdir())
    assert kept == ["a_nf4.json", "e_backprop_sweeps.json", "tests.json"]
    written = nbformat.read(root / NOTEBOOK, as_version=4)
    assert written.metadata[STAMP]["date"] == "2026-11-28" and inconsistencies(written) == []
    assert written.metadata[STAMP]["tests"] == TESTS
    assert (root / "resources/figure.png").read_bytes() == b"png"


def test_publish_shows_the_scorecard_of_the_run(places: tuple[Path, Path]) -> None:
    run, root = places
    node = executed("print(1)")
    node.cells.insert(0, nbformat.v4.new_markdown_cell(f"# Title\n\n{SCORECARD}\n\nMore."))
    nbformat.write(node, run / NOTEBOOK)
    assert publish(run, root) == []
    shown = nbformat.read(root / NOTEBOOK, as_version=4).cells[0].source
    assert "**Scorecard of the published run**, executed on 2026-11-28 on NVIDIA Test." in shown
    assert "| A. NF4 to Triton | -2 | 14 | NVIDIA Test |" in shown  # 3 - 3 - 1 - 1
    assert "| C. torch.compile without graph breaks | not measured | 9 | - |" in shown
    assert "- A, custom inline asm works: not measured here" in shown
    assert "a single Triton kernel:" not in shown and SCORECARD not in shown
    assert shown.startswith("# Title") and shown.endswith("More.")


def test_scorecard_stands_in_the_built_notebook_once_and_needs_no_release(tmp_path: Path) -> None:
    built = build()
    assert sum(cell.source.count(SCORECARD) for cell in built.cells if cell.cell_type == "markdown") == 1
    stamp(built, "c0ffee", "2026-11-28", "NVIDIA Test", "not run")
    show_scorecard(built, tmp_path)
    assert "| **all** | **0** | **51** |  |" in built.cells[0].source


def test_publish_refuses_a_notebook_with_an_error_and_writes_nothing(places: tuple[Path, Path]) -> None:
    run, root = places
    node = executed("print(1)")
    node.cells[0].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[])]
    nbformat.write(node, run / NOTEBOOK)
    (root / NOTEBOOK).write_text("as it was")
    assert any("ends in an error" in line for line in publish(run, root))
    assert (root / NOTEBOOK).read_text() == "as it was"


@pytest.mark.parametrize("changed", [{"digest": "of other code"}, {"failed": 1}, None])
def test_publish_needs_a_pass_of_the_slow_tests_with_the_same_code(
    places: tuple[Path, Path], changed: dict | None
) -> None:
    run, root = places
    if changed is None:
        (root / MEASUREMENTS / "tests.json").unlink()
    else:
        keep_tests(root, **changed)
    assert passed_tests(DIGEST, root) is None
    assert publish(run, root) == [
        "`make test-slow` must pass with the notebook's code first, or it is published with --untested"
    ]
    assert not (root / NOTEBOOK).exists()
    assert publish(run, root, untested=True) == []
    written = nbformat.read(root / NOTEBOOK, as_version=4)
    assert written.metadata[STAMP]["tests"] == "not run" and inconsistencies(written) == []


def test_publish_refuses_measurements_of_other_code(places: tuple[Path, Path]) -> None:
    run, root = places
    path = run / MEASUREMENTS / "a_nf4.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": "of other code"}))
    assert publish(run, root) == ["a_nf4.json was measured with other code"]
    path.unlink()
    assert publish(run, root) == [f"nothing was measured in {run}"]


def test_publish_refuses_a_run_that_showed_other_sweeps(places: tuple[Path, Path]) -> None:
    run, root = places
    (run / MEASUREMENTS / "d_vision_sweeps.json").write_text("shown")
    for kept in ("newer", None):
        if kept:
            (root / MEASUREMENTS / "d_vision_sweeps.json").write_text(kept)
        else:
            (root / MEASUREMENTS / "d_vision_sweeps.json").unlink()
        assert publish(run, root) == ["d_vision_sweeps.json of the run is not the committed one"]
    (root / MEASUREMENTS / "d_vision_sweeps.json").write_text("shown")
    assert publish(run, root) == []


def test_stamp_says_whether_the_tests_passed() -> None:
    assert "passed with its code: 7 tests, 2 skipped (2026-11-27, CPU)" in said_of_tests(TESTS)
    assert "was not run with its code" in said_of_tests("not run")
    assert "was not recorded" in said_of_tests(None)


def test_describe_says_what_the_release_is_of_and_what_has_changed() -> None:
    of = nbformat.read(ROOT / NOTEBOOK, as_version=4).metadata[STAMP]
    said = describe()
    assert of["date"] in said and of["hardware"] in said and of["commit"][:10] in said
    assert re.search(r"HEAD is .* commits later\. The package's code is (the same|another)\.", said)
    assert re.search(r"`make test-slow` has (not )?passed with the package's code as it is\.", said)
