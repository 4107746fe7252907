"""The losses against PyTorch's own in float64, and through the op: gradcheck for every loss and every kind of head."""

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from unsloth_puzzles.backprop import losses
from unsloth_puzzles.backprop.linear import MemoryEfficientLinear, memory_efficient_linear

IGNORED = -100
SLOW = pytest.mark.slow
VOCABULARY, HIDDEN, TEACHER_HIDDEN = 7, 3, 4
EXACT = 1e-12  # float64: the same formula summed in another order


def relative(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_labels(*shape, ignored=(1, 2, 9)):
    """(...) labels; of 10 rows in chunks of 4, the chunks have 2, 4 and 1 that count."""
    labels = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))
    labels.view(-1)[list(ignored)] = IGNORED
    return labels


def linear(inputs=HIDDEN, seed=2, bias=True, dtype=torch.float64):
    layer = torch.nn.Linear(inputs, VOCABULARY, bias=bias, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = draw(*parameter.shape, seed=seed, dtype=dtype)
    return layer


TEACHER = linear(TEACHER_HIDDEN, seed=3).requires_grad_(False)
TEACHER_STATES = draw(10, TEACHER_HIDDEN, seed=4)
CLASS_WEIGHT = draw(VOCABULARY, seed=5).exp()


# What each loss should be, from PyTorch's own functions on the rows that count: (logits, labels) -> 0-dim or (rows,).
def kept(logits, labels):
    return logits[labels != IGNORED], labels[labels != IGNORED]


def exact_cross_entropy(logits, labels, **options):
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", **options)


def exact_z_loss(logits, labels, coefficient):
    z = kept(logits, labels)[0].exp().sum(-1)
    return exact_cross_entropy(logits, labels) + coefficient * (z.log() ** 2).sum()


def exact_focal(logits, labels, gamma):
    p = logits.softmax(-1)[labels != IGNORED].gather(1, kept(logits, labels)[1][:, None])
    return -((1 - p) ** gamma * p.log()).sum()


def exact_kl(logits, labels, temperature):
    student = F.log_softmax(logits / temperature, -1)[labels != IGNORED]
    teacher = F.softmax(TEACHER(TEACHER_STATES) / temperature, -1)[labels != IGNORED]
    return temperature**2 * F.kl_div(student, teacher, reduction="sum")


def exact_log_probs(logits, labels, temperature):
    return -F.cross_entropy(logits / temperature, labels, ignore_index=IGNORED, reduction="none")


def exact_entropy(logits, labels, temperature):
    return Categorical(logits=logits / temperature).entropy() * (labels != IGNORED)


def exact_soft_cap(logits, labels):
    return exact_cross_entropy(3 * torch.tanh(logits / 3), labels)


# name -> loss, reduction, row_args, shared_args, reference
CASES = {
    "cross_entropy": (losses.cross_entropy, "sum", (), (), exact_cross_entropy),
    "smoothed": (
        partial(losses.cross_entropy, label_smoothing=0.1),
        "sum",
        (),
        (),
        partial(exact_cross_entropy, label_smoothing=0.1),
    ),
    "weighted": (losses.cross_entropy, "sum", (), (CLASS_WEIGHT,), partial(exact_cross_entropy, weight=CLASS_WEIGHT)),
    "weighted_smoothed": (
        partial(losses.cross_entropy, label_smoothing=0.3),
        "sum",
        (),
        (CLASS_WEIGHT,),
        partial(exact_cross_entropy, label_smoothing=0.3, weight=CLASS_WEIGHT),
    ),
    "z_loss": (partial(losses.z_loss, coefficient=0.1), "sum", (), (), partial(exact_z_loss, coefficient=0.1)),
    "focal": (losses.focal, "sum", (), (), partial(exact_focal, gamma=2)),
    "focal_half": (partial(losses.focal, gamma=0.5), "sum", (), (), partial(exact_focal, gamma=0.5)),
    "kl": (losses.kl_distillation(TEACHER), "sum", (TEACHER_STATES,), (), partial(exact_kl, temperature=1)),
    "kl_softened": (
        losses.kl_distillation(TEACHER, 2.5),
        "sum",
        (TEACHER_STATES,),
        (),
        partial(exact_kl, temperature=2.5),
    ),
    "soft_capped": (losses.soft_capped(losses.cross_entropy, 3.0), "sum", (), (), exact_soft_cap),
    "token_log_probs": (losses.token_log_probs, "none", (), (), partial(exact_log_probs, temperature=1)),
    "token_log_probs_cooled": (
        partial(losses.token_log_probs, temperature=0.7),
        "none",
        (),
        (),
        partial(exact_log_probs, temperature=0.7),
    ),
    "entropy": (partial(losses.entropy, temperature=0.7), "none", (), (), partial(exact_entropy, temperature=0.7)),
    "log_probs_and_entropy": (
        partial(losses.token_log_probs_and_entropy, temperature=0.7),
        "none",
        (),
        (),
        lambda *args: (exact_log_probs(*args, temperature=0.7), exact_entropy(*args, temperature=0.7)),
    ),
}
every_loss = pytest.mark.parametrize("name", CASES)


def scalar(result):
    """A 0-dim result of one or several per-row results, each row with a weight of its own."""
    results = result if isinstance(result, tuple) else (result,)
    ramps = (torch.arange(1, 1 + r.numel(), dtype=r.dtype).view(r.shape) - 3.3 * i for i, r in enumerate(results))
    return sum((r * ramp).sum() for r, ramp in zip(results, ramps, strict=True))


# ------------------------------------------------------------------------------------------------- the functions alone


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


# ---------------------------------------------------------------------------------------------------- through the op


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


# -------------------------------------------------------------------------------------------- the puzzle's own function


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
