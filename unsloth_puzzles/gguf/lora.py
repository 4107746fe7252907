"""The active adapters of a LoRA layer of PEFT, as low-rank changes of its weight."""

from torch import nn

from unsloth_puzzles.gguf.weights import LowRank, Weight


def with_adapters(layer: nn.Module, base: Weight, name: str) -> Weight:
    """The weight that a LoRA layer of PEFT computes with.

    Args:
        layer: Not merged; its active adapters are read.
        base: Its own weight.
        name: Of the layer, for errors.

    Returns:
        `base` with the changes of the active adapters, or `base` itself without any.

    Raises:
        ValueError: An adapter that is neither LoRA nor DoRA, has a bias or swapped features; DoRA beside another
            adapter or on an embedding.
    """
    pairs, magnitude = [], None
    embedding = isinstance(layer.get_base_layer(), nn.Embedding) and not _adapts_parameter(layer)
    of = layer.lora_embedding_A if embedding else layer.lora_A
    active = [one for one in layer.active_adapters if one in of]
    for adapter in active:
        _check_adapter(layer, adapter, name)
        scale = layer.scaling[adapter]
        if embedding:
            pairs.append((layer.lora_embedding_A[adapter].T, layer.lora_embedding_B[adapter].T, scale))
        else:
            pairs.append((layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, scale))
        if adapter in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[adapter].weight
    if magnitude is not None and (embedding or len(active) > 1):
        what = "an embedding" if embedding else f"{len(active)} active adapters"
        raise ValueError(f"model must have DoRA alone and on linear layers, got {what} in {name}")
    return LowRank(base, pairs, magnitude) if pairs else base


def _adapts_parameter(layer) -> bool:
    """Whether `target_parameters` made the adapter, which then is (B, A) of the weight, also on an embedding."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


def _check_adapter(layer, adapter: str, name: str) -> None:
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        raise ValueError(f"model must have LoRA or DoRA adapters only, got {type(variant).__name__} in {name}")
    if getattr(layer, "lora_bias", {}).get(adapter):
        raise ValueError(f"model must have adapters without biases, got lora_bias in {name}")
    if getattr(layer, "fan_in_fan_out", False):
        raise ValueError(f"model must have weights of (out, in) features, got fan_in_fan_out in {name}")
