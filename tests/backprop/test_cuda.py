"""On a GPU: compiled gradients written over the logits, float32 sums of 16-bit products, memory, and no waiting."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tests.backprop.reference import draw, draw_labels, eager, make_linear, relative, upcast
from unsloth_puzzles.backprop import compiled as compiled_module
from unsloth_puzzles.backprop import memory_efficient_linear
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.backprop.scale import narrow_in_place, scale_in_place
from unsloth_puzzles.bench.memory import peak_memory

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_dynamo")]
ROWS, HIDDEN, VOCABULARY, CHUNK = 1000, 256, 2003, 384  # a ragged last chunk of 232 rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def untuned(monkeypatch):
    """Compiled with the first block sizes that Inductor thinks of: what is tuned is the time alone."""
    monkeypatch.setattr(compiled_module, "_TUNING", ())


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def picked(z, labels):
    return z.gather(-1, labels.clamp(0)[:, None])[:, 0]


def counted(losses, labels):
    return torch.where(labels != -100, losses, 0)


def by_comparison(logits, labels):
    z = upcast(logits)
    one_hot = torch.arange(z.shape[-1], dtype=torch.int32, device=z.device) == labels[:, None].int()
    return counted(z.logsumexp(-1) - torch.where(one_hot, z, 0).sum(-1), labels)


def by_gather(logits, labels):
    z = upcast(logits)
    return counted(z.logsumexp(-1) - picked(z, labels), labels)


def by_library(logits, labels):
    return F.cross_entropy(upcast(logits), labels, reduction="none")


def focal(logits, labels):
    log_p = picked(upcast(logits).log_softmax(-1), labels)
    return counted(-((1 - log_p.exp()) ** 2) * log_p, labels)


def z_loss(logits, labels):
    z = upcast(logits)
    lse = z.logsumexp(-1)
    return counted(lse - picked(z, labels) + 1e-2 * lse.square(), labels)


def soft_capped(logits, labels):
    return by_gather(3 * torch.tanh(upcast(logits) / 3), labels)


def margin(logits, labels):
    """Every logit against the label's own: the gradient at the label reads the whole row."""
    z = upcast(logits)
    return counted(F.softplus(1 + z - picked(z, labels)[:, None]).mean(-1), labels)


def rolled(logits, labels):
    """Each logit meets its neighbour: code that overwrote one before the other was read would show."""
    z = upcast(logits)
    return counted((z * z.roll(1, -1)).mean(-1) + by_gather(z.flip(-1), labels), labels)


def entropies(logits, labels):
    log_p = upcast(logits).log_softmax(-1)
    return counted(-(log_p.exp() * log_p).sum(-1), labels)


ROW_LOSSES = (by_comparison, by_gather, by_library, focal, z_loss, soft_capped, margin, rolled, entropies)


def summed(rows, logits, labels):
    return rows(logits, labels).sum()


def problem(dtype, rows=ROWS, hidden=HIDDEN, vocabulary=VOCABULARY):
    x = draw(rows, hidden, dtype=dtype, device="cuda").requires_grad_()
    labels = draw_labels(rows, vocabulary=vocabulary, ignored=range(200, 500)).cuda()
    return x, make_linear(hidden, vocabulary, bias=False, dtype=dtype, device="cuda"), labels


def gradients(loss, x, head):
    """For an upstream gradient of -2; one that is no power of two rounds a 16-bit gradient once more."""
    return torch.autograd.grad(loss.sum() * -2, [x, head.weight])


