"""Who may import whom: a solution stands on its own but for `own_code`, and `bench` on no solution."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unsloth_puzzles"


def imported(folder: str) -> set[str]:
    """What the modules of a folder of the package, or a module, import of it, at module level or inside a function."""
    found, place = set(), PACKAGE / folder
    for path in place.rglob("*.py") if place.is_dir() else [place]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), f"{PACKAGE.name}.{folder}")
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith(f"{PACKAGE.name}.")}


@pytest.mark.parametrize("folder", ["bench", "nf4"])
def test_imports_nothing_else_of_the_package(folder):
    assert imported(folder) == {folder}


@pytest.mark.parametrize("folder", ["backprop", "attention"])
def test_what_is_compiled_has_its_own_code(folder):
    assert imported(folder) == {folder, "own_code"}


def test_own_code_stands_alone():
    assert imported("own_code.py") == set()


def test_compiled_stands_on_the_solutions_that_it_compiles():
    assert imported("compiled") == {"nf4", "backprop", "attention", "compiled", "own_code"}


def test_comparisons_stand_on_all_of_them():
    assert imported("comparisons") == {"bench", "nf4", "backprop", "compiled", "comparisons"}
