"""The losses against PyTorch's own in float64, as functions of logits alone."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.backprop.loss_cases import (
    CASES,
    EXACT,
    IGNORED,
    TEACHER,
    TEACHER_HIDDEN,
    TEACHER_STATES,
    VOCABULARY,
    draw,
    draw_labels,
    every_loss,
    exact_cross_entropy,
    linear,
    relative,
    scalar,
)
from unsloth_puzzles.backprop import losses


@every_loss
def test_value_and_gradient_are_those_of_the_reference(name):
    f, _, rows, shared, reference = CASES[name]
    labels, logits = draw_labels(10), (2 * draw(10, VOCABULARY)).requires_grad_()
    actual, expected = f(logits, labels, *rows, *shared), reference(logits, labels)
    for a, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
        assert a.shape == e.shape and relative(a, e) < EXACT
    assert relative(*(torch.autograd.grad(scalar(r), logits)[0] for r in (actual, expected))) < EXACT


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_in_float32(name, dtype):
    f, _, rows, shared, _ = CASES[name]
    rows, shared = ([x.float() for x in extras] for extras in (rows, shared))
    if "kl" in name:
        f = partial(losses._kl_to_teacher, linear(TEACHER_HIDDEN, seed=3, dtype=torch.float32), 1.0, IGNORED)
    labels, logits = draw_labels(10), draw(10, VOCABULARY).to(dtype).requires_grad_()
    upcast = logits.detach().float().requires_grad_()
    actual, expected = scalar(f(logits, labels, *rows, *shared)), scalar(f(upcast, labels, *rows, *shared))
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)
    actual.backward()
    expected.backward()
    assert torch.equal(logits.grad, upcast.grad.to(dtype))


@every_loss
@pytest.mark.parametrize("size", [1.0, 1e18])
def test_ignored_rows_neither_count_nor_get_a_gradient(name, size):
    f, _, rows, shared, _ = CASES[name]
    labels, logits = draw_labels(10), draw(10, VOCABULARY)
    garbage = torch.where(labels[:, None] == IGNORED, size * draw(10, VOCABULARY, seed=9), logits).requires_grad_()
    logits.requires_grad_()
    actual, expected = f(garbage, labels, *rows, *shared), f(logits, labels, *rows, *shared)
    for a, e in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
        assert torch.equal(a, e) and (a.ndim == 0 or not a[labels == IGNORED].any())
    scalar(actual).backward()
    scalar(expected).backward()
    assert torch.equal(garbage.grad, logits.grad)
    assert not logits.grad[labels == IGNORED].any() and logits.grad[labels != IGNORED].all()


@every_loss
def test_ignore_index_may_be_a_class(name):
    f, _, rows, shared, _ = CASES[name]
    base = f.func if isinstance(f, partial) else f
    if base is losses._kl_to_teacher:
        other = losses.kl_distillation(TEACHER, f.args[1], ignore_index=0)
    elif base is losses._of_soft_capped:
        other = losses.soft_capped(partial(losses.cross_entropy, ignore_index=0), 3.0)
    else:
        other = partial(f, ignore_index=0)
    logits, labels = draw(10, VOCABULARY), draw_labels(10, ignored=())
    labels[3] = 0
    padded = torch.where(labels == 0, IGNORED, labels)
    assert torch.equal(scalar(other(logits, labels, *rows, *shared)), scalar(f(logits, padded, *rows, *shared)))
    assert not torch.equal(scalar(f(logits, labels, *rows, *shared)), scalar(f(logits, padded, *rows, *shared)))


@every_loss
def test_all_ignored(name):
    f, _, rows, shared, _ = CASES[name]
    logits = draw(10, VOCABULARY).requires_grad_()
    result = scalar(f(logits, torch.full((10,), IGNORED), *rows, *shared))
    result.backward()
    assert result == 0 and not logits.grad.any()


@every_loss
def test_compiles_to_one_graph_with_its_gradient(name):
    f, _, rows, shared, _ = CASES[name]

    def value_and_gradient(logits, labels, *extras):
        def total(logits):
            return scalar(f(logits, labels, *extras))

        gradient, value = torch.func.grad_and_value(total)(logits)
        return value, gradient

    logits, labels = draw(10, VOCABULARY), draw_labels(10)
    torch._dynamo.reset()
    compiled = torch.compile(value_and_gradient, fullgraph=True, backend="aot_eager")
    value, gradient = compiled(logits, labels, *rows, *shared)
    logits.requires_grad_()
    expected = scalar(f(logits, labels, *rows, *shared))
    assert relative(value, expected) < EXACT
    assert relative(gradient, torch.autograd.grad(expected, logits)[0]) < EXACT


@pytest.mark.parametrize("name", [n for n in CASES if "smoothed" not in n and "capped" not in n])
def test_a_class_masked_by_minus_infinity_does_not_exist(name):
    f, _, rows, shared, _ = CASES[name]
    if "kl" in name:  # the teacher must mask it too, or the divergence is infinite
        head = torch.nn.Sequential(TEACHER, torch.nn.ConstantPad1d((0, 1), -torch.inf))
        f = partial(losses._kl_to_teacher, head, *f.args[1:])
    logits, labels = draw(10, VOCABULARY).requires_grad_(), draw_labels(10)
    masked = F.pad(logits.detach(), (0, 1), value=-torch.inf).requires_grad_()
    expected = scalar(CASES[name][0](logits, labels, *rows, *shared))
    actual = scalar(f(masked, labels, *rows, *(F.pad(x, (0, 1)) for x in shared)))
    assert relative(actual, expected) < EXACT
    actual.backward()
    expected.backward()
    assert relative(masked.grad[:, :-1], logits.grad) < EXACT and not masked.grad[:, -1].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_of_what_is_learnt_for_certain_is_finite(gamma):
    logits = torch.zeros(2, VOCABULARY)
    logits[0, 3] = 200.0
    logits.requires_grad_()
    loss = losses.focal(logits, torch.tensor([3, 3]), gamma=gamma)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and not logits.grad[0].any() and logits.grad[1].any()


def test_focal_without_focus_is_cross_entropy():
    logits, labels = draw(10, VOCABULARY), draw_labels(10)
    assert relative(losses.focal(logits, labels, gamma=0.0), losses.cross_entropy(logits, labels)) < EXACT


def test_leading_dimensions_are_kept():
    logits, labels = draw(2, 5, VOCABULARY), draw_labels(2, 5)
    flat = losses.token_log_probs_and_entropy(logits.view(10, -1), labels.view(10))
    for actual, expected in zip(losses.token_log_probs_and_entropy(logits, labels), flat, strict=True):
        assert torch.equal(actual, expected.view(2, 5))
    assert (
        relative(losses.cross_entropy(logits, labels), exact_cross_entropy(logits.view(10, -1), labels.view(10)))
        < EXACT
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo(label_smoothing):
    """Three pairs, by hand: -log of the probability that Bradley and Terry give the noted preference."""
    policy, reference = -draw(6).exp(), -draw(6, seed=7).exp()
    ratio = (policy - reference).exp() ** 0.3
    p = ratio[:3] / (ratio[:3] + ratio[3:])
    expected = -((1 - label_smoothing) * p.log() + label_smoothing * (1 - p).log()).mean()
    assert relative(losses.dpo_loss(policy, reference, beta=0.3, label_smoothing=label_smoothing), expected) < EXACT


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda z, y: losses.cross_entropy(z, y, label_smoothing=1.5), "label_smoothing"),
        (lambda z, y: losses.cross_entropy(z, y, torch.ones(VOCABULARY + 1)), "class_weight"),
        (lambda z, y: losses.focal(z, y, gamma=-1.0), "gamma"),
        (lambda z, y: losses.kl_distillation(TEACHER, 0.0), "temperature"),
        (lambda z, y: losses.kl_distillation(TEACHER)(z[:, 1:], y, TEACHER_STATES), "teacher_head"),
        (lambda z, y: losses.token_log_probs(z, y, 0.0), "temperature"),
        (lambda z, y: losses.entropy(z, y, -1.0), "temperature"),
        (lambda z, y: losses.soft_cap(z, 0.0), "cap"),
        (lambda z, y: losses.dpo_loss(z[:5, 0], z[:5, 0]), "policy_logps"),
        (lambda z, y: losses.dpo_loss(z, z), "policy_logps"),
        (lambda z, y: losses.dpo_loss(z[:4, 0], z[:6, 0]), "reference_logps"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=f"^{named} must "):
        call(draw(10, VOCABULARY), draw_labels(10))
