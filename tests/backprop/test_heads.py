"""Every kind of head: which gradients it gets, what is computed for them, and in which dtype they are summed."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.backprop.reference import (
    EXACT,
    HIDDEN,
    VOCABULARY,
    assert_same,
    draw,
    draw_labels,
    eager,
    gradients_of,
    make_linear,
    mean_loss,
    relative,
    sum_loss,
    token_losses,
)
from unsloth_puzzles.backprop import memory_efficient_linear

FUNCTIONS = {"mean": mean_loss, "sum": sum_loss, "none": token_losses}
REDUCTIONS = tuple(FUNCTIONS)


class SoftCapped(nn.Module):
    """30 tanh(Wx / 30): what made the logits needs them again, so they must not be overwritten."""

    def __init__(self):
        super().__init__()
        self.linear = make_linear()

    def forward(self, x):
        return 3 * torch.tanh(self.linear(x) / 3)


class TwoWeights(nn.Module):
    """(V + W) x + b + c: autograd hands both of a pair the same tensor for a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(draw(VOCABULARY, HIDDEN, seed=i)) for i in (5, 6))
        self.third, self.fourth = (nn.Parameter(draw(VOCABULARY, seed=i)) for i in (7, 8))

    def forward(self, x):
        return F.linear(x, self.first + self.second) + self.third + self.fourth


class Padded(nn.Module):
    """A vocabulary that is a multiple of something, cut to size."""

    def __init__(self):
        super().__init__()
        self.linear = make_linear(vocabulary=16)

    def forward(self, x):
        return self.linear(x)[:, :VOCABULARY]


class Transposed(nn.Module):
    """x V with V (hidden, vocabulary)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(draw(HIDDEN, VOCABULARY))

    def forward(self, x):
        return x @ self.weight


class Computed(nn.Module):
    """A weight made of the parameter at each call (a scale, an upcast), and a parameter for its bias."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(draw(VOCABULARY, HIDDEN)), nn.Parameter(draw(VOCABULARY))

    def forward(self, x):
        return F.linear(x, self.weight * 2 + 1, self.bias) + F.linear(x, weight=self.weight)


