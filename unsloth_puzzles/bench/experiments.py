"""One policy for everything that a notebook tries: record it, name what failed, go on.

`watch()` applies it to every later cell. An exception is printed as `FAILED: <reason>` and kept in `failures`; the cell
ends, names that it had bound to new data are deleted, and the next cell runs. An interrupt still stops the notebook. A
cell says every 25 seconds that it is at work. `judge()` keeps failed checks in `failures` as well.
"""

import gc
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch

from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.record import Measurements

QUIET_SECONDS = 25.0
_WHOLE = (ModuleType, FunctionType, BuiltinFunctionType, type)  # what an import or a definition has made

failures: list[tuple[str, str]] = []  # (a cell's first line of code, an experiment or a case; the reason), in order


def watch(quiet_seconds: float = QUIET_SECONDS) -> None:
    """Apply the policy to the cells that follow in this IPython shell. A second call changes nothing.

    Args:
        quiet_seconds: How often a cell says that it is at work; 0 for never.

    Raises:
        RuntimeError: This is no IPython shell.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise RuntimeError("watch must be called in an IPython shell, got none")
    if not hasattr(shell, "_unsloth_puzzles_watch"):
        shell._unsloth_puzzles_watch = _Watch(shell, quiet_seconds)


def judge(results: Measurements, case: str, checks: Mapping[str, bool]) -> None:
    """Record the share of checks that hold under the metric "checks_passed". Print and record those that fail.

    Args:
        results: Gets the record.
        case: Its case.
        checks: Whether each holds, by name.

    Raises:
        ValueError: There is no check. What was not checked has not passed.
    """
    if not checks:
        raise ValueError(f"checks must not be empty, got none for {case!r}")
    wrong = [name for name, good in checks.items() if not good]
    results.add("checks_passed", case, (len(checks) - len(wrong)) / len(checks), "fraction")
    print(f"{case}: {len(checks) - len(wrong)} of {len(checks)} checks passed", *wrong, sep="\n  FAILED: ")
    if wrong:
        failures.append((case, f"{len(wrong)} of {len(checks)} checks failed: {'; '.join(wrong)}"))


def failed(name: str, reason: object) -> None:
    """Say and record that an experiment has failed, for a cell that goes on with its others.

    Args:
        name: Of the experiment.
        reason: A text, or the exception.
    """
    if isinstance(reason, BaseException):
        reason = f"{type(reason).__name__}: {(str(reason).strip() or 'no message').splitlines()[0]}"
    print(f"FAILED: {name}: {reason}")
    failures.append((name, str(reason)))


def report() -> str:
    """Everything that raised an error or failed a check, a Markdown line each."""
    if not failures:
        return "Errors and failed checks: none."
    return "\n".join(["Errors and failed checks:", "", *(f"- `{where}`: {reason}" for where, reason in failures)])


def free_memory() -> None:
    """Give back to the GPU what no object holds any more; the frames of the last error hold objects, too."""
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    gc.collect()
    if torch.cuda.is_available():
        # A workspace of cuBLAS may lie in the middle of a gigabyte that could be given back without it.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()


class _Watch:
    """The hooks in an IPython shell."""

    def __init__(self, shell, quiet_seconds: float):
        self.shell, self.quiet_seconds = shell, quiet_seconds
        self.cell, self.names, self.timer = "", frozenset(), None
        shell.events.register("pre_run_cell", self.before)
        shell.events.register("post_run_cell", self.after)
        shell.set_custom_exc((Exception,), self.failed)

    def before(self, info) -> None:
        source = getattr(info, "raw_cell", "") or ""
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith(("#", "import", "from"))]
        self.cell = lines[0].strip()[:80] if lines else ""
        self.names = frozenset(self.shell.user_ns)
        self.timer = _Heartbeat(self.quiet_seconds) if self.quiet_seconds else None

    def after(self, result) -> None:
        if self.timer is not None:
            self.timer.stop()
            self.timer = None
        if isinstance(result.error_in_exec, KeyboardInterrupt):
            child.end_all()  # those that other threads wait for
        elif isinstance(result.error_in_exec, Exception):
            result.error_in_exec = None  # said, and recorded: the notebook goes on
            free_memory()

    def failed(self, shell, kind, error, trace, tb_offset=None) -> None:
        """Called by IPython in place of its traceback."""
        frames = traceback.extract_tb(trace)
        where = next((f"{frame.filename}:{frame.lineno}" for frame in reversed(frames)), "")
        reason = f"{kind.__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        print(f"FAILED: {self.cell}\n  {reason}\n  at {where}; the run goes on")
        failures.append((self.cell, reason))
        traceback.clear_frames(trace)
        for name in set(shell.user_ns) - self.names:  # no later cell may use what a failed cell left incomplete
            if not name.startswith("_") and not isinstance(shell.user_ns[name], _WHOLE):
                del shell.user_ns[name]


class _Heartbeat:
    """Says every `seconds` that the cell is at work, from a thread, until it is stopped."""

    def __init__(self, seconds: float):
        self._done, self._seconds = threading.Event(), seconds
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start = time.monotonic()
        while not self._done.wait(self._seconds):
            print(f"... at work for {time.monotonic() - start:.0f} s", flush=True)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
