"""The MLP with its adapters inside the activation: against the formula in float64, in a model, and not applied."""

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import silu

from tests.compiled.models import nf4_llama, with_adapters
from unsloth_puzzles.bench.cross_compile import ARCHITECTURES, cross_compile_in_subprocess
from unsloth_puzzles.compiled.lora import scale_low_rank
from unsloth_puzzles.compiled.shared_input import share_input
from unsloth_puzzles.compiled.swiglu import LoraSwiGLU, fuse_swiglu

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [((2, 37), 100, 4), ((70,), 130, 16), ((1, 1), 64, 1), ((3, 5), 16, 20)]


def formula(g, u, ig, iu, bg, bu, a):
    act = silu(g + ig @ bg.t()) * (u + iu @ bu.t())
    return act, act @ a.t()


def fused(*data):
    return LoraSwiGLU.apply(*data, False)


def draw(rows, columns, rank, dtype, device):
    generator = torch.Generator().manual_seed(sum(rows) + columns + rank)
    shapes = [(*rows, columns)] * 2 + [(*rows, rank)] * 2 + [(columns, rank)] * 2 + [(rank, columns)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def results(function, data):
    outputs = function(*data)
    slopes = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(data[0]) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, data, slopes)]


def distance(found, exact):
    return [((one.double() - true).norm() / true.norm()).item() for one, true in zip(found, exact, strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_outputs_and_gradients_in_float32(rows, columns, rank, device):
    data = draw(rows, columns, rank, torch.float32, device)
    exact = results(formula, [t.detach().double().requires_grad_() for t in data])
    assert max(distance(results(fused, data), exact)) <= 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_error_is_no_larger_than_the_formulas(dtype, device):
    """Which rounds after each operation."""
    data = draw((2, 96), 160, 8, dtype, device)
    exact = results(formula, [t.detach().double().requires_grad_() for t in data])
    found, plain = distance(results(fused, data), exact), distance(results(formula, data), exact)
    assert all(mine <= 1.05 * theirs for mine, theirs in zip(found, plain, strict=True)), (found, plain)
    assert found[0] <= 0.75 * torch.finfo(dtype).eps  # one rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_eager_rounding_matches_the_formula_in_16_bits(dtype, device):
    """To the bit, but where the sums of a product come out in another order: of outputs and of the gradients of g and u
    one in a hundred may be another number, of sums over all rows no norm by more than a rounding."""
    data = draw((2, 96), 160, 8, dtype, device)
    found = results(lambda *given: LoraSwiGLU.apply(*given, True), data)
    expected = results(formula, data)
    for at in (0, 2, 3):  # act, and the gradients of g and u
        assert (found[at] != expected[at]).float().mean() <= 0.01, at
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other.double()).norm() <= 0.1 * torch.finfo(dtype).eps * other.double().norm()
    assert (results(fused, data)[0] != expected[0]).float().mean() > 0.1


def make_model(dtype=torch.float32, **options):
    return with_adapters(nf4_llama(dtype=dtype), **options)


def step(model):
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.arange(40).view(2, 20)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def test_fused_model_matches_and_undo_restores_it(monkeypatch):
    model, calls = make_model(), []
    kinds = [type(module) for module in model.modules()]
    expected = step(model)
    apply = LoraSwiGLU.apply
    monkeypatch.setattr(LoraSwiGLU, "apply", lambda *given: calls.append(1) or apply(*given))
    inside, undo = scale_low_rank(model, False), fuse_swiglu(model, False)
    found = step(model)
    assert len(calls) == 2  # one a layer
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    undo()
    inside()
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(step(model), expected) and len(calls) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.3},
        {"use_dora": True},
        {"target_modules": ["gate_proj", "up_proj"]},
        {"rank_pattern": {"down_proj": 8}},
    ],
    ids=["dropout", "DoRA", "no adapter on one of the three", "ranks"],
)
def test_unsupported_adapters_are_unchanged(options):
    model = make_model(**options)
    expected = step(model)
    fuse_swiglu(model, False)
    assert torch.equal(step(model), expected)


