"""Shard a packed model by FSDP2, for training loops without a Trainer."""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel

from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.ranks import compare_frozen, compare_trained
from unsloth_puzzles.fsdp2.stream import ByteStream


def shard_qlora(
    model: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool = True,
    offload: bool = False,
    param_dtype: torch.dtype | None = None,
    shard_embeddings: bool = False,
) -> nn.Module:
    """Apply `fully_shard` to each decoder layer of a model that `pack_nf4` has packed, then to the model.

    FSDP2 averages gradients over the ranks. Where ranks have unequal numbers of labels, the mean of their losses is not
    the loss of the whole batch: call the model with `num_items_in_batch`, the labels of all ranks over their number.

    Args:
        model: A causal LM of transformers with adapters of PEFT, packed, on its device.
        mesh: One dimension, over all ranks; None is FSDP2's default. Where two ranks share a GPU through gloo, give
            `DeviceMesh.from_group(dist.group.WORLD, "cuda")`.
        reshard_after_forward: Free a layer's gathered weights after its forward and gather them again for its backward.
        offload: Keep shards, gradients and optimizer states in pinned CPU memory. The process group needs a backend
            for CPU tensors as well ("cuda:nccl,cpu:gloo").
        param_dtype: The dtype in which adapters and norms compute (float16, bfloat16); gradients are reduced in
            float32. Frozen embeddings that are not sharded become this dtype. None keeps each parameter's own.
        shard_embeddings: Shard embedding and head as well, which then are gathered in every step. What is trained of
            them is sharded in any case.

    Returns:
        `model`, whose parameters are DTensors but for the embeddings that are not sharded. Every rank must call its
        `forward` and its `generate` together.

    Raises:
        ValueError: `model` has no packed layers, no decoder `layers` in its backbone, or trains parameters of several
            dtypes, which FSDP2 cannot group; on all ranks, if trained parameters or frozen weights of one differ from
            the first rank's.
    """
    check_packed(model, dist.get_world_size() if mesh is None else mesh.size())
    layers = decoder_layers(model)
    compare_trained(model)
    compare_frozen(model)
    check_uniform(model)
    base = base_of(model)
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None)
    options = {
        "mesh": mesh,
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
        "mp_policy": policy,
    }
    if not shard_embeddings:
        options["ignored_params"] = {one for module in frozen_embeddings(base) for one in module.parameters()}
    if param_dtype is not None:
        compute_in(model, param_dtype, () if shard_embeddings else frozen_embeddings(base))
    follow_requires_grad(model)
    prefetch_layers(model)
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")
    return model


def compute_in(model: nn.Module, dtype: torch.dtype, whole: Iterable[nn.Module]) -> None:
    """Prepare what FSDP2's mixed precision leaves as it is. Call it before the model is sharded.

    FSDP2 casts what it gathers, and the inputs of the layers: not in the recomputation of a checkpoint, and so that a
    mask's finite minimum of float32 becomes the -inf of 16 bits. Rows that see no key would be NaN.

    Args:
        model: A causal LM of transformers with adapters of PEFT.
        dtype: The policy's `param_dtype`.
        whole: Modules that FSDP2 ignores, whose weights become `dtype`. Hidden states then have it from the start.
    """
    for module in whole:
        for parameter in module.parameters():
            if parameter.is_floating_point() and not isinstance(parameter, ByteStream):
                parameter.data = parameter.data.to(dtype)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(_finite_mask, with_kwargs=True)  # it runs after FSDP2's


