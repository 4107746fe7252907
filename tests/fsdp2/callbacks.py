"""What tests do inside a run of the training script. Each rank makes one of these."""

import contextlib
import json
import os
import signal
from pathlib import Path

import torch
from transformers import TrainerCallback

from benchmarks.fsdp2.collectives import SCATTER, counted

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


class Count(TrainerCallback):
    """Each rank writes how many reduce-scatters each micro-batch has started."""

    def __init__(self):
        self.counts, self.stack = [], contextlib.ExitStack()
        self.started = self.stack.enter_context(counted(SCATTER))

    def on_substep_end(self, args, state, control, **kwargs):  # of every micro-batch but the last
        self.counts.append(len(self.started))
        self.started.clear()

    on_pre_optimizer_step = on_substep_end

    def on_train_end(self, args, state, control, **kwargs):
        self.stack.close()
        Path(f"counts{RANK}.json").write_text(json.dumps(self.counts))


class Kill(TrainerCallback):
    """The process dies in step 4, between the backward and the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
