"""Random bytes, NaN patterns among them, as a parameter that FSDP2 shards: how many arrive changed.

torchrun --nproc_per_node 2 -m benchmarks.fsdp2.corruption OUT
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from benchmarks.fsdp2 import ranks
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.fsdp2.stream import ByteStream, stream_of

BYTES = 1 << 16
HALF = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.float16)}
FLOAT16 = "plain float16 storage"
CASES = {  # by name: how the bytes are stored, and options of `fully_shard`
    FLOAT16: (lambda stream: stream.view(torch.float16).clone(), HALF),
    "byte stream": (lambda stream: ByteStream(stream.view(torch.int16).clone()), {}),
    "byte stream, float16 policy": (lambda stream: ByteStream(stream.view(torch.int16).clone()), HALF),
    "byte stream, offloaded": (
        lambda stream: ByteStream(stream.view(torch.int16).clone()),
        {"offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())},
    ),
}


def changed_by_copy(dtype: torch.dtype, device: str | torch.device, size: int = 1 << 20) -> int:
    """Of `size` random bytes, those that `torch._foreach_copy_` changes when it takes them for `dtype`."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).to(device).view(dtype)
    target = torch.empty_like(source)
    torch._foreach_copy_([target], [source])  # FSDP2 copies its shares into the collective's buffer by this
    return (target.view(torch.uint8) != source.view(torch.uint8)).sum().item()


class Reader(nn.Module):
    """Notes the bytes of its frozen parameter; the other one is trained."""

    def __init__(self, frozen: torch.Tensor):
        super().__init__()
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8, device=frozen.device))

    def forward(self, x):
        self.seen = stream_of(self.frozen.detach()).clone()
        return (x * self.scale).sum()


def main(out: str) -> None:
    """Write by case how many of BYTES bytes each rank has seen changed."""
    ranks.start()
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, 256, (BYTES,), dtype=torch.uint8, generator=generator).to(ranks.device())
    found = {}
    for name, (store, options) in CASES.items():
        model = fully_shard(Reader(store(stream)), mesh=ranks.mesh(), **options)
        for _ in range(2):
            model(torch.ones(8, device=ranks.device())).backward()
        everyones = [None] * ranks.WORLD
        dist.all_gather_object(everyones, (model.seen != stream).sum().item())
        found[name] = everyones
    if ranks.RANK == 0:
        write_json(out, found)
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
