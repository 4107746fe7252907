"""The Triton kernels that Inductor writes for an H200, without one: they are generated, not compiled or run.

    python tests/backprop/h200_kernels.py

prints a JSON object: for each case the names of the kernels. This process is told that it has an H200, so it runs
nothing else.
"""

import contextlib
import json
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.source import LocalSource
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes import fuse_attention, joint_graph, misc_patterns, post_grad
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _triton

from unsloth_puzzles.backprop import tiles
from unsloth_puzzles.backprop.arguments import Reduction
from unsloth_puzzles.backprop.compiled import _value_and_gradient
from unsloth_puzzles.backprop.losses import cross_entropy

VOCABULARY = 128256
H200 = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 * 2**20, total_memory=140 * 2**30,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip


def become_h200():
    """Answer what Inductor asks of a device, and leave out the patterns that are found by running on it."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda device=None: H200
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    for interface in (CudaInterface, CudaInterface.Worker):
        interface.get_device_properties = staticmethod(lambda device=None: H200)
        interface.get_compute_capability = staticmethod(lambda device=None: 90)
    fake_tensor.init_gpu_context = lambda *given: None
    fuse_attention._sfdp_init = misc_patterns._misc_patterns_init = lambda *given: None
    _triton.triton_hash_with_backend = lambda: "none"


def kernels(function, rows, choices=None):
    """The names of the kernels of a compiled loss and its gradient, if the first call has so many rows."""
    shapes = ShapeEnv()
    mode = fake_tensor.FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    like = {
        "logits": torch.empty(rows, VOCABULARY, dtype=torch.bfloat16, device="meta"),
        "labels": torch.empty(rows, dtype=torch.int64, device="meta"),
    }
    sized = []
    for name, one in like.items():
        kinds = [DimDynamic.DUCK, *[DimDynamic.STATIC] * (one.dim() - 1)]  # the number of rows is dynamic
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        sized.append(mode.from_tensor(one, symbolic_context=context, source=LocalSource(name)))
    program = partial(_value_and_gradient, function, Reduction(False, -100), (), True)
    with mode:
        on_cpu, on_gpu = (
            [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device) for one in sized]
            for device in ("cpu", "cuda:0")
        )
        # Autograd asks the device, so the gradient is traced on the CPU, and its graph again on the GPU.
        traced = make_fx(lambda logits, labels: program(logits, labels, (), 1.0)[0], select_decomp_table())(*on_cpu)
        for node in traced.graph.nodes:
            node.kwargs = {k: torch.device("cuda:0") if k == "device" else value for k, value in node.kwargs.items()}
        traced.recompile()
        with torch.no_grad():
            traced = make_fx(lambda *given: (traced(*given),))(*on_gpu)
    chosen = contextlib.nullcontext() if choices is None else V.set_choices_handler(choices)
    folds_nothing = config.patch(joint_graph_constant_folding=False)  # it would run constants on the device
    with V.set_fake_mode(mode), chosen, folds_nothing:
        joint_graph.joint_graph_passes(traced)
        post_grad.post_grad_passes(traced, True)
        graph = GraphLowering(traced, example_inputs=on_gpu, shape_env=shapes)
        with V.set_graph_handler(graph), V.set_debug_handler(mock.MagicMock()):
            graph.run(*on_gpu)
            code, _ = graph.codegen()
    return [
        line.split("(")[0].removeprefix("def ") for line in code.value.splitlines() if line.startswith("def triton_")
    ]


def running_sums(logits, labels):
    z = logits.float()
    return (torch.logsumexp(z, -1) + (z.softmax(-1).cumsum(-1) * 0.5).sin().sum(-1)).sum()


if __name__ == "__main__":
    become_h200()
    found = {"Inductor's, 40 rows": kernels(cross_entropy, 40)}
    for function in (cross_entropy, running_sums):
        for rows in (40, 512):
            choices = tiles._row_choices(VOCABULARY, blocks=False)
            found[f"{function.__name__}, {rows} rows"] = kernels(function, rows, choices)
    print(json.dumps(found))
