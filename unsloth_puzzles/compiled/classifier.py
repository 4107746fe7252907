"""The loss of a sequence classifier as a compiled function."""

from collections.abc import Callable
from functools import wraps

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from unsloth_puzzles.code_object import with_own_code


def find_classifier(model: torch.nn.Module) -> PreTrainedModel | None:
    """The sequence classifier of transformers in `model` (perhaps a PEFT model of one); None if it is another model."""
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found if isinstance(found, GenericForSequenceClassification) else None


def compile_loss(classifier: PreTrainedModel, options: dict[str, object]) -> Callable[[], None]:
    """Let a classifier compute its `loss_function` compiled: once for each kind of call, whatever the batch size.

    Args:
        classifier: Changed in place.
        options: Inductor's.

    Returns:
        A function that undoes it.
    """
    own, before = "_loss_function" in vars(classifier), classifier.loss_function  # else it belongs to the model's class
    compiled: dict[tuple, Callable] = {}

    @wraps(before, assigned=(), updated=())  # says that it is compiled, and of what
    def loss(*, labels: torch.Tensor, pooled_logits: torch.Tensor, num_items_in_batch=None, **others) -> torch.Tensor:
        if getattr(others.get("config"), "problem_type", "") is None:  # transformers decides it in the first call
            return before(labels=labels, pooled_logits=pooled_logits, num_items_in_batch=num_items_in_batch, **others)
        others.pop("logits", None)  # before pooling, which no loss of a classifier reads
        if isinstance(num_items_in_batch, int | float):  # else every other number would be compiled for
            wide = torch.promote_types(pooled_logits.dtype, torch.float32)
            dtype = wide if isinstance(num_items_in_batch, float) else None  # else a float is of the default dtype
            num_items_in_batch = torch.tensor(num_items_in_batch, dtype=dtype, device=pooled_logits.device)
        key = (
            torch.is_grad_enabled() and pooled_logits.requires_grad,
            torch.is_autocast_enabled(pooled_logits.device.type),
            len(labels) == 1,  # a constant to the compiler
            num_items_in_batch is None,
        )
        if key not in compiled:
            function = with_own_code(before, "classification_loss")
            compiled[key] = torch.compile(function, fullgraph=True, options=options)
        for tensor in (labels, pooled_logits):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        given = {"labels": labels, "logits": pooled_logits, "pooled_logits": pooled_logits, **others}
        return compiled[key](num_items_in_batch=num_items_in_batch, **given)

    classifier.loss_function = loss

    def undo() -> None:
        del classifier._loss_function
        if own:
            classifier.loss_function = before

    return undo
