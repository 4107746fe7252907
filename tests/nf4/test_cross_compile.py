"""What the kernels become on GPUs that are not here: resources, instructions, cache hints, contraction."""

import re

import pytest

from unsloth_puzzles.bench.cross_compile import ARCHITECTURES, CompileReport, cross_compile_in_subprocess
from unsloth_puzzles.nf4.launch import Config

SHARED_LIMIT = 65536  # bytes, a T4's
THREADS = 32 * Config().num_warps
WEIGHTS_A_THREAD = 8 * Config().words * Config().unroll // THREADS
VARIANTS = len(ARCHITECTURES) * (2 * 3 * 3 + 2)


@pytest.fixture(scope="module")
def reports() -> list[CompileReport]:
    return cross_compile_in_subprocess("tests.nf4.variants:jobs")


@pytest.fixture(scope="module")
def production(reports) -> list[CompileReport]:
    return [report for report in reports if not report.name.startswith("contracted")]


def opcodes(report: CompileReport, pattern: str) -> list[str]:
    return re.findall(rf"\b{pattern}", report.ptx)


def only(reports, *words) -> list[CompileReport]:
    found = [report for report in reports if set(words) <= set(report.name.split())]
    assert found, f"no variant is called {words}"
    return found


def test_every_variant_on_every_architecture(production):
    assert len({report.name for report in production}) == len(production) == VARIANTS
    assert {report.sm for report in production} == set(ARCHITECTURES) == {75, 80, 90, 100, 120}


def test_no_spills_and_little_shared_memory(production):
    assert {report.name: report.spills for report in production if report.spills} == {}
    assert {report.name: report.shared for report in production if report.shared > SHARED_LIMIT} == {}


def test_a_program_fits_an_sm(production):
    """Twice, so that one loads while the other stores: an SM has 65536 registers, a T4's 1024 threads."""
    assert THREADS <= 512
    assert {report.name: report.registers for report in production if 2 * THREADS * report.registers > 65536} == {}


def test_16_bit_output_needs_no_shared_memory(production):
    """Eight weights stay within their thread: they are stored without an exchange."""
    assert {r.name: r.shared for r in production if "fp32" not in r.name.split() and r.shared} == {}


def test_bfloat16_is_rounded_in_integers_below_sm_80(production):
    for report in only(production, "sm_75"):
        assert not opcodes(report, r"cvt\.\S*bf16"), report.name
        assert not opcodes(report, r"cvt\.\S*x2\."), report.name
    for report in only(production, "bf16", "sm_90"):
        assert opcodes(report, r"cvt\.rn\.bf16"), report.name


def test_nothing_is_contracted(production, reports):
    assert {report.name: report.contracted for report in production if report.contracted} == {}
    (contracted,) = only(reports, "contracted")
    assert contracted.contracted > 0, "with contraction on, the same source must give fma.rn.f32"


def test_multiplications_and_additions_are_rounded_to_nearest(production):
    for report in only(production, "nested"):
        assert opcodes(report, r"mul\.(rn\.)?(ftz\.)?f32"), report.name
        assert opcodes(report, r"add\.(rn\.)?f32"), report.name
        assert not opcodes(report, r"add\.\S*ftz\.f32"), f"{report.name}: the sum with the offset is not flushed"


def test_whole_words_are_loaded_and_16_bytes_stored(production):
    for report in only(production, "full") + only(production, "ragged"):
        assert opcodes(report, r"ld\.global\S*evict_first\S*\.b32"), report.name
        assert opcodes(report, r"st\.global\S*\.v4\.b32"), report.name
        assert any(".128" in opcode for opcode in report.instructions if opcode.startswith("STG")), report.name
    for report in only(production, "full"):
        narrow = [store for store in opcodes(report, r"st\.global\S*") if ".v4" not in store]
        assert not narrow, f"{report.name}: {narrow}"


def test_unaligned_kernels_assume_no_alignment(production):
    for report in only(production, "unaligned"):
        assert not opcodes(report, r"(ld|st)\.global\S*\.v[248]"), report.name


def test_cache_eviction_hints(production):
    for report in only(production, "full") + only(production, "ragged"):
        assert opcodes(report, r"ld\.global\S*L1::evict_first"), report.name
        assert opcodes(report, r"st\.global\S*L1::evict_first"), report.name
    for report in only(production, "full"):
        unhinted = [store for store in opcodes(report, r"st\.global\S*") if "evict_first" not in store]
        assert not unhinted, f"{report.name}: {unhinted}"


def test_inline_assembly_is_in_the_binary(production):
    for situation in ("full", "ragged"):
        for report in only(production, "asm", situation):
            assert len(opcodes(report, r"shfl\.sync\.idx\.b32")) == WEIGHTS_A_THREAD, report.name
            assert report.count("SHFL") == WEIGHTS_A_THREAD, report.name
            assert len(opcodes(report, r"mul\.rn\.ftz\.f32")) >= WEIGHTS_A_THREAD, report.name
    for report in only(production, "plain"):
        assert not opcodes(report, r"shfl"), report.name
