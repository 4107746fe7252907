"""The suite notices a broken export: each mutation of a copy of the source makes the test named with it fail."""

from tests.mutants import mutation, mutation_tests

FLOAT32 = "test_export.py::test_float32_file_holds_the_merged_weights[{}]"
PROJECTOR = "test_export.py::test_projector_file_has_each_parameter_of_tower_and_projector"
LOGITS = "test_merge.py::test_merged_weights_give_the_logits_of_the_adapted_model"
MUTATIONS = {
    "q and k not permuted": mutation(
        "text.py", 'if header.arch == "llama" and', 'if header.arch == "other" and', FLOAT32
    ),
    "merge re-quantised": mutation(
        "weights.py",
        "        return weight\n\n    def close(self) -> None:\n        self.base.close()",
        "        from bitsandbytes.functional import dequantize_4bit, quantize_4bit\n\n"
        "        return dequantize_4bit(*quantize_4bit(weight, quant_type='nf4'))\n\n"
        "    def close(self) -> None:\n        self.base.close()",
        "test_merge.py::test_merge_is_exact_where_peft_quantises_again",
    ),
    "low nibble first": mutation(
        "weights.py", "[data >> 4, data & 15]", "[data & 15, data >> 4]",
        "test_weights.py::test_formula_has_the_bits_of_the_kernel[{}]",
    ),
    "absmax of the first rows": mutation(
        "weights.py", "absmax = state.absmax[blocks]", "absmax = state.absmax[blocks - blocks[0]]",
        "test_weights.py::test_formula_has_the_bits_of_the_kernel[{'nested': False}]",
    ),
    "scale of the adapter left out": mutation("weights.py", "weight + scale * (", "weight + (", f"{LOGITS}[{{}}-4]"),
    "magnitude left out": mutation(
        "weights.py", "if self.magnitude is not None:", "if False:", f"{LOGITS}[{{'use_dora': True}}-4]"
    ),
    "switched-off adapters merged": mutation(
        "merge.py", "elif not layer.disable_adapters:", "else:", f"{LOGITS}[{{}}-32]"
    ),
    "original of modules_to_save": mutation(
        "merge.py",
        "used = module.modules_to_save[active[0]] if active else module.original_module",
        "used = module.original_module",
        f"{LOGITS}[{{'modules_to_save': ['embed_tokens', 'lm_head']}}-32]",
    ),
    "merged adapters merged again": mutation(
        "merge.py", "if layer.merged:", "if False:",
        "test_merge.py::test_merged_16_bit_adapters_are_not_merged_twice",
    ),
    "trained head taken for the embedding": mutation(
        "merge.py", "return isinstance(one, Plain) and isinstance(two, Plain) and", "return True or",
        "test_merge.py::test_tied_weights_are_told_from_trained_copies",
    ),
    "frequencies of rope unscaled": mutation(
        "text.py", "(plain / scaled.double())", "(plain / plain)", FLOAT32
    ),
    "first frame twice": mutation(
        "qwen.py", "[:, :, self.frame]", "[:, :, 0]", f"{PROJECTOR}[qwen2_vl]"
    ),
    "all layers of the tower": mutation("llava.py", "total + 1 + layer", "total", f"{PROJECTOR}[llava_clip]"),
    "named before it is whole": mutation(
        "writer.py", 'f"{path.name}.{_host()}.{os.getpid()}.unfinished"', "path.name",
        "test_export.py::test_export_that_fails_leaves_no_file_and_keeps_the_old_one",
    ),
    "bytes that do not fit lost": mutation(
        "writer.py", "file.write(np.ascontiguousarray(data))", "data.tofile(file)",
        "test_export.py::test_disk_that_is_full_is_an_error_and_leaves_no_file[40]",
    ),
    "fallback of K-quants left out": mutation(
        "quantization.py", "for one in (wanted, FALLBACK.get(wanted)):", "for one in (wanted,):",
        "test_quantization.py::test_rows_that_blocks_do_not_divide_fall_back",
    ),
    "infinite halves": mutation(
        "quantization.py", "if kind != Type.BF16 and", "if False and",
        "test_quantization.py::test_values_beyond_the_type_are_refused",
    ),
    "any split taken for GPT-2's": mutation(
        "tokenizer.py", "    if key not in PRE:", '    PRE.setdefault(key, "gpt-2")\n    if key not in PRE:',
        "test_tokenizer.py::test_other_tokenizers_are_refused",
    ),
}  # fmt: skip
FAST = ("q and k not permuted", "low nibble first")

runs, test_the_unmutated_copy_passes, test_mutation_is_caught = mutation_tests("gguf", MUTATIONS, FAST)
