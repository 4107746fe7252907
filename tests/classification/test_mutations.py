"""The suite notices a broken classifier: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

PADDED = "test_pooling.py::test_padded_rows_have_the_logits_of_rows_alone[ended-</s>-right]"
LEFT = "test_pooling.py::test_padded_rows_have_the_logits_of_rows_alone[bare-<pad>-left]"
REFUSED = "test_adapters.py::test_options_that_leave_the_head_untrained_are_refused"
LOADED = "test_load.py::test_the_head_joins_the_skipped_modules_of_a_checkpoint"
PARTS = "test_losses.py::test_micro_batches_add_up[tensor-single_label_classification]"
MUTATIONS = {
    "attention mask dropped": mutation("pooling.py", "            attention_mask=attention_mask,\n", "", LEFT),
    "pooled by the padding token": mutation(
        "pooling.py",
        "if attention_mask is not None:\n        if attention_mask.dim() != 2:",
        "if attention_mask is not None and input_ids is None:\n        if attention_mask.dim() != 2:",
        PADDED,
    ),
    "the last position of all rows": mutation(
        "pooling.py", "(positions * attention_mask.bool()).argmax(-1)", "attention_mask.argmax(-1) * 0 - 1", PADDED
    ),
    "a row without a token has logits": mutation(
        "pooling.py",
        'float("nan")',
        "0.0",
        "test_pooling.py::test_a_row_without_a_token_is_no_number_in_compiled_code[left]",
    ),
    "a row without a token is not refused": mutation(
        "pooling.py",
        "if empty.any():",
        "if False:",
        "test_pooling.py::test_rows_without_a_token_are_refused[texts0-rows0-left]",
    ),
    "head frozen": mutation(
        "adapters.py",
        "    return adapted.train()\n",
        "    adapted.get_base_model().score.requires_grad_(False)\n    return adapted.train()\n",
        "test_adapters.py::test_head_and_adapters_alone_are_trained_in_float32[dtype0]",
    ),
    "head in the model's dtype": mutation(
        "adapters.py",
        "    head.float()\n",
        "    head.to(adapted.get_base_model().dtype)\n",
        "test_adapters.py::test_head_and_adapters_alone_are_trained_in_float32[dtype1]",
    ),
    "a task of another kind": mutation("adapters.py", '"SEQ_CLS") != "SEQ_CLS"', '"SEQ_CLS") is Ellipsis', REFUSED),
    "head quantised": mutation(
        "load.py", 'skipped = [*(given.get("llm_int8_skip_modules") or []), HEAD]', "skipped = []", LOADED
    ),
    "the checkpoint's compute dtype": mutation(
        "load.py",
        '"bnb_4bit_compute_dtype": str(dtype)',
        '"ignored": str(dtype)',
        "test_load.py::test_compute_dtype_is_the_one_asked_for",
    ),
    "labels of another classifier": mutation(
        "load.py",
        "!= labels:",
        "is None:",
        "test_load.py::test_a_trained_classifier_keeps_its_head_and_its_labels",
    ),
    "padding with the end of texts": mutation(
        "padding.py",
        "tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken",
        "tokenizer.pad_token_id is None",
        "test_padding.py::test_the_token_that_is_taken",
    ),
    "a mean for each micro-batch": mutation(
        "losses.py", "count if num_items_in_batch is None else num_items_in_batch", "valid.sum()", PARTS
    ),
    "no label that counts divided by 0": mutation(
        "losses.py",
        "(number + nothing)",
        "number",
        "test_losses.py::test_without_a_label_that_counts_loss_and_gradients_are_zero[6-single_label_classification-None]",
    ),
    "divided by the weights": mutation(
        "losses.py",
        "    valid = labels != IGNORED\n",
        "    valid = labels != IGNORED\n"
        "    if problem_type == SINGLE and class_weight is not None:\n"
        "        losses = losses / class_weight.mean()\n",
        "test_losses.py::test_values_with_weights",
    ),
    "the config's kind of problem is not the loss's": mutation(
        "losses.py",
        "and model.config.problem_type != loss.problem_type",
        "and False",
        "test_pooling.py::test_a_config_of_another_kind_of_problem_is_refused[multi_label_classification-regression]",
    ),
    "labels broadcast": mutation(
        "losses.py",
        "if tuple(labels.shape) not in shapes:",
        "if False:",
        "test_losses.py::test_models_check_their_labels",
    ),
}
FAST = ("pooled by the padding token", "head frozen")

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("classification", MUTATIONS, FAST)
