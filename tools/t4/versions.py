"""Which packages a rehearsal ran with: against Colab's (notebook/colab.txt), and what the install cell changed."""

import json
import re
import subprocess
from pathlib import Path

from tools.build_notebook import ROOT

COLAB = ROOT / "notebook" / "colab.txt"
_LIST = """
import importlib.metadata, json
found = {}
for one in importlib.metadata.distributions():
    if one.metadata["Name"]:
        found.setdefault(one.metadata["Name"], one.version)  # the first on the path is the one that is imported
print(json.dumps(found))
"""


def installed(python: str) -> dict[str, str]:
    """Versions of all packages of the interpreter, by normalised name, by their metadata; nothing is imported."""
    done = subprocess.run([python, "-c", _LIST], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for name, version in json.loads(done.stdout.splitlines()[-1]).items():
        found.setdefault(normal(name), version)
    return found


def colab(file: Path = COLAB) -> dict[str, str]:
    """The versions of Colab's runtime, by normalised name."""
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {normal(name): version.strip() for name, version in pairs}


def against_colab(found: dict[str, str], wanted: dict[str, str]) -> dict[str, dict]:
    """{package: {"here", "Colab", "same"}}, for what Colab's list names; "here" is None for what is not there.

    A build tag ("+cu128") does not count.
    """
    return {
        name: {"here": found.get(name), "Colab": version, "same": (found.get(name) or "").split("+")[0] == version}
        for name, version in wanted.items()
    }


def changes(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the install cell's changes, a line a package."""
    lines = []
    for name in sorted(before | after):
        was, now = before.get(name), after.get(name)
        if was != now:
            lines.append(f"{name} {now} installed" if was is None else f"{name} {was} -> {now or 'removed'}")
    return lines


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
