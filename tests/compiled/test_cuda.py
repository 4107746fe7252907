"""On a GPU, in bfloat16: compiled QLoRA over every backend of attention, checkpointed or not, is as near to float32."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import prepare_model_for_kbit_training

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.attention import BACKENDS
from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.nf4 import patch_linear4bit

pytestmark = pytest.mark.gpu


def make_model(dtype):
    return with_adapters(nf4_llama("cuda", dtype), r=8)


@pytest.fixture(scope="module")
def models():
    """A model in bfloat16, and one that computes with the same weights in float32."""
    model, exact = make_model(torch.bfloat16), make_model(torch.float32)
    for one, other in zip(model.modules(), exact.modules(), strict=True):
        if isinstance(one, Linear4bit):
            other.weight, other.compute_dtype = one.weight, torch.float32
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        if one.is_floating_point():
            other.data.copy_(one.data)
    return model, exact


def set_checkpointing(model, on):
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


def inputs(length, packed):
    ids = torch.randint(64, (2, length), generator=torch.Generator().manual_seed(length)).cuda()
    starts = torch.cat([torch.arange(length // 3), torch.arange(length - length // 3)]).expand(2, -1).cuda()
    return {"input_ids": ids, "labels": ids, **({"position_ids": starts} if packed else {})}


def gradient(model, autocast=True, **given):
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = model(**given).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("attention", "checkpointing", "rounding"),
    [("auto", False, True), ("flash", True, False), ("flex", False, False), ("sdpa", True, True)],
)
def test_no_farther_from_float32_than_uncompiled_model(models, attention, checkpointing, rounding):
    if attention != "auto" and (reason := BACKENDS[attention].missing(torch.device("cuda"))):
        pytest.skip(f"{attention}: {reason}")
    model, exact = models
    set_checkpointing(model, checkpointing)
    asked = [inputs(length, packed) for length, packed in ((200, False), (77, False), (150, True), (64, True))]
    plain = [gradient(model, **given) for given in asked]
    with patch_linear4bit(exact):
        true = [gradient(exact, autocast=False, **given) for given in asked]
    torch._dynamo.reset()
    with (
        count_compilations() as counts,
        compile_qlora(model, attention=attention, eager_rounding=rounding),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
    ):
        found = [gradient(model, **given) for given in asked]
    for mine, other, right in zip(found, plain, true, strict=True):
        assert (mine - right).norm() <= 1.2 * (other - right).norm()
    assert counts.graph_breaks == {} and not any(one.reason for one in counts.captures), counts.table()


@pytest.mark.parametrize("attention", ["flash", "flex", "max-autotune"])
def test_fifty_lengths_compile_once(models, attention):
    """Once for each variant: the first layer and the others; flex has two, for short and for long queries."""
    model, exact = models
    options = {"max_autotune": True} if attention == "max-autotune" else {"attention": attention}
    if attention != "max-autotune" and (reason := BACKENDS[attention].missing(torch.device("cuda"))):
        pytest.skip(f"{attention}: {reason}")
    set_checkpointing(model, False)
    lengths = [512, *range(9, 509, 10)]
    torch._dynamo.reset()
    with count_compilations() as counts, compile_qlora(model, **options) as compiled:
        for length in (512, 9):
            gradient(model, **inputs(length, False))
        with torch.compiler.set_stance("fail_on_recompile"):
            found = {length: gradient(model, **inputs(length, False)) for length in lengths}
    assert counts.graph_breaks == {} and not any(one.reason for one in counts.captures), counts.table()
    assert counts.compilations <= (8 if attention != "flex" else 12), counts.table()
    if attention == "max-autotune":
        assert compiled.products and any(product.tile for product in compiled.products)
    for length in (9, 259, 499):
        plain = gradient(model, **inputs(length, False))
        with patch_linear4bit(exact):
            right = gradient(exact, autocast=False, **inputs(length, False))
        assert (found[length] - right).norm() <= 1.2 * (plain - right).norm(), length


@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_does_not_synchronize_with_the_gpu(models, checkpointing):
    model, _ = models
    set_checkpointing(model, checkpointing)
    given = inputs(96, False)
    with compile_qlora(model):
        for _ in range(2):
            gradient(model, **given)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradient(model, **given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_float32_norms_and_residuals_under_autocast():
    """As PEFT prepares 4-bit models."""
    model = nf4_llama("cuda", torch.bfloat16)
    model = with_adapters(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False), r=8)
    given = inputs(96, False)
    with patch_linear4bit(model):
        exact = gradient(model, autocast=False, **given)
    plain = gradient(model, **given)
    torch._dynamo.reset()
    with compile_qlora(model):
        assert (gradient(model, **given) - exact).norm() <= 1.2 * (plain - exact).norm()
