"""A Trainer's progress, a short line every so often."""

import time

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
