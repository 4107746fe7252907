"""The settings that change the loss of a causal LM: soft cap, scales, the loss function."""

from transformers import PreTrainedModel

# What model families call the number between head and loss. Which of them a model really applies is tried out.
MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
DIVISORS = ("logits_scaling",)  # Granite divides by it, HyperCLOVA X multiplies


def settings(causal_lm: PreTrainedModel) -> dict[str, object]:
    """The settings of the loss that may change after the model was tried: loss function, soft cap, scales, tuples."""
    return {
        "loss_function": causal_lm.loss_function,
        "final_logit_softcapping": soft_cap_of(causal_lm),
        "return_dict": getattr(causal_lm.config, "return_dict", True),
        **multipliers_of(causal_lm),
    }


def check_settings(causal_lm: PreTrainedModel, before: dict[str, object]) -> None:
    """Raise ValueError if a setting is not what it was `before`, when the model was patched."""
    if (now := settings(causal_lm)) != before:
        changed = ", ".join(name for name in now | before if now.get(name) != before.get(name))
        raise ValueError(f"{changed} must be as when the model was patched, got another; undo, set it, and patch again")


def soft_cap_of(causal_lm: PreTrainedModel) -> float | None:
    return getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)


def multipliers_of(causal_lm: PreTrainedModel) -> dict[str, float]:
    """Those of its config, and its own where it has copied them, as Cohere does: then its forward reads the copy."""
    config, own = causal_lm.config.get_text_config(), vars(causal_lm)
    found = {name: own.get(name, getattr(config, name, None)) for name in MULTIPLIERS}
    return {name: value for name, value in found.items() if value is not None}
