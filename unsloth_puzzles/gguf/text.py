"""The text model of a fine-tune as a GGUF file: its names, its metadata, its rotary layout."""

import re
from functools import partial

import gguf
import torch
from torch import nn

from unsloth_puzzles.gguf.merge import MergedStateDict
from unsloth_puzzles.gguf.quantization import QUANTIZATIONS, Type, text_type
from unsloth_puzzles.gguf.tokenizer import add_tokenizer
from unsloth_puzzles.gguf.weights import Plain
from unsloth_puzzles.gguf.writer import Tensor

# model_type of the text config: the engine's architecture
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_vl_text": "qwen2vl",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_EVERY = tuple(name for own, name in _LAYER.items() if own.endswith("_proj"))
_QKV = ("attn_q", "attn_k", "attn_v")
SQUARE = ("qwen2", "qwen2vl")  # architectures whose attn_q and attn_output the engine takes to be square
# the engine's architecture: which parts may have a bias. It does not load a file with another one.
BIASES = {"llama": _EVERY, "qwen2": _QKV, "qwen2vl": _QKV, "qwen3": (), "qwen3vl": ()}


def text_config(model: nn.Module):
    """The configuration of the text model, if the engine has its architecture.

    Raises:
        ValueError: naming what the engine does not have.
    """
    config = model.config.get_text_config()
    if config.model_type not in ARCHITECTURES:
        raise ValueError(f"model must have a text model of {', '.join(ARCHITECTURES)}, got {config.model_type!r}")
    if config.hidden_act != "silu":
        raise ValueError(f"model must have hidden_act 'silu', got {config.hidden_act!r}")
    mistral = config.model_type == "mistral" and config.sliding_window is not None
    if mistral or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError(
            "model must attend to all positions, got a sliding window; set it to None if texts are shorter"
        )
    architecture, heads, head = ARCHITECTURES[config.model_type], config.num_attention_heads, _head(config)
    if architecture in SQUARE and heads * head != config.hidden_size:
        raise ValueError(
            f"model must have num_attention_heads * head_dim = hidden_size ({config.hidden_size}) for the engine's "
            f"{architecture}, got {heads} * {head}; take a base model without a head_dim of its own"
        )
    rope = config.rope_parameters
    known = ("default", "linear", "llama3") if ARCHITECTURES[config.model_type] == "llama" else ("default", "linear")
    if rope.get("rope_type", "default") not in known:
        raise ValueError(f"model must have rope_type {', '.join(known)}, got {rope['rope_type']!r}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"model must rotate whole heads, got partial_rotary_factor {rope['partial_rotary_factor']}")
    return config


def text_file(
    model: nn.Module, weights: MergedStateDict, tokenizer, template: str | None, quantization: str
) -> tuple[gguf.GGUFWriter, list[Tensor]]:
    """Metadata and tensors of the text model.

    Args:
        model: a causal language model of transformers, or a vision model around one, without PEFT's wrapper.
        weights: its weights, merged.
        tokenizer: its tokenizer.
        template: its chat template.
        quantization: a key of `QUANTIZATIONS`.

    Raises:
        ValueError: a parameter or a setting that the engine's architecture does not have.
    """
    config = text_config(model)
    names = _names(weights, ARCHITECTURES[config.model_type], config.num_hidden_layers)
    rows = weights.weight(names["token_embd.weight"]).shape[0]
    header = _header(model, config, quantization, rows)
    add_tokenizer(header, tokenizer, template, rows, stop_ids(model))
    tied = "output.weight" not in names
    tensors = []
    for name, own in names.items():
        source = weights.weight(own)
        kind = Type.F32
        if len(source.shape) > 1:
            kind = text_type(quantization, name, source.shape[-1], config.num_hidden_layers, tied)
        change, multiple = None, 1
        if header.arch == "llama" and name.endswith(
            (".attn_q.weight", ".attn_k.weight", ".attn_q.bias", ".attn_k.bias")
        ):
            change, multiple = partial(_neighbours, head=_head(config)), _head(config)
        tensors.append(Tensor(name, source, kind, change, multiple))
    if config.rope_parameters.get("rope_type") == "llama3":
        tensors.append(Tensor("rope_freqs.weight", Plain(_frequency_factors(config)), Type.F32))
    return header, tensors


def _names(weights: MergedStateDict, architecture: str, layers: int) -> dict[str, str]:
    """The file's name of each parameter of the text model, and the model's."""
    inner = "model.language_model." if any(name.startswith("model.language_model.") for name in weights) else "model."
    found = {}
    for own in weights:
        if own.startswith(inner):
            match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", own.removeprefix(inner))
            layer, part, what = match.groups() if match else (None, own, "")
            known = _TOP if layer is None else _LAYER
            if part not in known:
                raise ValueError(f"model must have only weights that the engine has, got {own}")
            if what == "bias" and known[part] not in BIASES[architecture]:
                raise ValueError(
                    f"model must have no bias that the engine's {architecture} lacks, got {own}; take a base model "
                    "with attention_bias=False"
                )
            found[f"{known[part]}.{what}" if layer is None else f"blk.{layer}.{known[part]}.{what}"] = own
        elif own == "lm_head.weight":
            if not weights.shared(own, f"{inner}embed_tokens.weight"):
                found["output.weight"] = own
        elif not own.startswith(("model.visual.", "model.vision_tower.", "model.multi_modal_projector.")):
            raise ValueError(f"model must have only weights that the engine has, got {own}")
    wanted = [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in _EVERY]
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(f"model must have a weight for each part of a layer, got none for {lacking[0]}")
    if "lm_head.weight" not in weights:
        raise ValueError("model must have a language modelling head, got none")
    return found


def _header(model: nn.Module, config, quantization: str, rows: int) -> gguf.GGUFWriter:
    header = gguf.GGUFWriter(None, ARCHITECTURES[config.model_type])
    header.add_type(gguf.GGUFType.MODEL)
    header.add_name(model.config.model_type)
    header.add_file_type(QUANTIZATIONS[quantization][2])
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    header.add_vocab_size(rows)
    header.add_context_length(config.max_position_embeddings)
    header.add_embedding_length(config.hidden_size)
    header.add_block_count(config.num_hidden_layers)
    header.add_feed_forward_length(config.intermediate_size)
    header.add_head_count(config.num_attention_heads)
    header.add_head_count_kv(config.num_key_value_heads)
    header.add_key_length(_head(config))
    header.add_value_length(_head(config))
    header.add_rope_dimension_count(_head(config))
    header.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    header.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        header.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        header.add_rope_scaling_factor(rope["factor"])
    if header.arch in ("qwen2vl", "qwen3vl"):
        header.add_rope_dimension_sections([*rope["mrope_section"], 0])
    if header.arch == "qwen3vl":
        header.add_num_deepstack_layers(len(model.config.vision_config.deepstack_visual_indexes))
    return header


def _head(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _neighbours(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of whole heads in the order of the `llama` architecture, which rotates neighbours and not the two halves."""
    return rows.reshape(-1, 2, head // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _frequency_factors(config) -> torch.Tensor:
    """Return the divisors of the engine's rotary frequencies: plain frequencies over those that transformers scales."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise ValueError(f"model must not scale attention with its rope, got a factor of {attention_factor}")
    head = _head(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2).double() / head)
    return (plain / scaled.double()).float()


def stop_ids(model: nn.Module) -> list[int]:
    """The ids at which `model.generate` stops."""
    stops = getattr(model.generation_config, "eos_token_id", None)
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)
