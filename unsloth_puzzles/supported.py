"""Which releases of other libraries this package is tested with: the one place that says so.

    python -m unsloth_puzzles.supported    # what is tested, and what is installed

Importing the package warns once of an installed library outside of these. `make matrix` runs the quick tests and
compiles the kernels in the environments of `tools/matrix.py`, and keeps what came of it in
`resources/measurements/matrix.json`.
"""

import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable

# The oldest and the newest release that tests were run with: all of them with the releases of requirements.txt, most of
# the quick ones with the others. Of every release between, any patch is taken.
TESTED = {
    "torch": ("2.10", "2.15"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.15", "5.24"),
    "peft": ("0.20", "0.21"),
    "trl": ("1.16", "1.16"),
    "accelerate": ("1.15", "1.15"),  # with 1.14 the checkpoints of FSDP2 hold a part of the adapters
    "bitsandbytes": ("0.50", "0.50"),  # of 0.48 the de-quantised weights of a stored checkpoint differ
}
PYTHON = ("3.11", "3.13")


def untested(
    version_of: Callable[[str], str | None], python: tuple[int, int], triton_of_torch: str | None
) -> list[str]:
    """Name what is installed and was not tested, a phrase each.

    Args:
        version_of: The installed version of a package, None without it.
        python: Major and minor version.
        triton_of_torch: The release of Triton that the installed torch asks for, None if it names none.
    """
    found = [] if _between(".".join(map(str, python)), PYTHON) else [f"Python {python[0]}.{python[1]}"]
    for package in TESTED:
        version = version_of(package)
        if version is not None and not _between(version, TESTED[package]):
            found.append(f"{package} {version}")
    triton = version_of("triton")
    if triton and triton_of_torch and release(triton) != release(triton_of_torch):
        found.append(f"triton {triton} under torch {version_of('torch')}, which is built for {triton_of_torch}")
    return found


def warn_of_untested() -> None:
    """Warn, in one message, of everything that is installed and was not tested."""
    if found := untested(installed, sys.version_info[:2], triton_of_torch()):
        warnings.warn(f"unsloth_puzzles was not tested with {', '.join(found)}, but with {tested()}", stacklevel=3)


def tested() -> str:
    """All of `TESTED` in a line."""
    return ", ".join(f"{name} {_span(span)}" for name, span in {"Python": PYTHON, **TESTED}.items())


def installed(package: str) -> str | None:
    """The version that a package's own metadata name, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_of_torch() -> str | None:
    """The version of Triton that the installed torch asks for. Builds without CUDA ask for none."""
    if installed("torch") is None:
        return None
    needs = (re.match(r"triton\s*==\s*([\d.]+)", need) for need in importlib.metadata.requires("torch") or ())
    return next((need[1] for need in needs if need), None)


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _between(version: str, span: tuple[str, str]) -> bool:
    return release(span[0]) <= release(version) <= release(span[1])


def _span(span: tuple[str, str]) -> str:
    return span[0] if span[0] == span[1] else f"{span[0]} to {span[1]}"


def main() -> None:
    """Print what is tested beside what is installed."""
    print(f"{'Python':14}{_span(PYTHON):16}{sys.version_info[0]}.{sys.version_info[1]}")
    for package, span in TESTED.items():
        print(f"{package:14}{_span(span):16}{installed(package) or 'not installed'}")
    for phrase in untested(installed, sys.version_info[:2], triton_of_torch()):
        print("not tested:", phrase)


if __name__ == "__main__":
    main()
