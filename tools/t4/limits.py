"""What a process tree may use of memory, cores and time, and the variables that make it a rehearsal."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from unsloth_puzzles.device import REHEARSAL

GPU_GIB = 14.5  # of all processes with their contexts
RAM_GB = 12.0
SECONDS = 600.0
SILENCE = 30.0
HOOK = Path(__file__).parent / "hook"


class Watcher:
    """Samples the children of this process in a thread, and kills them when their time is up.

    Args:
        seconds: Their time.
        gpu: Which GPU, as nvidia-smi numbers them.
        interval: Seconds between samples.
        where: Names what is going on.

    Attributes:
        gpu_gib: Peak of the GPU's memory beyond what was in use before, GiB.
        ram_gb: Peak of the RAM of all children that cannot be given back, GB.
        ram_where: What was going on at that peak.
        killed: Whether the time was up.
    """

    def __init__(
        self, seconds: float = SECONDS, gpu: int = 0, interval: float = 1.0, where: Callable[[], str] = lambda: ""
    ):
        self.gpu_gib = self.ram_gb = 0.0
        self.ram_where, self._where = "", where
        self.killed, self._seconds, self._interval = False, seconds, interval
        self._gpu, self._before, self._done = gpu, gpu_gib_in_use(gpu) or 0.0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._done.wait(self._interval):
            children = psutil.Process().children(recursive=True)
            if (ram_gb := sum(map(ram_bytes, children)) / 1e9) > self.ram_gb:
                self.ram_gb, self.ram_where = ram_gb, self._where()
            if (used := gpu_gib_in_use(self._gpu)) is not None:
                self.gpu_gib = max(self.gpu_gib, used - self._before)
            if time.monotonic() - began > self._seconds:
                self.killed = True
                for process in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                return


@contextlib.contextmanager
def environment(record: Path, caches: Path, gpu: int):
    """Set the variables of the kernel and of all that it starts, and restore them at the end.

    Args:
        record: An existing folder, to which the hook in every Python process writes.
        caches: A folder for what Triton and Inductor compile.
        gpu: The only GPU that can be seen.
    """
    before = dict(os.environ)
    config = record / "kineto.conf"
    config.write_text("ACTIVITIES_MAX_GPU_BUFFER_SIZE_MB=2048\n")
    os.environ |= {
        REHEARSAL: "T4",
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "T4_RECORD": str(record.resolve()),
        "PYTHONPATH": os.pathsep.join([str(HOOK), *filter(None, [before.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "KINETO_CONFIG": str(config),
        "KINETO_LOG_LEVEL": "5",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextlib.contextmanager
def two_cores():
    """The main thread, and processes that it starts, on two cores; threads that run already keep theirs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ram_bytes(process: psutil.Process) -> int:
    """A process's share of the RAM that cannot be given back: without pages of files, such as those of libraries.

    Pages that it shares with others are divided among them. Where Linux does not tell, all its pages are counted.
    """
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        kept = [line.split()[1] for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        return sum(map(int, kept)) * 1024 if kept else process.memory_info().rss
    except (OSError, psutil.Error):
        return 0


def gpu_gib_in_use(gpu: int) -> float | None:
    """Memory in use on a GPU, by whomever; None if nvidia-smi is not there."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        return float(done.stdout.split()[0]) / 1024
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
