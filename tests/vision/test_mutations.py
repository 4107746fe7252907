"""The suite notices a broken collator or patch: each mutation of a copy makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

LOSSES = "test_batches.py::test_row_has_the_losses_that_it_has_alone[{}-mixed]"
LABELS = "test_collator.py::test_labels_are_what_the_assistant_says[{}-qwen2_vl]"
LAYER = "test_mllama.py::test_layer_differs_from_transformers_in_tokens_that_see_no_image_only"
MUTATIONS = {
    "labels by the id of padding": mutation(
        "collator.py",
        'used = batch["attention_mask"].bool()',
        'used = batch["input_ids"] != self.processor.tokenizer.pad_token_id',
        "test_collator.py::test_end_of_sequence_that_also_pads_is_a_label",
    ),
    "attention mask dropped": mutation(
        "collator.py",
        "        add_cross_attention_mask(self.processor, batch)\n        return batch",
        '        add_cross_attention_mask(self.processor, batch)\n        batch["attention_mask"].fill_(1)\n'
        "        return batch",
        "test_batches.py::test_padding_on_the_left[llava]",
    ),
    "a blank image for a row of text": mutation(
        "collator.py",
        "        texts, images = [",
        "        from PIL import Image\n\n"
        "        for one in conversations:\n"
        "            if not one.images:\n"
        '                one.images, one.text = [Image.new("RGB", (56, 56))], one.text + self.processor.image_token\n'
        "        texts, images = [",
        "test_batches.py::test_tower_runs_on_images_only[qwen2_vl]",
    ),
    "image tokens are labels": mutation(
        "collator.py",
        "& used & ~is_image)",
        "& used)",
        "test_collator.py::test_all_text_is_labelled_and_no_image[qwen2_vl]",
    ),
    "what a placeholder expands to is a label": mutation(
        "collator.py",
        "is_image[row] |= _touches(",
        "_touches(",
        "test_collator.py::test_all_text_is_labelled_and_no_image[smolvlm]",
    ),
    "labels not moved with the expanded placeholders": mutation(
        "collator.py",
        'return position + one["new_span"][1] - one["span"][1]',
        "return position",
        LABELS.format("right"),
    ),
    "a token that joins an answer with whitespace is no label": mutation(
        "collator.py",
        "(first >= lowest)",
        "(first >= start)",
        "test_collator.py::test_tokens_that_join_an_answer_with_whitespace_are_labels_beside_images",
    ),
    "labels left where they were before padding": mutation(
        "collator.py",
        "    for name in _per_token(batch):\n        batch[name] = batch[name].gather(1, index)",
        '    for name in _per_token(batch):\n        if name != "labels":\n'
        "            batch[name] = batch[name].gather(1, index)",
        LABELS.format("left"),
    ),
    "images cut off": mutation(
        "collator.py", "if cut:", "if False:", "test_refusals.py::test_max_length_that_cuts_images_is_refused[mllama]"
    ),
    "images and placeholders not counted": mutation(
        "conversation.py", "!= len(images):", "is None:", "test_refusals.py::test_bad_rows_are_refused"
    ),
    "all before a first turn of the assistant is a label": mutation(
        "conversation.py",
        "before = _before_first(processor, template, message, tools)",
        'before = ""',
        "test_conversation.py::test_a_first_turn_of_the_assistant_in_other_templates",
    ),
    "marks of one turn taken for those of all": mutation(
        "endings.py",
        "one.character not in marked:",
        "not marked:",
        "test_conversation.py::test_a_turn_without_marks_is_refused_beside_a_turn_that_has_some",
    ),
    "None of Arrow kept": mutation(
        "conversation.py",
        "blocks = [{key: value for key, value in block.items() if value is not None} for block in content]",
        "blocks = [dict(block) for block in content]",
        "test_conversation.py::test_keys_that_arrow_fills_with_none_are_left_out",
    ),
    "a second beginning of sequence": mutation(
        "processing.py",
        "if bos and all(text.startswith(bos) for text in texts):",
        "if False:",
        "test_collator.py::test_beginning_of_sequence_is_neither_missing_nor_doubled",
    ),
    "output of the attention not masked": mutation("mllama_forwards.py", "(seen * attended)", "attended", LAYER),
    "output of the MLP not masked": mutation("mllama_forwards.py", "(seen * output)", "output", LAYER),
    "states of another row": mutation(
        "mllama_forwards.py",
        "return states if given == len(index) else states[index]",
        "return states.roll(1, 0) if given == len(index) else states[index]",
        LOSSES.format("mllama"),
    ),
    "text rows in the cross-attention": mutation(
        "mllama_forwards.py",
        "if use_cache or kv_cache is not None:",
        "if True:",
        "test_mllama.py::test_rows_without_an_image_stay_out_of_the_cross_attention",
    ),
    "blank instead of skipped": mutation(
        "mllama_forwards.py",
        "real = aspect_ratio_ids.ne(0)",
        "real = aspect_ratio_ids.ge(0)",
        "test_batches.py::test_tower_of_mllama_skips_images_that_pad_a_row",
    ),
    "groups of two kinds": mutation(
        "sampler.py",
        "self._rows.setdefault(kind, [])",
        "self._rows.setdefault(None, [])",
        "test_sampler.py::test_groups_are_of_one_kind_and_whole[True-4]",
    ),
}
FAST = ("labels by the id of padding", "output of the attention not masked")

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("vision", MUTATIONS, FAST)
