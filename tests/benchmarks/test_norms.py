"""The relative error of a tensor, and what it is where the truth is zero or the tensor is NaN."""

import math

import pytest
import torch

from benchmarks.backprop.errors import relative_difference
from benchmarks.norms import relative_norm


def test_error_is_relative_to_the_truth_and_in_float64():
    exact = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    assert relative_norm(exact * (1 + 1e-12), exact) == pytest.approx(1e-12, rel=1e-3)
    assert relative_norm(torch.tensor([[3.0, 4.5]], dtype=torch.bfloat16), exact) == pytest.approx(0.1)
    assert relative_norm(torch.tensor(2.0), torch.tensor(0.0)) == 2
    assert relative_norm(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("found, exact", [(math.nan, 1.0), (math.nan, 0.0), (0.0, math.nan), (math.inf, math.inf)])
def test_error_without_a_number_is_nan_and_no_maximum_hides_it(found, exact):
    pair = torch.tensor(found), torch.tensor(exact)
    one = torch.tensor(1.0)
    assert math.isnan(relative_norm(*pair))
    assert math.isnan(relative_difference([one, pair[0], one], [one, pair[1], one]))
