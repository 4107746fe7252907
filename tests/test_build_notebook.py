"""The builder, on small source trees of its own: what a directive becomes, and what is refused."""

from pathlib import Path

import pytest

from tools.build_notebook import COLLAPSED, ROOT, build, package_of, text, written_files

SETUP = """# %% [markdown]
# # Title
# <!-- badges -->
# <!-- contents -->

# %%
# package

# %%
# benchmarks
"""
SECTION = """# %% [markdown]
# ## A. First, of two
# Prose.

# %%
# show: unsloth_puzzles/solution.py

# %%
from benchmarks.sub import timed
%matplotlib inline
run("benchmarks.child:main")

# %% tags=["report"]
print(1)
"""
SOLUTION = 'x = "$HOME {x}"  # × %\n\n\ny = 2\n'
SOURCES = {
    "notebook/00_setup.py": SETUP,
    "notebook/a_nf4.py": SECTION,
    "unsloth_puzzles/solution.py": SOLUTION,
    "unsloth_puzzles/sub/b.py": "b = 1\n",
    "unsloth_puzzles/sub/a.py": "a = 1\n",
    "benchmarks/__init__.py": '"""All."""\n',
    "benchmarks/child.py": "import benchmarks.by_child\n",
    "benchmarks/by_child.py": "c = 1\n",
    "benchmarks/sub/timed.py": "def main():\n    from benchmarks.sub.lazy import x\n",
    "benchmarks/sub/lazy.py": "x = 1\n",
    "benchmarks/sub/unused.py": "x = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, content in SOURCES.items():
        _write(tmp_path / name, content)
    return tmp_path


def _source(notebook, start: str) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.source.startswith(start)]


def test_written_files_are_the_sources_word_for_word(tree: Path) -> None:
    written = written_files(build(tree))
    assert written == {
        name: content
        for name, content in SOURCES.items()
        if not name.startswith("notebook") and name != "benchmarks/sub/unused.py"
    }
    assert set(package_of(build(tree))) == {name for name in written if name.startswith("unsloth_puzzles")}


def test_a_large_package_is_several_collapsed_cells_of_whole_folders(tree: Path, monkeypatch) -> None:
    whole = written_files(build(tree))
    monkeypatch.setattr("tools.build_notebook.LARGEST", 1)
    titles = [source.splitlines()[1] for source in _source(build(tree), "%%writefiles")]
    assert [title.split(": ")[0] for title in titles] == [
        f"#@title {folder}/" for folder in ("unsloth_puzzles", "unsloth_puzzles/sub", "benchmarks", "benchmarks/sub")
    ]
    assert written_files(build(tree)) == whole


def test_package_and_benchmarks_are_a_collapsed_cell_each_and_a_shown_file_is_open(tree: Path) -> None:
    by_id = {cell.id: cell for cell in build(tree).cells}
    assert by_id["00_setup-file-unsloth_puzzles-solution-py"].metadata == COLLAPSED
    assert by_id["a_nf4-file-unsloth_puzzles-solution-py"].metadata == {}
    titles = [source.splitlines()[1] for source in _source(build(tree), "%%writefiles")]
    assert titles == ["#@title 3 files of unsloth_puzzles/: sub", "#@title 5 files of benchmarks/: sub"]


@pytest.mark.parametrize("line", ["# fold: a.py b.py", "# show: a.py b.py", "# fold: a.py\nprint()", "# show:"])
def test_lines_that_name_files_must_stand_alone(tree: Path, line: str) -> None:
    _write(tree / "notebook" / "c_compile.py", f"# %%\n{line}\n")
    with pytest.raises(ValueError, match="a cell must hold one `# show: PATH` or lines `# fold: PATH` alone"):
        build(tree)


def test_folded_files_are_one_collapsed_cell_with_their_names(tree: Path) -> None:
    folded = "# %%\n# fold: unsloth_puzzles/sub/b.py\n# fold: unsloth_puzzles/sub/a.py\n"
    _write(tree / "notebook" / "c_compile.py", folded)
    cell = build(tree).cells[-1]
    assert cell.metadata == COLLAPSED
    assert cell.source == (
        "%%writefiles\n#@title unsloth_puzzles/sub/: b.py, a.py\n"
        "# file: unsloth_puzzles/sub/b.py\nb = 1\n# file: unsloth_puzzles/sub/a.py\na = 1"
    )


