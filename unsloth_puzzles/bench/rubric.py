"""The marking rubric of the five puzzles, as data: every criterion, its points, and the measurement that decides it."""

from unsloth_puzzles.bench.criterion import (
    LARGEST_FULL_DIFFERENCE,
    LARGEST_GRADIENT_NORM_DIFFERENCE,
    LARGEST_LOSS_DIFFERENCE,
    LARGEST_RATIO,
    LEAST_REWARD_RISE,
    Condition,
    Criterion,
    compilations,
    compiled_part,
    few_compilations,
    level,
    only,
    same_loss,
    speed_up,
    works,
)

FULL, QLORA = "Llama 1B, full fine-tuning", "Llama 1B, QLoRA"

A = (
    Criterion("A", "a single Triton kernel", only(3, Condition("kernel_launches", "one call", "==", 1))),
    Criterion("A", "speed-up of 1.05 or more over the three launches", only(1, speed_up(">=", 1.05)), asked_gpu="T4"),
    Criterion("A", "speed-up of 1.10 or more over the three launches", only(2, speed_up(">=", 1.10)), asked_gpu="T4"),
    Criterion("A", "speed-up of 1.15 or more over the three launches", only(2, speed_up(">=", 1.15)), asked_gpu="T4"),
    Criterion(
        "A",
        "speed-up above 1.00 over the three launches (else -3)",
        only(0, speed_up(">", 1.00)),
        otherwise=-3,
        needs_gpu=True,
    ),
    Criterion(
        "A",
        "the kernel works inside torch.compile (else -1)",
        only(1, *(Condition(f"compile_{name}", "fullgraph", "==", 0) for name in ("graph_breaks", "mismatched"))),
        otherwise=-1,
    ),
    Criterion(
        "A",
        "custom inline asm works",
        only(3, *(Condition("mismatched_weights", f"asm {dtype}", "==", 0) for dtype in ("fp16", "bf16"))),
    ),
    Criterion("A", "uses cache eviction", only(1, Condition("cache_eviction_hints", "default kernel", ">=", 1))),
    Criterion(
        "A",
        "tested in fp16 and bf16 (else -1)",
        only(1, *(Condition("harness_checks_passed", dtype, ">=", 1) for dtype in ("fp16", "bf16"))),
        otherwise=-1,
        needs_gpu=True,
    ),
)

_SHARDED = (
    works("no byte changes"),
    works("features of FSDP2"),
    works("through SFTTrainer"),
    works("60 steps, uncompiled"),
    same_loss("FSDP2 against one GPU"),
)
B = (
    Criterion(
        "B",
        "FSDP2 works with QLoRA and torch.compile works too (without compile 3)",
        (
            level(
                5,
                *_SHARDED,
                works("60 steps, compiled"),
                same_loss("FSDP2 compiled against one GPU"),
                Condition("graph_breaks", "FSDP2 compiled", "==", 0),
                compilations("FSDP2 compiled", "<="),
            ),
            level(3, *_SHARDED),
        ),
    ),
    Criterion(
        "B",
        "uses the kernel of A, as one kernel, and is faster",
        only(
            3,
            Condition("dequantize_launches", "one weight and pass, uncompiled", "==", 1),
            Condition("dequantize_launches", "one weight and pass, compiled", "==", 1),
            Condition("step_speedup", "kernel of A against bitsandbytes", ">", 1.00),
            Condition("gpu_time_speedup", "kernel of A against bitsandbytes", ">", 1.00),
            works("faster with the kernel of A"),
        ),
    ),
    Criterion(
        "B",
        "the script on two GPUs (asked for: Kaggle's 2 x T4; without it 0 for B)",
        only(2, Condition("steps_trained", None, ">=", 60), works("the script on two GPUs")),
        gate=True,
        asked_gpu="T4",
    ),
)

