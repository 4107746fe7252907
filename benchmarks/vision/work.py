"""The vision tower's work over the share of text rows: ours, blank images for text rows, and what the images need."""

from collections.abc import Mapping, Sequence

import torch

from benchmarks.vision.checks import ONE, assistant, row, tower_flops, user
from unsloth_puzzles.vision.collator import VisionCollator

SIZE = (56, 56)
BLANK = row(user(None, "What is a class?"), assistant("A template for objects."), images=[SIZE])
TEXT = row(user("What is a class?"), assistant("A template for objects."))


def mixture(rows: int, texts: int, blank: bool = False) -> list[dict]:
    """Rows with one image each, of which the last `texts` are text, or text with a blank image."""
    return [ONE] * (rows - texts) + [BLANK if blank else TEXT] * texts


def work_by_share(processor, model: torch.nn.Module, rows: int = 8) -> Mapping[str, Sequence[float]]:
    """FLOPs of the tower in one batch, for 0, 2, 4, ... `rows` rows of text, over those of one image.

    Returns:
        By name: "ours"; "blank images", what a collator pays that gives each text row an image; "floor", each image
        alone.
    """
    collate = VisionCollator(processor)
    one = tower_flops(model, collate([ONE]))
    counts = range(0, rows + 1, 2)
    return {
        "ours": [tower_flops(model, collate(mixture(rows, texts))) / one for texts in counts],
        "blank images": [tower_flops(model, collate(mixture(rows, texts, blank=True))) / one for texts in counts],
        "floor": [float(rows - texts) for texts in counts],
    }


def padding(processor, rows: Sequence[Mapping], order: Sequence[int], batch_size: int) -> float:
    """The share of padding among the tokens of all batches, when rows come in this order."""
    collate, padded, total = VisionCollator(processor), 0, 0
    for start in range(0, len(order), batch_size):
        mask = collate([rows[index] for index in order[start : start + batch_size]])["attention_mask"]
        padded += (mask == 0).sum().item()
        total += mask.numel()
    return padded / total
