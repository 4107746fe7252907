"""The table of a sweep in the notebook."""

from pathlib import Path

from benchmarks.swept import swept_table
from tools.build_notebook import ROOT
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements


def test_a_row_a_case_with_hardware_and_date() -> None:
    path = ROOT / "resources/measurements/d_vision_sweeps.json"
    sweeps = Measurements.load(path)
    shown = swept_table(path, "vision_step_ms", "time (ms)", "VisionCollator", 1).splitlines()
    assert shown[0] == f"time (ms), {sweeps.hardware['name']}, {sweeps.date}:"
    assert shown[2] == "| case | VisionCollator | blank images |"
    one = sweeps.find("vision_step_ms")[0]
    ours = f"{one['value']:.1f} ({one['low']:.1f} to {one['high']:.1f})"
    assert shown[4] == f"| {one['case']} | {ours} | {one['baselines']['blank images']:.1f} |"
    assert len(shown) == 4 + len(sweeps.find("vision_step_ms"))


def test_a_value_without_a_range_stands_alone(tmp_path: Path) -> None:
    sweeps = Measurements(tmp_path / "swept.json", probe(measure=False))
    sweeps.add("score", "a case", 0.5, "fraction", baselines={"other": 0.25})
    sweeps.save()
    assert swept_table(tmp_path / "swept.json", "score", "score", "ours", 2).endswith("| a case | 0.50 | 0.25 |")


def test_a_missing_sweep_is_skipped(tmp_path: Path) -> None:
    shown = swept_table(tmp_path / "no_sweeps.json", "a", "b", "ours", 1)
    assert shown == "SKIPPED: no_sweeps.json is not here; make sweeps writes it"
