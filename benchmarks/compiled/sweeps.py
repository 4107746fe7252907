"""QLoRA steps under many settings, each in a process of its own, kept in one file: too long for a notebook.

    python -m benchmarks.compiled.sweeps resources/measurements/c_compile_sweeps.json

The file is {"hardware", "versions", "sources", "date", "runs": {name: what `measure` of `steps`, or of the
"module" that was asked for, returns}}. It is saved after each run. A run that is there already, of the same settings,
sources, machine and versions, is not made again.
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks.compiled.steps import CANDIDATES, step_ms
from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.code_digest import PACKAGE, code_digest, package_files
from unsloth_puzzles.bench.hardware import Hardware, probe, versions
from unsloth_puzzles.bench.record import write_json

STEPS = 60
LONGEST = 1024


def lengths(steps: int = STEPS, longest: int = LONGEST) -> list[int]:
    """The longest first, then `steps - 1` others, all different."""
    return [longest, *random.Random(0).sample(range(longest // 8, longest), steps - 1)]


CHECKPOINTING = {"without checkpointing": {}, "with checkpointing": {"checkpointing": True}}
BUDGETS = (0.5, 0.3)  # and 0.9, the default; 0.7 keeps the same
PARITY = {"batch": 2, "lengths": lengths()}
KERNELS = ("flash", "cudnn", "math")  # of SDPA, those that take grouped heads; uncompiled runs differ by what they do
T4 = {"dtype": "float16", "attention": "sdpa", "memory_gib": 15.0, "batch": 2, "lengths": [1024] * 12}
RUNS = {
    f"{candidate}, {name}": {"candidate": candidate, "profile": True, **given}
    for name, given in CHECKPOINTING.items()
    for candidate in CANDIDATES
}
TRAINER = {f"trainer, {candidate}": {"module": "trainer", "candidate": candidate} for candidate in CANDIDATES}
RUNS |= TRAINER
RUNS |= {f"parity, eager, {kernel}": {"candidate": "eager", "sdpa": kernel, **PARITY} for kernel in KERNELS}
# cuDNN, which "auto" takes on an H200, plans anew for every length: a tenth of a second each (197 ms a step and 128).
RUNS |= {"parity, compiled": {"candidate": "compiled", "attention": "flash", **PARITY}}
RUNS |= {"parity, compiled, rounding once": {**RUNS["parity, compiled"], "eager_rounding": False}}
RUNS |= {"parity, float32": {"candidate": "eager", "dtype": "float32", "weights": "bfloat16", **PARITY}}
RUNS |= {
    "rehearsal, compiled": {"candidate": "compiled", **T4},
    "rehearsal, eager": {"candidate": "eager", **T4},
    "rehearsal, eager, flash": {"candidate": "eager", "sdpa": "flash", **T4},  # how far two uncompiled runs differ
}
TUNED = {"candidate": "compiled", "max_autotune": True}
RUNS |= {
    "compiled, max-autotune": {**TUNED, "profile": True},
    "lengths, max-autotune": {**TUNED, "attention": "flash", **PARITY},
}
RUNS |= {"compiled, rounding once": {"candidate": "compiled", "eager_rounding": False, "profile": True}}
SHORT = {"candidate": "compiled", "lengths": [2048] * 12, "profile": True}
RUNS |= {"compiled, flash": {**SHORT, "attention": "flash"}}
RUNS |= {f"compiled, budget {kept}": {**SHORT, "activation_memory_budget": kept} for kept in BUDGETS}


def measure(
    path: str | os.PathLike, runs: dict[str, dict], hardware: Hardware | None = None, *, together: int = 1
) -> dict:
    """Make the runs that the file at `path` lacks; one that fails is kept with its error.

    together: how many are started, and compile, at the same time. Each is timed alone, while the others wait.
    """
    path = Path(path)
    hardware = hardware or probe(measure=False)
    here = {"hardware": dataclasses.asdict(hardware), "versions": versions(), "sources": sources()}
    found = json.loads(path.read_text()) if path.exists() else {}
    same = found and _identity(found) == _identity(here)
    content = {**here, "date": datetime.date.today().isoformat(), "runs": found["runs"] if same else {}}
    asked = json.loads(json.dumps(runs))
    known = content["runs"]
    lacking = [
        name for name in runs if "error" in known.get(name, {"error": ""}) or known[name]["asked"] != asked[name]
    ]
    for start in range(0, len(lacking), together):
        names = lacking[start : start + together]
        for name, result in zip(names, run([runs[name] for name in names]), strict=True):
            known[name] = {**result, "asked": asked[name], "together": len(names)}
            write_json(path, content)
            print(f"{name}: {summary(known[name])}", flush=True)
    return content


def _identity(content: dict) -> tuple:
    return content["hardware"]["name"], content["versions"], content["sources"]


def sources() -> str:
    """A digest of the files that a run executes: other code would be another measurement."""
    parts = ("attention", "backprop", "compiled", "nf4")
    of_parts = (path for part in parts for path in (PACKAGE / part).glob("*.py"))
    measuring = (Path(__file__).with_name(name) for name in ("clock.py", "model.py", "steps.py", "trainer.py"))
    return code_digest(package_files([*of_parts, *measuring, PACKAGE / "code_object.py"]))


def run(group: list[dict]) -> Iterator[dict]:
    """Runs, each in a process of its own with empty compiler caches; of one that fails {"error": its last line}.

    All start at once; when the last has done the steps that compile, one after the other goes on.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as at_end:
        places = [Path(folder, str(number)) for number in range(len(group))]
        children = [_start(settings, place, len(group)) for settings, place in zip(group, places, strict=True)]
        for process in children:
            at_end.callback(process.kill)
        for process in children:
            while process.stdout.readline() not in ("ready\n", ""):  # "" at the end of one that has failed
                pass
        for process, place in zip(children, places, strict=True):
            process.communicate("\n" if process.poll() is None else None)
            out, said = place / "steps.json", (place / "errors.txt").read_text(errors="replace")
            if process.returncode or not out.exists():
                yield {"error": (said.strip().splitlines() or [f"ended with {process.returncode}"])[-1]}
            else:
                yield _finite(out.read_text())


