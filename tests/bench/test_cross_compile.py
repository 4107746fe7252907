"""What a kernel becomes on a GPU that is not here."""

from pathlib import Path

import pytest

from unsloth_puzzles.bench.cross_compile import (
    ARCHITECTURES,
    CompileReport,
    cross_compile,
    cross_compile_in_subprocess,
)

ON_EVERY = pytest.mark.parametrize("sm", ARCHITECTURES)


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield


@pytest.fixture(scope="module")
def reports(importable) -> dict[tuple[str, int], CompileReport]:
    return {(report.name, report.sm): report for report in cross_compile_in_subprocess("kernels_to_compile:jobs")}


@ON_EVERY
def test_contraction_is_counted_in_ptx_and_sass(reports, sm):
    fused, exact = reports["fused", sm], reports["exact", sm]
    assert fused.contracted == fused.count("FFMA") == 512 // 128
    assert exact.contracted == exact.count("FFMA") == 0
    assert exact.count("FMUL") + exact.count("FMUL2") > 0


@ON_EVERY
def test_divisible_arguments_are_loaded_in_128_bits(reports, sm):
    wide = reports["exact", sm].instructions
    assert any(opcode.startswith("LDG") and ".128" in opcode for opcode in wide)
    assert not any(".128" in opcode for opcode in reports["fused", sm].instructions)


@ON_EVERY
def test_string_constexpr_reaches_ptx_and_sass(reports, sm):
    assert "evict_first" in reports["exact", sm].ptx
    assert any(opcode.startswith("LDG") and ".EF" in opcode for opcode in reports["exact", sm].instructions)


@ON_EVERY
def test_copy_kernel_compiles_without_spills(reports, sm):
    report = reports["copy", sm]
    assert (report.spills, report.shared) == (0, 0)
    assert report.count("LDG") == report.count("STG") == 2048 // (128 * 4)


def test_report_has_registers_and_spills(reports):
    free, tight = reports["sort", 75], reports["sort in 32 registers", 75]
    assert free.spills == free.count("STL") == 0
    assert free.registers > 32 >= tight.registers
    assert tight.spills > 0 and tight.count("STL") > 0
    assert tight.spills % 4 == 0


def test_count_includes_modifiers_of_an_opcode():
    report = CompileReport("k", 75, 1, 0, 0, {"LDG.E": 2, "LDG.E.128": 3, "LDGSTS.E": 5}, "", 0)
    assert (report.count("LDG"), report.count("LDG.E.128"), report.count("LD"), report.count()) == (5, 3, 0, 10)


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ("misnamed", r"once, got missing \['y_ptr'\], unknown \['z_ptr'\]"),
        ("misaligned", r"divisible must be names of the signature, .* got \['BLOCK'\]"),
        ("absent", "absent"),
    ],
)
def test_failing_job_raises_with_its_message(jobs, message):
    with pytest.raises(RuntimeError, match=message):
        cross_compile_in_subprocess(f"kernels_to_compile:{jobs}")


def test_interpreted_kernel_is_refused():
    def not_compiled():
        pass

    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 .* cross_compile_in_subprocess"):
        cross_compile(not_compiled, {}, {}, 75)
