"""Which trainers of transformers and TRL leave the loss to the model."""

from collections.abc import Callable

from transformers import Trainer

from unsloth_puzzles.backprop.losses import cross_entropy

_TO_METRICS = "and compute_metrics gets (predicted_ids, token_log_probs) as its predictions"


def check_trainer(trainer: Trainer, loss: Callable, predictions: bool) -> bool:
    """Whether `trainer` is an SFTTrainer. Raises ValueError for one whose loss is not the model's."""
    from_trl = [kind for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"]
    is_sft = any(kind.__name__ == "SFTTrainer" for kind in from_trl)
    if from_trl and not is_sft:
        raise ValueError(
            f"model must be an SFTTrainer or a trainer that is not TRL's, got a {type(trainer).__name__}; for GRPO "
            "use MemoryEfficientGRPOTrainer alone, without use_memory_efficient_loss and without compile_qlora"
        )
    if is_sft and loss is not cross_entropy:
        raise ValueError(
            "loss must be cross_entropy with SFTTrainer, got another: it makes its own of the log-probabilities; "
            "choose its loss_type ('nll' or 'dft')"
        )
    if is_sft and predictions:
        raise ValueError(
            "predictions must be False with SFTTrainer, got True: it has its own metrics, and evaluates with "
            "the logits if others are given"
        )
    for name, given, instead in (
        (
            "label_smoothing_factor",
            trainer.label_smoother,
            "switch it off: there is no smoothing with SFTTrainer"
            if is_sft
            else "pass loss=partial(cross_entropy, label_smoothing=...)",
        ),
        ("compute_loss_func", trainer.compute_loss_func, "pass it as loss, in the form of backprop.losses"),
        ("use_liger_kernel", trainer.args.use_liger_kernel, "switch it off: it exchanges the same forward"),
        # SFTTrainer evaluates a second time, with logits, for these two.
        (
            "compute_metrics",
            trainer.compute_metrics and not (predictions or is_sft),
            f"pass predictions=True, {_TO_METRICS}",
        ),
        (
            "preprocess_logits_for_metrics",
            trainer.preprocess_logits_for_metrics and not is_sft,
            f"take it away and pass predictions=True, {_TO_METRICS}",
        ),
    ):
        if given:
            raise ValueError(
                f"{name} must not be set, got {given!r}, which needs the logits or replaces the loss; {instead}"
            )
    if trainer.model_init is not None:
        raise ValueError(
            f"model_init must be None, got {trainer.model_init!r}: train() makes another model by it, which would not "
            "be patched; make the Trainer with model=model_init()"
        )
    return is_sft


def refuse_predict(trainer: Trainer) -> Callable[[], None]:
    """Let `trainer.predict` raise a ValueError, since its predictions would be empty without logits; returns the undo.

    `evaluate` needs no logits without `compute_metrics`.
    """

    def predict(*args, **kwargs):
        raise ValueError(
            "predictions must be True for trainer.predict, got False: no logits are made; pass predictions=True to "
            "use_memory_efficient_loss, or undo it first"
        )

    before = vars(trainer).get("predict")
    trainer.predict = predict

    def undo() -> None:
        if vars(trainer).get("predict") is predict:
            del trainer.predict
            if before is not None:
                trainer.predict = before

    return undo
