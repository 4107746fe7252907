"""The suite notices a broken byte stream: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import Mutation, mutation, mutation_tests

NUMBERS = "test_stream.py::test_operators_on_numbers_are_refused"
HOOKS = "test_stream.py::test_gathered_tensor_shares_the_bytes_of_the_collective"
MODEL = "test_pack.py::test_packed_model_has_the_same_losses_and_gradients[2]"
REFUSED = "test_pack.py::test_models_that_cannot_be_packed_are_refused"
DORA = "test_dora.py::test_packed_layer_has_the_output_and_gradients_of_bitsandbytes[dropout-True]"
SHARDED = "test_sharding.py::test_gathering_changes_no_byte[per-parameter sharding]"
MUTATIONS = {
    "arithmetic on bytes": mutation("stream.py", "if func not in _MOVES:", "if False:", NUMBERS),
    "casts of bytes": mutation("stream.py", "not in (None, DTYPE):", "is Ellipsis:", NUMBERS),
    "the collective gets numbers": mutation(
        "stream.py", "return (self._words.view(torch.uint8),), None", "return (self._words,), None", HOOKS
    ),
    "absmax of the neighbour block": mutation(
        "stream.py",
        "absmax = stream[self.absmax_start : self.absmax_start + self.blocks]",
        "absmax = stream[self.absmax_start + 1 : self.absmax_start + 1 + self.blocks]",
        MODEL,
    ),
    "parts that are not aligned": mutation(
        "stream.py",
        "return _aligned(self.packed_bytes, _ALIGNMENT)",
        "return self.packed_bytes",
        "test_stream.py::test_parts_hold_every_byte_and_lie_apart",
    ),
    "a second absmax that overlaps": mutation(
        "stream.py",
        "self.absmax_start + self.blocks * (1 if self.blocksize2 else 4)",
        "self.absmax_start",
        "test_stream.py::test_parts_hold_every_byte_and_lie_apart",
    ),
    "a launch at the first stream's address": mutation(
        "launch.py",
        "launch.run(addresses=(start, start + absmax, table, code2",
        "launch.run(addresses=(launch.prepared[0].packed.data_ptr(), start + absmax, table, code2",
        "test_launch.py::test_the_addresses_are_those_of_the_stream_at_hand[options0]",
    ),
    "layers that wait for their gather": mutation(
        "shard.py",
        "layer.set_modules_to_forward_prefetch([following])",
        "pass",
        "test_prefetch.py::test_the_next_layer_is_gathered_before_a_layer_computes[1]",
    ),
    "no gradient of the input": mutation("linear.py", "if ctx.needs_input_grad[0]:", "if False:", MODEL),
    "weights that are tied, packed twice": mutation(
        "pack.py",
        "if len(names) > 1), None)",
        "if False), None)",
        REFUSED,
    ),
    "the bias of DoRA's base twice": mutation(
        "dora.py", "base_layer.multiply(x), None", "base_layer.multiply(x), bias", DORA
    ),
    "trained embeddings kept whole": mutation(
        "shard.py",
        "one.requires_grad or id(one) in seen",
        "id(one) in seen",
        "test_embeddings.py::test_an_embedding_that_is_trained_itself_is_not_kept_whole",
    ),
    "the checkpoint's compute dtype": mutation(
        "load.py",
        '{**given, "bnb_4bit_compute_dtype"',
        '{**given, "ignored"',
        "test_load.py::test_both_kinds_become_the_same_model",
    ),
    "trained parameters that nobody compares": mutation(
        "ranks.py",
        'compare_ranks("trained parameters", kinds)\n'
        '    _compare_bytes("values of trained parameters", trained, _SEED)',
        "pass",
        "test_failures.py::test_both_ranks_refuse_models_that_differ[dtypes]",
    ),
    "values that nobody compares": mutation(
        "ranks.py",
        '_compare_bytes("values of trained parameters", trained, _SEED)',
        "pass",
        "test_failures.py::test_both_ranks_refuse_values_that_differ[other adapters-values of trained parameters]",
    ),
    "hooks removed": Mutation(
        (
            ("stream.py", "def fsdp_pre_all_gather(", "def pre_all_gather("),
            ("stream.py", "def fsdp_post_all_gather(", "def post_all_gather("),
        ),
        "test_stream.py::test_fsdp2_gathers_bytes_and_casts_none[None]",
    ),
    "num_items_in_batch ignored": mutation(
        "shard.py",
        "groups: list = []",
        "groups: list = []\n"
        "    drop = lambda _, args, kwargs: (args, kwargs | {'num_items_in_batch': None})\n"
        "    model.register_forward_pre_hook(drop, with_kwargs=True)",
        "test_failures.py::test_ranks_with_unequal_labels_have_the_loss_and_norm_of_one_process",
    ),
    "the mask's minimum becomes infinite": mutation(
        "shard.py",
        "mask.clamp(min=torch.finfo(mask.dtype).min)",
        "mask",
        "test_mixed.py::test_an_additive_mask_of_float32_stays_finite",
    ),
    "replicated embeddings keep float32": mutation(
        "shard.py",
        "parameter.data = parameter.data.to(dtype)",
        "pass",
        "test_mixed.py::test_replicated_embeddings_have_the_dtype_of_the_policy",
    ),
    "codes of the other rank's share": mutation(
        "stream.py",
        "(stream,) = all_gather_outputs",
        "(stream,) = all_gather_outputs\n"
        "        data, half = stream.data, len(stream) // 2\n"
        "        data[:16], data[half : half + 16] = data[half : half + 16].clone(), data[:16].clone()",
        SHARDED,
    ),
}
FAST = ("arithmetic on bytes", "the collective gets numbers", "absmax of the neighbour block", "hooks removed")

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("fsdp2", MUTATIONS, FAST)
