"""Kernels that Inductor writes for the compiled loss, built for a T4 and an H100 without a GPU: prints those that fail.

python -m tests.classification.loss_kernels

Inductor writes them for the CPU with its Triton backend. A GPU gets the same code.
"""

import importlib.util
import itertools
import re
import tempfile
from pathlib import Path

import torch
import triton
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unsloth_puzzles.classification.losses import MULTI, PROBLEM_TYPES, SINGLE, classification_loss

BATCH, LABELS = 16, 9
CAPABILITIES, TILES, WARPS = (75, 90), (2, 16, 64), (1, 4)
KERNEL = re.compile(r"async_compile\.triton\('(?P<name>\w+)', '''(?P<code>.*?)'''", re.DOTALL)
HEAD = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


class Written(Exception):
    """Ends the compilation when the code is there."""


class Target:
    """A driver that says which GPU to write for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITIES[-1], 32)

    def get_current_device(self) -> int:
        return 0


def kernels_of(problem_type: str, dtype: torch.dtype, weighted: bool, counted: bool) -> list[tuple[str, str]]:
    """Names and codes of the kernels of a forward, for a batch of any size."""
    logits = torch.randn(BATCH, LABELS, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, LABELS, (BATCH,))
    if problem_type != SINGLE:
        labels = torch.randint(0, 2, (BATCH, LABELS)).float()
    weight = torch.rand(LABELS) if weighted else None
    number = torch.tensor(BATCH) if counted else None
    for tensor in (logits, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    found = []

    def keep(graph, code):
        found.extend((each["name"], each["code"]) for each in KERNEL.finditer(code.value))
        raise Written

    GraphLowering._compile_to_module_lines = keep
    torch._dynamo.reset()
    try:
        torch.compile(classification_loss, fullgraph=True)(logits, labels, problem_type, weight, number)
    except Exception:
        if not found:
            raise
    return found


def build(name: str, code: str, folder: str, capability: int, tile: int, warps: int) -> None:
    """Compile a kernel. Raises what Triton raises."""
    signature = eval(re.search(r"'signature': (\{.*?\})", code).group(1))
    body = code[code.index("@triton.jit") :]
    for pointer in re.findall(r"^ +tmp\d+ = (in_ptr\d+)$", body, re.MULTILINE):  # a scalar, which a GPU loads
        body, signature[pointer] = body.replace(f"= {pointer}\n", f"= tl.load({pointer})\n"), "*i64"
    path = Path(folder, f"{name}.py")
    path.write_text(HEAD + body)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reduction = "R0_BLOCK" in signature
    constants = {one: 1 if reduction and one == "XBLOCK" else tile for one in signature if one.endswith("BLOCK")}
    constants |= {one: 1 for one, kind in signature.items() if kind == "constexpr" and not one.endswith("BLOCK")}
    source = ASTSource(getattr(module, name), signature=signature, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def main() -> None:
    config.force_disable_caches, config.cpu_backend = True, "triton"
    triton.runtime.driver.set_active(Target())
    built = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, weighted, counted in itertools.product(PROBLEM_TYPES, (False, True), (False, True)):
            if weighted and kind not in (SINGLE, MULTI):
                continue
            for name, code in kernels_of(kind, torch.float32, weighted, counted):
                for capability, tile, warps in itertools.product(CAPABILITIES, TILES, WARPS):
                    try:
                        build(name, code, folder, capability, tile, warps)
                        built += 1
                    except Exception as error:
                        settings = f"sm_{capability}, tiles of {tile}, {warps} warps"
                        print(f"FAILED: {kind}, weighted {weighted}, counted {counted}, {settings}: {error!r}")
    print(f"{built} kernels built")


if __name__ == "__main__":
    main()
