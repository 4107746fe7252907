"""What the tests of the op watch and reset."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Counts a block's matrix products; its largest tensor's values; the shapes of tensors that are no views."""

    def __init__(self):
        super().__init__()
        self.products = self.largest = 0
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
                if not func.is_view:
                    self.made.add(tuple(each.shape))
        return result


@pytest.fixture
def watch():
    return Watch


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def untried(monkeypatch):
    """Every function is new again: its first call is checked."""
    from weakref import WeakKeyDictionary

    from unsloth_puzzles.backprop import trust

    monkeypatch.setattr(trust, "_tried", WeakKeyDictionary())
