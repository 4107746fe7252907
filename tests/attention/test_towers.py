"""Vision and audio towers, encoders, cross attention: with our attention as with SDPA, or refused by name."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    ModernBertConfig,
    ModernBertModel,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

from unsloth_puzzles.attention.models import NAME, register

register()
IMAGE, ROPE = 60, {"rope_type": "default", "rope_theta": 1e4}
TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "rope_parameters": ROPE}
TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MLLAMA_TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
    "image_size": 16, "patch_size": 8, "vision_output_dim": 128, "intermediate_layers_indices": [0],
    "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}  # fmt: skip


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IDS = torch.randint(3, IMAGE, (2, 10), generator=torch.Generator().manual_seed(1))
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(10) < torch.tensor([[10], [6]])).long()}
PIXELS = {"pixel_values": drawn(2, 3, 32, 32)}


def with_image(before, image):
    return torch.cat([IDS[:, :before], torch.full((2, image), IMAGE), IDS], dim=1)


def qwen(config, tower):
    rope = {**ROPE, "mrope_section": [2, 3, 3]}
    tokens = {"image_token_id": IMAGE, "vision_start_token_id": 61, "vision_end_token_id": 62, "video_token_id": 63}
    text = {**GROUPED, "rope_parameters": rope}
    return config(text_config=text, vision_config={**QWEN_TOWER, **tower}, **tokens)


def qwen_inputs():
    """Two images of other sizes, of 4 and 2 tokens; the second row is padded."""
    rows = torch.tensor([[61] + [IMAGE] * 4 + [62] + [5] * 4, [61] + [IMAGE] * 2 + [62] + [5] * 4 + [0] * 2])
    grid = torch.tensor([[1, 4, 4], [1, 2, 4]])
    return {
        "input_ids": rows, "attention_mask": (rows != 0).long(), "pixel_values": drawn(24, 96), "image_grid_thw": grid,
        "mm_token_type_ids": (rows == IMAGE).long(),
    }  # fmt: skip


def mllama_inputs():
    """The first row has two tiles, the second one."""
    tiles = torch.tensor([[[1, 1]], [[1, 0]]])
    ids = IDS.clone()
    ids[:, 0] = IMAGE
    return {
        **PADDED, "input_ids": ids, "pixel_values": drawn(2, 1, 2, 3, 16, 16), "aspect_ratio_mask": tiles,
        "aspect_ratio_ids": torch.tensor([[2], [1]]), "cross_attention_mask": tiles[:, None].expand(2, 10, 1, 2),
    }  # fmt: skip


PADDED_ENCODER = "attention_mask must be ones where queries see later keys"
# (class, config, inputs, how the message begins if flex attention is asked for, or None)
CASES = {
    "CLIP": (CLIPVisionModel, lambda: CLIPVisionConfig(**TOWER), lambda: PIXELS, None),
    "SigLIP": (SiglipVisionModel, lambda: SiglipVisionConfig(**TOWER), lambda: PIXELS, None),
    "ViT": (ViTModel, lambda: ViTConfig(**TOWER), lambda: PIXELS, None),
    "DINOv2": (Dinov2Model, lambda: Dinov2Config(**TOWER), lambda: PIXELS, None),
    "Pixtral": (
        PixtralVisionModel, lambda: PixtralVisionConfig(**TOWER),
        lambda: {**PIXELS, "image_sizes": torch.tensor([[32, 32], [32, 16]])}, "backend .* flex cannot do a 4-D",
    ),
    "Whisper": (
        WhisperModel,
        lambda: WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=40),
        lambda: {"input_features": drawn(2, 8, 40), "decoder_input_ids": IDS}, None,
    ),
    "BART": (
        BartModel, lambda: BartConfig(**SEQ2SEQ), lambda: {**PADDED, "decoder_input_ids": IDS[:, :7]},
        PADDED_ENCODER,
    ),
    "BART, as many queries as keys": (
        BartModel, lambda: BartConfig(**SEQ2SEQ), lambda: {**PADDED, "decoder_input_ids": IDS}, PADDED_ENCODER,
    ),
    "BART, more queries than keys": (
        BartModel, lambda: BartConfig(**SEQ2SEQ), lambda: {"input_ids": IDS[:, :4], "decoder_input_ids": IDS},
        "backend must be .*: flex cannot do 10 queries for 4 keys",
    ),
    "BERT": (BertModel, lambda: BertConfig(**TEXT), lambda: PADDED, PADDED_ENCODER),
    "BERT as a decoder": (
        BertModel, lambda: BertConfig(**TEXT, is_decoder=True, add_cross_attention=True),
        lambda: {**PADDED, "encoder_hidden_states": drawn(2, 13, 64)}, None,
    ),
    "ModernBERT": (
        ModernBertModel, lambda: ModernBertConfig(**TEXT, local_attention=6), lambda: PADDED,
        "(attention_mask must be ones|mask_function must be .*sliding_window_bidirectional_overlay)",
    ),
    "Mllama": (
        MllamaForConditionalGeneration,
        lambda: MllamaConfig(text_config={**GROUPED, "cross_attention_layers": [1]}, vision_config=MLLAMA_TOWER,
                             image_token_index=IMAGE),
        mllama_inputs, "backend .* flex cannot do a 4-D",
    ),
    "Qwen2-VL": (
        Qwen2VLForConditionalGeneration,
        lambda: qwen(Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}), qwen_inputs, None,
    ),
    "Qwen2.5-VL": (
        Qwen2_5_VLForConditionalGeneration,
        lambda: qwen(Qwen2_5_VLConfig, {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64,
                                        "window_size": 16, "fullatt_block_indexes": [1]}),
        qwen_inputs, None,
    ),
    "LLaVA": (
        LlavaForConditionalGeneration,
        lambda: LlavaConfig(text_config={**GROUPED, "model_type": "llama"}, image_token_index=IMAGE,
                            vision_config={**TOWER, "model_type": "clip_vision_model"}, vision_feature_layer=-1),
        lambda: {**PIXELS, "input_ids": with_image(0, 16)}, None,
    ),
    "Gemma 3": (
        Gemma3ForConditionalGeneration,
        lambda: Gemma3Config(
            text_config={**GROUPED, "head_dim": 16, "sliding_window": 5, "rope_parameters": None,
                         "layer_types": ["sliding_attention", "full_attention"]},
            vision_config=TOWER, mm_tokens_per_image=4, image_token_index=IMAGE,
        ),
        lambda: {**PIXELS, "input_ids": with_image(3, 4), "token_type_ids": (with_image(3, 4) == IMAGE).long()},
        "mask_function must be .*or_masks",
    ),
}  # fmt: skip
# How many modules attend, if not two.
LAYERS = {
    "Whisper": 6, "BART": 6, "BART, as many queries as keys": 6, "BART, more queries than keys": 6,
    "BERT as a decoder": 4, "Mllama": 5, "Qwen2-VL": 4, "Qwen2.5-VL": 4, "LLaVA": 4, "Gemma 3": 4,
}  # fmt: skip


def made(kind, config, implementation):
    config = config()
    config._attn_implementation = implementation
    return kind(config).eval()


def outcome(model, inputs):
    found = model(**inputs)
    found = found.logits if hasattr(found, "logits") else found.last_hidden_state
    mask = inputs.get("attention_mask")
    return found[mask.bool()] if mask is not None and mask.shape == found.shape[:2] else found


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_equal_those_with_sdpa(name, monkeypatch):
    kind, config, inputs, refusal = CASES[name]
    inputs, calls, ours = inputs(), [], AttentionInterface._global_mapping[NAME]
    monkeypatch.setitem(
        AttentionInterface._global_mapping, NAME, lambda module, *a, **k: calls.append(module) or ours(module, *a, **k)
    )
    model, other, flex = (made(kind, config, implementation) for implementation in ("sdpa", NAME, f"{NAME}_flex"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # sharp enough for attention to matter
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    expected = outcome(model, inputs)
    for copied in (other, flex):
        copied.load_state_dict(model.state_dict())
    assert (outcome(other, inputs) - expected).norm() <= 5e-6 * expected.norm()
    assert len(set(map(id, calls))) == LAYERS.get(name, 2)
    if refusal:
        with pytest.raises(ValueError, match=f"^{refusal}"):
            outcome(flex, inputs)
    else:
        assert (outcome(flex, inputs) - expected).norm() <= 5e-6 * expected.norm()


def test_position_bias_is_refused():
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    config._attn_implementation = NAME
    with pytest.raises(ValueError, match=r"^position_bias must be left out"):
        T5Model(config).eval()(input_ids=IDS, decoder_input_ids=IDS)
