"""Time and peak memory of each section of the notebook, beside the least time of a T4 for the work that was counted.

section.start("A. NF4 to Triton")
...                                   # the timing functions call section.work()
section.finish()                      # prints
"""

import time
from dataclasses import dataclass

from unsloth_puzzles.bench import memory, t4
from unsloth_puzzles.bench.markdown import table


@dataclass
class Section:
    """A section's account: wall seconds, peak bytes of this process (None without a GPU), work counted, T4 seconds."""

    title: str
    started: float
    seconds: float | None = None
    peak_bytes: int | None = None
    bytes: float = 0
    flops: float = 0
    t4_seconds: float = 0

    def cells(self) -> tuple[str, str, str, str]:
        """Title, time, peak and prediction as text."""
        peak = "not measured (no GPU)" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB"
        predicted = f"{self.t4_seconds:.1f} s" if self.t4_seconds else "none counted"
        return self.title, f"{self.seconds:.1f} s", peak, predicted


_open: Section | None = None
_finished: dict[str, Section] = {}  # by title: a section run again replaces itself


def start(title: str) -> None:
    """Open a section, and finish the one still open."""
    global _open
    if _open:
        finish()
    memory.restart_highest()
    _open = Section(title, time.perf_counter())


def work(bytes: float = 0, flops: float = 0, *, flops_rate: float = t4.FP16_TENSOR_FLOPS) -> None:
    """Count work done on the GPU. Without an open section it is forgotten.

    Each call adds max(bytes / bandwidth, flops / rate) to the prediction: one piece of work does not overlap with the
    next.

    Args:
        bytes: Bytes moved.
        flops: FLOPs done.
        flops_rate: FLOP/s of a T4 for them: `t4.FP32_FLOPS` for float32 and for a Triton dot.
    """
    seconds = t4.t4_seconds(bytes, flops, flops_rate=flops_rate)
    if _open:
        _open.bytes += bytes
        _open.flops += flops
        _open.t4_seconds += seconds


def finish() -> Section:
    """Close the open section, print its line and return it.

    Raises:
        RuntimeError: No section is open.
    """
    global _open
    if not _open:
        raise RuntimeError("start(title) must be called before finish, got no open section")
    done, _open = _open, None
    done.seconds = time.perf_counter() - done.started
    done.peak_bytes = memory.highest_since_restart()
    _finished[done.title] = done
    title, seconds, peak, predicted = done.cells()
    bound = f"; lower bound on a T4: {predicted} ({t4.LABEL})" if done.t4_seconds else ""
    print(f"[{title}] {seconds}, GPU peak of this process: {peak}{bound}")
    return done


def summary() -> str:
    """All finished sections as a Markdown table."""
    import pandas  # here: every process that measures imports this module

    columns = ["section", "time", "GPU peak, this process", f"lower bound on a T4, {t4.LABEL}"]
    return table(pandas.DataFrame([done.cells() for done in _finished.values()], columns=columns))
