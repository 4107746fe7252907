"""The model of the QLoRA runs: the same packed weights in whatever dtype it computes."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from benchmarks.compiled import steps
from benchmarks.compiled.model import qlora_model
from benchmarks.compiled.steps import largest_difference, measure


def test_weights_drawn_in_another_dtype_are_the_same():
    model = qlora_model("cpu", torch.float32, True, torch.bfloat16)
    drawn = qlora_model("cpu", torch.bfloat16, True)
    for one, other in zip(model.modules(), drawn.modules(), strict=True):
        if isinstance(one, Linear4bit):
            assert one.compute_dtype == torch.float32
            assert torch.equal(one.weight, other.weight)
    embeddings, expected = (m.get_input_embeddings().weight for m in (model, drawn))
    assert embeddings.dtype == torch.float32 and torch.equal(embeddings, expected.float())
    own = qlora_model("cpu", torch.float32, True).get_input_embeddings().weight
    assert not torch.equal(own, embeddings)


def test_runs_of_one_model_begin_alike_whatever_was_run_before():
    model = qlora_model("cpu", torch.float32, True)
    asked = {"batch": 2, "lengths": (9, 12), "dtype": "float32", "tiny": True, "model": model}
    first = measure("eager", **asked)["losses"]
    other = measure("eager", **asked, checkpointing=True, attention="eager")["losses"]
    again = measure("eager", **asked)["losses"]
    alone = measure("eager", **{**asked, "model": None})["losses"]
    assert first == again == alone and first[0] != first[1]
    assert first == pytest.approx(other, rel=1e-5)
    assert not model.get_base_model().is_gradient_checkpointing and model.config._attn_implementation == "sdpa"


def test_a_run_of_two_parts_uses_both_and_leaves_none(monkeypatch):
    used, patch = [], steps.use_memory_efficient_loss

    def patched(*given, **options):
        used.append(patch(*given, **options))
        return used[-1]

    monkeypatch.setattr(steps, "use_memory_efficient_loss", patched)
    model = qlora_model("cpu", torch.float32, True)
    asked = {"batch": 2, "lengths": (9, 12, 17), "dtype": "float32", "tiny": True, "model": model}
    plain = measure("eager", **asked)["losses"]
    kinds = [type(module) for module in model.modules()]
    parts = measure(steps.PARTS, **asked)
    assert parts["losses"] == pytest.approx(plain, rel=1e-5) and used[0].calls == 3
    assert [type(module) for module in model.modules()] == kinds and parts["compilations"] == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^candidate must be .*, got 'fast'"):
        measure("fast")
    with pytest.raises(ValueError, match=r"^sdpa must be .*, got 'slow'"):
        measure("eager", sdpa="slow")


def test_the_attention_of_a_run_that_failed_is_not_the_next_ones(monkeypatch):
    model = qlora_model("cpu", torch.float32, True)
    monkeypatch.setattr(steps, "_step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure("eager", batch=1, lengths=(9,), dtype="float32", tiny=True, model=model, attention="eager")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("losses", [[5.0, float("nan"), 4.0], [5.0, float("inf")], []])
def test_losses_that_are_not_finite_are_not_compared(losses):
    fine = {"losses": [5.0, 4.9, 4.8]}
    assert largest_difference(fine, {"losses": [5.0, 5.0]}) == pytest.approx(0.1)
    for pair in ((fine, {"losses": losses}), ({"losses": losses}, fine)):
        with pytest.raises(ValueError, match="losses must be finite"):
            largest_difference(*pair)
