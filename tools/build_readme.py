"""README.md from tools/readme_template.md and resources/: no figure in it is typed in.

python -m tools.build_readme           write it
python -m tools.build_readme --check   exit 1 when README.md is not what the measurements give
"""

import argparse
import json
import sys
from pathlib import Path

import nbformat

from tools.address import NOTEBOOK, badges
from tools.build_notebook import ROOT
from tools.release import STAMP
from unsloth_puzzles.bench import scorecard
from unsloth_puzzles.bench.code_digest import code_digest, package_files
from unsloth_puzzles.bench.rubric import FILES, TITLES

# Measurement file -> (metric, what it is called here). A metric in WORST is one row: the largest value over all cases.
TABLES = {
    "a_nf4.json": (
        ("official_harness_speedup", "Official harness: three launches' time over ours, wall clock"),
        ("harness_speedup_beside_unsloth", "The same harness in one process with the real Unsloth"),
        ("speedup_vs_unsloth_device", "Three launches' time over ours, device time"),
        ("device_us", "Device time of one matrix"),
        ("device_us_beside_unsloth", "Device time beside the real Unsloth, in its own process"),
        ("copy_bandwidth_fraction", "Share of the machine's measured copy bandwidth"),
        ("host_enqueue_us", "Host time to enqueue one call"),
        ("host_enqueue_us_beside_unsloth", "Host time beside the real Unsloth, in its own process"),
        ("generation_tokens_per_s", "Generation before and after `patch_linear4bit`"),
        ("mismatched_weights", "Weights that differ from bitsandbytes"),
        ("sanitizer_errors", "compute-sanitizer errors"),
        ("sm75_spills", "Bytes spilled when compiled for a T4 (sm_75)"),
        ("sm75_shared_bytes", "Shared memory when compiled for a T4, of 65,536 bytes"),
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
        ("compilations", "Compilations of flex attention over 52 lengths, three windows, packed or not"),
    ),
    "e_backprop.json": (
        ("extra_peak_gib", "Extra peak memory of forward and backward, gradients included"),
        ("forward_backward_ms", "Time of forward and backward"),
        ("time_over_gemm_floor", "Our time over that of the bare matrix products in the same chunks"),
        ("time_over_liger", "Our time over Liger's"),
        ("gradient_error_over_eager", "Error of the gradients over eager's own error"),
        ("loss_curve_max_abs_difference", "Standard loss and ours: largest difference at any step, nats"),
        ("loss_curve_gradient_norm_difference", "The same of the gradients' norms, relative"),
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
FIGURES = {  # what a figure shows, for who cannot see it
    "a_nf4_bandwidth": "Share of the copy bandwidth over matrix sizes from 1 M to 1 G weights, ours and every baseline",
    "a_nf4_contraction": "By how much and where float32 weights differ when the multiply-add is contracted",
    "a_nf4_linear": "Device time of a block's linear layers over the number of rows, ours and bitsandbytes",
    "a_nf4_speedup": "Speed-up over the three launches and over Unsloth's fused kernel, by matrix and in the harness",
    "c_compile_frontier": "Time of a QLoRA step over its peak memory, eager and compiled, checkpointed and not",
    "c_compile_parity": "Loss, time and memory over 60 steps of as many lengths, three uncompiled runs and ours",
    "e_backprop_frontier": "Time over extra peak memory for chunks of 256 to 4096 rows, every baseline and the floor",
    "e_backprop_grpo_memory": "GRPO's extra peak memory, head alone and whole step, ours, TRL, Liger and full logits",
    "e_backprop_grpo_reward": "Reward and entropy over the steps of a GRPO run, TRL's trainer and ours overlaid",
    "e_backprop_vocabulary": "Extra peak memory and time over the size of the vocabulary, ours and every baseline",
    "llama32_1b_loss_curve": "Loss of Llama 3.2 1B over the steps, standard loss and ours, and their difference below",
}
FOLDERS = {"e_backprop": ("q5/",)}  # figures that lie elsewhere, by the measurement file that they belong to
RATIOS = ("x", "times", "ratio", "fraction")  # units that are written with each number
NAMELESS = ("relative", "loss", "reward", "compilations", "graph breaks")  # units that say what the caption says
SHORT = {"three bitsandbytes launches (Unsloth's sequence)": "three launches"}  # as a column's head
TURNED = {"extra_peak_gib", "forward_backward_ms", "grpo_peak_gib", "grpo_ms"}  # a row a candidate, a column a case
WORST = {"mismatched_weights", "sanitizer_errors", "sm75_spills", "sm75_shared_bytes"}


def readme(resources: Path = ROOT / "resources") -> str:
    """The README's text for what lies in ``resources``; what has no measurement says so."""
    template = (ROOT / "tools" / "readme_template.md").read_text(encoding="utf-8")
    parts = {"badges": badges(), "score": score(resources / "measurements"), "results": results(resources)}
    parts["release"] = release()
    parts["rehearsal"] = rehearsal(resources / "measurements" / "rehearsal.json")
    for name, part in parts.items():
        template = template.replace(f"<!-- {name} -->", part)
    return template


def release() -> str:
    """Of which code the committed notebook is, from its stamp."""
    of = nbformat.read(ROOT / NOTEBOOK, as_version=4).metadata[STAMP]
    where = f"on {of['date']} on an {of['hardware']}, at commit `{of['commit'][:10]}`"
    return (
        f"The committed notebook was executed {where}.\n"
        "`python -m tools.release` says how far the code has moved since.\n"
        "Points are counted by today's criteria: what that run did not measure earns nothing."
    )


def rehearsal(path: Path) -> str:
    """What the rehearsal of a T4 found, a row a section; it says so where there was none."""
    if not path.exists():
        return "No rehearsal of a T4 is kept."
    kept = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, section in kept["sections"].items():
        predicted, aim = section.get("predicted_t4_seconds"), kept["budget_seconds"][name]
        rows.append(
            (
                name,
                f"{section['wall_seconds']:.0f} s",
                "not known" if predicted is None else _beside_aim(predicted, aim),
                f"{section['points']} of {section['possible']}",
                f"{section['kernels_seen']}, {section['kernels_failed']}, {section['kernels_over_shared_memory']}",
                f"{section['gpu_peak_gib']:.1f} GiB",
                f"{section['ram_peak_gb']:.1f} GB",
            )
        )
    heads = ("section", "wall time here", "predicted for a T4, aim", "points", "Triton kernels seen, failed, too large")
    where = f"{kept['hardware']['name']}, {kept['date']}"
    of_release = nbformat.read(ROOT / NOTEBOOK, as_version=4).metadata[STAMP]["digest"]
    others = [name for name, section in kept["sections"].items() if section.get("digest") != of_release]
    predicted = [section.get("predicted_t4_seconds") or 0 for section in kept["sections"].values()]
    text = f"A T4 was rehearsed on an {where}: predictions, no measurements of a T4."
    text += f" Together {sum(predicted):.0f} s, without installation and downloads."
    text += f" Not run with the code of the committed notebook: {', '.join(others) or 'none'}."
    against = [section.get("against_colab", {}) for section in kept["sections"].values()]
    differ = sorted({name for versions in against for name, one in versions.items() if not one["same"]})
    text += f" Packages in other versions than Colab's: {', '.join(differ) or 'none'}."
    curves = kept["sections"].get("E", {}).get("figures", {})
    if curves:
        text += f" E's curves there: {'; '.join(f'{name}: {value:.1e}' for name, value in curves.items())}."
    return f"{text}\n\n{table((*heads, 'GPU memory', 'RAM'), rows)}"


def _beside_aim(predicted: float, aim: float) -> str:
    return f"{predicted:.0f} s, {aim} s" + (" (not reached)" if predicted > aim else "")


def score(measurements: Path) -> str:
    """Points per challenge with the hardware that earned them, from the scorecard's rows."""
    rows = scorecard.score(measurements)
    lines = []
    for challenge, (points, possible) in scorecard.totals(rows).items():
        hardware = dict.fromkeys(row.hardware for row in rows if row.challenge == challenge and row.hardware)
        if challenge in TITLES:
            shown = str(points) if hardware else "not measured"
            lines.append((f"{challenge}. {TITLES[challenge]}", shown, str(possible), ", ".join(hardware) or "-"))
        else:
            lines.append(("**all**", f"**{points}**", f"**{possible}**", ""))
    return table(("challenge", "points", "of", "measured on"), lines)


def results(resources: Path) -> str:
    """A heading, tables and figures for each challenge, then the GPU tests."""
    parts = []
    for challenge, file in FILES.items():
        path = resources / "measurements" / file
        parts.append(f"### {challenge}. {TITLES[challenge]}")
        if not path.exists():
            parts.append("Not measured yet.")
            continue
        measured = json.loads(path.read_text(encoding="utf-8"))
        parts.append(_provenance(measured))
        parts += [_metric(measured["records"], metric, caption) for metric, caption in TABLES.get(file, ())]
        parts += [
            f"![{_alternative(figure)}]({figure.relative_to(resources.parent).as_posix()})"
            for figure in sorted(resources.glob("**/*.png"))
            if figure.relative_to(resources).as_posix().startswith(_places(path.stem))
        ]
    return "\n\n".join([*parts, "### Tests on a GPU", gpu_tests(resources / "measurements" / "gpu_tests.json")])


def gpu_tests(path: Path) -> str:
    """What `make gpu-test` kept, whether of this package, every failed test, and every skip with its reason."""
    if not path.exists():
        return "Not measured yet."
    kept = json.loads(path.read_text(encoding="utf-8"))
    counts = f"{kept['passed']} passed, {kept['failed']} failed, {kept['skipped']} skipped"
    said = [f"- failed: `{name}`" for name in kept["failures"]]
    said += [f"- skipped: {reason}" for reason in dict.fromkeys(skip["reason"] for skip in kept["skips"])]
    since = "" if kept["digest"] == code_digest(package_files()) else " The package has changed since."
    return "\n".join([f"{counts}. {_provenance(kept)}{since}", *(["", *said] if said else [])])


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ("---",) * len(header), *rows])


