"""Random numbers that a computation drew, drawn again when it is done again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class RandomStates:
    """States of the CPU's generator and of the device's, one per chunk."""

    def __init__(self, device: torch.device):
        self.device = device
        self._states: list[tuple] = []

    def record(self) -> None:
        """Note the present states."""
        # A graph under capture keeps its own count of random numbers, which cannot be read.
        gpu = self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        self._states.append((torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if gpu else None))

    @contextmanager
    def replay(self) -> Iterator[Callable[[int], None]]:
        """Gives a function that sets the i-th state; when left, the generators are as they were before."""

        def at(index: int) -> None:
            cpu, gpu = self._states[index]
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, self.device)

        devices = [self.device] if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing() else []
        with torch.random.fork_rng(devices=devices):
            yield at
