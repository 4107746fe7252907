"""The mask of a batch for the layers of a transformers model, whose heads are known only when a layer asks."""

import torch

from unsloth_puzzles.attention.backend import Backend
from unsloth_puzzles.attention.interface import Mask, prepare
from unsloth_puzzles.attention.masks import Lengths
from unsloth_puzzles.attention.pattern import Batch, Pattern

NAME = "unsloth_puzzles"


class ModelMask(Mask):
    """A mask that is prepared for a backend when a layer asks: the layer's tensors say its heads and their sizes.

    A config does not: layers of one model may differ, and with latent attention (DeepSeek) `head_dim` is that of the
    rotated part. Before a layer has asked, `backend` and `data` are those of the config, which compiled layers need.

    Args:
        name: of the backend, as in `attention`.
        pattern: which keys a query sees.
        lengths: the positions of the batch.
        documents: as in `Batch`.
        config: the model's.
        dtype, device: of the model, for what is by the config.
    """

    ndim = 4  # what `generate` has made is handed to the model, and by that to `make_mask`

    def __init__(
        self,
        name: str,
        pattern: Pattern,
        lengths: Lengths,
        documents: torch.Tensor | None,
        config,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.pattern, self.packed, self.lengths = pattern, documents is not None, lengths
        self._name, self._documents = name, documents
        self._config, self._dtype, self._device, self._gradients = config, dtype, device, torch.is_grad_enabled()
        self._prepared: dict[tuple, Mask] = {}
        self._by_config: tuple[tuple, Mask] | None = None

    @property
    def backend(self) -> Backend:
        return self._of_config()[1].backend

    @property
    def data(self) -> object:
        return self._of_config()[1].data

    def __getattr__(self, name: str):
        raise AttributeError(_no_tensor(f"a model that reads its {name}"))

    def __getitem__(self, index):
        raise ValueError(_no_tensor("a model that takes a part of it"))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise ValueError(_no_tensor("a model that computes with it"))

    def attend(self, query, key, value, scale: float | None = None) -> torch.Tensor:
        sizes = (query.shape[1], key.shape[1], query.shape[3], value.shape[3])
        if torch.compiler.is_compiling():  # nothing is prepared in traced code, but by the config before
            expected, mask = self._of_config()
            if sizes != expected:
                raise ValueError(f"config must have the heads of its layers {sizes} to be compiled, got {expected}")
            return mask.attend(query, key, value, scale)
        found, need = (query.shape[2], key.shape[2]), (self.lengths.q_length, self.lengths.kv_length)
        if found != need:
            raise ValueError(f"attention_mask must be made for {found} queries and keys, got one for {need}")
        return self._of(sizes, query.dtype, query.device).attend(query, key, value, scale)

    def _of_config(self) -> tuple[tuple, Mask]:
        if self._by_config is None:
            sizes = _sizes(self._config)
            self._by_config = sizes, self._of(sizes, self._dtype, self._device)
        return self._by_config

    def _of(self, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Mask:
        lengths, (heads, kv_heads, head_size, value_size) = self.lengths, sizes
        gradients = self._gradients or torch.is_grad_enabled()  # a checkpoint computes first without them
        kind = (*sizes, dtype, device, gradients)
        if kind not in self._prepared:
            batch = Batch(
                size=lengths.batch_size,
                q_length=lengths.q_length,
                kv_length=lengths.kv_length,
                heads=heads,
                kv_heads=kv_heads,
                head_size=head_size,
                dtype=dtype,
                device=device,
                documents=None if self._documents is None else self._documents.to(device),
                gradients=gradients,
                value_head_size=value_size,
            )
            self._prepared[kind] = prepare(self.pattern, batch, self._name, fullgraph=self._name == "auto")
        return self._prepared[kind]


def _sizes(config) -> tuple[int, int, int, int]:
    """Heads, key heads, and head sizes of query and of value, by the config."""
    heads = config.num_attention_heads
    if getattr(config, "qk_nope_head_dim", None):  # latent attention
        return heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size, size


def _no_tensor(user: str) -> str:
    return f"attention_mask must be a tensor for {user}, got the mask of {NAME!r}; use attn_implementation='sdpa'"
