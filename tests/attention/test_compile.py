"""Flex attention is compiled once whatever the length, the window and the documents, forward and backward.

Graphs are counted with PyTorch's own evaluation of flex attention behind them (backend "aot_eager"), which runs on a
CPU; Inductor's kernels are counted on a GPU.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental import _config as fx_config
from torch.nn.attention import flex_attention as flex_module

from tests.attention.conftest import draw, draw_documents, make_batch
from unsloth_puzzles.attention import attention
from unsloth_puzzles.attention.blocks import Blocks
from unsloth_puzzles.attention.flex import _flex
from unsloth_puzzles.attention.pattern import Pattern
from unsloth_puzzles.bench.compilations import count_compilations

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LENGTHS = (300, 17, 2, 128, 129, 64, 511, 256)


class Graphs:
    def __init__(self):
        self.forward = self.backward = 0

    def compile(self, function):
        def count(name):
            def compiler(module, inputs):
                setattr(self, name, getattr(self, name) + 1)
                return make_boxed_func(module.forward)

            return compiler

        backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
        return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_one_forward_and_one_backward_graph(monkeypatch, soft_cap):
    monkeypatch.setattr(flex_module, "_validate_device", lambda *tensors: None)  # it refuses gradients on a CPU
    graphs = Graphs()
    compiled = graphs.compile(_flex)
    for length in LENGTHS:
        for window in (None, 50, 200):
            for documents in (None, draw_documents(length, 0.02)):
                data = [t.requires_grad_() for t in draw(length)]
                for tensor in data:
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)
                pattern = Pattern(window=window, soft_cap=soft_cap)
                blocks = Blocks(pattern, make_batch(length, documents=documents))
                with fx_config.patch(use_duck_shape=False):
                    found = compiled(*data, None, soft_cap, blocks)
                options = {"window": window, "documents": documents, "soft_cap": soft_cap, "backend": "dense"}
                exact = attention(*data, **options)
                assert (found - exact).norm() <= 1e-6 * exact.norm()
                slopes = torch.autograd.grad(found.sum(), data)
                for one, other in zip(slopes, torch.autograd.grad(exact.sum(), data), strict=True):
                    assert (one - other).norm() <= 1e-6 * other.norm()
    assert (graphs.forward, graphs.backward) == (1, 1)
    with torch.compiler.set_stance("fail_on_recompile"), fx_config.patch(use_duck_shape=False):
        for length in (3, 77, 450, 1234):
            blocks = Blocks(Pattern(window=33), make_batch(length, documents=draw_documents(length, 0.01)))
            data = draw(length)
            for tensor in data:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)
            compiled(*(t.requires_grad_() for t in data), None, soft_cap, blocks)


def test_attention_compiles_once_for_all_lengths():
    """What `attention` itself calls, here without gradients, from the first length on."""
    with count_compilations() as counts:
        for length in (77, 5, 300, 1, 128, 129):
            attention(*draw(length), backend="flex", documents=draw_documents(length, 0.05))
    assert counts.graphs == 1 and counts.graph_breaks == {}, counts.table()


def test_scale_and_soft_cap_are_constants_of_compiled_code():
    """Each is compiled for, without becoming a variable, which flex attention cannot take; more than the eight that
    Dynamo allows one function."""
    for number in (n + 0.5 for n in range(9)):
        data, options = draw(40), {"scale": number, "soft_cap": 2 * number}
        found, exact = (attention(*data, backend=backend, **options) for backend in ("flex", "dense"))
        assert (found - exact).norm() <= 1e-6 * exact.norm()
