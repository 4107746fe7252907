"""The data is what it is said to be."""

import math

import pytest
import torch

from benchmarks.backprop.baselines import eager
from benchmarks.backprop.workload import REFERENCE, TINY, Shape, make_case, many_shapes


def test_the_same_seed_gives_the_same_case_and_another_does_not():
    first, again, other = (make_case(TINY, "cpu", ignored=0.2, seed=seed) for seed in (1, 1, 2))
    for name in ("hidden_states", "weight", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_shapes_dtypes_and_who_wants_a_gradient():
    for train_head in (True, False):
        case = make_case(Shape(30, 8, 50, torch.bfloat16), "cpu", train_head=train_head)
        assert (case.hidden_states.shape, case.weight.shape, case.labels.shape) == ((30, 8), (50, 8), (30,))
        assert case.hidden_states.dtype == case.weight.dtype == torch.bfloat16 and case.labels.dtype == torch.int64
        assert case.hidden_states.is_leaf and case.hidden_states.requires_grad
        assert case.weight.requires_grad == case.train_head == train_head


@pytest.mark.parametrize("learnt", [True, False])
def test_labels_lie_in_the_vocabulary_and_the_share_asked_for_is_ignored(learnt):
    labels = make_case(Shape(20000, 4, 100, torch.float32), "cpu", learnt=learnt, ignored=0.25).labels
    valid = labels[labels != -100]
    assert valid.min() == 0 and valid.max() == 99
    assert len(valid) / len(labels) == pytest.approx(0.75, abs=0.02)
    most_frequent = (valid == 0).float().mean().item()
    assert most_frequent == pytest.approx(math.log(2) / math.log(101) if learnt else 0.01, abs=0.01)  # Zipf, uniform


def test_a_learnt_case_has_a_trained_models_loss_and_the_other_a_first_steps():
    shape = Shape(1000, 256, 4096, torch.float32)
    losses = {}
    for learnt in (True, False):
        case = make_case(shape, "cpu", learnt=learnt)
        losses[learnt] = eager(case.hidden_states, case.weight, case.labels).item()
    assert 1.5 < losses[True] < 2.5
    assert losses[False] == pytest.approx(math.log(4096) + 1.28**2 / 2, abs=0.15)


def test_forward_backward_returns_loss_and_gradients_and_leaves_no_grad():
    case = make_case(TINY, "cpu")
    loss, dx, dw = case.forward_backward(eager)
    assert loss.dim() == 0 and not loss.requires_grad
    assert (dx.shape, dw.shape) == (case.hidden_states.shape, case.weight.shape)
    assert case.hidden_states.grad is None and case.weight.grad is None
    frozen = make_case(TINY, "cpu", train_head=False)
    assert len(frozen.forward_backward(eager)) == 2


def test_predictions_at_the_puzzles_shape():
    """51.6 TFLOP; dW 1.0 GiB and dX 0.125 GiB, and a chunk of 872 rows."""
    assert REFERENCE.flops() == pytest.approx(51.6e12, rel=1e-3)
    assert REFERENCE.flops(train_head=False) == pytest.approx(REFERENCE.flops() * 2 / 3)
    chunk = 872 * 128256 * 2 / 2**30
    weight = 4096 * 128256 * 2 / 2**30
    assert REFERENCE.least_gib(872) == pytest.approx(0.125 + chunk + weight)
    assert REFERENCE.least_gib(872, accumulate_dtype=torch.float32) == pytest.approx(0.125 + chunk + 2 * weight)
    assert REFERENCE.least_gib(872, train_head=False) == pytest.approx(0.125 + chunk)
    assert REFERENCE.least_gib(10**9) == REFERENCE.least_gib(REFERENCE.rows)


def test_many_shapes_lifts_dynamos_limit_for_a_while():
    import torch._dynamo.config as config

    with config.patch(recompile_limit=8):  # Dynamo's own; some models of transformers change it when imported
        with many_shapes():
            assert config.recompile_limit == 64
        assert config.recompile_limit == 8
