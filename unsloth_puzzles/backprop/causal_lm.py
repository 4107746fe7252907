"""The causal LM inside a model, and what it does between its backbone and its loss: found out by running it once."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

# What model families call the number between head and loss. Which of them a model really applies is tried out.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_DIVISORS = ("logits_scaling",)  # Granite divides by it, HyperCLOVA X multiplies


def find_causal_lm(model: object, per_token: bool) -> PreTrainedModel:
    """The causal LM in `model`, checked as far as can be seen without running it."""
    # PEFT's wrapper passes a call on to the causal LM inside it, whose forward is the one to exchange.
    found = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(found, PreTrainedModel):
        raise TypeError(f"model: needs a PreTrainedModel, a PEFT model or a Trainer, got {type(model).__name__}")
    name, config = type(found).__name__, found.config
    if getattr(found, "_memory_efficient_loss", None) is not None:
        raise ValueError(f"model: {name} is patched already; undo that patch first")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: {name} is an encoder-decoder; only causal LMs are supported")
    if found.get_output_embeddings() is None or found.base_model is found:
        raise TypeError(f"model: needs a causal LM with a head on its backbone, got {name}")
    if found.loss_function is not ForCausalLMLoss:
        used = getattr(found.loss_function, "__name__", found.loss_function)
        raise ValueError(f"model: the loss_function of {name} is {used}, which would be ignored; needs ForCausalLMLoss")
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise ValueError("output_router_logits: the router's auxiliary loss is not supported; set it to False")
    own = getattr(vars(found).get("forward"), "__func__", None)
    if not per_token and own is not None and "fused_lm_head" in own.__code__.co_varnames:
        raise ValueError(f"model: {name} has the fused head of a TRL trainer; pass that trainer")
    return found


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


def logit_transform(causal_lm: PreTrainedModel) -> tuple[float, float | None] | None:
    """(scale, soft cap) between head and loss, None if there is neither; found by one forward of the model itself."""
    config = causal_lm.config.get_text_config()
    given = {name: value for name in _MULTIPLIERS if (value := getattr(config, name, None)) is not None}
    scales = [1 / given[name] for name in _DIVISORS if given.get(name)] + list(given.values()) + [1.0]
    caps = [value] if (value := getattr(config, "final_logit_softcapping", None)) else []
    hidden_states, entering, leaving, output = _own_forward(causal_lm)
    if output.logits.shape == leaving.shape and entering.dtype == hidden_states.dtype:
        tolerance = 8 * torch.finfo(leaving.dtype).eps
        for scale, cap in [(scale, cap) for cap in [*caps, None] for scale in scales]:
            expected = transform(leaving, scale, cap)
            loss = F.cross_entropy(expected[0, :-1].float(), torch.arange(1, expected.shape[1], device=expected.device))
            if (
                torch.equal(entering, hidden_states)
                and (expected - output.logits).norm() <= tolerance * output.logits.norm()
                and (loss - output.loss).abs() <= 1e-4 * loss.abs()
            ):
                return None if (scale, cap) == (1.0, None) else (scale, cap)
    raise ValueError(
        f"model: {type(causal_lm).__name__} does more between backbone, head and loss than a soft cap and a scale of "
        f"the logits ({', '.join([*given, 'final_logit_softcapping'])}), so its loss would not be the same"
    )


def transform(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """cap * tanh(scale * logits / cap), in the dtype of `logits`; without a cap scale * logits."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _own_forward(causal_lm: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, ModelOutput]:
    """One forward of tokens 0 to 3: the backbone's hidden states, what enters the head, what leaves it, the output."""
    head, seen = causal_lm.get_output_embeddings(), {}
    hooks = [
        head.register_forward_hook(lambda _, args, result: seen.update(entering=args[0], leaving=result)),
        causal_lm.base_model.register_forward_hook(lambda *call: seen.update(hidden_states=call[-1][0])),
    ]
    ids = torch.arange(4, device=causal_lm.get_input_embeddings().weight.device)[None]
    devices = [ids.device] if ids.is_cuda else []
    modes = {module: module.training for module in causal_lm.modules()}
    try:
        # In eval mode bitsandbytes re-packs 4-bit weights on some CPUs, for good.
        causal_lm.train()
        with torch.random.fork_rng(devices), torch.no_grad():
            output = causal_lm(input_ids=ids, labels=ids, use_cache=False)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    if len(seen) < 3:
        raise ValueError(
            f"model: {type(causal_lm).__name__} does not call its backbone and its output embeddings once each"
        )
    return seen["hidden_states"], seen["entering"], seen["leaving"], output
