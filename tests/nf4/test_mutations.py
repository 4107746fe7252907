"""The suite notices broken kernels: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

WHOLE_AND_TAIL = "test_dequantize.py::test_whole_programs_and_odd_tails"
MUTATIONS = {
    "nibbles swapped": mutation("kernel.py", "4 * (1 - j % 2)", "4 * (j % 2)", WHOLE_AND_TAIL),
    "nibbles swapped in the tail": mutation("kernel.py", "_look_up(pair >> 4,", "_look_up(pair & 15,", WHOLE_AND_TAIL),
    "nibbles swapped in the assembly": mutation(
        "asm.py",
        "(0 if weight % 2 else 4)",
        "(4 if weight % 2 else 0)",
        "test_asm.py::test_assembly_gives_the_bits_of_the_formula",
    ),
    "offset dropped": mutation("kernel.py", "tl.load(offset_ptr) if NESTED else 0.0", "0.0", WHOLE_AND_TAIL),
    "nested block off by one": mutation(
        "kernel.py", "block // BLOCKSIZE2", "(block - 1) // BLOCKSIZE2", "test_dequantize.py::test_second_level_blocks"
    ),
    "tail unmasked by one weight": mutation("kernel.py", "mask=byte * 2 + 1 < numel", "mask=mask", WHOLE_AND_TAIL),
    "tail unmasked by one byte": mutation(
        "kernel.py", "mask = byte * 2 < numel", "mask = byte * 2 < numel + 2", WHOLE_AND_TAIL
    ),
    "tail taken for a whole program": mutation(
        "launch.py", "full = aligned and not numel %", "full = aligned and not 0 %", WHOLE_AND_TAIL
    ),
    "alignment assumed": mutation(
        "launch.py",
        "(addresses[0] | address) & 15",
        "(addresses[0] | address) & 0",
        "test_dequantize.py::test_kernel_is_built_for_the_alignment_of_every_pointer",
    ),
    "flush dropped": mutation(
        "kernel.py",
        "tl.constexpr(2.0**-126 * 2.0**24)",
        "tl.constexpr(0.0)",
        "test_dequantize.py::test_tiny_subnormal_and_huge_absmax",
    ),
    "bfloat16 truncated": mutation("kernel.py", "bits + 0x7FFF + ((bits >> 16) & 1)", "bits", WHOLE_AND_TAIL),
    "software bfloat16 rounds ties up": mutation(
        "asm.py", '"and.b32 n, n, 1;"', '"mov.b32 n, 1;"', "test_asm.py::test_software_bfloat16_rounds_ties_to_even"
    ),
    "contraction on": mutation(
        "build.py",
        '"enable_fp_fusion": config.fp_fusion',
        '"enable_fp_fusion": True',
        "test_cross_compile.py::test_contraction_follows_the_compile_option",
    ),
}

FAST = (  # bugs that others have made
    "nibbles swapped",
    "offset dropped",
    "tail taken for a whole program",
    "contraction on",
)

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("nf4", MUTATIONS, FAST)
