"""Time and peak memory of each section of the notebook.

section.start("A. NF4 to Triton")
...
section.finish()                      # prints
"""

import time
from dataclasses import dataclass

from unsloth_puzzles.bench import memory
from unsloth_puzzles.bench.markdown import table


@dataclass
class Section:
    """A section's account: wall seconds, and peak bytes of this process (None without a GPU)."""

    title: str
    started: float
    seconds: float | None = None
    peak_bytes: int | None = None

    def cells(self) -> tuple[str, str, str]:
        """Title, time and peak as text."""
        peak = "not measured (no GPU)" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.2f} GiB"
        return self.title, f"{self.seconds:.1f} s", peak


_open: Section | None = None
_finished: dict[str, Section] = {}  # by title: a section run again replaces itself


def start(title: str) -> None:
    """Open a section, and finish the one still open."""
    global _open
    if _open:
        finish()
    memory.restart_highest()
    _open = Section(title, time.perf_counter())


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
    title, seconds, peak = done.cells()
    print(f"[{title}] {seconds}, GPU peak of this process: {peak}")
    return done


def summary() -> str:
    """All finished sections as a Markdown table."""
    import pandas  # here: every process that measures imports this module

    columns = ["section", "time", "GPU peak, this process"]
    return table(pandas.DataFrame([done.cells() for done in _finished.values()], columns=columns))