def _finite_mask(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        kwargs = {**kwargs, "attention_mask": mask.clamp(min=torch.finfo(mask.dtype).min)}
    return args, kwargs


def prefetch_layers(model: nn.Module) -> None:
    """Let each decoder layer start to gather the next before it computes. Call it before the model is sharded.

    In the forward FSDP2 gathers a layer when the host comes to it. A host that is not ahead of the GPU then gathers
    while nothing computes. The backward prefetches by itself. A second gathered layer takes memory meanwhile.

    Args:
        model: A causal LM of transformers with adapters of PEFT.
    """

    def once(model: nn.Module, _: tuple) -> None:
        layers = [layer for layer in decoder_layers(model) if isinstance(layer, FSDPModule)]
        for layer, following in pairwise(layers):
            layer.set_modules_to_forward_prefetch([following])
        if layers:  # it is sharded
            handle.remove()

    handle = model.register_forward_pre_hook(once)


def follow_requires_grad(model: nn.Module) -> None:
    """Keep the adapters trained that PEFT disables and enables while their group of FSDP2 is gathered.

    PEFT's `disable_adapter` and `set_adapter` flip `requires_grad` of the parameters that a module shows: of a gathered
    group the gathered copies, which FSDP2 sets back to those of the shards with the next gather. Each forward of
    `model` writes what a gathered copy says to its shard. Its end raises RuntimeError for what is trained and not
    sharded, such as an adapter that was added since. Call it before the model is sharded.
    """
    groups: list = []
    model.register_forward_pre_hook(partial(_write_requires_grad, groups))
    model.register_forward_hook(partial(_check_trained, groups))  # a walk over all parameters, while the GPU computes


def _write_requires_grad(groups: list, model: nn.Module, _: tuple) -> None:
    if not groups:  # it is not sharded, or this is the first forward
        states = (module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule))
        groups += [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    for group in groups:
        for parameter in group.fsdp_params if group.is_unsharded else ():
            trained = parameter.unsharded_param.requires_grad
            if parameter.sharded_param.requires_grad != trained:
                parameter.sharded_param.requires_grad_(trained)


def _check_trained(groups: list, model: nn.Module, _: tuple, output: object) -> None:
    managed = {
        id(one)
        for group in groups
        for parameter in group.fsdp_params
        for one in (parameter.sharded_param, parameter.unsharded_param if group.is_unsharded else None)
    }
    for name, parameter in model.named_parameters() if managed and torch.is_grad_enabled() else ():
        if parameter.requires_grad and id(parameter) not in managed:
            raise RuntimeError(
                f"model must train only what FSDP2 has sharded, got {name}, whose gradients it would not reduce; "
                "add adapters, and set requires_grad, before pack_nf4"
            )


def frozen_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold the frozen weights of input embedding and head; one of two that share a weight.

    What PEFT trains there is not among them (adapters, `modules_to_save`): its gradients must be reduced. That of an
    adapter that is not active is frozen, and trained once it is.
    """
    chosen, seen = [], set()
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        for module in () if embedding is None else _without_adapters(embedding).modules():
            own = list(module.parameters())
            if own and not any(one.requires_grad or id(one) in seen for one in own):
                chosen.append(module)
                seen |= {id(one) for one in own}
    return chosen


def _without_adapters(module: nn.Module) -> nn.Module:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module


def base_of(model: nn.Module) -> PreTrainedModel:
    """The causal LM itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of the causal LM; ValueError if its backbone has no `layers`."""
    base = base_of(model)
    layers = getattr(getattr(base, "base_model", None), "layers", None)
    if layers is None:
        raise ValueError(f"model must have decoder `layers` in its backbone, got {type(base).__name__} without")
    return layers


def check_packed(model: nn.Module, ranks: int | None = None) -> None:
    """Raise ValueError if `pack_nf4` has packed no layer of the model, or has not packed it for `ranks` ranks."""
    packed = next((module for module in model.modules() if isinstance(module, StreamLinear4bit)), None)
    if packed is None:
        raise ValueError("model must be packed by pack_nf4, got no packed layer")
    if ranks is not None and packed.layout.world_size % ranks:
        raise ValueError(f"model must be packed for {ranks} ranks, got {packed.layout.world_size}; give world_size")


def float32_adapters(model: nn.Module) -> None:
    """Make what is trained float32: TRL casts adapters to bfloat16, also on GPUs without it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def check_uniform(model: nn.Module) -> None:
    """Raise ValueError if the parameters that are trained have several dtypes."""
    dtypes = Counter(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    if len(dtypes) > 1:
        counted = ", ".join(f"{count} of {dtype}" for dtype, count in dtypes.items())
        raise ValueError(
            f"model must train parameters of one dtype, which FSDP2 needs, got {counted}; "
            "cast the adapters, for instance to float32"
        )
