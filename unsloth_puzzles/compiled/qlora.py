"""A 4-bit model with adapters, compiled: decoder layers, final norm and loss, each without a graph break.

    with compile_qlora(trainer):        # or a model; of TRL's SFTTrainer, the trainer
        trainer.train()

One compiled function serves all layers, whatever the length of a batch: sizes that vary are marked, attention takes its
mask from tensors, and NF4 weights come out of A's operator. What is no number (with or without gradients, the kind of
mask) makes another function of it, so that none is ever compiled again for a reason that could have been foreseen.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from types import MethodType

import torch
from torch._functorch import config as functorch_config
from torch.fx.experimental import _config as fx_config
from transformers import PreTrainedModel, Trainer

from unsloth_puzzles.attention.interface import BACKENDS, Mask
from unsloth_puzzles.attention.masks import Unpadded
from unsloth_puzzles.attention.models import LENGTHS, check_lengths, implementation, register
from unsloth_puzzles.backprop.causal_lm import refuse_data_parallel
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss
from unsloth_puzzles.compiled import autotune
from unsloth_puzzles.compiled.checkpoint import checkpoint_inputs
from unsloth_puzzles.compiled.checks import check_trainer, draws, find_parts, uses
from unsloth_puzzles.compiled.hooks import hidden, hooked_below, search
from unsloth_puzzles.compiled.lora import scale_inside
from unsloth_puzzles.compiled.siblings import share_input
from unsloth_puzzles.compiled.swiglu import fuse_swiglu
from unsloth_puzzles.compiled.variants import Variants, mark
from unsloth_puzzles.compiled.weights import without_torch_function
from unsloth_puzzles.nf4.patch import patch_linear4bit

# Launches and the host's time are what a step can do without. Inductor's check of the sizes of all inputs and results,
# 125 of them a layer, is a fifth of that time. Combined kernels do what does not depend on one another, such as casting
# the adapters of a layer, in one launch: 4 of 106 ms a step (H200, 4 x 2048).
_OPTIONS = {"size_asserts": False, "combo_kernels": True}


def compile_qlora(
    model: torch.nn.Module | Trainer,
    *,
    attention: str = "auto",
    loss: Callable = cross_entropy,
    activation_memory_budget: float = 0.9,
    max_autotune: bool = False,
    offload_checkpoints: bool = True,
    eager_rounding: bool = True,
    **loss_options: object,
) -> "CompiledQLoRA":
    """Compile `model`, a causal LM of transformers in NF4 with adapters of PEFT, or the `Trainer` of one.

    Rows that are padded on the left: the label of the first real token is predicted from padding, where SDPA, eager
    attention and ours all differ; give it -100, and they agree.

    attention: a backend of `unsloth_puzzles.attention`, or "auto". loss: what `use_memory_efficient_loss` takes;
    `loss_options` go to it as well. activation_memory_budget: how much of what Inductor's partitioner would keep for
    the backward is kept; at 0.9 it makes again what costs no matrix product (the activation, the normed inputs), below
    that attention and then products. With dropout in the layers it is 1.0, and that is said. max_autotune: Triton's
    matrix products compete with cuBLAS's, also on GPUs with fewer multiprocessors than Inductor asks for; each choice
    is made at the first length that is seen, so let that be the longest.

    offload_checkpoints: with gradient checkpointing on, the layers' inputs but for the last one's wait for the backward
    in pinned CPU memory. Checkpointing is done by `compiled.checkpoint`, whatever transformers' settings for it are.

    eager_rounding: round after each operation, as eager mode does, so that the losses are eager mode's; adapters whose
    scaling is no power of two are not fused then. False rounds once at the end of a fused kernel, which is nearer to
    float32's losses: eager mode rounds the sum of a layer's output and its adapter's, in which the small outputs of
    adapters that have just begun to learn are lost in 16 bits.

    Calls with a KV cache (generation) run as before, not compiled. So does a layer with hooks inside (`adapter_names`,
    `register_forward_hook`) for as long as they are there, with a warning. The KV cache is switched off for other
    calls, with a warning if it was on. Backward passes that this thread starts run in it until undo.

    Returns a handle: `.undo()` gives the model back as it was; as a context manager it undoes at the end.

    Raises:
        TypeError: no causal LM of transformers, one in `nn.DataParallel`, compiled, or with a vision tower.
        ValueError: no NF4 layers, no trainable adapters, adapters of a kind that is not known to be right when compiled
            (`checks.KINDS`), layers with accelerate's hooks or a forward of their own, a backend that cannot be
            compiled, a Trainer that sees several GPUs in one process, makes its model anew (`model_init`) or compiles
            it (`torch_compile`), another model that is compiled with another `activation_memory_budget` or
            `max_autotune` (they are the process's), what `use_memory_efficient_loss` and `patch_linear4bit` refuse.
    """
    found = model.model if isinstance(model, Trainer) else model
    refuse_data_parallel(found, model.args.n_gpu if isinstance(model, Trainer) else 1)
    if isinstance(model, Trainer):
        check_trainer(model)
    causal_lm, layers, norm = find_parts(found)
    backends = ["auto", *(name for name, backend in BACKENDS.items() if "fullgraph" in backend.features)]
    if attention not in backends:
        raise ValueError(f"attention: got {attention!r}, need one of {', '.join(map(repr, backends))}")
    if not 0 < activation_memory_budget <= 1:
        raise ValueError(f"activation_memory_budget: got {activation_memory_budget}, need a number above 0, at most 1")
    if activation_memory_budget < 1 and draws(layers):
        text = (
            f"is 1.0, not {activation_memory_budget}: below that, dropout is drawn anew, and otherwise, in the backward"
        )
        warnings.warn(f"activation_memory_budget: {text}", stacklevel=2)
        activation_memory_budget = 1.0
    positions = {type(layer): uses(layer, "position_ids") for layer in layers}  # while its modules' classes are theirs
    with ExitStack() as undoing:
        undoing.enter_context(patch_linear4bit(found))
        undoing.callback(scale_inside(found, eager_rounding))
        undoing.callback(share_input(found))
        undoing.callback(fuse_swiglu(found, eager_rounding))
        undoing.callback(without_torch_function(found))
        loss_options = {"compile": True, **loss_options}
        patch = use_memory_efficient_loss(model, loss, **loss_options)
        undoing.callback(patch.undo)  # a model may be compiled to be evaluated alone, without a loss
        undoing.callback(_set_cache(causal_lm))
        undoing.callback(_set_attention(causal_lm, attention))
        undoing.callback(_say_unpadded(causal_lm))
        products = undoing.enter_context(_settings(activation_memory_budget, max_autotune))
        # What is fused behind a product of Triton's gets its float32 sums, which eager mode would have rounded.
        rounding = {"emulate_precision_casts": eager_rounding, "epilogue_fusion": not eager_rounding}
        options = {**_OPTIONS, **rounding, **(autotune.OPTIONS if max_autotune else {})}
        variants = {kind: Variants(kind.forward, kind.__name__, options) for kind in map(type, layers)}
        for layer in layers:
            run = functools.partial(_run_layer, variants[type(layer)], positions[type(layer)])
            undoing.callback(_exchange(layer, run))
        undoing.callback(_exchange(norm, functools.partial(_run_norm, Variants(type(norm).forward, "norm", options))))
        undoing.callback(checkpoint_inputs(layers, offload=offload_checkpoints))
        return CompiledQLoRA(undoing.pop_all(), patch, products)


class CompiledQLoRA:
    """What `compile_qlora` did, undone by `undo()` or at the end of a `with` block.

    loss: the handle of the loss. products: of max-autotune, the matrix products and who won them, as they are found.
    """

    def __init__(self, undoing: ExitStack, loss, products: list[autotune.Product]):
        self._undoing, self.loss, self.products = undoing, loss, products

    def undo(self) -> None:
        """Give the model back as it was; a second time does nothing."""
        self._undoing.close()

    def __enter__(self) -> "CompiledQLoRA":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


_shared: dict = {"handles": 0}  # who uses the settings below


@contextmanager
def _settings(activation_memory_budget: float, max_autotune: bool):
    """What is set for the whole process while a model is compiled, by the first of several and until the last of them:
    they may be undone in any order. Gives the list of products that max-autotune fills."""
    wanted = {"activation_memory_budget": activation_memory_budget, "max_autotune": max_autotune}
    if _shared["handles"] == 0:
        with ExitStack() as stack:
            stack.enter_context(functorch_config.patch(activation_memory_budget=activation_memory_budget))
            stack.enter_context(fx_config.patch(use_duck_shape=False))
            # Autograd has a thread for a GPU. A step's Python takes 102 to 120 ms of the host's time if the backward
            # runs there, 94 and steadily so in the thread that calls it (H200, 4 x 64 tokens, with checkpointing).
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            products = stack.enter_context(autotune.triton_competes()) if max_autotune else []
            _shared.update(wanted, products=products, stack=stack.pop_all())
    for name, value in wanted.items():
        if value != _shared[name]:
            raise ValueError(f"{name}: is {_shared[name]} for a model that is compiled already; undo that first")
    _shared["handles"] += 1
    try:
        yield _shared["products"]
    finally:
        _shared["handles"] -= 1
        if _shared["handles"] == 0:
            _shared["stack"].close()


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
    causal_lm.set_attn_implementation(implementation(attention))
    return lambda: causal_lm.set_attn_implementation(before)


def _say_unpadded(causal_lm: PreTrainedModel) -> Callable[[], None]:
    """Tell the model of a batch without a mask and positions that it has neither padding nor documents.

    transformers looks for documents in the positions, also in those that it has made itself, and waits for the GPU to
    say that there are none: the host could never be ahead by more than what is left of a step.
    """

    def hook(backbone, args, kwargs):
        told = any(kwargs.get(name) is not None for name in ("attention_mask", "position_ids", "past_key_values"))
        if told or len(args) > 1:
            return None
        ids, embeddings = args[0] if args else kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        given = embeddings if ids is None else ids
        if given is None:
            return None
        mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device).as_subclass(Unpadded)
        return args, {**kwargs, "attention_mask": mask}

    return causal_lm.base_model.register_forward_pre_hook(hook, with_kwargs=True).remove


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


def _run_layer(variants: Variants, positions: bool, layer, hidden_states, *args, **kwargs):
    if kwargs.get("past_key_values") is not None:
        if layer.training and torch.is_grad_enabled():
            warnings.warn("past_key_values: a call with a KV cache is not compiled; pass use_cache=False", stacklevel=2)
        return variants.forward(layer, hidden_states, *args, **kwargs)
    place, idle = search(layer)
    if place is not None:
        warnings.warn(f"hooks: on {place}; meanwhile {type(layer).__name__} is not compiled", stacklevel=2)
        return variants.forward(layer, hidden_states, *args, **kwargs)
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Mask):
        raise ValueError(
            f"attention_mask: got {type(mask).__name__}, need a 2-D one (padding at ends of rows) or position ids"
        )
    check_lengths(mask, kwargs)
    # What the mask and the embeddings have said already, and what is collected around a layer, would only be one more
    # thing to compile for.
    unused = ["use_cache", "past_key_values", "output_hidden_states", *LENGTHS] + ["position_ids"] * (not positions)
    for name in unused:
        kwargs.pop(name, None)
    for tensor in (*(kwargs.get("position_embeddings") or ()), kwargs.get("position_ids")):
        if tensor is not None:
            mark(tensor)
    with hidden(idle) if idle else nullcontext():
        return variants(layer, hidden_states, *args, **kwargs)


def _run_norm(variants: Variants, norm, hidden_states):
    return variants.forward(norm, hidden_states) if hooked_below(norm) else variants(norm, hidden_states)
