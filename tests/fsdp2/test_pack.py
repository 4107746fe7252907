"""Packed layers compute the same bits as before, and give every byte back; what cannot be packed is refused by name."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from packaging.version import Version
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from benchmarks.models import random_nf4_llama, tiny_llama_config
from tests.fsdp2.models import layer, losses_and_gradients, qlora
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.nf4 import dequantize_nf4, nf4_linear, patch_linear4bit


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_packed_model_has_the_same_losses_and_gradients(world_size):
    model = qlora()
    with patch_linear4bit(model):
        expected = losses_and_gradients(model)
    packed = pack_nf4(model, world_size)
    assert len(packed.names) == 14 and all(size % (8 * world_size) == 0 for size in _sizes(model))
    for ours, theirs in zip(losses_and_gradients(model), expected, strict=True):
        assert torch.equal(ours, theirs)


def _sizes(model):
    return [module.weight.numel() for module in model.modules() if isinstance(module, StreamLinear4bit)]


def test_undo_gives_every_byte_back():
    model = qlora()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed = pack_nf4(model, 2)
    packed.undo()
    packed.undo()
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(isinstance(module, StreamLinear4bit) for module in model.modules())
    merged = model.merge_and_unload()
    assert merged(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def test_a_packed_model_is_not_merged_and_not_saved_whole(tmp_path):
    model = qlora()
    packed = pack_nf4(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AttributeError, match=r"^model must not be packed to merge .*; undo pack_nf4 first$"):
            merge()
    for one in (model.get_base_model(), model.get_base_model().model):
        with pytest.raises(ValueError, match=r"^model must not be packed to be saved whole; undo pack_nf4 first"):
            one.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)  # the adapters alone
    packed.undo()
    model.get_base_model().save_pretrained(tmp_path / "whole")  # layers share no table
    assert (tmp_path / "adapter_model.safetensors").exists() and (tmp_path / "whole/model.safetensors").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"nested": False},
        {"blocksize": 128},
        {"bias": True},
        {"rows": 3, "columns": 5},
        {"storage": torch.bfloat16},
        {"storage": torch.float32},
    ],
)
def test_kinds_of_layers(options):
    if options.get("rows") == 3 and Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("bitsandbytes before 0.50 quantises no odd number of weights on a CPU")
    torch.manual_seed(1)
    model = nn.Sequential(layer(**options))
    weight = model[0].weight
    x = torch.randn(4, model[0].in_features, requires_grad=True)
    with patch_linear4bit(model):
        expected = model(x)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    bytes_before = weight.data.view(-1).view(torch.uint8).clone()
    packed = pack_nf4(model, 3)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], gradient)
    packed.undo()
    assert model[0].weight.dtype == weight.dtype and type(model[0].weight) is Params4bit
    assert torch.equal(model[0].weight.data.view(-1).view(torch.uint8), bytes_before)
    assert torch.equal(model[0].weight.quant_state.absmax, weight.quant_state.absmax)
    with patch_linear4bit(model):
        assert torch.equal(model(x), expected)


def test_patch_leaves_packed_layers_alone():
    model = nn.Sequential(layer())
    pack_nf4(model)
    x = torch.randn(4, model[0].in_features)
    expected, kind = model(x), type(model[0])
    with patch_linear4bit(model) as patch:
        assert patch.names == () and type(model[0]) is kind
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("part", [lambda layer: layer, lambda layer: layer.weight], ids=["layer", "weight"])
def test_a_packed_layer_is_dequantised_after_undo(part):
    model = nn.Sequential(layer())
    expected = dequantize_nf4(model[0])
    packed = pack_nf4(model)
    message = r"^quant_state must be .*, got none with (StreamLinear4bit|ByteStream); undo pack_nf4 first$"
    with pytest.raises(ValueError, match=message):
        dequantize_nf4(part(model[0]))
    with pytest.raises(ValueError, match=message):
        nf4_linear(torch.ones(1, model[0].in_features), part(model[0]))
    packed.undo()
    assert torch.equal(dequantize_nf4(part(model[0])), expected)


def test_state_dict_holds_a_stub_and_adapters_load():
    model = qlora()
    pack_nf4(model, 2)
    state = model.state_dict()
    stubs = [name for name, value in state.items() if name.endswith("base_layer.weight")]
    assert len(stubs) == 14 and all(state[name].numel() == 0 for name in stubs)
    assert model.load_state_dict(state).missing_keys == []
    state[stubs[0]] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="must be the stub of a packed layer"):
        model.load_state_dict(state)


@pytest.mark.parametrize("key", ["0.weight", "0.bias"])
def test_strict_loading_names_a_key_that_is_missing(key):
    model = torch.nn.Sequential(layer(bias=True))
    pack_nf4(model, 2)
    state = model.state_dict()
    assert model.load_state_dict(state).missing_keys == []
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{key}"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [key]


@pytest.mark.parametrize(
    "adapt",
    [
        lambda model: get_peft_model(model.get_base_model(), LoraConfig(target_modules=["v_proj"])),
        lambda model: model.add_adapter("later", LoraConfig(target_modules=["v_proj"])),
    ],
)
def test_a_packed_layer_gets_no_adapter(adapt):
    with pytest.raises(AttributeError, match=r"^model must not be packed to get adapters; .* before pack_nf4$"):
        adapt(_small())


@pytest.mark.parametrize(
    "cast",
    [
        torch.nn.Module.half,
        torch.nn.Module.float,
        torch.nn.Module.bfloat16,
        torch.nn.Module.double,
        lambda model: model.to(torch.float16),
        lambda model: model.to("cpu", torch.float32, non_blocking=True),
        lambda model: model.type(torch.bfloat16),
        lambda model: model.get_base_model().model.half(),
        prepare_model_for_kbit_training,
    ],
)
def test_a_packed_model_is_not_cast(cast):
    """float16 is what the stream says it is: only the tables would be rounded."""
    model = _small()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(TypeError, match=r"^dtype must be .*packed .*, got torch.*; cast the model.* before pack_nf4"):
        cast(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_packed_model_is_moved():
    model = _small()
    packed = next(module for module in model.modules() if isinstance(module, StreamLinear4bit))
    moved = {one.device.type for one in (*packed.to("meta").buffers(), packed.weight)}
    assert moved == {"meta"} and packed.code.dtype == torch.float32


def _small():
    model = random_nf4_llama(tiny_llama_config(64, 1), "cpu", torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    pack_nf4(model, 1)
    return model


def _tied():
    model = nn.Sequential(layer(), layer())
    model[1].weight = model[0].weight
    return model


def _patched():
    model = nn.Sequential(layer())
    patch_linear4bit(model)
    return model


def _packed():
    model = nn.Sequential(layer())
    pack_nf4(model, 2)
    return model


def _dora_of_another_kind():
    model = get_peft_model(nn.Sequential(layer()), LoraConfig(target_modules=["0"], use_dora=True))
    magnitudes = model.base_model.model[0].lora_magnitude_vector["default"]
    magnitudes.__class__ = type("Other", (type(magnitudes),), {})
    return model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 2), "model must have bitsandbytes NF4 layers, got none"),
        (lambda: nn.Sequential(layer(quant_type="fp4")), "model must have NF4 layers only, got fp4 in 0"),
        (lambda: nn.Sequential(layer(), Linear8bitLt(4, 4)), "model must have no 8-bit layers, .* got 1"),
        (_tied, "model must not tie 4-bit weights, got 0 and 1"),
        (_patched, "model must have bitsandbytes' own layers, got .* in 0"),
        (_packed, "model must not be packed already, got 0"),
        (lambda: nn.Sequential(Linear4bit(4, 4, quant_type="nf4")), "model must be quantised, got 0"),
        (
            _dora_of_another_kind,
            r"model must have PEFT's own DoRA layers, got Other in .*0\.lora_magnitude_vector\.default",
        ),
    ],
)
def test_models_that_cannot_be_packed_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        pack_nf4(make(), 2)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        pack_nf4([], 2)
    for world_size in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="world_size must be an integer of at least 1, got"):
            pack_nf4(nn.Sequential(layer()), world_size)