def _finite(text: str) -> dict:
    """The results in a run's file; {"error": why} where one is NaN or infinite, which no record may hold."""

    def refuse(number: str) -> None:
        raise ValueError(f"results must be finite, got {number}")

    try:
        return json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return {"error": str(error)}


def _start(settings: dict, place: Path, together: int) -> subprocess.Popen:
    place.mkdir()
    settings = {"module": "steps", **settings}
    command = [sys.executable, "-m", f"benchmarks.compiled.{settings.pop('module')}", "--wait"]
    for name, value in {"out": place / "steps.json", **settings}.items():
        flag = f"--{name.replace('_', '-')}"
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        flag = f"--no-{flag[2:]}" if value is False else flag
        command += [flag] if isinstance(value, bool) else [] if value is None else [flag, text]
    environment = child.environment(
        TORCHINDUCTOR_CACHE_DIR=str(place / "inductor"),
        TRITON_CACHE_DIR=str(place / "triton"),
        TORCHINDUCTOR_COMPILE_THREADS=str(max(2, (os.cpu_count() or 1) * 2 // (together + 1))),
    )
    with open(place / "errors.txt", "w", encoding="utf-8") as errors:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def summary(run: dict) -> str:
    """A line about a run."""
    if "error" in run:
        return f"failed: {run['error']}"
    if "step_ms" not in run:
        return f"{len(run['losses'])} losses, {run['compilations']} compilations in {run['compile_seconds']:.0f} s"
    memory = "" if run["peak_gib"] is None else f", {run['peak_gib']:.2f} GiB"
    compiled = f", {run['compilations']} compilations in {run['compile_seconds']:.0f} s"
    return f"{step_ms(run)[0]:.1f} ms{memory}{compiled if run['compilations'] else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA steps, eager and compiled, under many settings.")
    parser.add_argument("path", type=Path, help="the JSON file to write, or to complete")
    path = parser.parse_args().path
    if not torch.cuda.is_available():
        parser.error("these runs need a GPU; the notebook makes small ones on a CPU")
    # Uncompiled runs first: the memory of all at the same time is more than most GPUs have.
    uncompiled = {name: run for name, run in RUNS.items() if run["candidate"] == "eager"}
    for runs in (uncompiled, RUNS):
        measure(path, runs, together=len(RUNS) - len(uncompiled))


if __name__ == "__main__":
    main()
