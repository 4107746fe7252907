"""The state dict of a model with its adapters merged in float32, tensor by tensor.

    merged = merged_state_dict(model)            # nothing is computed yet
    merged["model.layers.0.mlp.up_proj.weight"]  # float32, on the CPU

`merge_and_unload` of PEFT quantises an NF4 weight again after the merge. That error can be as large as the change that
the adapters make. Where `ensure_weight_tying` gives embeddings and head one LoRA, PEFT adds it to their shared weight
twice. Here the result is what the adapted model computes with, in float32, and the model is left as it is.
"""

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from unsloth_puzzles.gguf.lora import with_adapters
from unsloth_puzzles.gguf.weights import NF4, Plain, Weight, WithRows

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def merged_state_dict(model: nn.Module) -> "MergedStateDict":
    """Give the weights that `model` computes with, its active adapters merged.

    W + scale * B A for LoRA (rsLoRA by its scale), magnitude * that / its row norms for DoRA, the trained copies of
    `modules_to_save`, the trained rows of `trainable_token_indices`. Adapters that are switched off (`disable_adapter`)
    are left out. The model computes with the unmerged weights then, so adapters that are merged and switched off are
    refused.

    Args:
        model: a model of transformers, or a `PeftModel` around one. Weights are NF4 or floating.

    Returns:
        A mapping from the names of the model without PEFT to float32 CPU tensors, made when they are read, so only one
        is in memory at a time. Each is a tensor of its own: the model does not share its memory. `.weight(name)` reads
        rows instead.

    Raises:
        TypeError: `model` is not a module, or is inside another wrapper than `PeftModel` (`PeftMixedModel`, a tuner of
            PEFT, `torch.compile`, data parallelism), which changes the names of the weights.
        ValueError: adapters that are no LoRA or DoRA on linear layers or embeddings, that were merged into quantised
            weights, that are merged and switched off, or have biases; weights on the meta device, of FP4, 8 bits or
            another quantisation, packed, or in buffers that are saved.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            for kind in (getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()):
                if kind != "LORA":  # what a prompt learns is no part of any layer
                    raise ValueError(f"model must have LoRA or DoRA adapters only, got {kind}")
            model = model.get_base_model()
    return MergedStateDict(dict(_weights(model, "")))


class MergedStateDict(Mapping[str, torch.Tensor]):
    """The mapping of `merged_state_dict`, which merges a weight whenever it is read."""

    def __init__(self, weights: dict[str, Weight]):
        self._weights = weights

    def weight(self, name: str) -> Weight:
        """The weight of that name, to be read by rows."""
        return self._weights[name]

    def shared(self, name: str, other: str) -> bool:
        """Whether both names stand for one parameter, and no adapter changes one of them alone."""
        one, two = self._weights[name], self._weights[other]
        while isinstance(one, WithRows) and isinstance(two, WithRows) and one.replacement is two.replacement:
            one, two = one.base, two.base  # the tokens that PEFT trains in tied embeddings and head
        return isinstance(one, Plain) and isinstance(two, Plain) and one.source.data_ptr() == two.source.data_ptr()

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self._weights[name]
        value = weight.tensor()
        is_parameter = isinstance(weight, Plain) and value.data_ptr() == weight.source.data_ptr()  # float32 on the CPU
        return value.clone() if is_parameter else value

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # Mapping's own would compute the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _weights(module: nn.Module, name: str, original: nn.Module | None = None) -> Iterator[tuple[str, Weight]]:
    """Names and weights; `original` is the module of which `module` is a trained copy."""
    _refuse_wrapper(module, name)
    kind = _peft_kind(module)
    if kind == "lora":
        yield from _lora(module, name)
        return
    if kind == "saved":
        active = [] if module.disable_adapters else [one for one in module.active_adapters if one in _copies(module)]
        if len(active) > 1:
            raise ValueError(f"model must have one active copy of {name}, got {active}; activate one adapter")
        used = module.modules_to_save[active[0]] if active else module.original_module
        yield from _weights(used, name, module.original_module)
        return
    if kind == "tokens":
        yield from _tokens(module.token_adapter, name)
        return
    if kind is not None:
        raise ValueError(f"model must have LoRA or DoRA adapters only, got {kind} in {name}; merge it yourself first")
    for own, parameter in module.named_parameters(recurse=False):
        yield _joined(name, own), _weight(module, parameter, own, _joined(name, own), original)
    for own, _ in module.named_buffers(recurse=False):
        if own not in module._non_persistent_buffers_set:  # where BitNet and AWQ keep their weights
            raise ValueError(f"model must keep its weights in parameters, got the buffer {_joined(name, own)}")
    for child, inner in module.named_children():
        yield from _weights(inner, _joined(name, child))


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _copies(module) -> list[str]:
    return list(module.modules_to_save)


def _refuse_wrapper(module: nn.Module, name: str) -> None:
    """Refuse a module that puts a prefix in front of the names of the module inside it."""
    kinds = [
        (OptimizedModule, "give the model that torch.compile was given"),
        ((nn.DataParallel, DistributedDataParallel), "give its .module"),
    ]
    if "peft" in sys.modules:
        from peft import PeftMixedModel, PeftModel
        from peft.tuners.tuners_utils import BaseTuner

        kinds.append((PeftMixedModel, "make it with get_peft_model(..., mixed=False)"))
        kinds.append(((PeftModel, BaseTuner), "give the PeftModel itself, or the model inside it"))
    for kind, instead in kinds:
        if isinstance(module, kind):
            place = f" in {name}" if name else ""
            raise TypeError(f"model must be a model of transformers or a PeftModel of one, got {type(module).__name__}"
                            f"{place}; {instead}")  # fmt: skip


def _peft_kind(module: nn.Module) -> str | None:
    """ "lora", "saved", "tokens", the class name of another adapter layer, or None."""
    if "peft" not in sys.modules:
        return None
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(module, ModulesToSaveWrapper):
        return "saved"
    if isinstance(module, TrainableTokensWrapper):
        return "tokens"
    if isinstance(module, LoraLayer):
        return "lora"
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return f"{type(module).__module__}.{type(module).__name__}"
    return None


def _weight(
    module: nn.Module, parameter: torch.Tensor, own: str, name: str, original: nn.Module | None = None
) -> Weight:
    if parameter.device.type == "meta":
        raise ValueError(f"model must be loaded, got {name} on the meta device; load it without offloading")
    state = getattr(parameter, "quant_state", None) or (
        getattr(module, "quant_state", None) if own == "weight" else None
    )
    if state is not None:
        if getattr(state, "quant_type", None) != "nf4":
            raise ValueError(
                f"model must have NF4 weights, got {getattr(state, 'quant_type', 'another kind')} in {name}"
            )
        return NF4(parameter, state)
    if parameter.dtype not in FLOATS:
        raise ValueError(f"model must have NF4, float32, float16 or bfloat16 weights, got {parameter.dtype} in {name}")
    linear = (
        module if original is None else original
    )  # PEFT's copy of a tied head has right weights and swapped features
    if isinstance(linear, nn.Linear) and own == "weight":
        need = (linear.out_features, linear.in_features)
        if tuple(parameter.shape) != need:
            raise ValueError(f"model must have whole weights, got {tuple(parameter.shape)} for {need} in {name}; undo "
                             "what packs or shards it first")  # fmt: skip
    return Plain(parameter)


def _lora(layer, name: str) -> Iterator[tuple[str, Weight]]:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear | nn.Embedding):
        raise ValueError(f"model must have adapters on linear layers and embeddings only, got {name}, a "
                         f"{type(base).__name__}")  # fmt: skip
    if layer.base_layer is not base:
        raise ValueError(f"model must have one adapter layer around each layer, got {type(layer.base_layer).__name__} "
                         f"inside another in {name}; merge one of them first")  # fmt: skip
    weights = dict(_weights(base, name))
    own = _joined(name, "weight")
    if layer.merged:
        if isinstance(weights[own], NF4):
            raise ValueError(f"model must have unmerged adapters on its 4-bit layers, got {name}, which PEFT merged "
                             "and quantised again; load the model and its adapter anew")  # fmt: skip
        _refuse_merged_and_off(layer, name)
    elif not layer.disable_adapters:
        weights[own] = with_adapters(layer, weights[own], name)
    yield from weights.items()


def _tokens(layer, name: str) -> Iterator[tuple[str, Weight]]:
    """The weights of an embedding or a head of which PEFT trains the rows of some tokens."""
    base = layer.get_base_layer()
    if layer.base_layer is not base:
        raise ValueError(f"model must have one adapter layer around each layer, got {type(layer.base_layer).__name__} "
                         f"inside another in {name}; merge one of them first")  # fmt: skip
    weights, own = dict(_weights(base, name)), _joined(name, "weight")
    if layer.merged:
        _refuse_merged_and_off(layer, name)
    elif not layer.disable_adapters:
        for adapter in layer.active_adapters:
            if adapter in layer.trainable_tokens_delta:
                weights[own] = WithRows(
                    weights[own], layer.token_indices[adapter], layer.trainable_tokens_delta[adapter]
                )
    yield from weights.items()


def _refuse_merged_and_off(layer, name: str) -> None:
    if layer.disable_adapters:  # its next forward unmerges it
        raise ValueError(f"model must have unmerged adapters where they are switched off, got {name}, which is "
                         "merged and switched off; call model.unmerge_adapter() first")  # fmt: skip
