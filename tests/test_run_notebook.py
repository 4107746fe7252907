"""The runner, on notebooks of a few cells: alone in its folder, stopped by an error, cleaned, and judged."""

import base64
import json
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image, ImageChops

from tools import run_notebook
from tools.build_notebook import ROOT
from tools.clean_outputs import INVISIBLE, PNG, clean, smaller
from tools.outputs import LARGEST, output_text, problems, report
from tools.run_notebook import run
from unsloth_puzzles.bench.code_digest import code_digest, package_files


def test_run_executes_a_copy_in_its_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = _notebook(tmp_path, "import os\nprint(sorted(os.listdir()))", "import sys\nprint(sys.executable)")
    folder = tmp_path / "run"
    node = run(source, folder)
    assert output_text(node.cells[0]) == "['small.ipynb']\n"
    assert output_text(node.cells[1]).strip() == sys.executable
    assert nbformat.read(folder / "small.ipynb", as_version=4).cells[0].outputs == node.cells[0].outputs
    assert not nbformat.read(source, as_version=4).cells[0].outputs
    assert "[  1/2]" in capsys.readouterr().out


def test_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    source = _notebook(tmp_path, "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "unsloth_puzzles").mkdir()
    with pytest.raises(ValueError, match="unsloth_puzzles"):
        run(source, tmp_path / "run")


def test_notebook_is_given_sweeps_and_no_other_measurements(tmp_path: Path) -> None:
    measured = tmp_path / "measured"
    measured.mkdir()
    for name in ("e_backprop.json", "e_backprop_sweeps.json"):
        (measured / name).write_text(name)
    source = _notebook(tmp_path, "import os\nprint(os.listdir('resources/measurements'))")
    node = run(source, tmp_path / "run", measured=measured)
    assert output_text(node.cells[0]) == "['e_backprop_sweeps.json']\n"


def test_error_stops_the_run_and_writes_the_notebook(tmp_path: Path) -> None:
    source = _notebook(tmp_path, "print('before')", "raise KeyError('absmax')", "print('after')")
    with pytest.raises(CellExecutionError, match="absmax"):
        run(source, tmp_path / "run")
    node = nbformat.read(tmp_path / "run" / "small.ipynb", as_version=4)
    assert output_text(node.cells[0]) == "before\n"
    assert not node.cells[2].outputs
    assert [line.split(" ")[1] for line in problems(node)] == ["1", "2"]


def test_timeout_stops_a_cell(tmp_path: Path) -> None:
    with pytest.raises(CellTimeoutError):
        run(_notebook(tmp_path, "import time\ntime.sleep(60)"), tmp_path / "run", timeout=2)


def test_run_that_is_killed_keeps_the_outputs_of_the_cells_before(tmp_path: Path) -> None:
    ending = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"  # of the process that executes the notebook
    source, folder = _notebook(tmp_path, "print('kept')", ending), tmp_path / "run"
    code = (
        f"import pathlib, tools.run_notebook as runner; runner.run(*map(pathlib.Path, {[str(source), str(folder)]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False, capture_output=True)
    node = nbformat.read(folder / source.name, as_version=4)
    assert done.returncode == -signal.SIGKILL and output_text(node.cells[0]) == "kept\n"


def test_outputs_keep_neither_the_folder_nor_the_kernel_version(tmp_path: Path) -> None:
    node = run(_notebook(tmp_path, "import os\nprint(os.getcwd() + '/resources', os.getcwd())"), tmp_path / "run")
    assert output_text(node.cells[0]) == "./resources .\n"
    assert "version" not in node.metadata.get("language_info", {})
    assert "execution" not in node.cells[0].metadata


def test_truncated_path_of_the_folder_is_replaced(tmp_path: Path) -> None:
    show = "from IPython.display import Markdown, display\nimport os\nat = os.getcwd()\n"
    node = run(
        _notebook(tmp_path, show + "display(Markdown('| # ' + at[2:] + '/a.py:7 |'))\nprint(at[3:] + '/b')"),
        tmp_path / "run",
    )
    shown = "".join(output_text(node.cells[0]))
    assert "| # ./a.py:7 |" in shown and "./b\n" in shown and tmp_path.name not in shown


def channels(encoded: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(encoded))).convert("RGB")


def test_smaller_png_looks_the_same(tmp_path: Path) -> None:
    draw = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 3, 2])\nplt.savefig('before.png')\nplt.show()"
    node = run(_notebook(tmp_path, "%matplotlib inline", draw), tmp_path / "run")
    (encoded,) = [output.data[PNG] for output in node.cells[1].outputs if PNG in output.get("data", {})]
    raw = BytesIO()
    image = Image.open(BytesIO(base64.b64decode(encoded)))
    image.convert("RGBA").save(raw, "PNG")
    again = base64.b64encode(raw.getvalue()).decode()
    fewer = smaller(again)
    changed = ImageChops.difference(channels(again), channels(fewer)).getextrema()
    assert len(fewer) < len(again) and max(most for _, most in changed) <= INVISIBLE


