"""The causal LM inside a model, checked as far as can be seen without running it."""

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss


def find_causal_lm(model: object, per_token: bool) -> PreTrainedModel:
    """The causal LM in `model`, checked as far as can be seen without running it."""
    # PEFT's wrapper passes a call on to the causal LM inside it, whose forward is the one to exchange.
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(found, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, a PEFT model or a Trainer, got {type(model).__name__}")
    for adapter, settings in (getattr(model, "peft_config", None) or {}).items():
        if getattr(settings, "peft_type", None) == "CPT":
            raise ValueError(
                f"model must have no adapter with a loss of its own, got PEFT's CPT ({adapter!r}), which needs logits"
            )
    if "forward" in vars(tuner := getattr(model, "base_model", model)) and tuner is not found:
        raise ValueError(
            f"model must be patched before it is wrapped, got an adapter {type(tuner).__name__} with the old forward"
        )
    name, config = type(found).__name__, found.config
    if (patched := getattr(found, "_memory_efficient_loss", None)) is not None and patched.on:
        raise ValueError(f"model must not be patched, got a {name} that is; undo that patch first")
    if not getattr(config, "return_dict", True):
        raise ValueError(f"model.config.return_dict must be True, got False of {name}; a call may ask for a tuple")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal LM, got an encoder-decoder, {name}")
    if found.get_output_embeddings() is None or found.base_model is found:
        raise TypeError(f"model must be a causal LM with a head on its backbone, got {name}")
    if found.loss_function is not ForCausalLMLoss:
        used = getattr(found.loss_function, "__name__", found.loss_function)
        raise ValueError(f"model.loss_function must be ForCausalLMLoss, got {used} of {name}, which would be ignored")
    if routes(found):
        raise ValueError(
            "output_router_logits must be False, got True: the router's auxiliary loss is not supported; SFTTrainer "
            "sets it unless SFTConfig(router_aux_loss_coef=0.0)"
        )
    own = getattr(vars(found).get("forward"), "__func__", None)
    if not per_token and own is not None and "fused_lm_head" in own.__code__.co_varnames:
        raise ValueError(
            f"model must be without the fused head of a TRL trainer, got {name} with it; pass that trainer if it is an "
            "SFTTrainer; others are not supported"
        )
    return found


def routes(causal_lm: PreTrainedModel) -> bool:
    """Whether its config asks for the router's logits, of which mixtures of experts make an auxiliary loss."""
    return bool(getattr(causal_lm.config.get_text_config(), "output_router_logits", False))


def refuse_data_parallel(model: object, gpus: int = 1) -> None:
    """Refuse `nn.DataParallel`, around `model` or by a Trainer that sees several `gpus` in one process.

    Its replicas would call the forward that is bound to the first one. A Trainer also divides `num_items_in_batch` by
    the number of GPUs, for a 4-bit model, which it does not wrap, as well: losses and gradients would be too large.

    Raises:
        TypeError: `model` is a `DataParallel`.
        ValueError: `gpus` is more than 1.
    """
    if isinstance(model, torch.nn.DataParallel):
        raise TypeError("model must be one model on one GPU, got an nn.DataParallel; start one process per GPU instead")
    if gpus > 1:
        raise ValueError(
            f"args.n_gpu must be 1, got {gpus}: this Trainer takes all GPUs for one process, as nn.DataParallel does; "
            "set CUDA_VISIBLE_DEVICES=0 before CUDA starts, or start one process per GPU with torchrun"
        )


def refuse_sharded_head(head: torch.nn.Module) -> None:
    """Raise ValueError if FSDP2 shards the head in a group apart from the whole model, as accelerate has it do.

    FSDP2 gathers a group's weights and reduces its gradients around the forward of the group's modules. The loss calls
    the head once a chunk, without a graph: the gradients of the group would stay on their rank, and ranks with other
    numbers of chunks would wait for each other. A group is safe if it trains nothing and holds no weight of the head.
    """
    group = head._get_fsdp_state()._fsdp_param_group if isinstance(head, FSDPModule) else None
    own = set(head.modules())
    for managed in () if group is None else group.fsdp_params:
        if managed.sharded_param.requires_grad or managed._module_info.module in own:
            raise ValueError(
                f"model must not have its head in a group of FSDP2 that shards it or trains, got {managed._param_fqn} "
                "in the group; keep head and final norm frozen and the head replicated, or shard the model by "
                "unsloth_puzzles.fsdp2.shard_qlora"
            )
