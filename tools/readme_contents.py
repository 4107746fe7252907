"""What RESULTS.md shows of the measurements: a table a metric, and what each figure shows."""

# Measurement file -> (metric, what it is called here). WORST, CHECKS, PERCENT and TURNED say how a metric is shown.
# What a file holds besides comes last, under the name of its metric.
TABLES = {
    "a_nf4.json": (
        ("official_harness_speedup", "Official harness: three launches' time over ours, wall clock"),
        ("official_harness_us", "Official harness: wall time of one round"),
        ("speedup_vs_unsloth_device", "Three launches' time over ours, device time"),
        ("kernel_launches", "Kernels that one call launches"),
        ("allocations", "Allocations of one call"),
        ("device_us", "Device time of one matrix"),
        ("sweep_device_us", "Device time over the size of the matrix"),
        ("ablation_us", "Device time of variants of the kernel"),
        ("copy_bandwidth_fraction", "Share of the machine's measured copy bandwidth"),
        ("host_enqueue_us", "Host time to enqueue one call"),
        ("compile_wall_us", "Wall time of a function with the kernel under `torch.compile`"),
        ("mismatched_weights", "Weights that differ from bitsandbytes"),
        ("contracted_mismatched_weights", "Weights that differ when the multiply-add is contracted"),
        ("sm75_spills", "Bytes spilled when compiled for a T4 (sm_75)"),
        ("sm75_shared_bytes", "Shared memory when compiled for a T4, of 65,536 bytes"),
        ("checks_passed", "Named checks that passed"),
    ),
    "b_fsdp2.json": (
        ("bytes_changed", "Bytes of 65,536 that gathering changes, beside plain float16 storage"),
        ("loss_difference", "Two ranks and one process: largest difference of the loss at any step, nats"),
        ("local_share", "Share of the 4-bit bytes and scales that a rank holds"),
        ("dequantize_launches", "Launches of challenge A's kernel"),
        ("step_speedup", "Step of one GPU: bitsandbytes' de-quantisation over ours"),
        ("graph_breaks", "Graph breaks"),
        ("compilations", "Inductor's compilations of a rank"),
        ("steps_trained", "Steps that the script trained on two GPUs"),
        ("tokens_per_s", "Tokens a second, beside one GPU"),
        ("peak_gib", "Peak memory of a GPU, beside one GPU alone"),
        ("checks_passed", "Named checks that passed"),
    ),
    "c_compile.json": (
        ("step_ms", "Time of a QLoRA step of Llama 3.2 1B"),
        ("peak_gib", "Peak of what PyTorch allocates in a step"),
        ("speedup_vs_eager", "transformers + PEFT + bitsandbytes' time over ours"),
        ("compilations", "Inductor's compilations, forward and backward"),
        ("graph_breaks", "Graph breaks"),
        ("loss_difference", "Compiled and uncompiled: largest difference of the loss at any step, nats"),
        ("triton_matmuls", "Matrix products by Triton under max-autotune"),
        ("checks_passed", "Named checks that passed"),
    ),
    "d_issues.json": (
        ("checks_passed", "Named checks that passed"),
        ("errors_no_larger_than_sdpas", "Attention: comparisons whose error is no larger than SDPA's"),
        ("compilations", "Compilations of flex attention over all lengths, windows and packings of the check"),
        ("vision_loss_alone_and_in_a_batch", "Vision: largest difference of a row's losses, alone and in a batch"),
        (
            "vision_tower_flops_over_those_of_the_images",
            "Vision: FLOPs of the tower in a mixed batch over those of its images in one batch",
        ),
        (
            "vision_tower_flops_over_those_of_each_image_alone",
            "Vision: FLOPs of the tower in a mixed batch over those of each image alone",
        ),
        ("gguf_log_probability_error", "GGUF export: largest error of a log-probability"),
        ("gguf_merging_error_over_the_change", "GGUF export: error of the merge over the adapter's change"),
        ("gguf_error_of_type", "GGUF export: mean error of a log-probability, by file type"),
        ("gguf_size", "GGUF export: size of the file"),
        ("classification_loss_difference", "Classification: largest difference from transformers' loss"),
        (
            "classification_relative_loss_difference",
            "Classification: largest relative difference from the loss with bitsandbytes' layers",
        ),
        ("macro_f1", "Classification: macro-F1"),
        ("accuracy", "Classification: accuracy"),
        ("tool_calling", "Tool calling: share of held-out questions, before and after training"),
    ),
    "e_backprop.json": (
        ("extra_peak_gib", "Extra peak memory of forward and backward, gradients included"),
        ("forward_backward_ms", "Time of forward and backward"),
        ("time_over_gemm_floor", "Our time over that of the bare matrix products in the same chunks"),
        ("time_over_liger", "Our time over Liger's"),
        ("gradient_error_over_eager", "Error of the gradients over eager's own error"),
        ("loss_curve_max_abs_difference", "Standard loss and ours: largest difference at any step, nats"),
        (
            "loss_curve_gradient_norm_difference",
            "Standard loss and ours: relative difference of gradient norms, largest",
        ),
        ("planted_fault_difference", "Faults planted into ours: largest difference from the standard loss, nats"),
        ("loss_fall", "By how much the loss fell in those steps, nats"),
        ("training_peak_gib", "Peak memory of each training"),
        ("grpo_peak_gib", "GRPO: extra peak memory"),
        ("grpo_ms", "GRPO: time of forward and backward"),
        ("grpo_largest_difference", "GRPO: largest relative difference over the grid of losses"),
        ("grpo_reward_rise", "GRPO: by how much the reward, a number from 0 to 1, rose"),
        ("checks_passed", "Named checks that passed"),
    ),
}
SWEPT = {  # the same for what sweeps measured, by the file beside whose tables they stand
    "a_nf4.json": {
        "a_nf4_sweeps.json": (
            ("harness_speedup_beside_unsloth", "The official harness in one process with the real Unsloth"),
            ("device_us_beside_unsloth", "Device time beside the real Unsloth, in its own process"),
            ("host_enqueue_us_beside_unsloth", "Host time beside the real Unsloth, in its own process"),
            ("linear_us", "Device time of a linear layer without gradients"),
            ("linear_forward_backward_us", "Device time of a linear layer, forward and backward"),
            ("prefill_tokens_per_s", "Prefill before and after `patch_linear4bit`"),
            ("generation_tokens_per_s", "Generation before and after `patch_linear4bit`"),
            ("sanitizer_errors", "compute-sanitizer errors"),
        ),
    },
    "b_fsdp2.json": {
        "b_fsdp2_sweeps.json": (
            ("scaling", "Tokens a second of two GPUs over those of one"),
            ("step_over_one_gpu", "A step over the same rows on one GPU, without communication"),
            ("loss_difference", "Two GPUs and one over 60 steps: largest difference of the loss, nats"),
            ("peak_gib", "Peak memory of a GPU"),
            ("share", "Share of the 4-bit bytes and scales that a GPU holds"),
        ),
        "b_fsdp2_scaling.json": (
            ("tokens_per_s_over_one_gpu", "Tokens a second over those of one GPU, beside the prediction"),
            ("tokens_per_s", "Tokens a second of all GPUs"),
            ("exposed", "Share of a step beyond one GPU's"),
            ("peak_gib", "Peak memory of a GPU"),
            ("share", "Share of the 4-bit bytes and scales that a GPU holds"),
        ),
    },
    "d_issues.json": {
        "d_vision_sweeps.json": (
            ("vision_step_ms", "Time of forward and backward, small vocabulary, beside blank images in text rows"),
            ("vision_padding", "Share of padding, rows grouped by kind and in random order"),
        ),
        "d_classification_sweeps.json": (
            ("macro_f1", "Classification over seeds: macro-F1"),
            ("accuracy", "Classification over seeds: accuracy"),
            ("loss_difference", "Classification: largest difference from transformers' loss"),
        ),
    },
    "e_backprop.json": {
        "e_backprop_sweeps.json": (
            ("frontier_peak_gib", "Extra peak memory, by rows of a chunk"),
            ("frontier_ms", "Time of forward and backward, by rows of a chunk"),
            ("vocabulary_peak_gib", "Extra peak memory, by size of the vocabulary"),
            ("vocabulary_ms", "Time of forward and backward, by size of the vocabulary"),
        ),
    },
}
FIGURES = {  # what a figure shows, for who cannot see it
    "a_nf4_ablation": "Device time of the kernel with one decision changed at a time, over the default",
    "a_nf4_bandwidth": "Share of the copy bandwidth over the size of the matrix, ours and every baseline",
    "a_nf4_contraction": "By how much and where float32 weights differ when the multiply-add is contracted",
    "a_nf4_linear": "Device time of a block's linear layers over the number of rows, ours and bitsandbytes",
    "a_nf4_speedup": "Speed-up over the three launches, by matrix and in the harness",
    "b_fsdp2_loss": "Loss of QLoRA over 60 steps in one process and on two ranks, and their difference below",
    "b_fsdp2_prefetch": "When a GPU gathered, reduced and computed in one step on two GPUs",
    "b_fsdp2_script": "Loss of the script over 60 steps on one GPU and on two, and their difference below",
    "b_fsdp2_stream": "Where indices and scales of one weight lie in its byte stream, and where two ranks split it",
    "c_compile_frontier": "Time of a QLoRA step over its peak memory, eager and compiled, checkpointed and not",
    "c_compile_parity": "Loss, time and memory over 60 steps of as many lengths, three uncompiled runs and ours",
    "d_confusion": "Which packages the classifier takes for which, on docstrings that it was not trained on",
    "d_gguf_types": "Size of the exported file and error of the log-probabilities, by file type",
    "d_tool_calling": "Shares of held-out questions answered as they should be, before and after training",
    "d_vision_tower": "FLOPs of the vision tower, by the share of text rows, ours and with blank images",
    "e_backprop_frontier": "Time over extra peak memory for several sizes of a chunk, every baseline and the floor",
    "e_backprop_grpo_memory": "GRPO's extra peak memory, head alone and whole step, ours, TRL, Liger and full logits",
    "e_backprop_grpo_reward": "Reward and entropy over the steps of a GRPO run, TRL's trainer and ours overlaid",
    "e_backprop_vocabulary": "Extra peak memory and time over the size of the vocabulary, ours and every baseline",
    "llama32_1b_loss_curve": "Loss of Llama 3.2 1B over the steps, standard loss and ours, and their difference below",
}
PLACES = {"d_issues": ("d_",), "e_backprop": ("q5/",)}  # figures with other beginnings, by their file
SHORT = {"three bitsandbytes launches (Unsloth's sequence)": "three launches"}  # as a column's head
TURNED = {  # a row a candidate, a column a case
    "extra_peak_gib", "forward_backward_ms", "grpo_peak_gib", "grpo_ms", "macro_f1", "vocabulary_peak_gib",
    "vocabulary_ms",
}  # fmt: skip
WORST = {"mismatched_weights", "sanitizer_errors", "sm75_spills", "sm75_shared_bytes"}  # the largest value alone
CHECKS = {"checks_passed", "errors_no_larger_than_sdpas"}  # who passed by name, and a row for each that did not
PERCENT = {"copy_bandwidth_fraction", "local_share", "share", "vision_padding", *CHECKS}  # others: from 0 to 1
