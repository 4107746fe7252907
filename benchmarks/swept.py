"""What `make sweeps` measured, as a table for the notebook, with the hardware and the date of the sweep."""

from pathlib import Path

import pandas

from unsloth_puzzles.bench import markdown
from unsloth_puzzles.bench.record import Measurements


def swept_table(path: str | Path, metric: str, title: str, ours: str, digits: int) -> str:
    """Markdown: a row a case, with our value, its range where the sweep has one, and those of the baselines.

    Args:
        path: The file of the sweep.
        metric: Whose records are shown.
        title: What was measured and its unit, before hardware and date.
        ours: The title of the column with our values.
        digits: Decimal places.

    Returns:
        The title and the table, or a line that says that the file is missing.
    """
    path = Path(path)
    if not path.exists():
        return f"SKIPPED: {path.name} is not here; make sweeps writes it"
    sweeps = Measurements.load(path)
    found = sweeps.find(metric)
    rows = [
        {"case": one["case"], ours: _with_range(one, digits)}
        | {name: f"{value:.{digits}f}" for name, value in one["baselines"].items()}
        for one in found
    ]
    table = markdown.table(pandas.DataFrame(rows).fillna("-"))
    return f"{title}, {sweeps.hardware['name']}, {sweeps.date}:\n\n{table}"


def _with_range(record: dict, digits: int) -> str:
    shown = f"{record['value']:.{digits}f}"
    if record["low"] is None:
        return shown
    return f"{shown} ({record['low']:.{digits}f} to {record['high']:.{digits}f})"
