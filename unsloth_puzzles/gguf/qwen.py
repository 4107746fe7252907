"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: a tower for any image size, and a merger of 2 x 2 patches."""

import re
from dataclasses import dataclass

import gguf
import torch

from unsloth_puzzles.gguf.weights import Weight

PARTS = ("visual.",)
PROJECTORS = {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger", "qwen3_vl": "qwen3vl_merger"}
ACTIVATIONS = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}
_LAYER = {
    "norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "attn.qkv": "attn_qkv", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_TOP = {
    "merger.ln_q": "v.post_ln", "merger.norm": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2",
    "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2", "pos_embed": "v.position_embd",
}  # fmt: skip
_DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
EPS = 1e-6  # of the norms in these towers, which have no setting for it


def describe(header: gguf.GGUFWriter, config, images, weights: dict[str, Weight]) -> dict[str, Weight]:
    """Add the metadata, and name the tensors; arguments and errors as in `llava.describe`."""
    kind, vision = config.model_type, config.vision_config
    _check(kind, vision, images)
    if kind == "qwen3_vl" and len(vision.deepstack_visual_indexes) >= config.get_text_config().num_hidden_layers:
        raise ValueError("model must have more text layers than deepstack_visual_indexes, got as few")  # it would abort
    header.add_clip_projector_type(PROJECTORS[kind])
    header.add_vision_embedding_length(vision.embed_dim if kind == "qwen2_vl" else vision.hidden_size)
    header.add_vision_feed_forward_length(
        int(vision.embed_dim * vision.mlp_ratio) if kind == "qwen2_vl" else vision.intermediate_size
    )
    header.add_vision_head_count(vision.num_heads)
    header.add_vision_block_count(vision.depth)
    header.add_vision_attention_layernorm_eps(EPS)
    header.add_vision_spatial_merge_size(vision.spatial_merge_size)
    # The engine's own limits are those of the released models.
    header.add_vision_min_pixels(images.size["shortest_edge"])
    header.add_vision_max_pixels(images.size["longest_edge"])
    side = int(vision.num_position_embeddings**0.5) if kind == "qwen3_vl" else 40  # a hint for memory, else
    header.add_vision_image_size(side * vision.patch_size)
    if kind == "qwen2_5_vl":
        header.add_vision_use_silu(True)
        header.add_vision_n_wa_pattern(_period(vision))
        header.add_vision_window_size(vision.window_size)
    if kind == "qwen3_vl":
        header.add_vision_use_gelu(True)
        header.add_vision_is_deepstack_layers([n in vision.deepstack_visual_indexes for n in range(vision.depth)])
    found = {}
    for own, source in weights.items():
        found |= _named(own, source, vision, split=kind != "qwen3_vl")
    return found


@dataclass
class Part(Weight):
    """Rows `begin` to `end` of another weight."""

    whole: Weight
    begin: int
    end: int

    def __post_init__(self):
        self.shape = (self.end - self.begin, *self.whole.shape[1:])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.whole.rows(self.begin + begin, self.begin + end)

    def close(self) -> None:
        self.whole.close()


@dataclass
class Frame(Weight):
    """One frame of a convolution over two: [out, channels, frames, height, width] at a frame."""

    whole: Weight
    frame: int

    def __post_init__(self):
        self.shape = (*self.whole.shape[:2], *self.whole.shape[3:])

    def rows(self, begin: int, end: int) -> torch.Tensor:
        return self.whole.rows(begin, end)[:, :, self.frame]


def _named(own: str, source: Weight, vision, split: bool) -> dict[str, Weight]:
    """The tensors that become of a parameter, by their names in the file."""
    part = own.removeprefix("visual.")
    if part == "patch_embed.proj.weight":
        return {"v.patch_embd.weight": Frame(source, 0), "v.patch_embd.weight.1": Frame(source, 1)}
    if part == "patch_embed.proj.bias":
        return {"v.patch_embd.bias": source}
    module, _, what = part.rpartition(".")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        if match[2] == "attn.qkv" and split:
            third = source.shape[0] // 3
            return {f"v.blk.{match[1]}.attn_{one}.{what}": Part(source, n * third, (n + 1) * third)
                    for n, one in enumerate("qkv")}  # fmt: skip
        if match[2] in _LAYER:
            return {f"v.blk.{match[1]}.{_LAYER[match[2]]}.{what}": source}
    if match := re.fullmatch(r"deepstack_merger_list\.(\d+)\.(norm|linear_fc1|linear_fc2)", module):
        layer = vision.deepstack_visual_indexes[int(match[1])]
        return {f"v.deepstack.{layer}.{_DEEPSTACK[match[2]]}.{what}": source}
    if module not in _TOP:
        raise ValueError(f"model must have only weights that the engine has, got {own}")
    return {f"{_TOP[module]}.{what}": source}


def _period(vision) -> int:
    """Every how many layers one attends to the whole image, which is all that the file can say."""
    full = list(vision.fullatt_block_indexes)
    period = full[0] + 1 if full else 0
    if period < 2 or full != list(range(period - 1, vision.depth, period)):
        raise ValueError(f"model must have fullatt_block_indexes at equal distances of 2 or more, got {full}")
    return period


def _check(kind: str, vision, images) -> None:
    if vision.hidden_act != ACTIVATIONS[kind]:
        raise ValueError(f"model must have hidden_act {ACTIVATIONS[kind]!r} in its tower, got {vision.hidden_act!r}")
    if (vision.spatial_merge_size, vision.temporal_patch_size) != (2, 2):
        got = (vision.spatial_merge_size, vision.temporal_patch_size)
        raise ValueError(f"model must have spatial_merge_size and temporal_patch_size 2 and 2, got {got}")
    if kind == "qwen2_5_vl" and vision.window_size != 112:  # the engine does not read it from the file
        raise ValueError(f"model must have window_size 112, got {vision.window_size}")
    if not {"shortest_edge", "longest_edge"} <= set(dict(images.size)):
        raise ValueError(f"processor must limit images by shortest_edge and longest_edge, got {dict(images.size)}")
