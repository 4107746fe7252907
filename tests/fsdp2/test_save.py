"""Adapters of a sharded model, saved, give the same logits over ordinary layers in one process."""

import pytest
import torch
from peft import PeftModel

from benchmarks.fsdp2.ranks import start_ranks
from tests.fsdp2.save_on_two import CASES, base, logits_of
from unsloth_puzzles.fsdp2.save import save_adapters
from unsloth_puzzles.nf4 import patch_linear4bit

NAMES = (*CASES, "LoRA, Trainer", "trained head, Trainer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process and two have saved."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = tmp_path_factory.mktemp("saved")
        arguments = ("tests.fsdp2.save_on_two", str(found[ranks]))
        start_ranks(*arguments, ranks=ranks, timeout=300, TRITON_INTERPRET="1")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_losses_match_one_process(folders, name):
    one, two = (torch.load(folders[ranks] / name / "rank0.pt") for ranks in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert (two["logits"] - one["logits"]).norm() < 1e-4 * one["logits"].norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loaded_model_has_the_logits_of_the_sharded_one(folders, name):
    trained = [torch.load(folders[2] / name / f"rank{rank}.pt")["logits"] for rank in (0, 1)]
    model = PeftModel.from_pretrained(base(), folders[2] / name)
    with patch_linear4bit(model):
        loaded = logits_of(model)
    assert torch.equal(loaded, trained[0]) and torch.equal(loaded, trained[1])
    assert not torch.equal(loaded, logits_of(base()))
    assert logits_of(model.merge_and_unload()).isfinite().all()


def test_model_must_have_adapters(tmp_path):
    with pytest.raises(TypeError, match="model must be a PeftModel, got Linear"):
        save_adapters(torch.nn.Linear(2, 2), tmp_path)
