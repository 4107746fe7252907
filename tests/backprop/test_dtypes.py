"""Low precision: in which dtype gradients are summed and returned, autocast, and float16's small numbers."""

import pytest
import torch
import torch.nn.functional as F

from tests.backprop.reference import (
    HIDDEN,
    draw,
    draw_labels,
    eager,
    make_linear,
    mean_loss,
    relative,
    sum_loss,
    token_losses,
    transformation,
)
from unsloth_puzzles.backprop import memory_efficient_linear
from unsloth_puzzles.backprop.losses import cross_entropy, entropy, focal, token_log_probs, z_loss
from unsloth_puzzles.backprop.sums import Sum

FORMS = {
    "mean": (mean_loss, {}),
    "sum": (sum_loss, {"reduction": "sum", "normalizer": "labels"}),
    "rows": (token_losses, {"reduction": "none"}),
    "projects itself": (transformation, {"function_takes": "linear"}),
}


def run(name, x, head, labels, **options):
    """Gradients of X and of the weight, for an upstream gradient of 1 or of ones."""
    function, form = FORMS[name]
    result = memory_efficient_linear(x, head, labels, function, **form, **options)
    return torch.autograd.grad(result.sum(), [x, *head.parameters()])


def exact(name, x, head, labels):
    """The same in float64, from the same 16-bit inputs."""
    function, form = FORMS[name]
    wide = torch.nn.Linear(*head.weight.shape[::-1], bias=head.bias is not None, dtype=torch.float64)
    wide.load_state_dict({key: value.double() for key, value in head.state_dict().items()})
    x = x.detach().double().requires_grad_()
    form = {"takes" if key == "function_takes" else key: value for key, value in form.items()}
    return torch.autograd.grad(eager(x, wide, labels, function, **form).sum(), [x, *wide.parameters()])


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [40, 0])
def test_loss_does_not_depend_on_the_default_dtype(rows, dtype, default):
    """Neither its dtype nor its value, though a number like 257.1 has no digits beyond 257 in bfloat16."""
    x, head = draw(rows, HIDDEN, dtype=dtype).requires_grad_(), make_linear(HIDDEN, 32, dtype=dtype)
    labels = draw_labels(rows, vocabulary=32, ignored=())
    expected = sum_loss(head(x), labels) / 257.1
    gradient = torch.autograd.grad(expected, x)[0]
    torch.set_default_dtype(default)
    try:
        found = memory_efficient_linear(x, head, labels, sum_loss, reduction="sum", normalizer=257.1, chunk_size=8)
    finally:
        torch.set_default_dtype(torch.float32)
    limit = 4 * torch.finfo(dtype).eps
    assert found.dtype == dtype and (found - expected).abs() <= limit * expected.abs()
    assert (torch.autograd.grad(found, x)[0] - gradient).norm() <= limit * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_sums_in_float32_are_nearer_than_sums_in_16_bits(name, dtype):
    """64 chunks: each addition in 16 bits costs a rounding; one rounding of a float32 sum costs 2^-9 (bfloat16)."""
    x, head = draw(512, 32, dtype=dtype).requires_grad_(), make_linear(32, 64, dtype=dtype, bias=False)
    labels = draw_labels(512, vocabulary=64)
    truth = exact(name, x, head, labels)
    narrow = run(name, x, head, labels, chunk_size=8)
    wide = run(name, x, head, labels, chunk_size=8, accumulate_dtype=torch.float32)
    assert [g.dtype for g in (*narrow, *wide)] == [dtype] * 4
    whole = [function_gradient(name, x, head, labels)[1], truth[1]]
    assert relative(wide[1], truth[1]) <= relative(*whole) * 1.02  # what eager mode loses
    assert relative(wide[1], truth[1]) < 0.7 * relative(narrow[1], truth[1])


def function_gradient(name, x, head, labels):
    function, form = FORMS[name]
    form = {"takes" if key == "function_takes" else key: value for key, value in form.items()}
    return torch.autograd.grad(eager(x, head, labels, function, **form).sum(), [x, *head.parameters()])


@pytest.mark.parametrize("name", FORMS)
def test_a_bias_gradient_is_summed_in_float32(name):
    x, head = draw(512, 32, dtype=torch.bfloat16).requires_grad_(), make_linear(32, 64, dtype=torch.bfloat16)
    labels = draw_labels(512, vocabulary=64)
    ours, truth = run(name, x, head, labels, chunk_size=8)[2], exact(name, x, head, labels)[2]
    assert ours.dtype == torch.bfloat16
    assert relative(ours, truth) <= 1.02 * relative(function_gradient(name, x, head, labels)[2], truth)


