"""What each criterion of the rubric was measured to be, and the points it gets.

Every criterion names the metric and case, in a file of `resources/measurements/`, that decide it. A verdict comes from
those files alone. A missing record wins no point. Where the puzzle has a penalty for what is not shown, it also costs
the penalty, except in two cases, "not measured here": the machine has no GPU and the criterion needs one, or the
challenge has no file, which is a challenge that was not attempted.
"""

import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas

from unsloth_puzzles.bench import markdown
from unsloth_puzzles.bench.challenges import FILES, TITLES
from unsloth_puzzles.bench.criterion import Condition, Criterion
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.bench.rubric import RUBRIC

MET, PARTLY_MET, NOT_MET, NOT_MEASURED = "met", "partly met", "not met", "not measured here"
NOT_ON = "but not on a"  # GPU that the puzzle names, in a verdict

_COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "==": operator.eq}


@dataclass(frozen=True)
class Row:
    """A criterion judged: `points` of `possible`, the measured values as text, and the machine they come from."""

    challenge: str
    criterion: str
    possible: int
    measured: str
    verdict: str
    points: int
    hardware: str


def score(directory: str | os.PathLike = "resources/measurements") -> list[Row]:
    """Judge every criterion of the rubric by the measurement files in `directory`; files may be missing.

    Raises ValueError for a file that is not of the form of `bench.record`.
    """
    rows = []
    for challenge, file in FILES.items():
        path = Path(directory, file)
        measurements = Measurements.load(path) if path.exists() else None
        criteria = [criterion for criterion in RUBRIC if criterion.challenge == challenge]
        judged = [_judge(criterion, measurements) for criterion in criteria]
        gates = [row for row, criterion in zip(judged, criteria, strict=True) if criterion.gate and row.verdict != MET]
        if gates:  # an unmeasured gate is not a passed one; penalties stand
            judged = [_held_back(row, gates[0]) for row in judged]
        rows += [_placed(row, criterion, measurements) for row, criterion in zip(judged, criteria, strict=True)]
    return rows


def _held_back(row: Row, gate: Row) -> Row:
    if row.points <= 0:
        return row
    return replace(row, points=0, verdict=f"{row.verdict}; no points, since this is {gate.verdict}: {gate.criterion}")


def _placed(row: Row, criterion: Criterion, measurements: Measurements | None) -> Row:
    """The row, whose verdict says if it was met on other GPUs than those asked for, or with random weights."""
    if not criterion.asked_gpu or row.verdict != MET:
        return row
    said = [MET]
    if not is_gpu(measurements.hardware["name"], criterion.asked_gpu):
        said.append(f"{NOT_ON} {criterion.asked_gpu}")
    conditions = (condition for _, level in criterion.levels for condition in level)
    if any("random weights" in found["case"] for condition in conditions for found in _found(condition, measurements)):
        said.append("with random weights")
    return replace(row, verdict=", ".join(said))


def is_gpu(name: str, asked: str) -> bool:
    """Whether a GPU's name as its driver gives it is that of `asked`: "Tesla T4" is a T4, "NVIDIA T400" is not."""
    return asked in name.split()


