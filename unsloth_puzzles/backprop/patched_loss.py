"""A causal language model whose calls with labels compute the loss without its logits, until that is undone."""

import functools
import inspect
import warnings
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput

from unsloth_puzzles.backprop.causal_lm import refuse_sharded_head, routes
from unsloth_puzzles.backprop.labelled_rows import LabelledRows
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.loss_settings import check_settings, settings
from unsloth_puzzles.backprop.losses import IGNORED
from unsloth_puzzles.backprop.outputs import (
    EvaluatedCausalLMOutput,
    per_token_output,
    token_predictions,
    token_statistics,
    transformed,
)
from unsloth_puzzles.backprop.trial import NotASum
from unsloth_puzzles.kv_cache import cache_name

CACHE = cache_name(EvaluatedCausalLMOutput)


class _Active:
    """Whether a patch is active. Copies of the model share it, since their forward is that of the patch."""

    def __init__(self, on: bool = True):
        self.on = on

    def __deepcopy__(self, memo: dict) -> "_Active":
        return self

    def __reduce__(self) -> tuple:
        return _Active, (False,)  # a model from a file has its class's forward


class PatchedLoss:
    """The handle of `use_memory_efficient_loss`. Undone by `undo()` or at the end of a `with` block, once."""

    def __init__(self, causal_lm, loss, between, autocast, predictions, per_token, skip_ignored, options):
        self.calls, self.autocast, self._active, self._skip_ignored = 0, autocast, _Active(), skip_ignored
        self._settings, self._also_undo = settings(causal_lm), []
        self._causal_lm, self._predictions, self._per_token, self._options = causal_lm, predictions, per_token, options
        # One object for the life of the patch: compiled code is kept per function object.
        self._loss = loss if between is None else functools.partial(transformed, loss, *between)
        self._rows = functools.partial(
            token_predictions if not per_token else token_statistics, *(between or (1.0, None))
        )
        # accelerate keeps the forward that its hooks go around under another name; TRL's head goes around the hooks.
        self._name = "_old_forward" if "_old_forward" in vars(causal_lm) and not per_token else "forward"
        self._previous = vars(causal_lm).get(self._name)
        self._forward = MethodType(_make_forward(self, type(causal_lm).forward, self._previous), causal_lm)
        setattr(causal_lm, self._name, self._forward)
        causal_lm._memory_efficient_loss = self._active  # said to whoever would patch it again

    @property
    def active(self) -> bool:
        """Whether it has not been undone."""
        return self._active.on

    def also_undo(self, undo: Callable[[], None]) -> None:
        """Call `undo` when the patch is undone."""
        self._also_undo.append(undo)

    def undo(self) -> None:
        """Give the model its own loss back, also where another library has wrapped its forward since."""
        if not self.active:
            return
        self._active.on = False  # so a forward that somebody has wrapped passes everything on
        for undo in self._also_undo:
            undo()
        vars(self._causal_lm).pop("_memory_efficient_loss", None)
        if vars(self._causal_lm).get(self._name) is self._forward:
            if self._previous is None:
                delattr(self._causal_lm, self._name)
            else:
                setattr(self._causal_lm, self._name, self._previous)

    def __enter__(self) -> "PatchedLoss":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is None and not self.calls:
            text = (
                f"no loss was computed by it: {type(self._causal_lm).__name__} was not called with labels; is it the "
                "model that was trained? A TRL SFTTrainer must be given itself, after it is made"
            )
            warnings.warn(f"use_memory_efficient_loss: {text}", stacklevel=2)
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"PatchedLoss({type(self._causal_lm).__name__}, {state}, {self.calls} losses)"

    def output(self, causal_lm, labels, shift_labels, num_items_in_batch, fused_lm_head, **inputs) -> ModelOutput:
        """The output of a call with labels."""
        if fused_lm_head and not self._per_token:
            raise ValueError(
                "fused_lm_head must be None, got one: a TRL trainer was made of this model after the patch; "
                "undo it, and pass that trainer if it is an SFTTrainer; others are not supported"
            )
        if inputs.get("output_router_logits", routes(causal_lm)):
            raise ValueError(
                "output_router_logits must be False, got True: the router's auxiliary loss is not supported"
            )
        if not isinstance(keep := inputs.pop("logits_to_keep", 0), int) or keep:
            raise ValueError(f"logits_to_keep must be 0 with labels, which need every position, got {keep!r}")
        check_settings(causal_lm, self._settings)
        for name, given in (("labels", labels), ("shift_labels", shift_labels)):
            if given is not None and not (given.dtype.is_signed and not given.is_floating_point()):
                raise TypeError(f"{name} must be signed integers, which can hold -100, got {given.dtype}")
        return_dict = inputs.pop("return_dict", None)
        ignore_index = inputs.pop("ignore_index", IGNORED)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = _with_usual_index(shift_labels, ignore_index)
        inputs.setdefault("use_cache", False)
        head = causal_lm.get_output_embeddings()
        refuse_sharded_head(head)
        # Asked before the backbone: the host waits here for what the device has still to do.
        rows = LabelledRows.of(shift_labels) if self._skip_ignored else None
        states = causal_lm.base_model(**inputs)
        device = next(head.parameters()).device  # with a `device_map` the backbone may end elsewhere
        normalizer = "labels" if num_items_in_batch is None else num_items_in_batch
        if isinstance(normalizer, torch.Tensor):
            normalizer = normalizer.to(device).reshape(())
        hidden_states, targets = states.last_hidden_state.to(device), shift_labels.to(device)
        options = {"ignore_index": IGNORED, **self._options}
        of_all = functools.partial(memory_efficient_linear, hidden_states, head, targets, **options)
        if rows is None or targets.shape != hidden_states.shape[:-1]:  # which the op refuses
            rows, of_labelled = None, of_all
        else:
            rows = rows.to(device)
            chosen = rows.choose(hidden_states), head, rows.choose(targets)
            of_labelled = functools.partial(memory_efficient_linear, *chosen, **options)
        self.calls += 1
        if fused_lm_head:
            statistics = of_labelled(self._rows, reduction="none")
            if rows is not None:
                statistics = map(rows.spread, statistics)
            return per_token_output(*statistics, shift_labels != IGNORED, normalizer)
        output = EvaluatedCausalLMOutput(
            loss=_sum(of_labelled, self._loss, normalizer),
            **{CACHE: states.get(CACHE)},
            hidden_states=states.get("hidden_states"),
            attentions=states.get("attentions"),
        )
        if self._predictions and not causal_lm.training:
            with torch.no_grad():
                output.predicted_ids, output.token_log_probs = of_all(self._rows, reduction="none")
        return output.to_tuple() if return_dict is False else output


