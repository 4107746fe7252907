"""What the kernels become on GPUs that are not here: resources, instructions, cache hints, contraction."""

import re

import pytest

from benchmarks.nf4.variants import CONFIGS, every_job
from unsloth_puzzles.bench.cross_compile import ARCHITECTURES, CompileReport, cross_compile_in_subprocess

SHARED_LIMIT = 65536  # bytes, a T4's
REGISTERS = 65536  # of an SM
DTYPES = ("float16", "bfloat16", "float32")
KINDS = ("whole", "ragged", "unaligned", "plain absmax")
ALIGNED = ("whole", "ragged", "plain absmax")
WHOLE = ("whole", "plain absmax")  # no mask anywhere
T4_AND_H100 = (75, 90)


def jobs_for_t4_and_h100() -> list[dict]:
    return [job for job in every_job() if job["sm"] in T4_AND_H100]


@pytest.fixture(scope="module", params=[T4_AND_H100, pytest.param(ARCHITECTURES, marks=pytest.mark.slow)], ids=str)
def architectures(request) -> tuple[int, ...]:
    return request.param


@pytest.fixture(scope="module")
def reports(architectures) -> list[CompileReport]:
    if architectures == ARCHITECTURES:
        return cross_compile_in_subprocess("benchmarks.nf4.variants:every_job")
    return cross_compile_in_subprocess("tests.nf4.test_cross_compile:jobs_for_t4_and_h100")


@pytest.fixture(scope="module")
def contraction() -> dict[str, CompileReport]:
    reports = cross_compile_in_subprocess("benchmarks.nf4.variants:contraction_jobs")
    return {report.name: report for report in reports}


def ptx(report: CompileReport, pattern: str) -> list[str]:
    """Opcodes in the PTX that match `pattern`."""
    return re.findall(rf"\b{pattern}", report.ptx)


def only(reports, path=None, dtype=None, kinds=KINDS, sm=None) -> list[CompileReport]:
    found = []
    for report in reports:
        its_path, its_dtype, kind = report.name.split(" ", 2)
        if path in (None, its_path) and dtype in (None, its_dtype) and kind in kinds and sm in (None, report.sm):
            found.append(report)
    assert found, "no such variant"
    return found


def test_every_variant_on_every_architecture(reports, architectures):
    assert set(ARCHITECTURES) == {75, 80, 90, 100, 120}
    expected = {
        (f"{path} {dtype} {kind}", sm) for path in CONFIGS for dtype in DTYPES for kind in KINDS for sm in architectures
    }
    assert set(CONFIGS) == {"asm", "plain"}
    assert {(report.name, report.sm) for report in reports} == expected


def test_no_spills_and_little_shared_memory(reports):
    assert [(r.name, r.sm, r.spills) for r in reports if r.spills] == []
    assert [(r.name, r.sm, r.shared) for r in reports if r.shared > SHARED_LIMIT] == []


def test_two_programs_fit_an_sm(reports):
    """So that one loads while the other stores; a T4's SM holds 1024 threads."""
    for path, config in CONFIGS.items():
        threads = 32 * config.num_warps
        assert 2 * threads <= 1024
        for report in only(reports, path):
            assert 2 * threads * report.registers <= REGISTERS, (report.name, report.sm, report.registers)


def test_16_bit_output_needs_no_shared_memory(reports):
    """Eight weights stay within their thread: nothing is exchanged before they are stored."""
    for dtype in ("float16", "bfloat16"):
        assert {report.shared for report in only(reports, dtype=dtype)} == {0}


def test_bfloat16_is_rounded_in_integers_below_sm_80(reports):
    for report in only(reports, sm=75):
        assert not ptx(report, r"cvt\.\S*bf16"), report.name
        assert not ptx(report, r"cvt\.\S*x2\."), report.name
    for report in only(reports, dtype="bfloat16", sm=90):
        assert ptx(report, r"cvt\.rn\.bf16"), report.name


def test_no_multiply_add_is_contracted(reports):
    assert [(report.name, report.sm) for report in reports if report.contracted] == []


def test_contraction_follows_the_compile_option(contraction):
    """The same source: fused, code2 * absmax2 + offset is rounded once, and bitsandbytes rounds it twice."""
    assert contraction["separate"].contracted == 0
    assert contraction["fused"].contracted > 0


def test_multiplications_are_flushed_and_the_sum_with_the_offset_is_not(reports):
    for report in only(reports, kinds=("whole", "ragged", "unaligned")):
        assert ptx(report, r"mul\.(rn\.)?(ftz\.)?f32"), report.name
        assert ptx(report, r"add\.(rn\.)?f32"), report.name
        assert not ptx(report, r"add\.\S*ftz\.f32"), report.name


def test_whole_words_are_loaded_and_16_bytes_stored(reports):
    for report in only(reports, kinds=ALIGNED):
        assert ptx(report, r"ld\.global\S*evict_first\S*\.b32"), report.name
        assert ptx(report, r"st\.global\S*\.v4\.b32"), report.name
        assert any(".128" in opcode for opcode in report.instructions if opcode.startswith("STG")), report.name
    for report in only(reports, kinds=WHOLE):
        assert [store for store in ptx(report, r"st\.global\S*") if ".v4" not in store] == [], report.name


def test_unaligned_kernels_assume_no_alignment(reports):
    for report in only(reports, kinds=("unaligned",)):
        assert not ptx(report, r"(ld|st)\.global\S*\.v[248]"), report.name


def test_cache_eviction_hints(reports):
    for report in only(reports, kinds=ALIGNED):
        assert ptx(report, r"ld\.global\S*L1::evict_first"), report.name
        assert ptx(report, r"st\.global\S*L1::evict_first"), report.name
    for report in only(reports, kinds=WHOLE):
        assert [store for store in ptx(report, r"st\.global\S*") if "evict_first" not in store] == [], report.name


def test_inline_assembly_is_in_the_binary(reports):
    config = CONFIGS["asm"]
    weights = 8 * config.words * config.unroll // (32 * config.num_warps)  # of a thread
    for report in only(reports, "asm", kinds=ALIGNED):
        assert len(ptx(report, r"mul\.rn\.ftz\.f32")) >= weights, report.name
        if config.lookup == "shuffle":
            assert len(ptx(report, r"shfl\.sync\.idx\.b32")) == weights, report.name
            assert report.count("SHFL") == weights, report.name
        else:
            assert report.count("PRMT") >= weights, report.name
    for report in only(reports, "plain"):
        assert not ptx(report, r"shfl"), report.name
