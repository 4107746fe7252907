"""Under transformers' Trainer a step is the same however its batch is cut, for each kind of problem."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from tests.classification.models import LABELS, classifier, with_adapters
from unsloth_puzzles.classification.losses import MULTI, REGRESSION, SINGLE, weigh_classes

TEXTS = ["red", "green as grass", "blue", "a sea", "it burns", "leaves of a tree", "the sky", "wine"]


def _rows(tokenizer, problem_type):
    generator = torch.Generator().manual_seed(0)
    labels = {
        SINGLE: torch.randint(3, (8,), generator=generator),
        MULTI: torch.randint(2, (8, 3), generator=generator).float(),
        REGRESSION: torch.randn(8, 3, generator=generator),
    }[problem_type].tolist()
    return [{"input_ids": tokenizer(text)["input_ids"], "labels": one} for text, one in zip(TEXTS, labels, strict=True)]


def _train(model, tokenizer, rows, folder, size, parts, steps=2):
    """Losses, as logged, and the gradient norm of the first step."""
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=size, gradient_accumulation_steps=parts, logging_steps=1,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=1e9, save_strategy="no",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in logged])


@pytest.mark.parametrize(
    "problem_type, weighted",
    [
        (SINGLE, True),
        (REGRESSION, False),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((SINGLE, False), (MULTI, False), (MULTI, True))),
    ],
)
def test_accumulated_steps_are_whole_steps(checkpoint, problem_type, weighted, tmp_path):
    found = []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        model, tokenizer = classifier(checkpoint, LABELS, problem_type)
        if weighted:
            weigh_classes(model, torch.tensor([0.5, 1.0, 4.0]))
        found.append(_train(model, tokenizer, _rows(tokenizer, problem_type), tmp_path, size, parts))
    whole = found[0]
    for accumulated in found[1:]:
        assert ((accumulated - whole).abs() <= 2e-5 * whole).all(), (accumulated, whole)


def test_transformers_alone_adds_up_means(checkpoint, tmp_path):
    """If this fails, transformers divides by `num_items_in_batch` itself, and ours is not needed for that any more."""
    found = []
    for size, parts in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, pad_token_id=2)
        _, tokenizer = classifier(checkpoint, adapters=False)
        found.append(_train(model, tokenizer, _rows(tokenizer, SINGLE), tmp_path, size, parts, steps=1)[0])
    assert found[1][0] > 3.9 * found[0][0] and found[1][1] > 2 * found[0][1]


def test_evaluation_and_metrics(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint)
    rows = _rows(tokenizer, SINGLE)
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3)
    trainer = Trainer(
        model, arguments, eval_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"right": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )  # fmt: skip
    found = trainer.evaluate()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    assert found["eval_right"] == (logits.argmax(-1) == labels).float().mean().item()
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_with_weights_is_refused(checkpoint, tmp_path):
    model, tokenizer = classifier(checkpoint, adapters=False)
    model = with_adapters(model)
    weigh_classes(model, torch.tensor([0.5, 1.0, 4.0]))
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, label_smoothing_factor=0.1)
    rows = _rows(tokenizer, SINGLE)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithPadding(tokenizer))
    with pytest.raises(ValueError, match=r"^labels must be given where classes have weights, got none"):
        trainer.train()
