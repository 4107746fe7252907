"""Every loss with what it should be: PyTorch's own functions in float64, on the rows that count."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from unsloth_puzzles.backprop import losses

IGNORED = -100
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