def in_float64(x, head, labels, function, **options):
    wide = torch.nn.Linear(*head.weight.shape[::-1], bias=False, dtype=torch.float64, device="cuda")
    wide.weight.data = head.weight.detach().double()
    x = x.detach().double().requires_grad_()
    return gradients(eager(x, wide, labels, function, **options), x, wide)


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROW_LOSSES)
def test_compiled_gradients_are_as_near_the_truth_as_eager_modes(rows, dtype, reduction):
    x, head, labels = problem(dtype)
    function = rows if reduction == "none" else partial(summed, rows)
    form = {"reduction": reduction} | ({"normalizer": "labels"} if reduction == "sum" else {})
    truth = in_float64(x, head, labels, function, **form)
    theirs = gradients(eager(x, head, labels, function, **form), x, head)
    options = {"chunk_size": CHUNK, "accumulate_dtype": torch.float32, **form}
    for compiled in (False, True):
        ours = gradients(memory_efficient_linear(x, head, labels, function, compile=compiled, **options), x, head)
        for mine, other, exact in zip(ours, theirs, truth, strict=True):
            assert mine.dtype == dtype
            assert relative(mine, exact) <= 1.1 * relative(other, exact) + 1e-6


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_results_of_rows(dtype):
    x, head, labels = problem(dtype)
    for rows in ROW_LOSSES:
        actual = memory_efficient_linear(x, head, labels, rows, reduction="none", chunk_size=CHUNK, compile=True)
        expected = eager(x, head, labels, rows, reduction="none")
        truth = eager(x.double(), head.double(), labels, rows, reduction="none")
        head.to(dtype)
        assert relative(actual, truth) <= 1.1 * relative(expected, truth) + 1e-6


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_sums_of_16_bit_products(dtype):
    """32 chunks: the float32 sum, rounded once, is as near the truth as one product over all rows."""
    x, head, labels = problem(dtype, rows=4096)
    function, options = partial(summed, by_comparison), {"reduction": "sum", "normalizer": "labels"}
    truth = in_float64(x, head, labels, function, **options)[1]
    eagers = relative(gradients(eager(x, head, labels, function, **options), x, head)[1], truth)
    found = {}
    for accumulate in (None, torch.float32):
        loss = memory_efficient_linear(
            x, head, labels, function, chunk_size=128, accumulate_dtype=accumulate, **options
        )
        found[accumulate] = relative(gradients(loss, x, head)[1], truth)
    assert found[torch.float32] <= eagers * 1.02
    assert found[torch.float32] < 0.8 * found[None]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("accumulate", [None, torch.float32])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_peak_is_a_chunk_of_logits_and_the_gradients(reduction, accumulate, trained):
    rows, hidden, vocabulary, chunk = 4096, 1024, 32000, 512
    x, head, labels = problem(torch.bfloat16, rows, hidden, vocabulary)
    head.weight.requires_grad_(trained)
    function = by_comparison if reduction == "none" else partial(summed, by_comparison)
    options = {"reduction": reduction, "chunk_size": chunk, "accumulate_dtype": accumulate, "compile": True}

    def step():
        x.grad = head.weight.grad = None
        memory_efficient_linear(x, head, labels, function, **options).sum().backward()

    step()
    step()
    x.grad = head.weight.grad = None
    _, peak = peak_memory(step)
    logits, d_x = 2 * chunk * vocabulary, 2 * rows * hidden
    d_w = trained * vocabulary * hidden * (4 if accumulate else 2)
    # dX of a chunk, and what belongs to the rows: labels, losses, their gradients, masks.
    assert peak <= logits + d_x + d_w + 2 * (2 * chunk * hidden) + 64 * rows + 2**21


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("normalizer", [None, "labels", 700, "on the device", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(dtype, normalizer, compiled):
    x, head, labels = problem(dtype)
    options = {"reduction": "sum", "normalizer": normalizer, "chunk_size": CHUNK, "compile": compiled}
    function = partial(summed, by_comparison)
    if normalizer == "rows":
        options |= {"reduction": "none", "normalizer": None}
        function = by_comparison
    elif normalizer == "on the device":
        options["normalizer"] = torch.tensor(700, device="cuda")
    upstream = torch.tensor(0.3, device="cuda") if normalizer != "rows" else torch.full((ROWS,), 0.3, device="cuda")

    def step():
        loss = memory_efficient_linear(x, head, labels, function, **options)
        return torch.autograd.grad(loss, [x, head.weight], upstream)

    first = step()
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert relative(a, b) < 1e-2


@pytest.mark.parametrize("accumulate", [None, torch.float32])
def test_float16_sums_of_many_rows_do_not_overflow(accumulate):
    """The sum of 16384 rows is 65536, which float16 cannot hold; their mean is 4."""
    x = torch.full((16384, 8), 8.0, dtype=torch.float16, device="cuda")
    head = torch.nn.Linear(8, 2, dtype=torch.float16, device="cuda")
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)
    options = {"reduction": "sum", "normalizer": "labels", "accumulate_dtype": accumulate}
    labels = torch.zeros(16384, dtype=torch.long, device="cuda")
    for chunk_size in (1000, 4096, 16384):
        loss = memory_efficient_linear(x, head, labels, cross_entropy, chunk_size=chunk_size, **options)
        weight, bias = torch.autograd.grad(loss, [head.weight, head.bias])
        assert weight[:, 0].tolist() == [-4.0, 4.0] and bias.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1 / 3, 1.0, 0.0, -65536.0, torch.inf, torch.nan])
def test_the_scaling_kernel_rounds_once(factor, dtype):
    for numel in (1, 4095, 4096, 4097, 1_000_003):
        tensor = draw(numel, dtype=dtype, device="cuda")
        expected = (tensor.float() * torch.tensor(factor, device="cuda")).to(dtype)
        assert scale_in_place(tensor, torch.tensor(factor, device="cuda")) is tensor
        assert torch.equal(tensor.nan_to_num(7), expected.nan_to_num(7))


def test_narrowing_in_place_on_the_device():
    for numel in (1023, 1025, 1_000_003):
        tensor = draw(numel, dtype=torch.float32, device="cuda")
        expected = tensor.bfloat16()
        assert torch.equal(narrow_in_place(tensor, torch.bfloat16), expected)


def test_dropout_in_rows_draws_the_same_numbers_in_the_backward():
    """The gradient of what was dropped is zero, and of nothing else. (Dynamo cannot compile it at any length.)"""
    x, head, labels = problem(torch.float32)
    head.weight.data = torch.eye(HIDDEN, device="cuda")
    head.out_features = HIDDEN
    labels = labels.clamp(0, HIDDEN - 1)
    options = {"reduction": "none", "chunk_size": CHUNK, "check_additive": False}
    kept = memory_efficient_linear(x, head, labels, dropped_halves, **options)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    assert 0.4 < (gradient[:, 0] != 0).float().mean() < 0.6
    assert torch.equal(gradient[:, 0] != 0, kept != 0)


def dropped_halves(logits, labels):
    return F.dropout(logits[:, 0], 0.5)


def test_labels_out_of_range_fail_an_assertion_on_the_device():
    """In a process of its own: the assertion ends the context."""
    program = (
        "import torch\n"
        "from unsloth_puzzles.backprop import memory_efficient_linear as op\n"
        "head = torch.nn.Linear(8, 16, device='cuda')\n"
        "labels = torch.full((4,), 16, device='cuda')\n"
        "f = lambda z, y: z.sum()\n"
        "op(torch.ones(4, 8, device='cuda'), head, labels, f, reduction='sum', check_additive=False)\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode != 0
    assert "labels must be 0 to 15, or ignore_index (-100)" in done.stdout + done.stderr
