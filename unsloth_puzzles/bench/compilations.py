"""Count what the compiler does in a block of code: graphs, breaks, recompilations with their reasons, and seconds.

Dynamo captures a function; Inductor then compiles its forward and, if gradients are wanted, its backward, at once or at
the first backward. Both are counted: a compilation is one of Inductor's.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch._dynamo.utils import counters, get_compilation_metrics, set_compilation_metrics_limit
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx

_LIMIT = 100_000  # entries that Dynamo remembers: its own 64 would drop the first ones, and with them the count


@dataclass
class Capture:
    """One capture of a function by Dynamo.

    Attributes:
        name: of the function.
        reason: why it was captured again; None the first time.
        forward: how often Inductor compiled a forward of it; 0 under another backend.
        backward: the same of its backward.
        seconds: for capturing and compiling.
        operators: those of its graphs as Inductor was given them, by name ("aten.mm"), with how often each occurs.
    """

    name: str
    reason: str | None
    forward: int = 0
    backward: int = 0
    seconds: float = 0.0
    operators: dict[str, int] = field(default_factory=dict)

    @property
    def compilations(self) -> int:
        """Inductor's; what another backend has made of a capture counts as one."""
        return max(1, self.forward + self.backward)


@dataclass
class Counts:
    """The counts of `count_compilations`, filled when the block ends.

    Attributes:
        captures: in order.
        graph_breaks: how often, by reason.
        graphs: how many Dynamo captured.
    """

    captures: list[Capture] = field(default_factory=list)
    graph_breaks: dict[str, int] = field(default_factory=dict)
    graphs: int = 0

    @property
    def compilations(self) -> int:
        return sum(one.compilations for one in self.captures)

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.captures)

    def table(self) -> str:
        """Markdown: a line a capture."""
        lines = ["| captured | compiled forward | backward | seconds | guard that failed |", "|---" * 5 + "|"]
        for one in self.captures:
            guard = (one.reason or "").partition("\n")[0].partition("  #")[0]  # its source follows as a comment
            cells = (one.name, one.forward, one.backward, f"{one.seconds:.1f}", guard)
            lines.append(f"| {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


@contextlib.contextmanager
def count_compilations() -> Iterator[Counts]:
    """Count compilations in a block, by Dynamo's own metrics and by calls of Inductor, also those its cache answers.

    Yields:
        The counts, filled when the block ends.

    Raises:
        RuntimeError: `torch._dynamo.config.suppress_errors` is on, so that failures would run eagerly, uncounted.
    """
    if torch._dynamo.config.suppress_errors:
        raise RuntimeError(
            "torch._dynamo.config.suppress_errors must be False, got True: failures would run eagerly, unseen"
        )
    set_compilation_metrics_limit(_LIMIT)
    known = len(get_compilation_metrics())
    breaks, graphs = dict(counters["graph_break"]), counters["stats"]["unique_graphs"]
    found = Counts()
    with _inductor_calls() as calls:
        try:
            yield found
        finally:
            entries = dict(enumerate(get_compilation_metrics()))
            found.captures = _captures({at: one for at, one in entries.items() if at >= known}, calls)
            found.graph_breaks = {
                reason: count - breaks.get(reason, 0)
                for reason, count in counters["graph_break"].items()
                if count > breaks.get(reason, 0)
            }
            found.graphs = counters["stats"]["unique_graphs"] - graphs


@contextlib.contextmanager
def _inductor_calls() -> Iterator[list[tuple[int, bool, Counter]]]:
    """(number of the entry in Dynamo's books, whether a backward, operators) of all that Inductor is given to compile.

    The cache of AOTAutograd is off meanwhile: it would answer before Inductor is asked.
    """
    calls, compile_inner = [], compile_fx._compile_fx_inner

    def counted(graph, *args, **kwargs):
        calls.append((len(get_compilation_metrics()), bool(kwargs.get("is_backward")), _operators(graph)))
        return compile_inner(graph, *args, **kwargs)

    compile_fx._compile_fx_inner = counted
    try:
        with functorch_config.patch(enable_autograd_cache=False):
            yield calls
    finally:
        compile_fx._compile_fx_inner = compile_inner


def _operators(graph: torch.fx.GraphModule) -> Counter:
    """How often each operator occurs in a graph, by its name without the overload's."""
    targets = (node.target for node in graph.graph.nodes if node.op == "call_function")
    return Counter(str(getattr(target, "overloadpacket", target)) for target in targets)


def _captures(entries: dict[int, object], calls: list[tuple[int, bool, Counter]]) -> list[Capture]:
    """A backward that is compiled later has an entry of its own, under the id of its forward; so has the time that
    Triton's autotuning takes when kernels first run, which compiles no graph."""
    found: list[Capture] = []
    of_id: dict[str, Capture] = {}
    for number, entry in entries.items():
        backward = [of_backward for at, of_backward, _ in calls if at == number]
        one = None if entry.is_forward and entry.co_name else of_id.get(entry.compile_id)
        if one is None and not entry.co_name and not backward and found:
            one = found[-1]
        if one is None:
            one = Capture(entry.co_name or "backward of an earlier capture", entry.recompile_reason)
            found.append(one)
            of_id[entry.compile_id] = one
        one.seconds += (entry.duration_us or 0) / 1e6
        one.backward += sum(backward)
        one.forward += len(backward) - sum(backward)
        one.operators = dict(sum((Counter(found) for at, _, found in calls if at == number), Counter(one.operators)))
    return found