def _make_forward(patch: PatchedLoss, of_class: Callable, previous: Callable | None) -> Callable:
    names = [name for name in inspect.signature(of_class).parameters if name != "self"]
    own = of_class if previous is None else None
    if getattr(previous, "__self__", None) is patch._causal_lm:  # of a copy of the model it is the copy's
        own = previous.__func__

    @functools.wraps(of_class)  # generation and Trainer read the signature
    def forward(self, *args, **inputs):
        inputs = {**dict(zip(names, args, strict=False)), **inputs}
        if not patch.active or (inputs.get("labels") is None and inputs.get("shift_labels") is None):
            return previous(**inputs) if own is None else own(self, **inputs)
        given = {
            name: inputs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
        }
        with patch.autocast:
            return patch.output(self, **given, **inputs)

    return forward


def _sum(call: Callable, loss: Callable, normalizer: object) -> torch.Tensor:
    """The normalised sum of `loss`. Refusals name the argument `loss`, not `forward_function` and `reduction`."""
    try:
        return call(loss, reduction="sum", normalizer=normalizer)
    except NotASum as refusal:
        raise ValueError(
            f"loss must be a sum over rows, got {refusal.found}; for the sum of a loss of PyTorch pass "
            "functools.partial(F.cross_entropy, reduction='sum')"
        ) from None
    except (TypeError, ValueError, RuntimeError) as refusal:
        if not str(refusal).startswith("forward_function must "):
            raise
        raise type(refusal)(str(refusal).replace("forward_function", "loss", 1)) from None


def _with_usual_index(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """`labels` with -100, the index that losses know, where they are `ignore_index`."""
    if ignore_index == IGNORED:
        return labels
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {ignore_index!r}")
    # A label of -100 counts then, and is as wrong as -101: one that the op refuses.
    return labels.where(labels != IGNORED, IGNORED - 1).masked_fill(labels == ignore_index, IGNORED)
