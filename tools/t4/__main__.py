"""Rehearse a T4 on the GPU that is here, section by section.

    python -m tools.t4 [--sections A,E,C,D] [--out build/rehearsal] [--resume] [--keep PATH]

Each section runs in a kernel and an empty folder of its own: the package is told that the compute capability is 7.5
(libraries are told the truth), two CPU cores, 14.5 GiB of GPU memory, empty compiler caches. Every Triton kernel that
any process compiles is compiled for sm_75 afterwards. What came of it is written to OUT/SECTION.json after each section
and, together, to PATH. Exits 1 if anything is in `errors`.
"""

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT, package_of, text
from tools.run_notebook import FAILURES, run
from tools.t4 import limits, prediction, sections, versions
from tools.t4.kernels import MOST_SHARED, compile_recorded
from unsloth_puzzles.bench.code_digest import code_digest
from unsloth_puzzles.device import REHEARSAL

BUDGET = {"A": 180, "C": 360, "D": 120, "E": 480, "B": 60}  # seconds on a T4
EXPECTED = {"A": 14, "C": 9, "D": 4, "E": 10, "B": 0}  # points that one GPU can earn so far
HOOK = Path(__file__).parent / "hook"
NOTES = (
    "A rehearsal is evidence, not proof: no T4 was there.",
    "Inductor writes its kernels for the GPU that is there, so kernels that build for sm_75 need not be those of a T4.",
    "Times on a T4 are predicted from this GPU's, by class of kernel; the host is taken to be half as fast.",
    "Triton's products in 16 bits are assumed to reach 100 TFLOP/s here, in the tiles made for a T4.",
    "Of A's kernels up to 32 were compiled to be read, not launched.",
    "Each section has the digest of the code that it ran with; sections may have been run at different commits.",
    "Speed-ups are those of this GPU: challenge A's five points for speed would have to be earned again on a T4.",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rehearse a T4.")
    parser.add_argument("--sections", default="A,E,C,D")
    parser.add_argument("--out", type=Path, default=ROOT / "build/rehearsal")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the sections that OUT has results of this code of"
    )
    parser.add_argument("--keep", type=Path, default=ROOT / "resources/measurements/rehearsal.json")
    parser.add_argument("--seconds", type=float, default=limits.SECONDS, help="the most that a section may take")
    parser.add_argument("--gpu", type=int, default=0, help="which GPU, as nvidia-smi numbers them")
    options = parser.parse_args(arguments)
    for section in options.sections.split(","):
        result = options.out / f"{section}.json"
        if options.resume and result.exists() and json.loads(result.read_text())["section_digest"] == today(section):
            print(f"{section}: there already")
            continue
        found = rehearse(section, options.out, options.seconds, options.gpu)
        result.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(describe(section, found), flush=True)
    summary = summarise(options.out)
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    options.keep.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return 1 if any(found["errors"] for found in summary["sections"].values()) else 0


def today(section: str) -> str:
    """The digest of the code that a section would run with."""
    return sections.digest(sections.notebook_of(section))


