"""The notebook reaches its scorecard whatever fails in it."""

import re
from pathlib import Path

import nbformat
import pytest

from tools.address import NOTEBOOK
from tools.build_notebook import build, text
from tools.outputs import failures, output_text, report
from tools.run_notebook import run

SABOTAGED = {  # what measures, by module: each of these raises an error
    "benchmarks.nf4.harness": ("measure",),
    "benchmarks.nf4.workload": ("make_layer",),
    "unsloth_puzzles.bench.cross_compile": ("cross_compile_in_subprocess",),
    "benchmarks.attention.checks": ("check_flex", "check_backends"),
    "benchmarks.compiled.model": ("qlora_model",),
    "benchmarks.backprop.linear_losses": ("measure", "losses"),
    "benchmarks.backprop.llama_curve": ("run_modes",),
    "benchmarks.backprop.grpo": ("train", "whole_step", "make_trainer"),
    "benchmarks.backprop.grpo_head": ("head_only",),
    "unsloth_puzzles.backprop.trainer": ("use_memory_efficient_loss",),
    "unsloth_puzzles.backprop.linear": ("memory_efficient_linear",),
    "unsloth_puzzles.backprop": ("memory_efficient_linear",),
    "benchmarks.vision.checks": ("largest_difference", "token_losses"),
    "benchmarks.gguf.proof": ("prove",),
    "unsloth_puzzles.classification.load": ("load_classifier",),
    "unsloth_puzzles.tool_calling.replies": ("read_tagged",),
}


@pytest.mark.slow
def test_it_reaches_the_scorecard_whatever_fails(tmp_path: Path) -> None:
    notebook = build()
    (watch,) = (n for n, cell in enumerate(notebook.cells) if "experiments.watch()" in cell.source)
    lines = ["import importlib", "def sabotaged(*args, **kwargs):", "    raise RuntimeError('sabotaged')"]
    for module, names in SABOTAGED.items():
        lines += [f"module = importlib.import_module({module!r})", *(f"module.{name} = sabotaged" for name in names)]
    notebook.cells.insert(watch + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    source = tmp_path / NOTEBOOK
    source.write_text(text(notebook), encoding="utf-8")
    node = run(source, tmp_path / "alone")
    assert failures(node) == []
    shown = report(node)
    assert "RuntimeError: sabotaged" in shown
    assert re.search(r"\*\*all challenges\*\* \| \*\*-?\d+ of 51\*\*", shown)
    won = {name: int(points) for name, points in re.findall(r"\| \*\*([A-E])\*\* .*?\*\*(-?\d+) of", shown)}
    assert won["B"] == won["D"] == won["E"] == 0 and won["A"] <= 0
    assert won["C"] == -2 - 1 - 3  # neither NF4's kernel nor the loss nor the norms were shown to be compiled
    reasons = [line for cell in node.cells if cell.cell_type == "code" for line in output_text(cell).splitlines()]
    assert not [line for line in reasons if "NameError" in line or "KeyError" in line]
