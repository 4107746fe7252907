"""The Triton kernels that a rehearsal has recorded, compiled for a T4 without one.

python -m tools.t4.kernels FILE...    what `compile_recorded` starts: a JSON line a kernel
"""

import contextlib
import dataclasses
import io
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from tools.build_notebook import ROOT

SM = 75
MOST_SHARED = 64 * 1024  # bytes of a program, on sm_75
SECONDS = 60.0  # a kernel
_BATCH = 8  # kernels a process


@dataclass(frozen=True)
class Built:
    """One kernel, compiled for sm_75.

    Attributes:
        name: Of its function.
        shared: Bytes of shared memory of a program.
        error: Why it does not build, or an empty text.
        dot: Of what it multiplies matrices, "f16" or "f32"; an empty text if it does not.
        decided: False for one that could not be recorded, of which nothing is known.
    """

    name: str
    shared: int = 0
    error: str = ""
    dot: str = ""
    decided: bool = True


def compile_recorded(record: Path, processes: int = 2, seconds: float = SECONDS) -> list[Built]:
    """Compile every recorded kernel for sm_75.

    Args:
        record: The folder that the hook wrote to.
        processes: How many compile at the same time.
        seconds: The most that a kernel may take. One that takes longer, or ends its process, does not build.

    Returns:
        The kernels in the order of their names.
    """
    batches: queue.SimpleQueue = queue.SimpleQueue()
    paths = sorted(path for path in record.glob("*.json") if path.with_suffix(".ttir").exists())
    for start in range(0, len(paths), _BATCH):
        batches.put(paths[start : start + _BATCH])
    built = [Built(json.loads(path.read_text())["name"], decided=False) for path in record.glob("unrecorded-*.json")]

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                batch = batches.get_nowait()
                while batch:
                    done = _compile_in_a_process(batch, seconds)
                    built.extend(done)
                    batch = batch[len(done) :]

    threads = [threading.Thread(target=work) for _ in range(max(1, processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(built, key=lambda one: one.name)


def _compile_in_a_process(paths: list[Path], seconds: float) -> list[Built]:
    """The kernels that one process came to; the last of them is the one that ended it, if one did."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "T4_RECORD")}
    done: list[Built] = []
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "tools.t4.kernels", *map(str, paths)]
        environment = {**kept, "TRITON_CACHE_DIR": cache}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        while len(done) < len(paths):
            limit = threading.Timer(seconds, process.kill)  # some kernels unroll into code that takes hours to build
            limit.start()
            line = process.stdout.readline()
            limit.cancel()
            if not line:
                break
            if line.startswith("{"):  # and no word of a compiler
                done.append(Built(**json.loads(line)))
        process.stdout.close()
        status = process.wait()
    if len(done) < len(paths):
        kept_path = paths[len(done)]
        how = f"took longer than {seconds:.0f} s" if status == -9 else f"ended with status {status}"
        name, dot = json.loads(kept_path.read_text())["name"], _dot(kept_path.with_suffix(".ttir").read_text())
        done.append(Built(name, error=f"the compiler {how}", dot=dot))
    return done


def compile_one(path: Path) -> Built:
    """Compile one recorded kernel in this process, which must not have TRITON_INTERPRET set."""
    kept, ttir = json.loads(path.read_text()), path.with_suffix(".ttir").read_text()
    name, dot = kept["name"], _dot(ttir)
    try:
        import triton
        from triton.backends.compiler import GPUTarget

        target = GPUTarget("cuda", SM, 32)
        with contextlib.redirect_stdout(io.StringIO()):  # which gets the whole program where one does not build
            built = triton.compile(str(path.with_suffix(".ttir")), target=target, options=kept["options"])
    except Exception as error:
        return Built(name, error=_reason(str(error).strip() or type(error).__name__), dot=dot)
    return Built(name, shared=int(built.metadata.shared), dot=dot)


def _reason(text: str) -> str:
    """The line of a compiler's message that says what is wrong, without the file that it names."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "; error" in line), lines[0])
    return (line.partition("; error")[2].lstrip(" :") or line)[:300]


def _dot(ttir: str) -> str:
    """The type of the operands of the first matrix product in a kernel's TTIR: "f16", "f32", or "" without one."""
    found = re.search(r"\btt\.dot\b.*?:\s*tensor<[\dx]+x(\w+)", ttir)
    if found is None:
        return ""
    return "f32" if found[1] == "f32" else "f16"


def main(*names: str) -> None:
    for name in names:
        print(json.dumps(dataclasses.asdict(compile_one(Path(name)))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
