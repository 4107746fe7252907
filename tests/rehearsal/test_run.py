"""A rehearsal of a tiny notebook on a CPU: limits, silence, resume, and the report's errors."""

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from tools.rehearsal import __main__ as rehearsal
from tools.rehearsal import memory, notebooks, processes, report, versions
from tools.run_notebook import output_text

SETUP = "import os\nprint('set-up', os.environ['UNSLOTH_PUZZLES_REHEARSAL'], len(os.sched_getaffinity(0)))"


def test_a_section_runs_alone_once_and_is_resumed(tmp_path: Path) -> None:
    notebook = _notebook(tmp_path, a=["import module", "print('FAILED: check')"], e=["raise KeyError('never')"])
    arguments = ["--dry-run-on-cpu", str(notebook), "--sections", "A", "--out", str(tmp_path / "out"), "--summary"]
    arguments += [str(tmp_path / "rehearsal.json"), "--resume"]
    assert rehearsal.main(arguments) == 1
    entry = json.loads((tmp_path / "rehearsal.json").read_text())["sections"]["A"]
    assert entry["status"] == "finished" and entry["errors"] == ["output: FAILED: check"]
    assert entry["RAM peak GB"] > 0 and "not available" in entry["prediction"]
    executed = nbformat.read(tmp_path / "out/A/run/section.ipynb", as_version=4)
    assert output_text(executed.cells[0]).strip() == "set-up T4 2"
    stamp = (tmp_path / "out/A/ran.json").stat().st_mtime_ns
    rehearsal.main(arguments)
    assert (tmp_path / "out/A/ran.json").stat().st_mtime_ns == stamp


def test_a_section_over_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys, time\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'],"
    child += " start_new_session=True)\nopen('pid', 'w').write(str(p.pid))\ntime.sleep(99)"
    notebook = nbformat.read(_notebook(tmp_path, a=[child]), as_version=4)
    began = time.monotonic()
    ran = rehearsal.rehearse(notebooks.one_section(notebook, "A"), tmp_path / "A", limit=6.0, timed=False)
    assert time.monotonic() - began < 30 and ran["status"] == "stopped after 6 s"
    assert [cell["status"] for cell in ran["cells"]][-1] == "error"
    assert ran["cells"][-1]["silence"] > 1
    assert processes._state(int((tmp_path / "A/run/pid").read_text())) in ("", "Z")


def test_a_folder_that_is_not_of_a_rehearsal_is_not_emptied(tmp_path: Path) -> None:
    notebook = nbformat.read(_notebook(tmp_path, a=["1"]), as_version=4)
    with pytest.raises(ValueError, match="folder"):
        rehearsal.rehearse(notebook, tmp_path, limit=6.0)


def test_exceeded_limits_are_errors(tmp_path: Path) -> None:
    cell = {"id": "a_nf4-0", "group": "A", "first line": "step()", "began": 0.0, "ended": 40.0, "silence": 31.0}
    cell |= {"status": "ok", "installs": False, "FAILED": [], "SKIPPED": ["SKIPPED: no flash attention"]}
    ran = {"status": "finished", "wall seconds": 40.0, "cells": [cell]}
    ran |= {"GPU peak bytes": int(14.6 * 2**30), "RAM peak bytes": int(12.1e9)}
    entry = report.summarize(ran, [], tmp_path, "A")
    assert [line.split(",")[0] for line in entry["errors"]] == [
        "GPU memory of all processes reached 14.6 GiB",
        "RAM of all processes reached 12.1 GB",
        "silent for 31 s",
    ]
    assert entry["SKIPPED outputs"] == cell["SKIPPED"]
    within = ran | {"GPU peak bytes": 14 * 2**30, "RAM peak bytes": 11, "cells": [cell | {"silence": 29.0}]}
    assert report.summarize(within, [], tmp_path, "A")["errors"] == []


def test_gpu_time_belongs_to_the_cell_in_which_its_window_closed(tmp_path: Path) -> None:
    cells = [
        {"id": name, "group": group, "first line": name, "began": began, "ended": began + 10, "silence": 1.0,
         "status": "ok", "installs": name == "pip", "FAILED": [], "SKIPPED": []}
        for name, group, began in (("pip", "set-up", 0.0), ("step", "A", 10.0))
    ]  # fmt: skip
    window = {"began": 11.0, "ended": 12.0, "hook": 1.0, "busy": 2.0, "launches": 3, "kernels": {"copy": [2, 4e6, 4e6]}}
    lines = [{"opened": "1-1"}, {"opened": "1-2"}, window | {"window": "1-1"}]
    (tmp_path / "record/gpu_time").mkdir(parents=True)
    (tmp_path / "record/gpu_time/1.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{cut off")
    (tmp_path / "measurements").mkdir()
    hardware = {"name": "GPU", "copy_bandwidth": 2.7e12, "matmul_flops": {"float16": 1e14, "float32": 1e13}}
    (tmp_path / "measurements/e_backprop.json").write_text(
        json.dumps({"hardware": hardware, "versions": {}, "date": "2026-01-01", "records": []})
    )
    ran = {"status": "finished", "wall seconds": 20.0, "cells": cells, "GPU peak bytes": 0, "RAM peak bytes": 0}
    entry = report.summarize(ran, [], tmp_path, "A")
    predicted = entry["prediction"]
    assert predicted["predicted T4 seconds"] == pytest.approx(2 * (10 - 2 - 1) + 40)
    assert (predicted["windows lost"], predicted["kernels dropped at least"]) == (1, 1)
    assert entry["prediction of the set-up"]["predicted T4 seconds"] == 0  # all of it is the installation


def test_memory_is_sampled_over_the_tree() -> None:
    used = iter([100, 100, *[350] * 1000])
    sampler = memory.Sampler(lambda: next(used), seconds=0.1)
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(10**8); input()'])"
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
    sampler.start(process.pid, b"")
    time.sleep(1.5)
    sampler.stop()
    processes.kill(process.pid)
    process.wait()
    assert sampler.gpu_peak == 250 and sampler.ram_peak > 1e8


def test_versions_against_colab_and_what_was_changed() -> None:
    wanted = versions.colab()
    assert wanted["torch"] == "2.11.0" and wanted["huggingface-hub"] == "1.27.0"
    assert versions.against_colab({"torch": "2.11.0+cu130"}, {"torch": "2.11.0"})["torch"]["same"]
    lines = versions.changes({"datasets": "4.0.0"}, {"datasets": "5.2.0", "trl": "1.16.0"})
    assert lines == ["datasets 4.0.0 -> 5.2.0", "trl 1.16.0 installed"]


def _notebook(folder: Path, **sections: list[str]) -> Path:
    names = {"a": "a_nf4", "e": "e_backprop"}
    sources = [("00_setup-0", SETUP), ("file-module-py", "%%writefile module.py\nx = 1")]
    sources += [(f"{names[key]}-{n}", source) for key, all_ in sections.items() for n, source in enumerate(all_)]
    sources.append(("z_scorecard-0", "print('end')"))
    cells = [nbformat.v4.new_code_cell(source, id=name) for name, source in sources]
    path = folder / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path
