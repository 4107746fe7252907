"""PEFT adapters on a classifier: train them with its head, save both, and load both."""

import inspect
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from unsloth_puzzles.classification.load import HEAD, load_classifier
from unsloth_puzzles.classification.losses import check_problem_type, weigh_classes
from unsloth_puzzles.classification.pooling import is_pooled

_UNREPEATABLE = ("pissa_niter_", "corda", "lora_ga")  # by random numbers, data or gradients they change the base model
FILE = "classifier.json"  # beside PEFT's files: what the adapter's config does not say of its base model


def add_adapters(
    model: PreTrainedModel,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    target_modules: str | list[str] | None = "all-linear",
    gradient_checkpointing: bool = False,
    **options: object,
) -> PeftModel:
    """Add LoRA for sequence classification. The whole head is trained, in float32, and saved with the adapters.

    Args:
        model: From `load_classifier`.
        r: Rank of the adapters.
        lora_alpha: The adapters are scaled by lora_alpha / r.
        target_modules: As in `LoraConfig`: "all-linear" selects every linear layer except the head, None those that
            PEFT chooses for the architecture.
        gradient_checkpointing: Whether to compute the layers again in the backward pass, non-reentrant.
        **options: Other options of `LoraConfig`.

    Returns:
        The PEFT model, in training mode.

    Raises:
        TypeError: `model` is not from `load_classifier`.
        ValueError: With these options the head would not be trained and saved, or `init_lora_weights` changes the base
            model in a way that `load_trained` cannot repeat.
    """
    if isinstance(model, PeftModel) or not is_pooled(model):
        raise TypeError(f"model must be what load_classifier returns, got a {type(model).__name__}")
    if options.pop("task_type", "SEQ_CLS") != "SEQ_CLS":
        raise ValueError("task_type must be 'SEQ_CLS' or left out, got another: the head would stay frozen and unsaved")
    named = [] if target_modules is None or isinstance(target_modules, str) else target_modules
    if any(one.split(".")[-1] == HEAD for one in named):
        raise ValueError(f"target_modules must be without {HEAD!r}, which is trained as a whole, got {target_modules}")
    if str(initial := options.get("init_lora_weights")).startswith(_UNREPEATABLE):
        raise ValueError(f"init_lora_weights must leave the base model as load_trained loads it, got {initial!r}")
    given = {"r": r, "lora_alpha": lora_alpha, "target_modules": target_modules, **options}
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **given))
    _prepare_head(adapted, trained=True)
    if gradient_checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted.train()


