"""Data that the tests of attention share."""

import pytest
import torch

from unsloth_puzzles.attention.pattern import Batch, Pattern, number_documents


def make_batch(length, q_length=None, *, documents=None, size=2, dtype=torch.float32, **changed):
    options = {"heads": 4, "kv_heads": 2, "head_size": 16, "device": torch.device("cpu"), **changed}
    lengths = {"q_length": q_length or length, "kv_length": length}
    return Batch(size=size, **lengths, dtype=dtype, documents=documents, **options)


def draw_documents(length, share, size=2, seed=0):
    """Starts of documents at about `share` of the positions; ids come again, which must not matter."""
    generator = torch.Generator().manual_seed(seed)
    starts = (torch.rand(size, length, generator=generator) < share).cumsum(-1)
    return number_documents(starts % 3)


def draw(length, q_length=None, *, size=2, heads=4, kv_heads=2, head_size=16, dtype=torch.float32, seed=0, **options):
    """(query, key, value)"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, q_length or length), (kv_heads, length), (kv_heads, length)]
    return [
        torch.randn(size, count, n, head_size, generator=generator, dtype=torch.float64).to(dtype, **options)
        for count, n in shapes
    ]


def sees(pattern: Pattern, batch: Batch) -> torch.Tensor:
    """(batch, q_length, kv_length), by the words of `Pattern`'s docstring, a query and a key at a time."""
    found = torch.zeros(batch.size, batch.q_length, batch.kv_length, dtype=torch.bool)
    for row in range(batch.size):
        for query in range(batch.q_length):
            i = query + batch.kv_length - batch.q_length
            for j in range(batch.kv_length):
                seen = not pattern.causal or j <= i
                seen = seen and (pattern.window is None or i - j < pattern.window)
                if batch.documents is not None:
                    seen = seen and bool(batch.documents[row, i] == batch.documents[row, j])
                found[row, query, j] = seen
    return found


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
