"""What a training for `llama_curve` is given: its settings, and batches of real text, the same for a seed."""

import dataclasses
import random
from functools import cache

import torch

from benchmarks.models import SEED
from unsloth_puzzles.bench.text import paragraphs

STANDARD, OURS = "standard", "ours"
SCALED, PER_CHUNK = "gradients x 1.01", "a mean per chunk"
FAULTS = (SCALED, PER_CHUNK)  # planted into our loss: a comparison that does not see them proves nothing
RUNS = {"full": (STANDARD, OURS, *FAULTS), "qlora": (STANDARD, OURS)}  # by mode
_VOCABULARY = 4096  # of the tokenizer trained here: 0.1 million tokens say little about rarer ones


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all runs of one mode share. None is decided where they run: see `decided`.

    Args:
        mode: "full", full fine-tuning by SGD without momentum and without clipping: Adam would hide a wrong scale of
            the gradients. "qlora", float32 LoRA adapters on an NF4 model, by AdamW.
        steps: Optimiser steps of a run.
        fault_steps: Of a run with a planted fault.
        passes: How often the steps go over the same batches.
        batch: Sequences of a micro-batch.
        length: Tokens of a sequence, at most.
        accumulation: Micro-batches of a step.
        weights: A directory or a name on the hub, "" for Llama 3.2 1B's mirror, "random" for fixed-seed weights
            without asking.
        tiny: Whether random weights are those of a tiny model.
        dtype: Of the computation. Full fine-tuning needs float32, for the optimiser has no other copy of the weights.
        chunk_size: Rows of logits at a time in our loss.
    """

    mode: str = "full"
    steps: int = 60
    fault_steps: int = 20
    passes: int = 4
    batch: int = 2
    length: int = 192
    accumulation: int = 2
    weights: str = ""
    tiny: bool | None = None
    device: str | None = None
    dtype: str | None = None
    learning_rate: float | None = None
    chunk_size: int = 256
    seed: int = SEED

    def decided(self) -> "Settings":
        """With what depends on the machine: a CPU gets a tiny model and float32, QLoRA on a GPU float16.

        Raises:
            ValueError: A setting that cannot be.
        """
        if self.mode not in RUNS:
            raise ValueError(f"mode must be one of {tuple(RUNS)}, got {self.mode!r}")
        at_least = {"length": 8, **dict.fromkeys(("steps", "fault_steps", "passes", "batch"), 1)}
        for name, least in {**at_least, "accumulation": 1, "chunk_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or ("float16" if device != "cpu" and self.mode == "qlora" else "float32")
        if self.mode == "full" and dtype != "float32":
            raise ValueError(f"dtype must be 'float32' for full fine-tuning, got {dtype!r}")
        tiny = device == "cpu" if self.tiny is None else self.tiny
        return dataclasses.replace(self, device=device, dtype=dtype, tiny=tiny)


Batch = list[dict[str, torch.Tensor]]  # its micro-batches


def make_batches(settings: Settings, path: str | None, vocab_size: int) -> tuple[list[Batch], str]:
    """The distinct batches of a training, and what text they are of.

    A training of `settings.steps` steps goes `settings.passes` times over `steps / passes` batches (rounded up).

    Args:
        settings: Of the training.
        path: Directory or hub name with the tokenizer of real weights; without it a byte-level BPE is trained here.
        vocab_size: Of the model; no token is larger.

    Returns:
        A list of batches, each a list of `settings.accumulation` micro-batches. A micro-batch holds "input_ids",
        "attention_mask" and "labels", (batch, length) int64 on the CPU. A sequence is a stretch of the text, a quarter
        of `length` to all of it, padded on the right. The labels of its first part, up to three quarters, and of the
        padding are -100.
    """
    stream, kind = _stream(path, vocab_size)
    generator = random.Random(settings.seed)
    distinct = -(-settings.steps // settings.passes)
    batches = [
        [_micro_batch(stream, settings, generator) for _ in range(settings.accumulation)] for _ in range(distinct)
    ]
    return batches, f"Python's language reference, {kind}"


def _micro_batch(stream: list[int], settings: Settings, generator: random.Random) -> dict[str, torch.Tensor]:
    shape = settings.batch, settings.length
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row in range(settings.batch):
        length = generator.randint(settings.length // 4, settings.length)
        prompt = generator.randint(1, 3 * length // 4)
        start = generator.randrange(len(stream) - length)
        ids[row, :length] = torch.tensor(stream[start : start + length])
        mask[row, :length] = 1
        labels[row, prompt:length] = ids[row, prompt:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@cache
def _stream(path: str | None, vocab_size: int) -> tuple[list[int], str]:
    """All the text as tokens, and how it was tokenised; once for all runs of a process."""
    encode, kind = _tokenizer(path, vocab_size)
    return [token for text in paragraphs() for token in encode(text)], kind


def _tokenizer(path: str | None, vocab_size: int):
    if path is not None:
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(path)
            return lambda text: found.encode(text, add_special_tokens=False), "the model's tokenizer"
        except (OSError, ValueError):
            pass  # a checkpoint without one; the text below says so
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    size = min(vocab_size, _VOCABULARY)
    trained.train_from_iterator(paragraphs(), vocab_size=size, show_progress=False)
    return lambda text: trained.encode(text).ids, f"a BPE of {size} tokens trained on it"
