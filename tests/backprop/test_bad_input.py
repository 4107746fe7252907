"""What is refused, each with the name of the argument."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backprop.reference import (
    HIDDEN,
    VOCABULARY,
    draw,
    draw_labels,
    make_linear,
    mean_loss,
    sum_loss,
    token_losses,
    transformation,
)
from unsloth_puzzles.backprop import MemoryEfficientLinear, losses, memory_efficient_linear

pytestmark = pytest.mark.usefixtures("untried")


def call(function=mean_loss, **changed):
    given = {"hidden_states": draw(2, 32, HIDDEN), "linear": make_linear(), "labels": draw_labels(2, 32)} | changed
    return memory_efficient_linear(*(given.pop(k) for k in ("hidden_states", "linear", "labels")), function, **given)


ROWS = {"reduction": "none"}
ignoring_0 = functools.partial(losses.cross_entropy, ignore_index=0)
SUM = {"reduction": "sum"}
labels_with = lambda value: draw_labels(2, 32).index_fill(1, torch.tensor([31]), value)  # noqa: E731

REFUSED = {
    "hidden_states no tensor": ("hidden_states", TypeError, {"hidden_states": [1.0]}),
    "hidden_states integer": ("hidden_states", TypeError, {"hidden_states": torch.ones(2, 32, HIDDEN).long()}),
    "hidden_states a vector": ("hidden_states", ValueError, {"hidden_states": draw(HIDDEN)}),
    "hidden_states too wide": ("hidden_states", ValueError, {"hidden_states": draw(2, 32, HIDDEN + 1)}),
    "hidden_states of another dtype": ("hidden_states", ValueError, {"hidden_states": draw(2, 32, HIDDEN).float()}),
    "linear a weight": ("linear", TypeError, {"linear": draw(VOCABULARY, HIDDEN)}),
    "linear that drops rows": ("linear", ValueError, {"linear": nn.Sequential(make_linear(), nn.Flatten(0))}),
    "function no function": ("forward_function", TypeError, {"function": 3}),
    "function that ignores another label": ("forward_function", ValueError, {"function": ignoring_0, **SUM}),
    "function that ignores another label, capped": (
        "forward_function", ValueError, {"function": losses.soft_capped(ignoring_0, 3.0), **SUM},
    ),
    "function that ignores another label, distilled": (
        "forward_function", ValueError, {"function": losses.kl_distillation(make_linear(), ignore_index=0), **SUM},
    ),
    "module that ignores another label": (
        "forward_function", ValueError, {"function": nn.CrossEntropyLoss(ignore_index=0)},
    ),
    "function that ignores the usual label": (
        "forward_function", ValueError, {"function": losses.cross_entropy, "ignore_index": -1, **SUM},
    ),
    "labels a list": ("labels", TypeError, {"labels": [1]}),
    "labels too short": ("labels", ValueError, {"labels": draw_labels(2, 31)}),
    "labels flat": ("labels", ValueError, {"labels": draw_labels(64)}),
    "labels transposed": ("labels", ValueError, {"labels": draw_labels(32, 2)}),
    "labels on another device": ("labels", ValueError, {"labels": draw_labels(2, 32).to("meta")}),
    "labels with a gradient": ("labels", ValueError, {"labels": draw(2, 32).requires_grad_()}),
    "labels too large": ("labels", ValueError, {"labels": labels_with(VOCABULARY)}),
    "labels negative": ("labels", ValueError, {"labels": labels_with(-1)}),
    "labels that another index ignores": ("labels", ValueError, {"ignore_index": -1}),
    "no labels for a mean": ("labels", ValueError, {"labels": None}),
    "no labels to divide by": ("labels", ValueError, {"labels": None, "normalizer": "labels", **SUM}),
    "row_args a tensor": ("row_args", TypeError, {"row_args": draw(2, 32)}),
    "row_args of numbers": (r"row_args\[1\]", TypeError, {"row_args": (draw(2, 32), 3)}),
    "row_args too short": (r"row_args\[0\]", ValueError, {"row_args": (draw(2, 31),)}),
    "shared_args a tensor": ("shared_args", TypeError, {"shared_args": draw(2)}),
    "shared_args with a gradient in a dict": (
        r"shared_args\[1\]", ValueError, {"shared_args": (2, {"scale": [draw(1).requires_grad_()]})},
    ),
    "reduction unknown": ("reduction", ValueError, {"reduction": "avg"}),
    "function_takes unknown": ("function_takes", ValueError, {"function_takes": "weights"}),
    "normalizer of a mean": ("normalizer", ValueError, {"normalizer": 3}),
    "normalizer of rows": ("normalizer", ValueError, {"normalizer": 3, "function": token_losses, **ROWS}),
    "normalizer unknown": ("normalizer", ValueError, {"normalizer": "tokens", **SUM}),
    "normalizer several": ("normalizer", ValueError, {"normalizer": torch.ones(2), **SUM}),
    "normalizer a list": ("normalizer", TypeError, {"normalizer": [3], **SUM}),
    "normalizer with a gradient": (
        "normalizer", ValueError, {"normalizer": torch.tensor(2.0, requires_grad=True), **SUM},
    ),
    "nothing to ignore in a mean": ("ignore_index", ValueError, {"ignore_index": None}),
    "nothing to ignore in a number of labels": (
        "ignore_index", ValueError, {"ignore_index": None, "normalizer": "labels", **SUM},
    ),
    "chunk_size 0": ("chunk_size", ValueError, {"chunk_size": 0}),
    "chunk_size negative": ("chunk_size", ValueError, {"chunk_size": -4}),
    "chunk_size in parsecs": ("chunk_size", ValueError, {"chunk_size": "12 parsecs"}),
    "chunk_size less than a row": ("chunk_size", ValueError, {"chunk_size": "80B"}),
    "chunk_size a fraction": ("chunk_size", TypeError, {"chunk_size": 2.0}),
    "accumulate_dtype narrow": ("accumulate_dtype", ValueError, {"accumulate_dtype": torch.float16}),
    "compile of what projects itself": (
        "compile", ValueError, {"compile": True, "function_takes": "linear", "function": transformation},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    argument, error, changed = REFUSED[name]
    with pytest.raises(error, match=rf"^{argument} must "):
        call(**changed)


FUNCTIONS = {
    "a number": (lambda z, y: 3.0, {}, TypeError),
    "a row each, in a mean": (token_losses, {}, ValueError),
    "an integer": (lambda z, y: z.argmax(), {}, ValueError),
    "logits, in a sum": (lambda z, y: z.softmax(-1), SUM, ValueError),
    "the mean in a sum": (mean_loss, SUM, ValueError),
    "the sum in a mean": (sum_loss, {}, ValueError),
    "the largest": (lambda z, y: z.max(), SUM, ValueError),
    "a mean over ignored rows, too": (lambda z, y: sum_loss(z, y) / len(y), {}, ValueError),
    "a softmax over the rows": (lambda z, y: z.softmax(0).square().sum(), SUM, ValueError),
    "logits": (lambda z, y: z.log_softmax(-1), ROWS, ValueError),
    "as much as the logits": (lambda z, y: (z[:, 1:], z[:, 0]), ROWS, ValueError),
    "a number, for rows": (mean_loss, ROWS, ValueError),
    "a float, for rows": (lambda z, y: 1.0, ROWS, TypeError),
    "too few rows": (lambda z, y: token_losses(z, y)[1:], ROWS, ValueError),
    "rows that know each other": (lambda z, y: z[:, 0].cumsum(0), ROWS, ValueError),
    "random rows": (lambda z, y: F.dropout(z, 0.5).sum(-1), ROWS, ValueError),
}


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_of_another_form_are_refused(name, takes):
    """Refused again at the second call; and behind labels of which the first 40 do not count."""
    of_logits, form, error = FUNCTIONS[name]
    function = of_logits if takes == "logits" else lambda x, linear, labels: of_logits(linear(x), labels)
    for ignored in ((0, 5, 6, 7), range(40)):
        for _ in range(2):
            with pytest.raises(error, match=r"^forward_function must "):
                call(function, **form, function_takes=takes, labels=draw_labels(2, 32, ignored=ignored))


def test_a_function_that_is_wrapped_is_looked_at_whatever_the_wrapper_has_seen():
    def doubled(function):
        return lambda logits, labels: 2 * function(logits, labels)

    call(doubled(mean_loss))
    with pytest.raises(ValueError, match=r"^forward_function must "):
        call(doubled(sum_loss))
    with pytest.raises(ValueError, match=r"^forward_function must "):
        call(functools.partial(sum_loss))


def test_a_function_is_tried_once_by_its_code():
    seen = []

    def make():
        return lambda logits, labels: seen.append(len(labels)) or mean_loss(logits, labels)

    call(make(), chunk_size=64)
    first = list(seen)
    call(make(), chunk_size=64)
    assert len(seen) - len(first) == len(first) - 3
    call(make(), chunk_size=64, check_additive=False)


def test_too_few_labels_to_try_leave_it_new():
    call(sum_loss, labels=draw_labels(2, 32, ignored=range(1, 64)))
    with pytest.raises(ValueError, match=r"^forward_function must "):
        call(sum_loss)


def test_results_that_are_only_rounding_leave_it_new():
    """A divergence of equals is some 1e-16, and another 1e-16 in the halves."""
    size = [1e-16]

    def draws(logits, labels):
        return logits.sum() * 0 + size[0] * torch.rand((), dtype=torch.float64)

    for _ in range(2):
        call(draws)
    size[0] = 1.0
    with pytest.raises(ValueError, match=r"^forward_function must be .*, got a result of \d+ rows"):
        call(draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_small_mean_in_16_bits_is_refused_all_the_same(dtype):
    def small(logits, labels):
        return 0.02 * torch.nn.functional.cross_entropy(logits, labels)

    with pytest.raises(ValueError, match=r"^forward_function must be .*, got a result of \d+ rows"):
        memory_efficient_linear(
            draw(2, 32, HIDDEN).to(dtype), make_linear().to(dtype), draw_labels(2, 32), small, reduction="sum"
        )


def test_the_skeleton_refuses_too():
    x, labels = draw(2, 7, HIDDEN), draw_labels(2, 7)
    with pytest.raises(ValueError, match=r"^labels must "):
        MemoryEfficientLinear.apply(x, make_linear(), labels[:, 1:], transformation)
    with pytest.raises(TypeError, match=r"^linear must "):
        MemoryEfficientLinear.apply(x, make_linear().weight, labels, transformation)
    with pytest.raises(ValueError, match=r"^labels must "):
        MemoryEfficientLinear.apply(x, make_linear(), None, transformation)


def closing_over(shift):
    """By reduction: functions that use `shift` though it is none of their arguments."""
    return {
        "sum": lambda logits, labels: sum_loss(logits + shift, labels),
        "none": lambda logits, labels: token_losses(logits + shift, labels),
    }


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_that_no_argument_could_bring_is_refused(reduction, takes):
    """Also when the function was called before with a tensor that wants none or without gradients, and again."""
    trained = torch.zeros(VOCABULARY, dtype=torch.float64, requires_grad=True)

    def loss(shift):
        of_logits = closing_over(shift)[reduction]
        function = of_logits if takes == "logits" else lambda x, linear, labels: of_logits(linear(x), labels)
        return call(function, reduction=reduction, function_takes=takes, chunk_size=16).sum()

    loss(trained.detach()).backward()
    with torch.no_grad():
        loss(trained)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^forward_function must .*\(11,\) that requires grad.*shared_args"):
            loss(trained).backward()
    with torch.no_grad():
        loss(trained)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("compile", [True, False])
def test_rows_are_refused_as_a_sum_though_nothing_is_tried(gradients, compile):
    options = {"check_additive": False, "compile": compile, "chunk_size": 16}
    with (
        torch.set_grad_enabled(gradients),
        pytest.raises(Exception, match=r"forward_function must return a 0-dim floating tensor, got shape"),
    ):
        call(token_losses, **SUM, **options)


def test_a_weight_that_the_function_has_kept_is_refused():
    """It is not the leaf that stands for it: eager mode would give it a gradient, the op would not."""
    linear = make_linear()
    kept = linear.weight
    with pytest.raises(ValueError, match=r"^forward_function must .*, got a tensor \(11, 6\) that requires grad"):
        call(lambda x, linear, labels: mean_loss(x @ kept.t(), labels), linear=linear, function_takes="linear")


@pytest.mark.parametrize("form", [SUM, ROWS])
def test_a_function_that_writes_to_the_logits_is_refused(form):
    def halving(logits, labels):
        logits.div_(2)
        return sum_loss(logits, labels) if form is SUM else token_losses(logits, labels)

    with pytest.raises(ValueError, match=r"^forward_function must not change the logits in place"):
        call(halving, **form)


@pytest.mark.parametrize("form", [SUM, ROWS])
def test_inference_mode_gives_the_value(form):
    def function(logits, labels):  # a new one, which has to be tried first
        return sum_loss(logits, labels) if form is SUM else token_losses(logits, labels)

    with torch.inference_mode():
        found = call(function, **form)
    assert torch.equal(found, call(function, **form))


@pytest.mark.parametrize("dtype, constant", [(torch.float64, 1e-5), (torch.float32, 1.0), (torch.bfloat16, 20.0)])
def test_a_constant_beside_the_sum_is_not_additive(dtype, constant):
    given = {"hidden_states": draw(2, 32, HIDDEN).to(dtype), "linear": make_linear().to(dtype)}
    wide = torch.promote_types(dtype, torch.float32)
    with pytest.raises(ValueError, match=r"^forward_function must be additive"):
        call(lambda logits, labels: sum_loss(logits.to(wide), labels) + constant, **SUM, **given)
    call(lambda logits, labels: sum_loss(logits.to(wide), labels), **SUM, **given)


def test_a_module_that_is_trained_later_is_looked_at_again():
    """A function holds it in a closure, or is its method, or the module itself."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64), requires_grad=False)

        def forward(self, logits, labels):
            return sum_loss(logits * self.scale, labels)

    module = Scaled()
    for function in (lambda logits, labels: module(logits, labels), module.forward, module):
        module.requires_grad_(False)
        call(function, **SUM)
        module.requires_grad_()
        with pytest.raises(ValueError, match=r"^forward_function must get what it differentiates as arguments"):
            call(function, **SUM)


