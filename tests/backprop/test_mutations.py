"""The suite notices a broken op: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import Mutation, mutation, mutation_tests

MEAN, ROWS = (f"test_linear.py::test_unchecked[{name}]" for name in ("mean", "rows"))
COUNT = "count = (labels != call.options.ignore_index).sum()"
MUTATIONS = {
    "gradient times the number of chunks": mutation(
        "additive.py", "torch.where(nothing, 0, boost / count)", "boost / count * len(call.spans)", MEAN
    ),
    "mean of the chunks' means": Mutation(
        (
            ("arguments.py", "return (labels != self.ignore_index).sum() if", "return torch.ones(()) if"),
            ("additive.py", COUNT, "count = torch.tensor(8.0 * len(call.spans))"),  # pieces are eighths of a chunk
        ),
        MEAN,
    ),
    "chunks weighted by their rows": mutation(
        "arguments.py", "return (labels != self.ignore_index).sum() if", "return (labels == labels).sum() if", MEAN
    ),
    "blocks of rows for a kernel that scans them": mutation(
        "tiles.py", '("scan", "sort")', '("sort",)',
        "test_tiles.py::test_only_plain_reductions_of_long_rows_get_the_blocks",
    ),
    "upstream ignored": mutation("linear.py", "upstream * factor", "factor", MEAN),
    "upstream of rows ignored": mutation(
        "rowwise.py",
        "None if u is None else u[start:stop]",
        "None if u is None else torch.ones_like(u[start:stop])",
        ROWS,
    ),
    "ignored labels counted": mutation("additive.py", COUNT, "count = torch.tensor(labels.numel())", MEAN),
    "last ragged chunk dropped": mutation(
        "chunks.py", "range(0, len(x), rows)", "range(0, len(x) - rows + 1, rows)", MEAN
    ),
    "dW for a frozen head": mutation(
        "linear.py",
        "linear.named_parameters() if value.requires_grad",
        "linear.named_parameters()",
        "test_heads.py::test_a_frozen_head_makes_no_buffer_of_the_weights_size",
    ),
    "dW of the last chunk only": mutation("sums.py", "first = self.total is None", "first = True", MEAN),
    "saved gradients scaled though the graph is kept": mutation(
        "linear.py", "g.clone() if retained else g", "g.data", "test_linear.py::test_a_second_backward[mean]"
    ),
    "0/0 of a chunk without labels": mutation(
        "eager.py",
        "return gradients if weight is None else",
        "return gradients if True else",
        "test_linear.py::test_a_chunk_without_labels_in_a_mean_that_divides_by_their_number[logits]",
    ),
    "0/0 of a chunk without labels, projected by the function": mutation(
        "additive.py",
        "live = None if weight is None else weight > 0",
        "live = None",
        "test_linear.py::test_a_chunk_without_labels_in_a_mean_that_divides_by_their_number[linear]",
    ),
    "a weight that was computed gets no gradient": mutation(
        "heads.py",
        "weight_sum is None and weight.requires_grad",
        "False",
        "test_arguments.py::test_a_shared_weight_that_the_function_projects_with[sum]",
    ),
    "row arguments' gradients in the wrong rows": mutation(
        "eager.py",
        "add(start, gradients[1:])",
        "add(0, gradients[1:])",
        "test_arguments.py::test_gradients_of_row_and_shared_arguments[sum-logits]",
    ),
    "a gradient without a power of two": mutation(
        "additive.py",
        "if call.dtype == torch.float16 else",
        "if False else",
        "test_dtypes.py::test_float16_gradients_of_a_mean_do_not_underflow[mean-False]",
    ),
    "float16 sums without room": mutation(
        "sums.py",
        "scale = _power(self._bound)",
        "scale = torch.ones(())",
        "test_dtypes.py::test_float16_sums_of_many_rows_do_not_overflow[None-4096-sum]",
    ),
    "a float32 sum narrowed without room": mutation(
        "sums.py",
        "if scaled and tensor.dtype == torch.float16:",
        "if False:",
        "test_dtypes.py::test_float16_sums_of_many_rows_do_not_overflow[float32-4096-sum]",
    ),
    "other random numbers in the backward": mutation(
        "rng.py",
        "torch.set_rng_state(cpu)",
        "pass",
        "test_random.py::test_gradients_belong_to_the_numbers_of_the_forward[dropout in the function, none]",
    ),
    "numbers of the head drawn again over kept logits": mutation(
        "rowwise.py",
        'at(i if chunk is None else (i, "kept"))',
        "at(i)",
        "test_random.py::test_gradients_belong_to_the_numbers_of_the_forward[both, kept]",
    ),
    "a lost gradient": mutation(
        "results.py",
        "if leaf is not None and not any(",
        "if False and not any(",
        "test_bad_input.py::test_a_gradient_that_no_argument_could_bring_is_refused[sum-linear]",
    ),
    "functions of one code taken for one": mutation(
        "trust.py",
        "*(_identity(value, depth) for value in held))",
        ")",
        "test_bad_input.py::test_functions_of_one_code_are_told_apart_by_what_they_hold",
    ),
    "factor rounded to 16 bits": mutation(
        "scale.py",
        "piece.to(exact) * factor.to(exact)",
        "piece * factor.to(piece.dtype)",
        "test_scale.py::test_a_third_is_not_rounded_to_16_bits_first",
    ),
    "not narrowed behind the first run": mutation(
        "scale.py",
        "narrow[done:stop].copy_(wide[done:stop])",
        "pass",
        "test_scale.py::test_narrowed_in_its_own_memory",
    ),
    "whole logits": mutation(
        "chunks.py", "    return [(start, min", "    rows = len(x)\n    return [(start, min",
        "test_memory.py::test_no_tensor_is_larger_than_a_chunk_of_logits[sum]",
    ),
}  # fmt: skip

FAST = (  # bugs that others have made
    "gradient times the number of chunks",
    "mean of the chunks' means",
    "upstream ignored",
    "ignored labels counted",
    "dW of the last chunk only",
)

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("backprop", MUTATIONS, FAST)