def amount(value: float, unit: str) -> str:
    """A value with its unit, as the tables write it: `1.87x`, `96 %`, `11.8 us`, `65,536 bytes`."""
    if unit in ("x", "times", "ratio"):
        return f"{value:.2f}x"
    if unit == "fraction":
        return f"{100 * value:.1f} %"
    return f"{_number(value)} {unit}".strip()


def _places(stem: str) -> tuple[str, ...]:
    return f"{stem}_", f"{stem}/", *FOLDERS.get(stem, ())


def _alternative(figure: Path) -> str:
    return FIGURES.get(figure.stem, figure.stem.replace("_", " "))


def _metric(records: list[dict], metric: str, caption: str) -> str:
    """The table of one metric: case, ours with its spread, and the baselines where there are any."""
    mine = [record for record in records if record["metric"] == metric]
    if not mine:
        return f"**{caption}**: not measured."
    if metric in WORST:
        worst = max(mine, key=lambda record: record["value"])
        if not worst["value"]:
            return f"**{caption}**: 0 in each of {len(mine)} cases."
        return f"**{caption}**: {amount(worst['value'], worst['unit'])}, the largest of {len(mine)} cases."
    names = list(dict.fromkeys(name for record in mine for name in record.get("baselines") or {}))
    unit = "" if mine[0]["unit"] in (*RATIOS, *NAMELESS) else f", {mine[0]['unit']}"
    if metric in TURNED:
        rows = [_row(record, names)[1:] for record in mine]
        header = ("", *(record["case"] for record in mine))
        labels = ("ours", *(SHORT.get(name, name) for name in names))
        lines = [(label, *cells) for label, cells in zip(labels, zip(*rows, strict=True), strict=True)]
        return f"**{caption}{unit}**\n\n" + table(header, lines)
    header = ("case", "ours", *(SHORT.get(name, name) for name in names))
    return f"**{caption}{unit}**\n\n" + table(header, [_row(record, names) for record in mine])


