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

import torch
import transformers
from transformers.models.mllama import modeling_mllama as mllama

from unsloth_puzzles.exchange import exchange_classes, original_class, subclass
from unsloth_puzzles.kv_cache import cache_name
from unsloth_puzzles.vision.mllama_forwards import forward_layer, forward_text, forward_tower


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


def _forwards() -> dict[type, Callable]:
    return {
        mllama.MllamaVisionModel: forward_tower,
        mllama.MllamaTextModel: forward_text,
        mllama.MllamaCrossAttentionDecoderLayer: forward_layer,
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