class Detached(nn.Module):
    """Adds logits that train a weight of their own, but not what lies below."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = make_linear(), make_linear(seed=9)

    def forward(self, x):
        return self.linear(x) + self.other(x.detach())


class Twice(nn.Module):
    """One weight, three products of which two give a gradient of the same rows."""

    def __init__(self):
        super().__init__()
        self.linear = make_linear()

    def forward(self, x):
        return self.linear(x) + self.linear(x.tanh()) + self.linear(x)


def lora(head=None, dropout=0.0):
    """LoRA on a frozen head, with a B that is not zero."""
    import peft  # here, since it takes seconds and most tests do without

    model = nn.ModuleDict({"head": head or make_linear()})
    config = peft.LoraConfig(r=2, target_modules=["head"], lora_dropout=dropout)
    layer = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model["head"]
    for i, parameter in enumerate(p for p in layer.parameters() if p.requires_grad):
        parameter.data = draw(*parameter.shape, seed=20 + i).to(layer.weight.device, torch.float64)
    return layer


def frozen(*names):
    linear = make_linear()
    for name in names:
        getattr(linear, name).requires_grad_(False)
    return linear


HEADS = {
    "bias": make_linear,
    "no bias": lambda: make_linear(bias=False),
    "frozen": lambda: frozen("weight", "bias"),
    "frozen weight": lambda: frozen("weight"),
    "frozen bias": lambda: frozen("bias"),
    "LoRA": lora,
    "soft cap": SoftCapped,
    "two weights": TwoWeights,
    "padded": Padded,
    "transposed": Transposed,
    "computed": Computed,
    "detached": Detached,
    "twice": Twice,
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(make_linear()),
    "sequence": lambda: nn.Sequential(make_linear(vocabulary=HIDDEN), nn.GELU(), make_linear()),
    "no parameters": lambda: nn.Identity(),
}


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", HEADS)
def test_every_head(name, reduction, takes):
    head, x, labels = HEADS[name](), draw(2, 7, HIDDEN).requires_grad_(), draw_labels(2, 7, vocabulary=HIDDEN)
    of_logits = FUNCTIONS[reduction]
    function = of_logits if takes == "logits" else lambda x, linear, labels: of_logits(linear(x), labels)
    before = x.detach().clone()
    actual = memory_efficient_linear(x, head, labels, function, reduction=reduction, chunk_size=4, function_takes=takes)
    expected = eager(x, head, labels, function, reduction=reduction, takes=takes)
    assert_same(actual, expected, [x, *(p for p in head.parameters() if p.requires_grad)])
    assert torch.equal(x, before)


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_head_is_trained(reduction, takes):
    head, x, labels = make_linear(), draw(14, HIDDEN), draw_labels(14)
    of_logits = FUNCTIONS[reduction]
    function = of_logits if takes == "logits" else lambda x, linear, labels: of_logits(linear(x), labels)
    actual = memory_efficient_linear(x, head, labels, function, reduction=reduction, chunk_size=4, function_takes=takes)
    assert_same(actual, eager(x, head, labels, function, reduction=reduction, takes=takes), list(head.parameters()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tied_embeddings(reduction):
    embedding, head = nn.Embedding(VOCABULARY, HIDDEN, dtype=torch.float64), make_linear(bias=False)
    tokens, labels = draw_labels(2, 7, seed=3), draw_labels(2, 7)
    head.weight = embedding.weight
    x = embedding(tokens.clamp(0)).sin()
    actual = memory_efficient_linear(x, head, labels, FUNCTIONS[reduction], reduction=reduction, chunk_size=4)
    found = gradients_of(actual, [embedding.weight])
    x = embedding(tokens.clamp(0)).sin()
    expected = gradients_of(eager(x, head, labels, FUNCTIONS[reduction], reduction=reduction), [embedding.weight])
    assert relative(found[0], expected[0]) <= EXACT


def count_products(watch, reduction, *frozen_names, rows=12, of_x=True):
    """Matrix products of a forward and a backward in chunks of 4, with the first-call check behind it."""
    head, x, labels = frozen(*frozen_names), draw(rows, HIDDEN).requires_grad_(of_x), draw_labels(rows)
    options = {"reduction": reduction, "chunk_size": 4, "check_additive": False}
    with watch() as seen:
        memory_efficient_linear(x, head, labels, FUNCTIONS[reduction], **options).sum().backward()
    return seen, head


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_three_products_a_chunk_two_for_a_frozen_head_and_one_more_for_rows(reduction, watch):
    more = 3 if reduction == "none" else 0
    seen, _ = count_products(watch, reduction)
    assert seen.products == 9 + more
    seen, head = count_products(watch, reduction, "weight", "bias")
    assert seen.products == 6 + more
    assert head.weight.grad is None and head.bias.grad is None
    seen, head = count_products(watch, reduction, of_x=False)  # hidden states that want no gradient: no dX
    assert seen.products == 6 + more
    assert head.weight.grad is not None


def test_a_frozen_head_makes_no_buffer_of_the_weights_size(watch):
    """Chunks of 2 rows: the weight has 11 x 6 values, a chunk of logits 2 x 11, the hidden states 4 x 6."""
    for names, made in (((), True), (("weight", "bias"), False)):
        head, x, labels = frozen(*names), draw(4, HIDDEN).requires_grad_(), draw_labels(4, ignored=())
        with watch() as seen:
            memory_efficient_linear(
                x, head, labels, sum_loss, reduction="sum", chunk_size=2, check_additive=False
            ).backward()
        assert ((VOCABULARY, HIDDEN) in seen.made) == made


def test_nothing_is_done_without_gradients(watch):
    head, x, labels = make_linear(), draw(12, HIDDEN).requires_grad_(), draw_labels(12)
    for reduction, function in FUNCTIONS.items():
        with torch.no_grad(), watch() as seen:
            memory_efficient_linear(x, head, labels, function, reduction=reduction, chunk_size=4, check_additive=False)
        assert seen.products == 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("adapted", [False, True])
def test_bitsandbytes_4_bit_head(reduction, adapted):
    import bitsandbytes as bnb

    head = bnb.nn.Linear4bit(64, 96, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    head.weight = bnb.nn.Params4bit(draw(96, 64, dtype=torch.float32), requires_grad=False, quant_type="nf4")
    head = head.to("cpu")
    if adapted:
        head = lora(head)
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float() / 8
    x, labels = draw(14, 64, dtype=torch.float32).requires_grad_(), draw_labels(14, vocabulary=96)
    inputs = [x, *(p for p in head.parameters() if p.requires_grad)]
    assert len(inputs) == (3 if adapted else 1)
    actual = memory_efficient_linear(x, head, labels, FUNCTIONS[reduction], reduction=reduction, chunk_size=4)
    expected = eager(x, head, labels, FUNCTIONS[reduction], reduction=reduction)
    assert_same(actual, expected, inputs, bound=2e-6)


@pytest.mark.parametrize("takes", ["logits", "linear"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_weight_that_is_no_parameter_of_the_head_is_refused(reduction, takes):
    """As a tie that hides the embeddings from `named_parameters`: autograd gives them the gradient of both uses."""

    class Tied(nn.Module):
        def __init__(self, embeddings):
            super().__init__()
            self.hidden = [embeddings]

        def forward(self, x):
            return F.linear(x, self.hidden[0].weight)

    embeddings, x, labels = nn.Embedding(VOCABULARY, HIDDEN).double(), draw(12, HIDDEN), draw_labels(12)
    of_logits = FUNCTIONS[reduction]
    function = of_logits if takes == "logits" else lambda batch, linear, labels: of_logits(linear(batch), labels)
    options = {"reduction": reduction, "function_takes": takes}
    memory_efficient_linear(x.requires_grad_(), make_linear(), labels, function, **options).sum().backward()
    with pytest.raises(
        ValueError, match=rf"^linear must have .* as parameters, got a tensor \({VOCABULARY}, {HIDDEN}\)"
    ):
        memory_efficient_linear(x, Tied(embeddings), labels, function, **options).sum().backward()
    value = memory_efficient_linear(x, Tied(embeddings.requires_grad_(False)), labels, function, **options)
    assert value.requires_grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_head_that_changes_its_buffers_is_refused(reduction):
    """Spectral norm goes on with its power iteration in each forward of training, so each chunk has another weight."""
    head, x, labels = nn.utils.parametrizations.spectral_norm(make_linear()), draw(12, HIDDEN), draw_labels(12)
    given = {"reduction": reduction, "chunk_size": 4}
    with pytest.raises(ValueError, match=r"^linear must not change its buffers in a forward, which runs once a chunk"):
        memory_efficient_linear(x.requires_grad_(), head, labels, FUNCTIONS[reduction], **given).sum().backward()
    head.eval()
    actual = memory_efficient_linear(x, head, labels, FUNCTIONS[reduction], **given)
    assert_same(actual, eager(x, head, labels, FUNCTIONS[reduction], reduction=reduction), [x, *head.parameters()])


@pytest.mark.parametrize("made", [torch.compile, lambda head: torch.jit.trace(head, draw(3, HIDDEN))])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_and_traced_heads(made, reduction):
    head, x, labels = make_linear(), draw(12, HIDDEN).requires_grad_(), draw_labels(12)
    function, inputs = FUNCTIONS[reduction], [x, *head.parameters()]
    actual = memory_efficient_linear(x, made(head), labels, function, reduction=reduction, chunk_size=4)
    assert_same(actual, eager(x, head, labels, function, reduction=reduction), inputs)


def test_calls_in_two_threads_leave_the_parameters_of_the_head():
    """The second call begins within the first and ends after it: each puts back what it has found."""
    head, x, labels = make_linear(), draw(4, HIDDEN), draw_labels(4, ignored=())
    weight, gradients = head.weight, {}
    first_is_in, second_is_in, first_is_done = (threading.Event() for _ in range(3))

    def first(batch, linear, labels):
        first_is_in.set()
        second_is_in.wait(0.2)
        return mean_loss(linear(batch), labels)

    def second(batch, linear, labels):
        second_is_in.set()
        first_is_done.wait(5)
        return mean_loss(linear(batch), labels)

    def run(function):
        loss = memory_efficient_linear(x, head, labels, function, function_takes="linear", check_additive=False)
        first_is_done.set()
        (gradients[function.__name__],) = torch.autograd.grad(loss, [weight])

    threads = [threading.Thread(target=run, args=[function]) for function in (first, second)]
    threads[0].start()
    assert first_is_in.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert head.weight is weight
    torch.testing.assert_close(gradients["first"], gradients["second"])
