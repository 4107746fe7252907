"""Breaks copies of the project, one edit each, and sees whether the test named with the edit notices."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    edits: tuple[tuple[str, str, str], ...]  # file in the package, old, new
    test: str  # in the package's tests


class Run(NamedTuple):
    status: int
    output: str


def mutation(file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(((file, old, new),), test)


def mutation_tests(
    package: str, mutations: Mapping[str, Mutation], fast: tuple[str, ...] = ()
) -> tuple[Callable, Callable, Callable]:
    """What a module of mutations consists of, to be bound to these names there.

    Args:
        package: a folder of unsloth_puzzles/ and of tests/.
        mutations: by name.
        fast: names of those that `make test` tries, too; the others belong to `make test-slow`.

    Returns:
        `runs` (a fixture), `test_the_unmutated_copy_passes` and `test_mutation_is_caught`.
    """
    unknown = {*fast} - {*mutations}
    assert not unknown, unknown

    @pytest.fixture(scope="module")
    def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
        return _run(package, _selected(request, mutations), tmp_path_factory)

    def test_the_unmutated_copy_passes(runs):
        status, output = runs[""]
        assert status == 0, output
        assert "skipped" not in output, output

    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in mutations]
    )
    def test_mutation_is_caught(runs, name: str):
        """An assertion of the test failed, and not the import of what was edited."""
        assert runs[""].status == 0, "the unmutated copy fails too"
        status, output = runs[name]
        assert status == pytest.ExitCode.TESTS_FAILED, output
        assert any(sign in output for sign in ("AssertionError", "\nE   assert ", "Failed: DID NOT RAISE")), output

    if not fast:
        test_the_unmutated_copy_passes = pytest.mark.slow(test_the_unmutated_copy_passes)
    return runs, test_the_unmutated_copy_passes, test_mutation_is_caught


def _selected(request: pytest.FixtureRequest, mutations: Mapping[str, Mutation]) -> dict[str, Mutation]:
    """The mutations whose tests in the module of `request` have not been deselected."""
    own = (item for item in request.session.items if item.path == request.path and hasattr(item, "callspec"))
    names = {item.callspec.params.get("name") for item in own}
    return {name: each for name, each in mutations.items() if name in names}


def _run(package: str, mutations: Mapping[str, Mutation], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each mutation's test in a copy with that mutation, and under "" all these tests in a copy without any."""
    jobs = {}
    for name, each in {"": Mutation((), ""), **mutations}.items():
        folder = tmp_path_factory.mktemp("mutant")
        _copy_with(folder, package, each.edits)
        tests = {each.test} if name else {mutant.test for mutant in mutations.values()}
        jobs[name] = (str(folder), [f"tests/{package}/{test}" for test in sorted(tests)])
    script = Path(__file__).with_name("run_mutants.py")
    command = [sys.executable, "-P", str(script), json.dumps([*jobs.values()])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = [Path(folder, "output.txt").read_text() for folder, _ in jobs.values()]
    return dict(zip(jobs, map(Run, json.loads(done.stdout), outputs), strict=True))


def _copy_with(folder: Path, package: str, edits: tuple[tuple[str, str, str], ...]) -> None:
    for name in ("unsloth_puzzles", "benchmarks", f"tests/{package}"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # with it pytest puts the copy before every other package
    for file, old, new in edits:
        path = folder / "unsloth_puzzles" / package / file
        source = path.read_text()
        assert old in source, f"{file} no longer holds {old!r}"
        path.write_text(source.replace(old, new))
