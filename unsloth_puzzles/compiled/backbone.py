"""What transformers' backbone is told while a model is compiled: its attention, no KV cache, no padding."""

import inspect
import warnings
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from unsloth_puzzles.attention.masks import Unpadded
from unsloth_puzzles.attention.models import implementation, register
from unsloth_puzzles.kv_cache import CACHE_NAMES


def set_attention(causal_lm: PreTrainedModel, attention: str) -> Callable[[], None]:
    """Let the layers of `causal_lm` attend by a backend of `unsloth_puzzles.attention`, or by "auto".

    Returns:
        A function that undoes it.
    """
    before = causal_lm.config._attn_implementation
    register()
    causal_lm.set_attn_implementation(implementation(attention))
    return lambda: causal_lm.set_attn_implementation(before)


def without_cache(causal_lm: PreTrainedModel) -> Callable[[], None]:
    """Let calls of `causal_lm` that do not say `use_cache` have no KV cache, with a warning if they had one.

    Its config stays as it is, since it may be saved meanwhile.

    Returns:
        A function that undoes it.
    """
    backbone = causal_lm.base_model
    if causal_lm.config.get_text_config().use_cache:
        text = "False until undo() for calls that do not say it, was True: a KV cache has no use in training"
        warnings.warn(f"use_cache: {text}", stacklevel=3)
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]  # without self
    hook = partial(_without_cache, names.index("use_cache") if "use_cache" in names else len(names))
    return backbone.register_forward_pre_hook(hook, with_kwargs=True).remove


def _without_cache(position: int, backbone, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if len(args) > position or kwargs.get("use_cache") is not None:
        return None
    return args, {**kwargs, "use_cache": False}


def say_unpadded(causal_lm: PreTrainedModel) -> Callable[[], None]:
    """Tell the backbone of a batch without a mask and positions that it has neither padding nor documents.

    transformers looks for documents in the positions, also in those that it has made itself, and waits for the GPU to
    say that there are none: the host could never be ahead by more than what is left of a step.

    Returns:
        A function that undoes it.
    """
    return causal_lm.base_model.register_forward_pre_hook(_say_unpadded, with_kwargs=True).remove


def _say_unpadded(backbone, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    told = any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", *CACHE_NAMES))
    if told or len(args) > 1:
        return None
    ids, embeddings = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    given = embeddings if ids is None else ids
    if given is None:
        return None
    mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device).as_subclass(Unpadded)
    return args, {**kwargs, "attention_mask": mask}