@pytest.mark.parametrize(
    "forward",
    [
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) * 0.5,
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x) * mlp.multiplier) * mlp.up_proj(x)),
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)),
        lambda mlp, x: mlp.down_proj(torch.nn.functional.gelu(mlp.gate_proj(x)) * mlp.up_proj(x)),
        lambda mlp, x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) * (1 + 1 / x.shape[2]),
    ],
    ids=["scaled", "scaled inside", "gate and up exchanged", "another activation", "three dimensions"],
)
def test_other_formulas_are_unchanged(forward):
    model = make_model()
    for layer in model.get_base_model().model.layers:
        layer.mlp.multiplier = 1.25
        layer.mlp.__class__ = type("OtherMLP", (type(layer.mlp),), {"forward": forward})
    expected = step(model)
    scale_low_rank(model, False), fuse_swiglu(model, False)
    assert torch.equal(step(model), expected)


@pytest.mark.parametrize("kind", ["function", "module"])
def test_dropout_is_found_in_eval_mode(kind):
    """In which transformers loads a model, before a Trainer switches it to training."""

    def forward(mlp, x):
        y = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        return torch.nn.functional.dropout(y, mlp.residual_p, mlp.training) if kind == "function" else mlp.dropout(y)

    for p, fused in ((0.5, False), (0.0, True)):
        model = make_model().eval()
        mlp = model.get_base_model().model.layers[0].mlp
        mlp.residual_p, mlp.dropout = p, torch.nn.Dropout(p).eval()
        mlp.__class__ = type("DroppingMLP", (type(mlp),), {"forward": forward})
        drawn = torch.get_rng_state()
        fuse_swiglu(model, False)
        assert type(mlp).__name__ == ("FusedDroppingMLP" if fused else "DroppingMLP")
        assert torch.equal(torch.get_rng_state(), drawn)


def test_adapters_by_row_are_left_to_peft():
    model = make_model()
    model.add_adapter("other", LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    given = {"input_ids": torch.arange(24).view(3, 8), "adapter_names": ["default", "other", "__base__"]}
    with torch.no_grad():
        expected = model.eval()(**given).logits
        scale_low_rank(model, False), share_input(model), fuse_swiglu(model, False)
        assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_are_fused_only_under_autocast(autocast, monkeypatch):
    """PEFT keeps adapters in float32 under a model in bfloat16, and without autocast computes them so."""
    model, calls = make_model(dtype=torch.bfloat16), []
    apply = LoraSwiGLU.apply
    monkeypatch.setattr(LoraSwiGLU, "apply", lambda *given: calls.append(1) or apply(*given))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(model)
        fuse_swiglu(model, False)
        found = step(model)
    assert len(calls) == (2 if autocast else 0)
    assert (found - expected).norm() <= (0.02 if autocast else 0) * expected.norm()


def test_disabled_adapters_are_left_out():
    model = make_model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        with model.disable_adapter():
            expected = model(input_ids=ids).logits
        fuse_swiglu(model, False)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert not torch.equal(model(input_ids=ids).logits, expected)


def test_compiles_without_graph_breaks():
    data = draw((2, 20), 48, 4, torch.float32, "cpu")
    compiled = torch.compile(lambda *given: LoraSwiGLU.apply(*given, False), fullgraph=True)
    for one, other in zip(results(compiled, data), results(formula, data), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(
    "jobs, architectures",
    [("jobs_for_t4_and_h100", (75, 90)), pytest.param("jobs", ARCHITECTURES, marks=pytest.mark.slow)],
)
def test_cross_compiled_kernels_have_no_spills_and_wide_stores(jobs, architectures):
    reports = cross_compile_in_subprocess(f"tests.compiled.swiglu_to_compile:{jobs}")
    assert sorted(report.sm for report in reports) == sorted(4 * architectures)
    for report in reports:
        assert report.spills == 0, report.name
        assert report.shared <= 48 * 2**10, report.name  # what a T4 has without asking for more
        assert report.count("STG") == report.count("STG.E.128") > 0, report.name
        assert bool(report.count("HMMA")) == (report.sm >= 80), report.name  # below Triton multiplies by FMA
