"""Train a classifier of docstrings by transformers' Trainer, in NF4 or not, and score it: losses, F1, confusions.

python -m benchmarks.classification.training MODEL --seed 0 --out run.json
"""

import argparse
import contextlib
import dataclasses
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    TrainingArguments,
    set_seed,
)

from benchmarks.classification.baselines import Score, score
from benchmarks.classification.docstrings import Docstrings, Example, docstrings
from benchmarks.lean_trainer import LeanTrainer
from benchmarks.progress import SILENCE, Progress
from unsloth_puzzles.classification.adapters import add_adapters, load_trained, save_classifier
from unsloth_puzzles.classification.load import load_classifier
from unsloth_puzzles.classification.losses import class_weights, weigh_classes
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

WAYS = ("transformers", "patched", "compiled")
RANK, BATCH_SIZE, LEARNING_RATE = 16, 32, 1e-3
MAX_LENGTH = 64
ASKED = "\nTopic:"  # ends each text: the head reads the last token, which then predicts what the text is about


@dataclasses.dataclass
class Run:
    """The results of a run: losses of the steps, score on the test texts, predictions, and seconds of training."""

    losses: list[float]
    score: Score
    predicted: list[int]
    expected: list[int]
    reloaded_equal: bool | None  # logits of the first test texts, after saving and loading anew; None: not tried
    seconds: float


def train(
    name: str | Path,
    data: Docstrings,
    *,
    way: str = "transformers",
    four_bit: bool = True,
    unpacked: bool = False,
    dtype: torch.dtype | None = None,
    steps: int = -1,
    epochs: float = 2,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    weighted: bool = False,
    learning_rate: float = LEARNING_RATE,
    device: str | None = None,
    reload: bool = True,
) -> Run:
    """Load, add LoRA, train, score, save and load again.

    Args:
        name: A folder or a name on the hub of a causal LM.
        data: Texts and labels.
        way: "transformers" (bitsandbytes' layers), "patched" (`patch_linear4bit`) or "compiled" (`compile_qlora`).
        four_bit: NF4, or not quantised.
        unpacked: De-quantise NF4 weights once, for a CPU, which takes tens of seconds a step otherwise. The numbers are
            those of NF4, but saving is not tried.
        dtype: As for `load_classifier`.
        steps: -1 is as many as `epochs` have.
        epochs: Passes over the training texts.
        batch_size: Texts a step.
        seed: Of the head, the adapters and the order of the texts.
        weighted: Let every class matter alike.
        learning_rate: The highest; it grows over a tenth of the steps and falls to 0.
        device: None is the GPU, or the CPU.
        reload: Whether to save the model, load it anew and compare its logits.
    """
    if way not in WAYS:
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    set_seed(seed)
    model, tokenizer = load_classifier(str(name), data.labels, four_bit=four_bit, dtype=dtype, device=device)
    if unpacked:
        model.dequantize()
    if weighted:
        weigh_classes(model, class_weights([one.label for one in data.train], len(data.labels)))
    model = add_adapters(model, r=RANK, lora_alpha=2 * RANK)
    settings = {
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "learning_rate": learning_rate,
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LeanTrainer(
            model,
            _arguments(folder, model, **settings),
            train_dataset=encode(tokenizer, data.train),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[Progress(way)],
        )
        trainer.remove_callback(PrinterCallback)
        patches = {"transformers": contextlib.nullcontext, "patched": patch_linear4bit, "compiled": compile_qlora}
        with patches[way](*[] if way == "transformers" else [trainer if way == "compiled" else model]):
            trainer.train()
        seconds = time.perf_counter() - started
        # Under fp16 the Trainer's model computes in autocast, which a model that is loaded anew does not.
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        losses = [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]
        logits = predict(model, tokenizer, data.test)
        equal = None
        if reload and not unpacked:
            equal = _equal_when_reloaded(model, tokenizer, data.test[:batch_size], folder, device)
    predicted, expected = logits.argmax(-1).tolist(), [one.label for one in data.test]
    found = score(predicted, expected, len(data.labels))
    return Run(losses, found, predicted, expected, equal, seconds)


def encode(tokenizer, examples: Sequence[Example]) -> list[dict]:
    """Token ids and labels, not padded: at most `MAX_LENGTH` tokens of each text, and those of `ASKED`."""
    ids = tokenizer([one.text for one in examples], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    end = tokenizer(ASKED, add_special_tokens=False)["input_ids"]
    return [{"input_ids": row + end, "labels": one.label} for row, one in zip(ids, examples, strict=True)]


def predict(model, tokenizer, examples: Sequence[Example], batch_size: int = 32) -> torch.Tensor:
    """Logits [examples, num_labels] float32 on the CPU, computed in batches of texts of like length."""
    rows = encode(tokenizer, examples)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    collate, found, spoken = DataCollatorWithPadding(tokenizer), {}, time.monotonic()
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([{"input_ids": rows[index]["input_ids"]} for index in chosen]).to(model.device)
        with torch.no_grad():
            found |= zip(chosen, model(**batch).logits.float().cpu(), strict=True)
        if time.monotonic() - spoken > SILENCE:
            spoken = time.monotonic()
            print(f"... {len(found)} of {len(rows)} texts scored", flush=True)
    return torch.stack([found[index] for index in range(len(rows))])


def _equal_when_reloaded(model, tokenizer, few: Sequence[Example], folder: str, device) -> bool:
    ours = predict(model, tokenizer, few)
    save_classifier(model, tokenizer, folder)
    again, tokenizer = load_trained(folder, device=device)
    return torch.equal(predict(again, tokenizer, few), ours)


def _arguments(folder, model, *, steps, epochs, batch_size, seed, learning_rate) -> TrainingArguments:
    on_cpu, dtype = model.device.type == "cpu", model.get_base_model().dtype
    arguments = TrainingArguments(
        folder, max_steps=steps, num_train_epochs=epochs, per_device_train_batch_size=batch_size, seed=seed,
        learning_rate=learning_rate, warmup_steps=0.1, lr_scheduler_type="linear", weight_decay=0.0, logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=on_cpu, train_sampling_strategy="group_by_length",
        logging_nan_inf_filter=False, dataloader_pin_memory=not on_cpu,
        fp16=not on_cpu and dtype == torch.float16,  # small gradients would be 0 without its scaler
    )  # fmt: skip
    arguments._n_gpu = min(arguments.n_gpu, 1)  # a 4-bit model trains on one
    return arguments


def main() -> None:
    parser = argparse.ArgumentParser(description="One run; the result is written as JSON.")
    parser.add_argument("model")
    parser.add_argument("--way", choices=WAYS, default="transformers")
    parser.add_argument("--four-bit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--unpacked", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--weighted", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--most", type=int, help="training texts of a package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--out", type=Path, required=True)
    given = vars(parser.parse_args())
    out, data = given.pop("out"), docstrings(most=given.pop("most"), seed=given["seed"])
    dtype = given.pop("dtype")
    run = train(given.pop("model"), data, dtype=dtype and getattr(torch, dtype), **given)
    print(run.score, f"{run.seconds:.0f} s", f"logits equal after loading: {run.reloaded_equal}")
    out.write_text(json.dumps(dataclasses.asdict(run)))


if __name__ == "__main__":
    main()
