"""Load a language model as a classifier of sequences, in NF4.

model, tokenizer = load_classifier("unsloth/Llama-3.2-1B-bnb-4bit", ["negative", "positive"])
model = add_adapters(model)                      # adapters.py
Trainer(model, ..., processing_class=tokenizer).train()
save_classifier(model, tokenizer, "folder")      # adapters.py; load_trained("folder") gives both back
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unsloth_puzzles.classification.losses import PROBLEM_TYPES, SINGLE
from unsloth_puzzles.classification.padding import set_pad_token
from unsloth_puzzles.classification.pooling import pool_by_mask
from unsloth_puzzles.device import capability
from unsloth_puzzles.stored_dtype import cast_unquantised

HEAD = "score"
OWN_OPTIONS = {"num_labels", "id2label", "label2id", "config", "quantization_config", "device_map", "torch_dtype"}
HUB_OPTIONS = ("revision", "cache_dir", "token", "trust_remote_code", "local_files_only", "subfolder")


def load_classifier(
    name: str,
    labels: Sequence[str],
    *,
    problem_type: str = SINGLE,
    four_bit: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: object,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the weights of a causal LM under a new head with one output for each label.

    PyTorch's generator draws the new head: call `torch.manual_seed` before. The head is float32 and never quantised,
    even if the settings of a quantised checkpoint do not exclude it. Logits are read at the last token in the attention
    mask (see `pooling.pool_by_mask`), and padding has its own token (see `padding.set_pad_token`).

    Args:
        name: A folder or a name on the hub: a causal LM in 16 bits or in bitsandbytes' 4 bits, or a classifier with
            these labels.
        labels: Names of the labels, in the order of the logits; for a regression, names of its numbers.
        problem_type: One of `losses.PROBLEM_TYPES`.
        four_bit: Whether to quantise the linear layers to NF4, double-quantised, if the checkpoint is not quantised.
        dtype: Dtype of the other weights and of the computation. None means bfloat16 on a GPU that supports it, float16
            on other GPUs, float32 on a CPU.
        device: None means the current GPU, or the CPU if there is none.
        tokenizer: None means the checkpoint's. Its padding token may be replaced.
        **options: Options of `from_pretrained`, such as `revision` or `attn_implementation`.

    Returns:
        The model, in training mode, and the tokenizer.

    Raises:
        ValueError: `labels` or `problem_type` is invalid; the checkpoint is quantised in another way, or is a
            classifier with other labels; `tokenizer` has tokens beside padding that the embeddings have no row for.
        TypeError: `labels` is not a list of names; the architecture has another kind of head.
    """
    labels = _checked_labels(labels, problem_type)
    if own := OWN_OPTIONS & set(options):
        raise ValueError(f"options must be others, got {', '.join(sorted(own))}, which load_classifier sets itself")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or default_dtype(device)
    of_hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    config = AutoConfig.from_pretrained(name, **of_hub)
    _refuse_other_labels(config, labels, problem_type)
    quantization = _quantization(config, four_bit, dtype)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = problem_type
    model = AutoModelForSequenceClassification.from_pretrained(
        name, config=config, dtype=dtype, device_map={"": device}, quantization_config=quantization, **options
    )
    if quantization is None and getattr(config, "quantization_config", None) is not None:
        cast_unquantised(model, dtype)
    pool_by_mask(model)
    _check_head(model, len(labels))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # in eval mode it would re-pack weights, rounding absmax for good
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name, **of_hub)
    set_pad_token(tokenizer, model)
    return model.train(), tokenizer


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, float16 on an older one, float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if capability(device) >= 80 else torch.float16


def _checked_labels(labels: Sequence[str], problem_type: str) -> list[str]:
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
    # A set or a dict has no order that says which logit is whose.
    listed = isinstance(labels, Iterable) and not isinstance(labels, (str, Set, Mapping))
    if not listed or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels must be a list of names, one for each class, got {labels!r}")
    labels = list(labels)
    least = 2 if problem_type == SINGLE else 1
    if len(labels) < least or len(set(labels)) < len(labels):
        raise ValueError(f"labels must be at least {least} different names for {problem_type}, got {labels}")
    return labels


def _refuse_other_labels(config, labels: list[str], problem_type: str) -> None:
    """Refuse a trained head of other labels or another problem type, which would be loaded under the given ones."""
    trained = [one for one in config.architectures or () if one.endswith("ForSequenceClassification")]
    if trained and list(config.id2label.values()) != labels:
        raise ValueError(
            f"labels must be those of the checkpoint, a {trained[0]}, {list(config.id2label.values())}, got {labels}; "
            "for other labels load the causal LM that it was made of"
        )
    if trained and config.problem_type not in (None, problem_type):
        raise ValueError(f"problem_type must be the checkpoint's, {config.problem_type}, got {problem_type!r}")


def _quantization(config, four_bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Settings for `from_pretrained`. Those of a quantised checkpoint are changed in its config, which has priority."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        if not four_bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[HEAD],
        )
    given = given if isinstance(given, dict) else given.to_dict()
    if not (given.get("load_in_4bit") and given.get("quant_method", "bitsandbytes") == "bitsandbytes"):
        raise ValueError(f"name must be a checkpoint in 16 bits or in bitsandbytes' 4 bits, got {given}")
    if not four_bit:
        raise ValueError("four_bit must be True for a checkpoint that is quantised; load the one in 16 bits instead")
    skipped = [*(given.get("llm_int8_skip_modules") or []), HEAD]
    config.quantization_config = {
        **given,
        "llm_int8_skip_modules": list(dict.fromkeys(skipped)),
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),  # T4s have no bfloat16, which most are stored for
    }
    return None


def _check_head(model: PreTrainedModel, number: int) -> None:
    """Check that transformers made an unquantised head of this name and size, and cast it to float32."""
    head = getattr(model, HEAD, None)
    if type(head) is not torch.nn.Linear or not head.weight.is_floating_point() or head.out_features != number:
        raise TypeError(
            f"model must have an unquantised linear {HEAD!r} of {number} outputs, got {head} in {type(model).__name__}"
        )
    head.float()
