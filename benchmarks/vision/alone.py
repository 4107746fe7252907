"""A family checked: each row's losses and gradients alone and in a batch, and what its vision tower works on.

found = check_family("pixtral", "cpu")
found.difference, found.work, found.checks
"""

from typing import NamedTuple

import torch

from benchmarks.vision.checks import (
    AFTER,
    BATCHES,
    TEXT,
    TURNS,
    TWO,
    assistant,
    gradients,
    largest_difference,
    relative_difference,
    token_losses,
    tower_flops,
    user,
)
from benchmarks.vision.families import FAMILIES
from benchmarks.vision.stock import stock_outcome, with_blank_images
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama

# Rounding in float32: the largest loss difference measured on a CPU or an H200 is 2.4e-6 nats, a fault of a mask 0.01.
LARGEST = 1e-5
# Families whose tower need not do the work of each image alone, and why.
EXCEPTED = {"pixtral": "its tower concatenates the patches of all images and masks across images"}


class Family(NamedTuple):
    """The findings of `check_family`."""

    difference: float  # nats: the largest of a token's loss in the batch and its row alone
    gradient: float  # relative
    work: float  # the tower's FLOPs in the mixed batch over those of the same rows without the text rows
    work_alone: float  # over those of each image in a batch of its own
    stock: str  # what TRL's collator does
    checks: dict[str, bool]
    unpatched: tuple[float, float] | None  # nats, Mllama without its patch: images, and a text row with a blank image


def check_family(name: str, device: str) -> Family:
    """Check the batches of all kinds."""
    processor, model = FAMILIES[name]()
    collate, model, unpatched = VisionCollator(processor), model.to(device), None
    if name == "mllama":
        alone = token_losses(model, collate([TEXT]))[0]
        blank = token_losses(model, with_blank_images(collate([TWO, TEXT])))[1]
        unpatched = (max(largest_difference(model, collate, [TWO, AFTER, TURNS])), (blank - alone).abs().max().item())
        patch_mllama(model)
    mixed = BATCHES["mixed"]
    off = {kind: max(largest_difference(model, collate, batch)) for kind, batch in BATCHES.items()}
    off["padding on the left"] = max(largest_difference(model, VisionCollator(processor, padding_side="left"), mixed))
    batches = [_to(collate([row]), device) for row in mixed]
    gradient = relative_difference(gradients(model, [_to(collate(mixed), device)]), gradients(model, batches))
    flops = tower_flops(model, collate(mixed))
    work = flops / tower_flops(model, collate([row for row in mixed if row["images"]]))
    images = [image for row in mixed for image in row["images"]]
    one = {"messages": [user(None, "What is this?"), assistant("A picture.")]}
    work_alone = flops / sum(tower_flops(model, collate([{**one, "images": [image]}])) for image in images)
    checks = {f"{name}, {kind}": found <= LARGEST for kind, found in off.items()} | {
        f"{name}, gradients": gradient <= LARGEST,
        f"{name}, tower over the images batched": work == 1,
        f"{name}, tower idle for a batch of text": tower_flops(model, collate(BATCHES["all text"])) == 0,
    }
    if name not in EXCEPTED:
        checks[f"{name}, tower over each image alone"] = work_alone == 1
    return Family(max(off.values()), gradient, work, work_alone, stock_outcome(processor, mixed), checks, unpatched)


def _to(batch: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in batch.items()}
