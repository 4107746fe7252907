"""Checks that say their names: what passed is printed before `judge` records it."""

import textwrap
from collections.abc import Mapping

from unsloth_puzzles.bench.experiments import judge
from unsloth_puzzles.bench.record import Measurements

SHOWN = 16  # names; of more checks the first and the last ones are printed


def judge_by_name(results: Measurements, case: str, checks: Mapping[str, bool]) -> None:
    """`judge`, after the names of the checks that hold.

    Args:
        results: Gets the record.
        case: Its case.
        checks: Whether each holds, by name.
    """
    passed = [name for name, good in checks.items() if good]
    if len(passed) > SHOWN:
        half = SHOWN // 4
        passed = [*passed[:half], f"... {len(passed) - 2 * half} more ...", *passed[-half:]]
    if passed:
        print(textwrap.fill(f"passed: {'; '.join(passed)}", 110, subsequent_indent="  "))
    judge(results, case, checks)
