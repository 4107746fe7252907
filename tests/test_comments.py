"""What is a comment, and what only looks like one."""

import pytest

from tools.comments import without_comments


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("x = 1  # one\ny = 2\n", "x = 1\ny = 2\n"),
        ("# all of a line\nx = 1", "\nx = 1"),
        ('x = "# none"  # one', 'x = "# none"'),
        ('x = """a\n# none\n"""\n', 'x = """a\n# none\n"""\n'),
        ('x = f"{1}# none"', 'x = f"{1}# none"'),
        ("%%writefile a/b.py\nx = 1  # one", "%%writefile a/b.py\nx = 1"),
        ("x = (", "x = ("),  # no Python
        ("x = 1 # one\n  y = (", "x = 1 # one\n  y = ("),
    ],
)
def test_comments_go_and_lines_stay(source: str, left: str) -> None:
    assert without_comments(source) == left
