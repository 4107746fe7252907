"""Batches of real text for `llama_curve`: uneven lengths, uneven prompts that are masked, the same for a seed."""

import random

import torch

from unsloth_puzzles.bench.text import paragraphs

_VOCABULARY = 4096  # of the tokenizer trained here: 0.1 million tokens say little about rarer ones


def make_batches(settings, path: str | None, vocab_size: int) -> tuple[list[list[dict[str, torch.Tensor]]], str]:
    """`settings.steps` lists of `accumulation` micro-batches, and what text they are of.

    Each holds "input_ids", "attention_mask" and "labels", (batch, length) int64 on the CPU. A sequence is a stretch of
    the text, a quarter of `length` to all of it, padded on the right; the labels of its first part, up to three
    quarters, and of the padding are -100. `path` has the tokenizer of real weights; without it a byte-level BPE is
    trained on the text.
    """
    encode, kind = _tokenizer(path, vocab_size)
    stream = [token for text in paragraphs() for token in encode(text)]
    generator = random.Random(settings.seed)
    batches = [
        [_micro_batch(stream, settings, generator) for _ in range(settings.accumulation)] for _ in range(settings.steps)
    ]
    return batches, f"Python's language reference, {kind}"


def _micro_batch(stream: list[int], settings, generator: random.Random) -> dict[str, torch.Tensor]:
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
