"""The suite notices a broken count: each mutation of a copy of the source makes the test named with it fail."""

import pytest

from tests.mutants import (
    Run,
    assert_caught,
    assert_unmutated_passes,
    mutation,
    run_mutants,
    selected,
)

pytestmark = pytest.mark.slow
MUTATIONS = {
    "backwards not counted": mutation(
        "compilations.py",
        "one.backward += sum(backward)",
        "one.backward += 0",
        "test_compilations.py::test_backward_is_counted_beside_forward[True]",
    ),
    "graph breaks not counted": mutation(
        "compilations.py",
        "if count > breaks.get(reason, 0)",
        "if False",
        "test_compilations.py::test_graph_breaks_are_counted",
    ),
}


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[str, Run]:
    return run_mutants("bench", selected(request, MUTATIONS), tmp_path_factory)


def test_the_unmutated_copy_passes(runs):
    assert_unmutated_passes(runs)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(runs, name):
    assert_caught(runs, name)