def test_functions_of_one_code_are_told_apart_by_what_they_hold():
    def make(reduction):
        return lambda logits, labels: F.cross_entropy(logits, labels, reduction=reduction)

    def with_default(logits, labels, mean=False):
        return mean_loss(logits, labels) if mean else sum_loss(logits, labels)

    class Method:
        def __init__(self, function):
            self.function = function

        def loss(self, logits, labels):
            return self.function(logits, labels)

    call(make("sum"), **SUM)
    call(with_default, **SUM)
    right, wrong = Method(sum_loss), Method(mean_loss)
    call(right.loss, **SUM)
    with_default.__defaults__ = (True,)
    for refused in (make("mean"), with_default, wrong.loss):
        with pytest.raises(ValueError, match=r"^forward_function must be additive"):
            call(refused, **SUM)


def test_callables_that_have_no_hash_or_no_weak_reference():
    @dataclasses.dataclass
    class Weighted:
        weight: float = 1.0

        def __call__(self, logits, labels):
            return self.weight * sum_loss(logits, labels)

    class Slots:
        __slots__ = ()

        def __call__(self, logits, labels):
            return sum_loss(logits, labels)

    for function in (Weighted(), Slots()):
        assert torch.equal(call(function, **SUM), call(sum_loss, **SUM))
        with pytest.raises(TypeError, match=r"^forward_function must be one that can be a key"):
            call(function, **SUM, compile=True)
