"""The suite notices broken compilation: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

SAME_BITS = "test_checkpoint.py::test_checkpointed_gradients_are_bit_identical"
LENGTHS = "test_variants.py::test_lengths_and_modules_share_one_compiled_function"
MUTATIONS = {
    "a forced recompilation per length": mutation(
        "variants.py", "torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))", "torch._dynamo.mark_static(tensor, (0, 1))",
        LENGTHS,
    ),
    "lengths not marked": mutation(
        "variants.py", "torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))", "pass", LENGTHS
    ),
    "one function for inputs with and without gradients": mutation(
        "variants.py", "input_requires_grad=hidden_states.requires_grad", "input_requires_grad=True",
        "test_variants.py::test_compile_key_includes_gradients",
    ),
    "one function for the positions of one row and of several": mutation(
        "variants.py", "_ones(hidden_states, *(kwargs.get(\"position_embeddings\") or ())),", "_ones(hidden_states),",
        "test_variants.py::test_compile_key_includes_rows_of_position_embeddings",
    ),
    "gradients of parameters dropped": mutation(
        "checkpoint.py", "*map(found.get, inputs)", "*(found[one] * (one is hidden_states) for one in inputs)",
        f"{SAME_BITS}[enable_grad-0.0]",
    ),
    "random state not restored": mutation(
        "checkpoint.py", "_as_before(ctx.random_states)", "_as_before(None)", f"{SAME_BITS}[enable_grad-0.4]"
    ),
    "the backward moves the generator on": mutation(
        "../backprop/rng.py", "with torch.random.fork_rng(devices=self._gpus()):", "if True:",
        f"{SAME_BITS}[enable_grad-0.4]",
    ),
    "autocast forgotten in the backward": mutation(
        "checkpoint.py", "ctx.autocast(),", "contextlib.nullcontext(),", f"{SAME_BITS}[autocast-0.0]"
    ),
    "scaling dropped": mutation(
        "lora.py", " * layer.scaling[name]", "", "test_lora.py::test_loss_and_gradients_match_peft[False-0.0-2]"
    ),
    "DoRA taken for plain LoRA": mutation(
        "lora.py", "name in layer.lora_variant or ", "", "test_lora.py::test_lora_variants_are_left_to_peft[DoRA]"
    ),
    "low-rank activations exchanged between query, key and value": mutation(
        "shared_input.py", "zip(layers, products, strict=True)", "zip(layers, products[::-1], strict=True)",
        "test_shared_input.py::test_fewer_products_give_the_same_loss_and_gradients[1.5]",
    ),
    "an input that is not shared": mutation(
        "shared_input.py", "partial(_call, *each, hidden_states)", "partial(_call, *each, hidden_states + 0)",
        "test_shared_input.py::test_fewer_products_give_the_same_loss_and_gradients[1.5]",
    ),
    "eager mode's roundings left out": mutation(
        "swiglu_kernels.py", "if EAGER_ROUNDING else value", "if False else value",
        "test_swiglu.py::test_eager_rounding_matches_the_formula_in_16_bits[torch.bfloat16-cpu]",
    ),
    "a scaling that is no power of two moved all the same": mutation(
        "lora.py", "math.frexp(layer.scaling[name])[0] != 0.5", "False",
        "test_lora.py::test_loss_and_gradients_match_peft[True-0.0-no power of two]",
    ),
    "adapters of several ranks taken for equal ones": mutation(
        "swiglu.py", "len({_rank(layer) for layer in layers}) == 1", "True",
        "test_swiglu.py::test_unsupported_adapters_are_unchanged[ranks]",
    ),
    "adapters by row ignored": mutation(
        "hooks.py", "if any(_HOOKS(known)):", "if False:", "test_swiglu.py::test_adapters_by_row_are_left_to_peft"
    ),
    "hooks that come after the first call ignored": mutation(
        "layers.py", "if place is not None:", "if False:", "test_hooks.py::test_adapters_by_row"
    ),
    "a hook of all modules ignored": mutation(
        "hooks.py", "if _has_any_global_hook():", "if False:", "test_hooks.py::test_hooked_below_names_the_module"
    ),
    "lost gradients not named": mutation(
        "checkpoint.py", "if id(one) not in given", "if False",
        "test_checkpoint.py::test_trained_tensor_from_outside_the_layer_is_refused",
    ),
    "a layer that normalises its MLP's output taken for one that adds it": mutation(
        "unread.py", "if not all(map(_same, others, repeat(expected))):", "if False:",
        "test_unread.py::test_layers_that_only_add_their_mlp_are_known[Olmo2-options4-None]",
    ),
    "a gate that is trained later taken for a constant": mutation(
        "unread.py", "for name, one in layer._parameters.items() if one is not None}", "for name, one in ()}",
        "test_unread.py::test_only_sums_and_constant_factors_are_taken_for_adding[False-frozen number]",
    ),
    "every layer unread in every thread": mutation(
        "unread.py", "return _unread.get() is layer", "return True",
        "test_unread.py::test_only_the_layer_named_is_unread_in_this_thread",
    ),
    "a wrapper of a layer reads what is left out": mutation(
        "checkpoint.py", "None if seen else ctx.layer", "ctx.layer",
        "test_unread.py::test_outputs_that_a_wrapper_reads_are_computed[normalise]",
    ),
    "layers with hooks checkpointed as others": mutation(
        "checkpoint.py", "if hooked(layer):", "if False:",
        "test_checkpoint.py::test_gradients_flow_through_tensors_that_hooks_keep"
    ),
    "an MLP of another formula fused": mutation(
        "swiglu.py", " and _is_formula(module)", "", "test_swiglu.py::test_other_formulas_are_unchanged[scaled]"
    ),
    "eager mode's roundings not asked of the MLP": mutation(
        "qlora.py", "fuse_swiglu(found, eager_rounding)", "fuse_swiglu(found, False)",
        "test_qlora_steps.py::test_eager_rounding_reaches_every_step",
    ),
    "weights stay plain": mutation(
        "plain_params4bit.py", "(weight, PlainParams4bit)", "(weight, Params4bit)",
        "test_plain_params4bit.py::test_types_are_exchanged_and_restored",
    ),
    "small GPUs refused": mutation(
        "autotune.py", "lambda *_: True", "inductor_utils.is_big_gpu",
        "test_autotune.py::test_small_gpu_counts_as_big_until_exit",
    ),
    "no candidate of Triton's left": mutation(
        "autotune.py", "if suits(choice)] or tiles", "if suits(choice)]",
        "test_autotune.py::test_all_tiles_stay_if_none_suits",
    ),
}  # fmt: skip

FAST = (  # bugs that others have made
    "gradients of parameters dropped",
    "random state not restored",
    "scaling dropped",
    "DoRA taken for plain LoRA",
)

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("compiled", MUTATIONS, FAST)
