"""Hooks on saved tensors, as checkpointing and offloading set them, kept away from graphs that live for one chunk."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Take the default hooks off, and put them back.

    A graph that is differentiated at once has no use for them: they would copy each chunk's logits. `torch.func`
    refuses to be traced under them, and then leaves them refused for the whole process.
    """
    hidden = []
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(False)) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hidden.append(hooks)
    try:
        yield
    finally:
        for hooks in reversed(hidden):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
