"""What ranks do besides training: the bytes that layers see, collectives, forwards, products, and where tensors lie."""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fsdp2.collectives import GATHER, SCATTER, counted
from benchmarks.fsdp2.ranks import WORLD
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.shard import base_of
from unsloth_puzzles.fsdp2.stream import stream_of

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class Watch:
    """Notes of what several ranks do besides training; of one process there are none."""

    def __init__(self):
        self.whole: dict[str, torch.Tensor] = {}
        self.changed: dict[str, int] = {}
        self.gathered: list[int] = []
        self.scattered: list[int] = []
        self.reduced: set[str] = set()
        self.forwards: list[int] = []
        self.computed: set[str] = set()
        self.logit_rows: int | None = None
        self.updates: set[str] = set()

    def streams(self, model: torch.nn.Module) -> None:
        """Keep each layer's bytes from before they are sharded."""
        self.whole = {name: stream_of(layer.weight).clone() for name, layer in packed_layers(model)}

    def layers(self, model: torch.nn.Module, bytes: bool) -> None:
        """Count the forwards of the first decoder layer, and note the dtypes that its adapters have in them.

        Newer releases of transformers compute a checkpointed layer again without the layer's own hooks: there the hooks
        of the norm that a layer begins with are counted.

        Args:
            model: Sharded.
            bytes: Also compare the bytes that each packed layer computes with. The hooks for that, and on the norm,
                break captured layers; without them only first forwards are counted.
        """

        def count(module, args):
            self.forwards[-1] += 1

        def note(layer, args):
            self.computed |= {str(one.dtype) for one in layer.parameters() if one.requires_grad}

        def compare(name, layer, args):
            apart = (stream_of(layer.weight) != self.whole[name]).sum().item()
            self.changed[name] = self.changed.get(name, 0) + apart

        first = base_of(model).model.layers[0]
        first.register_forward_pre_hook(note)  # after FSDP2's own, which gathers
        (first.input_layernorm if bytes else first).register_forward_pre_hook(count)
        for name, layer in packed_layers(model) if bytes else ():
            layer.register_forward_pre_hook(partial(compare, name))

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count the collectives of a forward and backward, and the forwards of a layer."""
        if WORLD == 1:
            yield
            return
        self.forwards.append(0)
        with counted(GATHER) as gathered, counted(SCATTER) as scattered:
            yield
        self.gathered.append(len(gathered))
        self.scattered.append(len(scattered))
        self.reduced |= set(scattered)

    @contextlib.contextmanager
    def products(self, vocabulary: int) -> Iterator[None]:
        """Note the most rows of logits that one product makes."""
        with _Operators() as operators:
            yield
        logits = [shape for name, shape in operators.seen if name in _PRODUCTS and shape[-1] == vocabulary]
        self.logit_rows = max([self.logit_rows or 0, *(shape[:-1].numel() for shape in logits)])

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Note by which operators an optimizer writes."""
        with _Operators() as operators:
            yield
        self.updates |= {str(name.overloadpacket) for name, _ in operators.seen}

    def found(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
        if WORLD == 1:
            return {}
        base, packed = base_of(model), packed_layers(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        states = [state["exp_avg"] for state in optimizer.state.values()]
        embeddings = base.get_input_embeddings().weight, base.get_output_embeddings().weight
        held = sum(2 * layer.weight.to_local().numel() for _, layer in packed)
        return {
            "share": held / sum(len(stream) for stream in self.whole.values()),
            "trained": sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in trained),
            "split": sum(isinstance(one, DTensor) for one in trained) / len(trained),
            "changed": sum(self.changed.values()),
            "compared": len(self.changed),
            "gathered": self.gathered,
            "scattered": self.scattered,
            "reduced": sorted(self.reduced),
            "forwards": self.forwards,
            "computed": sorted(self.computed),
            "logit_rows": self.logit_rows,
            "updates": sorted(self.updates),
            "shards_on": _devices([*trained, *(layer.weight for _, layer in packed)]),
            "states_on": _devices(states),
            "embeddings_split": all(isinstance(one, DTensor) for one in embeddings),
        }


class _Operators(TorchDispatchMode):
    """The operators that ran, with the shapes of what they returned (of one tensor; else none)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[torch._ops.OpOverload, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.seen.append((func, found.shape if isinstance(found, torch.Tensor) else torch.Size()))
        return found


def _devices(tensors) -> list[str]:
    return sorted({(one.to_local() if isinstance(one, DTensor) else one).device.type for one in tensors})


def packed_layers(model: torch.nn.Module) -> list[tuple[str, StreamLinear4bit]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, StreamLinear4bit)]
