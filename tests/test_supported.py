"""One place says what is tested; other releases give one warning that names what was."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from unsloth_puzzles import supported
from unsloth_puzzles.supported import PYTHON, TESTED, untested

ROOT = Path(__file__).parents[1]
PINNED = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0", "peft": "0.21.0", "trl": "1.16.0"}


def phrases(changed=None, python=(3, 12), triton_of_torch="3.6.0"):
    return untested({**PINNED, **(changed or {})}.get, python, triton_of_torch)


def test_the_pinned_versions_and_missing_packages_are_silent():
    assert phrases() == [] and untested(lambda package: None, (3, 11), None) == []


@pytest.mark.parametrize("package", TESTED)
def test_both_ends_are_silent_and_what_is_beyond_is_named(package):
    oldest, newest = ([int(part) for part in end.split(".")] for end in TESTED[package])
    for release in (oldest, newest):
        version = f"{release[0]}.{release[1]}.7+cu130"
        assert phrases({package: version}, triton_of_torch=None) == []
    for major, minor in ((oldest[0], oldest[1] - 1), (newest[0], newest[1] + 1), (newest[0] + 1, 0)):
        version = f"{major}.{minor}.0.dev20261129"
        assert phrases({package: version}, triton_of_torch=None) == [f"{package} {version}"]


def test_another_python_and_another_triton_than_that_of_torch_are_named():
    assert phrases(python=(3, 10)) == ["Python 3.10"] and phrases(python=(3, 14)) == ["Python 3.14"]
    assert phrases(triton_of_torch="3.6.1") == []
    (found,) = phrases({"triton": "3.8.0"})
    assert found == "triton 3.8.0 under torch 2.11.0, which is built for 3.6.0"


def test_the_warning_is_one_and_names_all_that_was_tested(monkeypatch):
    monkeypatch.setattr(supported, "installed", {"torch": "9.9.0", "peft": "0.1.0"}.get)
    monkeypatch.setattr(supported, "triton_of_torch", lambda: None)
    with pytest.warns(UserWarning, match="^unsloth_puzzles was not tested with ") as said:
        supported.warn_of_untested()
    (text,) = (str(one.message) for one in said)
    assert "torch 9.9.0, peft 0.1.0, but with Python 3.11 to 3.13, torch 2.10 to 2.15" in text
    assert all(package in text for package in TESTED)


def test_an_import_warns_only_of_what_was_not_tested():
    """With whatever is installed here; the import takes no library but Python's own."""
    code = "import sys, warnings; warnings.simplefilter('error'); import unsloth_puzzles; "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = untested(supported.installed, sys.version_info[:2], supported.triton_of_torch())
    assert (done.returncode == 0) is not bool(expected), done.stderr


def test_pyproject_allows_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["notebook"]]
    for package, (oldest, newest) in TESTED.items():
        (need,) = (need for need in needs if re.match(rf"{package}\b", need))
        assert f">={oldest}" in need
        major, minor = newest.split(".")
        assert "<" not in need or f"<{major}.{int(minor) + 1}" in need
    assert project["requires-python"] == f">={PYTHON[0]},<3.{int(PYTHON[1].split('.')[1]) + 1}"


def test_the_notebook_keeps_what_is_tested():
    """Its install cell stands before the package is written, so it has numbers of its own."""
    cell = (ROOT / "notebook/00_setup.py").read_text(encoding="utf-8")
    (line,) = re.findall(r"^OLDEST = (\{.*\})$", cell, re.MULTILINE)
    oldest = {package: ".".join(map(str, release)) for package, release in ast.literal_eval(line).items()}
    for package in {*oldest} & {*TESTED}:
        assert oldest[package] == TESTED[package][0]
    assert {"bitsandbytes", "transformers", "peft"} <= {*oldest}


def test_every_environment_of_the_tests_is_a_tested_one():
    assert untested(supported.installed, sys.version_info[:2], supported.triton_of_torch()) == []
