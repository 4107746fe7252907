"""Execute a notebook alone: in a folder that holds nothing but its copy, as on Colab.

    python -m tools.run_notebook NOTEBOOK FOLDER [--python EXECUTABLE] [--timeout SECONDS] [--need-gpu] [--strict]
                                 [--record JSON]

Prints a line a cell, at the end where the executed copy and the figures lie, and what the cells tagged `report`
printed. The copy is written after each cell, so a run that is killed keeps what it has shown. Exits 1 after an error
and for anything in `outputs.problems`.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tools.build_notebook import ROOT, text
from tools.clean_outputs import clean
from tools.outputs import failures, lines_with, problems, report, run_seconds

SWEEPS = "*_sweeps.json"
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def run(
    notebook: Path,
    folder: Path,
    *,
    python: str = sys.executable,
    timeout: int = 1800,
    measured: Path | None = None,
    client_class: Callable[..., NotebookClient] = NotebookClient,
) -> NotebookNode:
    """Copy `notebook` into `folder`, execute the copy there and return it. It is written after each cell.

    Args:
        notebook: A notebook file.
        folder: Must be empty or missing.
        python: The interpreter that the kernel runs in.
        timeout: Seconds, a cell.
        measured: A folder of measurements. Of those the notebook is given the sweeps, which are too long for it.
        client_class: Makes the client that executes the cells.

    Raises:
        ValueError: `folder` is not empty.
        CellExecutionError, CellTimeoutError, DeadKernelError: A cell failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / notebook.name
    shutil.copyfile(notebook, copy)
    if others := sorted(path.name for path in folder.iterdir() if path != copy):
        raise ValueError(f"folder must hold nothing but the notebook, got {folder} with {others[:5]}")
    for sweep in sorted(measured.glob(SWEEPS)) if measured else ():
        (folder / "resources/measurements").mkdir(parents=True, exist_ok=True)
        shutil.copy(sweep, folder / "resources/measurements")
    node = nbformat.read(copy, as_version=4)
    progress = _Progress(node, copy)
    client = client_class(
        node,
        km=AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_OneKernel(python)),
        timeout=timeout,
        resources={"metadata": {"path": str(folder)}},
        store_widget_state=False,
        record_timing=False,
        on_cell_execute=progress.started,
        on_cell_executed=progress.finished,
    )
    metadata = dict(node.metadata)
    try:
        client.execute(env=_environment(), cleanup_kc=True)  # a kernel that is handed in is else left running
    finally:
        node.metadata = nbformat.from_dict(metadata)  # the kernel's own version belongs in an output, not here
        clean(node, folder)
        _write(node, copy)
    return node


def _write(node: NotebookNode, path: Path) -> None:
    """Write the notebook under another name and rename it, so that the file is never half written."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text(node), encoding="utf-8")
    unfinished.replace(path)


class _Progress:
    """A line of plain text a cell: number, seconds, first words. After each the notebook is written."""

    def __init__(self, node: NotebookNode, path: Path) -> None:
        self.node, self.path, self.began = node, path, time.monotonic()

    def started(self, cell: NotebookNode, cell_index: int) -> None:
        self.began = time.monotonic()

    def finished(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        status = "" if execute_reply["content"]["status"] == "ok" else "  ERROR"
        first = next((line for line in cell.source.splitlines() if line.strip()), "")[:88]
        seconds = time.monotonic() - self.began
        print(f"[{cell_index + 1:3}/{len(self.node.cells)}] {seconds:6.1f} s  {first}{status}", flush=True)
        _write(self.node, self.path)


class _OneKernel(KernelSpecManager):
    """Names one interpreter, whatever kernels happen to be registered on the machine."""

    def __init__(self, python: str) -> None:
        super().__init__()
        self.python = python

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def _environment() -> dict[str, str]:
    # MPLBACKEND: a machine's Agg would keep the figures out of the outputs.
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute a notebook alone in a folder.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("folder", type=Path, help="emptied first; it must lie under build/")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the kernel runs in")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds, a cell")
    parser.add_argument("--measured", type=Path, help="a folder with the sweeps that were measured before")
    parser.add_argument("--strict", action="store_true", help="FAILED in an output is a failure of the run")
    parser.add_argument("--need-gpu", action="store_true", help="refuse to run without a GPU")
    parser.add_argument("--record", type=Path, help="keep the seconds of the sections in this file, if nothing failed")
    options = parser.parse_args(arguments)
    if options.need_gpu and not gpu_present():
        print("This needs a CUDA GPU, and torch sees none. `make notebook` runs without one.", file=sys.stderr)
        return 1
    folder = options.folder.resolve()
    if not folder.is_relative_to(ROOT / "build"):
        parser.error(f"folder must lie under build/, got {options.folder}")
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    try:
        node = run(options.notebook, folder, python=options.python, timeout=options.timeout, measured=options.measured)
    except FAILURES as error:
        print(f"\n{error}\nStopped there. The notebook as far as it came: {folder / options.notebook.name}")
        return 1
    print(f"\n{report(node)}\nExecuted in {time.monotonic() - began:.0f} s: {folder / options.notebook.name}")
    for figure in sorted(folder.glob("resources/**/*.png")):
        print(f"Figure: {figure}")
    if found := problems(node):
        print("Not fit to be published:", *found, sep="\n  ")
    if said := lines_with("FAILED", node) if options.strict else []:
        print("Said to have failed:", *said, sep="\n  ")
    published = options.need_gpu  # paths and size matter to a published notebook only
    if failures(node) or said or (found and published):
        return 1
    if options.record:
        record_seconds(node, options.record)
    return 0


def record_seconds(node: NotebookNode, path: Path) -> None:
    """Keep what an executed notebook took: the machine, its CPU cores, the seconds, the sections by letter."""
    from unsloth_puzzles.bench.record import provenance, write_json

    seconds, sections = run_seconds(node)
    cores = len(os.sched_getaffinity(0))
    write_json(path, {**provenance(), "cores": cores, "seconds": seconds, "sections": sections})


def gpu_present() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
