"""On a GPU: float32 as on a CPU, and 16 bits within what rounding explains."""

import pytest
import torch

from benchmarks.vision.checks import BATCHES, largest_difference, token_losses
from benchmarks.vision.families import FAMILIES
from tests.vision.models import fresh
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _convolutions_in_float32(monkeypatch):
    """In TF32 a patch's embedding depends on how many images there are."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _on_gpu(name: str):
    processor, model = fresh(name)
    if name == "mllama":
        patch_mllama(model)
    return VisionCollator(processor), model.cuda()


@pytest.mark.parametrize("kind", ["mixed", "several images", "varying sizes"])
@pytest.mark.parametrize("name", FAMILIES)
def test_row_has_the_losses_that_it_has_alone(name, kind):
    collate, model = _on_gpu(name)
    assert max(largest_difference(model, collate, BATCHES[kind])) <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_in_16_bits_a_batch_costs_no_more_than_the_rounding_of_a_row(name):
    collate, model = _on_gpu(name)
    rows = BATCHES["mixed"]
    exact = [token_losses(model, collate([row]))[0] for row in rows]
    model.half()
    alone = torch.cat([token_losses(model, collate([row]))[0] for row in rows])
    together = torch.cat(token_losses(model, collate(rows)))
    exact = torch.cat(exact)
    assert (together - exact).norm() <= 1.5 * (alone - exact).norm() + 1e-3 * exact.norm()
