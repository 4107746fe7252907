"""The stamp of the committed notebook: complete, consistent with itself, and the same on every Python."""

import json
from pathlib import Path

import nbformat

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT
from tools.release import STAMP, describe, inconsistencies, publish, stamp


def executed(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, execution_count=n) for n, source in enumerate(sources, 1)]
    return nbformat.v4.new_notebook(cells=cells)


def test_the_committed_notebook_is_a_complete_release() -> None:
    assert inconsistencies(nbformat.read(ROOT / NOTEBOOK, as_version=4)) == []


def test_what_is_wrong_with_a_release_is_named() -> None:
    node = executed("%%writefile unsloth_puzzles/a.py\nx = 1", "print(1)")
    assert "metadata must hold 'release'" in inconsistencies(node)[0]
    stamp(node, commit="c0ffee", date="2026-11-28", hardware="NVIDIA Test")
    assert inconsistencies(node) == [] and node.metadata[STAMP]["hardware"] == "NVIDIA Test"
    node.cells[0].source += "  # the number"
    assert inconsistencies(node) == []
    node.cells[0].source = "%%writefile unsloth_puzzles/a.py\nx = 2"
    assert inconsistencies(node) == ["the files that it writes are not those of its stamp"]
    node.cells[0].source = "%%writefile unsloth_puzzles/a.py\nx = 1"
    node.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text="FAILED: C: out of memory\n")]
    assert any("an experiment failed" in line for line in inconsistencies(node))
    node.cells[1].execution_count = None
    assert any("was not executed" in line for line in inconsistencies(node))


def test_a_run_is_published_with_its_resources_or_not_at_all(tmp_path: Path) -> None:
    run, root = tmp_path / "run", tmp_path / "root"
    (run / "resources/measurements").mkdir(parents=True)
    root.mkdir()
    measured = {"date": "2026-11-28", "hardware": {"name": "NVIDIA Test"}}
    (run / "resources/measurements/a_nf4.json").write_text(json.dumps(measured))
    (run / "resources/figure.png").write_bytes(b"png")
    node = executed("print(1)")
    nbformat.write(node, run / NOTEBOOK)
    (root / "resources/measurements").mkdir(parents=True)
    (root / "resources/measurements/c_compile.json").write_text("of another run")
    (root / "resources/measurements/e_backprop_sweeps.json").write_text("sweeps")
    assert publish(run, root) == []
    kept = sorted(path.name for path in (root / "resources/measurements").iterdir())
    assert kept == ["a_nf4.json", "e_backprop_sweeps.json"]
    written = nbformat.read(root / NOTEBOOK, as_version=4)
    assert written.metadata[STAMP]["date"] == "2026-11-28" and inconsistencies(written) == []
    assert (root / "resources/figure.png").read_bytes() == b"png"
    node.cells[0].outputs = [nbformat.v4.new_output("error", ename="KeyError", evalue="x", traceback=[])]
    nbformat.write(node, run / NOTEBOOK)
    (root / NOTEBOOK).write_text("as it was")
    assert any("ends in an error" in line for line in publish(run, root))
    assert (root / NOTEBOOK).read_text() == "as it was"


def test_the_release_says_what_it_is_of() -> None:
    of = nbformat.read(ROOT / NOTEBOOK, as_version=4).metadata[STAMP]
    said = describe()
    assert of["date"] in said and of["hardware"] in said and of["commit"][:10] in said
