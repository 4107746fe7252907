"""In every family a row's losses and gradients are those that it has alone, and the tower works for images only."""

import pytest
import torch

from benchmarks.vision.chat import picture
from benchmarks.vision.checks import (
    AFTER,
    BATCHES,
    ONE,
    TEXT,
    TWO,
    gradients,
    largest_difference,
    relative_difference,
    token_losses,
    tower_flops,
    tower_of,
)
from benchmarks.vision.families import FAMILIES
from tests.vision.models import EVERY, QUICK, family
from unsloth_puzzles.vision.collator import VisionCollator

LARGEST = 1e-5  # of token losses around 7, in float32


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(name, kind, marks=() if name in QUICK or kind == "mixed" else pytest.mark.slow)
        for name in FAMILIES
        for kind in BATCHES
    ],
)
def test_row_has_the_losses_that_it_has_alone(name, kind):
    processor, model = family(name)
    assert max(largest_difference(model, VisionCollator(processor), BATCHES[kind])) <= LARGEST


@pytest.mark.parametrize("name", EVERY)
def test_padding_on_the_left(name):
    processor, model = family(name)
    left = VisionCollator(processor, padding_side="left")
    batch = left(BATCHES["mixed"])
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"][:, 0].all()
    assert max(largest_difference(model, left, BATCHES["mixed"])) <= LARGEST
    losses = zip(
        token_losses(model, batch), token_losses(model, VisionCollator(processor)(BATCHES["mixed"])), strict=True
    )
    assert max((a - b).abs().max() for a, b in losses) <= LARGEST


@pytest.mark.parametrize("name", EVERY)
def test_losses_depend_on_the_image_and_on_no_other_rows(name):
    processor, model = family(name)
    collate = VisionCollator(processor)
    other = {**ONE, "images": [picture(56, 56, 99)]}
    before = token_losses(model, collate([ONE, TEXT, TWO]))
    after = token_losses(model, collate([other, TEXT, TWO]))
    changed = [(a - b).abs().max().item() for a, b in zip(before, after, strict=True)]
    assert changed[0] > 0.05 and max(changed[1:]) <= LARGEST


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_rows_alone(name):
    processor, model = family(name)
    collate, rows = VisionCollator(processor), BATCHES["mixed"]
    together = gradients(model, [collate(rows)])
    assert relative_difference(together, gradients(model, [collate([row]) for row in rows])) <= 2e-6
    assert any(one.any() for key, one in together.items() if "vision" in key or "visual" in key)
    model.zero_grad()


@pytest.mark.parametrize("name", EVERY)
def test_tower_runs_on_images_only(name):
    processor, model = family(name)
    collate = VisionCollator(processor)
    needed = sum(tower_flops(model, collate([row])) for row in (ONE, AFTER))
    assert tower_flops(model, collate([ONE, TEXT, AFTER, TEXT])) == tower_flops(model, collate([ONE, AFTER])) > 0
    if name != "pixtral":  # its attention has all images of a batch in one sequence, and masks
        assert tower_flops(model, collate([ONE, AFTER])) == needed
    calls = []
    hook = tower_of(model).register_forward_pre_hook(lambda *_: calls.append(1))
    batch = collate([TEXT, TEXT])
    with torch.no_grad():
        model(**batch)
    hook.remove()
    assert not calls and not [key for key in batch if "pixel" in key or "image" in key or "cross" in key]


def test_tower_of_mllama_skips_images_that_pad_a_row():
    processor, model = family("mllama")
    collate = VisionCollator(processor)
    assert tower_flops(model, collate([ONE, TWO])) == 3 * tower_flops(model, collate([ONE]))


def test_tower_of_smolvlm_skips_images_that_pad_a_row():
    processor, model = family("smolvlm")
    collate = VisionCollator(processor)
    assert tower_flops(model, collate([ONE, TWO])) == sum(tower_flops(model, collate([row])) for row in (ONE, TWO))
