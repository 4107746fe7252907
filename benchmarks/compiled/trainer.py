"""QLoRA of Llama 3.2 1B by transformers' Trainer, every batch of another length: losses, and what was compiled.

    python -m benchmarks.compiled.trainer --candidate compiled --out trainer.json

In float32 without TF32. With `afterwards`, batches that pack two documents into a row (another kind of mask) and an
evaluation (no gradients) follow, counted apart. "eager" is transformers' model over bitsandbytes' layers with the
standard loss; "compiled" the same under `compile_qlora`.
"""

import argparse
import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.compiled.model import qlora_model, renew, text_batch
from benchmarks.compiled.steps import CANDIDATES, run
from benchmarks.models import SEED
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora

AFTERWARDS = 3  # packed batches, and batches of the evaluation
# AdamW amplifies rounding. A higher rate would compare rounding instead of the two implementations.
LEARNING_RATE = 2e-5
LIMITS = ("suppress_errors", "recompile_limit", "accumulated_recompile_limit")


def measure(
    candidate: str,
    *,
    steps: int = 60,
    longest: int = 512,
    shortest: int = 9,
    attention: str = "auto",
    max_autotune: bool = False,
    afterwards: bool = True,
    tiny: bool = False,
    model: torch.nn.Module | None = None,
    ready: Callable[[], None] = lambda: None,
) -> dict:
    """Train `steps` steps of a batch of two rows each, of lengths from `shortest` to `longest`, all different.

    afterwards: whether packed batches and an evaluation follow. max_autotune: of a compiled run.
    attention: of a compiled run, a backend. model: what `qlora_model` gave, made new for this run; without it one is
    loaded.

    Returns "losses" of the steps, the packed batches and the evaluation, in this order; "gradient_norms" of the steps,
    which are not clipped; "lengths" of the steps; "captures", "compilations" and "graph_breaks" of the training, and
    the same with "later_" before; "limits", what Dynamo allows; the settings.
    """
    if candidate not in CANDIDATES:
        raise ValueError(f"candidate must be one of {', '.join(map(repr, CANDIDATES))}, got {candidate!r}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    model = qlora_model(device, torch.float32, tiny) if model is None else renew(model, torch.float32)
    data = Batches(steps, longest, shortest)
    later = Batches(AFTERWARDS, longest, shortest, packed=True)
    evaluation = Batches(AFTERWARDS, longest, shortest)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=1, per_device_eval_batch_size=1, report_to=[],
            learning_rate=LEARNING_RATE, logging_steps=1, save_strategy="no", seed=SEED, use_cpu=device == "cpu",
            disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0, prediction_loss_only=True,
            logging_nan_inf_filter=False,
        )  # fmt: skip
        settings._n_gpu = min(settings.n_gpu, 1)  # a 4-bit model trains on one, and so does its batch
        options = {"train_dataset": data, "eval_dataset": evaluation, "data_collator": lambda rows: rows[0]}
        trainer = Trainer(model, settings, **options)
        trainer.remove_callback(PrinterCallback)
        options = {"attention": attention, "max_autotune": max_autotune}
        with compile_qlora(trainer, **options) if candidate == "compiled" else contextlib.nullcontext():
            with count_compilations() as counts:
                trainer.train()
            logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
            losses, norms = [entry["loss"] for entry in logged], [entry["grad_norm"] for entry in logged]
            with count_compilations() as counts_afterwards:
                for batch in later if afterwards else ():
                    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                    losses.append(trainer.training_step(model, inputs).item())
                if afterwards:
                    losses.append(trainer.evaluate()["eval_loss"])
    ready()  # nothing here is timed, so it need not wait for the others' turns
    found = {"candidate": candidate, "steps": steps, "tiny": tiny, "lengths": data.lengths, "losses": losses}
    found["gradient_norms"] = norms
    found["limits"] = {name: getattr(torch._dynamo.config, name) for name in LIMITS}
    for prefix, of in (("", counts), ("later_", counts_afterwards)):
        found |= {
            f"{prefix}captures": [dataclasses.asdict(one) for one in of.captures],
            f"{prefix}compilations": of.compilations,
            f"{prefix}graph_breaks": of.graph_breaks,
            f"{prefix}compile_seconds": of.seconds,
        }
    return found


class Batches(torch.utils.data.IterableDataset):
    """Each batch is a row of the data set, since each has its own length: the longest first, then all different."""

    def __init__(self, number: int, longest: int, shortest: int = 9, packed: bool = False):
        drawn = torch.randperm(longest - shortest, generator=torch.Generator().manual_seed(SEED)) + shortest
        self.lengths = [longest, *drawn[: number - 1].tolist()]
        self._packed = packed

    def __iter__(self):
        for number, length in enumerate(self.lengths):
            batch = text_batch(2, length, number, "cpu")
            if self._packed:
                first = length // 3
                batch["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(2, -1)
            yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description="A Trainer run of one candidate.")
    parser.add_argument("--candidate", choices=CANDIDATES, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tiny", action=argparse.BooleanOptionalAction, default=False)
    run(parser, measure)


if __name__ == "__main__":
    main()
