"""The summary that `make gpu-test` keeps: what counts as passed, failed and skipped, and a refusal without a GPU."""

from pathlib import Path

import pytest

from tools import gpu_tests

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two"><failure message="assert"/></testcase>
<testcase classname="tests.a" name="three"><error message="set-up"/></testcase>
<testcase classname="tests.a" name="four"><skipped message="needs two GPUs"/></testcase>
</testsuite></testsuites>"""


def test_the_summary_counts_and_names(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(JUNIT)
    assert gpu_tests.summarise(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.a::two", "tests.a::three"],
        "skips": [{"test": "tests.a::four", "reason": "needs two GPUs"}],
    }


def test_without_a_gpu_nothing_is_run_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "gpu_present", lambda: False)
    monkeypatch.setattr(gpu_tests, "SUMMARY", tmp_path / "gpu_tests.json")
    assert gpu_tests.main() == 1
    assert not (tmp_path / "gpu_tests.json").exists()


def test_the_hash_of_the_package_knows_names_and_code_but_no_comments(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    a, b = tmp_path / "part" / "a.py", tmp_path / "part" / "b.py"
    a.write_text("x = 1  # one\n")
    first = gpu_tests.package_hash(tmp_path)
    a.write_text("x = 1  # the number of things\n")
    assert gpu_tests.package_hash(tmp_path) == first
    a.write_text("x = 2  # one\n")
    second = gpu_tests.package_hash(tmp_path)
    a.rename(b)
    assert len({first, second, gpu_tests.package_hash(tmp_path)}) == 3