@pytest.mark.parametrize("name", FORMS)
def test_a_gradient_in_float32_where_the_weight_takes_one(name):
    """`Tensor.grad_dtype`: the float32 sum is returned as it is."""
    head = make_linear(32, 64, dtype=torch.bfloat16, bias=False)
    x = draw(512, 32, dtype=torch.bfloat16).requires_grad_()
    labels = draw_labels(512, vocabulary=64)
    head.weight.grad_dtype = torch.float32
    function, form = FORMS[name]
    options = {"chunk_size": 8, "accumulate_dtype": torch.float32, **form}
    memory_efficient_linear(x, head, labels, function, **options).sum().backward()
    wide, head.weight.grad = head.weight.grad, None
    assert wide.dtype == torch.float32
    head.weight.grad_dtype = torch.bfloat16
    narrow = run(name, x, head, labels, chunk_size=8, accumulate_dtype=torch.float32)[1]
    truth = exact(name, x, head, labels)[1]
    assert relative(wide, truth) < relative(narrow, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_autocast_as_eager(name, dtype):
    """float32 parameters, 16-bit products: values to rounding of float32, gradients no further from the truth."""
    x, head = draw(64, 32, dtype=torch.float32).requires_grad_(), make_linear(32, 64, dtype=torch.float32)
    labels = draw_labels(64, vocabulary=64)
    function, form = FORMS[name]
    expected = {"takes" if key == "function_takes" else key: value for key, value in form.items()}
    with torch.autocast("cpu", dtype):
        ours = memory_efficient_linear(x, head, labels, function, chunk_size=16, **form)
        theirs = eager(x, head, labels, function, **expected)
    assert ours.dtype == theirs.dtype
    assert relative(ours, theirs) <= 1e-6
    truth = exact(name, x, head, labels)
    inputs = [x, *head.parameters()]
    for mine, other, true in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), truth, strict=True
    ):
        assert mine.dtype == torch.float32
        assert relative(mine, true) <= 1.05 * relative(other, true)


def test_autocast_of_two_weights_made_on_the_way():
    """Each is cast anew: they have one address, if the first is freed before the second is made."""
    x, head, labels = draw(64, 32, dtype=torch.float32), make_linear(32, 64, dtype=torch.float32), draw_labels(64)
    head.requires_grad_(False)
    x.requires_grad_()

    def function(x, linear, labels):
        first = F.linear(x, linear.weight * 2)
        return token_losses(first - F.linear(x, linear.weight * 3), labels).sum()

    with torch.autocast("cpu", torch.bfloat16):
        ours = memory_efficient_linear(x, head, labels, function, reduction="sum", function_takes="linear")
        theirs = function(x, head, labels)
    assert relative(ours, theirs) <= 1e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["mean", "sum"])
def test_float16_gradients_of_a_mean_do_not_underflow(name, autocast):
    """A mean over 16384 rows: a logit's gradient is 1e-4 p, of which float16 has nothing left where p < 1e-3.

    The upstream gradient is a loss scale of 65536, as a GradScaler's.
    """
    rows, vocabulary = 16384, 512
    dtype = torch.float32 if autocast else torch.float16
    x, head = draw(rows, HIDDEN, dtype=dtype).requires_grad_(), make_linear(HIDDEN, vocabulary, bias=False, dtype=dtype)
    labels = draw_labels(rows, vocabulary=vocabulary)
    truth = exact(name, x, head, labels)
    function, form = FORMS[name]
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        loss = memory_efficient_linear(
            x, head, labels, function, chunk_size=1024, accumulate_dtype=torch.float32, **form
        )
    for ours, true in zip(torch.autograd.grad(loss * 65536, [x, head.weight]), truth, strict=True):
        assert relative(ours, true * 65536) < 2e-3


@pytest.mark.parametrize("name", ["mean", "sum", "projects itself"])
@pytest.mark.parametrize("chunk_size", [pytest.param(64, marks=pytest.mark.slow), 4096, 16384])
@pytest.mark.parametrize("accumulate_dtype", [None, torch.float32], ids=["None", "float32"])
def test_float16_sums_of_many_rows_do_not_overflow(name, chunk_size, accumulate_dtype):
    """The sum of 16384 rows is 65536, which float16 cannot hold; their mean is 4."""
    x = torch.full((16384, 1), 8.0, dtype=torch.float16, requires_grad=True)
    head, labels = torch.nn.Linear(1, 2, dtype=torch.float16), torch.zeros(16384, dtype=torch.long)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    options = {"chunk_size": chunk_size, "accumulate_dtype": accumulate_dtype}
    for _, weight, bias in (function_gradient(name, x, head, labels), run(name, x, head, labels, **options)):
        assert weight.flatten().tolist() == [-4.0, 4.0]
        assert bias.tolist() == [-0.5, 0.5]


