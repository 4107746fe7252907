"""What a causal LM does between its backbone and its loss: found out by running it."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from unsloth_puzzles.backprop.loss_settings import DIVISORS, multipliers_of, soft_cap_of

_LENGTHS = (12, 8, 5)  # tokens in the rows of the probe, padded on the right
_ROUNDINGS = 8  # of a dtype, by which two ways to compute the same may differ


def logit_transform(causal_lm: PreTrainedModel, of_loss: bool = True) -> tuple[float, float | None] | None:
    """(scale, soft cap) between head and loss, None if there is neither, found by running the model itself.

    What is assumed of the model, each checked here with padded rows of 12, 8 and 5 tokens, labels at the padding too:

    - its head is on a device, and called once, with what `base_model` returns for the same inputs;
    - its logits are the head's times a scale, soft capped. The probe gives it wide random numbers as the head's, so
      that scale and cap show whatever the weights are;
    - (`of_loss`) its loss is the cross entropy of these logits and the next labels, nothing is added, and the labels
      alone say what counts; `num_items_in_batch`, `ignore_index` and `shift_labels` mean what `ForCausalLMLoss` says.

    Raises:
        ValueError: one of them does not hold.
    """
    if any(parameter.is_meta for parameter in causal_lm.get_output_embeddings().parameters()):
        raise ValueError(
            f"model must keep its output embeddings on a device, got {type(causal_lm).__name__} with offloaded ones, "
            "which would be loaded for each chunk; keep them (and tied input embeddings) on a device in device_map"
        )
    _refuse_head_of_sequences(causal_lm.get_output_embeddings())
    inputs, labels = _probe_inputs(causal_lm)
    cap = soft_cap_of(causal_lm)
    with _as_in_training(causal_lm) as run, _given_logits(causal_lm, cap or 4.0) as (seen, states):
        output = run(causal_lm, **inputs, **({"labels": labels} if of_loss else {}))
        if len(seen) != 1:
            name = type(causal_lm).__name__
            raise ValueError(
                f"model must call its output embeddings once in a forward, got {len(seen)} times in {name}"
            )
        if not states or "forward" not in vars(causal_lm):  # else a wrapper may have set autocast for its own call
            run(causal_lm.base_model, **inputs)
        entering, given = seen[0]
        followed = all(_same(entering, state) for state in states)
        between = _between(causal_lm, given, output.logits) if followed else None
        if between is None:
            raise ValueError(_unknown(causal_lm))
        if of_loss:
            _check_loss(causal_lm, output, labels)
            if _takes_options(causal_lm):
                options = {"num_items_in_batch": torch.tensor(7, device=labels.device), "ignore_index": 1}
                options["shift_labels"] = torch.where(labels < 0, 1, labels // 2)
                output = run(causal_lm, **inputs, labels=labels, **options)
                _check_loss(causal_lm, output, labels, options)
    return None if between == (1.0, None) else between


def own_autocast(causal_lm: PreTrainedModel) -> AbstractContextManager:
    """The autocast that a wrapper of its forward sets, accelerate's for mixed precision; it may be entered many times.

    A forward that takes the place of the wrapper's would run without.
    """
    if "forward" not in vars(causal_lm):
        return nullcontext()
    inputs, _ = _probe_inputs(causal_lm)
    device, seen = inputs["input_ids"].device.type, []

    def state(*call):
        seen.append((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))

    hook = causal_lm.get_output_embeddings().register_forward_pre_hook(state)
    try:
        with _as_in_training(causal_lm) as run:
            run(causal_lm, **inputs)
    finally:
        hook.remove()
    enabled, dtype = seen[-1]
    return torch.autocast(device, dtype) if enabled and not torch.is_autocast_enabled(device) else nullcontext()


def transform(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    """cap * tanh(scale * logits / cap), in the dtype of `logits`; without a cap scale * logits."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _refuse_head_of_sequences(head: torch.nn.Module) -> None:
    """Refuse PEFT's activated LoRA on the head: it asks where in its sequence a row is, which a chunk does not know."""
    for module in head.modules():
        for adapter, variant in getattr(module, "lora_variant", {}).items():
            if type(variant).__name__.startswith("ALora"):
                raise ValueError(
                    "model must have no activated LoRA (alora_invocation_tokens) on its output embeddings, got "
                    f"adapter {adapter!r}; leave them out of target_modules"
                )


