"""Other losses from all logits at once, each in a few lines: what the losses of `backprop` are compared with.

logits: [rows, vocab]; labels: [rows], -100 where ignored. Each returns a sum over the rows, or a value a row.
"""

import torch
import torch.nn.functional as F


def z_loss(logits: torch.Tensor, labels: torch.Tensor, coefficient: float = 0.1) -> torch.Tensor:
    penalty = logits.logsumexp(-1).square() * (labels != -100)
    return F.cross_entropy(logits, labels, reduction="sum") + coefficient * penalty.sum()


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return -((1 - p) ** 2 * p.log() * (labels != -100)).sum()


def distillation(logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 2.0):
    wanted, found = (F.log_softmax(z / temperature, -1) for z in (teacher_logits, logits))
    by_row = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    return temperature**2 * (by_row * (labels != -100)).sum()


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1) * (labels != -100)


def entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy() * (labels != -100)
