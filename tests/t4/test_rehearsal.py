"""The limits of a rehearsal, what it predicts, and what it reports as an error."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import torch

from tools.build_notebook import build, written_files
from tools.run_notebook import run
from tools.t4 import __main__ as rehearsal
from tools.t4 import limits, report, sections, tracing
from tools.t4.prediction import BYTES, COPIES, DOTS16, LATENCY_US, PRODUCTS16, PRODUCTS32, kind, predict, scales

GOOD = {
    "cells_in_error": [], "failed": [], "bad_kernels": [], "gpu_peak_gib": 14.5, "ram_peak_gb": 12.0,
    "ram_peak_cell": "x = 1", "silent_cell": "x = 1", "silent_after": "", "section": "D", "points": 8,
    "kernels_seen": 1, "kernels_not_decidable": 0,
    "predicted_t4_seconds": 1.0, "longest_silence_seconds": 30.0, "stopped": False, "elapsed_seconds": 1.0,
    "processes_unseen": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nvjet_hsh_192x192_64x4_1x2_h_bz_coopA_NNT", PRODUCTS16),
        ("sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize128x128x32", PRODUCTS16),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_f16_s161616gemm_f16>", PRODUCTS16),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_nn_align1>", PRODUCTS32),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n", PRODUCTS32),
        ("flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", PRODUCTS16),
        ("fmha_cutlassF_f32_aligned_64x64_rf_sm80", PRODUCTS32),
        ("triton_tem_fused_flex_attention_0", DOTS16),
        ("triton_tem_fused_mm_3", PRODUCTS32),
        ("triton_poi_fused_add_1", BYTES),
        ("dequantize_nf4_kernel", BYTES),
        ("Memcpy HtoD (Pinned -> Device)", COPIES),
        ("Memcpy DtoD (Device -> Device)", BYTES),
        ("Memset (Device)", BYTES),
    ],
)
def test_kernel_names_have_a_class(name, expected):
    dots = {"triton_tem_fused_flex_attention_0": "f16", "triton_tem_fused_mm_3": "f32"}
    assert kind(name, dots) == expected


def test_prediction_scales_each_class_beyond_the_latency():
    scale = scales(2.7e12, {"float16": 750e12, "float32": 60e12})
    assert scale == {COPIES: 2, PRODUCTS16: 30, PRODUCTS32: 10, DOTS16: pytest.approx(100 / 6), BYTES: 10}
    windows = [
        {
            "window": "x = 1\ny",
            "kernels": {"nvjet_hsh": [10, 10 * (LATENCY_US + 100)]},
            "hook_seconds": 1.0,
            "profiler_bytes": 3 * 10**9,
            "wall_seconds": 2.0,
        },
        {
            "window": "z",
            "kernels": {"nvjet_hsh": [1, 1.0], "fill": [2, 2 * LATENCY_US + 50]},
            "hook_seconds": 0.5,
            "profiler_bytes": 0,
            "wall_seconds": 3.0,
        },
    ]
    for window, notebook in zip(windows, (True, False), strict=True):
        window["notebook"] = notebook
    found = predict(windows, 10.0, {}, scale, tracing=0.1)
    assert found["profiler_gb"] == 3
    there = (11 * LATENCY_US - 1 + 30 * 1000) / 1e6, (2 * LATENCY_US + 10 * 50) / 1e6
    assert found["gpu_seconds_t4"] == pytest.approx({PRODUCTS16: there[0], BYTES: there[1]})
    host = 10 - 1.5 - 10 * 0.1 - sum(found["gpu_seconds_here"].values())  # 10 launches of the notebook's own
    assert found["tracing_seconds"] == pytest.approx(1.0)
    assert found["host_seconds_here"] == pytest.approx(host) and found["launches"] == 13
    assert found["predicted_t4_seconds"] == pytest.approx(2 * host + sum(there))
    hidden = (10 * LATENCY_US + 30 * 1000) / 1e6  # the notebook's kernels, beside 1 s of its host
    assert found["predicted_t4_seconds_at_least"] == pytest.approx(2 * host + sum(there) - hidden)
    assert found["gpu_seconds_t4_of_windows"] == pytest.approx({"x = 1": 0.0, "z": 0.0}, abs=0.04)


@pytest.mark.parametrize(("traced", "expected"), [(3.0, 0.2), (0.5, 0.0)])
def test_tracing_is_the_profilers_share_of_a_launch(traced, expected, monkeypatch):
    """A clock that goes on by 1 s without the profiler and by `traced` under it, for ten launches."""
    clock, step, zeros = [0.0], [1.0], torch.zeros

    @contextlib.contextmanager
    def profile(**options):
        step[0] = traced
        yield
        step[0] = 1.0

    def tick():
        clock[0] += step[0]
        return clock[0]

    monkeypatch.setattr(torch, "zeros", lambda *sizes, device: zeros(*sizes))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.autograd.profiler, "profile", profile)
    monkeypatch.setattr(tracing.time, "perf_counter", tick)
    assert tracing.seconds_per_launch(launches=10) == pytest.approx(expected)


def test_prediction_counts_no_host_time_when_the_gpu_was_busy():
    window = {"window": "fill it", "notebook": True, "kernels": {"fill": [1, 9e6]}}
    window |= {"hook_seconds": 0, "wall_seconds": 5.0, "profiler_bytes": 0}
    found = predict([window], 5.0, {}, dict.fromkeys((BYTES,), 10.0))
    assert found["host_seconds_here"] == 0 and found["gpu_seconds_t4_of_windows"] == {"fill it": 90.0}
    assert found["predicted_t4_seconds"] == pytest.approx(90, rel=1e-4)
    assert found["predicted_t4_seconds_at_least"] == found["predicted_t4_seconds"]


def test_prediction_lets_the_host_hide_behind_the_gpu_within_a_cell_only():
    wall = {"hook_seconds": 0.0, "wall_seconds": 4.0, "profiler_bytes": 0}
    busy = {"window": "busy", "notebook": True, "kernels": {"fill": [0, 1e6]}, **wall}  # host 3 s, GPU 1 s
    other = {"window": "-m child", "notebook": False, "kernels": {"fill": [0, 1e6]}, **wall}
    found = predict([busy, other], 10.0, {}, dict.fromkeys((BYTES,), 20.0))
    assert found["predicted_t4_seconds"] == 2 * 8 + 2 * 20
    assert found["predicted_t4_seconds_at_least"] == 2 * 8 + 2 * 20 - 2 * 3  # the host of the cell


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"gpu_peak_gib": 14.51}, "GiB of GPU memory"),
        ({"ram_peak_gb": 12.1}, "GB of RAM"),
        ({"longest_silence_seconds": 31}, "s of silence"),
        ({"cells_in_error": ["cell 3"]}, "cell 3"),
        ({"failed": ["FAILED: x"]}, "FAILED: x"),
        ({"stopped": True}, "stopped after"),
        ({"points": 3}, "3 points, 8 can be earned"),
        ({"kernels_seen": 0}, "no Triton kernel was recorded"),
        ({"kernels_not_decidable": 2}, "2 kernels could not be recorded"),
        ({"predicted_t4_seconds": None}, "no prediction"),
        ({"processes_unseen": ["-m a_child"]}, "not in the prediction: -m a_child"),
        ({"gpu_peak_gib": 0.0}, "memory could not be read"),
        ({"bad_kernels": [{"name": "k", "error": "", "shared": 70000}]}, "kernel k: 70000 bytes"),
        (
            {"bad_kernels": [{"name": "k", "error": "no such instruction", "shared": 0}]},
            "kernel k: no such instruction",
        ),
    ],
)
def test_errors_name_each_limit_that_was_passed(changed, said):
    found = report.errors({**GOOD, **changed})
    assert found == [] if said is None else len(found) == 1 and said in found[0]


@pytest.mark.parametrize("section", sorted(set(sections.SECTIONS) - {"B"}))
def test_section_writes_every_file_and_has_no_cell_of_another(section):
    node = sections.notebook_of(section)
    sources = [cell.source for cell in node.cells]
    assert sources[0] == sections.FIRST_CELL and not any(
        cell.cell_type == "markdown" and not cell.id for cell in node.cells
    )
    assert set(written_files(node)) == set(written_files(build()))
    ids = {cell.id for cell in node.cells}
    others = {name for key, name in sections.SECTIONS.items() if key != section}
    assert any(name.startswith(sections.SECTIONS[section]) for name in ids)
    assert not any(name.startswith(other) for name in ids for other in others)


def test_section_digest_covers_files_and_cells():
    node = sections.notebook_of("D")
    before, cell = sections.digest(node), [cell for cell in node.cells if cell.cell_type == "code"][-1]
    cell.source += "  # a comment"
    assert sections.digest(node) == before
    cell.source += "\nprint(1)"
    after = sections.digest(node)
    written = next(cell for cell in node.cells if "of benchmarks/" in cell.source)  # files that no other cell writes
    written.source += "\nx = 1"
    assert len({before, after, sections.digest(node)}) == 3


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        ({}, ""),
        ({"A": "2026-11-30"}, "2026-11-30"),
        ({"A": "2026-12-01", "E": "2026-11-30"}, "2026-11-30 to 2026-12-01"),
    ],
)
def test_summary_says_between_which_dates_its_sections_ran(tmp_path, dates, expected):
    for section, date in dates.items():
        (tmp_path / f"{section}.json").write_text(json.dumps({"date": date, "points": 2, "possible": 3}))
    summary = report.summarise(tmp_path)
    assert summary["date"] == expected and summary["points"] == 2 * len(dates)


def test_client_finds_the_longest_silence(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("import time\nfor _ in range(4):\n    time.sleep(0.3)\n    print('.', flush=True)"),
        nbformat.v4.new_code_cell("print('slow', flush=True)\ntime.sleep(1.0)"),
    ]
    source, heard = tmp_path / "small.ipynb", sections.Heard()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), source)
    run(source, tmp_path / "run", client_class=functools.partial(sections.Client, heard=heard))
    assert 0.9 < heard.silence < 3 and heard.silent_cell == "print('slow', flush=True)"
    assert heard.silent_after == "slow"
    assert len(heard.cell_seconds) == 2 and max(heard.cell_seconds.values()) > 1


def test_watcher_kills_the_process_tree_when_time_is_up():
    sleep = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}]); {sleep}"
    with limits.Watcher(seconds=1.5, interval=0.3) as watcher:
        process = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(0.8)
        started = [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
        process.wait(20)
        time.sleep(0.5)
    assert watcher.killed and len(started) == 2
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started)
    assert watcher.ram_gb > 0.005


def test_watcher_adds_up_the_memory_of_all_children():
    code = "x = bytearray(200_000_000); import time; time.sleep(60)"
    cells = ["x = 1"]
    with limits.Watcher(seconds=120, interval=0.2, where=lambda: cells[-1]) as watcher:
        cells.append("x = bytearray")
        processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        end = time.monotonic() + 30
        while watcher.ram_gb <= 0.4 and time.monotonic() < end:
            time.sleep(0.1)
        for process in processes:
            process.kill()
            process.wait()
    assert 0.4 < watcher.ram_gb < 0.8 and watcher.ram_where == "x = bytearray" and not watcher.killed


def test_ram_that_can_be_given_back_does_not_count(tmp_path):
    """Pages of a file, read by a mapping, against as many of the process's own."""
    (tmp_path / "file").write_bytes(bytes(64 * 2**20))
    code = (
        "import mmap, sys, time; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); "
        "read = sum(m[::4096]); own = bytearray(32 * 2**20); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "file"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    ours, of_all = limits.ram_bytes(psutil.Process(process.pid)), psutil.Process(process.pid).memory_info().rss
    process.kill()
    process.wait()
    assert 32 * 2**20 < ours < 64 * 2**20 and of_all - ours > 60 * 2**20


def test_two_cores_limits_child_processes_and_is_undone():
    before = os.sched_getaffinity(0)
    with limits.two_cores():
        code = "import os; print(len(os.sched_getaffinity(0)))"
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(inside) == min(2, len(before)) and os.sched_getaffinity(0) == before


def test_resume_runs_only_sections_of_other_code(tmp_path, monkeypatch, capsys):
    made = []

    def rehearse(section, out, seconds, gpu):
        made.append(section)
        result = dict(GOOD) | {"points": 1, "possible": 2, "wall_seconds": 1, "kernels_seen": 0, "kernels_failed": 0}
        result |= {"kernels_over_shared_memory": 0, "largest_shared_bytes": 0, "setup_seconds": 1, "lost": {}}
        return result | {
            "errors": ["bad"] if section == "C" else [],
            "hardware": "NVIDIA Test",
            "date": "2026-11-28",
            "section_digest": "now",
        }

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    monkeypatch.setattr(rehearsal, "today", lambda section: "now")
    options = ["--out", str(tmp_path), "--keep", str(tmp_path / "kept.json")]
    assert rehearsal.main(["--sections", "A,D", *options]) == 0
    assert rehearsal.main(["--sections", "A,C,D", "--resume", *options]) == 1
    assert made == ["A", "D", "C"]
    older = json.loads((tmp_path / "A.json").read_text()) | {"section_digest": "before"}
    (tmp_path / "A.json").write_text(json.dumps(older))
    rehearsal.main(["--sections", "A,D", "--resume", *options])
    assert made == ["A", "D", "C", "A"]  # of other code, so once more
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert sorted(kept["sections"]) == ["A", "C", "D"] and kept["points"] == 3 and kept["notes"]
    assert "C: 1 of 2 points" in capsys.readouterr().out


def test_environment_is_set_and_restored(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "mine")
    before = dict(os.environ)
    with limits.environment(tmp_path, tmp_path / "caches", 1):
        assert os.environ["UNSLOTH_PUZZLES_REHEARSAL"] == "T4" and os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        assert os.environ["PYTHONPATH"] == f"{limits.HOOK}{os.pathsep}mine"
        assert str(tmp_path / "caches") in os.environ["TRITON_CACHE_DIR"]
    assert dict(os.environ) == before
