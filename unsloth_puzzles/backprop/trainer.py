"""Train a causal language model of transformers without its logits, whoever the trainer is.

    with use_memory_efficient_loss(model):           # transformers.Trainer, accelerate, a loop of one's own
        Trainer(model, ...).train()

    trainer = SFTTrainer(model, ...)                 # TRL puts a fused head of its own into the model it is given:
    with use_memory_efficient_loss(trainer):         # so afterwards, and the trainer, not the model
        trainer.train()

With `compute_metrics` give the Trainer itself and `predictions=True`: there are no logits to compute metrics of.

The only thing exchanged is the `forward` of the causal LM (inside PEFT's wrapper if there is one), and of that only
calls with labels: see `patched_loss`.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, Trainer

from unsloth_puzzles.backprop.causal_lm import find_causal_lm, refuse_data_parallel
from unsloth_puzzles.backprop.losses import IGNORED, cross_entropy
from unsloth_puzzles.backprop.patched_loss import PatchedLoss
from unsloth_puzzles.backprop.probe import logit_transform, own_autocast
from unsloth_puzzles.backprop.trainer_checks import check_trainer, refuse_predict


def use_memory_efficient_loss(
    model: PreTrainedModel | torch.nn.Module | Trainer,
    loss: Callable = cross_entropy,
    *,
    predictions: bool = False,
    chunk_size: int | str = "auto",
    accumulate_dtype: torch.dtype | None = None,
    compile: bool = False,
    skip_ignored: bool = False,
) -> PatchedLoss:
    """Let `model(..., labels=labels)` compute its loss by `memory_efficient_linear`, in training and in evaluation.

    The call returns CausalLMOutputWithPast(loss=..., logits=None). Labels [batch, length] are shifted as transformers
    shifts them (`shift_labels` are taken as they are). The sum of `loss` over the chunks is divided by
    `num_items_in_batch`, or by the number of labels without one, so gradient accumulation weighs every token alike.
    Labels that are `ignore_index` do not count: `loss` sees -100 there. Soft cap and logit scale of the config are
    applied in the logits' dtype, as the model does. Such a call has no KV cache (`use_cache` is False unless it is
    given), so that position ids which begin anew are packed documents to transformers. Calls without labels
    (generation) are the model's own, and so is everything before the head: gradient checkpointing, attention,
    quantised layers. `SFTTrainer` (loss types "nll" and "dft") asks for log-probabilities and for its metrics in the
    same call: they come from the op's per-row mode, which projects once more in the backward.

    Args:
        model: A causal LM, a PEFT model of one, or a `Trainer` (a TRL `SFTTrainer` must be given itself).
        loss: `loss(logits, labels)`, one of `losses` or a function like them: a sum over rows.
        predictions: Outputs in eval mode also hold `predicted_ids` [batch, length] int64, the likeliest next token at
            each position, and `token_log_probs` [batch, length] float32, 0 where there is no label. They are what
            `compute_metrics` then gets as predictions, instead of logits. Without it `predict` of a Trainer that was
            given is refused; that of a Trainer around a patched model returns no predictions.
        chunk_size: See `memory_efficient_linear`, as for the next two.
        accumulate_dtype: In which the weight's gradient is summed.
        compile: Let Inductor fuse the loss and its gradient.
        skip_ignored: Project only the rows that have a label, and of which `loss` must be a sum: where the prompts of
            conversations have no labels, the head then has a fraction of the work. Each call asks the device once how
            many rows there are, before the backbone runs, and the host waits for the answer.

    Returns:
        A handle: `.calls`, the losses computed so far, `.undo()`; as a context manager it undoes at the end.

    Raises:
        TypeError: `model` is no causal LM of transformers, or wrapped in `nn.DataParallel`.
        ValueError: Rows are to be skipped, and `loss` is not 0 for rows without a label; what the model's loss is made
            of is not known here: an encoder-decoder, another `loss_function`, a router's auxiliary loss, anything
            between backbone, head and loss beyond soft cap and scale (found out by two forwards of the model's own, of
            padded rows: see `probe.logit_transform`); a trainer that needs the logits (`label_smoothing_factor`,
            `compute_loss_func`: pass `loss` instead; `preprocess_logits_for_metrics`, and `compute_metrics` without
            `predictions`), makes its model anew (`model_init`) or sees several GPUs in one process; a model that is
            patched already.
    """
    trainer, model = (model, model.model) if isinstance(model, Trainer) else (None, model)
    refuse_data_parallel(model, trainer.args.n_gpu if trainer else 1)
    per_token = trainer is not None and check_trainer(trainer, loss, predictions)
    causal_lm = find_causal_lm(model, per_token)
    between = logit_transform(causal_lm)
    if not isinstance(skip_ignored, bool):
        raise TypeError(f"skip_ignored must be True or False, got {skip_ignored!r}")
    if skip_ignored:
        _check_ignored(loss, causal_lm)
    options = {"chunk_size": chunk_size, "accumulate_dtype": accumulate_dtype, "compile": compile}
    autocast = own_autocast(causal_lm)
    patch = PatchedLoss(causal_lm, loss, between, autocast, predictions, per_token, skip_ignored, options)
    if trainer is not None and not (per_token or predictions):  # SFTTrainer predicts with the logits
        patch.also_undo(refuse_predict(trainer))
    return patch


def _check_ignored(loss: Callable, causal_lm: PreTrainedModel) -> None:
    """Refuse to skip rows without a label if `loss` counts them, by a row of any logits that has none."""
    head = causal_lm.get_output_embeddings()
    device = next(head.parameters()).device
    vocab_size = causal_lm.config.get_text_config().vocab_size
    logits = torch.linspace(-1, 1, vocab_size, device=device)[None].requires_grad_()
    with torch.enable_grad():
        value = loss(logits, torch.full((1,), IGNORED, device=device))
        (slope,) = torch.autograd.grad(value, logits, allow_unused=True) if value.requires_grad else (None,)
    if value.item() or (slope is not None and slope.any()):
        raise ValueError(
            f"skip_ignored must be False with this loss, which a row without a label changes by {value.item():.3g}"
        )
