"""The lean Trainer trains as transformers' Trainer does, with fewer walks over the modules."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from benchmarks.lean_trainer import LeanTrainer


class Regression(nn.Module):
    """A line through points, with dropout and a count of the calls of `train`."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout, self.calls = nn.Linear(4, 1), nn.Dropout(0.5), 0

    def forward(self, x, labels):
        return {"loss": (self.dropout(self.layer(x)).squeeze(-1) - labels).square().mean()}

    def train(self, mode=True):
        self.calls += 1
        return super().train(mode)


def numbers(log: list[dict]) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in log]


def trained(kind: type, folder, steps: int = 4, **settings) -> tuple[Regression, list[dict]]:
    torch.manual_seed(0)
    model, rows = Regression(), [{"x": torch.randn(4), "labels": torch.randn(())} for _ in range(16)]
    model.eval()
    arguments = TrainingArguments(
        str(folder), max_steps=steps, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, **settings
    )
    trainer = kind(model, arguments, train_dataset=rows)
    model.calls = 0
    trainer.train()
    return model, [entry for entry in trainer.state.log_history if "grad_norm" in entry]


def test_losses_and_weights_are_those_of_transformers_trainer(tmp_path) -> None:
    (ours, our_log), (theirs, their_log) = trained(LeanTrainer, tmp_path), trained(Trainer, tmp_path)
    assert [(one["loss"], one["grad_norm"]) for one in our_log] == [
        (one["loss"], one["grad_norm"]) for one in their_log
    ]
    assert torch.equal(ours.layer.weight, theirs.layer.weight)


def test_train_is_called_once_and_not_in_each_step(tmp_path) -> None:
    """A model that begins in evaluation mode is trained with its dropout."""
    (ours, _), (theirs, _) = trained(LeanTrainer, tmp_path, steps=6), trained(Trainer, tmp_path, steps=6)
    assert theirs.calls - ours.calls == 5
    assert ours.dropout.training and "train" not in vars(ours)


def test_an_error_in_a_step_gives_the_model_its_train_back(tmp_path) -> None:
    class Failing(Regression):
        def forward(self, x, labels):
            if self.layer.weight.grad is None and self.calls > 99:
                raise RuntimeError("no")
            return super().forward(x, labels)

    torch.manual_seed(0)
    model = Failing().train()
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = LeanTrainer(model, arguments, train_dataset=[{"x": torch.randn(4), "labels": torch.randn(())}])
    model.calls = 100
    with pytest.raises(RuntimeError, match="no"):
        trainer.train()
    assert "train" not in vars(model)


def test_evaluation_between_steps_is_refused(tmp_path) -> None:
    arguments = TrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="eval_strategy must be 'no'"):
        LeanTrainer(Regression(), arguments, train_dataset=[], eval_dataset=[])
