"""Judge checks as `experiments.judge` does, and print the names of those that passed."""

import textwrap
from collections import Counter
from collections.abc import Mapping

from unsloth_puzzles.bench import experiments
from unsloth_puzzles.bench.record import Measurements

MOST = 12  # names that are printed in full; longer lists are grouped


def judge(results: Measurements, case: str, checks: Mapping[str, bool]) -> None:
    """Record and print what `experiments.judge` does, then the names of the checks that hold.

    Args:
        results: Gets the record.
        case: Its case.
        checks: Whether each holds, by name.
    """
    experiments.judge(results, case, checks)
    if passed := [name for name, good in checks.items() if good]:
        indents = {"initial_indent": "  passed: ", "subsequent_indent": "    "}
        print(textwrap.fill("; ".join(grouped(passed)), 118, break_on_hyphens=False, **indents))


def grouped(names: list[str]) -> list[str]:
    """The names; of more than MOST the parts that several share, each with how many names share it.

    "causal, length 77" and "causal, length 256" become "causal (2)". A name is split at its first ": ", or else at its
    first ", ". Of both sides the one with more groups is shown, as long as these are at most MOST.
    """
    if len(names) <= MOST:
        return names
    sides = zip(*(_split(name) for name in names), strict=True)
    first, second = (Counter(side) for side in sides)
    fit = [side for side in (first, second) if len(side) <= MOST]
    shown = max(fit, key=len) if fit else min(first, second, key=len)
    return [f"{part} ({count})" if count > 1 else part for part, count in shown.items()]


def _split(name: str) -> tuple[str, str]:
    for mark in (": ", ", "):
        before, found, after = name.partition(mark)
        if found:
            return before, after
    return name, name
