"""A 4-bit model with adapters, compiled: decoder layers, final norm and loss, each without a graph break.

    with compile_qlora(trainer):        # or a model; of TRL's SFTTrainer, the trainer
        trainer.train()

One compiled function serves all layers, whatever the length of a batch: sizes that vary are marked, attention takes its
mask from tensors, and NF4 weights come out of A's operator.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType, MethodType

import torch
from torch._functorch import config as functorch_config
from torch._inductor import utils as inductor_utils
from torch.fx.experimental import _config as fx_config
from transformers import PreTrainedModel, Trainer

from unsloth_puzzles.attention.interface import BACKENDS
from unsloth_puzzles.attention.models import NAME, register
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss
from unsloth_puzzles.compiled.lora import scale_inside
from unsloth_puzzles.nf4.patch import patch_linear4bit

_AUTOTUNE = {"max_autotune_gemm": True, "max_autotune_gemm_backends": "ATEN,TRITON"}


def compile_qlora(
    model: torch.nn.Module | Trainer,
    *,
    attention: str = "auto",
    loss: Callable = cross_entropy,
    activation_memory_budget: float = 0.9,
    max_autotune: bool = False,
    **loss_options: object,
) -> "CompiledQLoRA":
    """Compile `model`, a causal LM of transformers in NF4 with adapters of PEFT, or the `Trainer` of one.

    attention: a backend of `unsloth_puzzles.attention`, or "auto". loss: what `use_memory_efficient_loss` takes;
    `loss_options` go to it as well. activation_memory_budget: how much of what Inductor's partitioner would keep for
    the backward is kept; at 0.9 it makes again what costs no matrix product (the activation, the normed inputs), below
    that attention and then products. max_autotune: Triton's matrix products compete with cuBLAS's, also on GPUs with
    fewer multiprocessors than Inductor asks for; each choice is made at the first length that is seen, so let that be
    the longest.

    Gradient checkpointing may be on (not reentrant). Calls with a KV cache (generation) run as before, not compiled.
    The KV cache is switched off for other calls, with a warning if it was on.

    Returns a handle: `.undo()` gives the model back as it was; as a context manager it undoes at the end.

    Raises:
        TypeError: no causal LM of transformers.
        ValueError: no NF4 layers, no trainable adapters, reentrant checkpointing, what `use_memory_efficient_loss` and
            `patch_linear4bit` refuse, a backend that cannot be compiled.
    """
    found = model.model if isinstance(model, Trainer) else model
    causal_lm = found.get_base_model() if hasattr(found, "get_base_model") else found
    if not isinstance(causal_lm, PreTrainedModel):
        raise TypeError(f"model: got {type(found).__name__}, need a PreTrainedModel, a PEFT model or a Trainer")
    if not any(name for name, p in found.named_parameters() if p.requires_grad and "lora" in name):
        raise ValueError("model: no adapters that are trained; add them with peft.get_peft_model")
    backends = ["auto", *(name for name, backend in BACKENDS.items() if "fullgraph" in backend.features)]
    if attention not in backends:
        raise ValueError(f"attention: got {attention!r}, need one of {', '.join(map(repr, backends))}")
    if not 0 < activation_memory_budget <= 1:
        raise ValueError(f"activation_memory_budget: got {activation_memory_budget}, need a number above 0, at most 1")
    layers, norm = _parts(causal_lm)
    _check_checkpointing(causal_lm, layers)
    with ExitStack() as undoing:
        undoing.enter_context(patch_linear4bit(found))
        undoing.callback(scale_inside(found))
        loss_options = {"compile": True, **loss_options}
        patch = undoing.enter_context(use_memory_efficient_loss(model, loss, **loss_options))
        undoing.callback(_set_cache(causal_lm))
        undoing.callback(_set_attention(causal_lm, attention))
        undoing.enter_context(functorch_config.patch(activation_memory_budget=activation_memory_budget))
        undoing.enter_context(fx_config.patch(use_duck_shape=False))
        if max_autotune:
            undoing.callback(_allow_small_gpus())
        options = _AUTOTUNE if max_autotune else {}
        for kind in dict.fromkeys(type(layer) for layer in layers):
            compiled = _compiled(kind.forward, kind.__name__, options)
            for layer in layers:
                if type(layer) is kind:
                    undoing.callback(_exchange(layer, functools.partial(_run_layer, compiled, kind.forward)))
        undoing.callback(_exchange(norm, functools.partial(_run_norm, _compiled(type(norm).forward, "norm", options))))
        return CompiledQLoRA(undoing.pop_all(), patch)


class CompiledQLoRA:
    """What `compile_qlora` did. `.loss`: the handle of the loss. Undone by `undo()` or at the end of a `with` block."""

    def __init__(self, undoing: ExitStack, loss):
        self._undoing, self.loss = undoing, loss

    def undo(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._undoing.close()

    def __enter__(self) -> "CompiledQLoRA":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


def _parts(causal_lm: PreTrainedModel) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    backbone = causal_lm.base_model
    layers, norm = getattr(backbone, "layers", None), getattr(backbone, "norm", None)
    if layers is None or norm is None:
        raise TypeError(f"model: {type(causal_lm).__name__} has no decoder `layers` and final `norm` in its backbone")
    return list(layers), norm


def _check_checkpointing(causal_lm: PreTrainedModel, layers: list) -> None:
    for layer in layers:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get(
            "use_reentrant", True
        ):
            raise ValueError(
                "model: its gradient checkpointing is reentrant, which a compiled layer does not support; "
                "enable it with gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _set_cache(causal_lm: PreTrainedModel) -> Callable[[], None]:
    config = causal_lm.config.get_text_config()
    before = config.use_cache
    if before:
        warnings.warn("use_cache: was True, is False until undo(): a KV cache has no use in training", stacklevel=3)
    config.use_cache = False
    return lambda: setattr(config, "use_cache", before)


def _set_attention(causal_lm: PreTrainedModel, attention: str) -> Callable[[], None]:
    before = causal_lm.config._attn_implementation
    register()
    causal_lm.set_attn_implementation(NAME if attention == "auto" else f"{NAME}_{attention}")
    return lambda: causal_lm.set_attn_implementation(before)


def _allow_small_gpus() -> Callable[[], None]:
    """Inductor lets Triton compete only on GPUs with 68 multiprocessors or more; a T4 has 40."""
    before = inductor_utils.is_big_gpu
    inductor_utils.is_big_gpu = lambda *_: True
    return lambda: setattr(inductor_utils, "is_big_gpu", before)


def _compiled(forward: Callable, name: str, options: dict) -> Callable:
    """`forward` compiled under a code object of its own: Dynamo keeps and counts by it, and other users of the class
    keep theirs."""

    def run(module, *args, **kwargs):
        return forward(module, *args, **kwargs)

    own = FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
    return torch.compile(own, fullgraph=True, options=options or None)


def _exchange(module: torch.nn.Module, forward: Callable) -> Callable[[], None]:
    before = vars(module).get("forward")
    module.forward = MethodType(_Forward(forward), module)

    def undo():
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


class _Forward:
    """A function as an object, so that `MethodType` binds it to a module."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, module, *args, **kwargs):
        return self.function(module, *args, **kwargs)


def _run_layer(compiled: Callable, plain: Callable, layer, hidden_states, *args, **kwargs):
    if kwargs.get("past_key_values") is not None:
        return plain(layer, hidden_states, *args, **kwargs)
    _mark(hidden_states)
    for tensor in kwargs.get("position_embeddings") or ():
        _mark(tensor)
    # What the mask and the embeddings have said already would only be one more thing to compile for.
    for name in ("position_ids", "use_cache", "past_key_values"):
        kwargs.pop(name, None)
    return compiled(layer, hidden_states, *args, **kwargs)


def _run_norm(compiled: Callable, norm, hidden_states):
    _mark(hidden_states)
    return compiled(norm, hidden_states)


def _mark(tensor: torch.Tensor) -> None:
    """Batch and length vary; a size of 1 stays a constant, as the compiler has it."""
    torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
