"""Rows of a weight are the same, whoever computes them and however they are cut."""

import bitsandbytes
import pytest
import torch
from packaging.version import Version
from torch._C import DisableTorchFunctionSubclass

from tests.gguf.models import nf4_layer
from unsloth_puzzles.gguf.weights import NF4, LowRank, Plain, WithRows
from unsloth_puzzles.nf4.dequantize import dequantize

KINDS = (
    {}, {"nested": False}, {"blocksize": 128}, {"rows": 7, "columns": 5}, {"rows": 5, "columns": 131},
    {"storage": torch.bfloat16}, {"rows": 300, "columns": 100, "blocksize": 32},
)  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_formula_has_the_bits_of_the_kernel(options):
    torch.manual_seed(0)
    if options.get("rows", 2) * options.get("columns", 1) % 2 and Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("bitsandbytes before 0.50 quantises no odd number of weights on a CPU")
    layer = nf4_layer(**options)
    with DisableTorchFunctionSubclass():
        expected = dequantize(layer.weight, layer.weight.quant_state, torch.float32)
    weight = NF4(layer.weight, layer.weight.quant_state)
    assert weight.shape == tuple(expected.shape)
    assert torch.equal(weight.tensor(), expected)
    assert torch.equal(torch.cat(list(weight.chunks(limit=300))), expected)
    assert torch.equal(weight.rows(2, 5), expected[2:5])


@pytest.mark.gpu
def test_kernel_on_a_gpu_has_the_bits_of_the_formula():
    layer = nf4_layer(96, 192)
    expected = NF4(layer.weight, layer.weight.quant_state).tensor()
    there = layer.to("cuda")
    assert torch.equal(NF4(there.weight, there.weight.quant_state).tensor(), expected)


def test_chunks_are_whole_rows_and_multiples():
    weight = Plain(torch.randn(40, 6).to(torch.bfloat16))
    parts = list(weight.chunks(multiple=16, limit=100))
    assert [len(part) for part in parts] == [16, 16, 8]
    assert all(part.dtype == torch.float32 for part in parts)
    assert torch.equal(torch.cat(parts), weight.source.float())
    assert [len(part) for part in weight.chunks(limit=1)] == [1] * 40


def test_dora_in_chunks_has_the_norms_of_whole_rows():
    torch.manual_seed(0)
    base, b, a = torch.randn(30, 20), torch.randn(30, 4), torch.randn(4, 20)
    weight = LowRank(Plain(base), [(b, a, 0.5)], torch.rand(30) + 1)
    exact = base.double() + 0.5 * b.double() @ a.double()
    exact *= (weight.magnitude.double() / exact.norm(dim=1))[:, None]
    cut = torch.cat(list(weight.chunks(limit=60)))
    for found in (cut, weight.tensor()):
        assert (found - exact).norm() / exact.norm() < 1e-6


def test_adapters_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"model must have adapters of shape \(6, 4\) like their layer, got \(6, 5\)"):
        LowRank(Plain(torch.zeros(6, 4)), [(torch.zeros(6, 2), torch.zeros(2, 5), 1.0)])


def test_rows_that_are_replaced_do_not_depend_on_the_chunks():
    base, rows = torch.randn(10, 4), torch.randn(3, 4)
    weight = WithRows(Plain(base), [7, 0, 9], rows)
    expected = base.clone()
    expected[[7, 0, 9]] = rows
    assert torch.equal(weight.tensor(), expected)
    assert torch.equal(torch.cat(list(weight.chunks(limit=12))), expected)
    assert not torch.equal(base, expected)
