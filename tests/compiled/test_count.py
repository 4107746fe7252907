"""Compilations, graph breaks and reasons are counted as they happen."""

import pytest
import torch

from unsloth_puzzles.compiled.count import count_compilations

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_each_length_that_is_compiled_anew_is_counted_with_its_reason():
    @torch.compile(dynamic=False, backend="aot_eager")
    def squared(x):
        return (x * x).sum()

    with count_compilations() as counts:
        for length in (3, 5, 3, 7):
            squared(torch.ones(length))
    assert [one.name for one in counts.compilations] == ["squared"] * 3 and counts.graphs == 3
    assert [one.reason is None for one in counts.compilations] == [True, False, False]
    assert "3" in counts.compilations[1].reason and counts.seconds > 0
    assert counts.table().count("| squared | forward |") == 3
    with count_compilations() as counts:
        squared(torch.ones(5))
    assert counts.compilations == [] and counts.graphs == 0


def test_more_compilations_than_dynamo_remembers_by_itself():
    """A process that has compiled 64 functions before, and 70 in the block."""
    torch._dynamo.utils.set_compilation_metrics_limit(64)

    def compile_many(number):
        for n in range(number):
            torch._dynamo.reset()
            torch.compile(lambda x, n=n: x + n, backend="eager")(torch.ones(2))

    compile_many(70)
    with count_compilations() as counts:
        compile_many(70)
    assert len(counts.compilations) == counts.graphs == 70


def test_a_graph_break_is_counted():
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