def _row(record: dict, names: list[str]) -> tuple[str, ...]:
    """Case, ours with its spread, and each baseline; the unit stands in the caption unless it is part of the number."""
    unit = record["unit"] if record["unit"] in RATIOS else ""
    low, high, others = record.get("low"), record.get("high"), record.get("baselines") or {}
    ours = amount(record["value"], unit)
    if low is not None and high is not None:
        ours += f" ({amount(low, unit)} to {amount(high, unit)})"
    return (record["case"], ours, *(amount(others[name], unit) if name in others else "-" for name in names))


def _number(value: float) -> str:
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _provenance(measured: dict) -> str:
    versions = ", ".join(f"{name} {measured['versions'][name]}" for name in ("torch", "triton", "bitsandbytes"))
    held = " held to a T4's limits (a rehearsal)" if measured["hardware"].get("rehearsal") else ""
    return f"{measured['hardware']['name']}{held}, {measured['date']}, {versions}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write README.md from its template and the measurements.")
    parser.add_argument("--check", action="store_true", help="compare with README.md, write nothing")
    options = parser.parse_args(arguments)
    path, made = ROOT / "README.md", readme()
    if not options.check:
        path.write_text(made, encoding="utf-8")
        print(f"{path}: written")
        return 0
    same = path.exists() and path.read_text(encoding="utf-8") == made
    print("README.md is what the measurements give." if same else "README.md differs: run python -m tools.build_readme")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
