"""Random bytes, NaN patterns among them, as a parameter that FSDP2 shards over two ranks that share one GPU by gloo.

torchrun --nproc_per_node 2 tests/fsdp2/bytes_on_gpu.py OUT
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from unsloth_puzzles.fsdp2.stream import ByteStream, stream_of

HALF = MixedPrecisionPolicy(param_dtype=torch.float16)


class Reader(nn.Module):
    """Notes the bytes of its frozen parameter; the other one is trained."""

    def __init__(self, frozen: torch.Tensor):
        super().__init__()
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8, device="cuda"))

    def forward(self, x):
        self.seen = stream_of(self.frozen.detach()).clone()
        return (x * self.scale).sum()


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo")
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cuda")
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, generator=generator).cuda()
    cases = {
        "float16 storage, float16 policy": (lambda: stream.view(torch.float16).clone(), {"mp_policy": HALF}),
        "byte stream": (lambda: ByteStream(stream.view(torch.int16).clone()), {}),
        "byte stream, float16 policy": (lambda: ByteStream(stream.view(torch.int16).clone()), {"mp_policy": HALF}),
        "byte stream, offloaded": (
            lambda: ByteStream(stream.view(torch.int16).clone()),
            {"offload_policy": CPUOffloadPolicy()},
        ),
    }
    changed = {}
    for name, (make, options) in cases.items():
        model = fully_shard(Reader(make()), mesh=mesh, **options)
        for _ in range(2):
            model(torch.ones(8, device="cuda")).backward()
        changed[name] = (model.seen != stream).sum().item()
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, changed)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(everyones))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
