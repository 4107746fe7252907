"""The baselines compute what they are said to compute, what cannot run is named, and the floor is one."""

import dataclasses
import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.backprop import baselines as module
from benchmarks.backprop.baselines import CCE, COMPILED, EAGER, LIGER, LIGER_FLOAT32, baselines, gemm_floor
from benchmarks.backprop.errors import gradient_errors, truth
from benchmarks.backprop.workload import Shape, make_case
from unsloth_puzzles.bench.memory import peak_memory

SMALL = Shape(50, 24, 77, torch.float64)


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("name", [EAGER, COMPILED])
def test_eager_and_compiled_are_the_mean_over_the_labels_that_count(name, train_head):
    case = make_case(dataclasses.replace(SMALL, dtype=torch.float32), "cpu", train_head=train_head, ignored=0.3)
    errors = gradient_errors(case, {name: baselines("cpu", torch.float32)[0][name]})[name]
    assert set(errors) == {"loss", "hidden_states", *(["weight"] if train_head else [])}
    assert max(errors.values()) < 1e-6


def test_baselines_that_need_a_gpu_are_left_out_with_the_reason():
    found, left_out = baselines("cpu", torch.bfloat16)
    assert set(found) == {EAGER, COMPILED}
    assert set(left_out) == {LIGER, LIGER_FLOAT32, CCE}
    assert all("CUDA GPU" in reason for reason in left_out.values())


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("no", name="liger_kernel"), "liger_kernel is not installed here"),
        (ImportError("cannot import name 'libdevice'"), "cannot be imported: cannot import name 'libdevice'"),
        (AttributeError("no attribute 'experimental'"), "cannot be imported: no attribute 'experimental'"),
    ],
)
def test_a_package_that_is_missing_or_does_not_fit_is_left_out_with_the_reason(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(module, "_liger_needs", lambda device, dtype: None)
    monkeypatch.setattr(module.importlib, "import_module", fail)
    found, left_out = baselines("cpu", torch.bfloat16)
    assert LIGER not in found and reason in left_out[LIGER] and reason in left_out[LIGER_FLOAT32]


def test_options_reach_the_package(monkeypatch):
    """Liger takes (input, weight, target), and float32 sums of dW are its `accum_dtype`."""

    class Package:
        @staticmethod
        def liger_fused_linear_cross_entropy(*arguments, **options):
            return arguments, options

    monkeypatch.setattr(module, "_liger_needs", lambda device, dtype: None)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: Package)
    found, _ = baselines("cpu", torch.bfloat16)
    assert found[LIGER]("x", "w", "labels") == (("x", "w", "labels"), {})
    assert found[LIGER_FLOAT32]("x", "w", "labels") == (("x", "w", "labels"), {"accum_dtype": torch.float32})


def test_reasons_name_what_is_needed(monkeypatch):
    monkeypatch.setattr(module, "capability", lambda device: 75)
    assert "sm_80" in module._cce_needs(torch.device("cuda"), torch.float16)
    assert module._liger_needs(torch.device("cuda"), torch.float16) is None
    monkeypatch.setattr(module, "capability", lambda device: 90)
    assert "not float32" in module._cce_needs(torch.device("cuda"), torch.float32)
    assert module._cce_needs(torch.device("cuda"), torch.bfloat16) is None


@pytest.mark.parametrize("rows", [1, 7, 16, 25, 50, 64])
def test_the_floor_does_the_three_products_in_chunks(rows):
    case = make_case(SMALL, "cpu")
    x, weight = case.hidden_states.detach(), case.weight.detach()
    logits = x @ weight.t()
    dx, dw = gemm_floor(x, weight, rows)()
    torch.testing.assert_close(dx, logits @ weight, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dw, logits.t() @ x, rtol=1e-13, atol=1e-13)
    assert gemm_floor(x, weight, rows, train_head=False)()[1] is None


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("rows", [7, 64])
def test_the_floor_does_no_more_flops_and_takes_no_more_memory_than_predicted(rows, train_head):
    shape = Shape(300, 32, 512, torch.float32)
    case = make_case(shape, "cpu", train_head=train_head)
    call = gemm_floor(case.hidden_states, case.weight, rows, train_head=train_head)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == shape.flops(train_head)
    if not torch.cuda.is_available():
        assert peak_memory(call)[1] == shape.least_gib(rows, train_head) * 2**30


def test_the_floor_needs_rows_and_a_product_that_adds_to_float32():
    case = make_case(dataclasses.replace(SMALL, dtype=torch.bfloat16), "cpu")
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        gemm_floor(case.hidden_states, case.weight, 0)
    with pytest.raises(ValueError, match=r"accumulate_dtype must be torch\.bfloat16 on cpu.*got torch\.float32"):
        gemm_floor(case.hidden_states, case.weight, 8, accumulate_dtype=torch.float32)
    gemm_floor(case.hidden_states, case.weight, 8, accumulate_dtype=torch.float32, train_head=False)()


@pytest.mark.gpu
@pytest.mark.parametrize("train_head", [True, False])
def test_the_kernels_agree_with_the_truth_about_as_well_as_eager(train_head):
    case = make_case(Shape(512, 256, 4096, torch.bfloat16), "cuda", train_head=train_head, ignored=0.2)
    found, left_out = baselines("cuda", torch.bfloat16)
    for name, package in ((LIGER, "liger_kernel"), (CCE, "cut_cross_entropy")):
        assert name in found or not importlib.util.find_spec(package), left_out[name]
    true = truth(case)
    errors = gradient_errors(case, found, true)
    # CCE rounds each product of a label's logit to bfloat16 before it adds them up (its indexed_dot.py).
    valid = case.labels != -100
    x, weight = case.hidden_states.detach()[valid], case.weight.detach()[case.labels[valid]]
    rounded = (x * weight).double().sum(-1) - (x.double() * weight.double()).sum(-1)
    of_cce = (rounded.mean() / true.loss).abs().item()
    for name in found:
        for key, value in errors[name].items():
            # Liger adds its chunks in bfloat16, and CCE drops what is below bfloat16's resolution.
            allowed = 4 * errors[EAGER][key] + (key == "loss") * (1e-4 + (name == CCE) * of_cce)
            assert value <= allowed, (name, key)


@pytest.mark.gpu
def test_the_floor_adds_bfloat16_products_to_float32():
    case = make_case(Shape(300, 64, 1000, torch.bfloat16), "cuda")
    x, weight = case.hidden_states.detach(), case.weight.detach()
    dw = gemm_floor(x, weight, 64, accumulate_dtype=torch.float32)()[1]
    true = (x @ weight.t()).double().t() @ x.double()
    assert dw.dtype == torch.float32
    assert (dw - true).norm() < 1e-5 * true.norm()
