"""Random numbers that a computation drew, drawn again when it is done again."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class RandomStates:
    """States of the CPU's generator and of the device's, by name of what drew from them.

    Args:
        device: Where else than on the CPU numbers may be drawn.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._states: dict[Hashable, list[torch.Tensor]] = {}

    def record(self, name: Hashable) -> None:
        """Note the present states."""
        self._states[name] = self._present()

    def moved(self, name: Hashable) -> bool:
        """Whether any numbers have been drawn since `name` was noted."""
        return not all(map(torch.equal, self._states[name], self._present()))

    @contextmanager
    def replay(self) -> Iterator[Callable[[Hashable], None]]:
        """Gives a function that sets a state; when left, the generators are as they were before."""

        def at(name: Hashable) -> None:
            cpu, *gpu = self._states[name]
            torch.set_rng_state(cpu)
            for state in gpu:
                torch.cuda.set_rng_state(state, self.device)

        with torch.random.fork_rng(devices=self._gpus()):
            yield at

    def _present(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus())]

    def _gpus(self) -> list[torch.device]:
        """Those with a generator. A graph under capture keeps its own count of random numbers, which cannot be read."""
        return [self.device] if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing() else []
