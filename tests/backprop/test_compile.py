"""compile=True on the CPU: eager mode's values and gradients, without compiling anew for another length."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.backprop.reference import as_tuple, assert_same, draw, draw_labels, eager, make_linear
from unsloth_puzzles.backprop import compiled, losses, memory_efficient_linear
from unsloth_puzzles.backprop.results import check_compiled
from unsloth_puzzles.backprop.trust import is_new

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "untried")
HIDDEN, VOCABULARY, ROUNDING = 32, 200, 2e-6


def cross_entropy(logits, labels, shift, scale, ignored=-100):
    z = logits * (scale + shift[:, None])
    one_hot = torch.arange(z.shape[-1]) == labels[:, None]
    losses = z.logsumexp(-1) - torch.where(one_hot, z, 0).sum(-1)
    return torch.where(labels != ignored, losses, 0).sum()


def mean_of_gathered(logits, labels, shift, scale):
    valid = labels != -100
    z = logits * (scale + shift[:, None])
    losses = z.logsumexp(-1) - z.gather(-1, torch.where(valid, labels, 0)[:, None])[:, 0]
    return (losses * valid).sum() / valid.sum()


def rows(logits, labels, shift, scale):
    log_probs = (logits * (scale + shift[:, None])).log_softmax(-1)
    return F.nll_loss(log_probs, labels, reduction="none"), -(log_probs.exp() * log_probs).sum(-1), logits.argmax(-1)


FORMS = {
    "sum": (functools.partial(cross_entropy), {"reduction": "sum", "normalizer": "labels"}),
    "mean": (mean_of_gathered, {"reduction": "mean"}),
    "rows": (rows, {"reduction": "none"}),
}


def problem(length, **options):
    x = draw(length, HIDDEN, dtype=torch.float32).requires_grad_()
    shared = (torch.tensor(1.5, requires_grad=True),)
    per_row = (draw(length, seed=7, dtype=torch.float32).requires_grad_(),)
    return x, draw_labels(length, vocabulary=VOCABULARY, **options), per_row, shared


@pytest.mark.parametrize("name", FORMS)
def test_as_eager_at_any_length_and_compiled_once(name):
    """Ragged last chunks of 8, 3 and 5 rows; the second chunk has no label that counts."""
    function, form = FORMS[name]
    head = make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    graphs = []
    for length in (40, 35, 53):
        x, labels, per_row, shared = problem(length, ignored=range(16, 32))
        arguments = {"row_args": per_row, "shared_args": shared}
        actual = memory_efficient_linear(x, head, labels, function, chunk_size=16, compile=True, **form, **arguments)
        expected = eager(x, head, labels, function, rows=per_row, shared=shared, **form)
        assert_same(actual, expected, [x, per_row[0], shared[0], *head.parameters()], bound=ROUNDING)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]


def test_values_without_gradients():
    head = make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    x, labels, per_row, shared = problem(35)
    for name in ("sum", "rows"):
        function, form = FORMS[name]
        with torch.no_grad():
            actual = memory_efficient_linear(
                x, head, labels, function, chunk_size=16, compile=True, row_args=per_row, shared_args=shared, **form
            )
            expected = eager(x, head, labels, function, rows=per_row, shared=shared, **form)
        for ours, theirs in zip(as_tuple(actual), as_tuple(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["sum", "rows"])
def test_the_compiled_gradient_is_compared_with_eager_modes_the_first_time(name, monkeypatch):
    """Also where the first call makes no gradient; and until it has passed."""
    looked, fails = [], True

    def look(gradient, expected):
        looked.append(gradient.shape)
        if fails:
            raise RuntimeError("not the same")
        return True

    monkeypatch.setattr(compiled, "check_compiled", look)
    head = make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    x, labels, per_row, shared = problem(35)
    function, form = FORMS[name]

    def run():
        return memory_efficient_linear(
            x, head, labels, function, chunk_size=16, compile=True, row_args=per_row, shared_args=shared, **form
        )

    with torch.no_grad():
        run()
    assert not looked
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not the same"):
            torch.autograd.grad(run()[0] if name == "rows" else run(), x, torch.ones(35) if name == "rows" else None)
    fails = False
    for _ in range(2):
        torch.autograd.grad(run()[0] if name == "rows" else run(), x, torch.ones(35) if name == "rows" else None)
    assert looked == [(16, VOCABULARY)] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_compiled_gradient_is_refused(dtype):
    exact = draw(4, 50, dtype=dtype)
    check_compiled(exact.clone(), exact)
    with pytest.raises(RuntimeError, match=r"^forward_function must have eager mode's gradient"):
        check_compiled(exact * 1.05, exact)
    with pytest.raises(RuntimeError, match=r"^forward_function must have eager mode's gradient"):
        check_compiled(torch.full_like(exact, torch.nan), exact)


def test_a_gradient_that_no_argument_could_bring_is_refused_though_nothing_is_compared():
    scale = torch.tensor(2.0, requires_grad=True)
    x, labels, *_ = problem(20)
    head, form = make_linear(HIDDEN, VOCABULARY, dtype=torch.float32), {"reduction": "sum", "check_additive": False}
    with pytest.raises(
        ValueError, match=r"^forward_function must get what it differentiates as arguments, got .* \(\) "
    ):
        memory_efficient_linear(x, head, labels, lambda z, y: (z * scale).square().sum(), compile=True, **form)


def test_a_first_gradient_that_overflows_says_nothing_of_the_function():
    """Eager mode gives NaN as well; the function is looked at again when there are numbers."""
    function, head = functools.partial(losses.cross_entropy), make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    x, labels, *_ = problem(20)
    x = x.detach()
    broken = x.clone()
    broken[0, 0] = torch.nan
    for data in (broken, x):
        data.requires_grad_()
        form = {"reduction": "sum", "normalizer": "labels"}
        loss = memory_efficient_linear(data, head, labels, function, compile=True, **form)
        expected = memory_efficient_linear(data, head, labels, function, **form)
        torch.testing.assert_close(loss, expected, equal_nan=True)
        ours, theirs = (torch.autograd.grad(one, data)[0] for one in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
        assert is_new(function, "compiled", "sum") == (data is broken)


@pytest.mark.parametrize("hooks", ["checkpoint", "save_on_cpu"])
def test_first_compiled_call_under_saved_tensor_hooks(hooks):
    """`torch.func` refuses such hooks while it is traced, and would leave them refused for the whole process."""
    function, head = functools.partial(losses.cross_entropy), make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
    x, labels, *_ = problem(20)

    def loss(x):
        return memory_efficient_linear(
            x, head, labels, function, compile=True, reduction="sum", normalizer="labels", chunk_size=7
        )

    if hooks == "checkpoint":
        found = checkpoint(loss, x, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            found = loss(x)
    (gradient,) = torch.autograd.grad(found, x)
    (expected,) = torch.autograd.grad(F.cross_entropy(head(x), labels), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    with torch.autograd.graph.save_on_cpu():
        pass


def test_a_method_is_compiled_once(monkeypatch):
    """Each access makes a new bound method; the compiled code belongs to the object."""
    made = []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **options: made.append(given) or compile(*given, **options))

    class Loss:
        def of(self, logits, labels):
            return F.cross_entropy(logits, labels, reduction="sum")

    loss, x, head, labels = Loss(), draw(20, HIDDEN, dtype=torch.float32), make_linear(), draw_labels(20)
    head, x = torch.nn.Linear(HIDDEN, VOCABULARY), x.requires_grad_()
    found = [
        memory_efficient_linear(x, head, labels, loss.of, reduction="sum", chunk_size=8, compile=True) for _ in range(3)
    ]
    assert len(made) == 1
    torch.testing.assert_close(found[-1], F.cross_entropy(head(x), labels, reduction="sum"))
