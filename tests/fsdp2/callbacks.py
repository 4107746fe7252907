"""What tests do inside a run of the training script. Each rank makes one of these."""

import os
import signal

import torch
from transformers import TrainerCallback

RANK = int(os.environ.get("RANK", 0))


class Fail(TrainerCallback):
    """The last of two ranks fails in the second step; the first one waits for it in a collective."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and RANK == 1:
            raise ValueError("this rank cannot read its rows")


class Logits(TrainerCallback):
    """Each rank writes the logits of the trained model for the same tokens."""

    def on_train_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            found = model.eval()(input_ids=torch.arange(20)[None]).logits
        torch.save(found, f"logits{RANK}.pt")


class Kill(TrainerCallback):
    """The process dies in step 4, between the backward and the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
