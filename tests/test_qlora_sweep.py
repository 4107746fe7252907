"""The QLoRA steps of a sweep as tables: which runs are shown, and what their losses are compared with."""

import json

import pytest

from benchmarks.compiled import sweeps
from tools.qlora_sweep import differences, sweep_tables


def run(losses, **given):
    return {
        "losses": losses, "step_ms": [9.0, 4.0, 6.0], "kernels": {}, "peak_gib": 1.5, "pinned_gib": 0.25,
        "compilations": 5, "compile_seconds": 3.0, "profile": False, **given,
    }  # fmt: skip


PARITY = {
    "eager, flash": run([1.0, 2.0]),
    "eager, math": run([1.0, 2.5]),
    "float32": run([1.0, 2.25]),
    "compiled": run([1.125, 2.0]),
}


def written(tmp_path, runs, of=None):
    path = tmp_path / "c_compile_sweeps.json"
    head = {"hardware": {"name": "NVIDIA Z1"}, "date": "2026-01-02", "sources": of or sweeps.sources()}
    versions = dict.fromkeys(("torch", "triton", "bitsandbytes"), "1.0")
    path.write_text(json.dumps({**head, "versions": versions, "runs": runs}))
    return path


def test_differences_leave_a_run_out_of_its_own_comparison() -> None:
    assert differences(PARITY).to_numpy().tolist() == [
        ["eager, flash", "5.0e-01", "2.5e-01"],
        ["eager, math", "5.0e-01", "2.5e-01"],
        ["compiled", "5.0e-01", "2.5e-01"],
    ]
    alone = {name: PARITY[name] for name in ("eager, flash", "float32", "compiled")}
    assert differences(alone).to_numpy().tolist() == [
        ["eager, flash", "-", "2.5e-01"],
        ["compiled", "1.2e-01", "2.5e-01"],
    ]


@pytest.mark.parametrize("lacking", ["float32", "eager"])
def test_differences_need_uncompiled_runs_and_float32(lacking) -> None:
    assert differences({name: one for name, one in PARITY.items() if not name.startswith(lacking)}) is None


def test_profiled_runs_have_a_row_and_others_have_none(tmp_path) -> None:
    profiled = run([1.0], profile=True, kernels={"attention": {"ms": 2.5}, "all else": {"ms": 1.0}})
    runs = {"compiled": profiled, "rehearsal, eager": run([1.0]), "lost": {"error": "out of memory"}}
    where, steps = sweep_tables(written(tmp_path, runs))
    assert "NVIDIA Z1, 2026-01-02" in where and "changed since" not in where
    rows = [line for line in steps.splitlines() if line.startswith("| ")][2:]
    assert rows == ["| compiled | 5.0 (4.2 to 5.8) | 3.5 | 1.50 | 0.25 | 5 | 3 |"]


def test_losses_are_compared_over_the_runs_of_many_lengths(tmp_path) -> None:
    path = written(tmp_path, {f"parity, {name}": one for name, one in PARITY.items()}, of="other code")
    where, losses = sweep_tables(path)
    assert where.endswith("The code has changed since.")
    assert "| compiled | 5.0e-01 | 2.5e-01 |" in losses and "parity" not in losses


def test_missing_sweep_is_said(tmp_path) -> None:
    assert sweep_tables(tmp_path / "none.json") == ["Steps in `none.json`: not measured yet."]
