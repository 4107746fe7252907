"""A pytest plugin that keeps what a whole run of the tests came to: `python -m pytest -p tools.record_tests`.

It writes resources/measurements/tests.json, and with `-m gpu` gpu_tests.json: hardware, versions, date, the digest of
the package's code, the seconds, how many tests passed, failed and were skipped, each failed test and each skip with its
reason.
A run of a selection is refused, since its record would be taken for one of all tests.
"""

import time
from pathlib import Path

import pytest

from unsloth_puzzles.bench.code_digest import code_digest, package_files

FILES = {"": "tests.json", "gpu": "gpu_tests.json"}  # by what `-m` selects
MEASUREMENTS = Path("resources/measurements")
SELECTING = ("keyword", "deselect", "ignore", "ignore_glob", "lf")  # options that leave tests out


def pytest_configure(config: pytest.Config) -> None:
    """Start to record, except in a worker of pytest-xdist: all its reports come to the controller.

    Raises:
        pytest.UsageError: The command line selects some of the tests.
    """
    if hasattr(config, "workerinput"):
        return
    selecting = [name for name in SELECTING if getattr(config.option, name, None)]
    selecting += ["paths"] if config.args_source is not pytest.Config.ArgsSource.TESTPATHS else []
    if selecting:
        raise pytest.UsageError(f"a run to be recorded must be of all tests, got a selection by {selecting}")
    if config.option.markexpr not in FILES:
        raise pytest.UsageError(f"-m must be one of {[*FILES]} in a run to be recorded, got {config.option.markexpr!r}")
    path = config.rootpath / MEASUREMENTS / FILES[config.option.markexpr]
    config.pluginmanager.register(Recorder(path))


class Recorder:
    """Collects outcomes, and writes them to `path` when the run has come to its end."""

    def __init__(self, path: Path):
        self.path, self.digest, self.said = path, code_digest(package_files()), ""
        self.began = time.monotonic()
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.reasons[report.nodeid] = reason.removeprefix("Skipped: ")
        elif report.when == "call":
            self.outcomes[report.nodeid] = "passed"

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not self.outcomes:
            self.said = "the run did not come to its end"
        elif self.digest != code_digest(package_files()):
            self.said = "the package changed during the run"
        else:
            # Late: it imports triton, before which the tests' conftest chooses Triton's interpreter.
            from unsloth_puzzles.bench.record import provenance, write_json

            write_json(self.path, {**provenance(), **self.counts()})

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        said = f"{self.path.name} is left as it was: {self.said}" if self.said else f"{self.path.name}: written"
        terminalreporter.write_line(said)

    def counts(self) -> dict[str, object]:
        """Seconds so far, numbers by outcome, the failed tests, and the skipped ones with their reasons."""
        named = {kind: [test for test, one in self.outcomes.items() if one == kind] for kind in ("failed", "skipped")}
        return {
            "seconds": round(time.monotonic() - self.began, 1),
            "passed": len(self.outcomes) - len(named["failed"]) - len(named["skipped"]),
            "failed": len(named["failed"]),
            "skipped": len(named["skipped"]),
            "failures": named["failed"],
            "skips": [{"test": test, "reason": self.reasons[test]} for test in named["skipped"]],
        }
