"""The suite notices broken kernels: each mutation of a copy of the source makes the test named with it fail."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    file: str  # in unsloth_puzzles/nf4
    old: str
    new: str
    test: str  # in tests/nf4


WHOLE_AND_TAIL = "test_dequantize.py::test_whole_programs_and_odd_tails"
MUTATIONS = {
    "nibbles swapped": Mutation("kernel.py", "4 * (1 - j % 2)", "4 * (j % 2)", WHOLE_AND_TAIL),
    "nibbles swapped in the tail": Mutation("kernel.py", "_look_up(pair >> 4,", "_look_up(pair & 15,", WHOLE_AND_TAIL),
    "nibbles swapped in the assembly": Mutation(
        "asm.py", "(0 if weight % 2 else 4)", "(4 if weight % 2 else 0)", "test_asm.py::test_same_bits_as_the_formula"
    ),
    "offset dropped": Mutation("kernel.py", "tl.load(offset_ptr) if NESTED else 0.0", "0.0", WHOLE_AND_TAIL),
    "nested block off by one": Mutation(
        "kernel.py", "block // BLOCKSIZE2", "(block - 1) // BLOCKSIZE2", "test_dequantize.py::test_second_level_blocks"
    ),
    "tail unmasked by one weight": Mutation("kernel.py", "mask=byte * 2 + 1 < numel", "mask=mask", WHOLE_AND_TAIL),
    "tail unmasked by one byte": Mutation(
        "kernel.py", "mask = byte * 2 < numel", "mask = byte * 2 < numel + 2", WHOLE_AND_TAIL
    ),
    "tail taken for a whole program": Mutation(
        "launch.py", "full = aligned and not out.numel() %", "full = aligned and not 0 %", WHOLE_AND_TAIL
    ),
    "alignment assumed": Mutation(
        "launch.py",
        "out.data_ptr()) & 15",
        "out.data_ptr()) & 0",
        "test_dequantize.py::test_alignment_of_every_pointer_is_seen",
    ),
    "flush dropped": Mutation(
        "kernel.py",
        "tl.constexpr(2.0**-126 * 2.0**24)",
        "tl.constexpr(0.0)",
        "test_dequantize.py::test_tiny_subnormal_and_huge_absmax",
    ),
    "bfloat16 truncated": Mutation("kernel.py", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", WHOLE_AND_TAIL),
    "software bfloat16 rounds ties up": Mutation(
        "asm.py", '"and.b32 n, n, 1;"', '"mov.b32 n, 1;"', "test_asm.py::test_software_bfloat16_rounds_ties_to_even"
    ),
    "contraction on": Mutation(
        "launch.py",
        '"enable_fp_fusion": config.fp_fusion',
        '"enable_fp_fusion": True',
        "test_cross_compile.py::test_contraction_is_the_compilers_to_forbid",
    ),
}


def copy_with(folder: Path, mutation: Mutation | None) -> None:
    for name in ("unsloth_puzzles", "tests/nf4"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)  # with it pytest puts the copy before every other package
    if mutation:
        path = folder / "unsloth_puzzles" / "nf4" / mutation.file
        source = path.read_text()
        assert mutation.old in source, f"{mutation.file} no longer holds {mutation.old!r}"
        path.write_text(source.replace(mutation.old, mutation.new))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit status and output of every run, with "" for the copy that is not mutated."""
    jobs = {}
    for name, mutation in {"": None, **MUTATIONS}.items():
        folder = tmp_path_factory.mktemp("mutant")
        copy_with(folder, mutation)
        tests = {mutation.test} if mutation else {each.test for each in MUTATIONS.values()}
        jobs[name] = (str(folder), [f"tests/nf4/{test}" for test in sorted(tests)])
    command = [sys.executable, "-P", str(Path(__file__).with_name("run_mutants.py")), json.dumps([*jobs.values()])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outputs = [Path(folder, "output.txt").read_text() for folder, _ in jobs.values()]
    return dict(zip(jobs, zip(json.loads(done.stdout), outputs, strict=True), strict=True))


def test_the_unmutated_copy_passes(runs):
    status, output = runs[""]
    assert status == 0, output
    assert "skipped" not in output


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(runs, name):
    assert runs[""][0] == 0, "the unmutated copy fails too"
    status, output = runs[name]
    assert status == pytest.ExitCode.TESTS_FAILED, output
    assert "AssertionError" in output or "\nE   assert " in output, output
