"""LoRA scaled between A and B: PEFT's results, for every kind of call that PEFT has."""

import pytest
import torch
from peft import LoraConfig

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.compiled.lora import scale_low_rank


def make_model(dropout=0.0, **options):
    return with_adapters(nf4_llama(layers=1), lora_dropout=dropout, **options)


def step(model):
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(64, (2, 9))
    loss = model(input_ids=ids, labels=ids).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest(found, expected):
    assert found[1].keys() == expected[1].keys()
    apart = [(found[1][name] - grad).norm() / grad.norm() for name, grad in expected[1].items()]
    return max([(found[0] - expected[0]).abs() / expected[0], *apart]).item()


@pytest.mark.parametrize("alpha", [2, 8, 6], ids=["1/2", "2", "no power of two"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("eager_rounding", [False, True])
def test_loss_and_gradients_match_peft(alpha, dropout, eager_rounding):
    model = make_model(dropout, lora_alpha=alpha)
    expected = step(model)
    undo = scale_low_rank(model, eager_rounding)
    found = step(model)
    undo()
    assert largest(found, expected) <= (0 if alpha != 6 or eager_rounding else 2e-6)
    assert largest(step(model), expected) == 0


def test_two_active_adapters():
    model = make_model(lora_alpha=8)
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    expected = step(model)
    assert any("other" in name for name in expected[1])
    scale_low_rank(model, False)
    assert largest(step(model), expected) == 0


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["DoRA", "a bias on B"])
def test_lora_variants_are_left_to_peft(options):
    model = make_model(lora_alpha=6, **options)
    expected = step(model)
    scale_low_rank(model, False)
    assert largest(step(model), expected) == 0


def test_disabled_adapters():
    model = make_model(lora_alpha=8)
    with model.disable_adapter():
        expected = step(model)[0]
    different = step(model)[0]
    scale_low_rank(model, False)
    with model.disable_adapter():
        assert torch.equal(step(model)[0], expected)
    assert torch.equal(step(model)[0], different) and not torch.equal(expected, different)


def test_scaling_multiplies_only_low_rank_gradients():
    """The gradient of a layer's output is read by matrix products as it is, not after a product with s."""

    class Multiplications(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.mul and str(args[1]) in ("5.0", "tensor(5.)"):
                widths.append(args[0].shape[-1])
            return func(*args, **(kwargs or {}))

    model = make_model(lora_alpha=20)  # s = 5
    seen = {}
    for name in ("PEFT", "ours"):
        widths = seen[name] = []
        with Multiplications():
            step(model)
        scale_low_rank(model, False)
    assert max(seen["PEFT"]) == model.config.intermediate_size
    assert seen["ours"] and set(seen["ours"]) == {4}
