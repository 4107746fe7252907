"""`use_memory_efficient_loss` against the standard loss: a step of a tiny Llama, and trainings under trainers."""

import logging
import tempfile
from contextlib import nullcontext

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.backprop.errors import relative_difference
from benchmarks.models import SEED, random_llama, tiny_llama_config
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss

_CHUNK = 16  # rows


def check_step(device: str) -> dict[str, bool]:
    """{name: whether it holds} of one step: loss and gradients, no logits, evaluation, and the model after undo."""
    model = random_llama(tiny_llama_config(), device)
    generator = torch.Generator(device).manual_seed(SEED)
    ids = torch.randint(256, (3, 40), device=device, generator=generator)
    given = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(40, device=device) < 11, -100)}

    def step(**more) -> list[torch.Tensor]:
        loss = model(**given, **more, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    checks = {}
    for name, more in (("mean", {}), ("num_items_in_batch", {"num_items_in_batch": torch.tensor(640, device=device)})):
        exact = step(**more)
        with use_memory_efficient_loss(model, chunk_size=_CHUNK) as patch:
            checks[f"loss and gradients, {name}"] = relative_difference(step(**more), exact) <= 1e-5
            checks[f"no logits, {name}"] = model(**given, **more).logits is None
            model.eval()
            in_evaluation = [model(**given, **more).loss]
            checks[f"in evaluation too, {name}"] = relative_difference(in_evaluation, exact[:1]) <= 1e-6
            model.train()
        checks[f"undone, {name}"] = model(**given, **more).logits.shape == (3, 40, 256) and not patch.active
    return checks


def check_trainers(device: str) -> dict[str, bool]:
    """{name: whether it holds} of `transformers.Trainer` with gradient accumulation, TRL's `SFTTrainer` with the
    metrics that it logs, and an evaluation whose metric gets predicted tokens instead of logits."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bars()
    data, checks = _rows(), {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, config, names in (
            (Trainer, TrainingArguments, ("loss", "grad_norm")),
            (SFTTrainer, SFTConfig, ("loss", "grad_norm", "entropy", "mean_token_accuracy")),
        ):
            settings = config(**_settings(device, folder))
            standard, ours = (_logged(kind, settings, data, names, device, mine) for mine in (False, True))
            checks[f"{kind.__name__}: {', '.join(names)} of {len(ours)} steps"] = (
                relative_difference([ours], [standard]) <= 2e-5
            )
        arguments = TrainingArguments(**_settings(device, folder))
        checks["evaluation: a metric without logits"] = _evaluates(arguments, data, device)
    return checks


def _settings(device: str, folder: str) -> dict:
    return {
        "output_dir": folder, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": [], "seed": SEED,
        "use_cpu": device == "cpu", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip


def _rows() -> list[dict]:
    ids = torch.randint(2, 256, (12, 16), generator=torch.Generator().manual_seed(SEED))
    return [
        {"input_ids": row.tolist(), "labels": [-100] * prompt + row.tolist()[prompt:]}
        for prompt, row in enumerate(ids, 1)
    ]


def _logged(kind, settings, data: list[dict], names: tuple[str, ...], device: str, mine: bool) -> torch.Tensor:
    """[steps, names]: what a training logs."""
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    model = random_llama(tiny_llama_config(), device)
    trainer = kind(model, settings, train_dataset=Dataset.from_list(data), processing_class=words)
    trainer.remove_callback(PrinterCallback)
    with use_memory_efficient_loss(trainer, chunk_size=_CHUNK) if mine else nullcontext():
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return torch.tensor([[entry[name] for name in names] for entry in entries])


def _evaluates(settings, data: list[dict], device: str) -> bool:
    def accuracy(evaluated) -> dict[str, float]:
        predicted, labels = evaluated.predictions[0][:, :-1], evaluated.label_ids[:, 1:]
        return {"accuracy": (predicted == labels)[labels != -100].mean()}

    model = random_llama(tiny_llama_config(), device)
    trainer = Trainer(model, settings, eval_dataset=Dataset.from_list(data), compute_metrics=accuracy)
    trainer.remove_callback(PrinterCallback)
    with use_memory_efficient_loss(trainer, predictions=True):
        found = trainer.evaluate()
    ids = torch.tensor([row["input_ids"] for row in data], device=device)
    wanted = torch.tensor([row["labels"] for row in data], device=device)[:, 1:]
    with torch.no_grad():
        right = model(ids).logits[:, :-1].argmax(-1) == wanted
    share = right[wanted != -100].float().mean().item()
    return abs(found["eval_accuracy"] - share) < 1e-6
