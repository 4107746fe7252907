"""What tests do inside a run of the training script. Each rank makes one of these."""

import json
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
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


class Count(TrainerCallback):
    """Each rank writes how many reduce-scatters each micro-batch has started."""

    def __init__(self):
        self.started, self.counts, plain = 0, [], dist.reduce_scatter_tensor

        def counted(*args, **kwargs):
            self.started += 1
            return plain(*args, **kwargs)

        dist.reduce_scatter_tensor = counted

    def on_substep_end(self, args, state, control, **kwargs):  # of every micro-batch but the last
        self.counts.append(self.started)
        self.started = 0

    on_pre_optimizer_step = on_substep_end

    def on_train_end(self, args, state, control, **kwargs):
        Path(f"counts{RANK}.json").write_text(json.dumps(self.counts))


class Kill(TrainerCallback):
    """The process dies in step 4, between the backward and the optimizer."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
