"""The committed notebook is a release: its metadata say when, on what and from which code it was executed.

    python -m tools.release                    what the committed notebook is of, and how far the code has moved since
    python -m tools.release publish FOLDER     make an executed notebook, and the resources of its run, the release

The package and the cells may change freely between releases.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.address import NOTEBOOK
from tools.build_notebook import ROOT, build, package_of, text
from tools.run_notebook import lines_with, problems
from unsloth_puzzles.bench.code_digest import code_digest
from unsloth_puzzles.bench.rubric import FILES

STAMP = "release"
KEYS = ("commit", "date", "digest", "hardware")


def stamp(node: NotebookNode, *, commit: str, date: str, hardware: str) -> None:
    """Write into the metadata of an executed notebook what it is a release of."""
    values = {"commit": commit, "date": date, "digest": code_digest(package_of(node)), "hardware": hardware}
    node.metadata[STAMP] = values


def inconsistencies(node: NotebookNode) -> list[str]:
    """Why a notebook is not a complete release that agrees with its own stamp, a line each."""
    found = node.metadata.get(STAMP)
    if not isinstance(found, dict) or sorted(found) != sorted(KEYS):
        return [f"metadata must hold {STAMP!r} with {', '.join(KEYS)}, got {found!r}"]
    lines = problems(node)
    lines += [f"an experiment failed: {line}" for line in lines_with("FAILED:", node)]
    if found["digest"] != code_digest(package_of(node)):
        lines.append("the files that it writes are not those of its stamp")
    return lines


def publish(folder: Path, root: Path = ROOT) -> list[str]:
    """Make the run in `folder` the release under `root`; what is wrong with it, and then nothing is written."""
    node = nbformat.read(folder / NOTEBOOK, as_version=4)
    measured = json.loads((folder / "resources/measurements/a_nf4.json").read_text(encoding="utf-8"))
    stamp(node, commit=_git(root, "rev-parse", "HEAD"), date=measured["date"], hardware=measured["hardware"]["name"])
    if found := inconsistencies(node):
        return found
    (root / NOTEBOOK).write_text(text(node), encoding="utf-8")
    for name in FILES.values():  # a section that measured nothing must not keep another run's figures
        (root / "resources/measurements" / name).unlink(missing_ok=True)
    shutil.copytree(folder / "resources", root / "resources", dirs_exist_ok=True)
    return []


def describe(root: Path = ROOT) -> str:
    """One paragraph: what the committed notebook is of, and how far the code has moved since."""
    node = nbformat.read(root / NOTEBOOK, as_version=4)
    if found := inconsistencies(node):
        return "\n".join(["The committed notebook is no release:", *found])
    of = node.metadata[STAMP]
    head = f"The committed notebook was executed on {of['date']} on {of['hardware']} at commit {of['commit'][:10]}."
    same = code_digest(package_of(build(root))) == of["digest"]
    count = _git(root, "rev-list", "--count", f"{of['commit']}..HEAD") or "an unknown number of"
    return f"{head} The code is {'the same' if same else 'another'} now, {count} commits later."


def _git(root: Path, *arguments: str) -> str:
    """What git says, or an empty text."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The committed notebook as a release.")
    parser.add_argument("what", nargs="?", choices=("describe", "publish"), default="describe")
    parser.add_argument("folder", nargs="?", type=Path, help="of an executed notebook, to be published")
    options = parser.parse_args(arguments)
    if options.what == "describe":
        print(describe())
        return 0
    if options.folder is None:
        parser.error("publish needs the folder of an executed notebook")
    if found := publish(options.folder):
        print("Not fit to be published:", *found, sep="\n  ")
        return 1
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
