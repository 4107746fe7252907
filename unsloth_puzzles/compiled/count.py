"""What the compiler did while a block of code ran: graphs, breaks, recompilations with their reasons, and seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit

_LIMIT = 100_000  # compilations that Dynamo remembers: its own 64 would drop the first ones, and with them the count


@dataclass(frozen=True)
class Compilation:
    """One compilation: of what function, forward or backward, why again (None the first time), and how long it took."""

    name: str
    forward: bool
    reason: str | None
    seconds: float


@dataclass
class Counts:
    """Filled when the block ends. `graph_breaks`: reasons and how often; `graphs`: that Dynamo captured."""

    compilations: list[Compilation] = field(default_factory=list)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    graphs: int = 0

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.compilations)

    def table(self) -> str:
        """Markdown: a line a compilation."""
        lines = ["| compiled | pass | seconds | compiled again because |", "|---|---|---|---|"]
        for one in self.compilations:
            reason = (one.reason or "").splitlines()[:1]
            name, which = one.name, "forward" if one.forward else "backward"
            lines.append(f"| {name} | {which} | {one.seconds:.1f} | {reason[0] if reason else ''} |")
        return "\n".join(lines)


@contextmanager
def count_compilations() -> Iterator[Counts]:
    """Counts of the block, from Dynamo's own books. Errors of the compiler are not suppressed: nothing runs eagerly
    unseen. Raises RuntimeError if `torch._dynamo.config.suppress_errors` is on, under which a count means nothing."""
    if torch._dynamo.config.suppress_errors:
        raise RuntimeError(
            "torch._dynamo.config.suppress_errors: got True, need False: failures would be eager, unseen"
        )
    set_compilation_metrics_limit(_LIMIT)
    known = len(get_compilation_metrics())
    breaks, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
    found = Counts()
    try:
        yield found
    finally:
        found.compilations = [_compilation(entry) for entry in get_compilation_metrics()[known:]]
        found.graph_breaks = {
            reason: count - breaks.get(reason, 0)
            for reason, count in counters["graph_break"].items()
            if count > breaks.get(reason, 0)
        }
        found.graphs = counters["stats"]["unique_graphs"] - graphs


def _compilation(entry) -> Compilation:
    seconds = (entry.duration_us or 0) / 1e6
    return Compilation(entry.co_name or "?", bool(entry.is_forward), entry.recompile_reason, seconds)