C = (
    Criterion(
        "C",
        "flex attention, and it works for dynamic sequence lengths (static only 1)",
        (
            level(
                3,
                *(works(f"flex, {what}") for what in ("static lengths", "dynamic lengths", "a Trainer run")),
                compilations("flex", "<="),
            ),
            level(1, works("flex, static lengths")),
        ),
    ),
    Criterion(
        "C",
        "bitsandbytes compiled, or the kernel of A used (neither -2)",
        only(1, *compiled_part("4-bit linear")),
        otherwise=-2,
    ),
    Criterion(
        "C",
        "attention compiled without excessive recompilation (with -3)",
        few_compilations(2, -3, "attention", *compiled_part("attention")),
    ),
    Criterion(
        "C",
        "MLP compiled (excessive recompilation -3)",
        few_compilations(1, -3, "MLP", *compiled_part("MLP")),
    ),
    Criterion("C", "loss compiled (else -1)", only(0, *compiled_part("loss")), otherwise=-1),
    Criterion("C", "layer norms compiled (else -3)", only(0, *compiled_part("layer norms")), otherwise=-3),
    Criterion(
        "C",
        "max-autotune Triton matmul without excessive recompilation (with -2)",
        few_compilations(
            2,
            -2,
            "max-autotune",
            Condition("triton_matmuls", "max-autotune", ">=", 1),
            Condition("graph_breaks", "max-autotune", "==", 0),
            Condition("loss_difference_ratio", "max-autotune", "<=", LARGEST_RATIO),
        ),
    ),
)

D = (
    Criterion("D", "tool-calling notebook", only(1, works("tool calling"))),
    Criterion(
        "D",
        "GGUF export of vision fine-tunes, LLaVA and Qwen-VL",
        only(1, works("GGUF export, LLaVA"), works("GGUF export, Qwen-VL")),
    ),
    Criterion(
        "D",
        "one simple interface over xformers, SDPA, flash and flex attention",
        only(2, *(works(f"attention, {backend}") for backend in ("xformers", "SDPA", "flash", "flex"))),
    ),
    Criterion(
        "D",
        "sequence classification",
        only(1, *(works(f"classification, {part}") for part in ("traps", "losses", "real text"))),
    ),
    Criterion(
        "D",
        "a vision data collator that mixes text-only and image rows, for Qwen, Llama, Pixtral",
        only(1, *(works(f"vision collator, {family}") for family in ("Qwen", "Llama", "Pixtral"))),
    ),
    Criterion(
        "D",
        "flex attention with dynamic lengths, sliding windows and packed sequences, without excessive recompilation",
        only(
            2,
            *(works(f"flex, {feature}") for feature in ("dynamic lengths", "sliding windows", "packed sequences")),
            compilations("flex", "<="),
        ),
    ),
)

E = (
    Criterion(
        "E",
        "50 % less VRAM",
        only(2, *(Condition("memory_saved", case, ">=", 0.5) for case in ("head trained", "head frozen"))),
    ),
    Criterion(
        "E",
        "float32 upcast kept, derivatives not hard-coded (either broken 0 for E)",
        only(0, works("float32 upcast"), works("derivatives by autograd")),
        gate=True,
    ),
    Criterion("E", "cross entropy works", only(1, works("cross entropy"))),
    Criterion("E", "other functions work", only(1, works("other functions"))),
    Criterion("E", "chunk size is dynamic", only(1, works("chunk sizes"))),
    Criterion(
        "E",
        "Llama 1B training losses match (else 0 for E)",
        only(
            1,
            Condition("loss_curve_max_abs_difference", FULL, "<=", LARGEST_FULL_DIFFERENCE),
            Condition("loss_curve_gradient_norm_difference", FULL, "<=", LARGEST_GRADIENT_NORM_DIFFERENCE),
            Condition("loss_curve_max_abs_difference", QLORA, "<=", LARGEST_LOSS_DIFFERENCE),
            Condition("planted_fault_difference", "gradients x 1.01", ">", LARGEST_LOSS_DIFFERENCE),
            Condition("planted_fault_difference", "a mean per chunk", ">", LARGEST_LOSS_DIFFERENCE),
            works("Llama 1B: the losses match"),
            works("Llama 1B learns"),
        ),
        gate=True,
    ),
    Criterion(
        "E",
        "GRPO with the memory-efficient linear works",
        only(
            4,
            works("GRPO"),
            works("GRPO run, the same gradients"),
            Condition("grpo_reward_rise", "GRPO run", ">=", LEAST_REWARD_RISE),
            Condition("grpo_peak_over_full_logits", "head only", "<=", 0.5),
        ),
    ),
)

RUBRIC = A + B + C + D + E
