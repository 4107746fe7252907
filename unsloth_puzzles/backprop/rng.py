"""Random numbers that a computation drew, drawn again when it is done again."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class RandomStates:
    """States of the CPU's generator and of the device's, by name of what drew from them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._states: dict[Hashable, tuple] = {}

    def record(self, name: Hashable) -> None:
        """Note the present states."""
        # A graph under capture keeps its own count of random numbers, which cannot be read.
        gpu = self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
        self._states[name] = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if gpu else None

    @contextmanager
    def replay(self) -> Iterator[Callable[[Hashable], None]]:
        """Gives a function that sets a state; when left, the generators are as they were before."""

        def at(name: Hashable) -> None:
            cpu, gpu = self._states[name]
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, self.device)

        devices = [self.device] if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing() else []
        with torch.random.fork_rng(devices=devices):
            yield at
