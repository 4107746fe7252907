"""The forwards of the modules that `patch_mllama` changes: vision tower, text model and cross-attention layers."""

from typing import NamedTuple

import torch

from unsloth_puzzles.exchange import original_class
from unsloth_puzzles.kv_cache import given_cache


class _Rows(NamedTuple):
    """Travels in place of `full_text_row_masked_out_mask`, so that checkpointing keeps it with the layer's inputs."""

    seen: torch.Tensor | None  # [rows with images, 1, length, 1]: 1 for a token that sees an image, None: all do
    index: torch.Tensor | None  # [rows with images]: which rows of the batch those are, None: all


def forward_tower(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, **kwargs):
    """Run the tower on real images only. An image of aspect ratio 0 pads a row that has fewer images than others."""
    real = aspect_ratio_ids.ne(0)  # [rows, images]
    forward = original_class(type(self)).forward
    chosen = (one[real].unsqueeze(1) for one in (pixel_values, aspect_ratio_ids, aspect_ratio_mask))
    output = forward(self, *chosen, **kwargs)
    states = output.last_hidden_state  # [real images, 1, tiles, patches, hidden]
    output.last_hidden_state = states.new_zeros(*real.shape, *states.shape[2:]).index_put((real,), states.squeeze(1))
    return output


def forward_text(
    self,
    *args,
    cross_attention_states: torch.Tensor | None = None,
    cross_attention_mask: torch.Tensor | None = None,
    full_text_row_masked_out_mask: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs,
):
    """Find the rows that see an image, and pass only their states and masks to the layers."""
    kv_cache = given_cache(kwargs)
    if self.training and kv_cache is None:
        use_cache = False
    elif use_cache is None:
        use_cache = self.config.use_cache
    rows = None
    if full_text_row_masked_out_mask is not None:
        rows = _Rows(full_text_row_masked_out_mask, None)
    if cross_attention_states is not None and cross_attention_mask is not None:
        index = full_text_row_masked_out_mask.flatten(1).any(1).nonzero().flatten()  # [rows with images]
        states = _by_row(cross_attention_states, cross_attention_mask, index)  # [rows with images, keys, hidden]
        if use_cache or kv_cache is not None:  # a cache that is reordered or extended needs all rows
            everything = states.new_zeros(len(cross_attention_mask), *states.shape[1:])
            cross_attention_states = everything.index_copy(0, index, states)
        else:
            cross_attention_states, cross_attention_mask = states, cross_attention_mask[index]
            rows = _Rows(full_text_row_masked_out_mask[index], index)
    return original_class(type(self)).forward(
        self,
        *args,
        cross_attention_states=cross_attention_states,
        cross_attention_mask=cross_attention_mask,
        full_text_row_masked_out_mask=rows,
        use_cache=use_cache,
        **kwargs,
    )


def _by_row(states: torch.Tensor, mask: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select the states of the rows with images. The batch holds states of these rows only, or of all rows.

    Args:
        states: [images and their tiles, patches, hidden] of all given rows, one after the other.
        mask: [batch, 1, length, keys], as transformers adds it to the scores.
        index: [rows with images] of the batch.
    """
    keys, hidden = mask.shape[-1], states.shape[-1]
    given = states.numel() // (keys * hidden)
    if given not in (len(index), len(mask)) or given * keys * hidden != states.numel():
        raise ValueError(
            f"pixel_values must be those of the {len(index)} rows whose cross_attention_mask sees an image, or of all "
            f"{len(mask)}, got those of {given}; use VisionCollator"
        )
    states = states.reshape(given, keys, hidden)
    return states if given == len(index) else states[index]


def forward_layer(
    self,
    hidden_states: torch.Tensor,
    cross_attention_states: torch.Tensor | None = None,
    cross_attention_mask: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    full_text_row_masked_out_mask: _Rows | torch.Tensor | None = None,
    position_ids=None,
    use_cache=None,
    position_embeddings=None,
    **kwargs,
) -> torch.Tensor:
    """Gated cross-attention and MLP, both masked, for the rows that have images. The others pass unchanged.

    The KV cache stays among `kwargs`: the layer and its attention name it alike.
    """
    rows = full_text_row_masked_out_mask
    if not isinstance(rows, _Rows):
        rows = _Rows(rows, None)
    everything = hidden_states  # [batch, length, hidden]
    if rows.index is not None:
        hidden_states = everything[rows.index]
    seen = 1 if rows.seen is None else rows.seen[:, 0]  # [rows with images, length, 1]
    attended, _ = self.cross_attn(
        hidden_states=self.input_layernorm(hidden_states),
        attention_mask=cross_attention_mask,
        cross_attention_states=cross_attention_states,
        **kwargs,
    )
    hidden_states = hidden_states + self.cross_attn_attn_gate.tanh() * (seen * attended)
    output = self.mlp(self.post_attention_layernorm(hidden_states))
    hidden_states = hidden_states + self.cross_attn_mlp_gate.tanh() * (seen * output)
    return hidden_states if rows.index is None else everything.index_copy(0, rows.index, hidden_states)
