"""The committed notebook is a release: its metadata say when, on what and from which code it was executed.

    python -m tools.release                    what the committed notebook is of, and how far the code has moved since
    python -m tools.release tested             exit 0 if `make test-slow` passed with the package's code as it is
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
from tools.build_notebook import PACKAGE, ROOT, package_of, text
from tools.measured_tables import points_table
from tools.outputs import lines_with, problems
from tools.run_notebook import SWEEPS
from unsloth_puzzles.bench import scorecard
from unsloth_puzzles.bench.challenges import FILES
from unsloth_puzzles.bench.code_digest import code_digest, package_files

STAMP = "release"
KEYS = {"commit", "date", "digest", "hardware"}
TESTS = "tests"  # the last key of a stamp, which releases of November 2026 and before lack
UNTESTED = "not run"
SCORECARD = "<!-- scorecard -->"  # in Markdown of a built notebook, where a release shows its points
MEASUREMENTS = Path("resources/measurements")


def publish(folder: Path, root: Path = ROOT, *, untested: bool = False) -> list[str]:
    """Make the run in `folder` the release under `root`.

    Args:
        folder: Holds an executed notebook, and the resources of its run.
        root: The checkout.
        untested: Publish although `make test-slow` has not passed with this code. The stamp says so.

    Returns:
        Why the run must not be published, a line each. Then nothing is written.
    """
    node = nbformat.read(folder / NOTEBOOK, as_version=4)
    digest = code_digest(package_of(node))
    measured = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in _measured(folder)}
    if not measured:
        return [f"nothing was measured in {folder}"]
    found = [f"{name} was measured with other code" for name, one in measured.items() if one["digest"] != digest]
    found += [f"{name} of the run is not the committed one" for name in _other_sweeps(folder, root)]
    tests = UNTESTED if untested else passed_tests(digest, root)
    if tests is None:
        found.append("`make test-slow` must pass with the notebook's code first, or it is published with --untested")
    first = next(iter(measured.values()))
    stamp(node, _git(root, "rev-parse", "HEAD"), first["date"], first["hardware"]["name"], tests)
    if found := found + inconsistencies(node):
        return found
    show_scorecard(node, folder / MEASUREMENTS)
    (root / NOTEBOOK).write_text(text(node), encoding="utf-8")
    for name in FILES.values():  # a section that measured nothing must not keep another run's values
        (root / MEASUREMENTS / name).unlink(missing_ok=True)
    for figure in (root / "resources").rglob("*.png"):  # so must one that the notebook no longer draws
        figure.unlink()
    shutil.copytree(folder / "resources", root / "resources", dirs_exist_ok=True)
    return []


def stamp(node: NotebookNode, commit: str, date: str, hardware: str, tests: object) -> None:
    """Write into the metadata of an executed notebook what it is a release of."""
    digest = code_digest(package_of(node))
    node.metadata[STAMP] = {"commit": commit, "date": date, "digest": digest, "hardware": hardware, TESTS: tests}


def show_scorecard(node: NotebookNode, measurements: Path) -> None:
    """Replace `SCORECARD` in a stamped notebook by the points of its run, with the date and the hardware.

    A notebook that is built and not released keeps the placeholder, a comment that no viewer shows.

    Args:
        node: Has the stamp.
        measurements: The folder of the measurement files of its run.
    """
    of, rows = node.metadata[STAMP], scorecard.score(measurements)
    short = [f"- {row.challenge}, {row.criterion}: {row.verdict}" for row in rows if row.verdict != scorecard.MET]
    shown = [
        f"**Scorecard of the published run**, executed on {of['date']} on {of['hardware']}. It is computed from the",
        "measurements of that run. The last section computes the scorecard of the run at hand in the same way.",
        "",
        points_table(rows),
        *(["", "Not met in the published run, or met with a reservation:", "", *short] if short else []),
    ]
    for cell in node.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace(SCORECARD, "\n".join(shown))


def passed_tests(digest: str, root: Path = ROOT) -> dict[str, object] | None:
    """Return the outcome of `make test-slow` with the code of `digest`; None if it has not passed with it.

    Returns:
        "passed" and "skipped" (numbers of tests), "date", and "hardware" (its name).
    """
    path = root / MEASUREMENTS / "tests.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"digest": ""}
    if kept["digest"] != digest or kept["failed"]:
        return None
    return {name: kept[name] for name in ("passed", "skipped", "date")} | {"hardware": kept["hardware"]["name"]}


def inconsistencies(node: NotebookNode) -> list[str]:
    """Why a notebook is not a complete release that agrees with its own stamp, a line each."""
    found = node.metadata.get(STAMP)
    if not isinstance(found, dict) or found.keys() - {TESTS} != KEYS:
        return [f"metadata must hold {STAMP!r} with {', '.join(sorted(KEYS))}, got {found!r}"]
    lines = problems(node)
    lines += [f"an experiment failed: {line}" for line in lines_with("FAILED:", node)]
    if found["digest"] != code_digest(package_of(node)):
        lines.append("the files that it writes are not those of its stamp")
    return lines


def describe(root: Path = ROOT) -> str:
    """Describe which code the committed notebook is of, and how far it has moved since, a sentence a line."""
    node = nbformat.read(root / NOTEBOOK, as_version=4)
    if found := inconsistencies(node):
        return "\n".join(["The committed notebook is no release:", *found])
    of, now = node.metadata[STAMP], code_digest(package_files(folder=root / PACKAGE))
    count = _git(root, "rev-list", "--count", f"{of['commit']}..HEAD") or "an unknown number of"
    changed = [path for path in (PACKAGE, "notebook", "benchmarks") for path in _changed(root, of["commit"], path)]
    return "\n".join(
        [
            f"The committed notebook was executed on {of['date']} on {of['hardware']} at commit {of['commit'][:10]}.",
            said_of_tests(of.get(TESTS)),
            f"HEAD is {count} commits later. The package's code is {'the same' if now == of['digest'] else 'another'}.",
            f"Files that differ: {', '.join(changed) or 'none'}.",
            f"`make test-slow` has {'' if passed_tests(now, root) else 'not '}passed with the package's code as it is.",
        ]
    )


def said_of_tests(tests: object) -> str:
    """A sentence about the tests of a release, from its stamp."""
    if tests is None:
        return "Whether `make test-slow` passed with its code was not recorded."
    if tests == UNTESTED:
        return "`make test-slow` was not run with its code."
    where = f"{tests['date']}, {tests['hardware']}"
    return f"`make test-slow` passed with its code: {tests['passed']} tests, {tests['skipped']} skipped ({where})."


def _measured(folder: Path) -> list[tuple[str, Path]]:
    """The measurement files of a run, without the sweeps that it was given."""
    paths = [(name, folder / MEASUREMENTS / name) for name in FILES.values()]
    return [(name, path) for name, path in paths if path.exists()]


def _other_sweeps(folder: Path, root: Path) -> list[str]:
    """The sweeps that a run showed and that `root` has otherwise or not at all."""
    shown, kept = ({path.name: path.read_bytes() for path in (at / MEASUREMENTS).glob(SWEEPS)} for at in (folder, root))
    return sorted(name for name, content in shown.items() if kept.get(name) != content)


def _changed(root: Path, commit: str, folder: str) -> list[str]:
    """How many files of a folder differ from a commit, as one text, or none."""
    count = len(_git(root, "diff", "--name-only", commit, "--", folder).splitlines())
    return [f"{count} in {folder}/"] if count else []


def _git(root: Path, *arguments: str) -> str:
    """Return git's output, or an empty text."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The committed notebook as a release.")
    parser.add_argument("what", nargs="?", choices=("describe", "tested", "publish"), default="describe")
    parser.add_argument("folder", nargs="?", type=Path, help="of an executed notebook, to be published")
    parser.add_argument("--untested", action="store_true", help="publish what `make test-slow` has not passed with")
    options = parser.parse_args(arguments)
    if options.what == "tested":
        return 0 if passed_tests(code_digest(package_files())) else 1
    if options.what == "publish":
        if options.folder is None:
            parser.error("publish needs the folder of an executed notebook")
        if found := publish(options.folder, untested=options.untested):
            print("Not fit to be published:", *found, sep="\n  ")
            return 1
    print(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main())
