"""Compilations, graph breaks and reasons are counted as they happen."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from unsloth_puzzles.bench.compilations import Capture, Counts, _captures, count_compilations

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_recompilations_are_counted_with_their_reasons():
    @torch.compile(dynamic=False, backend="aot_eager")
    def squared(x):
        return (x * x).sum()

    with count_compilations() as counts:
        for length in (3, 5, 3, 7):
            squared(torch.ones(length))
    assert [one.name for one in counts.captures] == ["squared"] * 3 and counts.graphs == counts.compilations == 3
    assert [one.reason is None for one in counts.captures] == [True, False, False]
    assert "3" in counts.captures[1].reason and counts.seconds > 0
    assert counts.table().count("| squared | 0 | 0 |") == 3  # by another backend than Inductor
    with count_compilations() as counts:
        squared(torch.ones(5))
    assert counts.captures == [] and counts.compilations == counts.graphs == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_backward_is_counted_beside_forward(dynamic):
    """It is compiled with the forward, or at the first backward, and a second time it comes from Inductor's cache."""

    def squared(x):
        return (x.sin() * x.cos()).square()

    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(squared, dynamic=dynamic)
        with count_compilations() as counts:
            for length in (3, 4, 5):
                compiled(torch.ones(length, requires_grad=True)).sum().backward()
            with torch.no_grad():
                compiled(torch.ones(6))
        pairs = [(one.forward, one.backward) for one in counts.captures]
        assert pairs == [(1, 1)] * (1 if dynamic else 3) + [(1, 0)]
        assert counts.compilations == 2 * len(pairs) - 1
    with count_compilations() as counts:
        compiled(torch.ones(5, requires_grad=True)).sum().backward()
    assert counts.compilations == 0


def test_table_shows_the_first_failed_guard_without_its_source():
    reason = "0/0: 2 <= x.size()[0] <= 9  # return x * x  # file.py:15 in f\n0/1: x.size()[0] == 1"
    table = Counts([Capture("f", None, 1), Capture("f", reason, 1)]).table()
    assert table.splitlines()[2:] == ["| f | 1 | 0 | 0.0 |  |", "| f | 1 | 0 | 0.0 | 0/0: 2 <= x.size()[0] <= 9 |"]


def test_operators_of_a_captured_graph_are_listed():
    def twice(x, y):
        return (x @ y) @ y

    with count_compilations() as counts:
        torch.compile(twice)(torch.ones(3, 3, requires_grad=True), torch.ones(3, 3)).sum().backward()
    assert [one.operators["aten.mm"] for one in counts.captures] == [4]  # two forward, two for the gradient of x


def test_entries_without_a_graph_only_add_time():
    """Triton's autotuning, when kernels first run, has an entry in Dynamo's books, too."""

    def entry(name, compile_id, forward):
        return SimpleNamespace(
            co_name=name, compile_id=compile_id, is_forward=forward, recompile_reason=None, duration_us=1e6
        )

    entries = {
        7: entry("layer", "0/0", True),
        8: entry(None, None, False),
        9: entry("norm", "1/0", True),
        10: entry(None, "0/0", False),
        11: entry(None, "9/9", False),
    }
    calls = [(7, False, Counter(mm=2)), (9, False, Counter()), (10, True, Counter(mm=3, mul=1)), (11, True, Counter())]
    found = _captures(entries, calls)
    assert found[0].operators == {"mm": 5, "mul": 1} and found[1].operators == {}
    assert [(one.name, one.forward, one.backward, one.seconds) for one in found] == [
        ("layer", 1, 1, 3.0),
        ("norm", 1, 0, 1.0),
        ("backward of an earlier capture", 0, 1, 1.0),
    ]


def test_counts_beyond_dynamos_own_limit():
    """A process that has compiled 64 functions before, and 70 in the block."""
    torch._dynamo.utils.set_compilation_metrics_limit(64)

    def compile_many(number):
        for n in range(number):
            torch._dynamo.reset()
            torch.compile(lambda x, n=n: x + n, backend="eager")(torch.ones(2))

    compile_many(70)
    with count_compilations() as counts:
        compile_many(70)
    assert counts.compilations == counts.graphs == 70


def test_graph_breaks_are_counted():
    @torch.compile(backend="eager")
    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with count_compilations() as counts:
        broken(torch.ones(3))
    assert sum(counts.graph_breaks.values()) == 1 and counts.graphs == 2


def test_suppressed_errors_are_refused():
    with (
        torch._dynamo.config.patch(suppress_errors=True),
        pytest.raises(RuntimeError, match="suppress_errors"),
        count_compilations(),
    ):
        pass
