"""Check what `compile_qlora` assumes of a trainer, a model, its adapters and layers, before it changes anything."""

import inspect
from collections.abc import Iterable

import torch
from peft import PeftType
from peft.tuners.lora.layer import ParamWrapper
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel, Trainer

from unsloth_puzzles.exchange import original_class

# Kinds of adapters that have been compiled and are right. Of the others some need the packed weight (HiRA, SHiRA), some
# branch on numbers (VB-LoRA) or draw them (PVeRA), and prefix tuning hands a KV cache to each layer, which then runs
# uncompiled.
KINDS = (
    PeftType.LORA,
    PeftType.ADALORA,
    PeftType.BEFT,
    PeftType.BOFT,
    PeftType.C3A,
    PeftType.FOURIERFT,
    PeftType.GRALORA,
    PeftType.IA3,
    PeftType.LILY,
    PeftType.LN_TUNING,
    PeftType.MISS,
    PeftType.MULTITASK_PROMPT_TUNING,
    PeftType.OFT,
    PeftType.P_TUNING,
    PeftType.PROMPT_TUNING,
    PeftType.RANDLORA,
    PeftType.ROAD,
    PeftType.TRAINABLE_TOKENS,
    PeftType.VERA,
)


def check_trainer(trainer: Trainer) -> None:
    """Refuse a trainer whose `train()` exchanges or compiles the model.

    Raises:
        ValueError: it has a `model_init`, or compiles the model itself.
    """
    if trainer.model_init is not None:
        raise ValueError(
            "model_init must be None, got a function: train() makes a new model of it, which would not be compiled; "
            "give the Trainer a model instead"
        )
    backend = trainer.accelerator.state.dynamo_plugin.backend.value
    if trainer.args.torch_compile or backend != "NO":
        raise ValueError(
            f"torch_compile must be False, got {trainer.args.torch_compile} (accelerate's backend: {backend}): the "
            "Trainer would compile the whole model around compile_qlora's layers; make the arguments without it, and "
            "without ACCELERATE_DYNAMO_BACKEND in the environment"
        )


def find_parts(model: torch.nn.Module) -> tuple[PreTrainedModel, list[torch.nn.Module], torch.nn.Module]:
    """Find the parts of a model that are compiled.

    Args:
        model: a causal LM of transformers, or a PEFT model of one.

    Returns:
        The causal LM, its decoder layers and its final norm.

    Raises:
        TypeError: `model` is not such a model.
        ValueError: it cannot be compiled, for a reason that `compile_qlora` lists.
    """
    _refuse_compiled(model)
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal_lm, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel, a PEFT model or a Trainer, got a {type(model).__name__}")
    _check_adapters(model)
    name, backbone = type(causal_lm).__name__, causal_lm.base_model
    if getattr(causal_lm.config, "vision_config", None) or getattr(causal_lm.config, "audio_config", None):
        raise TypeError(f"model must be a causal LM of text alone, got {name}, which has a vision or audio tower")
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if layers is None or norm is None:
        raise TypeError(f"model must have decoder `layers` and a final `norm` in its backbone, got {name} without")
    kinds = set(getattr(causal_lm.config.get_text_config(), "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types must be full or sliding attention in each layer, got {', '.join(sorted(others))} in {name}"
        )
    for part in (*layers, norm):
        parameters = inspect.signature(type(part).forward).parameters
        if crossed := [one for one in parameters if one.startswith(("cross_attention", "encoder_hidden_states"))]:
            raise ValueError(
                f"model must have layers without cross attention, got {type(part).__name__} ({crossed[0]}) in {name}"
            )
        if "_old_forward" in vars(part):
            raise ValueError(
                "model must be on one GPU, got layers with accelerate's hooks (several devices, offload); load it with "
                "device_map={'': 0}"
            )
        if "forward" in vars(part):
            raise ValueError(
                f"model must have layers with the forward of their class, got a {type(part).__name__} with one of its "
                "own, which would not be called"
            )
    _check_parameters(model, [*layers, norm])
    return causal_lm, list(layers), norm


def uses(layer: torch.nn.Module, name: str) -> bool:
    """Whether the forward of a module inside `layer` has a variable or a key `name`: more than passing it on unseen."""
    codes = (
        getattr(inspect.unwrap(original_class(type(one)).forward), "__code__", None)
        for one in layer.modules()
        if one is not layer
    )
    return any(name in (*code.co_varnames, *code.co_consts) for code in codes if code is not None)


def draws(layers: Iterable[torch.nn.Module]) -> bool:
    """Whether there is dropout in `layers`: a module, or a probability for the function, such as `residual_dropout`."""
    return any(_drops(one) for layer in layers for one in layer.modules())


def _drops(module: torch.nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return any("dropout" in name and isinstance(p, int | float) and p > 0 for name, p in vars(module).items())


def _refuse_compiled(model: torch.nn.Module) -> None:
    if isinstance(model, OptimizedModule):
        raise TypeError("model must not be compiled, got what torch.compile returns; give what torch.compile was given")
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None or isinstance(module, OptimizedModule):
            raise ValueError(f"model must not be compiled, got one whose {name or 'forward'} is (by torch.compile)")


def _check_parameters(model: torch.nn.Module, parts: list[torch.nn.Module]) -> None:
    """Refuse adapters on parameters inside `parts`: PEFT exchanges the parameter within each forward."""
    inside = {one for part in parts for one in part.modules()}
    for place, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module in inside:
            names = ", ".join(map(repr, module.lora_A))
            raise ValueError(
                f"target_parameters must be None in the decoder layers, got ParamWrapper at {place} for "
                f"{module.parameter_name!r} (adapter {names}): it cannot be compiled; name linear layers in "
                "target_modules, such as ['q_proj', 'v_proj'], since 'all-linear' makes it for routers and experts, too"
            )


def _check_adapters(model: torch.nn.Module) -> None:
    configs = getattr(model, "peft_config", {})
    if not configs:
        raise ValueError("model must have adapters that are trained, got none; add them with peft.get_peft_model")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have adapters that are trained, got frozen ones; load them with is_trainable=True")
    for name, config in configs.items():
        if config.peft_type not in KINDS:
            known = ", ".join(kind.value for kind in KINDS)
            raise ValueError(f"peft_type must be one of {known}, got {config.peft_type.value} (adapter {name!r})")
        if getattr(config, "layer_replication", None):
            raise ValueError(f"layer_replication must be None, got {config.layer_replication} (adapter {name!r})")
    for place, module in model.named_modules():
        for name, variant in getattr(module, "lora_variant", {}).items():  # DoRA, activated LoRA, Arrow, ...
            raise ValueError(
                f"lora_variant must be none (plain LoRA), got {type(variant).__name__} at {place} (adapter {name!r}): "
                "it is not known to be right when compiled; train it without compile_qlora"
            )
        if type(module).__name__ == "MultiplicativeDropoutLayer" and module.p > 0:  # OFT, BOFT
            raise ValueError(f"module_dropout must be 0, got {module.p} at {place}: its numbers cannot be compiled")
