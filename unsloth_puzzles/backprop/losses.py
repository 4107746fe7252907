"""Losses for `memory_efficient_linear`: plain functions of one chunk's logits, whose derivatives autograd finds.

Sums over rows, to be given `reduction="sum", normalizer="labels"` for the mean over the labels that count:

    memory_efficient_linear(hidden_states, head, labels, cross_entropy, reduction="sum", normalizer="labels")

`cross_entropy`, `z_loss`, `focal`, `kl_distillation(...)`. Per row, for `reduction="none"`: `token_log_probs`,
`entropy`, `token_log_probs_and_entropy`, and for sequences `dpo_loss` on their sums, all from `log_probs`.
`soft_capped(f, cap)` goes around any of them.

Logits of any floating dtype are computed with in float32; float64 stays. Labels are on their device. A row whose label
is `ignore_index` adds nothing and gets gradient zero, whatever finite values its logits have. Labels that are neither
that nor in [0, vocab) are for the caller to refuse, as the op does; give it the same `ignore_index`. Set options with
`functools.partial`, made once: compiled code belongs to the object.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from unsloth_puzzles.backprop.log_probs import dpo_loss, entropy, token_log_probs, token_log_probs_and_entropy
from unsloth_puzzles.backprop.softmax import (
    check_temperature,
    is_counted,
    log_softmax,
    log_sum_exp,
    mean_under,
    target_logits,
    upcast,
)

__all__ = [
    "cross_entropy", "dpo_loss", "entropy", "focal", "kl_distillation", "soft_cap", "soft_capped", "token_log_probs",
    "token_log_probs_and_entropy", "transformation_function", "z_loss",
]  # fmt: skip

IGNORED = -100  # the default of `ignore_index` of every function here


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum of -log softmax(logits)[label] over the rows, in nats: `F.cross_entropy(..., reduction="sum")`.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        class_weight: [vocab], by which the losses of each class are multiplied; pass it in `shared_args`. PyTorch's
            weighted mean divides by the weights of the labels, not by their number. For that mean pass
            `normalizer=class_weight[labels[labels != ignore_index]].sum()`.
        ignore_index: The label of rows that do not count.
        label_smoothing: What all classes share evenly of the target, from 0 to 1.

    Returns:
        A 0-dim tensor, float32 or wider.

    Raises:
        ValueError: `label_smoothing` or the shape of `class_weight`.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be a number from 0 to 1, got {label_smoothing}")
    z, valid = upcast(logits), is_counted(labels, ignore_index)
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
    """Sum of cross entropy + coefficient * log(Z)^2 over the rows, with Z the sum of exp(logits).

    It keeps log(Z) near 0, so that bf16 logits stay where bf16 is fine (PaLM, arXiv 2204.02311, section 5).

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        coefficient: Of the second term.
        ignore_index: The label of rows that do not count.

    Returns:
        A 0-dim tensor, float32 or wider.
    """
    z = upcast(logits)
    lse = log_sum_exp(z)
    loss = lse - target_logits(z, labels) + coefficient * lse.square()
    return torch.where(is_counted(labels, ignore_index), loss, 0).sum()


def focal(logits: torch.Tensor, labels: torch.Tensor, *, gamma: float = 2.0, ignore_index: int = -100) -> torch.Tensor:
    """Sum of (1 - p)^gamma * -log(p) over the rows, with p the probability of the label.

    What is learnt already weighs less (Lin et al., arXiv 1708.02002). Their class weights alpha are left out.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        gamma: The exponent, 0 or more; 0 gives cross entropy.
        ignore_index: The label of rows that do not count.

    Returns:
        A 0-dim tensor, float32 or wider.

    Raises:
        ValueError: `gamma` is negative.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be 0 or more, got {gamma}")
    z = upcast(logits)
    loss = log_sum_exp(z) - target_logits(z, labels)
    # At p = 1 rounding can leave less than 0, which has no power, or 0, whose power has an infinite slope at gamma < 1.
    loss = loss.clamp(min=torch.finfo(loss.dtype).tiny)
    return torch.where(is_counted(labels, ignore_index), (-torch.expm1(-loss)) ** gamma * loss, 0).sum()


def kl_distillation(
    teacher_head: Callable[[torch.Tensor], torch.Tensor], temperature: float = 1.0, *, ignore_index: int = -100
) -> Callable[..., torch.Tensor]:
    """Make the sum of temperature^2 * KL(teacher || student) over the rows (Hinton et al., arXiv 1503.02531).

    The teacher is a constant: no gradient reaches it. It projects chunk by chunk: its logits never all exist at once.
    The labels only say which rows count. Make the function once, outside the training loop.

    Args:
        teacher_head: A module or other callable, [..., teacher's hidden] -> [..., vocab] with the student's vocabulary.
            Includes the soft cap, if the teacher has one.
        temperature: By which both logits are divided, above 0.
        ignore_index: The label of rows that do not count.

    Returns:
        f(logits, labels, teacher_hidden_states), a 0-dim tensor in float32 or wider. The teacher's hidden states,
        [..., teacher's hidden], come through `row_args`. It raises ValueError if the logits differ in shape.

    Raises:
        ValueError: `temperature` is not above 0.
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
    return torch.where(is_counted(labels, ignore_index), divergence, 0).sum()


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(logits / cap): logits within (-cap, cap), as in Gemma 2.

    Args:
        logits: A floating dtype, any shape.
        cap: Above 0.

    Returns:
        A tensor of the same shape, float32 or wider.

    Raises:
        ValueError: `cap` is not above 0.
    """
    if cap <= 0:
        raise ValueError(f"cap must be a number above 0, got {cap}")
    return cap * torch.tanh(upcast(logits) / cap)


def soft_capped(f: Callable, cap: float) -> Callable:
    """Make the function f(soft_cap(logits, cap), labels, ...). Make it once, outside the training loop.

    Args:
        f: One of these losses or a function like them.
        cap: See `soft_cap`, which checks it when the function is called.

    Returns:
        A function of the arguments of `f`, which returns what `f` returns.
    """
    return partial(_of_soft_capped, f, cap)


def _of_soft_capped(f, cap, logits, labels, *extras):
    return f(soft_cap(logits, cap), labels, *extras)


def transformation_function(batch: torch.Tensor, linear: Callable, labels: torch.Tensor) -> torch.Tensor:
    """The puzzle's own function, for `function_takes="linear"` and `MemoryEfficientLinear.apply`.

    Args:
        batch: [..., hidden], the hidden states.
        linear: The head, [..., hidden] -> [..., vocab].
        labels: [...] integers, -100 where a row does not count.

    Returns:
        The mean cross entropy over the labels that are not -100, a 0-dim tensor, float32 or wider.
    """
    x = upcast(linear(batch))  # the puzzle's .float(): up projection to large space
    return F.cross_entropy(x.view(-1, x.shape[-1]), labels.view(-1))  # down projection to small space
