"""Log-probabilities and entropies of tokens, row by row for `reduction="none"`, and DPO on those of sequences.

What is said in `losses` of dtypes, ignored rows, wrong labels and options goes for these functions, too.
"""

import torch
import torch.nn.functional as F

from unsloth_puzzles.backprop.softmax import cooled, is_counted, log_sum_exp, softmax_statistics, target_logits


def token_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> torch.Tensor:
    """log softmax(logits / temperature)[label] of each row, in nats.

    Their sum over the tokens of a sequence is what `dpo_loss` takes.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        temperature: By which the logits are divided, above 0.
        ignore_index: The label of rows that do not count.

    Returns:
        [...], float32 or wider, 0 where the label is `ignore_index`.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    z = cooled(logits, temperature)
    return torch.where(is_counted(labels, ignore_index), target_logits(z, labels) - log_sum_exp(z), 0)


def entropy(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> torch.Tensor:
    """Entropy of softmax(logits / temperature) of each row, in nats.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        temperature: By which the logits are divided, above 0.
        ignore_index: The label of rows that do not count.

    Returns:
        [...], float32 or wider, 0 where the label is `ignore_index`.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    lse, mean = softmax_statistics(cooled(logits, temperature))
    return torch.where(is_counted(labels, ignore_index), lse - mean, 0)


def token_log_probs_and_entropy(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, *, ignore_index: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_log_probs` and `entropy` of each row from one softmax: what policy gradients (GRPO) are made of.

    Args:
        logits: [..., vocab], a floating dtype.
        labels: [...] integers.
        temperature: By which the logits are divided, above 0.
        ignore_index: The label of rows that do not count.

    Returns:
        Both, [...] each, float32 or wider, 0 where the label is `ignore_index`.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    z, valid = cooled(logits, temperature), is_counted(labels, ignore_index)
    lse, mean = softmax_statistics(z)
    return torch.where(valid, target_logits(z, labels) - lse, 0), torch.where(valid, lse - mean, 0)


def dpo_loss(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Direct preference optimisation (arXiv 2305.18290).

    Not for `forward_function`: it takes what `memory_efficient_linear(..., token_log_probs, reduction="none").sum(-1)`
    returns for labels [2 * pairs, length].

    Args:
        policy_logps: [2 * pairs], log-probabilities of whole sequences in nats, a floating dtype: first every chosen
            one, then every rejected one in the same order.
        reference_logps: [2 * pairs], those of the reference model.
        beta: By which the differences from the reference are multiplied.
        label_smoothing: The probability that a preference was noted the wrong way round (cDPO).

    Returns:
        The mean over the pairs, a 0-dim tensor in the dtype of the arguments.

    Raises:
        ValueError: The arguments differ in shape, or are not of that shape.
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
