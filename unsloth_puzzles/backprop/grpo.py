"""GRPO without the logits: TRL's trainer, whose log-probabilities and entropies come from `memory_efficient_linear`.

    trainer = MemoryEfficientGRPOTrainer(model=model, reward_funcs=reward, args=GRPOConfig(...), train_dataset=data)

GRPO's loss needs one number per completion token, the log-probability of the token that was sampled, and for the
metrics (and the entropy bonus) a second, the entropy: both are per-row functions of the logits. So every loss type,
ratio, clipping and metric stays TRL's, and only the function of the rows is ours.

Written for TRL 1.16, whose own fused head (`trl.trainer.utils.add_fused_lm_head`, derivatives by hand) it replaces.
"""

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import ExitStack

import torch
import trl
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from unsloth_puzzles.backprop.causal_lm import refuse_sharded_head
from unsloth_puzzles.backprop.linear import memory_efficient_linear
from unsloth_puzzles.backprop.loss_settings import check_settings, settings
from unsloth_puzzles.backprop.losses import IGNORED
from unsloth_puzzles.backprop.probe import logit_transform
from unsloth_puzzles.backprop.token_scores import TokenScores, row_scores

TRL = (1, 16)


class MemoryEfficientGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer`, in which no more logits exist at once than one chunk's and `keep_logits` bytes.

    Temperature, soft cap (`final_logit_softcapping`), the logit multipliers of the architectures and the auxiliary loss
    of mixtures of experts are honoured. At construction the model is tried (see `logit_transform`), so an unknown
    scaling is refused, not overlooked. Entropies cost nothing in the backward unless there is an entropy bonus: without
    one nobody asks for their gradient.

    Args:
        *args: Those of `trl.GRPOTrainer`, as `**kwargs`.
        chunk_size: See `memory_efficient_linear`, as for the next three.
        compile: None stands for True on a GPU and False elsewhere.
        accumulate_dtype: In which the gradient of the head's weight is summed.
        keep_logits: Bytes of logits that are kept for the backward, which computes the others again. None stands for
            `default_keep_logits`, which holds all logits of a small batch; 0 keeps none.

    Raises:
        RuntimeError: another TRL than 1.16.
        TypeError: the model is neither of transformers nor a `PeftModel` of one, such as a `PeftMixedModel`.
        ValueError: `cast_lm_head_to_fp32`, a sharded model (DeepSpeed, FSDP), or a model whose logits are not
            cap(scale * head(hidden states)).
    """

    def __init__(
        self,
        *args,
        chunk_size: int | str = "auto",
        compile: bool | None = None,
        accumulate_dtype: torch.dtype | None = None,
        keep_logits: int | str | None = None,
        **kwargs,
    ):
        _check_trl()
        config = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        if getattr(config, "cast_lm_head_to_fp32", False):
            raise ValueError(
                "cast_lm_head_to_fp32 must be False, got True: the logits are made in the model's dtype and reduced in "
                "float32; for a float32 head load the model in float32 and set bf16=True (autocast) without it"
            )
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("args must keep the head whole (one process, or DDP), got DeepSpeed or FSDP")
        options = {
            "chunk_size": chunk_size,
            "compile": self.accelerator.device.type == "cuda" if compile is None else compile,
            "accumulate_dtype": accumulate_dtype,
            "keep_logits": keep_logits,
        }
        policy = self.accelerator.unwrap_model(self.model)
        policy = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        with ExitStack() as undoing:
            undoing.callback(_install(policy, self.temperature, True, options))
            if self.ref_model is not None:
                undoing.callback(_install(self.ref_model, self.temperature, False, options))
            self._undoing = undoing.pop_all()

    def undo(self) -> None:
        """Give the models TRL's own head back, also where another library has wrapped their forward since.

        A second time does nothing.
        """
        self._undoing.close()


def default_keep_logits(head: nn.Module) -> int:
    """Logits that the trainer keeps for the backward, in bytes, unless it is told otherwise.

    Args:
        head: The projection to the vocabulary.

    Returns:
        Three times the memory of its parameters: what their gradients and Adam's two moments take together.
    """
    return 3 * sum(weight.numel() * weight.element_size() for weight in head.parameters())


def _install(model: PreTrainedModel, temperature: float, with_entropy: bool, options: dict) -> Callable[[], None]:
    """Let `model(..., labels=labels, fused_lm_head=True)`, as TRL calls it, return `TokenScores`; returns the undo."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a PreTrainedModel or a PeftModel of one, got {type(model).__name__}")
    if model.base_model is model:
        raise ValueError(f"model must have a backbone (`base_model`) apart from the head, got {type(model).__name__}")
    scale, cap = logit_transform(model, of_loss=False) or (1.0, None)
    tried = settings(model)
    # One object for the whole training: compiled code belongs to it.
    scores = functools.partial(row_scores, temperature=temperature, scale=scale, cap=cap, with_entropy=with_entropy)
    before, active = model.forward, True  # TRL's, which knows `fused_lm_head`

    @functools.wraps(type(model).forward)  # `generate` looks at the signature
    def forward(self, *args, fused_lm_head: bool = False, labels: torch.Tensor | None = None, **kwargs):
        if not (active and fused_lm_head):
            kwargs = kwargs if labels is None else {**kwargs, "labels": labels}
            return before(*args, fused_lm_head=fused_lm_head, **kwargs)
        check_settings(self, tried)
        head = self.get_output_embeddings()  # looked up now: PEFT and DDP come later
        refuse_sharded_head(head)
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        log_probs, entropies = _next_tokens(scores, outputs.last_hidden_state, head, labels, options)
        aux_loss = _aux_loss(self, outputs, kwargs) if kwargs.get("output_router_logits") else None
        return TokenScores(log_probs=log_probs, entropy=entropies, aux_loss=aux_loss)

    def undo() -> None:
        nonlocal active
        active = False  # so a forward that somebody has wrapped passes everything on
        if vars(model).get("forward") is installed:
            model.forward = before

    model.forward = installed = types.MethodType(forward, model)
    return undo


def _next_tokens(scores: Callable, hidden_states: torch.Tensor, head: nn.Module, labels: torch.Tensor, options: dict):
    """hidden_states (batch, length, hidden), labels (batch, length) -> two (batch, length - 1), the second or None."""
    device = next(head.parameters()).device  # a model spread over devices may end on another
    hidden_states, labels = hidden_states[:, :-1].to(device), labels[:, 1:].to(device)
    valid = labels != IGNORED
    # Only the completion's rows: prompts and padding would cost as much and count nothing.
    if options["keep_logits"] is None:
        options = {**options, "keep_logits": default_keep_logits(head)}
    rows = memory_efficient_linear(hidden_states[valid], head, labels[valid], scores, reduction="none", **options)
    rows = rows if isinstance(rows, tuple) else (rows, None)
    return [None if x is None else x.new_zeros(valid.shape).masked_scatter(valid, x) for x in rows]


def _aux_loss(model: PreTrainedModel, outputs, inputs: dict) -> torch.Tensor:
    """The load-balancing loss of a mixture of experts: Mixtral's, from which the other architectures take theirs."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    if outputs.router_logits is None:  # the function would return 0
        raise ValueError(
            f"model must return router logits for its auxiliary loss, got none from {type(model).__name__}; "
            "set its config's output_router_logits to False"
        )
    experts = getattr(model, "num_experts", None) or config.num_experts  # Phi's and Granite's configs name it otherwise
    return load_balancing_loss_func(
        outputs.router_logits, experts, config.num_experts_per_tok, inputs.get("attention_mask")
    )


def _check_trl() -> None:
    if Version(trl.__version__).release[:2] != TRL:
        raise RuntimeError(
            f"trl must be {'.'.join(map(str, TRL))}, got {trl.__version__}: how the trainer asks its model for "
            "log-probabilities has changed from release to release"
        )
