"""A 4-bit model with adapters, compiled: decoder layers, final norm and loss, each without a graph break.

    with compile_qlora(trainer):        # or a model; of TRL's SFTTrainer, the trainer
        trainer.train()

One compiled function serves all layers, whatever the length of a batch: sizes that vary are marked, attention takes its
mask from tensors, and NF4 weights come out of A's operator. Calls with another compile key (gradients or not, the kind
of mask) get a compiled function of their own, so a change of the key causes no recompilation.

Modules of these kinds get a subclass of their class:

    modules           subclass                        so that
    NF4 linears       nf4.patch                       W is de-quantised by A's operator
    LoRA layers       lora.LowRankScaledLora          s is multiplied with r columns, not with gradients of outputs
    attentions        shared_input.SharedInput<name>  x is read once for the A of query, key and value
    gated MLPs        swiglu.Fused<name>              the adapters' outputs are never written
    NF4 weights       PlainParams4bit                 operators on them do not pass through Python
    decoder layers    layers, checkpoint: <name>      they run compiled, and checkpointed if that is switched on
    final norm        layers: Compiled<name>          it runs compiled

The causal LM gets the forward of `use_memory_efficient_loss`, the backbone two hooks, and the config the name of the
attention. A sequence classifier keeps its head, and its own loss is compiled.
"""

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch
from transformers import Trainer

from unsloth_puzzles.attention.interface import BACKENDS
from unsloth_puzzles.backprop.causal_lm import refuse_data_parallel
from unsloth_puzzles.backprop.losses import cross_entropy
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss
from unsloth_puzzles.compiled.backbone import say_unpadded, set_attention, without_cache
from unsloth_puzzles.compiled.checkpoint import checkpoint_inputs
from unsloth_puzzles.compiled.checks import check_trainer, draws, find_parts
from unsloth_puzzles.compiled.classifier import compile_loss, find_classifier
from unsloth_puzzles.compiled.layers import compile_layers, compile_norm
from unsloth_puzzles.compiled.lora import scale_low_rank
from unsloth_puzzles.compiled.plain_params4bit import plain_params4bit
from unsloth_puzzles.compiled.settings import inductor_options, set_process
from unsloth_puzzles.compiled.shared_input import share_input
from unsloth_puzzles.compiled.swiglu import fuse_swiglu
from unsloth_puzzles.nf4.patch import patch_linear4bit


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
    """Compile a causal LM or a sequence classifier of transformers in NF4 with adapters of PEFT.

    Rows that are padded on the left: the label of the first real token is predicted from padding, where SDPA, eager
    attention and ours all differ; give it -100, and they agree.

    Calls with a KV cache (generation) run as before, not compiled. So does a layer with hooks inside (`adapter_names`,
    `register_forward_hook`) for as long as they are there, with a warning. Calls that do not say `use_cache` have no KV
    cache, with a warning if they had one. Backward passes that this thread starts run in it until undo.

    Args:
        model: the causal LM or classifier, a PEFT model of one, or the `Trainer` of one. It is changed in place.
        attention: a backend of `unsloth_puzzles.attention`, or "auto".
        loss: what `use_memory_efficient_loss` takes. A classifier has a loss of its own.
        activation_memory_budget: how much of what Inductor's partitioner would keep for the backward is kept, above 0,
            at most 1. At 0.9 it computes again what costs no matrix product (the activation, the normed inputs), below
            that attention and then products. With dropout in the layers it is 1.0, with a warning.
        max_autotune: Triton's matrix products compete with cuBLAS's, also on GPUs with fewer multiprocessors than
            Inductor asks for. Each choice is made at the first length that is seen, so let that be the longest.
        offload_checkpoints: with gradient checkpointing on, the inputs of all layers except the last are kept in pinned
            CPU memory until the backward. Checkpointing is done by `compiled.checkpoint`, whatever transformers'
            settings for it are.
        eager_rounding: round after each operation, as eager mode does, so that the losses are eager mode's. Adapters
            whose scaling is not a power of two are not fused then. False rounds once at the end of a fused kernel,
            which is nearer to float32's losses: eager mode rounds the sum of a layer's output and its adapter's, in
            which the small outputs of adapters that have just begun to learn are lost in 16 bits.
        **loss_options: go to `use_memory_efficient_loss` as well.

    Returns:
        A handle. `.undo()` gives the model back as it was; as a context manager it undoes at the end.

    Raises:
        TypeError: no causal LM or decoder for classification of transformers, one in `nn.DataParallel`, compiled, or
            with a vision tower.
        ValueError: no NF4 layers, no trainable adapters, adapters of a kind that is not known to be right when compiled
            (`checks.KINDS`), adapters on parameters of the layers (`target_parameters`; with a mixture of experts
            "all-linear" makes them), layers with accelerate's hooks or a forward of their own, a backend that cannot be
            compiled, a Trainer that sees several GPUs in one process, makes its model anew (`model_init`) or compiles
            it (`torch_compile`), another model that is compiled with another `activation_memory_budget` or
            `max_autotune` (they are the process's), a `loss` or its options for a classifier, what
            `use_memory_efficient_loss` and `patch_linear4bit` refuse.
    """
    found = model.model if isinstance(model, Trainer) else model
    refuse_data_parallel(found, model.args.n_gpu if isinstance(model, Trainer) else 1)
    if isinstance(model, Trainer):
        check_trainer(model)
    causal_lm, layers, norm = find_parts(found)
    classifier = find_classifier(found)
    if classifier is not None and (loss is not cross_entropy or loss_options):
        name = "loss" if loss is not cross_entropy else next(iter(loss_options))
        raise ValueError(f"{name} must be left out for a classifier, whose own loss_function is compiled, got one")
    _check_attention(attention)
    budget = _checked_budget(activation_memory_budget, layers)
    options = inductor_options(eager_rounding=eager_rounding, max_autotune=max_autotune)
    with ExitStack() as on_error:
        compiled = CompiledQLoRA()
        on_error.callback(compiled.undo)
        step = compiled.add_step
        step("NF4 linears: nf4_linear", patch_linear4bit(found).undo)
        step("LoRA layers: scaled between A and B", scale_low_rank(found, eager_rounding))
        step("attentions: one product for the A of query, key and value", share_input(found))
        step("gated MLPs: adapters inside the activation", fuse_swiglu(found, eager_rounding))
        step("NF4 weights: no __torch_function__", plain_params4bit(found))
        if classifier is not None:
            step("classifier: its loss compiled", compile_loss(classifier, options))
        else:  # a model may be compiled to be evaluated alone: that no loss was computed is no mistake
            compiled.loss = use_memory_efficient_loss(model, loss, **{"compile": True, **loss_options})
            step("causal LM: loss without logits", compiled.loss.undo)
        step("backbone: no KV cache", without_cache(causal_lm))
        step("backbone: attention backend", set_attention(causal_lm, attention))
        step("backbone: batches without padding", say_unpadded(causal_lm))
        compiled.products, restore = set_process(budget, max_autotune)
        step("process: settings of the compiler and of autograd", restore)
        step("decoder layers: compiled", compile_layers(layers, options))
        step("final norm: compiled", compile_norm(norm, options))
        step("decoder layers: checkpointed", checkpoint_inputs(layers, offload=offload_checkpoints))
        on_error.pop_all()
    return compiled


