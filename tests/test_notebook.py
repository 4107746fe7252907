"""The notebook that the sources make: it runs top to bottom alone in an empty folder, whatever fails in it."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tools.address import NOTEBOOK, REPOSITORY
from tools.build_notebook import ROOT, SECTIONS, build, package_of, text, written_files
from tools.outputs import lines_with, problems, report
from tools.run_notebook import run

PACKAGE = ROOT / "unsloth_puzzles"


@pytest.fixture(scope="module")
def built() -> nbformat.NotebookNode:
    return build()


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    """The whole notebook, executed for the hardware found: on a CPU with the sections' quick sizes.

    Challenge E's sweeps it finds, as in a checkout.
    """
    measured = tmp_path_factory.mktemp("measured")
    shutil.copy(ROOT / "resources" / "measurements" / "e_backprop_sweeps.json", measured)
    source = tmp_path_factory.mktemp("built") / NOTEBOOK
    source.write_text(text(build()), encoding="utf-8")
    folder = tmp_path_factory.mktemp("alone")
    return run(source, folder, measured=measured), folder


def test_every_file_of_the_package_is_written(built: nbformat.NotebookNode) -> None:
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert set(package_of(built)) == files


def test_benchmarks_that_are_written_are_those_that_the_cells_need(
    built: nbformat.NotebookNode, tmp_path: Path
) -> None:
    """In a folder with these files alone, all imports of the cells and of what they start succeed and use each file."""
    files = written_files(built)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    cells = [cell.source for cell in built.cells if cell.cell_type == "code" and not cell.source.startswith("%%")]
    imports = [ast.unparse(node) for source in cells for node in ast.walk(ast.parse(source)) if _imports_ours(node)]
    benchmarks = {name: content for name, content in files.items() if name.startswith("benchmarks/")}
    started = sorted(set(re.findall(r"""["'](benchmarks(?:\.\w+)+)[:"']""", "\n".join([*cells, *benchmarks.values()]))))
    lines = ["import importlib, sys", *imports, *(f"importlib.import_module({name!r})" for name in started)]
    lines += ["loaded = [getattr(m, '__file__', None) for n, m in sys.modules.items() if n.startswith('benchmarks')]"]
    lines += ["print(*filter(None, loaded), sep='\\n')"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = {Path(line).relative_to(tmp_path).as_posix() for line in done.stdout.splitlines() if line.endswith(".py")}
    assert used == set(benchmarks)


def _imports_ours(node: ast.AST) -> bool:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    return any(name.split(".")[0] in ("benchmarks", "unsloth_puzzles") for name in names)


@pytest.mark.parametrize("section", [name for name in SECTIONS if (ROOT / "notebook" / f"{name}.py").exists()])
def test_a_section_uses_no_name_of_another_section(section: str) -> None:
    sources = [(ROOT / "notebook" / f"{name}.py").read_text() for name in dict.fromkeys(("00_setup", section))]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821", "-"]
    done = subprocess.run(command, input="\n".join(sources), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


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


@pytest.mark.slow
def test_it_runs_alone_and_is_fit_to_be_shown(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    assert problems(executed[0]) == []


@pytest.mark.slow
def test_no_experiment_and_no_check_fails(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    assert lines_with("FAILED", executed[0]) == []


@pytest.mark.slow
def test_written_files_are_the_package(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    written = {path.relative_to(executed[1]) for path in (executed[1] / "unsloth_puzzles").rglob("*.py")}
    assert written == {path.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    for name in written:
        assert (executed[1] / name).read_bytes() == (ROOT / name).read_bytes(), name


@pytest.mark.slow
def test_it_reports_every_challenge(executed: tuple[nbformat.NotebookNode, Path]) -> None:
    shown = report(executed[0])
    for challenge in "ABCDE":
        assert re.search(rf"\|\s*{challenge}\b", shown), f"challenge {challenge} is not in the scorecard"
    assert "not measured" in shown
