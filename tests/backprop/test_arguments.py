"""Arguments beside the labels: cut into the same rows or shared, with gradients of their own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from tests.backprop.reference import (
    EXACT,
    HIDDEN,
    VOCABULARY,
    assert_same,
    draw,
    draw_labels,
    eager,
    gradients_of,
    make_linear,
    relative,
    sum_loss,
)
from unsloth_puzzles.backprop import memory_efficient_linear


def weighted_rows(logits, labels, row_weight, shift, temperature, power):
    """A loss a row, from a factor a row, targets (rows, vocabulary), a tensor shared by all, and a number."""
    z = (logits + shift) / temperature
    return F.cross_entropy(z, labels, reduction="none") ** power * row_weight


def weighted_sum(*arguments):
    return weighted_rows(*arguments).sum()


def weighted_mean(logits, labels, *arguments):
    valid = labels != -100
    return (weighted_rows(logits, labels.clamp(0), *arguments) * valid).sum() / valid.sum()


def projecting(function):
    return lambda x, linear, labels, *arguments: function(linear(x), labels, *arguments)


FUNCTIONS = {"sum": weighted_sum, "mean": weighted_mean, "none": weighted_rows}


def arguments(shape=(2, 7)):
    rows = (draw(*shape, seed=5).requires_grad_(), draw(*shape, VOCABULARY, seed=6).requires_grad_())
    return rows, (torch.tensor([1.7], dtype=torch.float64, requires_grad=True), 2)


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", FUNCTIONS)
def test_gradients_of_row_and_shared_arguments(reduction, takes):
    """Chunks of 4, of which one has no label that counts."""
    x, head, labels = draw(2, 7, HIDDEN).requires_grad_(), make_linear(), draw_labels(2, 7, ignored=(1, 4, 5, 6, 7))
    rows, shared = arguments()
    function = FUNCTIONS[reduction] if takes == "logits" else projecting(FUNCTIONS[reduction])
    run = lambda x, row, shift, temperature, *_: memory_efficient_linear(  # noqa: E731
        x, head, labels, function, reduction=reduction, function_takes=takes, row_args=(row, shift),
        shared_args=(temperature, 2), chunk_size=4,
    )  # fmt: skip
    inputs = [x, *rows, shared[0], *head.parameters()]
    expected = eager(x, head, labels, function, reduction=reduction, takes=takes, rows=rows, shared=shared)
    assert_same(run(*inputs), expected, inputs)
    assert gradcheck(run, inputs, atol=1e-7)


@pytest.mark.parametrize("reduction", FUNCTIONS)
@pytest.mark.parametrize("wanted", range(3))
def test_only_one_argument_needs_a_gradient(reduction, wanted):
    x, head, labels = draw(14, HIDDEN), make_linear().requires_grad_(False), draw_labels(14)
    rows, shared = arguments((14,))
    chosen = [*rows, shared[0]]
    for i, each in enumerate(chosen):
        each.requires_grad_(i == wanted)
    function = FUNCTIONS[reduction]
    actual = memory_efficient_linear(
        x, head, labels, function, reduction=reduction, row_args=rows, shared_args=shared, chunk_size=4
    )
    expected = eager(x, head, labels, function, reduction=reduction, rows=rows, shared=shared)
    assert_same(actual, expected, [chosen[wanted]])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_labels(reduction):
    """A function of the rows' own targets; `labels` is None for it, too."""
    x, head, targets = draw(2, 7, HIDDEN).requires_grad_(), make_linear(), draw(2, 7, VOCABULARY).softmax(-1)

    def function(logits, labels, targets):
        assert labels is None
        losses = -(targets * logits.log_softmax(-1)).sum(-1)
        return losses.sum() if reduction == "sum" else losses

    actual = memory_efficient_linear(x, head, None, function, reduction=reduction, row_args=(targets,), chunk_size=4)
    assert_same(actual, eager(x, head, None, function, reduction=reduction, rows=(targets,)), [x, head.weight])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_labels_of_any_kind(reduction):
    """Several a row, and floating ones: with ignore_index=None they are the function's business."""
    x, head, labels = draw(2, 7, HIDDEN).requires_grad_(), make_linear(), draw(2, 7, 3)

    def function(logits, labels):
        losses = (logits[:, :3] - labels).square().sum(-1)
        return losses.sum() if reduction == "sum" else losses

    actual = memory_efficient_linear(x, head, labels, function, reduction=reduction, chunk_size=4, ignore_index=None)
    leading = eager(x, head, None, lambda z, _, y: function(z, y), reduction=reduction, rows=(labels,))
    assert_same(actual, leading, [x, head.weight])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_shared_weight_that_the_function_projects_with(reduction):
    """A second head among the shared arguments gets its gradient, also through `F.linear`."""
    x, head, labels = draw(14, HIDDEN).requires_grad_(), make_linear(), draw_labels(14)
    other = draw(VOCABULARY, HIDDEN, seed=9).requires_grad_()

    def function(x, linear, labels, other):
        losses = F.cross_entropy(linear(x) + F.linear(x, other), labels, reduction="none")
        return losses.sum() if reduction == "sum" else losses

    actual = memory_efficient_linear(
        x, head, labels, function, reduction=reduction, function_takes="linear", shared_args=(other,), chunk_size=4
    )
    expected = eager(x, head, labels, function, reduction=reduction, takes="linear", shared=(other,))
    assert_same(actual, expected, [x, other, *head.parameters()])


def test_arguments_that_are_not_used_get_zeros_or_nothing():
    x, head, labels = draw(14, HIDDEN).requires_grad_(), make_linear(), draw_labels(14)
    unused = torch.ones(14, dtype=torch.float64, requires_grad=True)
    loss = memory_efficient_linear(
        x, head, labels, lambda z, y, _: F.cross_entropy(z, y), row_args=(unused,), chunk_size=4
    )
    (gradient,) = torch.autograd.grad(loss, unused, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_constant_for_some_chunks(reduction, takes):
    """A function that spares itself the work where no label counts: its constant has no graph."""
    x, head, labels = draw(14, HIDDEN).requires_grad_(), make_linear(), draw_labels(14, ignored=range(4))

    def of_logits(logits, labels):
        counted = (labels != -100).any()
        losses = F.cross_entropy(logits, labels, reduction="none") if counted else logits.new_zeros(len(labels))
        return losses.sum() if reduction == "sum" else losses

    function = (
        of_logits
        if takes == "logits"
        else lambda x, linear, labels: of_logits(
            linear(x) if (labels != -100).any() else x.new_zeros(len(x), VOCABULARY), labels
        )
    )
    actual = memory_efficient_linear(x, head, labels, function, reduction=reduction, function_takes=takes, chunk_size=4)
    expected = eager(x, head, labels, function, reduction=reduction, takes=takes)
    found = (gradients_of(each, [x, head.weight]) for each in (actual, expected))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= EXACT


@pytest.mark.parametrize("count", [5, 5.0, np.int64(5), np.float32(5), torch.tensor(5)])
def test_a_normalizer_is_any_number(count):
    x, head, labels = draw(5, 8), make_linear(8, 11), draw_labels(5, vocabulary=11, ignored=(0,))
    loss = memory_efficient_linear(x, head, labels, sum_loss, reduction="sum", normalizer=count)
    assert loss.item() == pytest.approx(sum_loss(head(x), labels).item() / 5, rel=1e-6)
