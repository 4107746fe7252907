"""Progress of long work, a short line every so often."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback

SILENCE = 20  # seconds without a line of progress


class Progress(TrainerCallback):
    """Prints step and loss every `SILENCE` seconds.

    Args:
        name: Of the training.
    """

    def __init__(self, name: str):
        self._name, self._spoken = name, time.monotonic()

    def on_log(self, args, state, control, logs=None, **unused):
        if "loss" in (logs or {}) and time.monotonic() - self._spoken > SILENCE:
            self._spoken = time.monotonic()
            step = f"step {state.global_step} of {state.max_steps}"
            print(f"... {self._name}: {step}, loss {float(logs['loss']):.3f}", flush=True)


@contextmanager
def at_work(name: str, silence: float = SILENCE) -> Iterator[None]:
    """Print every `silence` seconds for how long the work named has been going on; nothing where it takes less."""
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(silence):
            print(f"... {name}: at work for {time.monotonic() - began:.0f} s", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
