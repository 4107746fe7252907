"""What a pre-quantised checkpoint stores unquantised is loaded in the dtype asked for, by every transformers."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.models import random_llama, tiny_llama_config
from unsloth_puzzles.stored_dtype import cast_unquantised

CONFIG = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint in NF4, whose other weights are bfloat16."""
    folder = tmp_path_factory.mktemp("stored")
    random_llama(tiny_llama_config(259), "cpu").to(torch.bfloat16).save_pretrained(folder / "16 bits")
    quantised = LlamaForCausalLM.from_pretrained(
        folder / "16 bits", dtype=torch.bfloat16, quantization_config=CONFIG, device_map={"": "cpu"}
    )
    quantised.save_pretrained(folder / "NF4")
    return folder


def _loaded(stored, kind: str, dtype: torch.dtype) -> LlamaForCausalLM:
    more = {"quantization_config": CONFIG} if kind == "16 bits" else {}
    return LlamaForCausalLM.from_pretrained(stored / kind, dtype=dtype, device_map={"": "cpu"}, **more)


@pytest.mark.parametrize("strict", [None, ["norm"]], ids=["one dtype", "norms kept in float32"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_unquantised_tensors_are_those_of_the_checkpoint_in_16_bits(stored, dtype, strict, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", strict)
    expected, model = (_loaded(stored, kind, dtype) for kind in ("16 bits", "NF4"))
    cast_unquantised(model, dtype)
    if strict and dtype != torch.float32:
        assert {one.dtype for one in model.parameters()} == {torch.uint8, torch.float32, dtype}
    for (name, a), (_, b) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert [one.dtype for one in expected.buffers()] == [one.dtype for one in model.buffers()]


def test_a_weight_that_the_architecture_makes_in_another_dtype_keeps_it(stored, monkeypatch):
    made = LlamaRMSNorm.__init__

    def in_float32(self, hidden_size, eps=1e-6):
        made(self, hidden_size, eps)
        self.weight = torch.nn.Parameter(self.weight.data.float())

    monkeypatch.setattr(LlamaRMSNorm, "__init__", in_float32)
    model = _loaded(stored, "NF4", torch.float16)
    cast_unquantised(model, torch.float16)
    assert model.model.norm.weight.dtype == torch.float32 and model.lm_head.weight.dtype == torch.float16


def test_four_bit_weights_stay_the_bytes_that_they_are(stored):
    model = _loaded(stored, "NF4", torch.float16)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    before = [(id(layer.weight), layer.weight.clone(), layer.weight.quant_state) for layer in layers]
    cast_unquantised(model, torch.float16)
    for layer, (place, weight, state) in zip(layers, before, strict=True):
        assert id(layer.weight) == place and torch.equal(layer.weight, weight) and layer.weight.quant_state is state
