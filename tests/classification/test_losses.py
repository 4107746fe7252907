"""Losses are PyTorch's, micro-batches add up, classes weigh what they should, and bad labels are refused."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification

from tests.classification.models import LABELS, batch, classifier
from unsloth_puzzles.classification.losses import (
    MULTI,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE,
    check_labels,
    class_weights,
    classification_loss,
    weigh_classes,
)

WEIGHTS = torch.tensor([0.5, 1.0, 3.0])


def _case(problem_type):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    if problem_type == SINGLE:
        return logits, torch.tensor([0, 2, 1, -100, 2, 0])
    if problem_type == MULTI:
        return logits, torch.randint(2, (6, 3), generator=generator)
    return logits, torch.randn(6, 3, generator=generator, dtype=torch.float64)


def test_values_are_those_of_pytorch():
    logits, labels = _case(SINGLE)
    expected = F.cross_entropy(logits, labels)
    assert (classification_loss(logits, labels, SINGLE) - expected).abs() <= 1e-15
    logits, labels = _case(MULTI)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double())
    assert (classification_loss(logits, labels, MULTI) - expected).abs() <= 1e-15
    logits, labels = _case(REGRESSION)
    assert (classification_loss(logits, labels, REGRESSION) - F.mse_loss(logits, labels)).abs() <= 1e-15
    one = logits[:, :1]
    expected = F.mse_loss(one.squeeze(), labels[:, 0])
    assert (classification_loss(one, labels[:, 0], REGRESSION) - expected).abs() <= 1e-15


@pytest.mark.parametrize("number", [257.0, 257, torch.tensor(257), torch.tensor(257.0)], ids=repr)
def test_the_divisor_is_not_rounded_to_the_default_dtype(number):
    logits, labels = _case(SINGLE)
    logits = logits.float()
    expected = F.cross_entropy(logits, labels, reduction="sum") / 257
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = classification_loss(logits, labels, SINGLE, num_items_in_batch=number)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_values_with_weights():
    logits, labels = _case(SINGLE)
    expected = F.cross_entropy(logits, labels, WEIGHTS.double(), reduction="sum") / 5  # of labels, not of weights
    assert (classification_loss(logits, labels, SINGLE, WEIGHTS) - expected).abs() <= 1e-15
    logits, labels = _case(MULTI)
    expected = F.binary_cross_entropy_with_logits(logits, labels.double(), pos_weight=WEIGHTS.double())
    assert (classification_loss(logits, labels, MULTI, WEIGHTS) - expected).abs() <= 1e-15


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("given", [int, torch.tensor])
def test_micro_batches_add_up(problem_type, given):
    logits, labels = _case(problem_type)
    weights = None if problem_type == REGRESSION else WEIGHTS
    whole = classification_loss(logits, labels, problem_type, weights)
    number = given(int(labels.ne(-100).sum()))
    parts = [
        classification_loss(logits[rows], labels[rows], problem_type, weights, number)
        for rows in (slice(0, 1), slice(1, 6))
    ]
    assert (sum(parts) - whole).abs() <= 1e-15 * whole.abs() * 4


@pytest.mark.parametrize("problem_type", [MULTI, REGRESSION])
def test_missing_labels_do_not_count(problem_type):
    logits, labels = _case(problem_type)
    labels = labels.double()
    known = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    found = classification_loss(logits.requires_grad_(), labels.where(known, -100), problem_type)
    expected = sum(
        classification_loss(logits[row, column].reshape(1, 1), labels[row, column].reshape(1, 1), problem_type)
        for row, column in known.nonzero().tolist()
    )
    assert (found - expected / known.sum()).abs() <= 1e-14
    found.backward()
    assert torch.equal(logits.grad != 0, known)


@pytest.mark.parametrize("number", [None, 0, torch.tensor(0), 3, torch.tensor(3)], ids=str)
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("rows", [6, 0])
def test_without_a_label_that_counts_loss_and_gradients_are_zero(problem_type, number, rows):
    logits, labels = _case(problem_type)
    logits, labels = logits[:rows].requires_grad_(), torch.full_like(labels[:rows], -100)
    weights = None if problem_type == REGRESSION else WEIGHTS
    loss = classification_loss(logits, labels, problem_type, weights, number)
    loss.backward()
    assert loss.shape == () and loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_model_without_labels_that_count_keeps_its_weights(checkpoint):
    model, tokenizer = classifier(checkpoint)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    loss = model(**batch(tokenizer), labels=torch.full((3,), -100)).loss
    loss.backward()
    torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1.0).step()
    assert loss == 0 and all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_logits_are_upcast(dtype):
    logits, labels = _case(SINGLE)
    found = classification_loss(logits.to(dtype), labels, SINGLE)
    assert torch.equal(found, classification_loss(logits.to(dtype).float(), labels, SINGLE))
    assert found.dtype == torch.float32


def test_class_weights_balance_the_classes():
    labels = [0] * 6 + [1] * 3 + [2] + [-100]
    weights = class_weights(labels, 3)
    assert torch.allclose(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    assert weights.dtype == torch.float32 and weights[torch.tensor(labels[:-1])].mean().item() == pytest.approx(1)
    several = torch.tensor([[1, 0], [0, 1], [0, 1], [0, -100]])
    assert class_weights(several, 2).tolist() == [3.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_class_weights_do_not_depend_on_the_default_dtype(dtype):
    labels, several = (
        [0, 0, 0, 1, 1, 2, 2],
        [[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 1, 0]],
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = class_weights(labels, 3), class_weights(several, 3)
    finally:
        torch.set_default_dtype(before)
    expected = [7 / 9, 7 / 6, 7 / 6], [5 / 2, 2 / 5, 5 / 2]
    for weights, exact in zip(found, expected, strict=True):
        assert weights.dtype == torch.float32
        assert torch.equal(weights, torch.tensor(exact, dtype=torch.float64).float())


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, 1], r"labels must have an example of each class, got none of \[2\]"),
        ([0, 1, 3], "labels must be from 0 to 2, got 0 to 3"),
        ([-1, 1, 2], "labels must be from 0 to 2, got -1 to 2"),
        ([-100], r"labels must have an example of each class, got none of \[0, 1, 2\]"),
        ([0.0, 1.0], r"labels must be \[examples\] integers or .*, got torch.float32 of shape \(2,\)"),
        ([[0, 1]], r"labels must be \[examples\] integers or .*, got torch.int64 of shape \(1, 2\)"),
        ([[0, 1, 2]], "labels must be 0, 1 or -100 for several labels at once"),
    ],
)
def test_class_weights_of_bad_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        class_weights(labels, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int64, bool])
def test_class_weights_of_arrays_of_any_integers(dtype):
    number = 2 if dtype is bool else 100 if dtype is np.int8 else 200  # -100 is 156 in uint8
    labels = np.arange(number).astype(dtype)
    assert class_weights(labels, number).tolist() == [1.0] * number
    assert class_weights(torch.from_numpy(labels), number).tolist() == [1.0] * number


@pytest.mark.parametrize("labels", [["a", "b"], [0, 1, None], [[0, 1], [1]], object()])
def test_class_weights_of_what_is_no_number_are_refused(labels):
    with pytest.raises(TypeError, match=r"^labels must be numbers of classes, "):
        class_weights(labels, 2)


def test_weights_go_into_the_loss_and_out_again(checkpoint):
    model, tokenizer = classifier(checkpoint)
    given = {**batch(tokenizer), "labels": torch.tensor([0, 1, 2])}
    plain = model(**given)
    weigh_classes(model, WEIGHTS)
    weighted = model(**given)
    expected = F.cross_entropy(weighted.logits, given["labels"], WEIGHTS, reduction="sum") / 3
    assert torch.equal(weighted.logits, plain.logits)
    assert (weighted.loss - expected).abs() <= 1e-6 * expected < (plain.loss - expected).abs()
    weigh_classes(model, None)
    assert torch.equal(model(**given).loss, plain.loss)


@pytest.mark.parametrize(
    "problem_type, weights, message",
    [
        (SINGLE, [1.0, 1.0], r"class_weight must have shape \(3,\), got \(2,\)"),
        (SINGLE, [1.0, 0.0, 1.0], "class_weight must be positive and finite"),
        (MULTI, [1.0, float("inf"), 1.0], "class_weight must be positive and finite"),
        (REGRESSION, [1.0, 1.0, 1.0], "class_weight must be None for a regression"),
    ],
)
def test_bad_weights_are_refused(checkpoint, problem_type, weights, message):
    model, _ = classifier(checkpoint, LABELS, problem_type, adapters=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        weigh_classes(model, weights)


@pytest.mark.parametrize("problem_type", [None, "multi_label", "causal"])
def test_a_kind_of_problem_that_is_not_known_has_no_loss(problem_type):
    logits, labels = _case(SINGLE)
    message = f"^problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}$"
    with pytest.raises(ValueError, match=message):
        classification_loss(logits, labels, problem_type)


def test_other_models_are_not_given_weights(checkpoint):
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    with pytest.raises(TypeError, match=r"^model must be what load_classifier or add_adapters returns, got a LlamaFor"):
        weigh_classes(plain, WEIGHTS)


@pytest.mark.parametrize(
    "problem_type, number, labels, error, message",
    [
        (SINGLE, 3, torch.zeros(4), TypeError, "labels must be integers for single_label"),
        (SINGLE, 3, torch.zeros(4, 3).long(), ValueError, r"labels must have shape \(4,\) or \(4, 1\)"),
        (SINGLE, 3, torch.zeros(5).long(), ValueError, r"labels must have shape \(4,\) or .*, got \(5,\)"),
        (MULTI, 3, torch.zeros(4), ValueError, r"labels must have shape \(4, 3\) for multi_label.*, got \(4,\)"),
        (MULTI, 1, torch.zeros(4, 3), ValueError, r"labels must have shape \(4, 1\) or \(4,\)"),
        (REGRESSION, 4, torch.zeros(4), ValueError, r"labels must have shape \(4, 4\)"),  # would be broadcast
        (REGRESSION, 1, torch.zeros(1, 4), ValueError, r"labels must have shape \(4, 1\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(problem_type, number, labels, error, message):
    with pytest.raises(error, match=f"^{message}"):
        check_labels(labels, torch.zeros(4, number), problem_type)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_models_check_their_labels(checkpoint, problem_type):
    model, tokenizer = classifier(checkpoint, LABELS, problem_type)
    with pytest.raises(ValueError, match=r"^labels must have shape"):
        model(**batch(tokenizer), labels=torch.zeros(2).long())


@pytest.mark.slow  # Inductor writes ten losses, and 168 kernels are built
@pytest.mark.skipif(
    not torch.__version__.startswith("2.11."), reason="reads the code that torch 2.11's Inductor writes"
)
def test_inductors_kernels_build_for_gpus_in_tiles_of_any_size():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.classification.loss_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "FAILED" not in done.stdout, done.stdout
    assert "168 kernels built" in done.stdout
