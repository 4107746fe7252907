"""Losses of a classifier: one label of several, several labels at once, or numbers; with weights for rare classes.

    weigh_classes(model, class_weights(train_labels, num_labels))

Each loss is a sum over labels divided by `num_items_in_batch`. With gradient accumulation every label therefore has the
same weight in every micro-batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

IGNORED = -100  # the label that counts nothing; the Trainer does not count it either
SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification", "multi_label_classification", "regression",
)  # fmt: skip


def classification_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    class_weight: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy, binary cross entropy or squared error: the sum over the labels, divided by their number.

    Labels of -100 are ignored, also in a regression. If all labels are ignored, the loss and its gradients are 0.
    (PyTorch's mean is NaN, and so would be the weights after the next step.)

    Args:
        logits: [batch, num_labels], a floating dtype; 16-bit logits are converted to float32.
        labels: [batch] integers for a single label; [batch, num_labels] of 0 and 1 for several labels, or of numbers
            for a regression.
        problem_type: One of `PROBLEM_TYPES`.
        class_weight: [num_labels]. For a single label, the factor on the loss of each class; for several labels, the
            factor on the loss where a label is 1.
        num_items_in_batch: Number of labels in all micro-batches of a step; None means the number in `labels`. With
            `class_weight`, it is still a number of labels: a sum of weights would weigh micro-batches differently.

    Returns:
        A 0-dim tensor, float32 or wider.

    Raises:
        ValueError: `problem_type` is not one of `PROBLEM_TYPES`.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    labels = labels.to(logits.device)
    if class_weight is not None:
        class_weight = class_weight.to(logits)
    if problem_type == SINGLE:
        labels = labels.reshape(-1).long()
        losses = F.cross_entropy(logits, labels, class_weight, ignore_index=IGNORED, reduction="none")  # [batch]
    else:
        labels = labels.reshape(logits.shape).to(logits.dtype)
        if problem_type == MULTI:
            losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=class_weight, reduction="none")
        else:
            losses = (logits - labels).square()  # [batch, num_labels]
    valid = labels != IGNORED
    count = valid.sum()
    number = count if num_items_in_batch is None else num_items_in_batch
    if isinstance(number, torch.Tensor):
        number = number.to(logits.device)
    # A count instead of `any`: beside a sum, Triton 3.6 cannot build Inductor's `any` for tiles smaller than a program.
    nothing = (count == 0).to(losses.dtype)  # a bool and a float would be added in the default dtype
    return torch.where(valid, losses, 0).sum() / (number + nothing)  # 0 / 1 where none counts


class ClassificationLoss:
    """`classification_loss` in the form in which transformers calls a model's `loss_function`."""

    def __init__(self, problem_type: str, class_weight: torch.Tensor | None = None):
        """See `classification_loss`."""
        self.problem_type, self.class_weight = problem_type, class_weight

    def __call__(
        self,
        *,
        labels: torch.Tensor,
        pooled_logits: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
        **unused: object,
    ) -> torch.Tensor:
        """Compute the loss; `unused` holds what transformers passes to losses of other tasks."""
        return classification_loss(pooled_logits, labels, self.problem_type, self.class_weight, num_items_in_batch)


def class_weights(labels: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor, num_labels: int) -> torch.Tensor:
    """Compute weights that balance the classes, however many examples each has.

    Args:
        labels: Labels of the training set: [examples] integers below `num_labels`, or [examples, num_labels] of 0 and 1
            for several labels at once. -100 is ignored.
        num_labels: Number of classes.

    Returns:
        [num_labels] float32. For a single label n / (num_labels * n of the class); their mean over the examples is 1,
        so the scale of the loss does not change. For several labels, the number of 0s over the number of 1s.

    Raises:
        TypeError: `labels` are no numbers, such as names of classes.
        ValueError: `labels` has another shape or other values; a class has no example, and its weight would be
            infinite.
    """
    labels = _as_numbers(labels)
    if labels.dim() == 2 and labels.shape[1] == num_labels:
        if not ((labels == 0) | (labels == 1) | (labels == IGNORED)).all():
            raise ValueError("labels must be 0, 1 or -100 for several labels at once, got others")
        counts = (labels == 1).sum(0)  # [num_labels]
        of_all, share = (labels == 0).sum(0), 1
    elif labels.dim() == 1 and not labels.is_floating_point():
        labels = labels.long()  # in uint8 -100 would be class 156
        labels = labels[labels != IGNORED]
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_labels:
            raise ValueError(f"labels must be from 0 to {num_labels - 1}, got {labels.min()} to {labels.max()}")
        counts = torch.bincount(labels, minlength=num_labels)
        of_all, share = counts.sum(), num_labels
    else:
        raise ValueError(
            f"labels must be [examples] integers or [examples, {num_labels}] of 0 and 1, got {labels.dtype} "
            f"of shape {tuple(labels.shape)}"
        )
    if not counts.all():
        empty = counts.eq(0).nonzero().flatten().tolist()
        raise ValueError(f"labels must have an example of each class, got none of {empty}; leave these classes out")
    return (of_all.double() / (share * counts)).float()  # of integers PyTorch would divide in the default dtype


