"""DoRA adapters over packed layers train as over bitsandbytes' own layers, in one process and in two."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn

from tests.fsdp2.models import layer, losses_and_gradients, qlora
from unsloth_puzzles.fsdp2.dora import StreamDoraLayer
from unsloth_puzzles.fsdp2.pack import pack_nf4


def one_layer(bias: bool, dropout: nn.Module) -> nn.Module:
    """DoRA over one layer whose magnitudes are not the weight's norms."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer(bias=bias)), config).train()
    adapted = model.base_model.model[0]
    adapted.lora_dropout["default"] = dropout
    magnitudes = adapted.lora_magnitude_vector["default"].weight
    magnitudes.data *= torch.rand(magnitudes.shape) + 0.5
    return model


def output_and_gradients(model: nn.Module) -> tuple[torch.Tensor, ...]:
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(3)).requires_grad_()
    torch.manual_seed(4)
    output = model(x)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.ndim == 1 for parameter in trained) == 1  # the magnitudes
    return output, *torch.autograd.grad(output.square().sum(), (x, *trained))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [nn.Identity(), nn.Dropout(0.3)], ids=["no dropout", "dropout"])
def test_packed_layer_has_the_output_and_gradients_of_bitsandbytes(bias, dropout):
    model = one_layer(bias, dropout)
    expected = output_and_gradients(model)
    packed = pack_nf4(model, 2)
    found = output_and_gradients(model)
    packed.undo()
    for ours, theirs, after in zip(found, expected, output_and_gradients(model), strict=True):
        assert torch.equal(ours, theirs) and torch.equal(after, theirs) and theirs.norm() > 0.1


def test_packed_model_has_the_loss_and_gradients_of_bitsandbytes():
    model = qlora(use_dora=True)
    expected = losses_and_gradients(model)
    packed = pack_nf4(model, 2)
    assert _classes(model) == {StreamDoraLayer: 14}
    found = losses_and_gradients(model)
    assert len(found) == 1 + 3 * 14
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    packed.undo()
    assert _classes(model) == {DoraLinearLayer: 14}
    assert model.merge_and_unload()(input_ids=torch.arange(5)[None]).logits.isfinite().all()


def _classes(model: nn.Module) -> Counter:
    return Counter(type(module) for module in model.modules() if isinstance(module, DoraLinearLayer))


def test_dropout_keeps_no_dequantised_weight_for_the_backward():
    """PEFT's own layer multiplies by W with autograd, which then keeps W of every layer."""
    model = one_layer(False, nn.Dropout(0.3))
    pack_nf4(model, 2)
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.randn(6, 40))
    assert kept and (48, 40) not in kept and (40, 48) not in kept


def test_an_adapter_that_is_added_later_is_refused():
    model = qlora(use_dora=True)
    pack_nf4(model, 2)
    with pytest.raises(TypeError, match=r"^model must not be packed to get adapters; .* before pack_nf4$"):
        model.add_adapter("later", LoraConfig(target_modules="all-linear", use_dora=True))
