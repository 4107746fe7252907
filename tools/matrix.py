"""Run the quick tests, and compile the kernels, with every set of releases that is supported.

    python -m tools.matrix                                # all of them: hours on two cores
    python -m tools.matrix newest --only kernels          # minutes

The environments are made in build/matrix by uv, or by pip where uv is not installed. After each part of each
environment resources/measurements/matrix.json is written anew; what is not run keeps its former record, whose digest
says of which code it is.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tools.build_notebook import ROOT
from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.supported import TESTED

RECORD = ROOT / "resources/measurements/matrix.json"
FOLDER = ROOT / "build/matrix"
PYTHONS = {"oldest": "3.12", "pinned": "3.11", "colab": "3.13", "newest": "3.13"}
# Not needed for a test without a GPU. The pins of both wheels are those of torch 2.11.
LEFT_OUT = ("xformers", "nvidia-cuda-runtime-cu12", "liger-kernel", "cut-cross-entropy", "jupyter")
KEPT = ("gguf", "xllamacpp", "libgguf", "pytest", "ruff")  # pinned in every environment
NOT_COLABS = {"datasets": ">=4.7", "accelerate": ">=1.15"}  # what TRL and FSDP2 ask for; the install cell brings it
PARTS = ("kernels", "tests")
QUIET_SECONDS = 30
# It compares the pages with the measurements, of which this program has just written one. `make test` runs it.
NOT_HERE = "tests/test_readme.py::test_committed_page_is_what_the_measurements_give"
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def requirements(name: str) -> list[str]:
    """Return the requirements of an environment, lines for pip.

    Args:
        name: "pinned" takes requirements.txt, "colab" Colab's versions where notebook/colab.txt names some, "oldest"
            and "newest" the ends of `supported.TESTED`, and of all else what the resolver finds for these.
    """
    pins = {package: one for package, one in _pins("requirements.txt").items() if package not in LEFT_OUT}
    if name == "pinned":
        return [f"{package}=={version}" for package, version in pins.items()]
    if name == "colab":
        colab = {package: one for package, one in _pins("notebook/colab.txt").items() if package not in LEFT_OUT}
        fixed = {package: one for package, one in {**pins, **colab}.items() if package not in NOT_COLABS}
        return [*(f"{package}=={one}" for package, one in fixed.items()), *map("".join, NOT_COLABS.items())]
    end, patch = {"oldest": (0, "0"), "newest": (1, "*")}[name]
    ends = {package: f"{span[end]}.{patch}" for package, span in TESTED.items() if package != "triton"}  # of torch
    kept = {package: pins[package] for package in KEPT}
    free = [package for package in pins if package not in {*TESTED, *KEPT}]
    return [*(f"{package}=={version}" for package, version in {**ends, **kept}.items()), *free]


def _pins(path: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def make(name: str, minutes: float) -> Path:
    """Make the environment unless it is there, and return its interpreter.

    Raises:
        RuntimeError: There is no such Python, or the installation failed or took longer than `minutes`.
    """
    folder, needs = FOLDER / name, "\n".join(requirements(name)) + "\n"
    python, stamp = folder / "bin/python", folder / ".installed"
    if stamp.is_file() and stamp.read_text() == needs:
        return python
    base = _python(PYTHONS[name])
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    listed = FOLDER / f"{name}.txt"
    listed.write_text(needs)
    if uv := shutil.which("uv"):
        commands = [[uv, "venv", "--python", base, folder], [uv, "pip", "install", "--python", python, "-r", listed]]
    else:
        install = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "-r", listed]
        commands = [[base, "-m", "venv", folder], install]
    for command in commands:
        status, said = run(list(map(str, command)), minutes, {}, show=lambda line: None)
        if status != 0:
            raise RuntimeError(f"{name} could not be made: {' '.join(said[-3:]) or 'it took too long'}")
    stamp.write_text(needs)
    return python


def _python(version: str) -> str:
    own = sorted(map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python")))
    for one in filter(None, [shutil.which(f"python{version}"), *own]):  # pyenv puts names on the PATH that do not run
        if subprocess.run([one, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return one
    raise RuntimeError(f"Python {version} with venv must be on the PATH or in ~/.pyenv/versions, got none")


def run(
    command: list[str], minutes: float, environment: dict[str, str], show: Callable[[str], None] = print
) -> tuple[int | None, list[str]]:
    """Run a command with its progress shown, and return its status, None after `minutes`, and what it said.

    Args:
        command: Its words.
        minutes: After which it is ended with all that it has started.
        environment: Variables to add, or with "" to leave out.
        show: Is given each line; in silence a line says every `QUIET_SECONDS` that the command is at work.
    """
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value != ""}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    said, began = [], time.monotonic()

    def read() -> None:
        for line in process.stdout:
            said.append(line.rstrip("\n"))
            show(said[-1])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    told = began
    try:
        while process.poll() is None:
            reader.join(0.2)
            now = time.monotonic()
            if now - began > 60 * minutes:
                return None, said
            if now - told > QUIET_SECONDS:
                print(f"... {now - began:.0f} s, {len(said)} lines", flush=True)
                told = now
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    return process.returncode, said


def compile_kernels(python: Path, minutes: float) -> dict[str, object]:
    """Compile each kernel by the environment's Triton, and count builds, failures and resources."""
    # The tests' own interpreter of kernels must not be on, and a cache would hide a compiler that cannot compile.
    cache = python.parents[1] / "triton_cache"
    shutil.rmtree(cache, ignore_errors=True)
    environment = {"TRITON_INTERPRET": "", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    status, said = run([str(python), "-m", "tools.matrix_kernels"], minutes, environment, show=lambda line: None)
    builds = [json.loads(line) for line in said if line.startswith('{"name"')]
    done = [one for one in builds if "error" not in one]
    found = {"builds": len(builds), "failed": [one for one in builds if "error" in one], "ended": status == 0}
    if status != 0:
        found["said"] = said[-5:]
    return found | {most: max((one[most] for one in done), default=None) for most in ("registers", "spills", "shared")}


def test(python: Path, minutes: float, workers: int) -> dict[str, object]:
    """Run the quick tests: how many passed, failed and were skipped, and which failed."""
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "--tb=no", "-r", "fE", "-p", "no:cacheprovider"]
    command += ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder", "--deselect", NOT_HERE]
    began = time.monotonic()
    status, said = run(command, minutes, {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": ""})
    failed = [line.split(" ", 1)[1] for line in said if line.startswith(("FAILED ", "ERROR "))]
    found = {"ended": status in (0, 1), "minutes": round((time.monotonic() - began) / 60, 1), "failures": failed}
    closing = next((line for line in reversed(said) if " passed" in line or " failed" in line), "")
    counts = {kind.removesuffix("s"): int(number) for number, kind in COUNTS.findall(closing)}
    return {**{kind: counts.get(kind, 0) for kind in ("passed", "failed", "error", "skipped")}, **found}


def versions(python: Path) -> dict[str, str]:
    """Of Python and of the packages in `supported.TESTED`, as the environment has them."""
    code = (
        "import importlib.metadata as m, json, platform, sys; "
        "print(json.dumps({'python': platform.python_version(), **{p: m.version(p) for p in sys.argv[1:]}}))"
    )
    done = subprocess.run([python, "-c", code, *TESTED], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> int:
    """Run the environments that the command line names. Returns 1 if a build or a test failed, or did not end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help=f"of {', '.join(PYTHONS)}; all by default")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--minutes", type=float, default=90, help="time limit of each part of an environment")
    parser.add_argument("--workers", type=int, default=2, help="of the tests")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(PYTHONS):
        parser.error(f"ENVIRONMENT must be of {', '.join(PYTHONS)}, got {', '.join(sorted(unknown))}")
    record, good = json.loads(RECORD.read_text()) if RECORD.is_file() else {}, True
    for name in options.names or PYTHONS:
        print(f"== {name}", flush=True)
        try:
            python = make(name, options.minutes)
        except RuntimeError as error:
            print("FAILED:", error)
            good = False
            continue
        for part in PARTS if options.only is None else (options.only,):
            stamp = {"date": datetime.date.today().isoformat(), "digest": code_digest(package_files())}
            if part == "kernels":
                found = compile_kernels(python, options.minutes)
            else:
                found = test(python, options.minutes, options.workers)
            good &= found["ended"] and not found["failed"] and not found.get("error")
            if code_digest(package_files()) != stamp["digest"]:
                print(f"FAILED: the package was edited while {name}, {part} ran: not kept", flush=True)
                good = False
                continue
            record.setdefault(name, {})[part] = {**stamp, "versions": versions(python), **found}
            _write(record)
            print(f"{name}, {part}: {json.dumps({k: v for k, v in found.items() if k != 'failures'})}", flush=True)
    return 0 if good else 1


def _write(record: dict) -> None:
    unfinished = RECORD.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(RECORD)


if __name__ == "__main__":
    sys.exit(main())
