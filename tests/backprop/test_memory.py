"""The logits are never there whole: no tensor of their size is made, and the peak is that of a chunk."""

import pytest
import torch

from tests.backprop.reference import draw, draw_labels, make_linear, mean_loss, sum_loss, token_losses, transformation
from unsloth_puzzles.backprop import memory_efficient_linear
from unsloth_puzzles.bench.memory import peak_memory

ROWS, HIDDEN, VOCABULARY, CHUNK = 1024, 8, 512, 64
FORMS = {
    "mean": (mean_loss, {}),
    "sum": (sum_loss, {"reduction": "sum", "normalizer": "labels"}),
    "rows": (token_losses, {"reduction": "none"}),
    "projects itself": (transformation, {"function_takes": "linear"}),
}


def step(name, x, head, labels, **options):
    function, form = FORMS[name]
    memory_efficient_linear(x, head, labels, function, chunk_size=CHUNK, **form, **options).sum().backward()


def problem():
    x = draw(ROWS, HIDDEN, dtype=torch.float32).requires_grad_()
    return x, make_linear(HIDDEN, VOCABULARY, dtype=torch.float32), draw_labels(ROWS, vocabulary=VOCABULARY)


@pytest.mark.parametrize("name", FORMS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(name, watch):
    x, head, labels = problem()
    with watch() as seen:
        step(name, x, head, labels)
    assert seen.largest == CHUNK * VOCABULARY


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_the_peak(name, training):
    """Trained: the gradients and a few chunks; without gradients a few chunks."""
    x, head, labels = problem()

    def run():
        if training:
            return step(name, x, head, labels)
        with torch.no_grad():
            function, form = FORMS[name]
            return memory_efficient_linear(x, head, labels, function, chunk_size=CHUNK, **form)

    run()
    x.grad = head.weight.grad = head.bias.grad = None
    _, peak = peak_memory(run)
    chunk, gradients = 4 * CHUNK * VOCABULARY, 4 * (x.numel() + head.weight.numel() + head.bias.numel())
    more = 6 * chunk if name == "projects itself" else 2.5 * chunk  # eighths of a chunk, but for what projects itself
    rows = 64 * ROWS  # labels and per-row results, their gradients and masks
    assert peak <= more + rows + (1.1 * gradients if training else 0)
    assert peak < 4 * ROWS * VOCABULARY / 2


@pytest.mark.parametrize("name", ["sum", "rows"])
def test_the_peak_does_not_grow_with_the_chunks(name):
    """Twice the rows, in chunks of the same size: more by what belongs to the rows."""
    peaks = []
    for rows in (ROWS, 2 * ROWS):
        x, head = draw(rows, HIDDEN, dtype=torch.float32), make_linear(HIDDEN, VOCABULARY, dtype=torch.float32)
        labels = draw_labels(rows, vocabulary=VOCABULARY)
        step(name, x, head, labels)
        head.weight.grad = head.bias.grad = None
        peaks.append(peak_memory(lambda x=x, head=head, labels=labels: step(name, x, head, labels))[1])
    assert peaks[1] - peaks[0] <= 100 * ROWS
