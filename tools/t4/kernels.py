"""The Triton kernels that a rehearsal has recorded, compiled for a T4 without one."""

import contextlib
import io
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

SM = 75
MOST_SHARED = 64 * 1024  # bytes of a program, on sm_75


@dataclass(frozen=True)
class Built:
    """One kernel: bytes of shared memory on sm_75, or why it does not build. `dot`: whether it multiplies matrices, and
    of what ("f16", "f32", "")."""

    name: str
    shared: int
    error: str
    dot: str


def compile_recorded(record: Path, processes: int = 2) -> list[Built]:
    """Every kernel in the folder `record`, compiled for sm_75 in processes of their own."""
    paths = sorted(record.glob("*.ttir"))
    if not paths:
        return []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile, paths, chunksize=4))


def _compile(path: Path) -> Built:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"triton-t4-{os.getpid()}")
    kept, ttir = json.loads(path.with_suffix(".json").read_text()), path.read_text()
    dot = _dot(ttir)
    try:
        import triton
        from triton.backends.compiler import GPUTarget

        with contextlib.redirect_stdout(io.StringIO()):  # which gets the whole program where one does not build
            built = triton.compile(str(path), target=GPUTarget("cuda", SM, 32), options=kept["options"])
    except Exception as error:
        return Built(kept["name"], 0, _reason(str(error).strip() or type(error).__name__), dot)
    return Built(kept["name"], int(built.metadata.shared), "", dot)


def _reason(text: str) -> str:
    """The line of a compiler's message that says what is wrong, without the file that it names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "; error" in line), lines[0])
    return line.partition("; error")[2].lstrip(" :") or line[:300]


def _dot(ttir: str) -> str:
    """The type of the operands of the matrix products in a kernel's TTIR: "f16", "f32", or "" if there are none."""
    lines = [line for line in ttir.splitlines() if "tt.dot " in line]
    if not lines:
        return ""
    return "f16" if any("xf16>" in line or "xbf16>" in line for line in lines) else "f32"
