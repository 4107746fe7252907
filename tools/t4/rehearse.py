"""Run one section of the notebook as a T4 would have to, and say what came of it."""

import dataclasses
import datetime
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT, package_of, text
from tools.run_notebook import FAILURES, run
from tools.t4 import limits, prediction, report, sections, versions
from tools.t4.kernels import MOST_SHARED, Built, compile_recorded
from unsloth_puzzles.bench.code_digest import code_digest
from unsloth_puzzles.bench.record import write_json


def rehearse(section: str, out: Path, seconds: float, gpu: int) -> dict[str, object]:
    """Run a section under the limits, then compile the Triton kernels that it used for sm_75.

    Args:
        section: Its letter.
        out: Gets the section's folder, its compiler caches, what the hook recorded, and SECTION-ran.json, which holds
            the result but for the kernels and the prediction.
        seconds: The most that the section may take.
        gpu: Which GPU, as nvidia-smi numbers them.

    Returns:
        The section's result, which JSON can hold: outcome, digests, peaks, kernels, prediction, errors.
    """
    folder, record = out / section, out / f"{section}-record"
    found = _run(section, folder, record, out, seconds, gpu)
    write_json(out / f"{section}-ran.json", found)
    built = compile_recorded(record, processes=min(8, os.cpu_count() or 1))
    found |= _kernels(built) | _predicted(section, found, folder, record, built, gpu)
    found["errors"] = report.errors(found)
    found["against_colab"] = versions.against_colab(versions.installed(sys.executable), versions.colab())
    found["hardware"], found["versions"] = sections.measured_with(folder)
    found["date"] = datetime.date.today().isoformat()
    return found


def _run(section: str, folder: Path, record: Path, out: Path, seconds: float, gpu: int) -> dict[str, object]:
    """Execute the section in `folder`: its outcome, the digests of its code, and what it used of time and memory."""
    caches = out / f"{section}-caches"
    for place in (folder, record, caches):
        shutil.rmtree(place, ignore_errors=True)
    record.mkdir(parents=True)
    source = out / f"{section}-{NOTEBOOK}"
    source.write_text(text(sections.notebook_of(section)), encoding="utf-8")
    heard = sections.Heard()
    client_class = functools.partial(sections.Client, heard=heard)
    before, began = versions.installed(sys.executable), time.monotonic()
    watched = limits.Watcher(seconds, gpu, where=lambda: heard.cell)
    with watched as watcher, limits.environment(record, caches, gpu), limits.two_cores():
        try:
            run(source, folder, timeout=int(seconds) + 60, client_class=client_class)
        except FAILURES as error:
            print(f"{section} stopped: {str(error).splitlines()[0]}")
    elapsed = time.monotonic() - began
    node = nbformat.read(folder / source.name, as_version=4)
    return {
        "section": section,
        **sections.outcome(section, node, folder, heard.cell_seconds),
        "installed_by_the_notebook": versions.changes(before, versions.installed(sys.executable)),
        "elapsed_seconds": elapsed,
        "stopped": watcher.killed,
        "digest": code_digest(package_of(node)),
        "section_digest": sections.digest(node),
        "gpu_peak_gib": watcher.gpu_gib,
        "ram_peak_gb": watcher.ram_gb,
        "ram_peak_cell": watcher.ram_where,
        "longest_silence_seconds": heard.silence,
        "silent_cell": heard.silent_cell,
        "silent_after": heard.silent_after,
    }


def _kernels(built: list[Built]) -> dict[str, object]:
    """How many kernels were seen, and those that do not build for sm_75 or take too much shared memory."""
    bad = [one for one in built if one.error or one.shared > MOST_SHARED]
    return {
        "kernels_seen": len(built),
        "kernels_failed": sum(bool(one.error) for one in built),
        "kernels_over_shared_memory": sum(one.shared > MOST_SHARED for one in built),
        "kernels_not_decidable": sum(not one.decided for one in built),
        "largest_shared_bytes": max((one.shared for one in built), default=0),
        "bad_kernels": [dataclasses.asdict(one) for one in bad],
    }


def _tracing(gpu: int) -> float:
    """Seconds that the profiler adds to a launch here, measured on two cores; 0 if that fails."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    command = [sys.executable, "-m", "tools.t4.tracing"]
    try:
        with limits.two_cores():
            said = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.SubprocessError:
        return 0.0
    return float(said.stdout)


def _predicted(
    section: str, found: dict, folder: Path, record: Path, built: list[Built], gpu: int
) -> dict[str, object]:
    """Predict a T4's time for the section, from what the hook profiled; None with the reason where that is unknown."""
    rates = sections.measured_rates(folder)
    windows = [json.loads(line) for path in record.glob("profile-*.jsonl") for line in path.read_text().splitlines()]
    broken = [path.read_text().strip() for path in record.glob("broken-*.txt")]
    unseen = [path.read_text().strip() for path in record.glob("unseen-*.txt")]
    if rates is None or not windows or broken:
        reason = broken or "no GPU, or nothing was profiled"
        return {"predicted_t4_seconds": None, "no_prediction": reason, "processes_unseen": unseen}
    dots = {one.name.lstrip("@"): one.dot for one in built if one.dot}
    scale = prediction.scales(*rates)
    predicted = prediction.predict(windows, found["wall_seconds"], dots, scale, _tracing(gpu))
    return {**predicted, "processes_unseen": unseen, "scales": scale, "budget_seconds": report.BUDGET[section]}
