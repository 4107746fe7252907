"""Execute a notebook alone: in a folder that holds nothing but its copy, as on Colab.

    python -m tools.run_notebook NOTEBOOK FOLDER [--python EXECUTABLE] [--timeout SECONDS] [--need-gpu] [--strict]

Prints a line a cell, at the end where the executed copy and the figures lie, and what the cells tagged `report`
printed. Exits 1 after an error (the notebook is written as far as it came) and for anything in ``problems``.
"""

import argparse
import base64
import io
import os
import re
import shutil
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from PIL import Image, ImageChops  # matplotlib needs it, too

from tools.build_notebook import ROOT, text

LARGEST = 2_000_000  # bytes: GitHub and Colab both show a file of this size at once
SWEEPS = "*_sweeps.json"
INVISIBLE = 16  # of 255, in a channel of a pixel
PNG = "image/png"
TEXTS = {"text", "text/plain", "text/markdown"}
WIDGETS = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def run(
    notebook: Path,
    folder: Path,
    *,
    python: str = sys.executable,
    timeout: int = 1800,
    measured: Path | None = None,
    client_class: type[NotebookClient] = NotebookClient,
) -> NotebookNode:
    """Copy ``notebook`` into ``folder``, execute the copy there and return it; it is written even after an error.

    ``timeout`` is in seconds, a cell. ``measured`` is a folder of measurements: of those the notebook is given the
    sweeps, which are too long for it. ``client_class`` executes the cells. Raises ValueError when ``folder`` is not
    empty, and nbclient's error for a cell that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / notebook.name
    shutil.copyfile(notebook, copy)
    if others := sorted(path.name for path in folder.iterdir() if path != copy):
        raise ValueError(f"folder {folder} must hold the notebook alone, it also holds {others[:5]}")
    for sweep in sorted(measured.glob(SWEEPS)) if measured else ():
        (folder / "resources/measurements").mkdir(parents=True, exist_ok=True)
        shutil.copy(sweep, folder / "resources/measurements")
    node = nbformat.read(copy, as_version=4)
    progress = _Progress(node)
    client = client_class(
        node,
        km=_kernel(python),
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
        _clean(node, folder)
        copy.write_text(text(node), encoding="utf-8")
    return node


def failures(node: NotebookNode) -> list[str]:
    """Cells that were not executed or ended in an error, a line each."""
    found = []
    for where, cell in _code(node):
        if cell.execution_count is None:
            found.append(f"{where} was not executed")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"{where} ends in an error")
    return found


def problems(node: NotebookNode) -> list[str]:
    """Why an executed notebook must not be published, a line each: `failures`, machine paths, size."""
    found = failures(node)
    for where, cell in _code(node):
        if path := next((path for path in _MACHINE_PATHS if path in output_text(cell)), None):
            found.append(f"{where} prints a path of this machine ({path})")
    if (size := len(text(node).encode())) > LARGEST:
        found.append(f"the file has {size:,} bytes, at most {LARGEST:,} are wanted")
    return found


def _code(node: NotebookNode) -> list[tuple[str, NotebookNode]]:
    cells = enumerate(node.cells)
    return [(f"cell {number} ({cell.id})", cell) for number, cell in cells if cell.cell_type == "code"]


def output_text(cell: NotebookNode) -> str:
    """All that a code cell printed or displayed as text; Markdown rather than the plain form where both exist."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
        parts += output.get("traceback", [])
    return "".join(part if part.endswith("\n") else part + "\n" for part in parts if part)


def lines_with(word: str, node: NotebookNode) -> list[str]:
    """The lines of the outputs that hold ``word``, each with its cell."""
    cells = [(where, output_text(cell)) for where, cell in _code(node)]
    return [f"{where}: {line.strip()}" for where, shown in cells for line in shown.splitlines() if word in line]


