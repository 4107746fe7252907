"""Compile every kernel for a T4, an A100 and an H100 with the Triton that is installed, a JSON object a line.

python -m tools.matrix_kernels    what `tools.matrix` starts in each environment; it needs no GPU
"""

import json

from benchmarks.nf4.variants import every_job
from tests.compiled import swiglu_to_compile
from unsloth_puzzles.bench.cross_compile import cross_compile

ARCHITECTURES = (75, 80, 90)


def main() -> None:
    """Print name, architecture and resources of each build, or why it failed; then go on with the next."""
    for job in (*every_job(), *swiglu_to_compile.jobs(architectures=ARCHITECTURES)):
        if job["sm"] not in ARCHITECTURES:
            continue
        line = {"name": job["name"], "sm": job["sm"]}
        try:
            report = cross_compile(**job)
        except Exception as error:  # whatever a compiler raises is this build's result
            line["error"] = f"{type(error).__name__}: {error}"[:500]
        else:
            line |= {name: getattr(report, name) for name in ("registers", "spills", "shared")}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
