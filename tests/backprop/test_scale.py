"""Scaling and narrowing in place: one rounding, nothing left out."""

import pytest
import torch

from tests.backprop.reference import draw
from unsloth_puzzles.backprop import scale
from unsloth_puzzles.backprop.scale import narrow_in_place, scale_in_place

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("factor", [1.0, 1 / 3, -2.7, 0.0, 65536.0, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_of_the_product(dtype, factor, monkeypatch):
    monkeypatch.setattr(scale, "_PIECE", 1000)
    exact = torch.promote_types(dtype, torch.float32)
    for shape in ((0,), (1,), (999,), (1000,), (7, 431)):
        tensor = draw(*shape, dtype=dtype)
        expected = (tensor.to(exact) * torch.tensor(factor, dtype=exact)).to(dtype)
        assert scale_in_place(tensor, torch.tensor(factor, dtype=exact)) is tensor
        assert torch.equal(tensor.nan_to_num(7), expected.nan_to_num(7))


def test_a_third_is_not_rounded_to_16_bits_first():
    tensor = draw(1000, dtype=torch.bfloat16)
    rounded = tensor * torch.tensor(1 / 3, dtype=torch.bfloat16)
    assert not torch.equal(scale_in_place(tensor, torch.tensor(1 / 3)), rounded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (1023,), (1024,), (1025,), (3, 2731), (4096, 3)])
def test_narrowed_in_its_own_memory(dtype, shape):
    tensor = draw(*shape, dtype=torch.float32)
    expected, address = tensor.to(dtype), tensor.data_ptr()
    narrow = narrow_in_place(tensor, dtype)
    assert narrow.dtype == dtype and narrow.shape == shape and narrow.is_contiguous()
    assert torch.equal(narrow, expected)
    assert narrow.data_ptr() == address


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.bfloat16), (torch.float32, torch.float32)])
def test_only_float32_is_narrowed(dtypes):
    with pytest.raises(ValueError, match=r"^tensor must be float32.*, got "):
        narrow_in_place(draw(4, dtype=dtypes[0]), dtypes[1])
