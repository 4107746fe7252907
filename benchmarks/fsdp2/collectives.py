"""The collectives of one tensor that FSDP2 calls, by the names that the installed torch has for them.

Torch 2.14 has new names; the old ones call the same functions there, but not by their new names in
`torch.distributed`, so a call is counted once whichever name it is made by.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

GATHER = ("all_gather_single", "all_gather_into_tensor")
SCATTER = ("reduce_scatter_single", "reduce_scatter_tensor")


def known(names: tuple[str, ...]) -> list[str]:
    """Those of `names` that `torch.distributed` has, the newest first.

    Raises:
        RuntimeError: It has none of them.
    """
    found = [name for name in names if hasattr(dist, name)]
    if not found:
        need = " or ".join(names)
        raise RuntimeError(f"torch.distributed must have {need}, got neither in torch {torch.__version__}")
    return found


@contextlib.contextmanager
def counted(names: tuple[str, ...]) -> Iterator[list[str]]:
    """The dtypes that a collective of `torch.distributed` was given, one a call.

    Args:
        names: `GATHER` or `SCATTER`.
    """
    plain, started = {name: getattr(dist, name) for name in known(names)}, []

    def counting(function):
        def call(*args, **kwargs):
            tensors = (one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
            started.append(str(next(tensors).dtype))
            return function(*args, **kwargs)

        return call

    for name, function in plain.items():
        setattr(dist, name, counting(function))
    try:
        yield started
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
