"""Put `nf4_linear` under every bitsandbytes NF4 layer of a model, and take it away again.

    with patch_linear4bit(model):
        trainer.train()

A layer's class is exchanged for a subclass of it with a `forward` of ours. Its parameters, names, hooks and state dict
stay what they are, so state dicts, PEFT (before or after), checkpointing and torch.compile see a `Linear4bit`; and
as no instance carries a function of its own, torch.compile shares one graph among equal layers.
"""

import importlib.metadata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from types import MethodType

import torch

from unsloth_puzzles.device import capability
from unsloth_puzzles.nf4.linear import nf4_linear

# Without gradients, W is de-quantised from this many rows on. For fewer, bitsandbytes' fused kernel, which multiplies
# the packed weight, wins: decoding is one row a sequence. By compute capability; measured by comparisons/decoding.py
# for the linear layers of one Llama 3.2 1B block, H200, bf16: 2 rows 93 us against 83, 3 rows 93 against 106.
MIN_ROWS = {90: 3}
MIN_ROWS_ELSEWHERE = 64  # not measured: about where bitsandbytes' own choice leaves its fused kernel on a T4


def _wants_a_row() -> bool:
    """Whether bitsandbytes' `matmul_4bit` tells W from its transpose by the packed weight's shape: before 0.50."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) < (0, 50)


_WANTS_A_ROW = _wants_a_row()


def default_min_rows(device: torch.device) -> int:
    """The fewest rows for which a layer on `device` is de-quantised when no gradient is wanted."""
    return MIN_ROWS.get(capability(device), MIN_ROWS_ELSEWHERE)


def patch_linear4bit(model: torch.nn.Module, *, min_rows: int | None = None) -> "Patch":
    """Let every bitsandbytes NF4 `Linear4bit` in `model` (PEFT's base layers too) compute by `nf4_linear`.

    A layer behaves as before: it computes in its `compute_dtype` (set by the first input, if nothing else did) and
    returns the input's dtype. The bias, if of another dtype, is cast for the product; bitsandbytes casts it in place.
    With gradients off, calls of fewer than `min_rows` rows (all dimensions of x but the last, multiplied; None: see
    `default_min_rows`) go to bitsandbytes' fused 4-bit GEMM. With gradients on `nf4_linear` runs whatever the rows are:
    they are not looked at, so torch.compile has no reason to compile twice. With gradients off it compiles, with
    dynamic shapes, at most once for fewer and once for more rows, however many lengths it meets.

    FP4 layers are left to bitsandbytes, with a warning.

    Returns:
        A handle: `.names` of the patched layers, `.undo()`; as a context manager it undoes at the end.

    Raises:
        ValueError: no NF4 layer in `model`, a layer that is patched already, that has a `forward` of its own, or whose
            weight bitsandbytes has re-packed for CPU inference (which rounds its absmax for good).
        TypeError: `model` is not a module or an `nn.DataParallel`, `min_rows` not an integer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(
        model, torch.nn.DataParallel
    ):  # whose replicas have their weights, and not their states, on their GPUs
        raise TypeError(
            "model: must be one model on one GPU, got an nn.DataParallel; start one process per GPU instead"
        )
    if min_rows is not None and (not isinstance(min_rows, int) or isinstance(min_rows, bool)):
        raise TypeError(f"min_rows: needs an integer or None, got {min_rows!r}")
    if min_rows is not None and min_rows < 0:
        raise ValueError(f"min_rows: needs 0 (always nf4_linear) or more, got {min_rows}")
    layers = _nf4_layers(model)
    for name, layer in layers.items():
        _check_layer(name, layer)
    for layer in layers.values():
        rows = default_min_rows(layer.weight.device) if min_rows is None else min_rows
        exchange_class(layer, _patched_class(type(layer), rows))
    return Patch(layers)


class Patch:
    """What `patch_linear4bit` did. Undone by `undo()` or at the end of a `with` block; a second time does nothing."""

    def __init__(self, layers: dict[str, torch.nn.Module]):
        self._layers = layers
        self.names = tuple(layers)

    def undo(self) -> None:
        """Give every layer its class back. Raises RuntimeError if another library has exchanged it since."""
        for name, layer in self._layers.items():
            if not _is_patched(layer) or "forward" not in vars(type(layer)):
                raise RuntimeError(f"{name}: is a {type(layer).__name__} by now, so the patch cannot be undone")
        for layer in self._layers.values():
            exchange_class(layer, type(layer).bitsandbytes_class)
        self._layers = {}

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({len(self._layers)} of {len(self.names)} NF4 layers patched)"


def _nf4_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    from bitsandbytes.nn import Linear4bit

    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit)}
    kinds = {name: _quant_type(layer) for name, layer in found.items()}
    layers = {name: layer for name, layer in found.items() if kinds[name] == "nf4"}
    others = Counter(kind for kind in kinds.values() if kind != "nf4")
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    if not layers:
        raise ValueError(
            f"model: needs bitsandbytes Linear4bit layers with quant_type 'nf4', got {listed or 'no Linear4bit'}; "
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
        raise ValueError(f"model: {name} is patched already; undo that patch first")
    own = vars(layer).get("forward")  # with `_old_forward` it is a hook of accelerate, which calls that one
    if type(layer).forward is not Linear4bit.forward or not (
        own is None or _is_forward(own, type(layer)) or "_old_forward" in vars(layer)
    ):
        raise ValueError(f"model: {name} has a forward of its own, so there is none of bitsandbytes to replace")
    state = getattr(layer.weight, "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"model: {name} has run in eval mode on a CPU with AVX-512 bf16, for which bitsandbytes re-packed the "
            "weight and rounded its absmax; patch a freshly loaded model"
        )


def _is_forward(function, cls: type) -> bool:
    return hasattr(function, "__func__") and function.__func__ is cls.forward


def exchange_class(layer, cls: type) -> None:
    """Make `layer` a `cls`, also where accelerate keeps the bound `forward` of its class on the instance."""
    kept = [key for key in ("forward", "_old_forward") if _is_forward(vars(layer).get(key), type(layer))]
    layer.__class__ = cls
    for key in kept:
        setattr(layer, key, MethodType(cls.forward, layer))


def exchange_classes(chosen: Iterable[tuple[torch.nn.Module | torch.Tensor, type]]) -> Callable[[], None]:
    """Make each of `chosen` one of the class beside it; returns what makes them what they were."""
    chosen = list(chosen)
    before = [(one, type(one)) for one, _ in chosen]
    for one, cls in chosen:
        exchange_class(one, cls)

    def undo() -> None:
        for one, cls in before:
            exchange_class(one, cls)

    return undo


@cache
def _patched_class(cls: type, min_rows: int) -> type:
    from bitsandbytes import matmul_4bit
    from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

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
            packed = self.weight.t() if _WANTS_A_ROW else self.weight
            y = matmul_4bit(x, packed, bias=bias, quant_state=state)
        return y.to(input_dtype)

    return type(cls.__name__, (cls,), {"forward": forward, "bitsandbytes_class": cls, "__doc__": cls.__doc__})
