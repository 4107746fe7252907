"""Make a classifier of transformers read its logits where the attention mask ends.

transformers looks for the last token that is not `pad_token_id`. If padding is the end-of-text token, the search also
passes over the end of the text itself, and the logits are those of an earlier position.
"""

import inspect
from collections.abc import Callable
from functools import cache

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from unsloth_puzzles.classification.losses import PROBLEM_TYPES, ClassificationLoss, check_labels, check_problem_type
from unsloth_puzzles.exchange import exchange_classes, original_class, subclass
from unsloth_puzzles.kv_cache import CACHE_NAMES, cache_name, given_cache

_CACHE = cache_name(SequenceClassifierOutputWithPast)


def pool_by_mask(model: PreTrainedModel) -> Callable[[], None]:
    """Make a classifier read each row's logits at the last position of its attention mask.

    Without a mask, the tokens that are `pad_token_id` are masked. The head projects only the last positions, in its own
    dtype even under autocast. The loss is `ClassificationLoss`. A row without a token, such as an empty text, raises a
    ValueError; in code that is compiled as a whole, its logits are NaN.

    Args:
        model: A `...ForSequenceClassification` of transformers with a linear `score`, changed in place.

    Returns:
        A function that undoes the change.

    Raises:
        TypeError: `model` is of another kind.
        ValueError: The config's `problem_type` is not in `losses.PROBLEM_TYPES`.
    """
    if not isinstance(model, GenericForSequenceClassification) or (
        type(model).forward is not GenericForSequenceClassification.forward
    ):
        raise TypeError(
            "model must be a decoder for sequence classification with transformers' common forward, such as "
            f"LlamaForSequenceClassification, got {type(model).__name__}"
        )
    if model.config.problem_type not in PROBLEM_TYPES:
        raise ValueError(
            f"model.config.problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {model.config.problem_type!r}"
        )
    own, before = "_loss_function" in vars(model), model.loss_function
    model.loss_function = ClassificationLoss(model.config.problem_type)
    exchanged = exchange_classes([(model, _pooling_class(type(model)))])

    def undo() -> None:
        exchanged()
        del model._loss_function
        if own:
            model.loss_function = before

    return undo


def is_pooled(model: object) -> bool:
    """Whether `pool_by_mask` has changed this model."""
    return getattr(type(model), "pools_by_mask", False)


def last_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """The last position of each row that its mask keeps, [batch] int64; `attention_mask` is [batch, length]."""
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions * attention_mask.bool()).argmax(-1)


@cache
def _pooling_class(cls: type) -> type:
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,  # [batch, length]
        attention_mask: torch.Tensor | None = None,  # [batch, length]
        position_ids: torch.LongTensor | None = None,
        past_key_values: object = None,  # or `cache`; PEFT's prefix tuning looks for this name
        inputs_embeds: torch.Tensor | None = None,  # [batch, length, hidden]
        labels: torch.Tensor | None = None,  # [batch] or [batch, num_labels]
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> SequenceClassifierOutputWithPast:
        if labels is not None:
            check_problem_type(self)
        _check_training(self, labels)
        kv_cache = given_cache({"past_key_values": past_key_values, **kwargs})
        kwargs = {name: one for name, one in kwargs.items() if name not in CACHE_NAMES}
        if kv_cache is None or attention_mask is not None:  # of a cache the ids do not say what is padding
            attention_mask = _mask(self, input_ids, attention_mask)
        given = input_ids if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and given is not None:
            _check_rows(attention_mask, given.shape[1])
        items = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        outputs = self.base_model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{_CACHE: kv_cache},
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = _logits(self, outputs.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            check_labels(labels, logits, self.config.problem_type)
            with torch.autocast(logits.device.type, enabled=False):
                loss = self.loss_function(
                    logits=logits, labels=labels, pooled_logits=logits, config=self.config, **items
                )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{_CACHE: getattr(outputs, _CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    # PEFT, the Trainer and saved configs know a model by the name of its class.
    return subclass(
        cls, cls.__name__, forward=forward, pools_by_mask=True, __module__=cls.__module__, __reduce_ex__=_reduce
    )


def _reduce(model: PreTrainedModel, protocol: int) -> tuple:
    """Pickle a classifier such that what is loaded pools in the same way: its loss needs this package anyway."""
    return _pooled, (original_class(type(model)),), model.__getstate__()


def _pooled(cls: type) -> PreTrainedModel:
    made = _pooling_class(cls)
    return made.__new__(made)


def _mask(model, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be [batch, length], got shape {tuple(attention_mask.shape)}")
        return attention_mask
    pad = model.config.get_text_config().pad_token_id
    if pad is None and input_ids is not None and len(input_ids) > 1:
        raise ValueError(
            f"attention_mask must be given for {len(input_ids)} rows where config.pad_token_id is None, got none"
        )
    return None if input_ids is None or pad is None else (input_ids != pad).long()


def _logits(model, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, num_labels] of `hidden_states` [batch, length, hidden]."""
    rows = torch.arange(len(hidden_states), device=hidden_states.device)
    if attention_mask is None:
        pooled = hidden_states[:, -1]
    else:
        attention_mask = _newest(attention_mask, hidden_states.shape[1]).to(hidden_states.device)
        pooled = hidden_states[rows, last_positions(attention_mask)]  # [batch, hidden]
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = model.score(pooled.to(next(model.score.parameters()).dtype))
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask.bool().any(-1, keepdim=True), float("nan"))
    return logits


def _newest(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
    """The mask of the last `length` positions. Before them are those of a KV cache."""
    return attention_mask[:, attention_mask.shape[1] - length :]


def _check_rows(attention_mask: torch.Tensor, length: int) -> None:
    """Refuse a mask that is too short, and rows without a token. It waits for the device, so it precedes the layers."""
    if attention_mask.shape[1] < length:
        raise ValueError(f"attention_mask must have {length} positions, got {attention_mask.shape[1]}")
    if torch.compiler.is_compiling():
        return
    empty = ~_newest(attention_mask, length).bool().any(-1)  # [batch]
    if empty.any():
        raise ValueError(
            f"attention_mask must keep a token of each row, got none in rows {empty.nonzero().flatten().tolist()} of "
            "the batch; leave empty texts out, or add the end-of-text token to each text"
        )


def _check_training(model, labels: torch.Tensor | None) -> None:
    """Refuse training that would silently ignore the class weights, or leave the head as it is."""
    if not (model.training and torch.is_grad_enabled()):
        return
    if labels is None:
        if getattr(inspect.unwrap(model.loss_function), "class_weight", None) is not None:
            raise ValueError(
                "labels must be given where classes have weights, got none: label_smoothing_factor and "
                "compute_loss_func of a Trainer take the labels away, and its loss would not know the weights"
            )
    elif not any(parameter.requires_grad for parameter in model.score.parameters()):
        raise ValueError(
            "model.score must be trained, got a frozen head, which PEFT would not save either; use add_adapters, or "
            "task_type='SEQ_CLS'"
        )
