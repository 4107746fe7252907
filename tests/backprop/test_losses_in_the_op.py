"""The losses through the op: gradcheck for every loss and every kind of head, and the puzzle's own function."""

import peft
import pytest
import torch
import torch.nn.functional as F

from tests.backprop.loss_cases import (
    CASES,
    CLASS_WEIGHT,
    EXACT,
    HIDDEN,
    IGNORED,
    TEACHER_HIDDEN,
    TEACHER_STATES,
    VOCABULARY,
    draw,
    draw_labels,
    every_loss,
    exact_log_probs,
    linear,
    relative,
    scalar,
)
from unsloth_puzzles.backprop import losses
from unsloth_puzzles.backprop.linear import MemoryEfficientLinear, memory_efficient_linear

SLOW = pytest.mark.slow


def through_the_op(hidden_states, head, labels, f, reduction="sum", **options):
    normalizer = "labels" if reduction == "sum" else None
    options = {"reduction": reduction, "normalizer": normalizer, "chunk_size": 4} | options
    return memory_efficient_linear(hidden_states, head, labels, f, **options)


def check_gradients(head, f, hidden_states=None, **options):
    """gradcheck with respect to the hidden states and all that is trained, 10 rows in chunks of 4, 4 and 2."""
    hidden_states = draw(2, 5, HIDDEN).requires_grad_() if hidden_states is None else hidden_states
    trained = [p for p in head.parameters() if p.requires_grad]

    def run(hidden_states, *trained):  # gradcheck changes the parameters in place
        return through_the_op(hidden_states, head, draw_labels(2, 5), f, **options)

    assert torch.autograd.gradcheck(run, (hidden_states, *trained))


@every_loss
def test_gradcheck_of_every_loss(name):
    f, reduction, rows, shared, _ = CASES[name]
    rows = tuple(x.view(2, 5, -1) for x in rows)
    check_gradients(linear(), f, reduction=reduction, row_args=rows, shared_args=shared)


@every_loss
def test_every_loss_through_the_op_is_that_of_the_reference(name):
    f, reduction, rows, shared, reference = CASES[name]
    head, hidden_states, labels = linear(), draw(2, 5, HIDDEN).requires_grad_(), draw_labels(2, 5)
    inputs = (hidden_states, *head.parameters())
    rows = tuple(x.view(2, 5, -1) for x in rows)
    actual = through_the_op(hidden_states, head, labels, f, reduction, row_args=rows, shared_args=shared)
    expected = reference(head(hidden_states).view(10, -1), labels.view(10))
    if reduction == "sum":
        expected = expected / (labels != IGNORED).sum()
    else:
        expected = tuple(r.view(2, 5) for r in expected) if isinstance(expected, tuple) else expected.view(2, 5)
    gradients = zip(*(torch.autograd.grad(scalar(r), inputs) for r in (actual, expected)), strict=True)
    assert relative(scalar(actual), scalar(expected)) < EXACT
    assert all(relative(a, e) < EXACT for a, e in gradients)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_a_head_with_and_without_bias(bias):
    check_gradients(linear(bias=bias), losses.cross_entropy)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_of_a_frozen_head(reduction):
    head = linear().requires_grad_(False)
    f = losses.cross_entropy if reduction == "sum" else losses.token_log_probs
    check_gradients(head, f, reduction=reduction)


def test_gradcheck_of_a_trained_bias_on_a_frozen_weight():
    head = linear()
    head.weight.requires_grad_(False)
    check_gradients(head, losses.cross_entropy)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_of_a_tied_head(reduction):
    """The weight's gradient is that of its use as embedding plus that of its use as head."""
    head, ids = linear(bias=False), draw_labels(2, 5, ignored=())
    f = losses.cross_entropy if reduction == "sum" else losses.token_log_probs

    def run(weight):
        return through_the_op(F.embedding(ids, weight), head, draw_labels(2, 5), f, reduction)

    assert torch.autograd.gradcheck(run, (head.weight,))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck_of_lora_on_the_head(reduction):
    model = torch.nn.ModuleDict({"head": linear()})
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["head"])).double()
    head = model.base_model.model["head"]
    assert isinstance(head, peft.tuners.lora.Linear)
    head.lora_B["default"].weight.data = draw(VOCABULARY, 2, seed=8)  # zero at first: no gradient would reach A
    assert sum(p.requires_grad for p in head.parameters()) == 2
    f = losses.cross_entropy if reduction == "sum" else losses.token_log_probs
    check_gradients(head, f, reduction=reduction)


@pytest.mark.parametrize("name", ["smoothed", "weighted", "kl_softened", "soft_capped", "log_probs_and_entropy"])
def test_compiled_by_inductor(name):
    f, reduction, rows, shared, _ = CASES[name]
    rows, shared = ([x.float() for x in extras] for extras in (rows, shared))
    if "kl" in name:
        f = losses.kl_distillation(linear(TEACHER_HIDDEN, seed=3, dtype=torch.float32), 2.5)  # not frozen
    head, labels = linear(dtype=torch.float32), draw_labels(10)
    hidden_states = draw(10, HIDDEN, dtype=torch.float32).requires_grad_()
    inputs = (hidden_states, *head.parameters())
    plain, compiled = (
        scalar(
            through_the_op(
                hidden_states, head, labels, f, reduction, row_args=rows, shared_args=shared, compile=compiled
            )
        )
        for compiled in (False, True)
    )
    assert relative(compiled, plain) < 1e-6
    for actual, expected in zip(*(torch.autograd.grad(r, inputs) for r in (compiled, plain)), strict=True):
        assert relative(actual, expected) < 1e-6


