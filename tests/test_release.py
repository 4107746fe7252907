"""The stamp of the committed notebook: complete, consistent with itself, and the same on every Python."""

import json
from pathlib import Path

import nbformat
import pytest

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT
from tools.release import STAMP, code_digest, describe, inconsistencies, publish, stamp

SOURCE = '''"""What it is."""
import os  # a comment

def shown(value: float) -> str:
    return f"{value:.{2 + 1}f} {{braces}} {'nested ' + f'{value}'}"


TEXT = """two
lines"""
'''
# Pinned: another value on another Python, or after a change of the digest, would make every stamp disagree.
DIGEST = "a239af2fd4e72a01d7c472c6d9fae11f401502d40b7f474feb6df4975256a463"


def executed(*sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source, execution_count=n) for n, source in enumerate(sources, 1)]
    return nbformat.v4.new_notebook(cells=cells)


def test_the_committed_notebook_is_a_complete_release() -> None:
    assert inconsistencies(nbformat.read(ROOT / NOTEBOOK, as_version=4)) == []


def test_the_digest_is_the_same_on_every_python() -> None:
    assert code_digest({"a.py": SOURCE}) == DIGEST


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("  # a comment", ""),
        SOURCE.replace("import os", "import os\n# another"),
        SOURCE.replace("\n\n\nTEXT", "\n\nTEXT"),
        SOURCE.replace("(value: float)", "(\n    value: float\n)"),
        SOURCE.replace("    return", "        return"),
    ],
)
def test_comments_and_layout_do_not_count(other: str) -> None:
    assert other != SOURCE and code_digest({"a.py": other}) == DIGEST


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("2 + 1", "2 + 2"),
        SOURCE.replace("{{braces}}", "{{brace}}"),
        SOURCE.replace("nested ", "nested  "),
        SOURCE.replace("two\n", "two\n\n"),
        SOURCE.replace("What it is", "What it was"),
        SOURCE.replace("float", "int"),
    ],
)
def test_code_and_texts_count(other: str) -> None:
    assert other != SOURCE and code_digest({"a.py": other}) != DIGEST


def test_names_of_files_count() -> None:
    assert code_digest({"b.py": SOURCE}) != DIGEST
    assert code_digest({"a.py": "x\n", "b.py": "y\n"}) != code_digest({"a.py": "y\n", "b.py": "x\n"})


def test_blocks_count() -> None:
    one, other = "if a:\n    b()\nc()\n", "if a:\n    b()\n    c()\n"
    assert code_digest({"a.py": one}) != code_digest({"a.py": other})


def test_what_is_wrong_with_a_release_is_named() -> None:
    node = executed("%%writefile pack/a.py\nx = 1", "print(1)")
    assert "metadata must hold 'release'" in inconsistencies(node)[0]
    stamp(node, commit="c0ffee", date="2026-11-28", hardware="NVIDIA Test")
    assert inconsistencies(node) == [] and node.metadata[STAMP]["hardware"] == "NVIDIA Test"
    node.cells[0].source += "  # the number"
    assert inconsistencies(node) == []
    node.cells[0].source = "%%writefile pack/a.py\nx = 2"
    assert inconsistencies(node) == ["the files that it writes are not those of its stamp"]
    node.cells[0].source = "%%writefile pack/a.py\nx = 1"
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
