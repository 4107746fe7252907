"""The environments of `make matrix`: of what they are made, how long a part may take, and what is kept of it."""

import json
import re
import sys
from pathlib import Path

import pytest

from tools import matrix
from unsloth_puzzles.supported import TESTED


def pins(name: str) -> dict[str, str]:
    return {re.split("[=>]", need)[0]: need for need in matrix.requirements(name)}


@pytest.mark.parametrize("name", matrix.PYTHONS)
def test_every_environment_has_what_the_tests_import(name):
    assert {*TESTED, "gguf", "libgguf", "torchvision", "pytest", "hypothesis"} <= {*pins(name), "triton"}
    assert not {*matrix.LEFT_OUT} & {*pins(name)}


def test_the_ends_are_those_that_are_supported():
    assert pins("oldest")["torch"] == "torch==2.10.0" and pins("newest")["torch"] == "torch==2.15.*"
    for package, (oldest, newest) in TESTED.items():
        if package != "triton":
            assert pins("oldest")[package] == f"{package}=={oldest}.0"
            assert pins("newest")[package] == f"{package}=={newest}.*"
    assert "triton" not in pins("oldest") and "triton" not in pins("newest")  # each torch brings its own


def test_colab_and_pinned_have_the_versions_of_their_files():
    root = matrix.ROOT
    for name, path in (("pinned", "requirements.txt"), ("colab", "notebook/colab.txt")):
        lines = [line.partition("#")[0].strip() for line in (root / path).read_text().splitlines()]
        ours = {line for line in lines if line and line.split("==")[0] not in matrix.LEFT_OUT}
        assert ours - {*matrix.requirements(name)} <= (
            {"datasets==4.0.0", "accelerate==1.14.0"} if name == "colab" else set()
        )
    assert pins("colab")["datasets"] == "datasets>=4.7" and pins("colab")["accelerate"] == "accelerate>=1.15"


def test_a_command_is_ended_at_its_limit_with_what_it_has_said(tmp_path):
    program = "import os, time, pathlib; print('started', flush=True); time.sleep(60)"
    assert matrix.run([sys.executable, "-c", program], 0.05, {}, show=lambda line: None) == (None, ["started"])


def test_variables_are_added_and_left_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ['ADDED'])"
    environment = {"TRITON_INTERPRET": "", "ADDED": "yes"}
    assert matrix.run([sys.executable, "-c", program], 1, environment, show=lambda line: None) == (0, ["None yes"])


@pytest.fixture
def environments(monkeypatch, tmp_path):
    """Environments that are this one, and a record in a folder of the test's."""
    monkeypatch.setattr(matrix, "RECORD", tmp_path / "matrix.json")
    monkeypatch.setattr(matrix, "make", lambda name, minutes: Path(sys.executable))
    return tmp_path / "matrix.json"


def test_a_part_replaces_its_own_record_alone(environments, monkeypatch):
    environments.write_text(json.dumps({"newest": {"tests": {"passed": 7}}, "oldest": {"kernels": {}}}))
    made = {"builds": 3, "failed": [], "ended": True}
    monkeypatch.setattr(matrix, "compile_kernels", lambda python, minutes: made)
    assert matrix.main(["newest", "--only", "kernels"]) == 0
    kept = json.loads(environments.read_text())
    assert kept["newest"]["tests"] == {"passed": 7} and kept["oldest"] == {"kernels": {}}
    assert kept["newest"]["kernels"]["builds"] == 3 and {*kept["newest"]["kernels"]["versions"]} == {"python", *TESTED}


def test_what_was_found_while_the_package_was_edited_is_not_kept(environments, monkeypatch, capsys):
    digests = iter(["a", "b", "c", "c"])
    monkeypatch.setattr(matrix, "code_digest", lambda files: next(digests))
    monkeypatch.setattr(matrix, "compile_kernels", lambda python, minutes: {"failed": [], "ended": True})
    monkeypatch.setattr(matrix, "test", lambda python, minutes, workers: {"failed": 0, "ended": True})
    assert matrix.main(["newest"]) == 1
    assert "the package was edited while newest, kernels ran" in capsys.readouterr().out
    kept = json.loads(environments.read_text())["newest"]
    assert [*kept] == ["tests"] and kept["tests"]["digest"] == "c"


@pytest.mark.parametrize(
    "said, status, expected",
    [
        (["..", "2 passed, 1 skipped in 3.00s"], 0, {"passed": 2, "failed": 0, "skipped": 1, "ended": True}),
        (
            ["FAILED tests/a.py::b", "ERROR tests/a.py::c", "1 failed, 2 passed, 4 skipped, 1 error in 3.00s"],
            1,
            {"passed": 2, "failed": 1, "error": 1, "failures": ["tests/a.py::b", "tests/a.py::c"], "ended": True},
        ),
        (["...."], None, {"passed": 0, "ended": False}),
    ],
)
def test_tests_are_counted_and_a_run_without_end_is_none(environments, monkeypatch, said, status, expected):
    monkeypatch.setattr(matrix, "run", lambda *arguments, **options: (status, said))
    assert matrix.main(["pinned", "--only", "tests"]) == (0 if status == 0 else 1)
    kept = json.loads(environments.read_text())["pinned"]["tests"]
    assert expected.items() <= kept.items()


def test_a_build_that_fails_is_kept_with_its_reason(environments, monkeypatch):
    good = '{"name": "a", "sm": 75, "registers": 20, "spills": 0, "shared": 64}'
    bad = '{"name": "b", "sm": 90, "error": "CompilationError: no"}'
    monkeypatch.setattr(matrix, "run", lambda *arguments, **options: (0, ["a warning", good, bad]))
    monkeypatch.setattr(matrix.shutil, "rmtree", lambda *arguments, **options: None)
    assert matrix.main(["oldest", "--only", "kernels"]) == 1
    kept = json.loads(environments.read_text())["oldest"]["kernels"]
    assert (kept["builds"], kept["registers"], len(kept["failed"])) == (2, 20, 1)


def test_an_unknown_environment_is_refused(environments, capsys):
    with pytest.raises(SystemExit):
        matrix.main(["nightly"])
    assert "must be of oldest, pinned, colab, newest, got nightly" in capsys.readouterr().err
    assert not environments.exists()


def test_a_python_that_does_not_run_is_passed_over(monkeypatch, tmp_path):
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    broken = tmp_path / f"python{version}"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    installed = tmp_path / f".pyenv/versions/{version}.0/bin/python"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert matrix._python(version) == str(installed)
    installed.unlink()
    with pytest.raises(RuntimeError, match=rf"^Python {version} with venv must be on the PATH"):
        matrix._python(version)
