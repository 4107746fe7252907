"""What a Triton kernel becomes on a GPU that is not here: registers, spills, shared memory, SASS instructions.

    python -m unsloth_puzzles.bench.cross_compile MODULE:FUNCTION

compiles the jobs that FUNCTION returns (a list of dicts: `cross_compile`'s arguments, and a "name") and prints their
reports, one JSON object a line. It needs no GPU. Disassembler and cuobjdump come with Triton.
"""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unsloth_puzzles.bench import child

SECONDS = 600  # for all jobs of a process
ARCHITECTURES = (75, 80, 90, 100, 120)  # T4, A100, H100 and H200, B200, RTX 50

_OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_CONTRACTED = re.compile(r"\bfma\.rn(?:\.ftz)?\.f32\b")


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """One kernel on one architecture.

    `registers` per thread, `spills` in bytes of local memory per thread, `shared` in bytes per program. `instructions`
    counts SASS opcodes with their modifiers ("LDG.E.EF.128") as they stand in the code, without padding: what a thread
    executes, if the code has no loop. `contracted` counts the float32 multiply-adds rounded once, in the PTX.
    """

    name: str
    sm: int
    registers: int
    spills: int
    shared: int
    instructions: dict[str, int]
    ptx: str
    contracted: int

    def count(self, opcode: str = "") -> int:
        """Instructions whose opcode is `opcode`, with any modifiers ("LDG" finds "LDG.E.128"); of all, if empty."""
        return sum(n for found, n in self.instructions.items() if not opcode or f"{found}.".startswith(f"{opcode}."))


def cross_compile(
    kernel: triton.JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    sm: int,
    *,
    num_warps: int = 4,
    divisible: Iterable[str] = (),
    enable_fp_fusion: bool = False,
    name: str | None = None,
    **options: object,
) -> CompileReport:
    """Compile a kernel for an architecture and read the binary.

    Args:
        kernel: A function that `triton.jit` decorated.
        signature: The types of the run-time arguments ({"x_ptr": "*fp16", "n": "i32"}).
        constexprs: The values of all other arguments.
        sm: 10 major + minor of the compute capability.
        num_warps: Of a program.
        divisible: The arguments that are multiples of 16, as Triton finds for itself at a launch.
        enable_fp_fusion: Contract a product and a sum to one rounding.
        name: Of the report, by default the kernel's.
        options: Go to Triton (`num_stages`, `maxnreg`).

    Raises:
        RuntimeError: The kernel was decorated under TRITON_INTERPRET=1.
        ValueError: `signature` and `constexprs` do not name every argument once, or `divisible` is not of `signature`.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"kernel must be a JITFunction, got {type(kernel).__name__}: under TRITON_INTERPRET=1 nothing compiles, "
            "use cross_compile_in_subprocess"
        )
    divisible = tuple(divisible)
    _check_names(kernel.arg_names, signature, constexprs, divisible)
    types = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    attributes = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]] for argument in divisible}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=dict(constexprs), attrs=attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion, **options},
    )
    registers, spills = _resources(compiled.asm["cubin"])
    return CompileReport(
        name=name or kernel.__name__,
        sm=sm,
        registers=registers,
        spills=spills,
        shared=compiled.metadata.shared,
        instructions=_instructions(compiled.asm["cubin"]),
        ptx=compiled.asm["ptx"],
        contracted=len(_CONTRACTED.findall(compiled.asm["ptx"])),
    )


def cross_compile_in_subprocess(spec: str) -> list[CompileReport]:
    """Compile jobs in a process without TRITON_INTERPRET, which imports from where this one does.

    Args:
        spec: "MODULE:FUNCTION", of a function that returns the jobs.

    Returns:
        A report of each job.

    Raises:
        RuntimeError: A job failed. The message holds the end of its output.
    """
    environment = child.environment(without=("TRITON_INTERPRET",))
    try:
        lines = child.run("unsloth_puzzles.bench.cross_compile", spec, timeout=SECONDS, env=environment, show=None)
    except child.ChildError as error:
        raise RuntimeError(f"{spec}: cross-compilation failed: {error}\n{error.output[-4000:]}") from None
    return [CompileReport(**json.loads(line)) for line in lines if line.startswith("{")]


def main(spec: str) -> None:
    """Compile the jobs of "MODULE:FUNCTION" and print a report a line."""
    module, _, function = spec.partition(":")
    if not module or not function:
        raise SystemExit(f"the argument must be MODULE:FUNCTION, got {spec!r}")
    for job in getattr(importlib.import_module(module), function)():
        print(json.dumps(dataclasses.asdict(cross_compile(**job))), flush=True)


def _check_names(arguments: list[str], signature: Mapping, constexprs: Mapping, divisible: tuple) -> None:
    given = [*signature, *constexprs]
    if sorted(given) != sorted(arguments):
        missing, unknown = set(arguments) - set(given), set(given) - set(arguments)
        twice = set(signature) & set(constexprs)
        raise ValueError(
            "signature and constexprs must name every argument of the kernel once, "
            f"got missing {sorted(missing)}, unknown {sorted(unknown)}, in both {sorted(twice)}"
        )
    if not set(divisible) <= set(signature):
        raise ValueError(f"divisible must be names of the signature, {sorted(signature)}, got {sorted(divisible)}")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread. Triton knows no local arrays: local memory is spills."""
    text = _tool("cuobjdump", cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage: no resource usage in its output:\n{text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _instructions(cubin: bytes) -> dict[str, int]:
    counts = Counter(_OPCODE.findall(_tool("nvdisasm", cubin, "-c")))
    counts.pop("NOP", None)
    if not counts:
        raise RuntimeError("nvdisasm: no instruction in its output")
    return dict(counts.most_common())


def _tool(name: str, cubin: bytes, *flags: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [getattr(triton.knobs.nvidia, name).path, *flags, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit status {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
