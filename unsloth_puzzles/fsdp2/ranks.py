"""What all ranks must have in common, compared before the first collective that would wait for it forever."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from unsloth_puzzles.fsdp2.stream import ByteStream, stream_of


def compare_ranks(what: str, own: Mapping[str, object]) -> None:
    """Raise the same ValueError on every rank if ranks differ. Every rank must call it.

    Args:
        what: The entries' name in the error, in the plural.
        own: This rank's entries, in order; what can be pickled and compared.

    Raises:
        ValueError: The first rank has other entries than another one, or the same in another order.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, list(own.items()))
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            pairs = zip(everyones[0], theirs, strict=False)
            counts = f"{len(everyones[0])} of them", f"{len(theirs)} of them"
            first, other = next(((f"{a[0]}: {a[1]}", f"{b[0]}: {b[1]}") for a, b in pairs if a != b), counts)
            raise ValueError(
                f"model must have the same {what} on all ranks, got {first} on rank 0 and {other} on rank {rank}"
            )


def compare_trained(model: nn.Module) -> None:
    """Raise ValueError on every rank if the parameters that are trained differ in name, shape or dtype.

    Args:
        model: Before it is sharded.
    """
    trained = {
        name: f"{tuple(parameter.shape)} of {parameter.dtype}"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    compare_ranks("trained parameters", trained)


def compare_frozen(model: nn.Module) -> None:
    """Raise ValueError on every rank if the bytes of frozen weights differ: a rank would train by weights of its own.

    Args:
        model: Before it is sharded. The sum of each weight's bytes is compared.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    sums = {name: int(_bytes(parameter).sum(dtype=torch.int64)) for name, parameter in frozen.items()}
    compare_ranks("frozen weights", {name: f"bytes that add up to {one}" for name, one in sums.items()})


def _bytes(parameter: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, ByteStream):
        return stream_of(parameter)
    return parameter.detach().reshape(-1).view(torch.uint8)
