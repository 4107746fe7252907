"""The marking rubric of the five puzzles, as data: every criterion, its points, and the measurement that decides it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Condition:
    """A comparison of one recorded value, found by metric and case, with a bound."""

    metric: str
    case: str
    comparison: str  # one of >=, >, <=, ==
    bound: float


@dataclass(frozen=True)
class Criterion:
    """One line of the rubric.

    `levels` are (points, conditions), best first: the first whose conditions all hold counts. If none holds, the
    criterion gives `otherwise` points (0 or less). A `gate` that is not met takes the whole challenge's points away.
    """

    challenge: str
    text: str
    levels: tuple[tuple[int, tuple[Condition, ...]], ...]
    otherwise: int = 0
    gate: bool = False


TITLES = {
    "A": "NF4 to Triton",
    "B": "QLoRA with FSDP2",
    "C": "torch.compile without graph breaks",
    "D": "Unsloth's open issues",
    "E": "Memory-efficient backprop",
}
FILES = {  # in resources/measurements/
    "A": "a_nf4.json",
    "B": "b_fsdp2.json",
    "C": "c_compile.json",
    "D": "d_issues.json",
    "E": "e_backprop.json",
}
MOST_COMPILATIONS = 30  # more is "excessive recompilation"
LARGEST_LOSS_DIFFERENCE = 1e-3  # at any step, between two runs that should train alike
LARGEST_FULL_DIFFERENCE = 2e-4  # the same of full fine-tuning in float32
LARGEST_FLOAT32_DIFFERENCE = 1e-4  # of the loss at any step, compiled and uncompiled, in float32
LARGEST_RATIO = 2  # in 16 bits: that difference over the largest one among uncompiled runs
LARGEST_GRADIENT_NORM_DIFFERENCE = 1e-4  # relative, at any step
FULL, QLORA = "Llama 1B, full fine-tuning", "Llama 1B, QLoRA"
LEAST_REWARD_RISE = 0.1  # last ten steps' mean over the first ten's, of a reward from 0 to 1


def _if(points: int, *conditions: Condition) -> tuple[int, tuple[Condition, ...]]:
    return points, conditions


def _speed_up(comparison: str, bound: float) -> Condition:
    return Condition("official_harness_speedup", "all", comparison, bound)


def _compilations(case: str, comparison: str) -> Condition:
    return Condition("compilations", case, comparison, MOST_COMPILATIONS)


def _same_loss(case: str) -> Condition:
    return Condition("loss_difference", case, "<=", LARGEST_LOSS_DIFFERENCE)


def _compiled_part(part: str) -> tuple[Condition, ...]:
    """Of a part of the model: the counted run has no break and the uncompiled loss, and its operators are there."""
    same = Condition("loss_difference", "compiled, float32", "<=", LARGEST_FLOAT32_DIFFERENCE)
    return Condition("graph_breaks", "all", "==", 0), _works(f"operators, {part}"), same


def _works(case: str) -> Condition:
    return Condition("checks_passed", case, "==", 1)  # a fraction: of no checks at all it is NaN, which no file holds


A = (
    Criterion("A", "a single Triton kernel", (_if(3, Condition("kernel_launches", "one call", "==", 1)),)),
    Criterion("A", "speed-up of 1.05 or more over the three launches", (_if(1, _speed_up(">=", 1.05)),)),
    Criterion("A", "speed-up of 1.10 or more over the three launches", (_if(2, _speed_up(">=", 1.10)),)),
    Criterion("A", "speed-up of 1.15 or more over the three launches", (_if(2, _speed_up(">=", 1.15)),)),
    Criterion(
        "A", "speed-up above 1.00 over the three launches (else -3)", (_if(0, _speed_up(">", 1.00)),), otherwise=-3
    ),
    Criterion(
        "A",
        "the kernel works inside torch.compile (else -1)",
        (
            _if(
                1,
                Condition("compile_graph_breaks", "fullgraph", "==", 0),
                Condition("compile_mismatched", "fullgraph", "==", 0),
            ),
        ),
        otherwise=-1,
    ),
    Criterion(
        "A",
        "custom inline asm works",
        (
            _if(
                3,
                Condition("mismatched_weights", "asm fp16", "==", 0),
                Condition("mismatched_weights", "asm bf16", "==", 0),
            ),
        ),
    ),
    Criterion("A", "uses cache eviction", (_if(1, Condition("cache_eviction_hints", "default kernel", ">=", 1)),)),
    Criterion(
        "A",
        "tested in fp16 and bf16 (else -1)",
        (
            _if(
                1,
                Condition("harness_checks_passed", "fp16", ">=", 1),
                Condition("harness_checks_passed", "bf16", ">=", 1),
            ),
        ),
        otherwise=-1,
    ),
)

B = (
    Criterion(
        "B",
        "FSDP2 works with QLoRA and torch.compile works too (without compile 3)",
        (
            _if(5, _same_loss("FSDP2 against one GPU"), _same_loss("FSDP2 compiled against one GPU")),
            _if(3, _same_loss("FSDP2 against one GPU")),
        ),
    ),
    Criterion(
        "B",
        "uses the kernel of A, as one kernel, and is faster",
        (
            _if(
                3,
                Condition("dequantize_launches", "one weight", "==", 1),
                Condition("step_speedup", "kernel of A against bitsandbytes", ">", 1.00),
            ),
        ),
    ),
    Criterion(
        "B",
        "the Kaggle 2 x T4 example (without it 0 for B)",
        (_if(2, Condition("steps_trained", "Kaggle 2 x T4 example", ">=", 60)),),
        gate=True,
    ),
)

C = (
    Criterion(
        "C",
        "flex attention, and it works for dynamic sequence lengths (static only 1)",
        (
            _if(
                3,
                *(_works(f"flex, {what}") for what in ("static lengths", "dynamic lengths", "a Trainer run")),
                _compilations("flex", "<="),
            ),
            _if(1, _works("flex, static lengths")),
        ),
    ),
    Criterion(
        "C",
        "bitsandbytes compiled, or the kernel of A used (neither -2)",
        (_if(1, *_compiled_part("4-bit linear")),),
        otherwise=-2,
    ),
    Criterion(
        "C",
        "attention compiled without excessive recompilation (with -3)",
        (
            _if(2, *_compiled_part("attention"), _compilations("attention", "<=")),
            _if(-3, _compilations("attention", ">")),
        ),
    ),
    Criterion(
        "C",
        "MLP compiled (excessive recompilation -3)",
        (_if(1, *_compiled_part("MLP"), _compilations("MLP", "<=")), _if(-3, _compilations("MLP", ">"))),
    ),
    Criterion("C", "loss compiled (else -1)", (_if(0, *_compiled_part("loss")),), otherwise=-1),
    Criterion("C", "layer norms compiled (else -3)", (_if(0, *_compiled_part("layer norms")),), otherwise=-3),
    Criterion(
        "C",
        "max-autotune Triton matmul without excessive recompilation (with -2)",
        (
            _if(
                2,
                Condition("triton_matmuls", "max-autotune", ">=", 1),
                Condition("graph_breaks", "max-autotune", "==", 0),
                Condition("loss_difference_ratio", "max-autotune", "<=", LARGEST_RATIO),
                _compilations("max-autotune", "<="),
            ),
            _if(-2, _compilations("max-autotune", ">")),
        ),
    ),
)

D = (
    Criterion("D", "tool-calling notebook", (_if(1, _works("tool calling")),)),
    Criterion(
        "D",
        "GGUF export of vision fine-tunes, LLaVA and Qwen-VL",
        (_if(1, _works("GGUF export, LLaVA"), _works("GGUF export, Qwen-VL")),),
    ),
    Criterion(
        "D",
        "one simple interface over xformers, SDPA, flash and flex attention",
        (_if(2, *(_works(f"attention, {backend}") for backend in ("xformers", "SDPA", "flash", "flex"))),),
    ),
    Criterion("D", "sequence classification", (_if(1, _works("sequence classification")),)),
    Criterion(
        "D",
        "a vision data collator that mixes text-only and image rows, for Qwen, Llama, Pixtral",
        (_if(1, *(_works(f"vision collator, {family}") for family in ("Qwen", "Llama", "Pixtral"))),),
    ),
    Criterion(
        "D",
        "flex attention with dynamic lengths, sliding windows and packed sequences, without excessive recompilation",
        (
            _if(
                2,
                *(_works(f"flex, {feature}") for feature in ("dynamic lengths", "sliding windows", "packed sequences")),
                _compilations("flex", "<="),
            ),
        ),
    ),
)

E = (
    Criterion(
        "E",
        "50 % less VRAM",
        (
            _if(
                2,
                *(Condition("memory_saved", case, ">=", 0.5) for case in ("head trained", "head frozen")),
            ),
        ),
    ),
    Criterion(
        "E",
        "float32 upcast kept, derivatives not hard-coded (either broken 0 for E)",
        (_if(0, _works("float32 upcast"), _works("derivatives by autograd")),),
        gate=True,
    ),
    Criterion("E", "cross entropy works", (_if(1, _works("cross entropy")),)),
    Criterion("E", "other functions work", (_if(1, _works("other functions")),)),
    Criterion("E", "chunk size is dynamic", (_if(1, _works("chunk sizes")),)),
    Criterion(
        "E",
        "Llama 1B training losses match (else 0 for E)",
        (
            _if(
                1,
                Condition("loss_curve_max_abs_difference", FULL, "<=", LARGEST_FULL_DIFFERENCE),
                Condition("loss_curve_gradient_norm_difference", FULL, "<=", LARGEST_GRADIENT_NORM_DIFFERENCE),
                Condition("loss_curve_max_abs_difference", QLORA, "<=", LARGEST_LOSS_DIFFERENCE),
                *(
                    Condition("planted_fault_difference", fault, ">", LARGEST_LOSS_DIFFERENCE)
                    for fault in ("gradients x 1.01", "a mean per chunk")
                ),
                _works("Llama 1B learns"),
            ),
        ),
        gate=True,
    ),
    Criterion(
        "E",
        "GRPO with the memory-efficient linear works",
        (
            _if(
                4,
                _works("GRPO"),
                Condition("grpo_reward_rise", "GRPO run", ">=", LEAST_REWARD_RISE),
                Condition("grpo_peak_over_full_logits", "head only", "<=", 0.5),
            ),
        ),
    ),
)

RUBRIC = A + B + C + D + E
