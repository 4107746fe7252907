"""LLaVA: a CLIP or SigLIP tower, of which one layer is taken, and two linear layers."""

import re

import gguf

from unsloth_puzzles.gguf.weights import Weight

PARTS = ("vision_tower.", "multi_modal_projector.")
_LAYER = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip
_TOP = {
    "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias", "embeddings.position_embedding.weight":
    "v.position_embd.weight", "pre_layrnorm.weight": "v.pre_ln.weight", "pre_layrnorm.bias": "v.pre_ln.bias",
}  # fmt: skip
_UNUSED = ("post_layernorm.", "head.")  # of the tower: behind the layer that is taken
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def describe(header: gguf.GGUFWriter, config, images, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Add the metadata, and name the tensors.

    Args:
        header: gets the metadata.
        config: of the model.
        images: the image processor.
        weights: by the model's names, without `model.`.

    Raises:
        ValueError: a setting or a parameter that the engine does not have.
    """
    vision = config.vision_config
    layers = _layers(config)
    _check(config, images)
    header.add_clip_projector_type("mlp")
    header.add_vision_image_size(vision.image_size)
    header.add_vision_embedding_length(vision.hidden_size)
    header.add_vision_feed_forward_length(vision.intermediate_size)
    header.add_vision_head_count(vision.num_attention_heads)
    header.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    header.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    header.add_vision_block_count(layers)  # those above are never computed
    header.add_array("clip.vision.feature_layer", [layers])
    found = {}
    for own, source in weights.items():
        name = _name(own, layers)
        if name is not None:
            found[name] = source
    return found


def _name(own: str, layers: int) -> str | None:
    """The name in the file; None for what is not computed."""
    if match := re.fullmatch(r"multi_modal_projector\.(linear_[12])\.(weight|bias)", own):
        return f"{_PROJECTOR[match[1]]}.{match[2]}"
    part = own.removeprefix("vision_tower.").removeprefix("vision_model.")
    if match := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", part):
        if int(match[1]) >= layers:
            return None
        if match[2] in _LAYER:
            return f"v.blk.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    if part.startswith(_UNUSED):
        return None
    if part not in _TOP:
        raise ValueError(f"model must have only weights that the engine has, got {own}")
    return _TOP[part]


def _layers(config) -> int:
    """How many layers of the tower are computed."""
    layer, total = config.vision_feature_layer, config.vision_config.num_hidden_layers
    if not isinstance(layer, int):
        raise ValueError(f"model must take one vision_feature_layer, got {layer}")
    layers = layer if layer >= 0 else total + 1 + layer
    if not 1 <= layers <= total:
        raise ValueError(f"model must take a vision_feature_layer between 1 and {total}, got {layer}")
    return layers


def _check(config, images) -> None:
    vision = config.vision_config
    strategies = {"clip_vision_model": "default", "siglip_vision_model": "full"}
    if vision.model_type not in strategies:
        raise ValueError(f"model must have a vision tower of {', '.join(strategies)}, got {vision.model_type!r}")
    if config.vision_feature_select_strategy != strategies[vision.model_type]:
        raise ValueError(f"model must have vision_feature_select_strategy {strategies[vision.model_type]!r} with "
                         f"{vision.model_type}, got {config.vision_feature_select_strategy!r}")  # fmt: skip
    if vision.hidden_act not in ("quick_gelu", "gelu", "gelu_pytorch_tanh") or config.projector_hidden_act != "gelu":
        raise ValueError(f"model must have GELU in tower and projector, got {vision.hidden_act!r} and "
                         f"{config.projector_hidden_act!r}")  # fmt: skip
    size = getattr(images, "crop_size", None) if getattr(images, "do_center_crop", False) else images.size
    if {size.get("height"), size.get("width")} != {vision.image_size}:
        need = f"images of {vision.image_size} x {vision.image_size}"
        raise ValueError(f"processor must give {need}, as the tower takes, got {dict(size)}")
