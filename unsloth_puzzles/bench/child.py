"""A process of its own for what would disturb this one: an environment that imports from where this one does."""

import os
import sys


def environment(*first: str, without: tuple[str, ...] = (), **extra: str) -> dict[str, str]:
    """Variables for `subprocess.run`: `first` before this process's import path, `without` removed, `extra` added."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    path = [*first, *(entry or os.getcwd() for entry in sys.path)]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), **extra}
