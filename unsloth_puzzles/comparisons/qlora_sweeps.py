"""QLoRA steps under many settings, each in a process of its own, kept in one file: too long for a notebook.

    python -m unsloth_puzzles.comparisons.qlora_sweeps resources/measurements/c_compile_sweeps.json

The file is {"hardware", "versions", "date", "runs": {name: what `qlora_steps.measure` returns}}. It is saved after each
run; what is there already, from the same machine and versions, is not run again.
"""

import argparse
import dataclasses
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.hardware import Hardware, probe, versions

STEPS = 60
LONGEST = 1024


def lengths(steps: int = STEPS, longest: int = LONGEST) -> list[int]:
    """The longest first, then `steps - 1` others, all different."""
    return [longest, *random.Random(0).sample(range(longest // 8, longest), steps - 1)]


CHECKPOINTING = {"without checkpointing": {}, "with checkpointing": {"checkpointing": True}}
BUDGETS = (1.0, 0.7, 0.5, 0.3)  # and 0.9, the default
PARITY = {"batch": 2, "lengths": lengths()}
KERNELS = ("flash", "efficient", "cudnn")  # of SDPA; uncompiled runs differ by as much as these make them
RUNS = {
    f"{candidate}, {name}": {"candidate": candidate, **given}
    for name, given in CHECKPOINTING.items()
    for candidate in ("eager", "compiled")
}
RUNS |= {f"compiled, budget {kept}": {"candidate": "compiled", "activation_memory_budget": kept} for kept in BUDGETS}
RUNS |= {f"parity, eager, {kernel}": {"candidate": "eager", "sdpa": kernel, **PARITY} for kernel in KERNELS}
RUNS |= {"parity, compiled": {"candidate": "compiled", **PARITY}}


def load_or_measure(path: str | os.PathLike, runs: dict[str, dict], hardware: Hardware | None = None) -> dict:
    """The file's content, of whatever hardware it says; without a file `measure` is called."""
    return json.loads(Path(path).read_text()) if Path(path).exists() else measure(path, runs, hardware)


def measure(path: str | os.PathLike, runs: dict[str, dict], hardware: Hardware | None = None) -> dict:
    """Make the runs that the file at `path` lacks, one after the other; a run that fails is kept with its error."""
    path = Path(path)
    here = {"hardware": dataclasses.asdict(hardware or probe(measure=False)), "versions": versions()}
    found = json.loads(path.read_text()) if path.exists() else {}
    same = found and (found["hardware"]["name"], found["versions"]) == (here["hardware"]["name"], here["versions"])
    content = {**here, "date": datetime.date.today().isoformat(), "runs": found["runs"] if same else {}}
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, settings in runs.items():
        if "error" in content["runs"].get(name, {"error": "not run"}):
            content["runs"][name] = run(settings)
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
        print(f"{name}: {summary(content['runs'][name])}", flush=True)
    return content


def run(settings: dict) -> dict:
    """One run in a process of its own, or {"error": its last line}."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "steps.json")
        command = [sys.executable, "-m", "unsloth_puzzles.comparisons.qlora_steps", "--out", str(out)]
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            command += [flag] if value is True else [flag, text] if value is not None and value is not False else []
        done = subprocess.run(command, env=child.environment(), capture_output=True, text=True, check=False)
        if done.returncode or not out.exists():
            lines = (done.stderr or done.stdout).strip().splitlines()
            return {"error": lines[-1] if lines else f"ended with {done.returncode}"}
        return json.loads(out.read_text())


def step_ms(run: dict) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile of the second half of the steps: compiled and warm."""
    times = run["step_ms"][len(run["step_ms"]) // 2 :]
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return statistics.median(times), tenths[0], tenths[-1]


def summary(run: dict) -> str:
    """A line about a run."""
    if "error" in run:
        return f"failed: {run['error']}"
    memory = "" if run["peak_gib"] is None else f", {run['peak_gib']:.2f} GiB"
    compiled = f", {len(run['compilations'])} compilations in {run['compile_seconds']:.0f} s"
    return f"{step_ms(run)[0]:.1f} ms{memory}{compiled if run['compilations'] else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA steps, eager and compiled, under many settings.")
    parser.add_argument("path", type=Path, help="the JSON file to write, or to complete")
    measure(parser.parse_args().path, RUNS)


if __name__ == "__main__":
    main()
