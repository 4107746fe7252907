"""One product for adapters that read the same input: PEFT's results, fewer products, no state on modules."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.compiled.lora import scale_low_rank
from unsloth_puzzles.compiled.shared_input import share_input

RANK = 5


def make_model(**options):
    return with_adapters(nf4_llama(), **{"r": RANK, "lora_alpha": 9, **options})


def step(model, autocast=False):
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.randint(64, (2, 9))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


class Narrow(TorchDispatchMode):
    """Counts products that have (a multiple of) r rows or columns on one side, by how many."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left, right = args[-2:]
            for size in {*left.shape, *right.shape} & {RANK, 2 * RANK, 3 * RANK}:
                self.seen[size] = self.seen.get(size, 0) + 1
        return func(*args, **(kwargs or {}))


def narrow_products(model):
    with Narrow() as counted:
        step(model)
    return counted.seen


def attributes(model):
    """The names and identities of all that the modules hold."""
    return [{name: id(value) for name, value in vars(module).items()} for module in model.modules()]


@pytest.mark.parametrize("alpha", [9, 3], ids=["1.5", "1/2"])
def test_fewer_products_give_the_same_loss_and_gradients(alpha):
    model = make_model(lora_alpha=alpha)
    expected = step(model)
    scale_low_rank(model, False)
    apart = narrow_products(model)
    before = attributes(model)
    undo = share_input(model)
    together = narrow_products(model)
    found = step(model)
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    assert found.shape == expected.shape and attributes(model) == before
    # Forward, gradient of A and gradient of x (not in the first layer): one each for all three, and not for each.
    assert together[3 * RANK] == 2 + 3 and apart[RANK] - together[RANK] == 3 * (2 + 3) and 3 * RANK not in apart
    undo()
    assert narrow_products(model) == apart
    assert attributes(model) == before


def test_bfloat16_error_is_no_larger():
    model = make_model()
    scale_low_rank(model, False)
    exact, apart = step(model), step(model, autocast=True)
    share_input(model)
    together = step(model, autocast=True)
    assert 0 < (together - exact).norm() <= 1.2 * (apart - exact).norm()


@pytest.mark.parametrize(
    "options",
    [{"lora_dropout": 0.3}, {"use_dora": True}, {"target_modules": ["q_proj", "v_proj"]}],
    ids=["dropout", "DoRA", "no adapter on one of the three"],
)
def test_unsupported_adapters_are_unchanged(options):
    model = make_model(**options)
    scale_low_rank(model, False)
    expected = step(model)
    share_input(model)
    assert torch.equal(step(model), expected)


def test_two_active_adapters_are_unchanged():
    model = make_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    scale_low_rank(model, False)
    expected = step(model)
    share_input(model)
    assert torch.equal(step(model), expected)


def test_disabled_adapters_are_left_out():
    model = make_model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
        scale_low_rank(model, False), share_input(model)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(model(input_ids=ids).logits, expected)


def test_adapters_of_different_ranks():
    model = make_model(rank_pattern={"k_proj": 3, "v_proj": 7})
    expected = step(model)
    scale_low_rank(model, False), share_input(model)
    assert (step(model) - expected).norm() <= 5e-6 * expected.norm()


def test_error_leaves_no_state_on_modules(monkeypatch):
    model = make_model()
    scale_low_rank(model, False), share_input(model)
    attention = model.get_base_model().model.layers[0].self_attn
    monkeypatch.setattr(attention, "o_proj", None)
    before = attributes(model)
    with pytest.raises(TypeError):
        step(model)
    assert attributes(model) == before
