"""The record of a run of the tests: what counts as passed, failed and skipped, and which runs are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import unsloth_puzzles.bench.record  # noqa: F401  # here, since triton survives no second import after pytester's
from tools import gpu_tests, record_tests
from unsloth_puzzles.bench.code_digest import code_digest, package_files

pytest_plugins = ["pytester"]

TESTS = """
import pytest

def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken():
    yield
    raise KeyError
def test_fails_at_its_end(broken): pass
@pytest.mark.skip(reason="needs two GPUs")
def test_is_skipped(): pass
@pytest.mark.gpu
def test_of_a_gpu(): pass
"""
SETTINGS = "[pytest]\ntestpaths = tests\nmarkers = gpu\n"
PLUGIN = ("-p", "tools.record_tests", "-p", "no:xdist", "-p", "no:cacheprovider")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(SETTINGS)
    pytester.mkdir("tests").joinpath("test_small.py").write_text(TESTS)
    return pytester


def record(project: pytest.Pytester, name: str = "tests.json") -> Path:
    return project.path / record_tests.MEASUREMENTS / name


def test_record_has_provenance_seconds_counts_failures_and_skips(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((100.0, 175.25))
    monkeypatch.setattr(record_tests, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    project.runpytest_inprocess(*PLUGIN).stdout.fnmatch_lines(["tests.json: written"])
    kept = json.loads(record(project).read_text())
    assert kept["digest"] == code_digest(package_files()) and kept["versions"]["torch"] == torch.__version__
    assert (kept["seconds"], kept["passed"], kept["failed"], kept["skipped"]) == (75.2, 2, 2, 1)
    assert kept["failures"] == ["tests/test_small.py::test_fails", "tests/test_small.py::test_fails_at_its_end"]
    assert kept["skips"] == [{"test": "tests/test_small.py::test_is_skipped", "reason": "needs two GPUs"}]


def test_gpu_tests_have_a_record_of_their_own(project: pytest.Pytester) -> None:
    project.runpytest_inprocess(*PLUGIN, "-m", "gpu")
    assert json.loads(record(project, "gpu_tests.json").read_text())["passed"] == 1
    assert not record(project).exists()


@pytest.mark.parametrize(
    "options", [("-m", "not gpu"), ("-k", "passes"), ("tests/test_small.py",), ("--deselect", "tests/test_small.py")]
)
def test_run_of_a_selection_is_refused(project: pytest.Pytester, options: tuple[str, ...]) -> None:
    done = project.runpytest_inprocess(*PLUGIN, *options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR and not record(project).exists()


def test_run_that_is_interrupted_leaves_the_record_alone(project: pytest.Pytester) -> None:
    (project.path / "tests" / "test_broken.py").write_text("import no_such_module")
    project.runpytest_inprocess(*PLUGIN).stdout.fnmatch_lines(["tests.json is left as it was: *come to its end"])
    assert not record(project).exists()


def test_code_that_changes_during_the_run_leaves_the_record_alone(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["before", "after"])
    monkeypatch.setattr(record_tests, "code_digest", lambda files: next(digests))
    project.runpytest_inprocess(*PLUGIN).stdout.fnmatch_lines(["tests.json is left as it was: the package changed*"])
    assert not record(project).exists()


def test_gpu_tests_are_not_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_tests.subprocess, "run", lambda *args, **options: pytest.fail("pytest was started"))
    assert gpu_tests.main() == 1
