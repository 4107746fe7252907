"""Attention of transformers' models by this interface: `register()`, then `attn_implementation="unsloth_puzzles"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles")       # the best backend
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles_flex")  # this one

Causal and bidirectional masks, sliding windows (Mistral), soft caps (Gemma 2), padding, and packed batches as
transformers recognises them, by position ids that start anew. What else a model asks for is refused by name. This file
is for transformers (made for 5.17), which nothing else in this package needs.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from unsloth_puzzles.attention.interface import BACKENDS, Mask, prepare
from unsloth_puzzles.attention.pattern import Batch, Pattern, number_documents

NAME = "unsloth_puzzles"


class Unpadded(torch.Tensor):
    """An attention mask, all ones, whose class says so: nobody has to look into it, and to wait for a GPU to do so."""


def register() -> list[str]:
    """Make the backends known to transformers; returns the names for `attn_implementation`, the automatic one first."""
    names = {implementation(backend): backend for backend in ("auto", *BACKENDS)}
    for name, backend in names.items():
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, partial(make_mask, backend))
    return list(names)


def implementation(backend: str) -> str:
    """The name of a backend for `attn_implementation`."""
    # transformers takes any name with "flash" in it for a package to be loaded; PyTorch's module is called varlen.
    return NAME if backend == "auto" else f"{NAME}_{'varlen' if backend == 'flash' else backend}"


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **ignored,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer; `attention_mask` is what `make_mask` gave for the batch.

    query (batch, heads, q_length, head size) -> (batch, q_length, heads, head size).
    """
    if not isinstance(attention_mask, Mask):
        raise ValueError(f"attention_mask: got {type(attention_mask).__name__}, need a 2-D one, or position ids")
    check_lengths(attention_mask, ignored)
    for name, given in (("dropout", dropout or None), ("s_aux", s_aux), ("position_bias", position_bias)):
        if given is not None:
            raise ValueError(f"{name}: is not supported by attn_implementation={NAME!r}")
    if softcap != attention_mask.pattern.soft_cap:
        raise ValueError(f"softcap: the layer asks for {softcap}, the config says {attention_mask.pattern.soft_cap}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return attention_mask.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


# What transformers' flash attention takes packed batches by.
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def check_lengths(mask: Mask, given: dict) -> None:
    """Raise ValueError if `given`, a layer's keyword arguments, packs documents of which the mask does not know."""
    if given.get(LENGTHS[0]) is not None and not mask.packed:
        raise ValueError(f"{LENGTHS[0]}: a packed batch needs position_ids, and use_cache=False")


def make_mask(
    backend: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    config,
    dtype: torch.dtype,
    device: torch.device,
    **ignored,
) -> Mask:
    """What transformers calls once a batch (once for each kind of layer, if a model mixes windows with full attention).

    attention_mask: (batch, positions), 0 for padding, or None. Padding is a document of its own: real tokens do not see
    it, and padding sees itself, so that no row is empty. ValueError: there is padding between real tokens.
    """
    if not isinstance(q_offset, int) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            f"past_key_values: {q_length} queries from position {q_offset} on for {kv_length} keys from {kv_offset} "
            "on; need a cache that ends with the last query (not a static one)"
        )
    asked = _read(mask_function)
    documents = asked.get("documents")
    if documents is not None:
        documents = number_documents(documents.expand(batch_size, -1))
    if attention_mask is not None and not isinstance(attention_mask, Unpadded):
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        # Padding on the right alone is hidden by causality; like transformers, wait once a batch to know.
        if not asked["causal"] or not (real[:, 1:] <= real[:, :-1]).all():
            if ((real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0] > 1).any():
                raise ValueError("attention_mask: has zeros between ones; need padding at the ends of a row alone")
            documents = number_documents(real.int() if documents is None else 2 * documents + real)
    pattern = Pattern(asked["causal"], asked.get("window"), getattr(config, "attn_logit_softcapping", None))
    device = torch.device(device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    heads = config.num_attention_heads
    batch = Batch(
        size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        device=device,
        documents=documents,
        gradients=torch.is_grad_enabled(),
    )
    return prepare(pattern, batch, backend, fullgraph=backend == "auto")


def _read(mask_function: Callable) -> dict:
    """What a mask function of transformers says: causal, and window or documents if it has them.

    They are closures, known by their code. Raises ValueError for any other: a mask must never be guessed.
    """
    if mask_function is masking_utils.causal_mask_function:
        return {"causal": True}
    if mask_function is masking_utils.bidirectional_mask_function:
        return {"causal": False}
    code = getattr(mask_function, "__code__", None)
    free = dict(zip(getattr(code, "co_freevars", ()), getattr(mask_function, "__closure__", None) or (), strict=False))
    if code is masking_utils.sliding_window_overlay(1).__code__:
        return {"window": free["sliding_window"].cell_contents}
    if code is masking_utils.packed_sequence_mask_function(torch.empty(0)).__code__:
        return {"documents": free["packed_sequence_mask"].cell_contents}
    if code is masking_utils.and_masks().__code__:
        parts = [_read(part) for part in free["mask_functions"].cell_contents]
        return {name: value for part in parts for name, value in part.items()}
    name = getattr(mask_function, "__qualname__", mask_function)
    raise ValueError(
        f"mask_function: {name} is not supported by attn_implementation={NAME!r}; "
        "need causal, bidirectional, a sliding window, packed sequences"
    )
