"""What GRPO needs of a model's logits: of each token its log-probability, and perhaps its distribution's entropy."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from unsloth_puzzles.backprop.log_probs import token_log_probs, token_log_probs_and_entropy
from unsloth_puzzles.backprop.losses import soft_cap


@dataclass
class TokenScores(ModelOutput):
    """The output that TRL's `GRPOTrainer` reads.

    Attributes:
        log_probs: [batch, length - 1] float32, of each next token, in nats; 0 where the label is -100.
        entropy: The same of entropies; None for the reference model.
        aux_loss: The auxiliary loss of a mixture of experts, 0-dim, or None.
    """

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def row_scores(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float,
    scale: float,
    cap: float | None,
    with_entropy: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and perhaps entropies from the head's logits: the function that is run on each chunk.

    Args:
        logits: [rows, vocab], a floating dtype.
        labels: [rows] integers, -100 where a row does not count.
        temperature: By which the logits are divided, after scale and cap.
        scale: By which they are multiplied.
        cap: Of `soft_cap` after that; None without.
        with_entropy: Whether entropies are wanted.

    Returns:
        Log-probabilities [rows] in nats, float32 or wider; `with_entropy` a pair of these and entropies.
    """
    z = _scaled(logits, scale, cap)
    return (token_log_probs_and_entropy if with_entropy else token_log_probs)(z, labels, temperature)


def _scaled(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    if scale != 1.0:
        logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    return logits if cap is None else soft_cap(logits, cap)
