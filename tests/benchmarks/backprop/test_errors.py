"""The truth is autograd's in float64, and an error is a relative norm."""

import pytest
import torch

from benchmarks.backprop.baselines import EAGER, eager
from benchmarks.backprop.errors import gradient_errors, truth
from benchmarks.backprop.linear_losses import OURS, OURS_FLOAT32, ours
from benchmarks.backprop.workload import Shape, make_case

SHAPE = Shape(100, 16, 300, torch.float32)
BFLOAT16 = Shape(1500, 64, 2048, torch.bfloat16)


def in_float64(hidden_states, weight, labels):
    return torch.nn.functional.cross_entropy(hidden_states.double() @ weight.double().t(), labels)


@pytest.mark.parametrize("rows", [1, 33, 100, 1000])
@pytest.mark.parametrize("train_head", [True, False])
def test_the_truth_is_what_autograd_finds_in_float64(rows, train_head):
    case = make_case(SHAPE, "cpu", train_head=train_head, ignored=0.3)
    x, weight = (t.detach().double().requires_grad_() for t in (case.hidden_states, case.weight))
    loss = torch.nn.functional.cross_entropy(x @ weight.t(), case.labels)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    true = truth(case, rows=rows)
    assert true.loss.dtype == true.hidden_states.dtype == torch.float64
    assert abs(true.loss - loss) < 1e-13 * loss
    assert (true.hidden_states - dx).norm() < 1e-13 * dx.norm()
    if train_head:
        assert (true.weight - dw).norm() < 1e-13 * dw.norm()
    else:
        assert true.weight is None


def test_a_truth_in_float32_is_near_and_leaves_the_precision_of_products_alone():
    case = make_case(SHAPE, "cpu")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        near, true = truth(case, torch.float32), truth(case)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert near.weight.dtype == torch.float32
    assert 0 < (near.weight - true.weight).norm() < 1e-6 * true.weight.norm()


def test_errors_of_wrong_gradients_are_their_relative_norms():
    case = make_case(SHAPE, "cpu", ignored=0.2)
    wrong = {
        "right": in_float64,
        "three times too large": lambda *given: 3 * in_float64(*given),
        "ignored labels counted": lambda x, w, labels: in_float64(x, w, labels) * (labels != -100).double().mean(),
        "dW missing": lambda x, w, labels: in_float64(x, w.detach(), labels) + 0 * w.double().sum(),
    }
    found = gradient_errors(case, wrong)
    # Gradients come back in float32, the dtype of what they belong to.
    assert found["right"] == pytest.approx({"loss": 0, "hidden_states": 0, "weight": 0}, abs=1e-7)
    three = found["three times too large"]
    assert three == pytest.approx({"loss": 2, "hidden_states": 2, "weight": 2}, rel=1e-6)
    share = (case.labels == -100).double().mean().item()
    assert found["ignored labels counted"]["hidden_states"] == pytest.approx(share, rel=1e-5)
    assert found["dW missing"]["weight"] == pytest.approx(1) and found["dW missing"]["hidden_states"] < 1e-7


def test_the_error_of_a_long_tensor_is_that_of_all_its_pieces():
    """Rows are compared 4096 at a time: an error in the last ones counts."""
    case = make_case(Shape(4, 2, 5000, torch.float32), "cpu")
    case.labels.fill_(4999)
    last = torch.arange(5000)[:, None] >= 4999

    def wrong_at_the_end(x, weight, labels):
        return in_float64(x, torch.where(last, weight.detach(), weight), labels)

    found = gradient_errors(case, {"wrong": wrong_at_the_end})["wrong"]["weight"]
    true = truth(case).weight
    assert found > 0.5
    assert found == pytest.approx((true[-1].norm() / true.norm()).item(), rel=1e-4)


def test_candidates_out_of_memory_have_no_errors():
    def too_large(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert set(gradient_errors(make_case(SHAPE, "cpu"), {"large": too_large, EAGER: eager})) == {EAGER}


def test_ours_errs_as_eager_does_and_less_where_dw_is_summed_and_kept_in_float32():
    case = make_case(BFLOAT16, "cpu", ignored=0.1, any_gradient_dtype=True)
    named = {
        OURS: ours(200, compile=False),
        OURS_FLOAT32: ours(200, accumulate_dtype=torch.float32, compile=False),
        EAGER: eager,
    }
    found = gradient_errors(case, named)
    for name in (OURS, OURS_FLOAT32):
        assert found[name]["hidden_states"] <= 1.05 * found[EAGER]["hidden_states"]
    assert found[OURS_FLOAT32]["weight"] < found[EAGER]["weight"] < found[OURS]["weight"]


def test_dw_comes_in_the_dtype_that_the_case_allows():
    loss = ours(200, accumulate_dtype=torch.float32, compile=False)
    for free, expected in ((True, torch.float32), (False, torch.bfloat16)):
        case = make_case(BFLOAT16, "cpu", any_gradient_dtype=free)
        assert case.forward_backward(loss)[2].dtype == expected
