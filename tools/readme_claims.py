"""The two tables of README: what is claimed, with the measurement behind it, and how long the notebook takes."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pandas
from nbformat import NotebookNode

from tools.measured_tables import amount, machine, shown_unit
from tools.outputs import run_seconds
from tools.readme_contents import SHORT
from tools.t4.report import total_prediction
from unsloth_puzzles.bench.markdown import table
from unsloth_puzzles.bench.scorecard import is_gpu

NOT_MEASURED = "not measured"
ONE_CASE = {"all", "exact call", "head only", "the script, two GPUs"}  # cases that the claim itself names
# The metric whose case tells what challenge B's script trained: the layers, unless all of them, and the weights.
_OF_CASE = ("steps_trained", r"((?:\d+ layers, )?(?:real|random)) weights")
_NAMES = SHORT | {"three bitsandbytes launches (Unsloth's sequence)": "an imitation of Unsloth's three launches"}


@dataclass(frozen=True)
class Claim:
    """A row of the table: what is claimed, and where its numbers lie.

    Args:
        text: Without a number and without the conditions, which the case of the records has.
        file: In resources/measurements/.
        metrics: Their values stand together. All must be measured, in the same case.
        case: The beginning of the case. The first case of the first metric that has it is shown.
        beside: Baselines to show where they were measured; none for a ratio.
        weights: "real" or "random", where the benchmark takes no others; None where the case tells, also of how many
            layers.
    """

    text: str
    file: str
    metrics: tuple[str, ...]
    case: str
    beside: tuple[str, ...]
    weights: str | None


CLAIMS = (
    Claim(
        "A. NF4 to fp16 and bf16 in one Triton kernel: speed-up, time of a round of the official harness",
        "a_nf4.json",
        ("official_harness_speedup", "official_harness_us"),
        "all",
        ("three bitsandbytes launches (Unsloth's sequence)",),
        "random",
    ),
    Claim(
        "B. QLoRA on two GPUs by FSDP2, layers of Llama 3.1 8B: largest difference of a loss from one GPU",
        "b_fsdp2.json",
        ("loss_difference",),
        "the script, two GPUs",
        ("one GPU, regrouped",),
        None,
    ),
    Claim(
        "B. Tokens/s of two GPUs over one, with the same rows a GPU",
        "b_fsdp2.json",
        ("scaling",),
        "4 layers",
        (),
        "random",
    ),
    Claim(
        "C. A compiled QLoRA step of Llama 3.2 1B, beside transformers + PEFT + bitsandbytes: memory, time, GPU busy",
        "c_compile.json",
        ("peak_gib", "step_ms", "gpu_busy_ms"),
        "without checkpointing",
        ("eager",),
        "random",
    ),
    Claim(
        "D. A 4-bit text classifier on held-out texts: macro-F1",
        "d_issues.json",
        ("macro_f1",),
        "docstrings",
        ("majority", "naive Bayes", "TF-IDF logistic regression"),
        "real",
    ),
    Claim(
        "D. Tool calling by SmolLM2-135M after QLoRA, held-out questions: share answered by exact calls",
        "d_issues.json",
        ("tool_calling",),
        "exact call",
        ("before",),
        "real",
    ),
    Claim(
        "E. Cross entropy without the logits: extra memory, time",
        "e_backprop.json",
        ("extra_peak_gib", "forward_backward_ms"),
        "head trained",
        ("eager", "torch.compile", "Liger FLCE", "Apple CCE"),
        "random",
    ),
    Claim(
        "E. GRPO without full logits, head only, no logits kept: extra memory, time",
        "e_backprop.json",
        ("grpo_peak_gib", "grpo_ms"),
        "head only",
        ("full logits", "full logits, TRL's kernel", "TRL", "Liger", "ours, float32 dW", "ours, logits kept"),
        "random",
    ),
)


def claims_table(measurements: Path) -> str:
    """A row a claim, from the measurement files in a folder. What is not measured says so."""
    return table(pandas.DataFrame([_row(claim, measurements / claim.file) for claim in CLAIMS]))


def _row(claim: Claim, path: Path) -> dict[str, str]:
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"records": []}
    records = {(one["metric"], one["case"]): one for one in measured["records"]}
    cases = [case for metric, case in records if metric == claim.metrics[0] and case.startswith(claim.case)]
    found = [records.get((metric, cases[0])) for metric in claim.metrics] if cases else [None]
    if None in found:
        return {"claim": claim.text, "ours": NOT_MEASURED, "baseline": "-", "hardware, date": "-", "weights": "-"}
    beside = {name: [one for one in found if name in one["baselines"]] for name in claim.beside}
    shown = [
        f"{_NAMES.get(name, name)} {', '.join(_amount(one, one['baselines'][name]) for one in having)}"
        for name, having in beside.items()
        if having
    ]
    return {
        "claim": claim.text if cases[0] in ONE_CASE else f"{claim.text} ({cases[0]})",
        "ours": ", ".join(_amount(one, one["value"]) for one in found),
        "baseline": "; ".join(shown) or (NOT_MEASURED if claim.beside else "-"),
        "hardware, date": machine(measured),
        "weights": claim.weights or _weights(records),
    }


def _amount(record: dict, value: float) -> str:
    unit = shown_unit(record)
    return amount(value, "nats" if unit == "loss" else unit)


def _weights(records: dict[tuple[str, str], dict]) -> str:
    wanted, pattern = _OF_CASE
    told = [match[1] for metric, case in records if metric == wanted and (match := re.search(pattern, case))]
    return told[0] if told else "not recorded"


def minutes_table(measurements: Path, released: NotebookNode, stamp: dict) -> str:
    """The minutes of "Run all": predicted for a T4, measured in the published run and on a CPU.

    Args:
        measurements: The folder with the summary of the rehearsal and the record of a run on a CPU.
        released: The executed notebook.
        stamp: Of that notebook.
    """
    took, sections = run_seconds(released)
    of_run = (
        _minutes(took) if took else NOT_MEASURED,
        f"the published run on {stamp['hardware']}, {stamp['date']}; sections {sections}" if took else "-",
    )
    on_t4 = is_gpu(stamp["hardware"], "T4")
    rows = [
        ("a T4", *(of_run if on_t4 else _rehearsed(measurements / "rehearsal.json", stamp["digest"]))),
        ("a CPU", *_on_a_cpu(measurements / "cpu_run.json", stamp["digest"])),
        ("a large GPU", *((NOT_MEASURED, "-") if on_t4 else of_run)),
    ]
    return table(pandas.DataFrame(rows, columns=["on", "minutes, without installation and downloads", "from"]))


def _rehearsed(path: Path, digest: str) -> tuple[str, str]:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sections": {}}
    sections = kept["sections"]
    total = total_prediction(sections.values())
    if not total:
        return NOT_MEASURED, "-"
    least, most = (_minutes(total[f"predicted_t4_seconds{end}"]) for end in ("_at_least", ""))
    minutes = most if least == most else f"{least} to {most}"
    where = f"a rehearsal on {kept['hardware']['name']}, {kept['date']}; sections {', '.join(sections)}"
    others = [name for name, section in sections.items() if section.get("digest") != digest]
    where += f"; {', '.join(others)} with other code than the published" if others else ""
    return f"{minutes} (predicted)", where


def _on_a_cpu(path: Path, digest: str) -> tuple[str, str]:
    if not path.exists():
        return NOT_MEASURED, "-"
    kept = json.loads(path.read_text(encoding="utf-8"))
    where = f"a run on {kept['cores']} cores of a CPU, {kept['date']}; sections {kept['sections']}"
    return _of_this_code(kept["digest"] == digest, _minutes(kept["seconds"]), where)


def _of_this_code(same: bool, minutes: str, where: str) -> tuple[str, str]:
    return (minutes, where) if same else (NOT_MEASURED, f"{where}; with other code than the published")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 60 else "less than 1"
