"""The suite notices a broken mask: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

DEFINITION = "test_pattern.py::test_dense_mask_equals_the_definition"
INSIDE = "test_blocks.py::test_mask_inside_a_block_equals_the_dense_mask"
GRAPHS = "test_compile.py::test_one_forward_and_one_backward_graph[None]"
MUTATIONS = {
    "window off by one": mutation("pattern.py", "queries - keys < pattern.window", "queries - keys <= pattern.window",
                                  "test_pattern.py::test_window_equals_that_of_transformers[3]"),
    "window off by one inside a block": mutation("blocks.py", "(i - k < window)", "(i - k <= window)", INSIDE),
    "a block at the window's end left out": mutation(
        "blocks.py", "some & (q_first - k_last < pattern.window)", "some & (q_last - k_first < pattern.window)",
        "test_blocks.py::test_block_that_the_window_reaches_into_is_visited",
    ),
    "documents leak into each other": mutation("pattern.py", "else seen & same", "else seen", DEFINITION),
    "documents leak inside a block": mutation("blocks.py", "same & (k <= i)", "(k <= i)", INSIDE),
    "a block of two documents taken for whole": mutation(
        "blocks.py", "(q_from == q_to) & ", "", "test_blocks.py::test_block_with_two_documents_is_partial"
    ),
    "an id that comes again is the same document": mutation(
        "pattern.py", "ids[:, 1:] != ids[:, :-1]", "ids[:, 1:] > ids[:, :-1].cummax(-1).values",
        "test_pattern.py::test_documents_are_numbered_by_stretches",
    ),
    "causal flag dropped": mutation("sdpa.py", "is_causal=causal", "is_causal=False",
                                    "test_interface.py::test_forward_equals_the_definition[40-40-causal-sdpa]"),
    "scale dropped": mutation("sdpa.py", "scale=scale", "scale=None",
                              "test_interface.py::test_forward_equals_the_definition[40-40-scale-sdpa]"),
    "padding seen": mutation(
        "masks.py", "if hidden.all():", "if causal:",
        "test_models.py::test_logits_equal_those_of_transformers[Llama-padded on the left-auto]",
    ),
    "the last window counts, not the least": mutation(
        "masks.py", "min(windows, default=None)", "windows[-1] if windows else None",
        "test_masks.py::test_combined_masks_of_one_kind_narrow_each_other[parts2-last_row2]",
    ),
    "the last documents count alone": mutation(
        "masks.py", "documents = one if documents is None else", "documents = one if True else",
        "test_masks.py::test_mask_function_is_combined_with_packed_positions",
    ),
    "an id of packed sequences that comes again": mutation(
        "masks.py", "if not torch.equal(changes, kinds):", "if False:",
        "test_masks.py::test_random_combinations_equal_transformers_masks",
    ),
    "padded keys of cross attention": mutation(
        "masks.py", "if not causal:  #", "if False:  #",
        "test_masks.py::test_cross_attention_with_as_many_queries_as_padded_keys_is_dense",
    ),
    "a mask for another number of keys": mutation(
        "model_mask.py", "if found != need:", "if False:",
        "test_arguments.py::test_lengths_that_differ_from_the_mask_are_refused",
    ),
    "a module that says it is not causal": mutation(
        "models.py", 'getattr(module, "is_causal", True) if', "True if",
        "test_towers.py::test_outputs_equal_those_with_sdpa[CLIP]",
    ),
    "a forced recompilation per length": mutation(
        "blocks.py", "torch._dynamo.maybe_mark_dynamic(table, tuple(range(2, table.dim())))",
        "torch._dynamo.mark_static(table, tuple(range(2, table.dim())))", GRAPHS,
    ),
    "soft cap without its tanh": mutation(
        "dense.py", "soft_cap * torch.tanh(scores / pattern.soft_cap)", "soft_cap * scores",
        "test_interface.py::test_forward_equals_the_definition[40-40-soft cap-dense]",
    ),
}  # fmt: skip

FAST = (  # bugs that others have made
    "window off by one",
    "documents leak into each other",
    "padding seen",
)

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("attention", MUTATIONS, FAST)
