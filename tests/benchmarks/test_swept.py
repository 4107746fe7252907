"""The table of a sweep in the notebook."""

from pathlib import Path

from benchmarks.swept import swept_table
from tools.build_notebook import ROOT
from unsloth_puzzles.bench.record import Measurements


def test_a_row_a_case_with_hardware_and_date() -> None:
    path = ROOT / "resources/measurements/d_vision_sweeps.json"
    sweeps = Measurements.load(path)
    shown = swept_table(path, "vision_step_ms", "time (ms)", "VisionCollator", 1).splitlines()
    assert shown[0] == f"time (ms), {sweeps.hardware['name']}, {sweeps.date}:"
    assert shown[2] == "| case | VisionCollator | blank images |"
    one = sweeps.find("vision_step_ms")[0]
    assert shown[4] == f"| {one['case']} | {one['value']:.1f} | {one['baselines']['blank images']:.1f} |"
    assert len(shown) == 4 + len(sweeps.find("vision_step_ms"))


def test_a_missing_sweep_is_skipped(tmp_path: Path) -> None:
    assert swept_table(tmp_path / "no_sweeps.json", "a", "b", "ours", 1) == "SKIPPED: no_sweeps.json is not here"
