"""What others do with the same rows: TRL's collator, and blank images for Mllama."""

import copy
from collections.abc import Mapping, Sequence
from textwrap import shorten

import torch

from unsloth_puzzles.vision.processing import image_token_ids


def stock_outcome(processor, rows: Sequence[Mapping]) -> str:
    """TRL's collator on rows of which those without images have no key for them, then an empty list.

    Returns:
        For both, apart by a semicolon: the error that it raises, or how many image tokens are among its labels.
    """
    without_key = [{key: value for key, value in row.items() if key != "images" or value} for row in rows]
    return f"{_outcome(processor, without_key)}; {_outcome(processor, rows)}"


def with_blank_images(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of Mllama as transformers needs it, with images in all rows: a blank one, seen by no token, in texts."""
    rows = batch["cross_attention_mask"].flatten(1).any(1)
    blank = dict(batch)
    for key in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
        blank[key] = batch[key].new_zeros(len(rows), *batch[key].shape[1:])
        blank[key][rows] = batch[key]
    blank["aspect_ratio_ids"][~rows, 0] = 1
    blank["aspect_ratio_mask"][~rows, 0, 0] = 1
    return blank


def _outcome(processor, rows: Sequence[Mapping]) -> str:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    try:
        labels = DataCollatorForVisionLanguageModeling(processor)(copy.deepcopy(list(rows)))["labels"]
    except Exception as error:
        return f"{type(error).__name__}: {shorten(str(error) or 'no message', 140, placeholder=' ...')}"
    learnt = torch.isin(labels, torch.tensor(image_token_ids(processor))).sum().item()
    return f"{learnt} image tokens are labels"
