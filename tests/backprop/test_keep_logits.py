"""Logits kept from the forward of per-row results for its backward: the same gradients, fewer products."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_puzzles.backprop import losses, memory_efficient_linear

ROWS, HIDDEN, VOCAB, CHUNK = 41, 8, 30, 7
CHUNK_BYTES = CHUNK * VOCAB * 8


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def data():
    torch.manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(HIDDEN, VOCAB, dtype=torch.float64)
    labels = torch.randint(VOCAB, (ROWS,))
    labels[::5] = -100
    return x, head, labels, torch.randn(ROWS, dtype=torch.float64)


def run(data, keep, **options):
    x, head, labels, slopes = data
    log_p, entropies = memory_efficient_linear(
        x, head, labels, losses.token_log_probs_and_entropy,
        reduction="none", chunk_size=CHUNK, keep_logits=keep, check_additive=False, **options,
    )  # fmt: skip
    return (log_p * slopes).sum() + entropies.square().sum()


@pytest.mark.parametrize("keep", (1, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, "1GiB"))
def test_the_gradients_are_the_same(data, keep):
    inputs = (data[0], *data[1].parameters())
    found = torch.autograd.grad(run(data, keep), inputs)
    for one, other in zip(found, torch.autograd.grad(run(data, 0), inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_each_kept_chunk_saves_one_product(data):
    inputs = (data[0], *data[1].parameters())
    counts = []
    for keep in (0, 2 * CHUNK_BYTES, "1GiB"):
        with Products() as products:
            torch.autograd.grad(run(data, keep), inputs)
        counts.append(products.count)
    chunks = -(-ROWS // CHUNK)
    assert counts == [4 * chunks, 4 * chunks - 2, 3 * chunks]


def test_a_retained_graph_can_be_walked_again(data):
    inputs = (data[0], *data[1].parameters())
    loss = run(data, "1GiB")
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_compiled_too(data):
    inputs = (data[0], *data[1].parameters())
    found = torch.autograd.grad(run(data, 2 * CHUNK_BYTES, compile=True), inputs)
    for one, other in zip(found, torch.autograd.grad(run(data, 0), inputs), strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()


def test_nothing_is_kept_without_gradients(data):
    with torch.no_grad():
        assert run(data, "1GiB").grad_fn is None


@pytest.mark.parametrize("keep", (-1, "much", 1.5, True))
def test_keep_logits_must_be_a_number_of_bytes(data, keep):
    with pytest.raises((TypeError, ValueError), match="keep_logits"):
        run(data, keep)


def test_keep_logits_needs_results_per_row(data):
    x, head, labels, _ = data
    with pytest.raises(ValueError, match="keep_logits"):
        memory_efficient_linear(x, head, labels, losses.cross_entropy, reduction="sum", keep_logits=1)


def test_hidden_states_that_want_no_gradient(data):
    x, head, labels, slopes = data
    found, expected = (
        torch.autograd.grad(run((x.detach(), head, labels, slopes), keep), [*head.parameters()]) for keep in ("1GiB", 0)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("keep", (0, "1GiB"))
def test_between_forward_and_backward_only_what_was_kept_is_alive(data, keep):
    """No copy of the weight that autocast made, and after the backward nothing at all."""
    x, head, labels, _ = data
    head = head.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = memory_efficient_linear(
            x.detach().float().requires_grad_(), head, labels, losses.token_log_probs,
            reduction="none", chunk_size=CHUNK, keep_logits=keep,
        )  # fmt: skip
    kept = loss.grad_fn.kept
    assert (kept.head is None) == (keep == 0) == (not kept.chunks)
    loss.sum().backward()
    assert kept.head is None and not kept.chunks
