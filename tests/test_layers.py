"""Who may import whom: solutions share only leaves, and nothing imports `benchmarks`."""

import ast
import re
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


@pytest.mark.parametrize("folder, more", [("bench", set()), ("nf4", {"exchange"})])
def test_imports_no_other_part_of_the_package(folder, more):
    assert imported(folder) == {folder, "device", *more}


@pytest.mark.parametrize("folder, more", [("backprop", {"kv_cache"}), ("attention", set())])
def test_compiled_folders_import_code_object(folder, more):
    assert imported(folder) == {folder, "device", "code_object", *more}


@pytest.mark.parametrize(
    "leaf", ["code_object.py", "device.py", "exchange.py", "kv_cache.py", "stored_dtype.py", "supported.py"]
)
def test_a_leaf_stands_alone(leaf):
    assert imported(leaf) == set()


def test_no_module_but_device_asks_pytorch_for_the_capability():
    asking = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "get_device_capability" in path.read_text()
    }
    assert asking == {"device.py"}


def test_compiled_stands_on_the_solutions_that_it_compiles():
    solutions, leaves = {"nf4", "backprop", "attention"}, {"device", "code_object", "exchange", "kv_cache"}
    assert imported("compiled") == {"compiled", *solutions, *leaves}


def test_fsdp2_stands_on_nf4_and_compiled():
    assert imported("fsdp2") == {"nf4", "compiled", "fsdp2", "device", "bench", "exchange", "stored_dtype", "supported"}


@pytest.mark.parametrize(
    "folder, needed",
    [
        ("vision", {"exchange", "kv_cache"}),
        ("gguf", {"nf4"}),
        ("classification", {"device", "exchange", "kv_cache", "stored_dtype"}),
        ("tool_calling", set()),
    ],
)
def test_a_part_of_challenge_d_stands_on_little(folder, needed):
    assert imported(folder) == {folder, *needed}


def test_the_package_imports_no_benchmark():
    importing = [
        path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*(from|import) benchmarks", path.read_text(), re.M)
    ]
    assert importing == []
