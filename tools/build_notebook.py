"""notebook/*.py + the package -> Rohit_Unsloth_Puzzles.ipynb.

    python -m tools.build_notebook [--output PATH]   write it, without outputs (default: under build/)

The sections are jupytext percent scripts. A code cell that holds one of these lines and nothing else is replaced:
    # package           by collapsed cells that write every file of unsloth_puzzles/
    # benchmarks        by the same for the files of benchmarks/ that the cells and what they start import
    # show: PATH        by `%%writefile PATH` and the file word for word, open: the files that a section explains
    # fold: PATH        by a collapsed cell that writes the file, or the files of all its lines
A code cell that begins with `# @title` is collapsed.
In Markdown `<!-- badges -->` becomes the badge row and `<!-- contents -->` the table of contents; `<!-- scorecard -->`
is left to tools/release.py.
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
from tools.closure import closure

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, BENCHMARKS = "unsloth_puzzles", "benchmarks"
SECTIONS = ("00_setup", "a_nf4", "b_fsdp2", "c_compile", "d_issues", "e_backprop", "z_scorecard")
SHOW = re.compile(r"# show: (\S+)")
FOLD = re.compile(r"# fold: (\S+)")
TITLE = "#@title "
TITLED = re.compile(r"# ?@title ")
FILES = {"# package": PACKAGE, "# benchmarks": BENCHMARKS}
WRITEFILE = re.compile(r"%%writefile (\S+)\n")
WRITEFILES = "%%writefiles\n"  # the magic that the set-up defines
BEGIN = "# file: "  # one file of such a cell
LARGEST = 450_000  # bytes of files in such a cell, so that editors stay quick
COLLAPSED = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["hide-input"]}
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "name": NOTEBOOK, "provenance": [], "toc_visible": True},
    "kaggle": {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True, "language": "python"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build(root: Path = ROOT) -> NotebookNode:
    """Make the notebook, without outputs, from the sections that exist under `root/notebook`.

    Raises:
        ValueError: For an unknown section file, for a `show` or `fold` that is not alone in its cell, and for a file to
            be written that is missing, has no text, does not end with one newline, or holds a line that begins with
            `BEGIN`.
    """
    scripts = [root / "notebook" / f"{section}.py" for section in _sections(root)]
    parsed = [jupytext.reads(script.read_text(encoding="utf-8"), fmt="py:percent").cells for script in scripts]
    code = "\n".join(cell.source for cells in parsed for cell in cells if cell.cell_type == "code")
    cells = []
    for script, found in zip(scripts, parsed, strict=True):
        for cell in found:
            for made in _expand(cell, root, code):
                made.metadata["section"] = script.stem
                cells.append(made)
    _fill_markdown(cells)
    _name_cells(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(METADATA))
    nbformat.validate(notebook)
    return notebook


def text(notebook: NotebookNode) -> str:
    """The file's content: the same bytes for the same notebook. Each cell is one string, which is a tenth smaller."""
    settings = {"indent": 1, "sort_keys": True, "ensure_ascii": False, "split_lines": False}
    return nbformat.writes(notebook, version=4, **settings).rstrip("\n") + "\n"


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


def _expand(cell: NotebookNode, root: Path, code: str) -> list[NotebookNode]:
    """The cells that `cell` stands for, none if they would write nothing; `code` is all code of the notebook."""
    if cell.cell_type != "code":
        return [cell]
    if TITLED.match(cell.source):
        return [_collapsed(cell)]
    if show := SHOW.fullmatch(cell.source):
        return [nbformat.v4.new_code_cell(f"%%writefile {show[1]}\n{_content(root, show[1])[:-1]}")]
    folds = [FOLD.fullmatch(line) for line in cell.source.splitlines()]
    if folds and all(folds):
        return [_writing([Path(fold[1]) for fold in folds], root)]
    if cell.source.startswith(("# show", "# fold")):
        raise ValueError(f"a cell must hold one `# show: PATH` or lines `# fold: PATH` alone, got {cell.source!r}")
    folder = FILES.get(cell.source)
    if folder is None:
        return [cell]
    paths = closure(code, root, folder) if folder == BENCHMARKS else (root / folder).rglob("*.py")
    names = sorted((path.relative_to(root) for path in paths), key=lambda name: (name.parent, name))
    return [_writing(each, root) for each in _grouped(names, root)]


