"""What tests do inside a run of the training script. Each rank makes one of these."""

import os
import signal

from transformers import TrainerCallback

RANK = int(os.environ.get("RANK", 0))


class Kill(TrainerCallback):
    """The process dies in step 4, between the backward and the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
