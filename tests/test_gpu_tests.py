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
