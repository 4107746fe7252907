"""Rehearse a T4 on the GPU that is here, section by section.

    python -m tools.t4 [--sections A,B,E,C,D] [--out build/rehearsal] [--resume] [--keep PATH]

Each section runs in a kernel and an empty folder of its own: the package is told that the compute capability is 7.5
(libraries are told the truth), two CPU cores, 14.5 GiB of GPU memory, empty compiler caches. Every Triton kernel that
any process compiles is compiled for sm_75 afterwards. What came of it is written to OUT/SECTION.json after each section
and, together, to PATH. Exits 1 if anything is in `errors`.
"""

import argparse
import json
import sys
from pathlib import Path

from tools.build_notebook import ROOT
from tools.t4 import limits, sections
from tools.t4.rehearse import rehearse
from tools.t4.report import describe, summarise
from unsloth_puzzles.bench.record import write_json


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rehearse a T4.")
    parser.add_argument("--sections", default="A,B,E,C,D")
    parser.add_argument("--out", type=Path, default=ROOT / "build/rehearsal")
    parser.add_argument(
        "--resume", action="store_true", help="leave out the sections that OUT has results of this code of"
    )
    parser.add_argument("--keep", type=Path, default=ROOT / "resources/measurements/rehearsal.json")
    parser.add_argument("--seconds", type=float, default=limits.SECONDS, help="the most that a section may take")
    parser.add_argument("--gpu", type=int, default=0, help="which GPU, as nvidia-smi numbers them")
    options = parser.parse_args(arguments)
    for section in options.sections.split(","):
        result = options.out / f"{section}.json"
        if options.resume and result.exists() and json.loads(result.read_text())["section_digest"] == today(section):
            print(f"{section}: there already")
            continue
        found = rehearse(section, options.out, options.seconds, options.gpu)
        write_json(result, found)
        print(describe(section, found), flush=True)
    summary = summarise(options.out)
    write_json(options.keep, summary)
    return 1 if any(found["errors"] for found in summary["sections"].values()) else 0


def today(section: str) -> str:
    """The digest of the code that a section would run with."""
    return sections.digest(sections.notebook_of(section))


if __name__ == "__main__":
    sys.exit(main())
