"""Random numbers: what a function or a head drew in the forward it draws again in a backward that repeats it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.backprop.reference import EXACT, HIDDEN, VOCABULARY, draw, draw_labels, make_linear, relative, token_losses
from tests.backprop.test_heads import lora
from unsloth_puzzles.backprop import memory_efficient_linear

ROWS = 70  # chunks of 32: pieces of 4 in them, and a ragged last chunk of 6


def dropping_losses(logits, labels):
    return token_losses(F.dropout(logits, 0.5), labels)


def run(head, function, x, labels, **options):
    torch.manual_seed(5)
    return memory_efficient_linear(x, head, labels, function, chunk_size=32, check_additive=False, **options)


def directional(head, function, x, labels, direction, **options):
    """The derivative along `direction` by central differences, with the same random numbers on both sides."""
    step = 1e-6
    sides = [run(head, function, x + sign * step * direction, labels, **options).sum() for sign in (1, -1)]
    return (sides[0] - sides[1]) / (2 * step)


CASES = {
    "dropout in the function": (make_linear, dropping_losses, "logits"),
    "dropout in a LoRA head": (lambda: lora(dropout=0.5).train(), token_losses, "logits"),
    "both": (lambda: lora(dropout=0.5).train(), dropping_losses, "logits"),
    "both, projects itself": (
        lambda: lora(dropout=0.5).train(),
        lambda x, linear, labels: dropping_losses(linear(x), labels),
        "linear",
    ),
}


SOME = 2 * 32 * VOCABULARY * 8  # bytes: the logits of two chunks of three
FORMS = [(name, {"reduction": reduction}) for name in CASES for reduction in ("sum", "none")]
FORMS += [(name, {"reduction": "none", "keep_logits": SOME}) for name in CASES if CASES[name][2] == "logits"]


IDS = [f"{name}, {'kept' if 'keep_logits' in options else options['reduction']}" for name, options in FORMS]


@pytest.mark.parametrize("name, options", FORMS, ids=IDS)
def test_gradients_belong_to_the_numbers_of_the_forward(name, options):
    make, rows, takes = CASES[name]
    head, x, labels = make(), draw(ROWS, HIDDEN).requires_grad_(), draw_labels(ROWS)
    function = rows if options["reduction"] == "none" else lambda *arguments: rows(*arguments).sum()
    options = options | {"function_takes": takes}
    loss = run(head, function, x, labels, **options).sum()
    torch.manual_seed(6)  # what comes between must not matter
    (gradient,) = torch.autograd.grad(loss, x)
    direction = draw(ROWS, HIDDEN, seed=8)
    with torch.no_grad():
        expected = directional(head, function, x, labels, direction, **options)
    assert relative((gradient * direction).sum(), expected) < 1e-7


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_numbers_after_it_are_those_of_eager_mode_or_untouched(reduction):
    """A function that draws nothing moves no generator: neither its check nor the backward."""
    head, x, labels = make_linear(), draw(14, HIDDEN).requires_grad_(), draw_labels(14)
    function = (lambda z, y: token_losses(z, y)) if reduction == "none" else (lambda z, y: token_losses(z, y).sum())
    before = torch.get_rng_state()
    memory_efficient_linear(x, head, labels, function, reduction=reduction, chunk_size=4).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_leaves_the_generator_where_it_was():
    head, x, labels = make_linear(), draw(ROWS, HIDDEN).requires_grad_(), draw_labels(ROWS)
    losses = run(head, dropping_losses, x, labels, reduction="none")
    before = torch.get_rng_state()
    losses.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_first_call_draws_what_the_second_does(untried):
    """The comparison with the halves has random numbers of its own."""
    head, x, labels = lora(dropout=0.5).train(), draw(ROWS, HIDDEN), draw_labels(ROWS)
    for parameter in head.parameters():
        if parameter.requires_grad:
            parameter.data *= 1e-2  # so that dropping it is no reason to refuse the function
    values = []
    for _ in range(2):
        torch.manual_seed(5)
        values.append(memory_efficient_linear(x, head, labels, token_losses, reduction="none", chunk_size=32))
    assert torch.equal(*values)
    torch.manual_seed(6)
    other = memory_efficient_linear(x, head, labels, token_losses, reduction="none", chunk_size=32)
    assert not torch.equal(values[0], other)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_dropout_inside_a_checkpoint(reduction):
    head, labels = lora(dropout=0.5).train(), draw_labels(ROWS)
    function = dropping_losses if reduction == "none" else lambda *arguments: dropping_losses(*arguments).sum()
    x = draw(ROWS, HIDDEN).requires_grad_()
    options = {"reduction": reduction, "chunk_size": 32, "check_additive": False}
    found = []
    for around in (lambda f, x: checkpoint(f, x, use_reentrant=False), lambda f, x: f(x)):
        torch.manual_seed(5)
        loss = around(lambda x: memory_efficient_linear(x.sin(), head, labels, function, **options), x)
        torch.rand(3)
        found.append(torch.autograd.grad((loss * 1.5).sum(), x)[0])
    assert relative(*found) <= EXACT
