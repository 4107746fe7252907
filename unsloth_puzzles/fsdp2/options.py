"""FSDP2 under transformers' Trainer and TRL's: the arguments it needs, and what is set once it exists.

arguments = SFTConfig(..., **fsdp2_arguments(model))
trainer = SFTTrainer(model, arguments, ...)
prepare_trainer(trainer)
with compile_qlora(trainer):
    trainer.train()
save_adapters(trainer.model, "out")         # save.py, on every rank
"""

import os
from functools import partial

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from unsloth_puzzles import supported
from unsloth_puzzles.fsdp2.ranks import compare_frozen, compare_trained
from unsloth_puzzles.fsdp2.shard import (
    base_of,
    check_packed,
    check_uniform,
    compute_in,
    decoder_layers,
    float32_adapters,
    follow_requires_grad,
    frozen_embeddings,
    prefetch_layers,
)

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_CLASSES = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_ACCELERATE = (1, 15)  # whose FULL_STATE_DICT checkpoints hold the adapters of all ranks; those of 1.14, of one
_STATE_DICTS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fsdp2_arguments(
    model: nn.Module,
    *,
    offload: bool = False,
    reshard_after_forward: bool = True,
    state_dict_type: str = "FULL_STATE_DICT",
) -> dict[str, object]:
    """Keyword arguments for `TrainingArguments`, `SFTConfig` and their kind.

    Until `prepare_trainer` has seen the trainer, the model's forward raises RuntimeError. Call it before the arguments
    are made: with `offload` it sets ACCELERATE_USE_FSDP and FSDP_OFFLOAD_PARAMS in the
    environment, from which accelerate chooses a process group that also moves CPU tensors.

    Args:
        model: The model that `pack_nf4` has packed.
        offload: Keep shards, gradients and optimizer states in CPU memory.
        reshard_after_forward: Free a layer's gathered weights after its forward.
        state_dict_type: "FULL_STATE_DICT" or "SHARDED_STATE_DICT", the form of checkpoints.

    Returns:
        {"fsdp": True, "fsdp_config": {...}} with the class of the decoder layers.

    Raises:
        ValueError: `model` is not packed or has no decoder `layers` in its backbone, or an unknown `state_dict_type`.
        RuntimeError: The installed accelerate is older than 1.15.
    """
    if state_dict_type not in _STATE_DICTS:
        raise ValueError(f"state_dict_type must be one of {', '.join(_STATE_DICTS)}, got {state_dict_type!r}")
    _check_accelerate()
    check_packed(model)
    layers = decoder_layers(model)
    _until_prepared(model)
    os.environ.pop("FSDP_OFFLOAD_PARAMS", None)  # of an earlier call
    if offload:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true")
    config = {
        "version": 2,
        "cpu_offload": offload,
        "reshard_after_forward": reshard_after_forward,
        "state_dict_type": state_dict_type,
        "transformer_layer_cls_to_wrap": sorted({type(layer).__name__ for layer in layers}),
        "cpu_ram_efficient_loading": False,  # looks for Params4bit, which a packed model no longer has
    }
    return {"fsdp": True, "fsdp_config": config}


def _check_accelerate() -> None:
    found = supported.installed("accelerate")
    if found is None or supported.release(found) < _ACCELERATE:
        raise RuntimeError(
            f"accelerate must be {'.'.join(map(str, _ACCELERATE))} or newer, got {found}: checkpoints of FSDP2 "
            "by an older one hold the adapters' shards of the first rank only"
        )


def _until_prepared(model: nn.Module) -> None:
    """Refuse to run without `prepare_trainer`: gradients would be reduced in 16 bits, and adapters trained in them."""

    def refuse(*_):
        raise RuntimeError("trainer must be prepared before it trains; call prepare_trainer(trainer)")

    _allow(model)
    model._until_prepared = model.register_forward_pre_hook(refuse)


def _allow(model: nn.Module) -> None:
    for module in model.modules():
        if handle := vars(module).pop("_until_prepared", None):
            handle.remove()


