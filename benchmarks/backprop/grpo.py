"""GRPO under TRL's trainer: a whole step beside its alternatives, and a short run whose reward rises.

    whole_step(device="cuda")       # a step of Llama 3.2 1B: model, head, loss, backward; no generation
    train(GRPOTrainer), train(MemoryEfficientGRPOTrainer)

The candidates are "ours" (which keeps no logits), "ours, logits kept" (the trainer's default), "TRL" (its fused head)
and "full logits" (in float32).
"""

import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import entropy_from_logits

from benchmarks.backprop.candidates import OURS, OURS_KEPT, measure_candidates, peak_gib
from benchmarks.backprop.grpo_head import FULL, TRL
from benchmarks.models import SEED, llama_1b_config, tiny_llama_config
from unsloth_puzzles.backprop.grpo import MemoryEfficientGRPOTrainer
from unsloth_puzzles.bench.text import paragraphs


def whole_step(
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    config: LlamaConfig | None = None,
    sequences: int = 16,
    prompt: int = 128,
    completion: int = 1024,
    gradient_checkpointing: bool = True,
    rounds: int = 3,
    without: Iterable[str] = (),
    **ours: object,
) -> dict[str, dict]:
    """Loss and backward of one GRPO step of `config` (Llama 3.2 1B), random weights, all of them trained.

    The trainers share one model and one batch. `ours` are options of `MemoryEfficientGRPOTrainer`. A trainer
    whose step fails is printed with the reason, and missing in what is returned; those in `without` are left out.
    Returns, by candidate, "peak_gib" above the weights (gradients included), "time" (`Timing`, microseconds), "loss".
    """
    config = config or llama_1b_config()
    torch.manual_seed(SEED)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
        inputs = _random_batch(config.vocab_size, sequences, prompt, completion)
    calls = {}
    classes = {
        OURS: partial(MemoryEfficientGRPOTrainer, keep_logits=0, **ours),
        OURS_KEPT: partial(MemoryEfficientGRPOTrainer, **ours),
        TRL: GRPOTrainer,
        FULL: FullLogitsGRPOTrainer,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, make in classes.items():
            if name in without:
                continue
            settings = {"per_device_train_batch_size": sequences, "max_completion_length": completion}
            settings["use_cpu"] = torch.device(device).type == "cpu"
            trainer = make_trainer(make, model, tiny_tokenizer(), lambda completions, **_: [0.0], folder, **settings)
            trainer.current_gradient_accumulation_steps = 1  # set by the training loop
            # Each trainer has put its own forward on the model: taken off again, so that the next finds the model's.
            calls[name] = partial(_step, trainer, vars(model).pop("forward"), inputs)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        return measure_candidates(
            "whole step", calls, lambda call: {"loss": call().item(), "peak_gib": peak_gib(call)}, device, rounds
        )


def train(
    trainer_class: Callable[..., GRPOTrainer],
    *,
    steps: int = 50,
    learning_rate: float = 3e-3,
    completion: int = 24,
    sequences: int = 64,
    use_cpu: bool = False,
    seed: int = SEED,
    **settings: object,
) -> dict[str, list[float] | float]:
    """A real run of `steps` updates: a tiny Llama, fixed-seed weights, float32; its reward is checked in the text.

    The reward is `vowel_share`; the prompts are the beginnings of paragraphs of Python's language reference. The same
    seed starts from the same weights and the same prompts, and samples the same completions as long as the policies
    agree. For a model this small compiling takes longer than training: give `partial(MemoryEfficientGRPOTrainer,
    compile=False)`. `settings` go to `GRPOConfig`.

    Returns "reward", "loss", "entropy" and "grad_norm", a value per step each, and "seconds".
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer)))
    settings = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "max_completion_length": completion,
        "per_device_train_batch_size": sequences,
        "use_cpu": use_cpu,
        "seed": seed,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(trainer_class, model, tokenizer, vowel_share, folder, **settings)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    logged = [entry for entry in trainer.state.log_history if "reward" in entry]
    curves = {name: [entry[name] for entry in logged] for name in ("reward", "loss", "entropy", "grad_norm")}
    return {**curves, "seconds": seconds}


def vowel_share(completions: list[str], **_) -> list[float]:
    """The share of a completion's characters that are lower-case vowels: 0 to 1, and 0 for an empty one."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


class FullLogitsGRPOTrainer(GRPOTrainer):
    """TRL's trainer with all of the completion's logits, in float32 (or wider): the plain reference."""

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **inputs
    ):
        if inputs.get("compute_aux_loss"):
            raise ValueError("compute_aux_loss must be False, got True: the reference is for dense models")
        with self.accelerator.autocast():
            outputs = model(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1)
        logits = outputs.logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.temperature == 1 else logits / self.temperature
        tokens, valid = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        chosen = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        if not compute_entropy:
            return torch.where(valid, chosen, 0), None, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._entropy_bonus_enabled):
            entropies = entropy_from_logits(logits)
        return torch.where(valid, chosen, 0), torch.where(valid, entropies, 0), None


def make_trainer(
    make: Callable[..., GRPOTrainer], model, tokenizer, reward: Callable, folder: str, **settings
) -> GRPOTrainer:
    """A trainer that logs every step, saves and reports nothing, and neither casts nor checkpoints unless told to."""
    quiet = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    plain = {"bf16": False, "gradient_checkpointing": False, "num_generations": 8, "lr_scheduler_type": "constant"}
    prompts = [" ".join(text.split()[:6]) for text in paragraphs()[:256]]
    trainer = make(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=folder, **{**quiet, **plain, **settings}),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE, trained here and now on Python's language reference; bos 0, eos 1, pad 2."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special.values()), "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(paragraphs(), trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _random_batch(vocab: int, sequences: int, prompt: int, completion: int) -> dict[str, torch.Tensor]:
    """Make a batch as the trainer's preparation returns it, on the default device; completions of uneven lengths."""
    lengths = torch.randint(completion // 2, completion + 1, (sequences, 1))
    completion_mask = (torch.arange(completion) < lengths).long()
    return {
        "prompt_ids": torch.randint(3, vocab, (sequences, prompt)),
        "prompt_mask": torch.ones(sequences, prompt, dtype=torch.long),
        "completion_ids": torch.randint(3, vocab, (sequences, completion)),
        "completion_mask": completion_mask,
        "advantages": torch.randn(sequences),
        "num_items_in_batch": completion_mask.sum(),
    }


def _step(trainer: GRPOTrainer, forward: Callable, inputs: dict) -> torch.Tensor:
    trainer.model.forward = forward
    try:
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        return loss.detach()
    finally:
        del trainer.model.forward
        trainer.model.zero_grad(set_to_none=True)  # now, not before: gradients belong to the peak