def report(node: NotebookNode) -> str:
    """What the cells tagged ``report`` printed: the sections' times and the scorecard."""
    return "\n".join(output_text(cell) for cell in node.cells if "report" in cell.metadata.get("tags", []))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute a notebook alone in a folder.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("folder", type=Path, help="emptied first; it must lie under build/")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the kernel runs in")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds, a cell")
    parser.add_argument("--measured", type=Path, help="a folder with the sweeps that were measured before")
    parser.add_argument("--strict", action="store_true", help="FAILED in an output is a failure of the run")
    parser.add_argument("--need-gpu", action="store_true", help="refuse to run without a GPU")
    options = parser.parse_args(arguments)
    if options.need_gpu and not gpu_present():
        print("This needs a CUDA GPU, and torch sees none. `make notebook` runs without one.", file=sys.stderr)
        return 1
    folder = options.folder.resolve()
    if not folder.is_relative_to(ROOT / "build"):
        parser.error(f"folder must lie under build/, it is {options.folder}")
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
    return (
        1 if failures(node) or said or (found and options.need_gpu) else 0
    )  # paths and size matter to a published one


def gpu_present() -> bool:
    import torch

    return torch.cuda.is_available()


class _Progress:
    """A line of plain text a cell: number, seconds, first words."""

    def __init__(self, node: NotebookNode) -> None:
        self.cells, self.total, self.began = node.cells, len(node.cells), time.monotonic()

    def started(self, cell: NotebookNode, cell_index: int) -> None:
        self.began = time.monotonic()

    def finished(self, cell: NotebookNode, cell_index: int, execute_reply: dict) -> None:
        status = "" if execute_reply["content"]["status"] == "ok" else "  ERROR"
        first = next((line for line in cell.source.splitlines() if line.strip()), "")
        print(
            f"[{cell_index + 1:3}/{self.total}] {time.monotonic() - self.began:6.1f} s  {first[:88]}{status}",
            flush=True,
        )


class _OneKernel(KernelSpecManager):
    """Names one interpreter, whatever kernels happen to be registered on the machine."""

    def __init__(self, python: str) -> None:
        super().__init__()
        self.python = python

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [self.python, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name="Python 3", language="python")


def _kernel(python: str) -> AsyncKernelManager:
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=_OneKernel(python))


def _environment() -> dict[str, str]:
    # MPLBACKEND: a machine's Agg would keep the figures out of the outputs.
    kept = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return kept | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}


_MACHINE_PATHS = tuple(
    dict.fromkeys(["/root/", "/home/", "/tmp/", "/opt/", f"{sys.prefix}/", f"{ROOT}/", f"{Path.home()}/"])
)


def _clean(node: NotebookNode, folder: Path) -> None:
    """Drop widget state; make figures smaller; write the folder of the run as `.`, since where it lay tells nothing."""
    node.metadata.pop("widgets", None)
    for cell in node.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for kind in WIDGETS:
                output.get("data", {}).pop(kind, None)
            if PNG in output.get("data", {}):
                output.data[PNG] = _smaller(output.data[PNG])
            for holder in (output, output.get("data", {})):
                for kind in TEXTS & holder.keys():
                    holder[kind] = _without(folder, holder[kind])
            if output.get("name") == "stderr":  # a warning names the file that it comes from
                output.text = output.text.replace(f"{sys.prefix}/", "")


def _without(folder: Path, shown: str) -> str:
    """`shown` with `folder` written as `.`, also where a compiler's message has cut off the beginning of the path."""
    ending = re.escape("/".join(folder.parts[-2:]))
    return re.sub(rf"[^\s\"'`(]*{ending}(?=/)", ".", shown).replace(str(folder), ".")


def _smaller(encoded: str) -> str:
    """A PNG in base64 in fewer bytes, with the same look.

    Without an alpha channel that hides nothing, and with 256 colours where no pixel changes by more than `INVISIBLE` in
    any channel: anti-aliased edges have thousands, which nobody tells apart.
    """
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if image.mode == "RGBA" and image.getextrema()[-1] == (255, 255):
        image = image.convert("RGB")
    if image.mode == "RGB":
        fewer = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        changed = ImageChops.difference(image, fewer.convert("RGB")).getextrema()
        image = fewer if max(most for _, most in changed) <= INVISIBLE else image
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    found = base64.b64encode(packed.getvalue()).decode()
    return min(found, encoded.replace("\n", ""), key=len)


if __name__ == "__main__":
    sys.exit(main())
