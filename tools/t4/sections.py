"""One section of the notebook alone: cells that stand before it, its own, and the scorecard; and what came of a run."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools.build_notebook import build, written_files
from tools.outputs import failures, output_text
from unsloth_puzzles.bench import scorecard
from unsloth_puzzles.bench.challenges import FILES
from unsloth_puzzles.bench.code_digest import code_digest

SECTIONS = {"A": "a_nf4", "E": "e_backprop", "C": "c_compile", "D": "d_issues", "B": "b_fsdp2"}
FIRST_CELL = "import sitecustomize\n\nsitecustomize.watch_cells()"


def notebook_of(section: str) -> NotebookNode:
    """Set-up, the cells of one section and the scorecard. Raises KeyError for no section."""
    node, own = build(), ("00_setup", "z_scorecard", SECTIONS[section])
    cells = [cell for cell in node.cells if cell.id.startswith(own)]
    node.cells = [nbformat.v4.new_code_cell(FIRST_CELL), *cells]
    return node


def digest(node: NotebookNode) -> str:
    """Of a section's code: the files that it writes, and its own cells, in which experiments change as well."""
    cells = [cell.source for cell in node.cells if cell.cell_type == "code" and not cell.source.startswith("%%")]
    return code_digest(written_files(node) | {f"cell {n}": source + "\n" for n, source in enumerate(cells)})


@dataclass
class Heard:
    """The notes of a client: seconds by cell id, the longest time in which a cell said nothing, and where."""

    cell_seconds: dict[str, float] = field(default_factory=dict)
    silence: float = 0.0
    silent_cell: str = ""
    silent_after: str = ""  # what it had said last
    last: float = 0.0  # when a cell began or said something
    said: str = ""
    cell: str = ""  # the one that runs

    def begin(self, cell: NotebookNode) -> None:
        """A cell has just begun."""
        self.last, self.said, self.cell = time.monotonic(), "", _first_words(cell)

    def hear(self, said: str = "") -> None:
        """The cell has just said something, or ended."""
        now = time.monotonic()
        if now - self.last > self.silence:
            self.silence, self.silent_cell, self.silent_after = now - self.last, self.cell, self.said
        self.last, self.said = now, said.strip()[-80:] or self.said


class Client(NotebookClient):
    """Executes cells, and notes in `heard` how long each took and was silent."""

    def __init__(self, node: NotebookNode, *, heard: Heard, **options):
        super().__init__(node, **options)
        self.heard = heard

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        began = time.monotonic()
        self.heard.begin(cell)
        try:
            return await super().async_execute_cell(cell, cell_index, *args, **kwargs)
        finally:
            self.heard.hear()
            self.heard.cell_seconds[cell.id] = time.monotonic() - began

    def process_message(self, msg, cell, cell_index):
        self.heard.hear(str(msg["content"].get("text", "")))
        return super().process_message(msg, cell, cell_index)


def outcome(section: str, node: NotebookNode, folder: Path, seconds: Mapping[str, float]) -> dict[str, object]:
    """Return the outcome of a run of `notebook_of(section)` in `folder`: errors, failures, skips, points, seconds."""
    own = SECTIONS[section]
    text = "\n".join(output_text(cell) for cell in node.cells if cell.cell_type == "code")
    rows = [row for row in scorecard.score(folder / "resources/measurements") if row.challenge == section]
    lost = {row.criterion: f"{row.verdict}: {row.measured}" for row in rows if row.points < row.possible}
    return {
        "wall_seconds": sum(took for cell, took in seconds.items() if cell.startswith(own)),
        "setup_seconds": sum(took for cell, took in seconds.items() if cell.startswith("00_setup")),
        "cells_in_error": failures(node),
        "failed": re.findall(r"^.*FAILED:.*$", text, flags=re.MULTILINE),
        "skipped": re.findall(r"^.*SKIPPED:.*$", text, flags=re.MULTILINE),
        "points": sum(row.points for row in rows),
        "possible": sum(row.possible for row in rows),
        "lost": lost,
        "figures": _figures(folder / "resources/measurements" / FILES[section]),
        "criteria": {row.criterion: f"{row.points} of {row.possible}: {row.measured}" for row in rows},
        "slowest_cells": {
            f"{_first_line(node, cell)} [{cell[-10:]}]": round(took, 1)
            for cell, took in sorted(seconds.items(), key=lambda item: -item[1])[:12]
        },
    }


def measured_rates(folder: Path) -> tuple[float, dict[str, float]] | None:
    """The copy bandwidth and matrix rates that a run's probe measured, from any of its files; None without a GPU."""
    for path in sorted((folder / "resources/measurements").glob("*.json")):
        hardware = json.loads(path.read_text(encoding="utf-8"))["hardware"]
        if hardware.get("copy_bandwidth"):
            return hardware["copy_bandwidth"], hardware["matmul_flops"]
    return None


def measured_with(folder: Path) -> tuple[str, dict[str, str | None]]:
    """Name of the hardware and versions that a run measured with, from any of its files; empty where it has none."""
    for path in sorted((folder / "resources/measurements").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["hardware"]["name"], content["versions"]
    return "", {}


def _figures(path: Path) -> dict[str, float]:
    """Return the figures of a run's curves, by metric and case."""
    records = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    kept = [one for one in records if one["metric"].startswith(("loss_curve", "planted_fault", "loss_difference"))]
    return {f"{one['metric']}, {one['case']}": one["value"] for one in kept}


def _first_line(node: NotebookNode, cell_id: str) -> str:
    return next((_first_words(cell) for cell in node.cells if cell.id == cell_id), cell_id)


def _first_words(cell: NotebookNode) -> str:
    return next((line for line in cell.source.splitlines() if line.strip()), "")[:60]
