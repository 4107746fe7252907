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
_LINES = 200  # of the output, kept for the reason of a failure
_running: set[subprocess.Popen] = set()


class ChildError(RuntimeError):
    """The process failed or took too long. The message is the reason in one line; `output` the end of what it said."""

    def __init__(self, reason: str, output: str):
        super().__init__(reason)
        self.output = output


def environment(*first: str, without: tuple[str, ...] = (), **extra: str) -> dict[str, str]:
    """Variables for `subprocess.run`: `first` before this process's import path, `without` removed, `extra` added."""
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
    """Run `python -m module arguments` and return its output, standard error included, a line each.

    Args:
        module: Its name; it is imported from where this process imports.
        arguments: Its command line.
        timeout: Seconds, after which it is killed with all that it has started.
        env: Its variables, by default `environment()`.
        gpu_gib: GPU memory that PyTorch may use there; by default what is left of this process's limit, if it has one.
        under: A program with its options that is to run the command, such as a sanitizer.
        show: Is given each line when it comes, and after `quiet_seconds` of silence a word that the process is at work.

    Raises:
        ChildError: It returned another status than 0, or took longer than `timeout`.

    However this function ends, an interrupt included, the process has ended, too.
    """
    command = [*under, sys.executable, "-u", "-m", __name__, module, *arguments]
    env = {**(environment() if env is None else env), **_gpu_share(gpu_gib)}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    lines: list[str] = []
    last = [time.monotonic()]

    def read() -> None:
        for line in process.stdout:
            last[0] = time.monotonic()
            lines.append(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    started, shown = time.monotonic(), 0
    try:
        while True:
            reader.join(0.2)
            while shown < len(lines):
                if show:
                    show(lines[shown])
                shown += 1
            if not reader.is_alive() or (process.poll() is not None and _is_done(reader)):
                break
            now = time.monotonic()
            if now - started > timeout:
                raise ChildError(f"{module} took longer than {timeout:.0f} s", "\n".join(lines[-_LINES:]))
            if show and now - last[0] > quiet_seconds:
                show(f"... {module.rpartition('.')[2]} at work for {now - started:.0f} s")
                last[0] = now
        status = process.wait(max(1.0, timeout - (time.monotonic() - started)))
    except subprocess.TimeoutExpired:
        raise ChildError(f"{module} took longer than {timeout:.0f} s", "\n".join(lines[-_LINES:])) from None
    finally:
        _kill(process)
        _running.discard(process)
        reader.join(5)
    for line in lines[shown:] if show else ():
        show(line)
    if status:
        said = [line for line in lines if line.strip()]
        reason = said[-1] if said else "it said nothing"
        raise ChildError(f"{module} ended with status {status}: {reason}", "\n".join(lines[-_LINES:]))
    return lines


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


def _die_with_parent() -> None:
    """Let Linux kill this process when its parent is killed, which could not do it any more."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _gpu_share(gib: float | None) -> dict[str, str]:
    """The variable that caps the process: at `gib`, or where this process is capped at what it leaves of that."""
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


def _is_done(reader: threading.Thread) -> bool:
    """Whether nothing more is to be read from a process that has ended; what it has started may hold the pipe open."""
    reader.join(1)
    return True


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
