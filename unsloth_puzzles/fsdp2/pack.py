"""Make the NF4 layers of a model ones that FSDP2 can shard, and bitsandbytes' own again.

packed = pack_nf4(model)          # after PEFT, before fully_shard or the Trainer
...
packed.undo()                     # of a model that is not sharded
"""

import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_puzzles.exchange import exchange_classes
from unsloth_puzzles.fsdp2.dora import StreamDoraLayer, dora_layers
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.ranks import compare_ranks
from unsloth_puzzles.fsdp2.stream import ByteStream, Layout, stream_of


def pack_nf4(model: nn.Module, world_size: int | None = None) -> "PackedModel":
    """Give every NF4 `Linear4bit` of `model` one byte stream as its weight.

    The results of a layer do not change. Nothing is copied to the host; a layer's old tensors are freed before the next
    layer is packed. FP4 layers are refused, since only NF4 is packed. DoRA adapters read the de-quantised weight from
    the packed layers. Add adapters and cast the model before: PEFT cannot adapt a packed layer, nor can it be cast.
    Seed every rank alike before PEFT draws the adapters.

    Args:
        model: A model with bitsandbytes NF4 layers, with or without adapters of PEFT, before `fully_shard` or a Trainer
            has seen it.
        world_size: The number of ranks that will share the model; None is that of the default process group, of
            torchrun where there is no group yet, or 1.

    Returns:
        A handle: `.names` of the packed layers, `.undo()`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `world_size` below 1; no NF4 layer; an FP4 or 8-bit layer; two layers that share a weight; a layer
            that is patched, packed, sharded or re-packed by bitsandbytes for a CPU; DoRA layers that are not PEFT's
            own; a rank whose layers differ from the first rank's, on all ranks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if world_size is None:  # a Trainer's arguments make the group, perhaps later
        world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ValueError(f"world_size must be an integer of at least 1, got {world_size!r}")
    layers = _nf4_layers(model)
    layouts = {name: _layout(layer, world_size) for name, layer in layers.items()}
    adapters = dora_layers(model, set(layers.values()))
    compare_ranks("NF4 layers", layouts)
    if not layers:
        raise ValueError(
            "model must have bitsandbytes NF4 layers, got none; "
            "load it with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )
    tables: dict[tuple, torch.Tensor] = {}
    for name, layer in layers.items():
        _pack(layer, layouts[name], tables)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.save_pretrained = partial(_save_pretrained, module)
    return PackedModel(model, layers, exchange_classes((adapter, StreamDoraLayer) for adapter in adapters))


class PackedModel:
    """The handle of `pack_nf4`. `names` of the packed layers; a second `undo()` does nothing."""

    def __init__(self, model: nn.Module, layers: dict[str, Linear4bit], undo_adapters: Callable[[], None]):
        self._model, self._layers, self._undo_adapters = model, layers, undo_adapters
        self.names = tuple(layers)

    def undo(self) -> None:
        """Give each layer bitsandbytes' own weight and quantisation state back, byte for byte.

        Raises:
            RuntimeError: The model is sharded: its hooks would put the streams back. Use `save_adapters`, and load
                them over the base model in one process.
        """
        for name, layer in self._layers.items():
            if isinstance(layer.weight, DTensor):
                raise RuntimeError(
                    f"model must not be sharded, got a DTensor in {name}; "
                    "use save_adapters, and load them over the base model in one process"
                )
        for layer in self._layers.values():
            _unpack(layer)
        for module in self._model.modules():
            vars(module).pop("save_pretrained", None)
        self._undo_adapters()
        self._layers, self._undo_adapters = {}, lambda: None


def _save_pretrained(model: PreTrainedModel, *args: object, **kwargs: object) -> None:
    """Refuse to save a packed model, whose state dict has stubs for its weights, but for its adapters alone."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("model must not be packed to be saved whole; undo pack_nf4 first, or use save_adapters")
    type(model).save_pretrained(model, *args, **kwargs)


