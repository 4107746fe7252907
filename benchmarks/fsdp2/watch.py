"""What ranks do besides training: the bytes that layers see, and the gradients that are reduced."""

import contextlib
from functools import partial

import torch
import torch.distributed as dist

from benchmarks.fsdp2.ranks import WORLD
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.stream import stream_of


class Watch:
    """What several ranks do besides training; of one process it notes nothing."""

    def __init__(self):
        self.whole: dict[str, torch.Tensor] = {}
        self.changed: dict[str, int] = {}
        self.scattered: list[int] = []
        self.reduced: set[str] = set()

    def streams(self, model: torch.nn.Module) -> None:
        """Keep each layer's bytes from before they are sharded."""
        self.whole = {name: stream_of(layer.weight).clone() for name, layer in packed_layers(model)}

    def layers(self, model: torch.nn.Module) -> None:
        """Compare the bytes that a layer computes with."""

        def compare(name, layer, args):
            apart = (stream_of(layer.weight) != self.whole[name]).sum().item()
            self.changed[name] = self.changed.get(name, 0) + apart

        for name, layer in packed_layers(model):
            layer.register_forward_pre_hook(partial(compare, name))

    @contextlib.contextmanager
    def micro_batch(self):
        """Count the reduce-scatters of a forward and backward."""
        if WORLD == 1:
            yield
            return
        plain, started = dist.reduce_scatter_tensor, []

        def counted(output, input, *args, **kwargs):
            started.append(str(input.dtype))
            return plain(output, input, *args, **kwargs)

        dist.reduce_scatter_tensor = counted
        try:
            yield
        finally:
            dist.reduce_scatter_tensor = plain
        self.scattered.append(len(started))
        self.reduced |= set(started)

    def found(self, model: torch.nn.Module) -> dict[str, object]:
        if WORLD == 1:
            return {}
        held = sum(2 * layer.weight.to_local().numel() for _, layer in packed_layers(model))
        return {
            "share": held / sum(len(stream) for stream in self.whole.values()),
            "changed": sum(self.changed.values()),
            "compared": len(self.changed),
            "reduced": sorted(self.reduced),
            "scattered": self.scattered,
        }


def packed_layers(model: torch.nn.Module) -> list[tuple[str, StreamLinear4bit]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, StreamLinear4bit)]
