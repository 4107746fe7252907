"""Losses for `memory_efficient_linear`: plain functions of one chunk's logits, whose derivatives autograd finds.

Sums over rows, to be given `reduction="sum", normalizer="labels"` for the mean over the labels that count:

    memory_efficient_linear(hidden_states, head, labels, cross_entropy, reduction="sum", normalizer="labels")

`cross_entropy`, `z_loss`, `focal`, `kl_distillation(...)`. Per row, for `reduction="none"`: `token_log_probs`,
`entropy`, `token_log_probs_and_entropy`, and for sequences `dpo_loss` on their sums. `soft_capped(f, cap)` goes around
any of them.

Throughout, `logits` are (..., vocabulary) of any floating dtype, computed with in float32 (float64 stays); `labels` are
integers (...), on the same device. A row whose label is `ignore_index` adds nothing and gets gradient zero whatever
finite values its logits have; labels that are neither that nor in [0, vocabulary) are the caller's to refuse, as the op
does (give it the same `ignore_index`). Set options with `functools.partial`, made once: compiled code belongs to the
object.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from unsloth_puzzles.backprop.softmax import (
    check_temperature,
    cooled,
    log_softmax,
    log_sum_exp,
    mean_under,
    softmax_statistics,
    upcast,
)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum of -log softmax(logits)[label] over the rows: `F.cross_entropy(..., reduction="sum")`, 0-dim.

    `class_weight` (vocabulary,) comes through `shared_args`. PyTorch's weighted mean divides by the labels' weights,
    not by their number: for that pass `normalizer=class_weight[labels[labels != ignore_index]].sum()`.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number from 0 to 1, got {label_smoothing}")
    z, valid = upcast(logits), labels != ignore_index
    lse = log_sum_exp(z)
    loss = lse - target_logits(z, labels)
    if class_weight is not None:
        if class_weight.shape != z.shape[-1:]:
            raise ValueError(
                f"class_weight must have shape ({z.shape[-1]},), one a class, got {tuple(class_weight.shape)}"
            )
        loss = loss * class_weight[torch.where(valid, labels, 0)]
    if label_smoothing > 0:
        of_all = lse[..., None] - z  # -log p of each class; every class shares label_smoothing evenly
        uniform = (of_all if class_weight is None else of_all * class_weight).mean(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    return torch.where(valid, loss, 0).sum()


def z_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, coefficient: float = 1e-4, ignore_index: int = -100
) -> torch.Tensor:
    """Sum of cross entropy + coefficient * log(Z)^2, Z = sum of exp(logits), over the rows, 0-dim: it keeps log(Z) near
    0, so that bf16 logits stay where bf16 is fine (PaLM, arXiv 2204.02311, section 5)."""
    z = upcast(logits)
    lse = log_sum_exp(z)
    loss = lse - target_logits(z, labels) + coefficient * lse.square()
    return torch.where(labels != ignore_index, loss, 0).sum()


def focal(logits: torch.Tensor, labels: torch.Tensor, *, gamma: float = 2.0, ignore_index: int = -100) -> torch.Tensor:
    """Sum of (1 - p)^gamma * -log(p), p the label's probability, over the rows, 0-dim: what is learnt already weighs
    less (Lin et al., arXiv 1708.02002). Without its class weights alpha; gamma 0 is cross entropy."""
    if gamma < 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}")
    z = upcast(logits)
    loss = log_sum_exp(z) - target_logits(z, labels)
    # At p = 1 rounding can leave less than 0, which has no power, or 0, whose power has an infinite slope at gamma < 1.
    loss = loss.clamp(min=torch.finfo(loss.dtype).tiny)
    return torch.where(labels != ignore_index, (-torch.expm1(-loss)) ** gamma * loss, 0).sum()


def kl_distillation(
    teacher_head: Callable[[torch.Tensor], torch.Tensor], temperature: float = 1.0, *, ignore_index: int = -100
) -> Callable[..., torch.Tensor]:
    """A function f(logits, labels, teacher_hidden_states): the sum of temperature^2 * KL(teacher || student) over the
    rows, both softened by `temperature` (Hinton et al., arXiv 1503.02531), 0-dim.

    The teacher's hidden states (..., its hidden size) come through `row_args`, and `teacher_head`, a module or other
    callable (with its soft cap, if it has one), projects them chunk by chunk: all of the teacher's logits never exist.
    The teacher is a constant: no gradient reaches it. Its vocabulary must be the student's. The labels say only which
    rows count. Make the function once, outside the training loop.
    """
    check_temperature(temperature)
    return partial(_kl_to_teacher, teacher_head, temperature, ignore_index)


def _kl_to_teacher(teacher_head, temperature, ignore_index, logits, labels, teacher_hidden_states):
    with torch.no_grad():
        teacher_logits = teacher_head(teacher_hidden_states)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"teacher_head must give logits of the student's shape {tuple(logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    teacher, student = (log_softmax(x, temperature) for x in (teacher_logits, logits))
    divergence = temperature**2 * mean_under(teacher.exp(), teacher - student)
    return torch.where(labels != ignore_index, divergence, 0).sum()


def token_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> torch.Tensor:
    """log softmax(logits / temperature)[label] of each row, in nats: (...) float32 (float64), 0 where ignored.

    Summed over the tokens of a sequence: what `dpo_loss` takes.
    """
    z = cooled(logits, temperature)
    return torch.where(labels != ignore_index, target_logits(z, labels) - log_sum_exp(z), 0)


def entropy(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> torch.Tensor:
    """Entropy of softmax(logits / temperature) of each row, in nats: (...) float32 (float64), 0 where ignored."""
    lse, mean = softmax_statistics(cooled(logits, temperature))
    return torch.where(labels != ignore_index, lse - mean, 0)


def token_log_probs_and_entropy(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probs` and `entropy` of each row from one softmax: what policy gradients (GRPO) are made of."""
    z, valid = cooled(logits, temperature), labels != ignore_index
    lse, mean = softmax_statistics(z)
    return torch.where(valid, target_logits(z, labels) - lse, 0), torch.where(valid, lse - mean, 0)


