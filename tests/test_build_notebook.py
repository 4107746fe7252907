"""The builder, on small source trees of its own: what a directive becomes, and what is refused."""

from pathlib import Path

import pytest

from tools.build_notebook import COLLAPSED, build, text, written_files

SETUP = """# %% [markdown]
# # Title
# <!-- badges -->
# <!-- contents -->

# %%
from pathlib import Path
# folders

# %%
# write: pack/sub/*.py
"""
SECTION = """# %% [markdown]
# ## A. First, of two
# Prose.

# %%
# show: pack/solution.py

# %% tags=["report"]
print(1)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    _write(tmp_path / "notebook" / "00_setup.py", SETUP)
    _write(tmp_path / "notebook" / "a_nf4.py", SECTION)
    _write(tmp_path / "pack" / "solution.py", 'x = "$HOME {x}"  # × %\n\n\ny = 2\n')
    _write(tmp_path / "pack" / "sub" / "b.py", "b = 1\n")
    _write(tmp_path / "pack" / "sub" / "a.py", "a = 1\n")
    return tmp_path


def test_a_named_file_becomes_a_cell_word_for_word(tree: Path) -> None:
    notebook = build(tree)
    assert list(written_files(notebook)) == ["pack/sub/a.py", "pack/sub/b.py", "pack/solution.py"]
    for name, content in written_files(notebook).items():
        assert content == (tree / name).read_text()


def test_write_is_collapsed_and_show_is_open(tree: Path) -> None:
    by_id = {cell.id: cell for cell in build(tree).cells}
    assert by_id["file-pack-sub-a-py"].metadata == COLLAPSED
    assert by_id["file-pack-solution-py"].metadata == {}


def test_folders_are_made_for_every_file_that_is_written(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = (cell.source for cell in build(tree).cells if cell.source.startswith("from pathlib"))
    elsewhere = tree / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    exec(code, {})
    assert (elsewhere / "pack" / "sub").is_dir()


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
        ("notebook/a_nf4.py", "# %%\n# show: pack/none.py\n", "pack/none.py"),
        (
            "notebook/a_nf4.py",
            "# %%\n# show: pack/solution.py\n\n# %%\n# write: pack/solution.py\n",
            "more than one cell",
        ),
        ("notebook/extra.py", "# %%\n1\n", "extra"),
        ("pack/solution.py", "", "with text in it"),
        ("pack/solution.py", "x = 1", "end with one newline"),
        ("pack/solution.py", "x = 1\n\n", "end with one newline"),
    ],
)
def test_what_the_builder_refuses(tree: Path, path: str, content: str, message: str) -> None:
    _write(tree / path, content)
    with pytest.raises(ValueError, match=message):
        build(tree)


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
