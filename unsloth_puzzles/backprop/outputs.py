"""What a patched model returns instead of logits, and the per-row functions that it is made of."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from unsloth_puzzles.backprop.log_probs import token_log_probs, token_log_probs_and_entropy
from unsloth_puzzles.backprop.probe import transform


@dataclass
class EvaluatedCausalLMOutput(CausalLMOutputWithPast):
    """CausalLMOutputWithPast without logits; in eval mode, if asked for, with what metrics need instead of them."""

    predicted_ids: torch.LongTensor | None = None
    token_log_probs: torch.FloatTensor | None = None


@dataclass
class PerTokenOutput(ModelOutput):
    """The output for TRL's `SFTTrainer`: all fields but `loss` are (batch, length), 0 where there is no label."""

    loss: torch.FloatTensor | None = None
    log_probs: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    is_top1: torch.BoolTensor | None = None
    label_mask: torch.BoolTensor | None = None
    aux_loss: torch.FloatTensor | None = None


def transformed(loss, scale, cap, logits, labels):
    """A loss of the logits that the model makes of its head's.

    Args:
        loss: `loss(logits, labels)`.
        scale: See `transform`, as for `cap`.
        logits: [rows, vocab] from the head, a floating dtype.
        labels: [rows] integers.

    Returns:
        What `loss` returns.
    """
    return loss(transform(logits, scale, cap), labels)


def token_predictions(scale, cap, logits, labels):
    """Likeliest class and the label's log-probability, row by row.

    Args:
        scale, cap, logits, labels: As for `transformed`.

    Returns:
        [rows] int64 and [rows] in nats, float32 or wider, 0 where there is no label.
    """
    logits = transform(logits, scale, cap)
    return logits.argmax(-1), token_log_probs(logits, labels)


def token_statistics(scale, cap, logits, labels):
    """The label's log-probability, with a gradient, and for the metrics entropy and whether the label is likeliest.

    Args:
        scale, cap, logits, labels: As for `transformed`.

    Returns:
        Two [rows] in nats, float32 or wider, 0 where there is no label, and [rows] bool.
    """
    logits = transform(logits, scale, cap)
    entropies = token_log_probs_and_entropy(logits.detach(), labels)[1]
    return token_log_probs(logits, labels), entropies, logits.detach().argmax(-1) == labels


def per_token_output(log_probs, entropies, is_top1, label_mask, normalizer) -> PerTokenOutput:
    label_mask = label_mask.to(log_probs.device)
    loss = -log_probs.sum() / (label_mask.sum().clamp(min=1) if isinstance(normalizer, str) else normalizer)
    return PerTokenOutput(loss, log_probs, entropies, is_top1, label_mask)