class CompiledQLoRA:
    """The handle of `compile_qlora`, undone by `undo()` or at the end of a `with` block.

    Attributes:
        steps: the names of the steps, in order.
        loss: the handle of the loss; None for a classifier.
        products: of max-autotune, the matrix products and who won them, as they are found.
    """

    def __init__(self):
        self.steps, self.loss, self.products = [], None, []
        self._undoing = ExitStack()

    def add_step(self, name: str, undo: Callable[[], None]) -> None:
        """Remember a step that has been done; `undo` takes it back."""
        self.steps.append(name)
        self._undoing.callback(undo)

    def undo(self) -> None:
        """Undo all steps, the last one first; a second time does nothing."""
        self._undoing.close()

    def __enter__(self) -> "CompiledQLoRA":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()


def _check_attention(attention: str) -> None:
    backends = ["auto", *(name for name, backend in BACKENDS.items() if "fullgraph" in backend.features)]
    if attention not in backends:
        raise ValueError(f"attention must be one of {', '.join(map(repr, backends))}, got {attention!r}")


def _checked_budget(budget: float, layers: list[torch.nn.Module]) -> float:
    """The budget, or 1.0 where there is dropout, with a warning."""
    if not 0 < budget <= 1:
        raise ValueError(f"activation_memory_budget must be a number above 0, at most 1, got {budget}")
    if budget < 1 and draws(layers):
        text = f"is 1.0, not {budget}: below that, dropout is drawn anew, and otherwise, in the backward"
        warnings.warn(f"activation_memory_budget: {text}", stacklevel=3)
        return 1.0
    return budget
