"""What a rehearsal came to: what counts as an error, a few lines a section, and the summary that is kept."""

import json
from collections.abc import Collection
from pathlib import Path

from tools.t4 import limits

BUDGET = {"A": 180, "C": 360, "D": 435, "E": 480, "B": 60}  # seconds on a T4
EXPECTED = {"A": 14, "C": 9, "D": 8, "E": 10, "B": 0}  # points that one GPU can earn
NOTES = (
    "A rehearsal is evidence, not proof: no T4 was there.",
    "Inductor writes its kernels for the GPU that is there, so kernels that build for sm_75 need not be those of a T4.",
    "Times on a T4 are predicted from this GPU's, by class of kernel; the host is taken to be half as fast.",
    "The longer time lets host and GPU take turns, the shorter one lets them work at once within a cell.",
    "Triton's products in 16 bits are assumed to reach 100 TFLOP/s here, in the tiles made for a T4.",
    "Of A's kernels up to 32 were compiled to be read, not launched.",
    "Each section has the digest of the code that it ran with; sections may have been run at different commits.",
    "Speed-ups are those of this GPU: challenge A's five points for speed would have to be earned again on a T4.",
)


def summarise(out: Path) -> dict[str, object]:
    """All sections that `out` has results of, with versions, points and what a rehearsal does not prove."""
    kept = {name: json.loads((out / f"{name}.json").read_text()) for name in "ABCDE" if (out / f"{name}.json").exists()}
    newest = list(kept.values())[-1] if kept else {}
    dates = sorted({found["date"] for found in kept.values()})
    return {
        "hardware": {"name": newest.get("hardware", "")},
        "date": " to ".join(dict.fromkeys(dates[:1] + dates[-1:])),
        "versions": newest.get("versions", {}),
        "points": sum(found["points"] for found in kept.values()),
        "possible": sum(found["possible"] for found in kept.values()),
        "budget_seconds": BUDGET,
        "sections": kept,
        "notes": list(NOTES),
    }


def errors(found: dict) -> list[str]:
    """Return the errors of the rehearsal in a section's result, a line each."""
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


def predicted(found: dict) -> str:
    """The predicted seconds as text, from the shorter to the longer; empty if there are none."""
    most = found.get("predicted_t4_seconds")
    least = found.get("predicted_t4_seconds_at_least", most)
    if most is None:
        return ""
    return f"{most:.0f} s" if f"{least:.0f}" == f"{most:.0f}" else f"{least:.0f} to {most:.0f} s"


def total_prediction(sections: Collection[dict]) -> dict[str, float]:
    """The sums of both predicted times over sections; nothing if one of them has none."""
    most = [found.get("predicted_t4_seconds") for found in sections]
    if not most or None in most:
        return {}
    least = [found.get("predicted_t4_seconds_at_least", found["predicted_t4_seconds"]) for found in sections]
    return {"predicted_t4_seconds": sum(most), "predicted_t4_seconds_at_least": sum(least)}


def describe(section: str, found: dict) -> str:
    """A few lines about one section."""
    lines = [
        f"== {section}: {found['points']} of {found['possible']} points, {found['wall_seconds']:.0f} s here, "
        f"predicted for a T4 {predicted(found) or 'nothing'} (budget {BUDGET[section]} s)",
        f"   kernels: {found['kernels_seen']} seen, {found['kernels_failed']} do not build for sm_75, "
        f"{found['kernels_over_shared_memory']} take over 64 KiB (largest {found['largest_shared_bytes']} bytes)",
        f"   GPU {found['gpu_peak_gib']:.1f} GiB; set-up {found['setup_seconds']:.0f} s; silent for at most "
        f"{found['longest_silence_seconds']:.0f} s after {found['silent_after']!r} in: {found['silent_cell']}",
        f"   RAM {found['ram_peak_gb']:.1f} GB, without pages of files, in the cell: {found['ram_peak_cell']}; "
        f"at most {found.get('profiler_gb', 0):.1f} GB of it is the profiler's, which a T4 does not run",
        *(f"   ERROR {line[:200]}" for line in found["errors"]),
        *(f"   lost: {criterion}: {why[:200]}" for criterion, why in found["lost"].items()),
    ]
    return "\n".join(lines)