def _grouped(names: list[Path], root: Path) -> list[list[Path]]:
    """Whole folders together, as many as `LARGEST` allows."""
    groups, size = [], 0
    for folder in dict.fromkeys(name.parent for name in names):
        files = [name for name in names if name.parent == folder]
        more = sum((root / name).stat().st_size for name in files)
        if not groups or size + more > LARGEST:
            groups.append([])
            size = 0
        groups[-1] += files
        size += more
    return groups


def _writing(names: list[Path], root: Path) -> NotebookNode:
    """A collapsed cell that writes the files `names`."""
    files = "".join(f"{BEGIN}{name.as_posix()}\n{_content(root, name.as_posix())}" for name in names)
    return _collapsed(nbformat.v4.new_code_cell((WRITEFILES + TITLE + _title(names) + "\n" + files)[:-1]))


def _title(names: list[Path]) -> str:
    """The files by name if one folder holds them all, else the folders."""
    folders = list(dict.fromkeys(name.parent for name in names))
    if len(folders) == 1:
        return f"{folders[0]}/: {', '.join(name.name for name in names)}"
    top = names[0].parts[0]
    return f"{len(names)} files of {top}/: {', '.join(folder.name for folder in folders if folder.name != top)}"


def _collapsed(cell: NotebookNode) -> NotebookNode:
    tags = [*COLLAPSED["tags"], *cell.metadata.get("tags", [])]
    cell.metadata.update(COLLAPSED | {"tags": list(dict.fromkeys(tags))})
    return cell


def _content(root: Path, name: str) -> str:
    path = root / name
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        raise ValueError(f"{name} must be a file with text in it, got none")
    body = path.read_text(encoding="utf-8")
    if not body.endswith("\n") or body.endswith("\n\n"):
        raise ValueError(f"{name} must end with one newline: that is what %%writefile writes")
    if f"\n{BEGIN}" in f"\n{body}":
        raise ValueError(f"{name} must hold no line that begins with {BEGIN!r}: such a line separates files")
    return body


def written_files(notebook: NotebookNode) -> dict[str, str]:
    """Path -> content of every file that the notebook writes.

    Raises:
        ValueError: If two cells write different contents into one file.
    """
    files: dict[str, str] = {}
    for cell in notebook.cells:
        for name, content in _files_of(cell) if cell.cell_type == "code" else ():
            if files.setdefault(name, content) != content:
                raise ValueError(f"{name} must have one content, got two")
    return files


def package_of(notebook: NotebookNode) -> dict[str, str]:
    """Those of `written_files` that belong to the package: what the digest of a release is taken from."""
    return {name: content for name, content in written_files(notebook).items() if name.startswith(f"{PACKAGE}/")}


def _files_of(cell: NotebookNode) -> list[tuple[str, str]]:
    if match := WRITEFILE.match(cell.source):
        return [(match[1], cell.source[match.end() :] + "\n")]
    if not cell.source.startswith(WRITEFILES):
        return []
    parts = re.split(rf"^{BEGIN}", cell.source + "\n", flags=re.MULTILINE)[1:]
    return [tuple(part.split("\n", 1)) for part in parts]


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
        written = _files_of(cell) if cell.cell_type == "code" else []
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:10]
        own = f"{section}-file-{written[0][0]}" if written else f"{section}-{digest}"
        name = re.sub(r"[^A-Za-z0-9_-]", "-", own)[:58]
        taken[name] = taken.get(name, 0) + 1
        cell.id = name if taken[name] == 1 else f"{name}-{taken[name]}"


if __name__ == "__main__":
    sys.exit(main())
