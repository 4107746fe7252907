"""Measurement files as Markdown: the points, a table a metric, the tests on a GPU, where the figures come from."""

import json
import re
from pathlib import Path

import pandas

from tools.readme_contents import CHECKS, PERCENT, SHORT, TURNED, WORST
from unsloth_puzzles.bench.challenges import TITLES
from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.bench.markdown import table
from unsloth_puzzles.bench.scorecard import Row, totals

RATIOS = ("x", "times", "ratio", "fraction")  # units that are written with each number
NAMELESS = ("relative", "absolute", "loss")  # the caption says it in other words
SCALED = {"bytes/s": (1e9, "GB/s")}  # recorded unit -> by how much it is divided, and the unit shown
LONG = 20  # rows; a longer table is folded


def points_table(rows: list[Row]) -> str:
    """Points per challenge with the hardware that earned them, from the scorecard's rows."""
    lines = []
    for challenge, (points, possible) in totals(rows).items():
        hardware = dict.fromkeys(row.hardware for row in rows if row.challenge == challenge and row.hardware)
        if challenge in TITLES:
            shown = points if hardware else "not measured"
            lines.append((f"{challenge}. {TITLES[challenge]}", shown, possible, ", ".join(hardware) or "-"))
        else:
            lines.append(("**all**", f"**{points}**", f"**{possible}**", ""))
    return table(pandas.DataFrame(lines, columns=["challenge", "points", "of", "measured on"]))


def file_tables(measured: dict, tables: tuple[tuple[str, str], ...]) -> list[str]:
    """The tables of a measurement file: those in `tables`, then one for each other metric, under its own name.

    Args:
        measured: The content of the file.
        tables: Metrics and their captions.
    """
    named = dict(tables)
    others = dict.fromkeys(record["metric"] for record in measured["records"] if record["metric"] not in named)
    named |= {metric: f"`{metric}`" for metric in others}
    return [metric_table(measured["records"], metric, caption) for metric, caption in named.items()]


def metric_table(records: list[dict], metric: str, caption: str) -> str:
    """The table of one metric: ours with its spread and the baselines of each case. A single value is a line.

    Args:
        records: Of a measurement file, of all metrics.
        metric: The one to show. One in `WORST` is a line with the largest value; one in `CHECKS` names what passed, and
            has a row for what did not; one in `TURNED` has a column a case.
        caption: Stands above the table, with the unit where neither the numbers nor the caption have it.
    """
    mine = [_scaled(record) for record in records if record["metric"] == metric]
    if not mine:
        return f"**{caption}**: not measured."
    if metric in CHECKS:
        return _checks(mine, caption)
    if metric in WORST:
        worst = max(mine, key=lambda record: record["value"])
        if not worst["value"]:
            return f"**{caption}**: 0 in each of {len(mine)} cases."
        return f"**{caption}**: {amount(worst['value'], worst['unit'])}, the largest of {len(mine)} cases."
    named = mine[0]["unit"] in (*RATIOS, *NAMELESS) or re.search(rf"\b{re.escape(mine[0]['unit'])}\b", caption.lower())
    unit = "" if named else f", {mine[0]['unit']}"
    unit = ", from 0 to 1" if mine[0]["unit"] == "fraction" and metric not in PERCENT else unit
    rows = [_row(record) for record in mine]
    if len(rows) == 1 and not mine[0].get("baselines"):
        return f"**{caption}{unit}** ({rows[0]['case']}): {rows[0]['ours']}."
    frame = pandas.DataFrame(rows).fillna("-")
    if metric in TURNED:
        frame = frame.set_index("case").T.reset_index(names="")
    shown = table(frame)
    if len(frame) > LONG:
        shown = f"<details><summary>{len(frame)} rows</summary>\n\n{shown}\n\n</details>"
    return f"**{caption}{unit}**\n\n{shown}"


def gpu_tests(path: Path) -> str:
    """Report what `make gpu-test` kept: whether of this package, every failed test, and every skip with its reason."""
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8"))
    counts = f"{kept['passed']} passed, {kept['failed']} failed, {kept['skipped']} skipped"
    said = [f"- failed: `{name}`" for name in kept["failures"]]
    said += [f"- skipped: {reason}" for reason in dict.fromkeys(skip["reason"] for skip in kept["skips"])]
    since = "" if kept["digest"] == code_digest(package_files()) else " The package has changed since."
    return "\n".join([f"{counts}. {provenance(kept)}{since}", *(["", *said] if said else [])])


def provenance(measured: dict) -> str:
    """A sentence about the head of a measurement file: hardware, date and versions."""
    versions = ", ".join(f"{name} {measured['versions'][name]}" for name in ("torch", "triton", "bitsandbytes"))
    return f"{machine(measured)}, {versions}."


def machine(measured: dict) -> str:
    """Hardware and date of the head of a measurement file."""
    held = " held to a T4's limits (a rehearsal)" if measured["hardware"].get("rehearsal") else ""
    return f"{measured['hardware']['name']}{held}, {measured['date']}"


def shown_unit(record: dict) -> str:
    """The unit of a record for `amount`: none for fractions that are written as numbers from 0 to 1."""
    return "" if record["unit"] == "fraction" and record["metric"] not in PERCENT else record["unit"]


def amount(value: float, unit: str) -> str:
    """A value with its unit, as the tables write it: `1.87x`, `96 %`, `11.8 us`, `65,536 bytes`, `3.8e-07`."""
    if unit == "fraction":
        shown = ">99.9 %" if 0.9995 <= value < 1 else f"{100 * value:.1f} %"
    elif unit in RATIOS:
        shown = f"{value:.3f}x" if 0.9 < value < 1.1 else f"{value:.2f}x"  # near 1 a per cent decides who is faster
    else:
        shown = f"{_number(value)} {unit}".strip()
    return shown if value == 0 or re.search("[1-9]", shown) else f"{value:.1e}"  # 0 is written for 0 alone


def _scaled(record: dict) -> dict:
    """The record in the unit that is shown, see `SCALED`."""
    if record["unit"] not in SCALED:
        return record
    divisor, unit = SCALED[record["unit"]]
    values = {name: record.get(name) for name in ("value", "low", "high")}
    values = {name: None if value is None else value / divisor for name, value in values.items()}
    others = {name: value / divisor for name, value in (record.get("baselines") or {}).items()}
    return record | values | {"unit": unit, "baselines": others}


def _checks(mine: list[dict], caption: str) -> str:
    """The groups of checks that all passed, by name, and a table of the other groups."""
    whole = [record["case"] for record in mine if record["value"] == 1]
    others = [_row(record) for record in mine if record["value"] != 1]
    names = f" ({'; '.join(whole)})" if whole else ""
    said = f"**{caption}**: all in {len(whole)} of {len(mine)} groups{names}."
    return f"{said}\n\n{table(pandas.DataFrame(others))}" if others else said


def _row(record: dict) -> dict[str, str]:
    """Case, ours with its spread, and each baseline; the unit stands in the caption unless it is part of the number."""
    unit = shown_unit(record) if record["unit"] in RATIOS else ""
    low, high, others = record.get("low"), record.get("high"), record.get("baselines") or {}
    ours = amount(record["value"], unit)
    if low is not None and high is not None:
        ours += f" ({amount(low, unit)} to {amount(high, unit)})"
    shown = {SHORT.get(name, name): amount(value, unit) for name, value in others.items()}
    return {"case": record["case"], "ours": ours, **shown}


def _number(value: float) -> str:
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
