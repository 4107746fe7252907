"""notebook/*.py + the package files they name -> Rohit_Unsloth_Puzzles.ipynb.

    python -m tools.build_notebook [--output PATH]   write it, without outputs (default: under build/)

The sections are jupytext percent scripts. A code cell that holds one of these lines and nothing else is replaced:
    # show: PATH     by `%%writefile PATH` and the file word for word
    # write: PATH    by the same, collapsed; PATH may be a pattern (one cell a file)
    # folders        by code that makes the folders of all the files written
In Markdown `<!-- badges -->` becomes the badge row and `<!-- contents -->` the table of contents.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from tools.address import NOTEBOOK, badges

ROOT = Path(__file__).resolve().parent.parent
# In the order in which they need one another: C compiles the loss of E.
SECTIONS = ("00_setup", "a_nf4", "e_backprop", "c_compile", "d_issues", "b_fsdp2", "z_scorecard")
DIRECTIVE = re.compile(r"# (show|write): (\S+)")
WRITEFILE = re.compile(r"%%writefile (\S+)\n")
COLLAPSED = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["hide-input"]}
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "name": NOTEBOOK, "provenance": [], "toc_visible": True},
    "kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True, "language": "python"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(root: Path = ROOT) -> NotebookNode:
    """The notebook without outputs, made from the sections that exist under ``root/notebook``.

    Raises ValueError for an unknown section file, for a directive whose file is missing or has no text, and for a file
    that two cells write.
    """
    cells = []
    for section in _sections(root):
        script = root / "notebook" / f"{section}.py"
        for cell in jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent").cells:
            cells += _expand(cell, section, root)
    _refuse_twice_written(cells)
    _fill_folders(cells)
    _fill_markdown(cells)
    _name_cells(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(METADATA))
    nbformat.validate(notebook)
    return notebook


def text(notebook: NotebookNode) -> str:
    """The file's content: the same bytes for the same notebook."""
    return nbformat.writes(notebook, version=4, indent=1, sort_keys=True, ensure_ascii=False).rstrip("\n") + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the notebook from notebook/ and unsloth_puzzles/.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / NOTEBOOK, help="where to write it")
    options = parser.parse_args(arguments)
    built = build()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text(built), encoding="utf-8")
    print(f"{options.output}: {len(built.cells)} cells")
    return 0


def _sections(root: Path) -> list[str]:
    present = {path.stem for path in (root / "notebook").glob("*.py")}
    if unknown := present - set(SECTIONS):
        raise ValueError(f"notebook/ holds {sorted(unknown)}; a section is one of {SECTIONS}")
    return [section for section in SECTIONS if section in present]


def _expand(cell: NotebookNode, section: str, root: Path) -> list[NotebookNode]:
    """The cells that ``cell`` stands for, each with ``section`` noted for its id."""
    cell.metadata["section"] = section
    directive = DIRECTIVE.fullmatch(cell.source) if cell.cell_type == "code" else None
    if directive is None:
        return [cell]
    kind, pattern = directive.groups()
    paths = sorted(root.glob(pattern)) if "*" in pattern else [root / pattern]
    cells = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        if not path.is_file() or not path.read_text(encoding="utf-8").strip():
            raise ValueError(f"notebook/{section}.py names {name}: it must be a file with text in it")
        body = path.read_text(encoding="utf-8")
        if not body.endswith("\n") or body.endswith("\n\n"):
            raise ValueError(f"{name} must end with one newline: that is what %%writefile writes")
        written = nbformat.v4.new_code_cell(f"%%writefile {name}\n{body[:-1]}")
        written.metadata.update(COLLAPSED if kind == "write" else {}, section=section)
        cells.append(written)
    return cells


def written_files(notebook: NotebookNode) -> dict[str, str]:
    """Path -> content of every file that the notebook writes with ``%%writefile``."""
    matches = ((WRITEFILE.match(cell.source), cell.source) for cell in _code(notebook))
    return {match[1]: source[match.end() :] + "\n" for match, source in matches if match}


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _written_names(cells: list[NotebookNode]) -> list[str]:
    return [match[1] for cell in cells if cell.cell_type == "code" and (match := WRITEFILE.match(cell.source))]


def _refuse_twice_written(cells: list[NotebookNode]) -> None:
    names = _written_names(cells)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"written by more than one cell: {twice}")


def _fill_folders(cells: list[NotebookNode]) -> None:
    folders = sorted({str(Path(name).parent) for name in _written_names(cells)})
    lines = ["for folder in (", *(f'    "{folder}",' for folder in folders), "):"]
    code = "\n".join([*lines, "    Path(folder).mkdir(parents=True, exist_ok=True)"])
    for cell in cells:
        if cell.cell_type == "code" and "# folders" in cell.source.splitlines():
            cell.source = "\n".join(code if line == "# folders" else line for line in cell.source.splitlines())


def _fill_markdown(cells: list[NotebookNode]) -> None:
    contents = []
    for cell in cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## (.+)", cell.source)):
            # Colab follows `name`, Jupyter `id`.
            anchor = re.sub(r"[^a-z0-9]+", "-", heading[1].lower()).strip("-")
            cell.source = f'<a id="{anchor}" name="{anchor}"></a>\n{cell.source}'
            contents.append(f"- [{heading[1]}](#{anchor})")
    for cell in cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("<!-- badges -->", badges())
            cell.source = cell.source.replace("<!-- contents -->", "\n".join(contents))


def _name_cells(cells: list[NotebookNode]) -> None:
    """Ids that stay when a cell is added elsewhere: from the file written, else from the section and the text."""
    taken: dict[str, int] = {}
    for cell in cells:
        section = cell.metadata.pop("section")
        match = WRITEFILE.match(cell.source) if cell.cell_type == "code" else None
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:10]
        name = re.sub(r"[^A-Za-z0-9_-]", "-", f"file-{match[1]}" if match else f"{section}-{digest}")[:58]
        taken[name] = taken.get(name, 0) + 1
        cell.id = name if taken[name] == 1 else f"{name}-{taken[name]}"


if __name__ == "__main__":
    sys.exit(main())
