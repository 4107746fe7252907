"""After training: the adapters of a sharded model, in PEFT's own format.

save_adapters(model, "out")                                       # on every rank

model = load(name, device, dtype)                                 # later, in one process: ordinary layers
model = PeftModel.from_pretrained(model, "out")                   # the same logits, bit for bit
model.generate(...); model.merge_and_unload()
"""

from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, PeftType, get_peft_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.shard import base_of

_PROJECTED = (PeftType.VERA, PeftType.RANDLORA, PeftType.PVERA)


def save_adapters(model: PeftModel, folder: str | Path) -> None:
    """Write the adapters and what else is trained, as `PeftModel.save_pretrained` does for a model that is not sharded.

    Parameters are gathered one by one. Frozen weights are not, but for embedding and head: PEFT also saves these if an
    adapter is on them, or if the vocabulary is not that of the base model's folder or repository. A sharded model
    cannot become an ordinary one again: to merge adapters or to generate text fast, load them over the base model in
    one process.

    Args:
        model: With adapters of PEFT, sharded or not. Every rank must call it.
        folder: Where the first rank writes. All ranks return when the files are complete.

    Raises:
        TypeError: `model` has no adapters of PEFT.
        ValueError: A parameter is trained that PEFT does not save, such as the weight of a norm; an adapter is VeRA,
            PVeRA or RandLora, a prompt, or an adaption prompt.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"model must be a PeftModel, got {type(model).__name__}")
    _refuse_kinds(model)
    _refuse_lost(model)
    first = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    kept, embeddings = _kept(model), _embeddings(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):  # PEFT looks for both of two that are tied
        if parameter.requires_grad or id(parameter) in embeddings or any(sign in name for sign in kept):
            whole = _whole(parameter.detach())
            if first:
                state[name] = whole.cpu()
    if first:
        model.save_pretrained(folder, state_dict=state)
    if dist.is_initialized():
        dist.barrier()


def _kept(model: PeftModel) -> tuple[str, ...]:
    """Parts of the names of what PEFT saves. It need not be trained: an adapter that is not active is frozen."""
    biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
    return (model.base_model.prefix, ".modules_to_save.", ".trainable_tokens_delta.", *(["bias"] if biases else ()))


def _embeddings(model: PeftModel) -> set[int]:
    """The ids of the parameters of embedding and head; of a packed head only those of its adapters."""
    base = base_of(model)
    found = (base.get_input_embeddings(), base.get_output_embeddings()) if isinstance(base, PreTrainedModel) else ()
    modules = (module for embedding in found if embedding is not None for module in embedding.modules())
    whole = (module for module in modules if not isinstance(module, StreamLinear4bit))
    return {id(parameter) for module in whole for parameter in module.parameters(recurse=False)}


def _refuse_kinds(model: PeftModel) -> None:
    """Refuse adapters that also have random projections, which are buffers and would be left out, and those outside of
    the layers, which PEFT does not take from a state dict."""
    for name, config in model.peft_config.items():
        kind = config.peft_type
        if kind in _PROJECTED:
            raise ValueError(f"model must have adapters whose weights are all parameters, got {kind.value} ({name!r})")
        if config.is_prompt_learning or kind == PeftType.ADAPTION_PROMPT:
            raise ValueError(f"model must have adapters in its linear layers, norms or embeddings, got {kind.value} "
                             f"({name!r})")  # fmt: skip


def _refuse_lost(model: PeftModel) -> None:
    """Refuse what is trained outside of the adapters, which PEFT's format has no place for."""
    own = dict(model.named_parameters(remove_duplicate=False))
    saved = {
        id(one)
        for adapter in model.peft_config
        for one in get_peft_model_state_dict(model, own, adapter, save_embedding_layers=False).values()
    }
    lost = [name for name, parameter in own.items() if parameter.requires_grad and id(parameter) not in saved]
    if lost:
        raise ValueError(
            f"model must train only what PEFT saves, got {lost[0]}, and {len(lost) - 1} more; "
            "name its module in modules_to_save"
        )


def _whole(value: torch.Tensor) -> torch.Tensor:
    """The value, gathered from all ranks if it is sharded.

    Ranks that share a GPU speak through gloo. Its functional all-gather takes the address of a CUDA tensor for one of
    the CPU and ends the process (PyTorch 2.11), so that the shards are gathered on the CPU.
    """
    if not isinstance(value, DTensor):
        return value
    if f"{value.device.type}:gloo" in dist.get_backend_config().split(","):
        on_cpu = DeviceMesh.from_group(value.device_mesh.get_group(), "cpu")
        shard, sizes = value.to_local().cpu(), {"shape": value.shape, "stride": value.stride()}
        value = DTensor.from_local(shard, on_cpu, value.placements, run_check=False, **sizes)
    return value.full_tensor()