def test_smaller_png_of_many_colours_keeps_its_pixels() -> None:
    """A gradient in two directions, which 256 colours cannot show."""
    image = Image.new("RGB", (200, 200))
    image.putdata([(x, y, (3 * x + 5 * y) % 256) for y in range(200) for x in range(200)])
    raw = BytesIO()
    image.save(raw, "PNG")
    kept = channels(smaller(base64.b64encode(raw.getvalue()).decode()))
    assert kept.tobytes() == image.tobytes()


def test_smaller_png_keeps_transparency() -> None:
    raw = BytesIO()
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 40))
    image.save(raw, "PNG")
    kept = Image.open(BytesIO(base64.b64decode(smaller(base64.b64encode(raw.getvalue()).decode()))))
    assert kept.mode == "RGBA" and kept.tobytes() == image.tobytes()


def test_problems_name_machine_paths_and_size(tmp_path: Path) -> None:
    node = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", execution_count=1)])
    assert problems(node) == []
    node.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="/home/someone/x.py:1: Warning")]
    assert "/home/" in problems(node)[0]
    node.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text="x" * LARGEST)]
    assert "bytes" in problems(node)[0]


def test_report_is_the_output_of_tagged_cells() -> None:
    shown = nbformat.v4.new_output("display_data", data={"text/plain": "<Markdown>", "text/markdown": "| a |"})
    tagged = nbformat.v4.new_code_cell("1", outputs=[shown], metadata={"tags": ["report"]})
    other = nbformat.v4.new_code_cell("2", outputs=[nbformat.v4.new_output("stream", name="stdout", text="no")])
    assert report(nbformat.v4.new_notebook(cells=[tagged, other])) == "| a |\n"


def test_record_has_the_seconds_of_the_sections(tmp_path: Path) -> None:
    rows = "| Set-up | 3.5 s | - |\n| A. NF4 to Triton | 50.0 s | 19 GiB |\n| C. Compiled | 6.5 s | 1 GiB |\n"
    shown = nbformat.v4.new_output("display_data", data={"text/markdown": rows})
    tagged = nbformat.v4.new_code_cell("1", outputs=[shown], metadata={"tags": ["report"]})
    run_notebook.record_seconds(nbformat.v4.new_notebook(cells=[tagged]), tmp_path / "run.json")
    kept = json.loads((tmp_path / "run.json").read_text())
    assert (kept["seconds"], kept["sections"]) == (60.0, "A, C") and kept["cores"] >= 1
    assert kept["digest"] == code_digest(package_files())


def test_need_gpu_refuses_to_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_notebook, "gpu_present", lambda: False)
    assert run_notebook.main([str(_notebook(tmp_path, "1")), str(tmp_path / "run"), "--need-gpu"]) == 1
    assert not (tmp_path / "run").exists()


def test_folder_outside_build_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(SystemExit):
        run_notebook.main([str(_notebook(tmp_path, "1")), str(tmp_path)])
    assert (tmp_path / "kept").exists()


def _notebook(folder: Path, *sources: str) -> Path:
    path = folder / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


def test_lines_of_a_process_at_work_go_and_neighbours_are_joined(tmp_path):
    def stream(text: str, name: str = "stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    table = nbformat.v4.new_output("display_data", {"text/markdown": "| a |"})
    cell = nbformat.v4.new_code_cell("run()")
    cell.outputs = [
        stream("begun\n"), stream("... at work for 25 s\n"), stream("one GPU: ... train at work for 52 s\nstep 30\n"),
        stream("warned\n", "stderr"), table, stream("... at work for 75 s\n"), stream("he is at work for 8 s\n"),
    ]  # fmt: skip
    clean(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    found = [(one.get("name"), one.get("text")) for one in cell.outputs]
    kept = [("stdout", "begun\nstep 30\n"), ("stderr", "warned\n"), (None, None), ("stdout", "he is at work for 8 s\n")]
    assert found == kept
