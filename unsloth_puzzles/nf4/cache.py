"""Remember the launch of a weight that passed every check, so that a later call makes none of them.

A launch is remembered for the very objects it was prepared from, at the addresses they had. No tensor is kept alive:
the launch is dropped as soon as one of those objects goes, so that no `id` known here can become another object's.
"""

import weakref
from typing import NamedTuple

import torch

from unsloth_puzzles.nf4.launch import Launch


def recall(packed: torch.Tensor, state, dtype: torch.dtype | None = None) -> Launch | None:
    """The launch that de-quantises this weight, if it was checked before and has not changed since.

    Args:
        packed: the packed tensor.
        state: its `QuantState`.
        dtype: of the result; None for the state's.
    """
    known = _known.get(id(state))
    if known is None:
        return None
    launch, fingerprint, known_packed, layout, _ = known
    if (
        _fingerprint(packed, state) != fingerprint
        or (dtype or state.dtype) is not launch.dtype
        or (known_packed() is not packed and _layout(packed) != layout)
    ):
        return None
    return launch


def remember(launch: Launch, packed: torch.Tensor, state) -> None:
    """Keep a launch into a new tensor in the usual case: a nested absmax, not a row, on a GPU.

    Its weight has been checked. The weight of a row is handed out transposed, which recalled launches need not ask.
    """
    state2 = state.state2
    usual = isinstance(launch, Launch) and state2 is not None and launch.numel and packed.shape[0] != 1
    if not usual or not isinstance(state.shape, tuple):
        return
    key = id(state)

    def forget(_):
        _known.pop(key, None)

    watched = (state, state.absmax, state.code, state.offset, state2, state2.code, state2.absmax)
    try:
        references = tuple(weakref.ref(found, forget) for found in watched)
    except TypeError:  # a stand-in for a QuantState that cannot be watched
        return
    _known[key] = _Known(launch, _fingerprint(packed, state), weakref.ref(packed), _layout(packed), references)


def is_remembered(state) -> bool:
    """Whether a launch is kept for `state`, so that `recall` sees if anything has changed since it was checked."""
    return id(state) in _known


class _Known(NamedTuple):
    """A launch and what its weight was when it was checked."""

    launch: Launch
    fingerprint: tuple
    packed: weakref.ref  # the same data may come as another tensor, of the same layout
    layout: tuple
    references: tuple[weakref.ref, ...]  # that drop this entry


def _fingerprint(packed: torch.Tensor, state) -> tuple:
    """Return a weight's identity: objects, their addresses and its description; () if any of it is missing."""
    absmax, code, offset, state2 = state.absmax, state.code, state.offset, state.state2
    try:
        code2, absmax2 = state2.code, state2.absmax
        return (
            id(absmax), id(code), id(offset), id(state2), id(code2), id(absmax2),
            packed.data_ptr(), absmax.data_ptr(), code.data_ptr(), code2.data_ptr(), absmax2.data_ptr(),
            offset.data_ptr(), state.shape, state.dtype, state.blocksize, state2.blocksize, state.quant_type,
        )  # fmt: skip
    except AttributeError:
        return ()


def _layout(packed: torch.Tensor) -> tuple:
    return packed.dtype, packed.shape, packed.is_contiguous()


_known: dict[int, _Known] = {}  # by id(state)
