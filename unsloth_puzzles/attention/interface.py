"""Attention behind one interface: say what is asked, and the best backend that can do it does it.

    out = attention(query, key, value, window=1024, documents=document_ids)

For the layers of a model the mask is made once: `mask = prepare(pattern, batch)`, then `mask.attend(q, k, v)` in each.
"""

from dataclasses import dataclass

import torch

from unsloth_puzzles.attention.backend import FEATURES, Backend
from unsloth_puzzles.attention.dense import Dense
from unsloth_puzzles.attention.flash import Flash
from unsloth_puzzles.attention.flex import Flex
from unsloth_puzzles.attention.pattern import Batch, Pattern, number_documents
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
    """softmax(soft cap(scale Q K^T) + mask) V, (batch, heads, q_length, head size) in the dtype of `query`.

    query: (batch, heads, q_length, head size); key, value: (batch, key heads, kv_length, head size), `heads` a multiple
    of `key heads`; value, and so the result, may have another head size. Fewer queries than keys are the last
    positions; more are possible if each sees all keys. documents: (batch, kv_length) integers; a query sees only its
    own stretch of equal ones. scale: what Q K^T is multiplied with, None for 1 / sqrt(head size). The rest is
    `Pattern`'s.

    backend: "flash", "flex", "xformers", "sdpa", "dense", or "auto". Whatever it is, the mask is the one asked for:
    a backend that cannot do it raises ValueError, naming what it cannot do, and what could. RuntimeError: it is not
    installed here, or needs another device.
    """
    pattern = Pattern(causal, window, soft_cap)
    return prepare(pattern, _batch(query, key, value, documents), backend).attend(query, key, value, scale)


@dataclass
class Mask:
    """A pattern on a batch, made ready for one backend. data: the backend's own. packed: the batch has documents."""

    pattern: Pattern
    backend: Backend
    data: object
    packed: bool

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Attention of tensors of the batch's shapes."""
        return self.backend.run(query, key, value, self.pattern, self.data, scale)


def prepare(pattern: Pattern, batch: Batch, backend: str = "auto", *, fullgraph: bool = False) -> Mask:
    """The mask of a batch, for `Mask.attend` in each layer. `fullgraph`: it must do without a graph break."""
    if batch.offset < 0 and (pattern.causal or batch.documents is not None):
        raise ValueError(f"query: got {batch.q_length} positions for {batch.kv_length} keys, need at most as many")
    chosen = choose(pattern, batch, fullgraph) if backend == "auto" else _named(backend, pattern, batch, fullgraph)
    return Mask(pattern, chosen, chosen.prepare(pattern, batch), batch.documents is not None)


def choose(pattern: Pattern, batch: Batch, fullgraph: bool = False) -> Backend:
    """The fastest backend that can do what is asked on this machine.

    SDPA where a flag says all; else flash, then flex (below sm_80 it has no tensor cores: xformers and SDPA first).
    """
    plain = pattern.window is None and batch.documents is None
    old = capability(batch.device) < 80
    order = ("xformers", "sdpa", "flex", "dense") if old else ("flash", "flex", "xformers", "sdpa", "dense")
    for name in ("sdpa", *order) if plain else order:
        if _reason(BACKENDS[name], pattern, batch, fullgraph) is None:
            return BACKENDS[name]
    raise ValueError(f"no backend can do {pattern} on {batch.device}")


def _named(name: str, pattern: Pattern, batch: Batch, fullgraph: bool) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, need 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    backend = BACKENDS[name]
    if refusal := _refusal(backend, pattern, batch, fullgraph):
        able = [other for other, one in BACKENDS.items() if _refusal(one, pattern, batch, fullgraph) is None]
        raise ValueError(f"backend: {refusal}; {', '.join(able) or 'none'} can")
    if missing := backend.missing(batch.device):
        raise RuntimeError(f"backend: {name} cannot run here: {missing}")
    return backend


def _refusal(backend: Backend, pattern: Pattern, batch: Batch, fullgraph: bool) -> str | None:
    if fullgraph and "fullgraph" not in backend.features:
        return f"{backend.name} cannot be compiled without a graph break"
    return backend.refuses(pattern, batch)


def _reason(backend: Backend, pattern: Pattern, batch: Batch, fullgraph: bool) -> str | None:
    return backend.missing(batch.device) or _refusal(backend, pattern, batch, fullgraph)


def backend_table(device: str | torch.device) -> str:
    """A Markdown table: what each backend can do, what it takes, and whether it runs on this machine."""
    lines = [f"| backend | {' | '.join(FEATURES)} | extra memory | here |", "|---" * (len(FEATURES) + 3) + "|"]
    for backend in BACKENDS.values():
        can = ("yes" if feature in backend.features else "no" for feature in FEATURES)
        here = backend.missing(torch.device(device)) or "yes"
        lines.append(f"| {backend.name} | {' | '.join(can)} | {backend.memory} | {here} |")
    return "\n".join(lines)


def _batch(query, key, value, documents) -> Batch:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name}: got {found}, need a tensor (batch, heads, length, head size)")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, need {query.dtype} on {query.device}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value: got shape {tuple(value.shape)}, need {(*key.shape[:3], 'head size')}, as key has")
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]):
        raise ValueError(f"key: got shape {tuple(key.shape)}, need batch and head size of query, {tuple(query.shape)}")
    size, heads, q_length, head_size = query.shape
    if documents is not None:
        if not isinstance(documents, torch.Tensor) or documents.dim() != 2:
            found = tuple(documents.shape) if isinstance(documents, torch.Tensor) else type(documents).__name__
            raise ValueError(f"documents: got {found}, need a tensor (batch, keys) of integers")
        documents = number_documents(documents.to(query.device))
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return Batch(
        size, q_length, key.shape[2], heads, key.shape[1], head_size, query.dtype, query.device, documents, gradients,
        value.shape[3],
    )  # fmt: skip
