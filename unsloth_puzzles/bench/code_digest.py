"""Which code was executed, measured, tested or rehearsed: one digest for all of them."""

import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
_LAYOUT = {tokenize.NEWLINE: "\n", tokenize.INDENT: "\t", tokenize.DEDENT: "\r"}
_IGNORED = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)


def code_digest(files: Mapping[str, str]) -> str:
    """SHA-256 of Python files by their tokens: comments and layout do not count.

    The same on every Python: f-strings, which are one token before 3.12 and many since, are taken as they stand.

    Args:
        files: Source by path.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(b"\0\0".join([path.encode(), "\0".join(_tokens(files[path])).encode(), b""]))
    return found.hexdigest()


def package_files(paths: Iterable[Path] | None = None, folder: Path = PACKAGE) -> dict[str, str]:
    """The files that a digest is taken of.

    Args:
        paths: By default all Python files in `folder`.
        folder: A package.

    Returns:
        Source by path from the parent of `folder` on.
    """
    found = folder.rglob("*.py") if paths is None else paths
    return {path.relative_to(folder.parent).as_posix(): path.read_text(encoding="utf-8") for path in found}


def _tokens(source: str) -> Iterator[str]:
    lines = source.splitlines(keepends=True)
    opened: list[tuple[int, int]] = []  # where the f-strings that are not closed yet begin
    starts = [getattr(tokenize, name, -1) for name in ("FSTRING_START", "TSTRING_START")]
    ends = [getattr(tokenize, name, -1) for name in ("FSTRING_END", "TSTRING_END")]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in starts:
            opened.append(token.start)
        elif token.type in ends:
            begin = opened.pop()
            if not opened:
                yield _between(lines, begin, token.end)
        elif not opened and token.type not in _IGNORED:
            yield _LAYOUT.get(token.type, token.string)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, begin), (last, stop) = start, end
    if first == last:
        return lines[first - 1][begin:stop]
    return "".join([lines[first - 1][begin:], *lines[first : last - 1], lines[last - 1][:stop]])
