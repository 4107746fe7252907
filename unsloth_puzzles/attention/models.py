"""Attention of transformers' models by this interface: `register()`, then `attn_implementation="unsloth_puzzles"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles")       # the best backend
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles_flex")  # this one
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation=implementation("flash"))

The last name is `unsloth_puzzles_varlen`: transformers takes names with "flash" for packages.

Causal and bidirectional masks, sliding windows (Mistral), chunks (Llama 4), soft caps (Gemma 2), padding, and packed
batches as transformers recognises them, by position ids that start anew. Any other mask (a padded encoder's, a static
cache's) becomes a dense one, with the automatic choice, SDPA and the formula. The other backends refuse it by name, and
every backend refuses arguments that it cannot honour. Made for transformers 5.15 to 5.24.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from unsloth_puzzles.attention.interface import BACKENDS, Mask, prepare
from unsloth_puzzles.attention.mask_check import check
from unsloth_puzzles.attention.masks import EmptyWindow, Lengths, Unreadable, dense, read
from unsloth_puzzles.attention.model_mask import NAME, ModelMask
from unsloth_puzzles.attention.pattern import Batch, Pattern

# What transformers' flash attention takes packed batches by.
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What else changes the result: sinks, a bias, keys chosen by an indexer, weights of heads; and weights that none has.
REFUSED = ("s_aux", "position_bias", "indices", "block_indices", "head_mask", "output_attentions")
_DENSE = ("sdpa", "dense")  # backends that take any mask
_PACKED_BY_LENGTHS = f"{LENGTHS[0]} must come with position_ids and use_cache=False, got lengths alone"


def register() -> list[str]:
    """Make the backends known to transformers.

    Returns:
        The names for `attn_implementation`, the automatic choice first.

    Raises:
        RuntimeError: the masks of this transformers are not those of 5.15 to 5.24.
    """
    check()
    names = {implementation(backend): backend for backend in ("auto", *BACKENDS)}
    for name, backend in names.items():
        AttentionInterface.register(name, partial(attention_forward, backend=backend))
        AttentionMaskInterface.register(name, partial(make_mask, backend))
    return list(names)


def implementation(backend: str) -> str:
    """The name of a backend for `attn_implementation`."""
    # transformers takes any name with "flash" in it for a package to be loaded; PyTorch's module is called varlen.
    return NAME if backend == "auto" else f"{NAME}_{'varlen' if backend == 'flash' else backend}"


def make_mask(
    backend: str,
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    config,
    dtype: torch.dtype,
    device: torch.device,
    **ignored,
) -> ModelMask | torch.Tensor:
    """Make the mask of a batch. transformers calls this once a batch and kind of layer (windows, full attention).

    Args:
        backend: as in `attention`.
        batch_size, q_length, kv_length: of the batch.
        q_offset, kv_offset: position of the first query and key; caches that are cut to another length count them in
            tensors without dimensions.
        mask_function: transformers' function of batch, head, query and key.
        attention_mask: [batch, positions], 0 for padding, or None.
        use_vmap: whether transformers needs vmap to make `mask_function` dense.
        config: the model's.
        dtype, device: of the model.

    Returns:
        The mask; a dense one, [batch, 1, q_length, kv_length] bool, if `Pattern` and documents do not describe it.

    Raises:
        ValueError: they do not, and `backend` takes no dense mask.
    """
    device = torch.device(device)
    lengths = Lengths(batch_size, q_length, kv_length, int(q_offset), int(kv_offset))
    if isinstance(attention_mask, ModelMask):
        if attention_mask.lengths != lengths:
            raise ValueError(f"attention_mask must be made for {lengths}, got one for {attention_mask.lengths}")
        return attention_mask
    try:
        pattern, documents = read(
            mask_function, lengths, attention_mask, getattr(config, "attn_logit_softcapping", None)
        )
    except Unreadable as error:
        if backend not in ("auto", *_DENSE) and not isinstance(error, EmptyWindow):  # which a layer would refuse
            raise ValueError(f"{error}; backends {' and '.join(_DENSE)} take any mask") from None
        return dense(mask_function, lengths, attention_mask, use_vmap, device)
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return ModelMask(backend, pattern, lengths, documents, config, dtype=dtype, device=device)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
    **others,
) -> tuple[torch.Tensor, None]:
    """Compute attention of a layer. transformers calls this.

    Args:
        module: the layer.
        query: [batch, heads, q_length, head size].
        key: [batch, key heads, kv_length, head size].
        value: [batch, key heads, kv_length, value's head size].
        attention_mask: what `make_mask` gave for the batch; or a model's own, which is added to the scores, or False
            where a query does not see a key, [batch, 1 or heads, q_length, kv_length]; or None, as in vision towers
            and cross attention: then `is_causal`, else the module's attribute, says whether queries see later keys, and
            `sliding_window` how many earlier ones.
        scaling: what query @ key is multiplied with, None for 1 / sqrt(head size).
        dropout: must be 0.
        softcap, is_causal, sliding_window: must be those of the mask, if there is one.
        backend: as in `attention`.
        others: refused by name if they would change the result (`REFUSED`).

    Returns:
        [batch, q_length, heads, value's head size], and None for the weights.

    Raises:
        ValueError: naming the argument.
    """
    for name, given in (("dropout", dropout or None), *((name, others.get(name)) for name in REFUSED)):
        if given is not None and given is not False:
            raise ValueError(f"{name} must be left out with attn_implementation={NAME!r}, got {_brief(given)}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, Mask):
        mask = attention_mask
        check_lengths(mask, others)
        _check_pattern(mask.pattern, query.shape[2], softcap, is_causal, sliding_window)
    elif others.get(LENGTHS[0]) is not None:
        raise ValueError(_PACKED_BY_LENGTHS)
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _without_mask(backend, bool(causal), softcap, sliding_window, query, key, value)
    else:
        mask = _with_tensor(backend, softcap, attention_mask)
    return mask.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


def check_lengths(mask: Mask, given: dict) -> None:
    """Check that the mask has the documents that a layer's keyword arguments pack.

    Args:
        mask: of the batch.
        given: the keyword arguments.

    Raises:
        ValueError: it has none.
    """
    if given.get(LENGTHS[0]) is not None and not mask.packed:
        raise ValueError(_PACKED_BY_LENGTHS)


def _check_pattern(pattern: Pattern, q_length: int, softcap, is_causal, sliding_window) -> None:
    if softcap != pattern.soft_cap:
        raise ValueError(f"softcap must be the config's {pattern.soft_cap}, got {softcap}")
    if is_causal is not None and is_causal != pattern.causal and q_length > 1:
        raise ValueError(f"is_causal must be the mask's {pattern.causal}, got {is_causal}")
    if sliding_window is not None and sliding_window != pattern.window:
        raise ValueError(f"sliding_window must be the mask's {pattern.window}, got {sliding_window}")


def _without_mask(
    backend: str, causal: bool, softcap: float | None, sliding_window: int | None, query, key, value
) -> Mask:
    q_length, kv_length = query.shape[2], key.shape[2]
    if causal and q_length not in (1, kv_length):
        raise ValueError(f"attention_mask must be given for {q_length} causal queries and {kv_length} keys, got None")
    if sliding_window is not None and not causal:
        raise ValueError(f"sliding_window must be left out where queries see later keys, got {sliding_window}")
    batch = Batch.of(query, key, value, gradients=torch.is_grad_enabled())
    later = q_length > 1 or sliding_window is not None  # else one query sees all keys, as every backend can do
    return prepare(Pattern(causal and later, sliding_window, softcap), batch, backend)


def _with_tensor(backend: str, softcap: float | None, mask: torch.Tensor) -> Mask:
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        raise ValueError(f"attention_mask must be 2-D for the model, 4-D for its layers, or None, got {_brief(mask)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():  # ones and zeros would be added to the scores
        raise ValueError(f"attention_mask must be of bool or of a floating dtype in 4-D, got {mask.dtype}")
    if backend == "auto":
        backend = "sdpa" if softcap is None else "dense"
    if backend not in _DENSE:
        raise ValueError(
            f"backend must be one that can do this ({', '.join(_DENSE)}), got {backend!r}: {backend} cannot do a 4-D "
            "mask"
        )
    if backend == "sdpa" and softcap is not None:
        raise ValueError(
            f"backend must be one that can do this (dense), got 'sdpa': sdpa cannot do a soft cap ({softcap})"
        )
    data = (False, mask, False) if backend == "sdpa" else mask
    return Mask(Pattern(False, soft_cap=softcap), BACKENDS[backend], data, True)


def _brief(given) -> str:
    return f"shape {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