def test_float16_sums_of_rows_that_cancel_do_not_overflow_on_the_way():
    """Row by row: 120000 from the first half of the rows and -120000 from the second."""
    x = torch.full((30000, 1), 8.0, dtype=torch.float16)
    x[15000:] *= -1
    head, labels = torch.nn.Linear(1, 2, bias=False, dtype=torch.float16), torch.zeros(30000, dtype=torch.long)
    with torch.no_grad():
        head.weight.zero_()
    slopes = torch.where(torch.arange(30000) < 29936, 2.0, 1.0)  # the last 64 rows pull less
    losses = memory_efficient_linear(x, head, labels, token_losses, reduction="none", chunk_size=1000)
    (ours,) = torch.autograd.grad((losses * slopes).sum(), head.weight)
    assert -(0.5 * x.double().flatten() * slopes).sum() == -256
    assert ours.flatten().tolist() == [-256.0, 256.0]  # every sum on the way is a multiple of 64: no rounding


def test_float16_heads_of_two_products_and_shared_arguments_do_not_overflow():
    """Adapters, and a bias that the function adds: sums over 65536 rows, of the first product's weight as well."""
    rows = 65536
    x = torch.full((rows, 2), 3.0, dtype=torch.float16)
    head = torch.nn.Sequential(*(torch.nn.Linear(2, 2, bias=False, dtype=torch.float16) for _ in range(2)))
    with torch.no_grad():
        head[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        head[1].weight.copy_(torch.tensor([[2.0, 2.0], [-2.0, 1.0]]))
    bias = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    labels = torch.ones(rows, dtype=torch.long)

    def function(logits, labels, bias):
        return F.cross_entropy((logits + bias).float(), labels, reduction="sum")

    options = {"reduction": "sum", "normalizer": "labels", "shared_args": (bias,), "chunk_size": 4096}
    inputs = [*head.parameters(), bias]
    ours = torch.autograd.grad(memory_efficient_linear(x, head, labels, function, **options), inputs)
    wide = [value.detach().double().requires_grad_() for value in inputs]
    logits = x.double() @ wide[0].t() @ wide[1].t() + wide[2]
    for mine, true in zip(ours, torch.autograd.grad(F.cross_entropy(logits, labels), wide), strict=True):
        assert relative(mine, true) < 4e-3  # 16 additions, each rounded to 2^-11


def test_a_float16_mean_of_many_rows_is_added_up_in_float32():
    """A function that returns float16: its mean is about 60, that times 4096 rows is no float16."""
    x = torch.full((4096, 1), 60.0, dtype=torch.float16)
    head, labels = torch.nn.Linear(1, 2, bias=False, dtype=torch.float16), torch.zeros(4096, dtype=torch.long)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    loss = memory_efficient_linear(x, head, labels, F.cross_entropy, chunk_size=2048)
    assert loss.item() == 60.0
    assert torch.autograd.grad(loss, head.weight)[0].flatten().tolist() == [-60.0, 60.0]


def test_float16_gradients_that_fit_are_not_rescaled():
    """The scale of a sum is 1 unless it must fall: to the bit what plain additions give."""
    x, head = draw(512, 32, dtype=torch.float16), make_linear(32, 64, dtype=torch.float16, bias=False)
    total = Sum(head.weight, torch.float16)
    gradient = draw(512, 64, seed=5, dtype=torch.float16)
    plain = gradient[:256].t() @ x[:256]
    plain.addmm_(gradient[256:].t(), x[256:])
    total.add_product(gradient[:256], x[:256])
    total.add_product(gradient[256:], x[256:])
    assert torch.equal(total.result(head.weight, scaled=True)[0], plain) and total.scale == 1


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.uint8, 200), (torch.uint8, 256), (torch.int16, 40000)])
def test_labels_of_a_narrow_dtype_do_not_wrap_around(name, dtype, vocab):
    """-100 is 156 in uint8, 256 is 0 there, and 40000 is negative in int16."""
    function, form = FORMS[name]
    x, head = draw(5, 8, dtype=torch.float32), make_linear(8, vocab, dtype=torch.float32)
    labels = torch.tensor([156, 3, 156, 199, 0])
    ours, wide = (
        memory_efficient_linear(x, head, one, function, chunk_size=2, **form) for one in (labels.to(dtype), labels)
    )
    assert torch.equal(ours, wide)


@pytest.mark.parametrize("loss", [cross_entropy, focal, z_loss, token_log_probs, entropy])
def test_losses_count_class_156_in_uint8(loss):
    logits, labels = draw(3, 200, dtype=torch.float32), torch.tensor([156, 3, 156])
    assert torch.equal(loss(logits, labels.to(torch.uint8)), loss(logits, labels))
