"""transformers' Trainer without its two walks over all modules at each step.

The Trainer puts every module in training mode and counts all parameters, for the FLOPs that it logs. A model of 30
layers with LoRA on all linear layers has 2500 modules: both walks take a fifth of the host's time of a step, and a
small model waits for the host.
"""

from transformers import Trainer


class LeanTrainer(Trainer):
    """A Trainer that logs no FLOPs and finds the model in training mode from the second step on.

    Evaluation between the steps is not supported: it would leave the model in evaluation mode.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.eval_strategy != "no":
            raise ValueError(f"args.eval_strategy must be 'no', got {self.args.eval_strategy!r}")

    def floating_point_ops(self, inputs: dict) -> int:
        """0: not counted."""
        return 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As Trainer's, but `model.train()` is called only where `model` is not in training mode."""
        if not model.training:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train = lambda mode=True: model
        try:
            return super().training_step(model, inputs, num_items_in_batch)
        finally:
            del model.train
