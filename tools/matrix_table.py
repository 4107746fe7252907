"""The releases of libraries that the quick tests ran with, and what came of it, as Markdown."""

import json
from pathlib import Path

import pandas

from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.bench.markdown import table

ORDER = ("oldest", "colab", "pinned", "newest")
COLUMNS = ["environment", "releases", "quick tests without a GPU", "kernels that its Triton builds"]


def matrix_table(path: Path) -> str:
    """A row an environment: its releases, its tests, and the builds of the kernels.

    Args:
        path: What `tools.matrix` wrote.
    """
    if not path.exists():
        return "Not measured yet."
    found = json.loads(path.read_text(encoding="utf-8"))
    now = code_digest(package_files())
    return table(pandas.DataFrame([_row(name, found[name], now) for name in ORDER if name in found], columns=COLUMNS))


def _row(name: str, parts: dict[str, dict], digest: str) -> tuple[str, ...]:
    """Cells of an environment; a part that has not run, or not to its end, or with other code says so."""
    versions = next(iter(parts.values()))["versions"]
    cells = [name, ", ".join(f"{package} {version}" for package, version in versions.items())]
    for part, said in (("tests", _tests), ("kernels", _kernels)):
        one = parts.get(part)
        if one is None:
            cells.append("not run")
            continue
        faults = ([] if one["ended"] else ["not to its end"]) + ([] if one["digest"] == digest else ["other code"])
        cells.append(", ".join([said(one), one["date"], *faults]))
    return tuple(cells)


def _tests(one: dict) -> str:
    return f"{one['passed']} passed, {one['failed'] + one['error']} failed, {one['skipped']} skipped"


def _kernels(one: dict) -> str:
    failed = len(one["failed"])
    return f"{one['builds'] - failed} of {one['builds']}"