def dpo_loss(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Direct preference optimisation (arXiv 2305.18290), mean over the pairs, 0-dim.

    Both arguments are (2 * pairs,) log-probabilities of whole sequences: first every chosen one, then every rejected
    one in the same order. `label_smoothing` is the probability that a preference was noted the wrong way round (cDPO).
    Not for `forward_function`: it takes what `memory_efficient_linear(..., token_log_probs, reduction="none").sum(-1)`
    returns for (2 * pairs, length) labels.

    Raises ValueError if the two differ in shape or are not of that shape.
    """
    if policy_logps.ndim != 1 or len(policy_logps) % 2 or not len(policy_logps):
        raise ValueError(
            f"policy_logps must have shape (2 * pairs,), chosen then rejected, got {tuple(policy_logps.shape)}"
        )
    if reference_logps.shape != policy_logps.shape:
        got = tuple(reference_logps.shape)
        raise ValueError(f"reference_logps must have policy_logps' shape {tuple(policy_logps.shape)}, got {got}")
    chosen, rejected = (policy_logps - reference_logps).chunk(2)
    margin = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap), in float32 (float64 stays): logits within (-cap, cap), as in Gemma 2."""
    if cap <= 0:
        raise ValueError(f"cap must be a number above 0, got {cap}")
    return cap * torch.tanh(upcast(logits) / cap)


def soft_capped(f: Callable, cap: float) -> Callable:
    """The function f(soft_cap(logits, cap), labels, ...). Make it once, outside the training loop."""
    return partial(_of_soft_capped, f, cap)


def _of_soft_capped(f, cap, logits, labels, *extras):
    return f(soft_cap(logits, cap), labels, *extras)


def transformation_function(batch: torch.Tensor, linear: Callable, labels: torch.Tensor) -> torch.Tensor:
    """The puzzle's own function: it up-projects itself and takes the mean over the labels that are not -100, 0-dim.

    For `function_takes="linear"` and `MemoryEfficientLinear.apply`.
    """
    x = upcast(linear(batch))  # the puzzle's .float(): up projection to large space
    return F.cross_entropy(x.view(-1, x.shape[-1]), labels.view(-1))  # down projection to small space


def target_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits[..., label] of each row, (...); 0 where the label is no index.

    A comparison, not `gather`: Inductor fuses it into the softmax's own passes, whereas the gradient of `gather` is a
    scatter into a float32 temporary as large as the logits.
    """
    classes = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return torch.where(classes == labels[..., None].int(), logits, 0).sum(-1)
