"""What the tests of the linear layer and of the patched models watch."""

import pytest
import torch


@pytest.fixture
def dequantisations(monkeypatch):
    """The dtypes in which our kernel made W, one entry a time."""
    from unsloth_puzzles.nf4 import launch

    kind = launch.InterpretedLaunch if launch.INTERPRETED else launch.Launch
    made, original = [], kind.run

    def spy(self, out=None):
        weight = original(self, out)
        made.append(weight.dtype)
        return weight

    monkeypatch.setattr(kind, "run", spy)
    return made


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
