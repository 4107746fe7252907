"""The QLoRA steps that `benchmarks.compiled.sweeps` measured, as Markdown for RESULTS.md."""

import json
from pathlib import Path

import pandas

from benchmarks.compiled.figures import steps_table
from benchmarks.compiled.steps import largest_difference
from benchmarks.compiled.sweeps import sources
from tools.measured_tables import provenance
from unsloth_puzzles.bench.markdown import table

PARITY = "parity, "  # before the names of runs over as many lengths as steps


def sweep_tables(path: Path) -> list[str]:
    """Where and when the steps were measured, a row for each profiled run, and how far the losses differ.

    Args:
        path: What the sweep wrote.
    """
    if not path.exists():
        return [f"Steps in `{path.name}`: not measured yet."]
    swept = json.loads(path.read_text(encoding="utf-8"))
    since = "" if swept["sources"] == sources() else " The code has changed since."
    made = {name: run for name, run in swept["runs"].items() if "error" not in run}
    profiled = {name: run for name, run in made.items() if run.get("profile")}
    parity = {name.removeprefix(PARITY): run for name, run in made.items() if name.startswith(PARITY)}
    parts = [f"Steps in `{path.name}`, each run in a process of its own: {provenance(swept)}{since}"]
    if profiled:
        parts.append(f"**QLoRA steps, 4 x 2048, bfloat16, random weights**\n\n{steps_table(profiled, {})}")
    if (rows := differences(parity)) is not None:
        parts.append(f"**Largest difference of a loss in 60 steps of as many lengths, nats**\n\n{table(rows)}")
    return parts


def differences(runs: dict[str, dict]) -> pandas.DataFrame | None:
    """The largest difference of each 16-bit run's losses from those of uncompiled runs, and from float32.

    Args:
        runs: By name: "eager, ...", the uncompiled ones, "float32", also uncompiled, and compiled ones.

    Returns:
        A row a run; None where there is nothing to compare with.
    """
    eager = {name: run for name, run in runs.items() if name.startswith("eager")}
    if not eager or "float32" not in runs:
        return None
    rows = []
    for name, run in runs.items():
        if name != "float32":
            found = [largest_difference(run, other) for other_name, other in eager.items() if other_name != name]
            from_eager = f"{max(found):.1e}" if found else "-"
            rows.append((name, from_eager, f"{largest_difference(run, runs['float32']):.1e}"))
    return pandas.DataFrame(rows, columns=["run", "from other uncompiled runs", "from float32"])
