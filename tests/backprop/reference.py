"""What the op must equal: the same function of all logits at once, differentiated by autograd."""

import torch
import torch.nn.functional as F

HIDDEN, VOCABULARY, IGNORED = 6, 11, -100
EXACT = 1e-13  # relative norm in float64: the same sums in another order


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def draw_labels(*shape: int, vocabulary: int = VOCABULARY, ignored: tuple = (0, 5, 6, 7), seed: int = 1):
    """Labels of which the rows `ignored` do not count: of chunks of 4 rows, the second has one that does."""
    labels = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    labels.view(-1)[list(ignored)] = IGNORED
    return labels


def make_linear(hidden=HIDDEN, vocabulary=VOCABULARY, bias=True, dtype=torch.float64, device="cpu", seed=2):
    layer = torch.nn.Linear(hidden, vocabulary, bias=bias, dtype=dtype, device=device)
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, seed=seed + i, device=device).to(dtype) / hidden**0.5
    return layer


def relative(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of `exact`, in float64."""
    assert actual.shape == exact.shape
    off, size = (actual.detach().double() - exact.detach().double()).norm(), exact.detach().double().norm()
    return (off / size).item() if size else off.item()


def as_tuple(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def upcast(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_loss(logits, labels):
    return F.cross_entropy(upcast(logits), labels)


def sum_loss(logits, labels):
    return F.cross_entropy(upcast(logits), labels, reduction="sum")


def token_losses(logits, labels):
    return F.cross_entropy(upcast(logits), labels, reduction="none")


def losses_and_entropies(logits, labels):
    """Two results of other shapes, and one that has no gradient."""
    log_probs = upcast(logits).log_softmax(-1)
    entropies = -(log_probs.exp() * log_probs).sum(-1)
    losses = F.nll_loss(log_probs, labels, reduction="none")
    return losses, torch.stack([entropies, losses.square()], -1), logits.argmax(-1)


def transformation(batch, linear, labels):
    """The puzzle's own: it projects its rows, and takes the mean."""
    return F.cross_entropy(upcast(linear(batch)), labels)


def eager(hidden, linear, labels, function, *, reduction="mean", normalizer=None, takes="logits", rows=(), shared=()):
    """The same result from all logits, in the caller's dtype. hidden: (..., hidden)."""
    leading = hidden.dim() - 1
    flat = hidden.reshape(-1, hidden.shape[-1])
    arguments = [None if labels is None else labels.reshape(-1), *(r.reshape(-1, *r.shape[leading:]) for r in rows)]
    first = (flat, linear) if takes == "linear" else (linear(flat),)
    value = function(*first, *arguments, *shared)
    if reduction != "none":
        if isinstance(normalizer, str):
            normalizer = (labels != IGNORED).sum()
        return value if normalizer is None else value / normalizer
    whole = tuple(each.view(*hidden.shape[:-1], *each.shape[1:]) for each in as_tuple(value))
    return whole if isinstance(value, tuple) else whole[0]


def gradients_of(result, inputs, upstream_seed=3):
    """Gradients for upstream gradients that are neither 1 nor alike, of one result or several."""
    results = [r for r in as_tuple(result) if r.requires_grad]
    slopes = [draw(*r.shape, seed=upstream_seed + i).to(r) if r.dim() else -2.7 for i, r in enumerate(results)]
    return torch.autograd.grad(
        results, inputs, [torch.as_tensor(slope).to(r) for slope, r in zip(slopes, results, strict=True)]
    )


def assert_same(actual, expected, inputs, bound=EXACT):
    """Values and gradients agree: relative norms, each below `bound`."""
    for ours, theirs in zip(as_tuple(actual), as_tuple(expected), strict=True):
        assert relative(ours, theirs) <= bound
    for ours, theirs in zip(gradients_of(actual, inputs), gradients_of(expected, inputs), strict=True):
        assert relative(ours, theirs) <= bound
