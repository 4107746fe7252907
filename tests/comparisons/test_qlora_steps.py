"""The model of the QLoRA runs: the same packed weights in whatever dtype it computes."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from unsloth_puzzles.comparisons.qlora_steps import measure, qlora_model


def test_weights_drawn_in_another_dtype_are_the_same():
    model = qlora_model("cpu", torch.float32, False, True, torch.bfloat16)
    drawn = qlora_model("cpu", torch.bfloat16, False, True)
    for one, other in zip(model.modules(), drawn.modules(), strict=True):
        if isinstance(one, Linear4bit):
            assert one.compute_dtype == torch.float32
            assert torch.equal(one.weight, other.weight)
    embeddings, expected = (m.get_input_embeddings().weight for m in (model, drawn))
    assert embeddings.dtype == torch.float32 and torch.equal(embeddings, expected.float())
    own = qlora_model("cpu", torch.float32, False, True).get_input_embeddings().weight
    assert not torch.equal(own, embeddings)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^candidate: got 'fast'"):
        measure("fast")
    with pytest.raises(ValueError, match=r"^sdpa: got 'slow'"):
        measure("eager", sdpa="slow")
