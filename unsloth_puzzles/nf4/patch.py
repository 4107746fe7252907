"""Put `nf4_linear` under every bitsandbytes NF4 layer of a model, and take it away again.

    with patch_linear4bit(model):
        trainer.train()

Each layer's class is exchanged for a subclass with another `forward` (see `exchange`), so PEFT (before or after),
checkpointing, torch.compile and state dicts see a `Linear4bit`.
"""

import importlib.metadata
import warnings
from collections import Counter
from functools import cache

import torch

from unsloth_puzzles.device import capability
from unsloth_puzzles.exchange import exchange_classes, is_forward_of, subclass
from unsloth_puzzles.nf4.linear import nf4_linear

# Without gradients, W is de-quantised from this many rows on. For fewer, bitsandbytes' fused kernel, which multiplies
# the packed weight, wins: decoding is one row a sequence. By compute capability; measured by benchmarks/nf4/decoding.py
# for the linear layers of one Llama 3.2 1B block, H200, bf16: 2 rows 93 us against 83, 3 rows 93 against 106.
MIN_ROWS = {90: 3}
MIN_ROWS_ELSEWHERE = 64  # not measured: about where bitsandbytes' own choice leaves its fused kernel on a T4


def patch_linear4bit(model: torch.nn.Module, *, min_rows: int | None = None) -> "Linear4bitPatch":
    """Let every bitsandbytes NF4 `Linear4bit` in `model` (PEFT's base layers too) compute by `nf4_linear`.

    A layer behaves as before: it computes in its `compute_dtype` (set by the first input, if nothing else did) and
    returns the input's dtype. The bias, if of another dtype, is cast for the product; bitsandbytes casts it in place.
    FP4 layers are left to bitsandbytes, with a warning. Layers of `pack_nf4` use the kernel already and are left alone.

    With gradients on, `nf4_linear` runs whatever the rows are: they are not looked at, so torch.compile has no reason
    to compile twice. With gradients off torch.compile compiles, with dynamic shapes, at most once for fewer and once
    for more rows than `min_rows`, however many lengths it meets.

    A layer that is pickled (`torch.save(model)`) is a `Linear4bit` of bitsandbytes in the file. A copy of a patched
    model is patched, too; `Linear4bitPatch.of(copy).undo()` undoes that.

    Args:
        model: the model, or one layer.
        min_rows: with gradients off, calls of fewer rows (all dimensions of x but the last, multiplied) go to
            bitsandbytes' fused 4-bit GEMM. 0: never; None: by the GPU, see `default_min_rows`.

    Returns:
        A handle: `.names` of the patched layers, `.undo()`; as a context manager it undoes at the end.

    Raises:
        ValueError: no NF4 layer in `model`, a layer that is patched already, that has a `forward` of its own, or whose
            weight bitsandbytes has re-packed for CPU inference (which rounds its absmax for good).
        TypeError: `model` is not a module or an `nn.DataParallel`, `min_rows` not an integer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.nn.DataParallel):  # its replicas have their weights on their GPUs, and not their states
        raise TypeError("model must be on one GPU, got an nn.DataParallel; start one process per GPU instead")
    if min_rows is not None and (not isinstance(min_rows, int) or isinstance(min_rows, bool)):
        raise TypeError(f"min_rows must be an integer or None, got {min_rows!r}")
    if min_rows is not None and min_rows < 0:
        raise ValueError(f"min_rows must be 0 (always nf4_linear) or more, got {min_rows}")
    layers = _nf4_layers(model)
    for name, layer in layers.items():
        _check_layer(name, layer)
    exchange_classes((layer, _patched_class(type(layer), _min_rows(layer, min_rows))) for layer in layers.values())
    return Linear4bitPatch(layers)


class Linear4bitPatch:
    """The handle of `patch_linear4bit`. Undone by `undo()` or at the end of a `with` block; a second time does nothing.

    Attributes:
        names: of the patched layers in the model.
    """

    def __init__(self, layers: dict[str, torch.nn.Module]):
        self._layers = layers
        self.names = tuple(layers)

    @classmethod
    def of(cls, model: torch.nn.Module) -> "Linear4bitPatch":
        """The patch of a model that is a copy of a patched one."""
        return cls({name: layer for name, layer in model.named_modules() if _is_patched(layer)})

    def undo(self) -> None:
        """Give every layer its class back.

        Raises:
            RuntimeError: another library has exchanged the class of a layer since.
        """
        for name, layer in self._layers.items():
            if not _is_patched(layer) or "forward" not in vars(type(layer)):
                raise RuntimeError(
                    f"{name} must still be of the class that patch_linear4bit gave it, got a {type(layer).__name__}; "
                    "undo first what exchanged it since"
                )
        exchange_classes((layer, type(layer).bitsandbytes_class) for layer in self._layers.values())
        self._layers = {}

    def __enter__(self) -> "Linear4bitPatch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Linear4bitPatch({len(self._layers)} of {len(self.names)} NF4 layers patched)"


def default_min_rows(device: torch.device) -> int:
    """The fewest rows for which a layer on `device` is de-quantised when no gradient is wanted."""
    return MIN_ROWS.get(capability(device), MIN_ROWS_ELSEWHERE)


def _min_rows(layer, given: int | None) -> int:
    if given is not None:
        return given
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    # On a CPU bitsandbytes 0.50 de-quantises rows wrongly whose length its blocks do not divide.
    if layer.weight.device.type == "cpu" and state is not None and layer.in_features % state.blocksize:
        return 0
    return default_min_rows(layer.weight.device)


def _nf4_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from bitsandbytes.nn import Linear4bit

    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    ready = [name for name, layer in found.items() if getattr(type(layer), "uses_nf4_kernel", False)]  # packed ones
    for name in ready:
        del found[name]
    kinds = {name: _quant_type(layer) for name, layer in found.items()}
    layers = {name: layer for name, layer in found.items() if kinds[name] == "nf4"}
    others = Counter(kind for kind in kinds.values() if kind != "nf4")
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not (layers or ready):
        raise ValueError(
            f"model must have bitsandbytes Linear4bit layers with quant_type 'nf4', got {listed or 'no Linear4bit'}; "
            "load the model with BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')"
        )
    if others:
        warnings.warn(f"patch_linear4bit: left to bitsandbytes, as only nf4 is patched: {listed} layers", stacklevel=3)
    return layers


def _quant_type(layer) -> str:
    """ "nf4" or "fp4"; known before the weight is quantised, and after a sharding framework has stripped it."""
    for holder in (getattr(layer.weight, "quant_state", None), layer.weight, layer.quant_state):
        kind = getattr(holder, "quant_type", None)
        if kind is not None:
            return kind
    return "unquantised"


def _is_patched(layer) -> bool:
    return hasattr(type(layer), "bitsandbytes_class")


def _check_layer(name: str, layer) -> None:
    from bitsandbytes.nn import Linear4bit

    if _is_patched(layer):
        raise ValueError(f"model must not be patched yet, got {name}, which is; undo that patch first")
    own = vars(layer).get("forward")  # with `_old_forward` it is a hook of accelerate, which calls that one
    if type(layer).forward is not Linear4bit.forward or not (
        own is None or is_forward_of(type(layer), own) or "_old_forward" in vars(layer)
    ):
        raise ValueError(f"model must have bitsandbytes' forward in its layers, got {name} with a forward of its own")
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"model must be in bitsandbytes' GPU format, got {name}, whose weight was re-packed and its absmax rounded "
            "when it ran in eval mode on a CPU with AVX-512 bf16; patch a freshly loaded model"
        )


@cache
def _wants_a_row() -> bool:
    """Whether bitsandbytes' `matmul_4bit` tells W from its transpose by the packed weight's shape: before 0.50."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) < (0, 50)


@cache
def _patched_class(cls: type, min_rows: int) -> type:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

    wants_a_row = _wants_a_row()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if getattr(self.weight, "quant_state", None) is None:  # FSDP converts the parameter; the module still has it
            fix_4bit_weight_quant_state_from_module(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        input_dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        state = self.weight.quant_state
        if torch.is_grad_enabled() or x.numel() >= min_rows * x.shape[-1]:
            y = nf4_linear(x, self.weight, state, bias)
        else:
            packed = self.weight.t() if wants_a_row else self.weight
            y = matmul_4bit(x, packed, bias=bias, quant_state=state)
        return y.to(input_dtype)

    # PEFT (DoRA) and accelerate (device maps) know 4-bit layers by the name of their class.
    return subclass(cls, cls.__name__, forward=forward, bitsandbytes_class=cls)