def _nf4_layers(model: nn.Module) -> dict[str, Linear4bit]:
    layers, owners = {}, defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            raise ValueError(f"model must have no 8-bit layers, which FSDP2 cannot shard, got {name}")
        if not isinstance(module, Linear4bit):
            continue
        _check_layer(name, module)
        layers[name] = module
        owners[id(module.weight)].append(name)
    if tied := next((names for names in owners.values() if len(names) > 1), None):
        raise ValueError(f"model must not tie 4-bit weights, got {' and '.join(tied)}")
    return layers


def _check_layer(name: str, layer: Linear4bit) -> None:
    if isinstance(layer, StreamLinear4bit):
        raise ValueError(f"model must not be packed already, got {name}; undo that first")
    if type(layer).forward is not Linear4bit.forward:
        raise ValueError(
            f"model must have bitsandbytes' own layers, got {type(layer).__name__} in {name}; undo its patch"
        )
    if isinstance(layer.weight, DTensor):
        raise ValueError(f"model must not be sharded already, got a DTensor in {name}")
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    if state is None:
        raise ValueError(f"model must be quantised, got {name} on {layer.weight.device}; move it to its device first")
    if state.quant_type != "nf4":
        raise ValueError(f"model must have NF4 layers only, got {state.quant_type} in {name}")
    if layer.weight.shape[0] == 1 != layer.weight.numel():
        raise ValueError(f"model must hold packed weights as [n, 1], got {tuple(layer.weight.shape)} in {name}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(f"model must be loaded anew: bitsandbytes has re-packed {name} for inference on a CPU")


def _layout(layer: Linear4bit, world_size: int) -> Layout:
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    blocksize2 = state.state2.blocksize if state.nested else None
    return Layout(tuple(state.shape), state.blocksize, blocksize2, world_size)


def _pack(layer: Linear4bit, layout: Layout, tables: dict[tuple, torch.Tensor]) -> None:
    weight = layer.weight
    state = getattr(weight, "quant_state", None) or layer.quant_state
    stream = torch.zeros(layout.size, dtype=torch.uint8, device=weight.device)  # [size]
    packed, absmax, absmax2 = layout.split(stream)
    packed.copy_(weight.data.reshape(-1).view(torch.uint8)[: len(packed)].view(-1, 1))
    absmax.copy_(state.absmax)
    if absmax2 is not None:
        absmax2.copy_(state.state2.absmax)
    layer.original = {"dtype": state.dtype, "storage": weight.dtype, "module": weight.module}
    del layer._parameters["weight"]
    layer.quant_state = None
    exchange_classes([(layer, StreamLinear4bit)])
    layer.weight = nn.Parameter(ByteStream(stream.view(torch.int16)), requires_grad=False)
    layer.layout = layout
    nested = state.nested
    for name, table in (("code", state.code), ("code2", state.state2.code if nested else None)):
        key = (name, None if table is None else (table.device, tuple(table.tolist())))
        layer.register_buffer(name, tables.setdefault(key, table), persistent=False)
    layer.register_buffer("offset", state.offset if nested else None, persistent=False)


def _unpack(layer: StreamLinear4bit) -> None:
    layout, original = layer.layout, layer.original
    packed, absmax, absmax2 = (None if part is None else part.clone() for part in layout.split(stream_of(layer.weight)))
    second = None
    if absmax2 is not None:
        second = QuantState(absmax=absmax2, blocksize=layout.blocksize2, code=layer.code2.clone(), dtype=torch.float32)
    state = QuantState(
        absmax=absmax, shape=torch.Size(layout.shape), code=layer.code.clone(), blocksize=layout.blocksize,
        quant_type="nf4", dtype=original["dtype"], offset=layer.offset, state2=second,
    )  # fmt: skip
    del layer._parameters["weight"], layer.layout, layer.original
    for name in ("code", "code2", "offset"):
        del layer._buffers[name]
    exchange_classes([(layer, Linear4bit)])
    stored = packed.view(-1).view(original["storage"]).view(-1, 1)
    layer.weight = Params4bit(
        stored, requires_grad=False, quant_state=state, blocksize=layout.blocksize,
        compress_statistics=second is not None, quant_type="nf4", quant_storage=original["storage"],
        module=layer, bnb_quantized=True,
    )  # fmt: skip
    layer.quant_state = state
