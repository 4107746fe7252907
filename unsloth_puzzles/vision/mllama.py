"""Make a token's loss in Mllama (Llama 3.2 Vision) independent of the rows that share its batch.

    with patch_mllama(model):
        trainer.train()

In transformers a token that sees no image (in a row of text, or before the first image) still receives the mean of all
image states from the cross-attention, because only the output of the MLP is masked. The mean depends on the number of
padding images in the batch. The patch also masks the output of the attention, as the model's original code does. It
leaves rows without an image out of the cross-attention layers, and padding images out of the vision tower.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import transformers
from transformers.models.mllama import modeling_mllama as mllama

from unsloth_puzzles.exchange import exchange_classes, original_class, subclass
from unsloth_puzzles.kv_cache import cache_name, given_cache


class _Rows(NamedTuple):
    """Travels in place of `full_text_row_masked_out_mask`, so that checkpointing keeps it with the layer's inputs."""

    seen: torch.Tensor | None  # [rows with images, 1, length, 1]: 1 for a token that sees an image, None: all do
    index: torch.Tensor | None  # [rows with images]: which rows of the batch those are, None: all


def patch_mllama(model: torch.nn.Module) -> "MllamaPatch":
    """Exchange the classes of the vision tower, the text model and the cross-attention layers of a Mllama.

    Parameters, names, state dict, adapters (added before or after), checkpointing and 4-bit weights do not change. The
    batch comes from `VisionCollator`, with the images of the rows that have some, or from transformers, with images in
    all rows.

    Training makes no KV cache. In generation the cache holds all rows of the batch. Checkpointing must be
    non-reentrant, as without the patch, because the image states are not a positional argument.

    Args:
        model: A Mllama, or a module that contains one, such as a PEFT model.

    Returns:
        A handle with the `.names` of the modules and `.undo()`. As a context manager it undoes the patch at the end.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` contains no Mllama, or a patched one; the Mllama of this transformers is not the one that
            the patch was written for.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = {name: part for name, part in model.named_modules() if isinstance(part, tuple(_forwards()))}
    if not any(isinstance(part, mllama.MllamaTextModel) for part in found.values()):
        raise ValueError(f"model must have a MllamaTextModel, got a {type(model).__name__} without one")
    if patched := next((name for name, part in found.items() if original_class(type(part)) is not type(part)), None):
        raise ValueError(f"model must not be patched yet, got {patched}, which is; undo that patch first")
    _check_transformers()
    return MllamaPatch(found)


class MllamaPatch:
    """The handle of `patch_mllama`. `undo()` or the end of a `with` block undoes it; a second time does nothing."""

    def __init__(self, modules: dict[str, torch.nn.Module]):
        self.names, self._modules = tuple(modules), modules
        exchange_classes((module, _patched_class(type(module))) for module in modules.values())

    def undo(self) -> None:
        """Restore the class of every module.

        Raises:
            RuntimeError: Another library, such as FSDP2, has since exchanged the class of a module.
        """
        for name, module in self._modules.items():
            if "exchanged_from" not in vars(type(module)):
                raise RuntimeError(
                    f"{name} must still be of the class that patch_mllama gave it, got a {type(module).__name__}; "
                    "undo first what exchanged it since"
                )
        exchange_classes((module, original_class(type(module))) for module in self._modules.values())
        self._modules = {}

    def __enter__(self) -> "MllamaPatch":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


def _forward_tower(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, **kwargs):
    """Run the tower on real images only. An image of aspect ratio 0 pads a row that has fewer images than others."""
    real = aspect_ratio_ids.ne(0)  # [rows, images]
    forward = original_class(type(self)).forward
    chosen = (one[real].unsqueeze(1) for one in (pixel_values, aspect_ratio_ids, aspect_ratio_mask))
    output = forward(self, *chosen, **kwargs)
    states = output.last_hidden_state  # [real images, 1, tiles, patches, hidden]
    output.last_hidden_state = states.new_zeros(*real.shape, *states.shape[2:]).index_put((real,), states.squeeze(1))
    return output


def _forward_text(
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


def _forward_layer(
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


def _forwards() -> dict[type, Callable]:
    return {
        mllama.MllamaVisionModel: _forward_tower,
        mllama.MllamaTextModel: _forward_text,
        mllama.MllamaCrossAttentionDecoderLayer: _forward_layer,
    }


@cache
def _patched_class(cls: type) -> type:
    forward = next(forward for base, forward in _forwards().items() if issubclass(cls, base))
    # transformers finds what a class records (hidden states, attentions) by the name and the module of the class.
    return subclass(cls, cls.__name__, forward=forward, __module__=cls.__module__, __qualname__=cls.__qualname__)


def _check_transformers() -> None:
    """Check what the patch relies on: the names of arguments, and of the KV cache."""
    for cls, forward in _forwards().items():
        parameters = inspect.signature(forward).parameters.values()
        expected = {one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}
        known = {*inspect.signature(cls.forward).parameters}
        if missing := expected - known:
            raise ValueError(
                f"transformers must have a {cls.__name__} that takes {', '.join(sorted(missing))}, got one without; "
                f"the patch was written for transformers 5.15 to 5.24, this is {transformers.__version__}"
            )
    for cls in (mllama.MllamaTextModel, mllama.MllamaCrossAttentionDecoderLayer, mllama.MllamaTextCrossAttention):
        cache_name(cls.forward)