def totals(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """Points won and possible per challenge among `rows`, and, if they hold all challenges, under "all"."""
    rows = list(rows)
    selections = {challenge: [row for row in rows if row.challenge == challenge] for challenge in FILES}
    selections = {challenge: chosen for challenge, chosen in selections.items() if chosen}
    if len(selections) == len(FILES):
        selections["all"] = rows
    return {
        name: (sum(row.points for row in chosen), sum(row.possible for row in chosen))
        for name, chosen in selections.items()
    }


def table(rows: Iterable[Row]) -> str:
    """The judged criteria as a Markdown table, with the sum of each challenge."""
    rows = list(rows)
    lines = [
        (row.challenge, row.criterion, f"{row.points} of {row.possible}", row.measured, row.verdict, row.hardware)
        for row in rows
    ]
    for name, (points, possible) in totals(rows).items():
        title = f"{name}. {TITLES[name]}" if name in TITLES else "all challenges"
        elsewhere = sum(row.points for row in rows if name in (row.challenge, "all") and NOT_ON in row.verdict)
        said = f"{elsewhere} of them not shown on the GPU that the puzzle names" if elsewhere else ""
        lines.append((f"**{name}**", f"**{title}**", f"**{points} of {possible}**", "", said, ""))
    columns = ["challenge", "criterion", "points", "measured", "verdict", "hardware"]
    return markdown.table(pandas.DataFrame(lines, columns=columns))


def _judge(criterion: Criterion, measurements: Measurements | None) -> Row:
    possible = max(points for points, _ in criterion.levels)
    conditions = [condition for _, level in criterion.levels for condition in level]
    outcomes = [_all_hold(level, measurements) for _, level in criterion.levels]
    verdict, points = NOT_MEASURED, 0
    if True in outcomes:
        points = criterion.levels[outcomes.index(True)][0]
        verdict = MET if points == possible else PARTLY_MET if points > 0 else NOT_MET
    elif None not in outcomes or _penalised_unmeasured(criterion, measurements):
        verdict, points = NOT_MET, criterion.otherwise
    known = verdict != NOT_MEASURED or any(_holds(condition, measurements) is not None for condition in conditions)
    measured = _measured(conditions, measurements) if known else ""
    hardware = ""
    if measurements and verdict != NOT_MEASURED:
        held = measurements.hardware.get("rehearsal")
        hardware = measurements.hardware["name"] + (" held to a T4's limits" if held else "")
    return Row(criterion.challenge, criterion.text, possible, measured, verdict, points, hardware)


def _penalised_unmeasured(criterion: Criterion, measurements: Measurements | None) -> bool:
    """Whether a missing record costs the criterion's penalty: what is not shown does not hold."""
    if measurements is None or criterion.otherwise == 0:
        return False
    return not criterion.needs_gpu or measurements.hardware["device"] == "cuda"


def _all_hold(conditions: Iterable[Condition], measurements: Measurements | None) -> bool | None:
    """True if all hold, False if one does not, None if that cannot be said from what was measured."""
    outcomes = [_holds(condition, measurements) for condition in conditions]
    return False if False in outcomes else None if None in outcomes else True


def _holds(condition: Condition, measurements: Measurements | None) -> bool | None:
    found = _found(condition, measurements)
    return all(_COMPARISONS[condition.comparison](one["value"], condition.bound) for one in found) if found else None


def _measured(conditions: Iterable[Condition], measurements: Measurements | None) -> str:
    """The values that decide, in words: each once, and groups of checks that passed as a whole by name."""
    texts, passed = {}, {}
    for condition in conditions:
        name = condition.metric.replace("_", " ")
        found = _found(condition, measurements)
        if not found:
            texts[f"{name} ({condition.case or 'any case'}): not measured"] = None
        for one in found:
            if condition.metric != "checks_passed":
                texts[f"{name} ({one['case']}): {_amount(one['value'], one['unit'])}"] = None
            elif one["value"] == 1:
                passed[one["case"]] = None
            else:
                texts[f"{one['case']}: {one['value']:.0%} of checks passed"] = None
    return "; ".join([*texts, *([f"all checks passed of: {'; '.join(passed)}"] if passed else [])])


def _amount(value: float, unit: str) -> str:
    """A value as the scorecard shows it; the metric's name says what a count counts."""
    if unit == "fraction":
        return f"{100 * value:.3g} %"
    if unit == "loss":
        return f"{value:.3g} nats"
    number = f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"
    return number + ("x" if unit == "x" else "")


def _found(condition: Condition, measurements: Measurements | None) -> list[dict]:
    """The records that a condition is about."""
    return measurements.find(condition.metric, condition.case) if measurements else []