@pytest.mark.parametrize("title", ["#@title", "# @title"])
def test_a_cell_with_a_title_is_collapsed_and_keeps_its_tags(tree: Path, title: str) -> None:
    _write(tree / "notebook" / "c_compile.py", f'# %% tags=["report"]\n{title} Helpers\nx = 1\n')
    assert build(tree).cells[-1].metadata == COLLAPSED | {"tags": ["hide-input", "report"]}


def test_the_magic_of_the_set_up_writes_the_same_bytes(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (ROOT / "notebook" / "00_setup.py").read_text()
    magic = source[source.index("def writefiles") : source.index("# %%\n# package")]
    names = {"Path": Path}
    exec(magic, names)
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for cell in _source(build(tree), "%%writefiles"):
        names["writefiles"]("", cell.split("\n", 1)[1] + "\n")
    written = {path.relative_to(elsewhere).as_posix() for path in elsewhere.rglob("*.py")}
    assert written == set(written_files(build(tree)))
    for name in written:
        assert (elsewhere / name).read_bytes() == (tree / name).read_bytes()


def test_two_contents_for_one_file_are_refused(tree: Path) -> None:
    notebook = build(tree)
    (shown,) = (cell for cell in notebook.cells if cell.source.startswith("%%writefile unsloth_puzzles/solution.py"))
    shown.source += "\nz = 3"
    with pytest.raises(ValueError, match=r"solution\.py must have one content"):
        written_files(notebook)


def test_contents_point_at_anchors(tree: Path) -> None:
    title, heading = (cell.source for cell in build(tree).cells if cell.cell_type == "markdown")
    assert "- [A. First, of two](#a-first-of-two)" in title
    assert heading.startswith('<a id="a-first-of-two" name="a-first-of-two"></a>\n## A. First, of two')
    assert "colab.research.google.com" in title and "<!--" not in title


def test_cell_tags_and_notebook_metadata(tree: Path) -> None:
    notebook = build(tree)
    assert notebook.cells[-1].metadata == {"tags": ["report"]}
    assert notebook.metadata["accelerator"] == "GPU"
    assert notebook.metadata["colab"]["gpuType"] == "T4"


def test_building_twice_gives_the_same_bytes(tree: Path) -> None:
    assert text(build(tree)) == text(build(tree))


def test_ids_stay_when_a_cell_is_added_before(tree: Path) -> None:
    before = [cell.id for cell in build(tree).cells]
    script = tree / "notebook" / "a_nf4.py"
    script.write_text("# %%\nprint(0)\n\n" + script.read_text())
    after = [cell.id for cell in build(tree).cells]
    assert [name for name in after if name in before] == before
    assert len(after) == len(before) + 1


def test_equal_cells_get_ids_of_their_own(tree: Path) -> None:
    _write(tree / "notebook" / "a_nf4.py", "# %%\nprint(1)\n\n# %%\nprint(1)\n")
    ids = [cell.id for cell in build(tree).cells]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("notebook/a_nf4.py", "# %%\n# show: unsloth_puzzles/none.py\n", "unsloth_puzzles/none.py"),
        ("unsloth_puzzles/solution.py", "x = 1\n# file: y.py\n", "begins with '# file: '"),
        ("notebook/extra.py", "# %%\n1\n", "extra"),
        ("unsloth_puzzles/solution.py", "", "with text in it"),
        ("unsloth_puzzles/solution.py", "x = 1", "end with one newline"),
        ("unsloth_puzzles/solution.py", "x = 1\n\n", "end with one newline"),
    ],
)
def test_builder_refuses_bad_sources(tree: Path, path: str, content: str, message: str) -> None:
    _write(tree / path, content)
    with pytest.raises(ValueError, match=message):
        build(tree)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
