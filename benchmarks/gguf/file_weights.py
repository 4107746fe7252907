"""The weights that a float32 file holds, beside the float32 merge that it was written from.

largest_difference(path, model)  # 0.0
"""

import os

import gguf
import torch

from unsloth_puzzles.gguf.merge import merged_state_dict


def largest_difference(path: str | os.PathLike, model: torch.nn.Module) -> float:
    """Compare each weight of the file of a Llama with `merged_state_dict`.

    The tensors are found by the names that the package `gguf` gives to those of transformers.

    Args:
        path: What `export_gguf` wrote in "f32".
        model: The model that was exported, of transformers' Llama with PEFT's adapters or without.

    Returns:
        The largest absolute difference over all weights.

    Raises:
        ValueError: The file holds other tensors than the model, or not in float32.
    """
    held = {one.name: one for one in gguf.GGUFReader(path).tensors}
    if other := {one.tensor_type.name for one in held.values()} - {"F32"}:
        raise ValueError(f"path must be a file of float32 weights, got {', '.join(sorted(other))}")
    config, merged = model.config, merged_state_dict(model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    expected = {names.get_name(own, (".weight", ".bias")): own for own in merged}
    if merged.shared("lm_head.weight", "model.embed_tokens.weight"):
        del expected["output.weight"]  # the engine takes the embedding
    if missing := {*expected} ^ {*held}:
        raise ValueError(f"path must hold the tensors of model, got a difference in {', '.join(sorted(missing))}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    largest = torch.zeros(())
    for name, own in expected.items():
        values = torch.tensor(held[name].data)
        if (part := name.split(".")[-2]) in heads:
            values = _halves(values, heads[part])
        largest = torch.maximum(largest, (values - merged[own]).abs().max())  # keeps NaN
    return largest.item()


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of heads as transformers has them, of rows whose rotated pairs are neighbours."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