def prepare_trainer(trainer: Trainer, *, shard_embeddings: bool = False) -> None:
    """Set what `TrainingArguments` cannot say. Call it between making the trainer and `train()`.

    Adapters become float32 again, which TRL casts to bfloat16, also on GPUs without it. Gradients are reduced in
    float32 also with `fp16` and `bf16`; accelerate's preset reduces in 16 bits. Frozen embeddings that are not sharded
    become the dtype of these, in which autocast would use them.

    `evaluate()` and `predict()` work after `train()`, in which accelerate shards the model. With `eval_on_start=True`
    the arguments have `train()` evaluate the model that is not trained yet.

    Args:
        trainer: Of a packed model, with the arguments of `fsdp2_arguments`.
        shard_embeddings: Shard embedding and head as well, which then are gathered in every step. What is trained of
            them is sharded in any case.

    Raises:
        ValueError: The trainer does not use FSDP2, or asks for what FSDP2 breaks: another optimizer than Adam and SGD,
            `torch_compile`, `cpu_ram_efficient_loading`, `bf16_full_eval`, `fp16_full_eval`, a trained head under a
            trainer of TRL, `trainable_token_indices`. On all ranks, if trained parameters or frozen weights of one
            differ from the first rank's.
    """
    arguments = trainer.args
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)  # absent where accelerate uses no FSDP
    if plugin is None or plugin.fsdp_version != 2:
        raise ValueError(
            f"trainer must use FSDP2, got {'none' if plugin is None else 'FSDP1'}; make its arguments with "
            "**fsdp2_arguments(model) and start it with torchrun; accelerate ignores FSDP2 on a CPU"
        )
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer not in _OPTIMIZERS:
        raise ValueError(f"optim must be one of {', '.join(_OPTIMIZERS)}, which take sharded states, got {optimizer!r}")
    if (chosen := trainer.optimizer_cls_and_kwargs) is not None and chosen[0] not in _CLASSES:
        names = ", ".join(one.__name__ for one in _CLASSES)
        raise ValueError(f"optimizer_cls_and_kwargs must be of {names} of torch.optim, got {chosen[0].__name__}")
    if arguments.torch_compile:
        raise ValueError("torch_compile must be False, got True: it breaks at FSDP2's hooks; use compile_qlora")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(arguments, name):
            raise ValueError(f"{name} must be False, got True: it would cast the packed weights; use bf16 or fp16")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("cpu_ram_efficient_loading must be False, got True: it would lose the packed weights")
    check_packed(trainer.model, trainer.accelerator.num_processes)
    head = base_of(trainer.model).get_output_embeddings()
    trained = head is not None and any(parameter.requires_grad for parameter in head.parameters())
    if trained and any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__):
        raise ValueError(
            "model must have a frozen head under a trainer of TRL, got a trained one: TRL reads its weight past FSDP2, "
            "and no rank would get the gradients of the others; transformers' Trainer trains it"
        )
    if name := next(
        (name for name, one in trainer.model.named_modules() if isinstance(one, TrainableTokensLayer)), None
    ):
        raise ValueError(
            f"model must have no trainable_token_indices under a Trainer, got {name}, which accelerate shards twice; "
            "use modules_to_save, or a loop of your own with shard_qlora"
        )
    float32_adapters(trainer.model)
    compare_trained(trainer.model)
    compare_frozen(trainer.model)
    check_uniform(trainer.model)
    whole = [] if shard_embeddings else frozen_embeddings(base_of(trainer.model))
    if dtype := _DTYPES.get(trainer.accelerator.mixed_precision):
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        compute_in(trainer.model, dtype, whole)
    _allow(trainer.model)
    trainer.evaluation_loop = partial(_evaluation_loop, trainer)
    follow_requires_grad(trainer.model)
    prefetch_layers(trainer.model)
    if not shard_embeddings:
        plugin.ignored_modules = whole


def _evaluation_loop(trainer: Trainer, *args: object, **kwargs: object) -> EvalLoopOutput:
    """That of the trainer's class, which cannot shard a model without its optimizer."""
    if not isinstance(trainer.model, FSDPModule):
        raise RuntimeError(
            "trainer must train before it evaluates or predicts, got no train(); "
            "to evaluate first, give eval_on_start=True and call train()"
        )
    return type(trainer).evaluation_loop(trainer, *args, **kwargs)
