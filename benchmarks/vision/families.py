"""Processors and tiny random models of vision-language families, made without a network.

    processor, model = FAMILIES["pixtral"]()

The layout is each family's own (placeholders, towers, position ids, cross-attention); sizes are a thousandth.
"""

from functools import partial

import torch
import transformers
from transformers.models.smolvlm import processing_smolvlm

from benchmarks.vision.chat import chat_tokenizer, template

SPREAD = 4  # times the standard deviation that transformers draws weights with
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def qwen(kind: str, seed: int = 0):
    """Qwen2-VL, Qwen2.5-VL or Qwen3-VL: patches of an image in one sequence, position ids in three dimensions."""
    vision = [f"<|vision_{name}|>" for name in ("start", "end", "pad")]
    tokenizer = chat_tokenizer("<|im_end|>", "<|endoftext|>", None, *vision, "<|image_pad|>", "<|video_pad|>")
    ids = tokenizer.convert_tokens_to_ids
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    patch = 16 if kind == "qwen3_vl" else 14
    pixels = transformers.Qwen2VLImageProcessor(patch_size=patch, min_pixels=56**2, max_pixels=28**2 * 64)
    video = getattr(transformers, "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor")()
    chat = template("<|vision_start|><|image_pad|><|vision_end|>")
    processor = getattr(transformers, f"{name}Processor")(pixels, tokenizer, video, chat_template=chat)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    tower = {"depth": 3, "hidden_size": 64, "num_heads": 4, "patch_size": patch}
    if kind == "qwen2_vl":
        tower |= {"embed_dim": 64, "mlp_ratio": 2}
    elif kind == "qwen2_5_vl":
        tower |= {"out_hidden_size": 64, "intermediate_size": 128, "window_size": 112, "fullatt_block_indexes": [1]}
    else:
        rope |= {"mrope_interleaved": True}
        tower |= {"out_hidden_size": 64, "intermediate_size": 128, "num_position_embeddings": 256}
        tower |= {"deepstack_visual_indexes": [0, 1]}
    text = {**TEXT, **_ids(tokenizer), "head_dim": 16, "rope_parameters": rope, "tie_word_embeddings": True}
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=tower,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return processor, _random(f"{name}ForConditionalGeneration", config, seed)


