"""The suite notices a broken count: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

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

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("bench", MUTATIONS)
