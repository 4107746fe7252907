"""Who may import whom: a solution stands on its own, and `bench` on no solution."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "unsloth_puzzles"


def imported(folder: str) -> set[str]:
    """What the modules of a folder of the package import of the package, at module level or inside a function."""
    found = set()
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), f"{PACKAGE.name}.{folder}")
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith(f"{PACKAGE.name}.")}


@pytest.mark.parametrize("folder", ["bench", "nf4", "backprop", "attention"])
def test_imports_nothing_else_of_the_package(folder):
    assert imported(folder) == {folder}


def test_compiled_stands_on_the_solutions_that_it_compiles():
    assert imported("compiled") == {"nf4", "backprop", "attention", "compiled"}


def test_comparisons_stand_on_all_of_them():
    assert imported("comparisons") == {"bench", "nf4", "backprop", "compiled", "comparisons"}
