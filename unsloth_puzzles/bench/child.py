"""A process of its own for what would disturb this one: it imports from where this one does, and ends with it.

python -m unsloth_puzzles.bench.child MODULE ARGUMENTS    what `run` starts: MODULE, held to its parent's GPU memory
"""

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from unsloth_puzzles.bench.t4 import CONTEXT_GIB

GPU_SHARE = "UNSLOTH_PUZZLES_GPU_SHARE"  # of the GPU's memory, which the process may use
QUIET_SECONDS = 25.0
_LINES = 200  # of the end of the output, which an error keeps
_running: set[subprocess.Popen] = set()


class ChildError(RuntimeError):
    """The process failed or took too long. The message is the reason in one line; `output` the end of what it said."""

    def __init__(self, reason: str, output: str):
        super().__init__(reason)
        self.output = output


def environment(*first: str, without: tuple[str, ...] = (), **extra: str) -> dict[str, str]:
    """Variables for a process that imports from where this one does.

    Args:
        first: Folders to import from before all others.
        without: Variables to leave out.
        extra: Variables to add.
    """
    kept = {name: value for name, value in os.environ.items() if name not in without}
    path = [*first, *(entry or os.getcwd() for entry in sys.path)]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), **extra}


def run(
    module: str,
    *arguments: str,
    timeout: float,
    env: dict[str, str] | None = None,
    gpu_gib: float | None = None,
    under: Sequence[str] = (),
    show: Callable[[str], None] | None = print,
    quiet_seconds: float = QUIET_SECONDS,
) -> list[str]:
    """Run `python -m module arguments`. However this function ends, an interrupt included, the process has ended, too.

    Args:
        module: Its name; it is imported from where this process imports.
        arguments: Its command line.
        timeout: Seconds, after which it is killed with all that it has started.
        env: Its variables, by default `environment()`.
        gpu_gib: GPU memory that PyTorch may use there; by default what is left of this process's limit, if it has one.
            With 0 the process sees no GPU.
        under: A program with its options that is to run the command, such as a sanitizer.
        show: Is given each line when it comes, and after each `quiet_seconds` of silence a line that the process is at
            work.
        quiet_seconds: See `show`.

    Returns:
        The output, standard error included, a line each.

    Raises:
        ChildError: It returned another status than 0, or took longer than `timeout`.
    """
    command = [*under, sys.executable, "-u", "-m", __name__, module, *arguments]
    env = {**(environment() if env is None else env), **_of_gpu(gpu_gib)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    output, started = _Output(process, show or (lambda line: None)), time.monotonic()
    try:
        while not output.ended(0.2):
            output.show_new()
            now = time.monotonic()
            if now - started > timeout:
                raise ChildError(f"{module} took longer than {timeout:.0f} s", output.end())
            if now - output.last > quiet_seconds:
                output.show(f"... {module.rpartition('.')[2]} at work for {now - started:.0f} s")
                output.last = now
        status = process.wait(max(1.0, timeout - (time.monotonic() - started)))
    except subprocess.TimeoutExpired:
        raise ChildError(f"{module} took longer than {timeout:.0f} s", output.end()) from None
    finally:
        _kill(process)
        _running.discard(process)
        output.thread.join(5)
    output.show_new()
    if status:
        said = [line for line in output.lines if line.strip()]
        reason = said[-1] if said else "it said nothing"
        raise ChildError(f"{module} ended with status {status}: {reason}", output.end())
    return output.lines


def end_all() -> None:
    """End every process that `run` has started and not yet ended, from whatever thread: for an interrupt."""
    for process in list(_running):
        _kill(process)


def main(module: str, *arguments: str) -> None:
    """Run `module` as `python -m` would, with the share of the GPU's memory that the parent has set."""
    _die_with_parent()
    if share := os.environ.get(GPU_SHARE):
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(float(share))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


class _Output:
    """The lines of a process, read by a thread as they come and shown by whoever waits."""

    def __init__(self, process: subprocess.Popen, show: Callable[[str], None]):
        self.lines: list[str] = []
        self.last = time.monotonic()  # when the process said something
        self.show, self._process, self._shown = show, process, 0
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def ended(self, seconds: float) -> bool:
        """Whether nothing more is to be read, after a wait of at most `seconds`.

        A second after the end of the process that is so: what it has started may hold the pipe open.
        """
        self.thread.join(seconds)
        if self.thread.is_alive() and self._process.poll() is None:
            return False
        self.thread.join(1)
        return True

    def show_new(self) -> None:
        """Show the lines that have come since the last call."""
        while self._shown < len(self.lines):
            self.show(self.lines[self._shown])
            self._shown += 1

    def end(self) -> str:
        """The last lines, for the reason of a failure."""
        return "\n".join(self.lines[-_LINES:])

    def _read(self) -> None:
        for line in self._process.stdout:
            self.last = time.monotonic()
            self.lines.append(line.rstrip("\n"))


def _die_with_parent() -> None:
    """Let Linux kill this process when its parent is killed, which could not do it any more."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _of_gpu(gib: float | None) -> dict[str, str]:
    """The variable that caps the process: at `gib`, or where this process is capped at what it leaves of that."""
    if gib == 0:
        return {"CUDA_VISIBLE_DEVICES": "", GPU_SHARE: ""}  # nothing to cap, so PyTorch need not be imported for it
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    if gib is not None:
        return {GPU_SHARE: repr(min(1.0, gib * 2**30 / torch.cuda.mem_get_info()[1]))}
    share = torch.cuda.get_per_process_memory_fraction() if torch.cuda.is_initialized() else 1.0
    if share == 1:
        return {}
    taken = torch.cuda.memory_reserved() + CONTEXT_GIB * 2**30
    return {GPU_SHARE: repr(max(0.0, share - taken / torch.cuda.mem_get_info()[1]))}


def _kill(process: subprocess.Popen) -> None:
    """End the process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