def _between(
    causal_lm: PreTrainedModel, given: torch.Tensor, logits: torch.Tensor
) -> tuple[float, float | None] | None:
    """The first (scale, cap) of those that the config names which makes `logits` of the head's `given`."""
    named = multipliers_of(causal_lm)
    scales = [1.0, *named.values(), *(1 / named[name] for name in DIVISORS if named.get(name))]
    cap = soft_cap_of(causal_lm)
    for candidate in ((scale, cap) for cap in ([None, cap] if cap else [None]) for scale in scales):
        if _same(transform(given, *candidate), logits):
            return candidate
    return None


def _unknown(causal_lm: PreTrainedModel) -> str:
    names = ", ".join([*multipliers_of(causal_lm), "final_logit_softcapping"])
    return (
        f"model must do no more between backbone, head and loss than a soft cap and a scale of the logits ({names}), "
        f"got {type(causal_lm).__name__}, whose loss would not be the same"
    )


def _takes_options(causal_lm: PreTrainedModel) -> bool:
    """Whether its forward takes more than it names, such as `num_items_in_batch`."""
    parameters = inspect.signature(type(causal_lm).forward).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _check_loss(causal_lm: PreTrainedModel, output: ModelOutput, labels: torch.Tensor, options: dict | None = None):
    """Raise ValueError unless the loss of `output` is that of `ForCausalLMLoss` of its logits."""
    expected = ForCausalLMLoss(output.logits, labels, output.logits.shape[-1], **(options or {}))
    if not _same(output.loss, expected):
        given = f" and {', '.join(options)}" if options else ""
        raise ValueError(
            f"model must have the cross entropy of its logits and next labels as its loss, {expected.item()} for "
            f"padded rows{given}, got {output.loss.item()} from {type(causal_lm).__name__}"
        )


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for rounding, as a relative norm."""
    if found.shape != expected.shape:
        return False
    eps = max(torch.finfo(found.dtype).eps, torch.finfo(expected.dtype).eps)
    found, expected = found.double(), expected.double().to(found.device)
    return bool((found - expected).norm() <= _ROUNDINGS * eps * expected.norm())


def _probe_inputs(causal_lm: PreTrainedModel) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """input_ids and attention_mask of ragged rows, and labels: no row's own tokens, -100 in the first row's prompt."""
    embeddings = causal_lm.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)  # accelerate's: an offloaded weight lies on no device
    device = getattr(hook, "execution_device", None)
    device = embeddings.weight.device if device is None else device
    positions = torch.arange(max(_LENGTHS), device=device).expand(len(_LENGTHS), -1)
    mask = (positions < torch.tensor(_LENGTHS, device=device)[:, None]).long()
    labels = (positions + 1 + torch.arange(len(_LENGTHS), device=device)[:, None]) % 8
    labels[0, :4] = -100
    return {"input_ids": positions.contiguous(), "attention_mask": mask, "use_cache": False}, labels


@contextmanager
def _as_in_training(causal_lm: PreTrainedModel) -> Iterator:
    """Gives a function that calls a module in train mode without gradients, with the same random numbers each time."""

    def run(module, **inputs):
        with torch.random.fork_rng(gpus), torch.no_grad():
            try:
                return module(**inputs)
            except Exception as error:
                if any(isinstance(parameter, DTensor) for parameter in causal_lm.parameters()):
                    raise ValueError(
                        f"model must be patched before it is sharded, got a sharded {type(causal_lm).__name__}; "
                        "patch its loss, or compile it, before shard_qlora or fully_shard"
                    ) from error
                names = ", ".join(inputs)
                raise ValueError(f"model must run with {names}, got {type(causal_lm).__name__}: {error}") from error

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # the model's may be several
    modes = {module: module.training for module in causal_lm.modules()}
    try:
        # In eval mode bitsandbytes re-packs 4-bit weights on some CPUs, for good.
        causal_lm.train()
        yield run
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _given_logits(causal_lm: PreTrainedModel, size: float) -> Iterator[tuple[list, list]]:
    """The head returns normal random numbers of this size.

    Gives a list of what enters the head and what it returns, and one of what the backbone returns.
    """
    seen, states = [], []

    def exchange(head, arguments, logits):
        generator = torch.Generator().manual_seed(0)
        seen.append((arguments[0], (size * torch.randn(logits.shape, generator=generator, device="cpu")).to(logits)))
        return seen[-1][1]

    hooks = [
        causal_lm.get_output_embeddings().register_forward_hook(exchange),
        causal_lm.base_model.register_forward_hook(lambda *call: states.append(call[-1].last_hidden_state)),
    ]
    try:
        yield seen, states
    finally:
        for hook in hooks:
            hook.remove()
