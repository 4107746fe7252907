"""One GRPO step under two trainers, on the same inputs: every loss type, importance level and clipping.

The trainers are ours and either a plain one on full logits in float64 or TRL's own in float32. What is compared: the
loss, every gradient and every metric that is logged.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from trl import GRPOTrainer

from benchmarks.backprop import grpo
from benchmarks.backprop.errors import relative_difference
from benchmarks.models import SEED, random_llama, tiny_llama_config
from unsloth_puzzles.backprop import compiled
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
LEVELS = ("token", "sequence")
SETTINGS = ((None, 0.0, 2), (1.4, 0.04, 1))  # delta, beta, accumulation
BESIDE = {torch.float64: grpo.FullLogitsGRPOTrainer, torch.float32: GRPOTrainer}
SEQUENCES, PROMPT, COMPLETION, WORDS = 8, 5, 7, 131
ROWS = 6  # of a chunk of ours; a step has up to 35
KEPT = 2 * ROWS * WORDS * 8  # bytes of two chunks' logits in float64: the backward computes the other chunks again


def differences(device: str, compile: bool = False) -> Iterator[tuple[torch.dtype, str, float, bool]]:
    """For each combination: the dtype, its name, the largest relative difference, and whether both log the same
    metrics.

    Args:
        device: "cpu" or "cuda".
        compile: Whether our head is compiled. All combinations share its code, which is compiled for each dtype. So
            each loss type is then compared once, in float64, with ratios per token. Inductor does not search for block
            sizes: the search takes longer than all comparisons, and block sizes change no formula.
    """
    untuned = mock.patch.object(compiled, "_TUNING", ())
    dtypes, combinations = BESIDE, [*itertools.product(LOSS_TYPES, LEVELS, SETTINGS)]
    if compile:
        dtypes, combinations = (torch.float64,), [*itertools.product(LOSS_TYPES, LEVELS[:1], SETTINGS[1:])]
    for dtype in dtypes:
        ours = partial(MemoryEfficientGRPOTrainer, chunk_size=ROWS, compile=compile, keep_logits=KEPT)
        options = {"per_device_train_batch_size": SEQUENCES, "max_completion_length": COMPLETION}
        with tempfile.TemporaryDirectory() as folder:  # the trainers make it, although they save nothing
            both = [_trainer(make, _policy(dtype, device), folder, options) for make in (ours, BESIDE[dtype])]
            data = _completions(_policy(dtype, device))
            for loss_type, level, (delta, beta, accumulation) in combinations:
                with untuned:
                    mine, theirs = (_step(one, data, loss_type, level, delta, beta, accumulation) for one in both)
                values = [[torch.tensor(v) for v in logged.values()] for logged in (mine[2], theirs[2])]
                apart = relative_difference([*mine[0], *mine[1], *values[0]], [*theirs[0], *theirs[1], *values[1]])
                case = f"{loss_type}, {level}, delta {delta}, beta {beta}, accumulation {accumulation}"
                yield dtype, case, apart, list(mine[2]) == list(theirs[2])


def _trainer(make: Callable, policy, folder: str, options: dict) -> GRPOTrainer:
    return grpo.make_trainer(make, policy, grpo.tiny_tokenizer(), grpo.vowel_share, folder, **options)


def _policy(dtype: torch.dtype, device: str):
    """A tiny Llama whose logits differ as a trained model's do."""
    policy = random_llama(tiny_llama_config(WORDS), device, dtype)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return policy


def _completions(policy) -> dict[str, torch.Tensor]:
    """Inputs as TRL prepares them: padding on both sides, uneven lengths, some ratios clipped."""
    random = torch.Generator().manual_seed(SEED)
    lengths = torch.tensor([[7], [1], [5], [7], [2], [3], [6], [4]])
    data = {
        "prompt_ids": torch.randint(3, WORDS, (SEQUENCES, PROMPT), generator=random),
        "prompt_mask": (torch.arange(PROMPT) >= torch.tensor([[0], [1], [2], [3], [0], [4], [0], [2]])).long(),
        "completion_ids": torch.randint(3, WORDS, (SEQUENCES, COMPLETION), generator=random),
        "completion_mask": (torch.arange(COMPLETION) < lengths).long(),
        "num_items_in_batch": lengths.sum(),
    }
    noise = torch.randn(3, SEQUENCES, COMPLETION, generator=random, dtype=torch.float64)
    data = {name: value.to(policy.device) for name, value in data.items()}
    tokens, mask = (torch.cat([data[f"prompt_{part}"], data[f"completion_{part}"]], 1) for part in ("ids", "mask"))
    with torch.no_grad():
        logits = policy(tokens, attention_mask=mask).logits[:, PROMPT - 1 : -1].double()
    now = logits.log_softmax(-1).gather(-1, data["completion_ids"][..., None]).squeeze(-1)
    old, reference, advantages = (0.5 * noise).to(policy.device, policy.dtype)
    data |= {"old_per_token_logps": now.to(old.dtype) + old, "ref_per_token_logps": now.to(old.dtype) + reference}
    return data | {"advantages": 2 * advantages[:, 0]}


def step(trainer, inputs: dict[str, torch.Tensor], accumulation: int = 1) -> tuple[torch.Tensor, dict, dict]:
    """Losses by micro-batch, gradients by name and logged metrics of one optimiser step."""
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulation
    trainer._metrics["train"].clear()
    trainer.model.zero_grad()
    losses, size = [], len(inputs["prompt_ids"]) // accumulation
    for start in range(0, accumulation * size, size):
        part = {name: value[start : start + size] if value.dim() else value for name, value in inputs.items()}
        loss = trainer.compute_loss(trainer.model, part)
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return torch.stack(losses), gradients, {name: list(values) for name, values in trainer._metrics["train"].items()}


def _step(trainer, data, loss_type, level, delta, beta, accumulation) -> tuple[list, list, dict]:
    """`step` with these settings; losses and gradients as lists."""
    trainer.model.train()
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.args.delta, trainer.beta = delta, beta
    losses, gradients, logged = step(trainer, data, accumulation)
    return list(losses), list(gradients.values()), logged
