"""Run the gpu-marked tests and keep their summary: `python -m tools.gpu_tests`.

Writes resources/measurements/gpu_tests.json: hardware, versions, date, a digest of the package's code, passed, failed,
and each skip with its reason.
Refuses without a GPU, where every one of them would be a skip.
"""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tools.build_notebook import ROOT
from tools.run_notebook import gpu_present

SUMMARY = ROOT / "resources" / "measurements" / "gpu_tests.json"
REPORT = ROOT / "build" / "gpu_tests.xml"
GIB_PER_WORKER, MOST_WORKERS = 16, 8  # most tests wait for a compiler, and none needs more memory than a T4 has


def main() -> int:
    if not gpu_present():
        print("make gpu-test needs a CUDA GPU, and torch sees none; nothing was run or written.", file=sys.stderr)
        return 1
    from unsloth_puzzles.bench.code_digest import code_digest, package_files
    from unsloth_puzzles.bench.hardware import probe, versions

    hardware = dataclasses.asdict(probe(measure=False))
    REPORT.parent.mkdir(exist_ok=True)
    REPORT.unlink(missing_ok=True)
    workers = min(MOST_WORKERS, os.cpu_count() or 1, int(hardware["memory_gib"] // GIB_PER_WORKER))
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--durations=30", f"--junitxml={REPORT}"]
    command += ["-n", str(workers)] if workers > 1 else []
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not REPORT.exists():
        print(f"pytest ended with {done.returncode} and wrote no report; {SUMMARY.name} is left as it was.")
        return 1
    counts = summarise(REPORT)
    record = {"hardware": hardware, "versions": versions(), "date": datetime.date.today().isoformat()}
    record |= {"package": code_digest(package_files()), **counts}
    SUMMARY.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    done_text = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    print(f"{SUMMARY.relative_to(ROOT)}: {done_text}")
    return done.returncode


def summarise(report: Path) -> dict[str, object]:
    """Counts of a JUnit XML file, the names of the failed tests, and name and reason of the skipped ones."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures, skips = [], []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failures.append(name)
        elif (skip := case.find("skipped")) is not None:
            skips.append({"test": name, "reason": skip.get("message", "")})
    return {
        "passed": len(cases) - len(failures) - len(skips),
        "failed": len(failures),
        "skipped": len(skips),
        "failures": failures,
        "skips": skips,
    }


if __name__ == "__main__":
    sys.exit(main())
