"""Which part of the model each compiled graph holds, by the operators that Inductor received, and Dynamo's limits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pandas

from unsloth_puzzles.bench.compilations import Capture
from unsloth_puzzles.bench.markdown import table

LAYER = ("LlamaDecoderLayer",)
CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"
OPERATORS = {  # part: (the captured functions that hold it, {feature: the operators that show it})
    "4-bit linear": (
        LAYER,
        {
            "de-quantisation by A's kernel": ("unsloth_puzzles.dequantize_nf4",),
            "and again in the backward": ("unsloth_puzzles.dequantize_nf4_again",),
        },
    ),
    "attention": (
        LAYER,
        {
            "attention": ("flex_attention", CPU_ATTENTION),
            "its backward": ("flex_attention_backward", f"{CPU_ATTENTION}_backward"),
        },
    ),
    "MLP": (
        LAYER,
        {
            "gated activation with its adapters": ("unsloth_puzzles.lora_swiglu",),
            "its backward": ("unsloth_puzzles.lora_swiglu_backward",),
        },
    ),
    "layer norms": ((*LAYER, "norm"), {"reciprocal root": ("aten.rsqrt",)}),
    "loss": (("run_",), {"exponential": ("aten.exp", "aten.exp2"), "logarithm": ("aten.log", "aten.log2")}),
}


NAMES = {"run_": "loss"}  # functions that are numbered ("run_0"), by the beginning of their name: what they compute


@dataclass
class Part:
    """Where a part was compiled.

    Attributes:
        functions: the captured functions, by name, or as `NAMES` calls them.
        operators: those of its operators that were found, with how often each occurs.
        checks: {"feature in function": whether it was found}.
        compilations: Inductor's, of these functions.
    """

    functions: list[str]
    operators: dict[str, int]
    checks: dict[str, bool]
    compilations: int


def find_parts(captures: Iterable[Capture], on_gpu: bool) -> dict[str, Part]:
    """The parts of the model that `captures` hold, by name.

    Args:
        captures: of a run, forward and backward.
        on_gpu: attention must be flex attention there, and PyTorch's own operator on a CPU.
    """
    captures, parts = list(captures), {}
    for part, (functions, features) in OPERATORS.items():
        of = [one for one in captures if one.name.startswith(functions)]
        shown, checks = Counter(), {}
        for function in functions:
            operators = sum((Counter(one.operators) for one in of if one.name.startswith(function)), Counter())
            for feature, names in features.items():
                wanted = [name for name in names if part != "attention" or name.startswith("flex") == on_gpu]
                found = {name: operators[name] for name in wanted if operators[name]}
                checks[f"{feature} in {NAMES.get(function, function)}"] = bool(found)
                shown.update(found)
        names = list(dict.fromkeys(_shown(one.name) for one in of))
        parts[part] = Part(names, dict(shown), checks, sum(one.compilations for one in of))
    return parts


def _shown(name: str) -> str:
    return next((shown for beginning, shown in NAMES.items() if name.startswith(beginning)), name)


def limits_in_words(limits: dict) -> str:
    """Dynamo's limits, a sentence.

    Args:
        limits: "suppress_errors", "recompile_limit" and "accumulated_recompile_limit", as `trainer.measure` gives them.
    """
    errors = "hides" if limits["suppress_errors"] else "raises"
    times = f"{limits['recompile_limit']} times for one module and {limits['accumulated_recompile_limit']} times in all"
    return f"Dynamo {errors} errors of the compiler and may compile a function {times}"


def parts_table(parts: dict[str, Part]) -> str:
    """Markdown: a line a part."""
    rows = []
    for name, part in parts.items():
        operators = "; ".join(f"{operator} x {count}" for operator, count in part.operators.items())
        rows.append((name, ", ".join(part.functions), operators, part.compilations))
    return table(pandas.DataFrame(rows, columns=["part", "compiled in", "operators found", "compilations"]))
