"""Compiled functions of a module: one for all lengths, another for what is no number."""

import pytest
import torch
from torch import nn

from unsloth_puzzles.compiled.count import count_compilations
from unsloth_puzzles.compiled.qlora import Variants


class Block(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).sin()


@pytest.fixture
def variants():
    torch._dynamo.reset()
    yield Variants(Block.forward, "Block", {})
    torch._dynamo.reset()


def test_lengths_and_modules_share_one_function(variants):
    blocks = [Block(), Block()]
    with count_compilations() as counts:
        for block in blocks:
            for shape in ((2, 5, 4), (3, 7, 4), (2, 9, 4), (7, 4, 4)):
                x = torch.randn(shape)
                found = variants(block, x)
                found.sum().backward()
                assert torch.allclose(found, block(x), rtol=1e-6, atol=1e-6)
    assert counts.graph_breaks == {} and [one.reason for one in counts.captures] == [None]
    assert [(one.name, one.forward, one.backward) for one in counts.captures] == [("Block_first", 1, 1)]


def captured(calls):
    with count_compilations() as counts:
        for call in [*calls, *calls]:
            call()
    assert all(one.reason is None for one in counts.captures)
    return [one.name for one in counts.captures]


def test_what_wants_gradients_has_a_function_of_its_own(variants):
    block, x = Block(), torch.randn(2, 5, 4)
    wanted = x.clone().requires_grad_()
    calls = (
        lambda: variants(block, x),
        lambda: variants(block, wanted),
        torch.no_grad()(lambda: variants(block, x)),
    )
    assert captured(calls) == ["Block_first", "Block", "Block_no_grad"]


def test_what_else_is_no_number_has_a_function_of_its_own(variants):
    block, x = Block(), torch.randn(2, 5, 4)
    calls = (
        lambda: variants(block.train(), x),
        lambda: variants(block.eval(), x),
        lambda: variants(block.train(), x[:1]),
        lambda: variants(block.train(), x[:, :1]),
        torch.autocast("cpu", torch.bfloat16)(lambda: variants(block.train(), x)),
    )
    with torch.no_grad():  # it is enough to compile the forwards
        assert captured(calls) == ["Block_no_grad"] * 5
