"""Exchanged classes: how a model is pickled and copied while its classes are exchanged."""

import copy
import io

import pytest
import torch
from torch import nn

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.compiled.checkpoint import checkpoint_inputs
from unsloth_puzzles.compiled.layers import compile_layers, compile_norm
from unsloth_puzzles.compiled.lora import scale_low_rank
from unsloth_puzzles.compiled.plain_params4bit import plain_params4bit
from unsloth_puzzles.compiled.shared_input import share_input
from unsloth_puzzles.compiled.swiglu import fuse_swiglu
from unsloth_puzzles.exchange import original_class, subclass


@pytest.fixture(scope="module")
def models():
    """A model as it is, and the same one with every class exchanged."""
    plain, exchanged = (with_adapters(nf4_llama(layers=1)) for _ in range(2))
    backbone = exchanged.get_base_model().model
    scale_low_rank(exchanged, False)
    share_input(exchanged)
    fuse_swiglu(exchanged, False)
    plain_params4bit(exchanged)
    compile_layers(backbone.layers, {})
    compile_norm(backbone.norm, {})
    checkpoint_inputs(backbone.layers)
    return plain, exchanged


def classes(model):
    return [type(one) for one in (*model.modules(), *model.parameters())]


def assert_same_state(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_pickled_model_has_its_original_classes(models):
    plain, exchanged = models
    assert sum(one is not other for one, other in zip(classes(plain), classes(exchanged), strict=True)) == 18
    assert b"unsloth_puzzles" not in pickled(exchanged)
    # bitsandbytes itself pickles a Params4bit as a Parameter.
    found, expected = (torch.load(io.BytesIO(pickled(model)), weights_only=False) for model in (exchanged, plain))
    assert classes(found) == classes(expected)
    assert classes(found)[: len([*plain.modules()])] == classes(plain)[: len([*plain.modules()])]
    assert_same_state(found, expected)


def test_copied_model_has_its_current_classes(models):
    _, exchanged = models
    twin = copy.deepcopy(exchanged)
    assert classes(twin) == classes(exchanged)
    assert_same_state(twin, exchanged)
    layer, other = (model.get_base_model().model.layers[0] for model in (twin, exchanged))
    assert layer is not other and layer.mlp.gate_proj.lora_A.default is not other.mlp.gate_proj.lora_A.default


def test_original_class_is_that_below_all_subclasses():
    once = subclass(nn.Linear, "Once", forward=lambda self, x: x)
    twice = subclass(once, "Twice")
    assert [original_class(cls) for cls in (nn.Linear, once, twice)] == [nn.Linear] * 3
    assert (once.__name__, twice.__mro__[:3]) == ("Once", (twice, once, nn.Linear))
