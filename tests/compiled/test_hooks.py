"""Hooks inside a layer, registered and removed after its first compiled call, have their uncompiled effect."""

import warnings

import pytest
import torch
from peft import LoraConfig
from torch.nn.modules import module as torch_module

from tests.compiled.models import nf4_llama, traced_only, with_adapters
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.hooks import hooked, hooked_below
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

pytestmark = pytest.mark.filterwarnings("ignore:hooks. on")
IDS = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(0))
INSIDE = (
    "input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.q_proj.base_layer",
    "self_attn.k_proj.lora_A.default", "self_attn.v_proj.lora_B.default", "mlp", "mlp.act_fn", "mlp.gate_proj",
    "mlp.up_proj.lora_B.default", "mlp.down_proj.lora_A.default", "mlp.down_proj.lora_dropout.default",
)  # fmt: skip


def make_model():
    """Scaled by 2, so that the output of B differs if the scale comes before B."""
    model = with_adapters(nf4_llama(layers=1), lora_alpha=8)
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return model


@pytest.fixture(scope="module")
def plain(models):
    """The logits and gradients without hooks."""
    found = logits(models[0]), gradients(models[0])
    assert differs(logits(models[1]), found[0]) <= 1e-6 and differs(gradients(models[1]), found[1]) <= 2e-6
    return found


@pytest.fixture(scope="module")
def models():
    """The same model, uncompiled and compiled."""
    plain, compiled = make_model(), make_model()
    with traced_only(), patch_linear4bit(plain), compile_qlora(compiled, compile=False):
        yield plain, compiled


def differs(one, other):
    return ((one - other).norm() / other.norm()).item()


def logits(model, **options):
    with torch.no_grad():
        return model.eval()(IDS, **options).logits


def gradients(model):
    model.train().zero_grad()
    model(IDS).logits.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def layer_of(model):
    return model.get_base_model().model.layers[0]


def test_adapters_by_row(models, plain):
    expected, found = (logits(model, adapter_names=["default", "other", "__base__"]) for model in models)
    assert differs(expected, plain[0]) > 0.01 and differs(found, expected) <= 1e-6
    assert differs(logits(models[1]), plain[0]) <= 1e-6


@pytest.mark.parametrize("name", INSIDE)
def test_forward_hooks_have_their_uncompiled_effect(models, plain, name):
    def twice(module, args, output):
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output

    def halved(module, args, given):
        return tuple(arg / 2 for arg in args), {k: v / 2 if k == "hidden_states" else v for k, v in given.items()}

    for register, hook in (
        ("register_forward_hook", {"hook": twice}),
        ("register_forward_pre_hook", {"hook": halved, "with_kwargs": True}),
    ):
        found = []
        for model in models:
            handle = getattr(layer_of(model).get_submodule(name), register)(**hook)
            found.append(logits(model))
            handle.remove()
        # Half of a norm's input is the same to it.
        assert name == "input_layernorm" or differs(found[0], plain[0]) > 1e-4
        assert differs(found[1], found[0]) <= 1e-6
    assert differs(logits(models[1]), plain[0]) <= 1e-6


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["mlp.act_fn", "mlp.up_proj.lora_B.default"])
def test_backward_hooks_have_their_uncompiled_effect(models, plain, name, register):
    found = []
    for model in models:
        handle = getattr(layer_of(model).get_submodule(name), register)(lambda _, *given: (3 * given[0][0],))
        found.append(gradients(model))
        handle.remove()
    assert differs(found[0], plain[1]) > 1e-3 and differs(found[1], found[0]) <= 2e-6


def test_global_hooks_have_their_uncompiled_effect(models, plain):
    found = []
    for model in models:
        handle = torch_module.register_module_forward_hook(
            lambda module, args, output: 2 * output if type(module).__name__ == "SiLUActivation" else None
        )
        found.append(logits(model))
        handle.remove()
    assert differs(found[0], plain[0]) > 1e-3 and differs(found[1], found[0]) <= 1e-6


def test_hook_warns_and_only_its_layer_is_not_compiled():
    model = with_adapters(nf4_llama(layers=2)).eval()
    with traced_only(), compile_qlora(model, compile=False), torch.no_grad(), count_compilations() as counts:
        handle = model.get_base_model().model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=r"^hooks: on mlp\.act_fn; meanwhile LlamaDecoderLayer"):
            model(IDS)
        handle.remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(IDS)
    assert [one.name for one in counts.captures] == ["LlamaDecoderLayer_no_grad", "norm_no_grad"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_output_hidden_states_keeps_layers_compiled(when):
    """transformers hooks layers and attentions when hidden states are first asked for, for good."""
    model, plain, wanted = make_model().eval(), make_model().eval(), {"output_hidden_states": True}
    with torch.no_grad(), patch_linear4bit(plain):
        expected = plain(IDS, **wanted).hidden_states
    if when == "before":
        model(IDS, **wanted)
    with traced_only(), compile_qlora(model, compile=False), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model(IDS)
        with torch.compiler.set_stance("fail_on_recompile"):
            found = model(IDS, **wanted).hidden_states
            model(IDS)
        assert layer_of(model).self_attn._forward_hooks
    assert len(found) == len(expected) == 2
    assert all(differs(one, other) <= 1e-6 for one, other in zip(found, expected, strict=True))


def test_hooked_below_names_the_module():
    outer = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()), torch.nn.Tanh())
    assert hooked_below(outer) is None and not hooked(outer)
    own = outer.register_forward_hook(lambda *_: None)
    assert hooked_below(outer) is None and hooked(outer)
    own.remove()
    for name in ("0", "0.0", "0.1", "1"):
        for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
            handle = getattr(outer.get_submodule(name), f"register_{kind}")(lambda *_: None)
            assert hooked_below(outer) == name and hooked(outer)
            handle.remove()
    outer[0].add_module("late", torch.nn.Tanh())
    outer[0].add_module("none", None)
    handle = outer[0].late.register_forward_hook(lambda *_: None)
    assert hooked_below(outer) == "0.late"
    handle.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_module._global_forward_hooks, -1, lambda *_: None)
        assert hooked_below(outer) == "all modules" and hooked(outer)
