"""Which code was measured: a hash of source files, by which a measurement knows whether it is of the code at hand."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def source_hash(paths: Iterable[Path] | None = None, folder: Path = PACKAGE) -> str:
    """SHA-256 of the names and contents of files in `folder`, in order of their names; by default all of Python's."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py") if paths is None else paths):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
