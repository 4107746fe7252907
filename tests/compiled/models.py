"""A tiny Llama in NF4, and adapters whose B is not zero."""

from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.models import nf4_config, random_nf4_llama, tiny_llama_config


def nf4_llama(device="cpu", dtype=torch.float32, layers=2):
    """A narrow MLP: the kernel's interpreter takes a tenth of a second for 2048 weights."""
    config = tiny_llama_config(vocab_size=64, layers=layers)
    config.intermediate_size = 64
    model = random_nf4_llama(config, device, dtype)
    model.config.use_cache = False
    return model.train()


def nf4_model(cls, config):
    """A model of another class in NF4, with random weights."""
    torch.manual_seed(0)
    state, device = cls(config).state_dict(), {"": torch.device("cpu")}
    quantised = {"dtype": torch.float32, "device_map": device, "quantization_config": nf4_config(torch.float32)}
    model = cls.from_pretrained(None, config=config, state_dict=state, **quantised)
    model.config.use_cache = False
    return model.train()


def with_adapters(model, **options) -> PeftModel:
    """Rank 4 under every linear layer, unless `options`, those of `LoraConfig`, say otherwise."""
    torch.manual_seed(0)
    given = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(model, LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # they begin as zeros, under which lora_A has no gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


BACKENDS = ("aot_eager", pytest.param("inductor", marks=pytest.mark.slow))
_compile = torch.compile


@contextmanager
def traced_only():
    """Compile with Dynamo and AOTAutograd, without Inductor."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "compile", lambda function, options, **given: _compile(function, backend="aot_eager", **given)
        )
        yield
    torch._dynamo.reset()


@contextmanager
def compiled_by(backend):
    """What `compile_qlora` is to be given for this backend: functions of losses are kept, so none is of `aot_eager`."""
    if backend == "aot_eager":
        with traced_only():
            yield {"compile": False}
        return
    torch._dynamo.reset()
    yield {}
    torch._dynamo.reset()
