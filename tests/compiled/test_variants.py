"""Compiled functions of a module: one for all lengths, and one for each compile key."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unsloth_puzzles.bench.compilations import count_compilations
from unsloth_puzzles.compiled.variants import Variants


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


def test_lengths_and_modules_share_one_compiled_function(variants):
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


def test_compile_key_includes_gradients(variants):
    block, x = Block(), torch.randn(2, 5, 4)
    wanted = x.clone().requires_grad_()
    calls = (
        lambda: variants(block, x),
        lambda: variants(block, wanted),
        torch.no_grad()(lambda: variants(block, x)),
    )
    assert captured(calls) == ["Block_first", "Block", "Block_no_grad"]


def test_compile_key_includes_mode_autocast_and_sizes_of_one(variants):
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


class Rotated(nn.Module):
    def forward(self, x, position_embeddings, attention_mask=None):
        cos, sin = position_embeddings
        return x * cos + x.flip(-1) * sin


def test_compile_key_includes_rows_of_position_embeddings():
    """As transformers makes them without `position_ids`; a packed batch has as many rows of them as of tokens."""
    torch._dynamo.reset()
    variants, x = Variants(Rotated.forward, "Rotated", {}), torch.randn(2, 5, 4)
    calls = [
        lambda rows=rows: variants(Rotated(), x, position_embeddings=(torch.ones(rows, 5, 4), torch.ones(rows, 5, 4)))
        for rows in (1, 2)
    ]
    with torch.no_grad():
        assert captured(calls) == ["Rotated_no_grad"] * 2


def test_compile_key_includes_the_backends_length_split():
    torch._dynamo.reset()
    variants, used = Variants(Rotated.forward, "Rotated", {}), []
    for splits_at in (0, 8):
        backend = SimpleNamespace(name=f"splits at {splits_at}", splits_at=splits_at)
        mask = SimpleNamespace(backend=backend, pattern=None, data=())
        for length in (5, 12, 7, 9):
            x = torch.randn(2, length, 4)
            with torch.no_grad():
                variants(Rotated(), x, position_embeddings=(x, x), attention_mask=mask)
        used.append(len(variants._compiled))
    assert used == [1, 3]  # one, then two more