def mllama(seed: int = 0):
    """Llama 3.2 Vision: cross-attention from two of four layers to the tiles of the images; its gates are open."""
    # The placeholder comes last: it has a row in the embedding, but none in the head.
    tokenizer = chat_tokenizer("<|im_end|>", "<|pad|>", "<|begin_of_text|>", "<|python_tag|>", "<|image|>")
    image_processor = transformers.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2)
    chat = template("<|image|>", "<|begin_of_text|>")
    processor = transformers.MllamaProcessor(image_processor, tokenizer, chat_template=chat)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**TEXT, **_ids(tokenizer), "vocab_size": len(tokenizer) - 1, "rope_parameters": rope}
    text |= {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    tower = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "patch_size": 14, "image_size": 28, "max_num_tiles": 2, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }  # fmt: skip
    config = transformers.MllamaConfig(
        text_config=text, vision_config=tower, image_token_index=tokenizer.convert_tokens_to_ids("<|image|>")
    )
    model = _random("MllamaForConditionalGeneration", config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:  # zero at the start, where it hides what it gates
                parameter.fill_(0.7)
    return processor, model


def pixtral(seed: int = 0):
    """Pixtral: a LLaVA whose tower keeps each image's size, with a token at the end of each row of patches."""
    tokenizer = chat_tokenizer("<|im_end|>", "<pad>", "<s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image_processor = transformers.PixtralImageProcessor(
        patch_size={"height": 16, "width": 16}, size={"longest_edge": 128}
    )
    chat = template("[IMG]", "<s>")
    processor = transformers.PixtralProcessor(image_processor, tokenizer, patch_size=16, chat_template=chat)
    tower = {"model_type": "pixtral", **TOWER, "patch_size": 16, "image_size": 128}
    text = {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
    return processor, _llava(tokenizer, text, tower, "[IMG]", -1, "full", seed)


def llava(kind: str = "clip", seed: int = 0):
    """LLaVA with CLIP's tower, or with SigLIP's, at one image size."""
    tokenizer = chat_tokenizer("<|im_end|>", "<pad>", "<s>", "<image>")
    sizes = {"shortest_edge": 56} if kind == "clip" else {"height": 56, "width": 56}
    if kind == "clip":
        image_processor = transformers.CLIPImageProcessor(size=sizes, crop_size={"height": 56, "width": 56})
    else:
        image_processor = transformers.SiglipImageProcessor(size=sizes)
    select = "default" if kind == "clip" else "full"
    processor = transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=select,
        num_additional_image_tokens=1 if kind == "clip" else 0,
        chat_template=template("<image>", "<s>"),
    )
    own = {"projection_dim": 64} if kind == "clip" else {"vision_use_head": False}
    tower = {"model_type": f"{kind}_vision_model", **TOWER, "patch_size": 14, "image_size": 56, **own}
    return processor, _llava(tokenizer, {"model_type": "llama"}, tower, "<image>", -2, select, seed)


def gemma3(seed: int = 0):
    """Gemma 3: four tokens an image, which see each other both ways; local and global layers."""
    image, begin, end = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
    tokenizer = chat_tokenizer("<|im_end|>", "<pad>", "<bos>", begin, end, image)
    tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token = image, begin, end
    ids = tokenizer.convert_tokens_to_ids
    tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id = ids(image), ids(begin), ids(end)
    image_processor = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = transformers.Gemma3Processor(
        image_processor, tokenizer, chat_template=template(begin, "<bos>"), image_seq_length=4
    )
    text = {**TEXT, **_ids(tokenizer), "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"]}
    tower = {**TOWER, "patch_size": 14, "image_size": 56, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        boi_token_index=ids(begin),
        eoi_token_index=ids(end),
        image_token_index=ids(image),
    )
    model = _random("Gemma3ForConditionalGeneration", config, seed)
    torch.nn.init.eye_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero, it would hide the images
    return processor, model


def smolvlm(seed: int = 0):
    """SmolVLM: images cut into tiles whose rows and columns are named by tokens."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = chat_tokenizer(
        "<|im_end|>", "<pad>", "<s>", "<fake_token_around_image>", "<image>", "<global-img>", "<video>", *tiles
    )
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    pixels = transformers.SmolVLMImageProcessor(**sizes, do_image_splitting=True)
    video = transformers.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56})
    if processing_smolvlm.num2words is None:
        processing_smolvlm.num2words = str  # it names the number of a video's frames, and is needed for images, too
    processor = transformers.SmolVLMProcessor(
        pixels, tokenizer, video, image_seq_len=4, chat_template=template("<image>", "<s>")
    )
    text = {"model_type": "llama", **TEXT, **_ids(tokenizer)}
    config = transformers.SmolVLMConfig(
        text_config=text,
        vision_config={**TOWER, "patch_size": 14, "image_size": 56},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    return processor, _random("SmolVLMForConditionalGeneration", config, seed)


FAMILIES = {
    "qwen2_vl": partial(qwen, "qwen2_vl"),
    "qwen2_5_vl": partial(qwen, "qwen2_5_vl"),
    "qwen3_vl": partial(qwen, "qwen3_vl"),
    "mllama": mllama,
    "pixtral": pixtral,
    "llava": llava,
    "llava_siglip": partial(llava, "siglip"),
    "gemma3": gemma3,
    "smolvlm": smolvlm,
}


def _llava(tokenizer, text, tower, image, layer, select, seed):
    config = transformers.LlavaConfig(
        text_config={**TEXT, **_ids(tokenizer), **text},
        vision_config=tower,
        image_token_index=tokenizer.convert_tokens_to_ids(image),
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
        projector_hidden_act="gelu",
    )
    return _random("LlavaForConditionalGeneration", config, seed)


def _random(name: str, config, seed: int) -> transformers.PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as they are drawn, losses hardly depend on what stands before, or on an image
                parameter.mul_(SPREAD)
    return model


def _ids(tokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
