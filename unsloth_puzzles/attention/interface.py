"""Attention behind one interface: the best backend that can compute what is asked does so.

    out = attention(query, key, value, window=1024, documents=document_ids)

For the layers of a model the mask is prepared once: `mask = prepare(pattern, batch)`, then `mask.attend(q, k, v)` in
each.
"""

import math

import torch

from unsloth_puzzles.attention.backend import FEATURES, Backend
from unsloth_puzzles.attention.dense import Dense
from unsloth_puzzles.attention.flash import Flash
from unsloth_puzzles.attention.flex import Flex
from unsloth_puzzles.attention.pattern import LAYOUT, Batch, Pattern, number_documents
from unsloth_puzzles.attention.sdpa import Sdpa
from unsloth_puzzles.attention.xformers import Xformers
from unsloth_puzzles.device import capability

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Flash(), Flex(), Xformers(), Sdpa(), Dense())}


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: torch.Tensor | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(soft cap(scale Q K^T) + mask) V.

    Args:
        query: [batch, heads, q_length, head size]. Fewer queries than keys are the last positions; more are possible
            if each sees all keys.
        key: [batch, key heads, kv_length, head size], `heads` a multiple of `key heads`.
        value: [batch, key heads, kv_length, value's head size].
        causal, window, soft_cap: as in `Pattern`.
        documents: [batch, kv_length] integers; a query sees only its own stretch of equal ones.
        scale: what Q K^T is multiplied with, None for 1 / sqrt(head size).
        backend: "flash", "flex", "xformers", "sdpa", "dense", or "auto". Whatever it is, the mask is the one asked for.

    Returns:
        [batch, heads, q_length, value's head size] in the dtype of `query`.

    Raises:
        ValueError: naming an argument that does not fit the others, or what the backend cannot do and which one could.
        RuntimeError: the backend is not installed here, or needs another device.
    """
    _check_tensors(query, key, value)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    if documents is not None:
        documents = number_documents(_checked_documents(documents).to(query.device))
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    batch = Batch.of(query, key, value, documents, gradients=gradients)
    return prepare(Pattern(causal, window, soft_cap), batch, backend).attend(query, key, value, scale)


class Mask:
    """A pattern on a batch, made ready for one backend.

    It is no dataclass: FSDP2 takes those apart, among the arguments of a layer, to cast the tensors in them.

    Args:
        pattern: which keys a query sees.
        backend: what computes.
        data: what the backend's `prepare` gave.
        packed: whether the batch has documents.
    """

    def __init__(self, pattern: Pattern, backend: Backend, data: object, packed: bool):
        self.pattern, self.backend, self.data, self.packed = pattern, backend, data, packed

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attention of tensors of the batch's shapes, as in `attention`."""
        if scale is not None and scale <= 0:  # kernels mask with -inf and multiply then: inf or NaN
            query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
        return self.backend.run(query, key, value, self.pattern, self.data, scale)


def prepare(pattern: Pattern, batch: Batch, backend: str = "auto", *, fullgraph: bool = False) -> Mask:
    """Make the mask of a batch, for `Mask.attend` in each layer.

    Args:
        pattern: which keys a query sees.
        batch: shapes, dtype, device and documents.
        backend: as in `attention`.
        fullgraph: the backend must do without a graph break.

    Raises:
        ValueError, RuntimeError: as in `attention`.
    """
    if batch.offset < 0 and (pattern.causal or batch.documents is not None):
        raise ValueError(
            f"query must have at most as many positions as key ({batch.kv_length}) unless each sees all keys, got "
            f"{batch.q_length}; {LAYOUT}"
        )
    chosen = choose(pattern, batch, fullgraph) if backend == "auto" else _named(backend, pattern, batch, fullgraph)
    return Mask(pattern, chosen, chosen.prepare(pattern, batch), batch.documents is not None)


def choose(pattern: Pattern, batch: Batch, fullgraph: bool = False) -> Backend:
    """Choose the fastest backend that can do what is asked on this machine.

    SDPA where its flag for causal masks says all; else flash, then flex (below sm_80 flex has no tensor cores: xformers
    and SDPA first).
    """
    plain = pattern.window is None and batch.documents is None
    old = capability(batch.device) < 80
    order = ("xformers", "sdpa", "flex", "dense") if old else ("flash", "flex", "xformers", "sdpa", "dense")
    for name in ("sdpa", *order) if plain else order:
        chosen = BACKENDS[name]
        if not chosen.missing(batch.device) and not _refusal(chosen, pattern, batch, fullgraph):
            return chosen
    raise ValueError(f"pattern must be one that a backend can do on {batch.device}, got {pattern}")


def _named(name: str, pattern: Pattern, batch: Batch, fullgraph: bool) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    backend = BACKENDS[name]
    if refusal := _refusal(backend, pattern, batch, fullgraph):
        able = [other for other, one in BACKENDS.items() if _refusal(one, pattern, batch, fullgraph) is None]
        raise ValueError(f"backend must be one that can do this ({', '.join(able) or 'none'}), got {name!r}: {refusal}")
    if missing := backend.missing(batch.device):
        raise RuntimeError(f"backend must be one that runs here, got {name!r}: {missing}")
    return backend


def _refusal(backend: Backend, pattern: Pattern, batch: Batch, fullgraph: bool) -> str | None:
    if fullgraph and "fullgraph" not in backend.features:
        return f"{backend.name} cannot be compiled without a graph break"
    return backend.refuses(pattern, batch)


def backend_table(device: str | torch.device) -> str:
    """A Markdown table: what each backend can do, what it takes, and whether it runs on this machine."""
    lines = [f"| backend | {' | '.join(FEATURES)} | extra memory | here |", "|---" * (len(FEATURES) + 3) + "|"]
    for backend in BACKENDS.values():
        can = ("yes" if feature in backend.features else "no" for feature in FEATURES)
        here = backend.missing(torch.device(device)) or "yes"
        lines.append(f"| {backend.name} | {' | '.join(can)} | {backend.memory} | {here} |")
    return "\n".join(lines)


def _check_tensors(query, key, value) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            raise ValueError(f"{name} must be a tensor (batch, heads, length, head size), got {_shape(tensor)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} must be {query.dtype} on {query.device} like query, got {tensor.dtype} on {tensor.device}"
            )
    if key.shape[:3] != value.shape[:3]:
        need = (*key.shape[:3], "head size")
        raise ValueError(f"value must have shape {need} like key, got {tuple(value.shape)}")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"key must have batch and head size of query {tuple(query.shape)}, got {tuple(key.shape)}")


def _checked_documents(documents) -> torch.Tensor:
    if not isinstance(documents, torch.Tensor) or documents.dim() != 2:
        raise ValueError(f"documents must be a tensor (batch, keys) of integers, got {_shape(documents)}")
    return documents


def _shape(given) -> tuple | str:
    return tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
