"""What a criterion of the marking rubric is, the limits that several of them share, and ways to write them briefly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """A comparison of a recorded value, found by metric and case, with a bound. Without a case it is for all cases."""

    metric: str
    case: str | None
    comparison: str  # one of >=, >, <=, ==
    bound: float


@dataclass(frozen=True)
class Criterion:
    """One line of the rubric.

    `levels` are (points, conditions), best first: the first whose conditions all hold counts. If none holds, the
    criterion gives `otherwise` points (0 or less). A negative `otherwise` is the puzzle's "else": it also applies if a
    record is missing, unless the criterion `needs_gpu` and the machine has none. A negative level needs its records:
    the puzzle's "with". A `gate` that is not met takes the whole challenge's points away. `asked_gpu` is the GPU that
    the puzzle names: met on another one, or with random weights, the criterion keeps its points and says so.
    """

    challenge: str
    text: str
    levels: tuple[tuple[int, tuple[Condition, ...]], ...]
    otherwise: int = 0
    gate: bool = False
    needs_gpu: bool = False
    asked_gpu: str = ""


MOST_COMPILATIONS = 30  # more is "excessive recompilation"
LARGEST_LOSS_DIFFERENCE = 1e-3  # at any step, between two runs that should train alike
LARGEST_FLOAT32_DIFFERENCE = 1e-4  # of the loss at any step, compiled and uncompiled, in float32
LARGEST_RANKS_DIFFERENCE = 1e-5  # of the loss at any step, ranks and one process, in float32
LARGEST_FULL_DIFFERENCE = 2e-4  # of the loss at any step of full fine-tuning in float32
LARGEST_RATIO = 2  # in 16 bits: that difference over the largest one among uncompiled runs
LARGEST_GRADIENT_NORM_DIFFERENCE = 1e-4  # relative, at any step
LEAST_REWARD_RISE = 0.1  # last ten steps' mean over the first ten's, of a reward from 0 to 1


def level(points: int, *conditions: Condition) -> tuple[int, tuple[Condition, ...]]:
    """The points that are given when all conditions hold."""
    return points, conditions


def only(points: int, *conditions: Condition) -> tuple[tuple[int, tuple[Condition, ...]]]:
    """The levels of a criterion that has one."""
    return (level(points, *conditions),)


def speed_up(comparison: str, bound: float) -> Condition:
    return Condition("official_harness_speedup", "all", comparison, bound)


def compilations(case: str, comparison: str) -> Condition:
    return Condition("compilations", case, comparison, MOST_COMPILATIONS)


def few_compilations(points: int, penalty: int, case: str, *conditions: Condition) -> tuple:
    """The levels of a criterion that takes points away for excessive recompilation."""
    return level(points, *conditions, compilations(case, "<=")), level(penalty, compilations(case, ">"))


def same_loss(case: str) -> Condition:
    """Of FSDP2 in float32: the loss of every step is that of one process."""
    return Condition("loss_difference", case, "<=", LARGEST_RANKS_DIFFERENCE)


def compiled_part(part: str) -> tuple[Condition, ...]:
    """Of a part of the model: the counted run has no break and the uncompiled loss, and its operators are there."""
    same = Condition("loss_difference", "compiled, float32", "<=", LARGEST_FLOAT32_DIFFERENCE)
    return Condition("graph_breaks", "all", "==", 0), works(f"operators, {part}"), same


def works(case: str) -> Condition:
    return Condition("checks_passed", case, "==", 1)  # a fraction: of no checks at all it is NaN, which no file holds