def test_weighted_mean_of_pytorch_by_its_normaliser():
    head, hidden_states, labels = linear(), draw(10, HIDDEN), draw_labels(10)
    normalizer = CLASS_WEIGHT[labels[labels != IGNORED]].sum()
    actual = through_the_op(
        hidden_states, head, labels, losses.cross_entropy, shared_args=(CLASS_WEIGHT,), normalizer=normalizer
    )
    expected = F.cross_entropy(head(hidden_states), labels, weight=CLASS_WEIGHT, ignore_index=IGNORED)
    assert relative(actual, expected) < EXACT


def test_the_teacher_projects_chunk_by_chunk_and_learns_nothing():
    seen = []

    class Teacher(torch.nn.Linear):
        def forward(self, x):
            seen.append(x.shape[0])
            return super().forward(x)

    teacher = Teacher(TEACHER_HIDDEN, VOCABULARY, dtype=torch.float64)
    states = TEACHER_STATES.clone().requires_grad_()
    head, hidden_states = linear(), draw(10, HIDDEN).requires_grad_()
    f = losses.kl_distillation(teacher)
    through_the_op(hidden_states, head, draw_labels(10), f, row_args=(states,), check_additive=False).backward()
    assert max(seen) <= 4 and sum(seen) == 10
    assert hidden_states.grad.any() and head.weight.grad.any()
    assert teacher.weight.grad is None and (states.grad is None or not states.grad.any())


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    head, hidden_states = linear(), draw(10, HIDDEN).requires_grad_()
    f = losses.kl_distillation(linear(), 1.5)
    loss = through_the_op(hidden_states, head, draw_labels(10), f, row_args=(hidden_states.detach(),))
    loss.backward()
    assert loss.abs() < EXACT and hidden_states.grad.norm() < EXACT


def test_gradcheck_of_dpo():
    """Sequence sums of the policy's and the reference's tokens: 4 sequences of 5, in chunks of 6, 6, 6 and 2 rows."""
    head, reference_head, labels = linear(), linear(seed=11), draw_labels(4, 5, ignored=(1, 2, 9, 19))
    hidden_states = draw(4, 5, HIDDEN).requires_grad_()

    def sums(hidden_states, head):
        rows = through_the_op(hidden_states, head, labels, losses.token_log_probs, "none", chunk_size=6)
        return rows.sum(-1)

    with torch.no_grad():
        reference = sums(draw(4, 5, HIDDEN, seed=12), reference_head)

    def run(hidden_states, *parameters):
        return losses.dpo_loss(sums(hidden_states, head), reference)

    expected = exact_log_probs(head(hidden_states).view(20, -1), labels.view(20), 1).view(4, 5).sum(-1)
    assert relative(run(hidden_states), losses.dpo_loss(expected, reference)) < EXACT
    assert torch.autograd.gradcheck(run, (hidden_states, *head.parameters()))


@pytest.mark.parametrize(
    "ignored", [(1, 2, 9), (4, 5, 6, 7), *(pytest.param(each, marks=SLOW) for each in ((), (0, 1, 2, 3, 8, 9)))]
)
@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=SLOW)])
def test_gradcheck_of_the_puzzles_function(bias, ignored):
    """Also where whole chunks have no label that counts, whose own mean would be nan."""
    head, labels = linear(bias=bias), draw_labels(2, 5, ignored=ignored)
    hidden_states = draw(2, 5, HIDDEN).requires_grad_()
    inputs = (hidden_states, *head.parameters())

    def run(hidden_states, *parameters):
        return memory_efficient_linear(
            hidden_states, head, labels, losses.transformation_function, function_takes="linear", chunk_size=4
        )

    expected = losses.transformation_function(hidden_states, head, labels)
    assert relative(run(hidden_states), expected) < EXACT
    gradients = zip(*(torch.autograd.grad(r, inputs) for r in (run(hidden_states), expected)), strict=True)
    assert all(relative(a, e) < EXACT for a, e in gradients)
    assert torch.autograd.gradcheck(run, inputs)


def test_the_puzzles_skeleton():
    head, labels, hidden_states = linear(), draw_labels(2, 5), draw(2, 5, HIDDEN).requires_grad_()
    inputs = (hidden_states, *head.parameters())
    actual = MemoryEfficientLinear.apply(hidden_states, head, labels, losses.transformation_function)
    expected = F.cross_entropy(head(hidden_states).view(10, -1), labels.view(10))
    gradients = zip(*(torch.autograd.grad(3 * r, inputs) for r in (actual, expected)), strict=True)
    assert relative(actual, expected) < EXACT and all(relative(a, e) < EXACT for a, e in gradients)


def test_the_puzzles_function_upcasts():
    head, labels = linear(dtype=torch.bfloat16), draw_labels(10)
    hidden_states = draw(10, HIDDEN, dtype=torch.bfloat16)
    actual = losses.transformation_function(hidden_states, head, labels)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, F.cross_entropy(head(hidden_states).float(), labels))
