"""Real text with labels, without a hub: the docstrings of Python's standard library, each labelled by its package.

data = docstrings()
print(data.counts())

A text never says which package it is from: names of packages are removed from it.
"""

import ast
import inspect
import random
import re
import sysconfig
import tokenize
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

MIN_FILES, MIN_TEXTS = 4, 80
MIN_WORDS = 4
NOT_PROSE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "ensurepip", "pydoc_data"}
REMOVED = {"distutils", "lib2to3"}  # of Python 3.11 alone: without them the labels of 3.11 to 3.13 are the same


@dataclass(frozen=True)
class Example:
    """One docstring: its text without names of packages, the index of its package, and the file that holds it."""

    text: str
    label: int
    file: str


@dataclass(frozen=True)
class Docstrings:
    """Examples for training and for testing. No file and no text is in both."""

    labels: list[str]
    train: list[Example]
    test: list[Example]

    def counts(self) -> str:
        """A Markdown table: files and docstrings of each package on both sides of the split."""
        lines = ["| package | training: files | docstrings | test: files | docstrings |", "|---" * 5 + "|"]
        for label, name in enumerate(self.labels):
            cells = []
            for part in (self.train, self.test):
                own = [one for one in part if one.label == label]
                cells += [len({one.file for one in own}), len(own)]
            lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        return "\n".join(lines)


def docstrings(
    folder: Path | str | None = None, *, test_share: float = 0.25, most: int | None = None, seed: int = 0
) -> Docstrings:
    """Collect the docstrings of modules, classes and functions below a folder of packages.

    Packages count that have at least 4 files with docstrings and 80 docstrings, after duplicates are dropped. Whole
    files go to the test side, of each package until it holds `test_share` of its docstrings.

    Args:
        folder: The packages' folder; None is the standard library of this Python. Its files are read, never imported.
        test_share: The part of each package's docstrings that is tested on, above 0 and below 1.
        most: The largest number of training examples of a package, drawn at random; None for all.
        seed: Decides the split and the order.

    Raises:
        ValueError: `test_share`; fewer than two packages have enough docstrings.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must be a number above 0 and below 1, got {test_share}")
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    packages = sorted(path.parent.name for path in folder.glob("*/__init__.py") if path.parent.name not in NOT_PROSE)
    texts = {name: _of_package(folder / name, packages) for name in packages if name not in REMOVED}
    found = _without_duplicates(texts)
    large = [name for name, texts in found.items() if _is_large(texts)]
    if len(large) < 2:
        raise ValueError(f"folder must hold at least two packages with {MIN_TEXTS} docstrings, got {large} in {folder}")
    draw, train, test = random.Random(seed), [], []
    for label, name in enumerate(large):
        ours, theirs = _split(found[name], test_share, draw)
        draw.shuffle(ours)
        train += [Example(text, label, file) for text, file in ours[:most]]
        test += [Example(text, label, file) for text, file in theirs]
    draw.shuffle(train)
    draw.shuffle(test)
    return Docstrings(large, train, test)


def _of_package(folder: Path, packages: list[str]) -> list[tuple[str, str]]:
    """Pairs of a text and its file, relative to the folder of packages."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder.parent)
        if NOT_PROSE & set(inner.parts):
            continue
        try:
            with tokenize.open(path) as file:  # with the encoding that the file declares
                tree = ast.parse(file.read())
        except (SyntaxError, UnicodeDecodeError):  # some files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = _without_names(ast.get_docstring(node) or "", packages)
                if len(re.findall(r"[A-Za-z]{2,}", text)) >= MIN_WORDS:
                    found.append((text, inner.as_posix()))
    return found


def _without_names(text: str, packages: list[str]) -> str:
    """The text in one line, without any word that holds the name of a package, such as `asyncio.run` or `EmailError`.

    Names of at most three letters (`re`, `os`) are words or parts of words: they are removed only where they stand
    alone.
    """
    long = "|".join(sorted((re.escape(name.strip("_")) for name in packages if len(name) > 3), key=len, reverse=True))
    short = "|".join(re.escape(name) for name in packages if len(name) <= 3)
    if long:
        text = re.sub(rf"[\w.]*(?:{long})[\w.]*", " ", text, flags=re.IGNORECASE)
    if short:
        text = re.sub(rf"\b(?:{short})\b", " ", text)
    return " ".join(inspect.cleandoc(text).split())


def _without_duplicates(found: dict[str, list[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """A text that several packages have belongs to none; one that a package has twice is kept once."""
    owners = defaultdict(set)
    for name, texts in found.items():
        for text, _ in texts:
            owners[text.lower()].add(name)
    kept = {}
    for name, texts in found.items():
        first = {text.lower(): (text, file) for text, file in reversed(texts)}
        kept[name] = [pair for text, pair in reversed(first.items()) if len(owners[text]) == 1]
    return kept


def _is_large(texts: list[tuple[str, str]]) -> bool:
    return len({file for _, file in texts}) >= MIN_FILES and len(texts) >= MIN_TEXTS


def _split(texts: list[tuple[str, str]], share: float, draw: random.Random) -> tuple[list, list]:
    """Training and test texts. Files are drawn until the test side has its share; a file too large for it is passed."""
    sizes = Counter(file for _, file in texts)
    files, wanted, chosen, held = sorted(sizes), share * len(texts), set(), 0
    draw.shuffle(files)
    for file in files:
        if held < wanted and held + sizes[file] <= 1.2 * wanted + 1 and len(chosen) < len(files) - 1:
            chosen.add(file)
            held += sizes[file]
    if not chosen:  # every file is too large
        chosen.add(min(files, key=sizes.__getitem__))
    return [pair for pair in texts if pair[1] not in chosen], [pair for pair in texts if pair[1] in chosen]
