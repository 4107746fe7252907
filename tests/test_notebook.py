"""The notebook: the committed one is what the sources make, and it runs top to bottom alone in an empty folder."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest

from tools.address import NOTEBOOK, REPOSITORY
from tools.build_notebook import ROOT, build, differences, text, written_files
from tools.run_notebook import problems, report, run

PACKAGE = ROOT / "unsloth_puzzles"


@pytest.fixture(scope="module")
def built() -> nbformat.NotebookNode:
    return build()


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    """The whole notebook, executed for the hardware found: on a CPU with the sections' quick sizes.

    Challenge E's sweeps it finds, as in a checkout; C's it makes itself, as on Colab.
    """
    measured = tmp_path_factory.mktemp("measured")
    shutil.copy(ROOT / "resources" / "measurements" / "e_backprop_sweeps.json", measured)
    source = tmp_path_factory.mktemp("built") / NOTEBOOK
    source.write_text(text(build()), encoding="utf-8")
    folder = tmp_path_factory.mktemp("alone")
    return run(source, folder, measured=measured), folder


def test_the_committed_notebook_is_what_the_sources_make(built: nbformat.NotebookNode) -> None:
    committed = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    assert differences(built, committed) == []


def test_the_outputs_of_the_committed_notebook_are_fit_to_be_shown() -> None:
    committed = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    if all(cell.execution_count is None for cell in committed.cells if cell.cell_type == "code"):
        pytest.skip("the committed notebook has no outputs: its code changed since the last `make publish`")
    assert problems(committed) == []


def test_every_file_of_the_package_is_written_once_by_a_cell(built: nbformat.NotebookNode) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert set(written_files(built)) == files


def test_links_lead_to_anchors(built: nbformat.NotebookNode) -> None:
    prose = "\n".join(cell.source for cell in built.cells if cell.cell_type == "markdown")
    links = set(re.findall(r"\]\(#([^)]+)\)", prose))
    assert links and links <= set(re.findall(r'<a id="([^"]+)"', prose))


def test_the_repository_has_one_address() -> None:
    stated = re.findall(r"https://github\.com/RohitNagraj/[\w-]+", (ROOT / "pyproject.toml").read_text())
    assert stated == [REPOSITORY]


def test_the_install_cell_pins_what_the_requirements_pin(built: nbformat.NotebookNode) -> None:
    (cell,) = (cell.source for cell in built.cells if "PINNED = {" in cell.source)
    pinned = dict(re.findall(r'^    "([\w-]+)": "([\d.]+)",$', cell, flags=re.MULTILINE))
    required = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    assert pinned and not {"torch", "triton"} & set(pinned)
    assert pinned == {package: required[package] for package in pinned}


def test_it_runs_alone_and_is_fit_to_be_shown(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    assert problems(executed[0]) == []


def test_what_it_wrote_is_the_package(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    written = {path.relative_to(executed[1]) for path in (executed[1] / "unsloth_puzzles").rglob("*.py")}
    assert written == {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    for name in written:
        assert (executed[1] / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_it_reports_every_challenge(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    shown = report(executed[0])
    for challenge in "ABCDE":
        assert re.search(rf"\|\s*{challenge}\b", shown), f"challenge {challenge} is not in the scorecard"
    assert "not measured" in shown
