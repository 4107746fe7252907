"""Tiny models with random weights and byte-level tokenizers, a family each, for exports that an engine is to run.

Norms, biases and matrices are drawn so large that every one of them shows in the log-probabilities. No two sizes are
equal by chance: the feed-forward part is wider than the hidden size, and towers differ from text models.
"""

from functools import cache

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
)

from unsloth_puzzles.bench.text import paragraphs
from unsloth_puzzles.gguf.tokenizer import PRE

EXPRESSIONS = {name: expression for (expression, _, _), name in PRE.items()}
FAMILIES = ("llama", "llava_clip", "llava_siglip", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CHAT = (  # as short as templates get
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip
VOCABULARY = 500  # before special tokens
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def tiny(family: str, seed: int = 0, **text: object) -> tuple[PreTrainedModel, object]:
    """Make a model in float32 and its processor (a tokenizer for "llama").

    Args:
        family: one of `FAMILIES`.
        seed: of the weights.
        **text: settings of the text model other than the usual ones.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    torch.manual_seed(seed)
    model, processor = (
        _llama(text) if family == "llama" else _llava(family, text) if "llava" in family else _qwen(family, text)
    )
    _spread(model)
    return model.eval(), processor


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, in which every patch differs."""
    noise = torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.numpy())


def _spread(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name or "layrnorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
            else:
                parameter.normal_(0, 0.1)
        for rows in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            rows[:256].mul_(0.1)  # or random text is full of bytes that are no characters, which engines hold back,
            rows[VOCABULARY:].mul_(0.1)  # or of image tokens without an image


@cache
def _vocabulary(pre: str, special: tuple[str, ...]) -> str:
    expression = EXPRESSIONS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps = [] if expression is None else [pre_tokenizers.Split(Regex(expression), "isolated")]
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text for text in paragraphs() if text.isascii()][:100], trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


def tokenizer(pre: str, more: tuple[str, ...] = (), image: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on English prose, whose chat template shows images as `image`."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_vocabulary(pre, (*_SPECIAL, *more))), eos_token="<|im_end|>",
        pad_token="<|endoftext|>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = CHAT.replace("IMAGE", image)
    return made


def _ids(made: PreTrainedTokenizerFast) -> dict[str, object]:
    return {
        "vocab_size": len(made),
        "bos_token_id": None,
        "eos_token_id": made.eos_token_id,
        "pad_token_id": made.pad_token_id,
    }


def _llama(text: dict) -> tuple[PreTrainedModel, object]:
    made = tokenizer("smollm")
    options = {**_TEXT, "tie_word_embeddings": True, **_ids(made), **text}
    return LlamaForCausalLM(LlamaConfig(**options)), made


def _llava(family: str, text: dict) -> tuple[PreTrainedModel, object]:
    made = tokenizer("llama-bpe", ("<image>",), "<image>")
    clip = family == "llava_clip"
    tower = {
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 56,
        **({"projection_dim": 64} if clip else {"vision_use_head": False}),
    }  # fmt: skip
    size = {"height": 56, "width": 56}
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size) if clip else SiglipImageProcessor(size=size)
    strategy = "default" if clip else "full"
    processor = LlavaProcessor(images, made, patch_size=14, vision_feature_select_strategy=strategy,
                               num_additional_image_tokens=int(clip), chat_template=made.chat_template)  # fmt: skip
    config = LlavaConfig(
        text_config={"model_type": "llama", **_TEXT, **_ids(made), **text}, vision_config=tower,
        image_token_index=made.convert_tokens_to_ids("<image>"), vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _qwen(family: str, text: dict) -> tuple[PreTrainedModel, object]:
    made = tokenizer("qwen2", _VISION, "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    patch = 16 if family == "qwen3_vl" else 14
    if family == "qwen3_vl":
        # Time has every third of the 8 pairs, as in real models: the engine does not turn a pair beyond its section.
        rope |= {"mrope_interleaved": True, "mrope_section": [3, 3, 2]}
        text = {"head_dim": 16, "num_hidden_layers": 3, **text}
    options = {**_TEXT, "tie_word_embeddings": True, **_ids(made), "rope_parameters": rope, **text}
    tower = {"depth": 4, "num_heads": 4, "patch_size": patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    wide = {"hidden_size": 48, "intermediate_size": 80, "out_hidden_size": 64}
    limits = {"min_pixels": (4 * patch) ** 2, "max_pixels": (16 * patch) ** 2}
    images = Qwen2VLImageProcessor(patch_size=patch, **limits)
    tokens = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    common = {"text_config": options, "tie_word_embeddings": True}
    common |= {name: made.convert_tokens_to_ids(token) for name, token in tokens.items()}
    if family == "qwen2_vl":
        tower |= {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=tower, **common))
        kind, video = Qwen2VLProcessor, Qwen2VLVideoProcessor()
    elif family == "qwen2_5_vl":
        tower |= {**wide, "window_size": 112, "fullatt_block_indexes": [1, 3]}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=tower, **common))
        kind, video = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor()
    else:
        tower |= {**wide, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2]}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=tower, **common))
        kind, video = Qwen3VLProcessor, Qwen3VLVideoProcessor()
    return model, kind(images, made, video, chat_template=made.chat_template)