def _as_numbers(labels: object) -> torch.Tensor:
    """A tensor of labels that may be a list, an array, or a column of a table."""
    try:
        return torch.as_tensor(labels if isinstance(labels, list | torch.Tensor) else np.array(labels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"labels must be numbers of classes, [examples] or [examples, num_labels], got: {error}"
        ) from None


def weigh_classes(model: torch.nn.Module, class_weight: torch.Tensor | None) -> None:
    """Set the class weights of a classifier's loss.

    Args:
        model: From `load_classifier`, or with adapters of `add_adapters`, before `compile_qlora`.
        class_weight: [num_labels], as `class_weights` returns; None removes the weights.

    Raises:
        TypeError: `model` is of another kind.
        ValueError: `class_weight` has another shape, or is not positive and finite, or is given for a regression, which
            has no classes; `model` is compiled; the problem types of config and loss differ.
    """
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(type(classifier), "pools_by_mask", False):
        raise TypeError(f"model must be what load_classifier or add_adapters returns, got a {type(model).__name__}")
    config = classifier.config
    if hasattr(classifier.loss_function, "__wrapped__"):
        raise ValueError("model must not be compiled yet, got one that is; give it weights before compile_qlora")
    check_problem_type(classifier)
    if class_weight is not None:
        if config.problem_type == REGRESSION:
            raise ValueError("class_weight must be None for a regression, which has no classes")
        class_weight = torch.as_tensor(class_weight, dtype=torch.float32)
        if class_weight.shape != (config.num_labels,):
            raise ValueError(f"class_weight must have shape ({config.num_labels},), got {tuple(class_weight.shape)}")
        if not (class_weight.isfinite() & (class_weight > 0)).all():
            raise ValueError(f"class_weight must be positive and finite, got {class_weight.tolist()}")
        class_weight = class_weight.to(classifier.device)
    classifier.loss_function = ClassificationLoss(config.problem_type, class_weight)


def check_problem_type(model: torch.nn.Module) -> None:
    """Refuse a model whose config has another problem type than its loss. Labels and files would follow the config.

    Args:
        model: What `load_classifier` returns, its loss compiled or not. Other losses are not checked.

    Raises:
        ValueError: The problem types differ.
    """
    loss = getattr(model.loss_function, "__wrapped__", model.loss_function)
    if isinstance(loss, ClassificationLoss) and model.config.problem_type != loss.problem_type:
        raise ValueError(
            f"model.config.problem_type must be {loss.problem_type!r}, which the loss of the model was made for, got "
            f"{model.config.problem_type!r}; pass problem_type to load_classifier instead of changing the config"
        )


def check_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str) -> None:
    """Refuse labels that PyTorch would broadcast, or that belong to another problem type.

    Raises:
        ValueError: `labels` has another shape.
        TypeError: `labels` are not integers for a single label.
    """
    batch, number = logits.shape
    if problem_type == SINGLE:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(
                f"labels must be integers for {SINGLE}, got {labels.dtype}; load_classifier takes another problem_type"
            )
        shapes = [(batch,), (batch, 1)]
    else:
        shapes = [(batch, number), *([(batch,)] if number == 1 else [])]
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels must have shape {' or '.join(map(str, shapes))} for {problem_type}, got {tuple(labels.shape)}"
        )