def save_classifier(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save adapters, head, tokenizer, labels and class weights. Of the base model, only its name and dtypes are saved.

    Args:
        model: From `add_adapters`. Weights may have been cast since they were loaded, as by
            `peft.prepare_model_for_kbit_training`; `load_trained` casts them likewise, once.
        tokenizer: From `load_classifier`.
        folder: The folder to write. It is made if it does not exist.

    Raises:
        TypeError: `model` has no adapters or is not a classifier.
        ValueError: The padding tokens of tokenizer and model differ; the adapter 'default' is not active; a 4-bit layer
            computes in another dtype than when it was loaded; the problem types of config and loss differ.
    """
    if not isinstance(model, PeftModel) or not is_pooled(model.get_base_model()):
        raise TypeError(f"model must be what add_adapters returns, got a {type(model).__name__}")
    classifier = model.get_base_model()
    config = classifier.config
    check_problem_type(classifier)
    if tokenizer.pad_token_id != config.get_text_config().pad_token_id:
        raise ValueError(
            f"tokenizer must pad with token {config.get_text_config().pad_token_id}, the model's, "
            f"got {tokenizer.pad_token_id}; save the tokenizer that load_classifier returned"
        )
    if model.active_adapters != ["default"]:
        raise ValueError(
            f"model must have the adapter 'default' active, which is what load_trained loads, "
            f"got {', '.join(model.active_adapters) or 'none'}"
        )
    loaded = _loaded_dtype(classifier)
    # PEFT would save the embeddings, too, if they have a row for the padding token, which no result depends on.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))
    weights = getattr(inspect.unwrap(classifier.loss_function), "class_weight", None)
    own = {
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "problem_type": config.problem_type,
        "class_weight": None if weights is None else weights.tolist(),
        "four_bit": getattr(classifier, "is_loaded_in_4bit", False),
        "dtype": _name(loaded),
        "cast": {name: _name(one.dtype) for name, one, dtype in _floats(model, loaded) if one.dtype != dtype},
    }
    Path(folder, FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def load_trained(
    folder: str | Path, *, name: str | None = None, trainable: bool = False, **options: object
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load what `save_classifier` saved, over its base model. On the same hardware the logits are the same bit for bit.

    This holds for the options (such as `attn_implementation`) that the model was first loaded with. transformers
    reports `score.weight` as missing while it loads the base model; the trained head is loaded after that.

    Args:
        folder: A folder that `save_classifier` wrote.
        name: The base model; None means the one that the adapters name.
        trainable: Whether to load for more training, in training mode; otherwise in evaluation mode.
        **options: Options of `load_classifier`. `dtype` is the saved one by default; another one applies to all weights
            of the base model, and casts that were saved are not repeated.

    Returns:
        The PEFT model and the tokenizer.

    Raises:
        FileNotFoundError: `save_classifier` did not write `folder`.
    """
    path = Path(folder, FILE)
    if not path.is_file():
        raise FileNotFoundError(f"folder must be one that save_classifier wrote, got {folder} without {FILE}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["dtype"], cast = getattr(torch, saved["dtype"]), saved.pop("cast", {})
    weights = saved.pop("class_weight", None)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    base = name or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    given = {**saved, "tokenizer": tokenizer, **options}
    model, tokenizer = load_classifier(base, given.pop("labels"), **given)
    if weights is not None:
        weigh_classes(model, torch.tensor(weights, dtype=torch.float32))
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    _prepare_head(adapted, trained=trainable)
    if given["dtype"] == saved["dtype"]:
        for tensor_name, tensor, dtype in _floats(adapted, saved["dtype"]):
            tensor.data = tensor.data.to(getattr(torch, cast.get(tensor_name, _name(dtype))))
    return adapted.train(trainable), tokenizer


def _prepare_head(adapted: PeftModel, *, trained: bool) -> None:
    """Check that PEFT keeps a copy of the head that is trained (or not) and saved, and cast it to float32."""
    head = getattr(adapted.get_base_model(), HEAD)
    if not isinstance(head, ModulesToSaveWrapper):
        raise ValueError(f"model.{HEAD} must be a module that PEFT saves, got a {type(head).__name__}")
    head.float()
    found = {parameter.requires_grad for parameter in head.modules_to_save.parameters()}
    if found != {trained}:
        raise ValueError(f"model.{HEAD} must be {'trained' if trained else 'frozen'}, got requires_grad {found}")


def _loaded_dtype(classifier: PreTrainedModel) -> torch.dtype:
    """The dtype that `load_classifier` used, whatever the weights have been cast to since."""
    dtype = getattr(torch, _name(classifier.config.dtype))  # text after the base model's `save_pretrained`
    for name, module in classifier.named_modules():
        if getattr(module, "compute_dtype", dtype) != dtype:
            raise ValueError(
                f"model must compute in {_name(dtype)}, in which it was loaded, got {_name(module.compute_dtype)} in "
                f"{name}; load it with dtype=torch.{_name(module.compute_dtype)}"
            )
    return dtype


def _floats(adapted: PeftModel, loaded: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.dtype]]:
    """Name and tensor of everything that is not quantised, and the dtype that `load_trained` first loads it in."""
    for name, one in chain(adapted.named_parameters(), adapted.named_buffers()):
        if one.is_floating_point() and getattr(one, "quant_state", None) is None:
            own = isinstance(one, torch.nn.Parameter) and "lora_" not in name and f".{HEAD}." not in name
            yield name, one, loaded if own else torch.float32


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
