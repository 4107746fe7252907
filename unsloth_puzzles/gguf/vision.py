"""The vision tower and the projector of a fine-tune as a GGUF file, by the kind of model."""

import math

import gguf
from torch import nn

from unsloth_puzzles.gguf import llava, qwen
from unsloth_puzzles.gguf.merge import MergedStateDict
from unsloth_puzzles.gguf.quantization import QUANTIZATIONS, Type, fitting
from unsloth_puzzles.gguf.weights import Weight
from unsloth_puzzles.gguf.writer import Tensor

KINDS = {"llava": llava, "qwen2_vl": qwen, "qwen2_5_vl": qwen, "qwen3_vl": qwen}


def vision_file(
    model: nn.Module, weights: MergedStateDict, processor, projector: str
) -> tuple[gguf.GGUFWriter, list[Tensor]]:
    """Metadata and tensors of the vision tower and the projector.

    Args:
        model: a vision model of `KINDS`, without PEFT's wrapper.
        weights: its weights, merged.
        processor: its processor, whose image processor says how images are scaled.
        projector: the type of the matrices.

    Raises:
        ValueError: a parameter or a setting that the engine does not have.
    """
    config, images = model.config, processor.image_processor
    _check_scaling(images)
    header = gguf.GGUFWriter(None, "clip")
    header.add_type(gguf.GGUFType.MMPROJ)
    header.add_name(config.model_type)
    header.add_file_type(QUANTIZATIONS[projector][2])
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    header.add_clip_has_vision_encoder(True)
    header.add_vision_projection_dim(config.get_text_config().hidden_size)
    header.add_vision_patch_size(config.vision_config.patch_size)
    header.add_vision_image_mean([float(value) for value in images.image_mean])
    header.add_vision_image_std([float(value) for value in images.image_std])
    own = {name.removeprefix("model."): name for name in weights}
    own = {name: weights.weight(full) for name, full in own.items() if name.startswith(llava.PARTS + qwen.PARTS)}
    found = KINDS[config.model_type].describe(header, config, images, own)
    return header, [Tensor(name, source, _type(name, source, projector)) for name, source in found.items()]


def _check_scaling(images) -> None:
    """Refuse settings of an image processor that the file cannot hold: the engine always scales and normalises."""
    for setting in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(images, setting, True):
            raise ValueError(f"processor must have {setting}=True, as the engine computes, got False")
    factor = getattr(images, "rescale_factor", None)
    if factor is not None and not math.isclose(factor, 1 / 255):
        raise ValueError(f"processor must have rescale_factor 1/255, as the engine computes, got {factor}")


def _type(name: str, source: Weight, projector: str) -> Type:
    """Vectors and position embeddings stay in float32; a convolution is computed in float16 or float32 only."""
    if len(source.shape) < 2 or "position_embd" in name:
        return Type.F32
    wanted = QUANTIZATIONS[projector][0]
    if "patch_embd" in name:
        return wanted if wanted in (Type.F32, Type.F16) else Type.F32 if wanted == Type.BF16 else Type.F16
    return fitting(wanted, source.shape[-1])
