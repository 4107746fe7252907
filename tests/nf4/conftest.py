"""What the tests of the linear layer and of the patched models watch."""

import pytest
import torch


@pytest.fixture
def dequantisations(monkeypatch):
    """The dtypes in which our kernel made W, one entry a time."""
    from unsloth_puzzles.nf4 import dequantize

    made, original = [], dequantize.launch

    def spy(*arguments):
        made.append(arguments[-1].dtype)
        return original(*arguments)

    monkeypatch.setattr(dequantize, "launch", spy)
    return made


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
