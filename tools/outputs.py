"""What an executed notebook shows: its outputs as text, its report, and why it must not be published."""

import re
import sys
from pathlib import Path

from nbformat import NotebookNode

from tools.build_notebook import ROOT, text

_SECTION = r"^\| (Set-up|([A-E])\. .+?) \| ([\d.]+) s \|"  # a line of `bench.section.summary`
LARGEST = 3_000_000  # bytes, of which the package's and the benchmarks' files are 1.7 million
_MACHINE_PATHS = tuple(
    dict.fromkeys(["/root/", "/home/", "/tmp/", "/opt/", f"{sys.prefix}/", f"{ROOT}/", f"{Path.home()}/"])
)


def problems(node: NotebookNode) -> list[str]:
    """Why an executed notebook must not be published, a line each: `failures`, machine paths, size."""
    found = failures(node)
    for where, cell in _code(node):
        if path := next((path for path in _MACHINE_PATHS if path in output_text(cell)), None):
            found.append(f"{where} prints a path of this machine ({path})")
    if (size := len(text(node).encode())) > LARGEST:
        found.append(f"the file must have at most {LARGEST:,} bytes, got {size:,}")
    return found


def failures(node: NotebookNode) -> list[str]:
    """Cells that were not executed or ended in an error, a line each."""
    found = []
    for where, cell in _code(node):
        if cell.execution_count is None:
            found.append(f"{where} was not executed")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"{where} ends in an error")
    return found


def report(node: NotebookNode) -> str:
    """Return what the cells tagged `report` printed: the sections' times and the scorecard."""
    return "\n".join(output_text(cell) for cell in node.cells if "report" in cell.metadata.get("tags", []))


def run_seconds(released: NotebookNode) -> tuple[float | None, str]:
    """The seconds of all sections of an executed notebook, by its own account, and the letters of the challenges."""
    lines = re.findall(_SECTION, report(released), flags=re.MULTILINE)
    return sum(float(seconds) for *_, seconds in lines) or None, ", ".join(letter for _, letter, _ in lines if letter)


def lines_with(word: str, node: NotebookNode) -> list[str]:
    """The lines of the outputs that hold `word`, each with its cell."""
    cells = [(where, output_text(cell)) for where, cell in _code(node)]
    return [f"{where}: {line.strip()}" for where, shown in cells for line in shown.splitlines() if word in line]


def output_text(cell: NotebookNode) -> str:
    """All that a code cell printed or displayed as text; Markdown rather than the plain form where both exist."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
        parts += output.get("traceback", [])
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts if part)


def _code(node: NotebookNode) -> list[tuple[str, NotebookNode]]:
    cells = enumerate(node.cells)
    return [(f"cell {number} ({cell.id})", cell) for number, cell in cells if cell.cell_type == "code"]
