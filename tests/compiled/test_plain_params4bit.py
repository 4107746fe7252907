"""Packed weights as plain tensors: their type is exchanged and restored, and nothing else changes."""

import copy

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from unsloth_puzzles.compiled.plain_params4bit import PlainParams4bit, plain_params4bit
from unsloth_puzzles.nf4.dequantize import dequantize_nf4


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [Linear4bit(64, 32, bias=True, quant_type="nf4", compute_dtype=torch.float32) for _ in range(2)]
    return nn.Sequential(*layers[:1], nn.Linear(32, 64), *layers[1:]).to("cpu")  # which quantises


def kinds(model):
    return [type(parameter) for parameter in model.parameters()]


def plain_kinds(model):
    return [PlainParams4bit if kind is Params4bit else kind for kind in kinds(model)]


def test_types_are_exchanged_and_restored(model):
    before, expected, weights = kinds(model), plain_kinds(model), [*model.parameters()]
    assert before.count(Params4bit) == 2 and before.count(nn.Parameter) == 4
    undo = plain_params4bit(model)
    assert kinds(model) == expected
    assert all(isinstance(model[at].weight, Params4bit) for at in (0, 2))
    undo()
    assert kinds(model) == before
    assert all(one is other for one, other in zip(model.parameters(), weights, strict=True))


def test_operators_bypass_torch_function(model, monkeypatch):
    calls = []

    def counted(cls, func, types, args=(), kwargs=None):
        calls.append(func)
        return super(Params4bit, cls).__torch_function__(func, types, args, kwargs or {})

    monkeypatch.setattr(Params4bit, "__torch_function__", classmethod(counted))
    weight = model[0].weight
    torch.sum(weight)
    assert len(calls) == 1
    undo = plain_params4bit(model)
    total = torch.sum(weight)
    assert len(calls) == 1 and type(total) is torch.Tensor
    undo()
    torch.sum(weight)
    assert len(calls) == 2


def test_copies_and_state_dicts_are_unchanged(model):
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    undo = plain_params4bit(model)
    twin, state = copy.deepcopy(model), model.state_dict()
    assert kinds(twin) == kinds(model)
    assert {name for name in expected if "quant_state" in name}
    for found in (state, twin.state_dict()):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    twin[0].weight.data.zero_()
    assert torch.equal(model.state_dict()["0.weight"], expected["0.weight"])
    undo()
    assert kinds(copy.deepcopy(model)) == kinds(model)
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_dequantization_is_bit_identical(model):
    x = torch.randn(3, 64)
    expected = dequantize_nf4(model[0].weight), model(x).detach()
    undo = plain_params4bit(model)
    found = dequantize_nf4(model[0].weight), model(x).detach()
    undo()
    for one, other in zip(found, expected, strict=True):
        assert type(one) is torch.Tensor and one.abs().max() > 0 and torch.equal(one, other)