def rehearse(section: str, out: Path, seconds: float, gpu: int) -> dict[str, object]:
    """Run one section under the limits; what came of it, as JSON."""
    folder, record = out / section, out / f"{section}-record"
    for place in (folder, record, out / f"{section}-caches"):
        shutil.rmtree(place, ignore_errors=True)
    record.mkdir(parents=True)
    source = out / f"{section}-{NOTEBOOK}"
    source.write_text(text(sections.notebook_of(section)), encoding="utf-8")
    clients: list[sections.Client] = []

    class Client(sections.Client):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            clients.append(self)

    before, began = versions.installed(sys.executable), time.monotonic()
    with limits.Watcher(seconds, gpu) as watcher, _environment(record, out / f"{section}-caches", gpu), _two_cores():
        try:
            run(source, folder, timeout=int(seconds) + 60, client_class=Client)
        except FAILURES as error:
            print(f"{section} stopped: {str(error).splitlines()[0]}")
    elapsed = time.monotonic() - began
    node = nbformat.read(folder / source.name, as_version=4)
    changed = versions.changes(before, versions.installed(sys.executable))
    (client,) = clients
    found = {"section": section, **sections.outcome(section, node, folder, client.cell_seconds)}
    found |= {"installed_by_the_notebook": changed}
    found |= {"elapsed_seconds": elapsed, "stopped": watcher.killed, "section_digest": sections.digest(node)}
    found |= {"digest": code_digest(package_of(node))}
    found |= {"gpu_peak_gib": watcher.gpu_gib, "ram_peak_gb": watcher.ram_gb}
    found |= {"longest_silence_seconds": client.silence, "silent_cell": client.silent_cell}
    (out / f"{section}-ran.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    built = compile_recorded(record, processes=min(8, os.cpu_count() or 1))
    bad = [one for one in built if one.error or one.shared > MOST_SHARED]
    found |= {
        "kernels_seen": len(built),
        "kernels_failed": sum(bool(one.error) for one in built),
        "kernels_over_shared_memory": sum(one.shared > MOST_SHARED for one in built),
        "kernels_not_decidable": sum(not one.decided for one in built),
        "largest_shared_bytes": max((one.shared for one in built), default=0),
        "bad_kernels": [dataclasses.asdict(one) for one in bad],
    }
    found |= _predicted(section, found, folder, record, built)
    found["errors"], found["versions"] = errors(found), sections.versions_of(folder)
    found["against_colab"] = versions.against_colab(versions.installed(sys.executable), versions.colab())
    found["hardware"], found["date"] = _hardware(folder), datetime.date.today().isoformat()
    return found


def errors(found: dict) -> list[str]:
    """What of a section's result is an error of the rehearsal, a line each."""
    lines = [f"cell: {line}" for line in found["cells_in_error"]] + [f"failed: {line}" for line in found["failed"]]
    lines += [
        f"kernel {one['name']}: {one['error'] or str(one['shared']) + ' bytes of shared memory'}"
        for one in found["bad_kernels"]
    ]
    for name, most, unit in (
        ("gpu_peak_gib", limits.GPU_GIB, "GiB of GPU memory"),
        ("ram_peak_gb", limits.RAM_GB, "GB of RAM"),
        ("longest_silence_seconds", limits.SILENCE, "s of silence in one cell"),
    ):
        if found[name] > most:
            lines.append(f"{found[name]:.1f} {unit}, at most {most} are allowed")
    if found["points"] < EXPECTED[found["section"]]:
        lines.append(f"{found['points']} points, {EXPECTED[found['section']]} can be earned")
    if not found["kernels_seen"]:
        lines.append("no Triton kernel was recorded: the hook did not work")
    if found["kernels_not_decidable"]:
        lines.append(f"{found['kernels_not_decidable']} kernels could not be recorded, so nothing is known of them")
    if found["predicted_t4_seconds"] is None:
        lines.append(f"no prediction: {found.get('no_prediction')}")
    lines += [f"not in the prediction: {name}" for name in found["processes_unseen"]]
    if not found["gpu_peak_gib"]:
        lines.append("the GPU's memory could not be read")
    if found["stopped"]:
        lines.append(f"stopped after {found['elapsed_seconds']:.0f} s")
    return lines


def describe(section: str, found: dict) -> str:
    """A few lines about one section."""
    predicted = found.get("predicted_t4_seconds")
    lines = [
        f"== {section}: {found['points']} of {found['possible']} points, {found['wall_seconds']:.0f} s here, "
        f"predicted for a T4 {'nothing' if predicted is None else f'{predicted:.0f} s'} (budget {BUDGET[section]} s)",
        f"   kernels: {found['kernels_seen']} seen, {found['kernels_failed']} do not build for sm_75, "
        f"{found['kernels_over_shared_memory']} take over 64 KiB (largest {found['largest_shared_bytes']} bytes)",
        f"   GPU {found['gpu_peak_gib']:.1f} GiB, RAM {found['ram_peak_gb']:.1f} GB, silent for at most "
        f"{found['longest_silence_seconds']:.0f} s; set-up {found['setup_seconds']:.0f} s",
        *(f"   ERROR {line[:200]}" for line in found["errors"]),
        *(f"   lost: {criterion}: {why[:200]}" for criterion, why in found["lost"].items()),
    ]
    return "\n".join(lines)


def summarise(out: Path) -> dict[str, object]:
    """All sections that `out` has results of, with versions, points and what a rehearsal does not prove."""
    kept = {name: json.loads((out / f"{name}.json").read_text()) for name in "ABCDE" if (out / f"{name}.json").exists()}
    newest = list(kept.values())[-1] if kept else {}
    return {
        "hardware": {"name": newest.get("hardware", "")},
        "date": newest.get("date", ""),
        "versions": newest.get("versions", {}),
        "points": sum(found["points"] for found in kept.values()),
        "possible": sum(found["possible"] for found in kept.values()),
        "budget_seconds": BUDGET,
        "sections": kept,
        "notes": list(NOTES),
    }


def _predicted(section: str, found: dict, folder: Path, record: Path, built: list) -> dict[str, object]:
    rates = sections.measured_rates(folder)
    windows = [json.loads(line) for path in record.glob("profile-*.jsonl") for line in path.read_text().splitlines()]
    broken = [path.read_text().strip() for path in record.glob("broken-*.txt")]
    unseen = [path.read_text().strip() for path in record.glob("unseen-*.txt")]
    if rates is None or not windows or broken:
        reason = broken or "no GPU, or nothing was profiled"
        return {"predicted_t4_seconds": None, "no_prediction": reason, "processes_unseen": unseen}
    dots = {one.name.lstrip("@"): one.dot for one in built if one.dot}
    scale = prediction.scales(*rates)
    predicted = prediction.predict(windows, found["wall_seconds"], dots, scale)
    return {**predicted, "processes_unseen": unseen, "scales": scale, "budget_seconds": BUDGET[section]}


@contextmanager
def _environment(record: Path, caches: Path, gpu: int):
    """The variables of the kernel and of all that it starts."""
    before = dict(os.environ)
    config = record / "kineto.conf"
    config.write_text("ACTIVITIES_MAX_GPU_BUFFER_SIZE_MB=2048\n")
    os.environ |= {
        REHEARSAL: "T4",
        "CUDA_VISIBLE_DEVICES": str(gpu),
        "T4_RECORD": str(record.resolve()),
        "PYTHONPATH": os.pathsep.join([str(HOOK), *filter(None, [before.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "KINETO_CONFIG": str(config),
        "KINETO_LOG_LEVEL": "5",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextmanager
def _two_cores():
    """The main thread, and processes that it starts, on two cores; threads that run already keep theirs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _hardware(folder: Path) -> str:
    for path in sorted((folder / "resources/measurements").glob("*.json")):
        return json.loads(path.read_text(encoding="utf-8"))["hardware"]["name"]
    return ""


if __name__ == "__main__":
    sys.exit(main())
