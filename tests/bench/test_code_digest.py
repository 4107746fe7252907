"""One digest of code: tokens count, comments and layout do not, and every Python agrees."""

from pathlib import Path

import pytest

from unsloth_puzzles.bench.code_digest import PACKAGE, code_digest, package_files

SOURCE = '''"""What it is."""
import os  # a comment

def shown(value: float) -> str:
    return f"{value:.{2 + 1}f} {{braces}} {'nested ' + f'{value}'}"


TEXT = """two
lines"""
'''
# Pinned: another value on another Python, or after a change of the digest, would make every stamp disagree.
DIGEST = "a239af2fd4e72a01d7c472c6d9fae11f401502d40b7f474feb6df4975256a463"


def test_digest_is_the_same_on_every_python() -> None:
    assert code_digest({"a.py": SOURCE}) == DIGEST


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("  # a comment", ""),
        SOURCE.replace("import os", "import os\n# another"),
        SOURCE.replace("\n\n\nTEXT", "\n\nTEXT"),
        SOURCE.replace("(value: float)", "(\n    value: float\n)"),
        SOURCE.replace("    return", "        return"),
    ],
)
def test_digest_ignores_comments_and_layout(other: str) -> None:
    assert other != SOURCE and code_digest({"a.py": other}) == DIGEST


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("2 + 1", "2 + 2"),
        SOURCE.replace("{{braces}}", "{{brace}}"),
        SOURCE.replace("nested ", "nested  "),
        SOURCE.replace("two\n", "two\n\n"),
        SOURCE.replace("What it is", "What it was"),
        SOURCE.replace("float", "int"),
    ],
)
def test_digest_includes_code_and_texts(other: str) -> None:
    assert other != SOURCE and code_digest({"a.py": other}) != DIGEST


def test_digest_includes_file_names() -> None:
    assert code_digest({"b.py": SOURCE}) != DIGEST
    assert code_digest({"a.py": "x\n", "b.py": "y\n"}) != code_digest({"a.py": "y\n", "b.py": "x\n"})


def test_digest_includes_indentation_of_blocks() -> None:
    one, other = "if a:\n    b()\nc()\n", "if a:\n    b()\n    c()\n"
    assert code_digest({"a.py": one}) != code_digest({"a.py": other})


def test_package_files_are_named_from_the_parent_on(tmp_path: Path) -> None:
    (tmp_path / "pack" / "part").mkdir(parents=True)
    (tmp_path / "pack" / "part" / "a.py").write_text("x = 1\n")
    (tmp_path / "pack" / "note.txt").write_text("no code")
    assert package_files(folder=tmp_path / "pack") == {"pack/part/a.py": "x = 1\n"}
    assert list(package_files([PACKAGE / "device.py"])) == ["unsloth_puzzles/device.py"]
