"""The reference of the 60 steps: one process with bitsandbytes' own layers, or with challenge A's kernel."""

from contextlib import nullcontext

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from benchmarks.fsdp2 import steps
from unsloth_puzzles.nf4.patch import patch_linear4bit

TINY = {
    "rows": 1, "length": 8, "shapes": "tiny", "layers": 1, "vocabulary": 32, "dtype": "float32", "steps": 2
}  # fmt: skip


@pytest.mark.parametrize("dequantize", ["ours", "bitsandbytes"])
def test_bitsandbytes_keeps_its_own_layers(monkeypatch, dequantize):
    patched = []  # Triton's interpreter takes minutes for the real patch
    monkeypatch.setattr(steps, "patch_linear4bit", lambda model: nullcontext(patched.append(model)))
    found = steps.measure(**TINY, dequantize=dequantize)
    assert len(patched) == (dequantize == "ours")
    assert found["dequantize"] == dequantize and found["plain_layers"] == found["weights"] == 7
    assert found["losses"][1] != found["losses"][0] and min(found["norms"]) > 0


def test_a_patched_model_has_no_plain_layers():
    model = steps.qlora_model("tiny", 1, 32, torch.float32, checkpointing=False)
    with patch_linear4bit(model):
        assert not any(type(module) is Linear4bit for module in model.modules())


@pytest.mark.parametrize("wrong", [{"dequantize": "triton"}, {"dequantize": "bitsandbytes", "compiled": True}])
def test_other_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="dequantize must be 'ours'"):
        steps.measure(**TINY, **wrong)
