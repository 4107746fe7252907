"""Every mutation still finds the text that it changes, so that a change of the source cannot retire it unseen."""

import importlib

import pytest

from tests.mutants import ROOT, Mutation

PACKAGES = sorted(path.parent.name for path in (ROOT / "tests").glob("*/test_mutations.py"))
MUTATIONS = {
    f"{package}, {name}": (package, each)
    for package in PACKAGES
    for name, each in importlib.import_module(f"tests.{package}.test_mutations").MUTATIONS.items()
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_finds_its_text(name):
    package, each = MUTATIONS[name]
    assert isinstance(each, Mutation)
    assert each.edits
    for file, old, new in each.edits:
        assert old in (ROOT / "unsloth_puzzles" / package / file).read_text(encoding="utf-8")
        assert new != old


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_names_a_test_of_its_package(name):
    package, each = MUTATIONS[name]
    file, _, function = each.test.partition("::")
    assert f"def {function.partition('[')[0]}(" in (ROOT / "tests" / package / file).read_text(encoding="utf-8")
