"""Which files of a folder some code needs: what it imports or starts as a module, and what that imports in turn."""

import ast
import re
from pathlib import Path


def closure(code: str, root: Path, folder: str) -> set[Path]:
    """The files under `root/folder` that `code` needs.

    Args:
        code: Source of a program, or the cells of a notebook one after the other.
        root: The directory from which modules are imported.
        folder: A top-level package.

    Returns:
        The modules of `folder` that `code` names in an import or in a string ("folder.module" or "folder.module:name",
        which a subprocess is given), those that these name, and the `__init__.py` of their packages.
    """
    found: set[Path] = set()
    waiting = _named(code, root, folder)
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting |= _named(path.read_text(encoding="utf-8"), root, folder)
    parents = {parent for path in found for parent in path.parents if parent.is_relative_to(root / folder)}
    return found | {parent / "__init__.py" for parent in parents if (parent / "__init__.py").exists()}


def _named(code: str, root: Path, folder: str) -> set[Path]:
    names = set()
    for node in ast.walk(ast.parse(_without_magics(code))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w.]+(:\w*)?", node.value)
        ):
            names.add(node.value.partition(":")[0])
    paths = {root.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] == folder}
    return {path for path in paths if path.is_file()}


def _without_magics(code: str) -> str:
    return "\n".join("" if line.startswith(("%", "!")) else line for line in code.splitlines())
