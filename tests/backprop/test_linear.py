"""Values and gradients of every form against the whole logits in float64, and what autograd expects of an operation."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from tests.backprop.reference import (
    EXACT,
    HIDDEN,
    IGNORED,
    as_tuple,
    assert_same,
    draw,
    draw_labels,
    eager,
    gradients_of,
    losses_and_entropies,
    make_linear,
    mean_loss,
    relative,
    sum_loss,
    token_losses,
    transformation,
)
from unsloth_puzzles.backprop import MemoryEfficientLinear, memory_efficient_linear

SLOW = pytest.mark.slow
FORMS = {
    "mean": (mean_loss, {}),
    "sum": (sum_loss, {"reduction": "sum"}),
    "sum over a number": (sum_loss, {"reduction": "sum", "normalizer": 7.5}),
    "sum over a tensor": (sum_loss, {"reduction": "sum", "normalizer": torch.tensor(13)}),
    "sum over the labels": (sum_loss, {"reduction": "sum", "normalizer": "labels"}),
    "rows": (token_losses, {"reduction": "none"}),
    "several results": (losses_and_entropies, {"reduction": "none"}),
    "mean, projects itself": (transformation, {"function_takes": "linear"}),
    "sum, projects itself": (
        lambda x, linear, labels: F.cross_entropy(linear(x), labels, reduction="sum"),
        {"reduction": "sum", "function_takes": "linear", "normalizer": "labels"},
    ),
    "rows, projects itself": (
        lambda x, linear, labels: losses_and_entropies(linear(x), labels),
        {"reduction": "none", "function_takes": "linear"},
    ),
}


def problem(shape=(2, 7), bias=True, **options):
    """14 rows: chunks of 4 leave a ragged last one of 2, and have 3, 1, 4 and 2 labels that count."""
    return draw(*shape, 6).requires_grad_(), make_linear(bias=bias), draw_labels(*shape, **options)


def ours_and_eager(name, x, linear, labels, **options):
    function, form = FORMS[name]
    expected = {"takes" if key == "function_takes" else key: value for key, value in form.items()}
    actual = memory_efficient_linear(x, linear, labels, function, **form, **options)
    return actual, eager(x, linear, labels, function, **expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 14, 100, "auto"])
@pytest.mark.parametrize("name", FORMS)
def test_values_and_gradients(name, chunk_size):
    x, linear, labels = problem()
    assert_same(*ours_and_eager(name, x, linear, labels, chunk_size=chunk_size), [x, *linear.parameters()])


@pytest.mark.parametrize("name", FORMS)
def test_unchecked(name):
    """Nothing but the result itself shows a mistake."""
    x, linear, labels = problem()
    actual, expected = ours_and_eager(name, x, linear, labels, chunk_size=4, check_additive=False)
    assert_same(actual, expected, [x, *linear.parameters()])


@pytest.mark.parametrize("name", FORMS)
def test_a_chunk_without_labels(name):
    x, linear, labels = problem(ignored=(0, 4, 5, 6, 7, 8))
    assert_same(*ours_and_eager(name, x, linear, labels, chunk_size=4), [x, *linear.parameters()])


@pytest.mark.parametrize(
    "name",
    [*("mean", "sum", "rows"), *(pytest.param(n, marks=SLOW) for n in FORMS if n not in ("mean", "sum", "rows"))],
)
def test_gradcheck(name):
    x, linear, labels = problem()
    function, form = FORMS[name]

    def run(x, *parameters):
        result = memory_efficient_linear(x, linear, labels, function, chunk_size=4, **form)
        return tuple(r for r in as_tuple(result) if r.is_floating_point())

    assert gradcheck(run, (x, *linear.parameters()), atol=1e-7)


def test_the_puzzles_skeleton():
    x, linear, labels = problem(shape=(3, 300), bias=False)
    actual = MemoryEfficientLinear.apply(x, linear, labels, transformation)
    expected = eager(x, linear, labels, transformation, takes="linear")
    assert_same(actual, expected, [x, linear.weight])
    assert gradcheck(lambda x, _: MemoryEfficientLinear.apply(x, linear, labels[:1, :3], transformation), (
        x[:1, :3].detach().requires_grad_(), linear.weight,
    ))  # fmt: skip


@pytest.mark.parametrize("shape", [(14,), (2, 7), (2, 1, 7)])
@pytest.mark.parametrize("name", ["mean", "several results", "rows, projects itself"])
def test_leading_dimensions(name, shape):
    x, linear, labels = problem(shape)
    assert_same(*ours_and_eager(name, x, linear, labels, chunk_size=4), [x, *linear.parameters()])


@pytest.mark.parametrize("name", FORMS)
def test_all_labels_ignored(name):
    """0/0 for a mean, with the gradients that PyTorch gives it."""
    x, linear, labels = problem(ignored=range(14))
    actual, expected = ours_and_eager(name, x, linear, labels, chunk_size=4)
    pairs = zip(as_tuple(actual), as_tuple(expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0, equal_nan=True)
    inputs = [x, *linear.parameters()]
    for ours, theirs in zip(gradients_of(actual, inputs), gradients_of(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0, equal_nan=True)


def own_mean(logits, labels):
    """A mean whose gradient is 0/0 where no label counts."""
    valid = labels != IGNORED
    losses = logits.logsumexp(-1) - logits.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
    return (losses * valid).sum() / valid.sum()


@pytest.mark.parametrize("form", ["logits", "linear"])
def test_a_chunk_without_labels_in_a_mean_that_divides_by_their_number(form):
    x, linear, labels = problem(ignored=(0, 4, 5, 6, 7, 8))
    function = own_mean if form == "logits" else lambda x, linear, labels: own_mean(linear(x), labels)
    actual = memory_efficient_linear(x, linear, labels, function, function_takes=form, chunk_size=4)
    assert_same(actual, eager(x, linear, labels, function, takes=form), [x, *linear.parameters()])


def test_no_rows():
    x, linear, labels = problem((0,), ignored=())
    assert memory_efficient_linear(x, linear, labels, mean_loss).isnan()
    assert memory_efficient_linear(x, linear, labels, sum_loss, reduction="sum") == 0
    assert memory_efficient_linear(x, linear, labels, token_losses, reduction="none").shape == (0,)


@pytest.mark.parametrize("name", FORMS)
def test_hidden_states_in_any_memory_order(name):
    _, linear, labels = problem((14,))
    base = draw(6, 14).requires_grad_()
    assert_same(*ours_and_eager(name, base.t(), linear, labels, chunk_size=4), [base, *linear.parameters()])


@pytest.mark.parametrize("name", FORMS)
def test_several_uses_in_one_graph(name):
    x, linear, labels = problem()

    def total(losses):
        return sum((i + 1) * r.double().sum() for i, r in enumerate(as_tuple(losses)))

    def product(which):
        first, second = (total(ours_and_eager(name, x * s, linear, labels, chunk_size=4)[which]) for s in (1, -0.5))
        return first * second

    assert_same(product(0), product(1), [x, *linear.parameters()])


def test_gradients_are_returned_and_never_written():
    x, linear, labels = problem()
    loss = memory_efficient_linear(x, linear, labels, mean_loss, chunk_size=4)
    assert x.grad is None and linear.weight.grad is None
    torch.autograd.grad(loss, [x, *linear.parameters()])
    assert x.grad is None and linear.weight.grad is None and linear.bias.grad is None
    linear.weight.grad = torch.ones_like(linear.weight)
    memory_efficient_linear(x, linear, labels, mean_loss, chunk_size=4).backward()
    expected = torch.autograd.grad(eager(x, linear, labels, mean_loss), linear.weight)[0]
    assert relative(linear.weight.grad, expected + 1) <= EXACT


@pytest.mark.parametrize("name", FORMS)
def test_a_second_backward(name):
    x, linear, labels = problem()
    inputs = [x, *linear.parameters()]
    actual, expected = ours_and_eager(name, x, linear, labels, chunk_size=4)
    outputs = [[r for r in as_tuple(each) if r.requires_grad] for each in (actual, expected)]
    for factor in (2.0, -3.0, 1.0):
        slopes = [factor * torch.ones_like(r) for r in outputs[0]]
        found = [torch.autograd.grad(each, inputs, slopes, retain_graph=True) for each in outputs]
        for ours, theirs in zip(*found, strict=True):
            assert relative(ours, theirs) <= EXACT
    torch.autograd.grad([r.sum() for r in outputs[0]], inputs)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad([r.sum() for r in outputs[0]], inputs)


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_of_derivatives_are_refused(name):
    x, linear, labels = problem()
    result, _ = ours_and_eager(name, x, linear, labels, chunk_size=4)
    first = result[0] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match="create_graph must be False, got True"):
        torch.autograd.grad(first.sum(), x, create_graph=True)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_torch_func_is_refused(transform):
    x, linear, labels = problem()
    run = lambda x: memory_efficient_linear(x, linear, labels, mean_loss)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"^hidden_states must be plain, got a tensor of torch\.func"):
        if transform == "grad":
            torch.func.grad(run)(x.detach())
        elif transform == "vmap":
            torch.func.vmap(run)(x.detach()[None])
        else:
            torch.func.jvp(run, (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FORMS)
def test_without_gradients(name, mode):
    x, linear, labels = problem()
    with mode():
        actual, expected = ours_and_eager(name, x, linear, labels, chunk_size=4)
    pairs = zip(as_tuple(actual), as_tuple(expected), strict=True)
    for ours, theirs in pairs:
        assert relative(ours, theirs) <= EXACT and not ours.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_inside_a_checkpoint(name, reentrant):
    x, linear, labels = problem()

    def run(x):
        result = ours_and_eager(name, x.sin(), linear, labels, chunk_size=4)[0]
        return sum(r.double().sum() * (i + 1) for i, r in enumerate(as_tuple(result)))

    inputs, found = [x, *linear.parameters()], []
    for loss in (checkpoint(run, x, use_reentrant=reentrant), run(x)):
        (-2.7 * loss).backward()  # what the reentrant kind needs
        found.append([each.grad for each in inputs])
        for each in inputs:
            each.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) <= EXACT


def test_a_result_that_is_not_used():
    x, linear, labels = problem()
    inputs = [x, *linear.parameters()]
    for takes in ("logits", "linear"):
        form = "several results" if takes == "logits" else "rows, projects itself"
        for i in (0, 1):
            actual, expected = ours_and_eager(form, x, linear, labels, chunk_size=4)
            assert_same(actual[i], expected[i], inputs)


def test_the_loss_is_float32_at_least():
    x, linear, labels = draw(14, 6, dtype=torch.bfloat16), make_linear(dtype=torch.bfloat16), draw_labels(14)
    assert memory_efficient_linear(x, linear, labels, mean_loss).dtype == torch.float32
    assert memory_efficient_linear(x, linear, labels, lambda z, y: F.cross_entropy(z, y)).dtype == torch.float32


def test_a_frozen_head_that_changes_before_the_backward_of_rows_is_noticed():
    x, linear, labels = draw(9, HIDDEN).requires_grad_(), make_linear().requires_grad_(False), draw_labels(9)
    losses = memory_efficient_linear(x, linear, labels, token_losses, reduction="none", chunk_size=4)
    linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_the_skeleton_inside_torch_compile():
    """It loops over chunks: the compiler leaves it as it is, and its result is right."""
    x, linear, labels = draw(2, 9, HIDDEN).requires_grad_(), make_linear(), draw_labels(2, 9)

    @torch.compile(backend="eager")
    def twice(x):
        return 2 * MemoryEfficientLinear.apply(x, linear, labels, transformation)

    expected = 2 * MemoryEfficientLinear.apply(x, linear, labels, transformation)
    assert torch.equal(twice(x), expected)
