"""What all ranks must have in common, compared before the first collective that would wait for it forever."""

import os
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from unsloth_puzzles.fsdp2.stream import ByteStream, stream_of

_WORDS = 1 << 23
_SEED = "call transformers.set_seed(n) on every rank before get_peft_model"
_LOAD = "load the same weights on every rank"


def compare_ranks(what: str, own: Mapping[str, object], instead: str = "") -> None:
    """Raise the same ValueError on every rank if ranks differ. Every rank must call it.

    Args:
        what: The entries' name in the error, in the plural.
        own: This rank's entries, in order; what can be pickled and compared.
        instead: What to do instead, the end of the error.

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
                f"{'; ' if instead else ''}{instead}"
            )


def use_one_gpu() -> None:
    """Hide all GPUs but the first: a Trainer feeds those that it sees from one process, and scales the loss by them.

    Raises:
        ValueError: This process uses CUDA already, and sees several.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if (count := torch.cuda.device_count()) > 1:
        raise ValueError(f"CUDA_VISIBLE_DEVICES must name one GPU, got {count} in use already; start one rank a GPU")


def compare_trained(model: nn.Module) -> None:
    """Raise ValueError on every rank if the parameters that are trained differ in name, shape, dtype or value.

    FSDP2 keeps each rank's own part of what that rank holds: parts of adapters that were drawn with another seed do not
    make one adapter.

    Args:
        model: Before it is sharded.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kinds = {name: f"{tuple(parameter.shape)} of {parameter.dtype}" for name, parameter in trained}
    compare_ranks("trained parameters", kinds)
    _compare_bytes("values of trained parameters", trained, _SEED)


def compare_frozen(model: nn.Module) -> None:
    """Raise ValueError on every rank if frozen weights or buffers differ: a rank would train by weights of its own.

    Args:
        model: Before it is sharded.
    """
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    _compare_bytes("frozen weights", [*frozen, *model.named_buffers()], _LOAD)


def _compare_bytes(what: str, tensors: Iterable[tuple[str, torch.Tensor]], instead: str) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        checksums = {name: f"bytes with checksum {_checksum(tensor):016x}" for name, tensor in tensors}
        compare_ranks(what, checksums, instead)


def _checksum(tensor: torch.Tensor) -> int:
    """Of the bytes and their order: the sum of 8-byte words times odd numbers that grow, modulo 2^64."""
    stored = stream_of(tensor) if isinstance(tensor, ByteStream) else tensor.detach().contiguous().view(-1)
    stored = stored.view(torch.uint8)
    words = nn.functional.pad(stored, (0, -len(stored) % 8)).view(torch.int64)
    total, factor = 0, 1
    for part in words.split(_WORDS):  # what is multiplied must not double a large weight
        factors = torch.arange(len(part), device=part.device) * 2 + factor
        total += int((part * factors).sum())
        factor += 2 * len(part)
    return total % 2**64
