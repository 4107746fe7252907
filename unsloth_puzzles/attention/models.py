"""Attention of transformers' models by this interface: `register()`, then `attn_implementation="unsloth_puzzles"`.

    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles")       # the best backend
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="unsloth_puzzles_flex")  # this one

Causal and bidirectional masks, sliding windows (Mistral), chunks (Llama 4), soft caps (Gemma 2), padding, and packed
batches as transformers recognises them, by position ids that start anew. Any other mask (a padded encoder's, a static
cache's) becomes a dense one, with the automatic choice, SDPA and the formula. The other backends refuse it by name, as
every backend does what else changes the result. This file is for transformers (made for 5.17), which nothing else in
this package needs.
"""

from collections.abc import Callable
from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from unsloth_puzzles.attention.backend import Backend
from unsloth_puzzles.attention.interface import BACKENDS, Mask, prepare
from unsloth_puzzles.attention.masks import Lengths, Unreadable, check, dense, read
from unsloth_puzzles.attention.pattern import Batch, Pattern

NAME = "unsloth_puzzles"


def register() -> list[str]:
    """Make the backends known to transformers; returns the names for `attn_implementation`, the automatic one first."""
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


class ModelMask(Mask):
    """The mask of a batch, made ready for a backend when a layer asks: its own tensors say its heads and their sizes.

    A config does not: layers of one model may differ, and with latent attention (DeepSeek) `head_dim` is that of the
    rotated part. `backend` and `data` are by the config, for layers that are to be compiled, before any has been asked.
    """

    ndim = 4  # what `generate` has made is handed to the model, and by that to `make_mask`

    def __init__(
        self, name: str, pattern: Pattern, lengths: Lengths, documents: torch.Tensor | None, config, **options
    ):
        self.pattern, self.packed = pattern, documents is not None
        self._name, self.lengths, self._documents = name, lengths, documents
        self._config, self._options, self._gradients = config, options, torch.is_grad_enabled()
        self._ready: dict[tuple, Mask] = {}
        self._compiled: tuple | None = None

    @property
    def backend(self) -> Backend:
        return self._by_config()[1].backend

    @property
    def data(self) -> object:
        return self._by_config()[1].data

    def __getattr__(self, name: str):
        raise AttributeError(f"attention_mask: the model asks for its {name}, but {NAME!r} has no tensor; need 'sdpa'")

    def __getitem__(self, index):
        raise ValueError(f"attention_mask: the model takes a part of it, but {NAME!r} has no tensor; need 'sdpa'")

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(f"attention_mask: the model computes with it, but {NAME!r} has no tensor; need 'sdpa'")

    def attend(self, query, key, value, scale: float | None = None) -> torch.Tensor:
        sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if torch.compiler.is_compiling():  # in it nothing is made ready, but by the config before
            expected, mask = self._by_config()
            if sizes != expected:
                raise ValueError(f"attention_mask: got heads {sizes} in compiled code, but {expected} by the config")
            return mask.attend(query, key, value, scale)
        found, need = (query.shape[2], key.shape[2]), (self.lengths.q_length, self.lengths.kv_length)
        if found != need:
            raise ValueError(f"attention_mask: got {found} queries and keys, need {need}, for which it was made")
        return self._of(sizes, query.dtype, query.device).attend(query, key, value, scale)

    def _by_config(self) -> tuple[tuple, Mask]:
        if self._compiled is None:
            config, heads = self._config, self._config.num_attention_heads
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            size = getattr(config, "head_dim", None) or config.hidden_size // heads
            sizes = (heads, kv_heads, size, size)
            if getattr(config, "qk_nope_head_dim", None):  # latent attention
                sizes = (heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
            self._compiled = sizes, self._of(sizes, **self._options)
        return self._compiled

    def _of(self, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Mask:
        """The mask for `sizes`, heads and key heads and head sizes of query and of value."""
        lengths, (heads, kv_heads, head_size, value_size) = self.lengths, sizes
        kind = (*sizes, dtype, self._gradients or torch.is_grad_enabled())  # a checkpoint computes first without them
        if kind not in self._ready:
            batch = Batch(
                lengths.batch_size, lengths.q_length, lengths.kv_length, heads, kv_heads, head_size, dtype, device,
                self._documents, kind[-1], value_size,
            )  # fmt: skip
            self._ready[kind] = prepare(self.pattern, batch, self._name, fullgraph=self._name == "auto")
        return self._ready[kind]


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
    """What transformers calls once a batch (once for each kind of layer, if a model mixes windows with full attention).

    attention_mask: (batch, positions), 0 for padding, or None. Caches that are cut to another length count positions in
    tensors without dimensions.

    Returns:
        The mask; a dense one, (batch, 1, q_length, kv_length) bool, if `Pattern` and documents do not describe it.

    Raises:
        ValueError: they do not, and `backend` knows no other masks.
    """
    device = torch.device(device)
    lengths = Lengths(batch_size, q_length, kv_length, int(q_offset), int(kv_offset))
    if isinstance(attention_mask, ModelMask):
        if attention_mask.lengths != lengths:
            raise ValueError(f"attention_mask: was made for {attention_mask.lengths}, need {lengths}")
        return attention_mask
    try:
        causal, window, documents = read(mask_function, lengths, attention_mask)
    except Unreadable as error:
        if backend not in ("auto", *_DENSE):
            raise ValueError(f"{error}; {', '.join(_DENSE)} can") from None
        return dense(mask_function, lengths, attention_mask, use_vmap, device)
    pattern = Pattern(causal, window, getattr(config, "attn_logit_softcapping", None))
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
    """What transformers calls in each layer.

    query (batch, heads, q_length, head size) -> (batch, q_length, heads, value's head size).

    Args:
        attention_mask: what `make_mask` gave for the batch; or a model's own, which is added to the scores, or False
            where a query does not see a key, (batch, 1 or heads, q_length, kv_length); or None, as in vision towers
            and cross attention: then `is_causal`, else the module's attribute, says whether queries see later keys.
        others: refused by name if they would change the result (`REFUSED`).
    """
    for name, given in (("dropout", dropout or None), *((name, others.get(name)) for name in REFUSED)):
        if given is not None and given is not False:
            raise ValueError(f"{name}: is not supported by attn_implementation={NAME!r}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, Mask):
        mask = attention_mask
        check_lengths(mask, others)
        _check_pattern(mask.pattern, query.shape[2], softcap, is_causal, sliding_window)
    elif others.get(LENGTHS[0]) is not None:
        raise ValueError(f"{LENGTHS[0]}: a packed batch needs position_ids, and use_cache=False")
    elif attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _without_mask(backend, bool(causal), softcap, query, key, value)
    else:
        mask = _with_tensor(backend, softcap, attention_mask)
    return mask.attend(query, key, value, scaling).transpose(1, 2).contiguous(), None


# What transformers' flash attention takes packed batches by.
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What else changes the result: sinks, a bias, keys chosen by an indexer, weights of heads; and weights that none has.
REFUSED = ("s_aux", "position_bias", "indices", "block_indices", "head_mask", "output_attentions")
_DENSE = ("sdpa", "dense")  # backends that take any mask


def check_lengths(mask: Mask, given: dict) -> None:
    """Raise ValueError if `given`, a layer's keyword arguments, packs documents of which the mask does not know."""
    if given.get(LENGTHS[0]) is not None and not mask.packed:
        raise ValueError(f"{LENGTHS[0]}: a packed batch needs position_ids, and use_cache=False")


def _check_pattern(pattern: Pattern, q_length: int, softcap, is_causal, sliding_window) -> None:
    """Raise ValueError if a layer asks for something else than the mask that was made for it."""
    if softcap != pattern.soft_cap:
        raise ValueError(f"softcap: the layer asks for {softcap}, the config says {pattern.soft_cap}")
    if is_causal is not None and is_causal != pattern.causal and q_length > 1:
        raise ValueError(f"is_causal: the layer asks for {is_causal}, its mask says {pattern.causal}")
    if sliding_window is not None and sliding_window != pattern.window:
        raise ValueError(f"sliding_window: the layer asks for {sliding_window}, its mask says {pattern.window}")


def _without_mask(backend: str, causal: bool, softcap: float | None, query, key, value) -> Mask:
    (size, heads, q_length, head_size), kv_length = query.shape, key.shape[2]
    if causal and q_length not in (1, kv_length):
        raise ValueError(f"attention_mask: got None for {q_length} queries and {kv_length} keys, need one if is_causal")
    batch = Batch(
        size, q_length, kv_length, heads, key.shape[1], head_size, query.dtype, query.device,
        gradients=torch.is_grad_enabled(), value_head_size=value.shape[3],
    )  # fmt: skip
    return prepare(Pattern(causal and q_length > 1, soft_cap=softcap), batch, backend)


def _with_tensor(backend: str, softcap: float | None, mask: torch.Tensor) -> Mask:
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: got {found}, need a 2-D one for the model, a 4-D one for its layers, or none"
        )
    if backend == "auto":
        backend = "sdpa" if softcap is None else "dense"
    if backend not in _DENSE:
        raise ValueError(f"attention_mask: {backend} cannot do a 4-D mask; {', '.join(_DENSE)} can")
    if backend == "sdpa" and softcap is not None:
        raise ValueError(f"softcap: sdpa cannot do a soft cap ({softcap}); dense can")
    data = (False, mask, False) if backend == "sdpa" else mask
    return Mask(Pattern(False, soft_cap=softcap), BACKENDS[backend], data, True)
