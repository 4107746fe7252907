"""Tables and figures of QLoRA steps, from what `steps.measure` returns."""

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas

from benchmarks.compiled.steps import PARTS, largest_difference, step_ms
from unsloth_puzzles.bench.markdown import table

COPIES = "copies to and from the host"
COLORS = {"eager": "tab:orange", PARTS: "tab:green", "compiled": "tab:blue"}


def busy_ms(run: dict) -> float | None:
    """The time in which kernels run on the GPU in a step, ms, without copies to and from the host; None if a run was
    not profiled."""
    return sum(of["ms"] for kind, of in run["kernels"].items() if kind != COPIES) if run["kernels"] else None


def steps_table(runs: Mapping[str, dict], failed: Mapping[str, str]) -> str:
    """Markdown: a line a run.

    Args:
        runs: by name.
        failed: by name, the reason.
    """
    heads = (
        "run",
        "step, ms (10 % to 90 %)",
        "GPU busy, ms",
        "peak, GiB",
        "pinned on the host, GiB",
        "compilations",
        "compile time, s",
    )
    rows = []
    for name, run in runs.items():
        middle, low, high = step_ms(run)
        measured = ((busy_ms(run), 1), (run["peak_gib"], 2), (run["pinned_gib"], 2))
        cells = [name, f"{middle:.1f} ({low:.1f} to {high:.1f})"]
        cells += ["" if value is None else f"{value:.{digits}f}" for value, digits in measured]
        rows.append((*cells, run["compilations"], f"{run['compile_seconds']:.0f}"))
    rows += [(name, f"FAILED: {reason}", *[""] * (len(heads) - 2)) for name, reason in failed.items()]
    return table(pandas.DataFrame(rows, columns=heads))


def recovery(run: dict, other: dict) -> str:
    """Say what compiling costs once, and after how many steps the saved GPU time recovers it.

    Args:
        run: compiled and profiled. Its first two steps compile.
        other: the uncompiled run, profiled.
    """
    spent, saved = sum(run["step_ms"][:2]) - sum(other["step_ms"][:2]), busy_ms(other) - busy_ms(run)
    after = f"it is recovered after {math.ceil(spent / saved)} steps" if saved > 0 else "it is not recovered"
    cost = f"the first two steps, which compile, take {spent / 1e3:.0f} s more than eager's"
    return f"{cost}; a later step saves {saved:.1f} ms of GPU time: {after}"


def products_table(products: list[dict], largest: int = 4) -> str:
    """Markdown: the matrix products in which Triton gains most on cuBLAS, a line each.

    Args:
        products: of a run with max-autotune.
        largest: how many.
    """
    won = {(one["rows"], one["inner"], one["columns"]): one for one in products if one["tile"]}
    best = sorted(won.items(), key=lambda item: item[1]["winner_us"] / item[1]["cublas_us"])[:largest]
    rows = [
        (" x ".join(map(str, sizes)), f"{one['winner_us']:.1f}", f"{one['cublas_us']:.1f}", one["tile"])
        for sizes, one in best
    ]
    return table(pandas.DataFrame(rows, columns=["rows x inner x columns", "Triton, us", "cuBLAS, us", "tile"]))


def memory_figure(runs: Mapping[str, dict], where: str):
    """Step time over peak memory: a filled mark is the wall clock, a hollow one the time in which the GPU is busy.

    Args:
        runs: by name; a run is drawn in its candidate's colour.
        where: hardware and date.

    Returns:
        The figure.
    """
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    most = max(run["peak_gib"] for run in runs.values())
    for name, run in runs.items():
        color, x, y, busy = COLORS[run["candidate"]], run["peak_gib"], step_ms(run)[0], busy_ms(run)
        if busy is not None:
            axes.plot([x, x], [busy, y], color=color, linewidth=1)
            axes.plot(x, busy, "o", color=color, markerfacecolor="white", markersize=8)
        axes.plot(x, y, "o", color=color, markersize=8)
        left = x > 0.6 * most  # then the label stands on the left
        place = {"textcoords": "offset points", "ha": "right" if left else "left"}
        place["va"] = "bottom" if run["checkpointing"] else "top"
        text = f"{name}\n{x:.3g} GiB, {y:.0f} ms"
        below = 15 if run["candidate"] == PARTS else 0  # beside the label of the uncompiled run
        axes.annotate(text, (x, y), (-9 if left else 9, -below), fontsize=9, color=color, **place)
    axes.set(xlabel="peak memory of a step, GiB", ylabel="time of a step, ms\n(hollow: GPU busy)")
    axes.set_xlim(0, 1.05 * most)
    axes.set_ylim(0, 1.25 * max(step_ms(run)[0] for run in runs.values()))
    one = next(iter(runs.values()))
    shape = f"{one['batch']} x {one['lengths'][0]} tokens, {one['dtype']}"
    axes.set_title(f"{_memory_message(runs)}\nLlama 3.2 1B, random weights, {shape}; {where}", fontsize=9)
    return figure


def _memory_message(runs: Mapping[str, dict]) -> str:
    """The figure's message: the first compiled run over the uncompiled run that differs in nothing else."""
    for name, run in runs.items():
        alike = [one for one in runs.values() if one["checkpointing"] == run["checkpointing"]]
        other = next((one for one in alike if one["candidate"] == "eager"), None)
        if run["candidate"] == "compiled" and other is not None:
            shares = [
                (run["peak_gib"] / other["peak_gib"], "memory"),
                (step_ms(run)[0] / step_ms(other)[0], "step time"),
            ]
            if busy_ms(run) and busy_ms(other):
                shares.append((busy_ms(run) / busy_ms(other), "GPU time"))
            text = ", ".join(f"{share:.0%} of the {what}" for share, what in shares)
            return f"{name[0].upper()}{name[1:]}: {text} of eager"
    return "Time and memory of a QLoRA step"


def parity_figure(runs: Mapping[str, dict], where: str):
    """Loss, difference from the first uncompiled run, and memory over the steps: compiled and uncompiled runs.

    Args:
        runs: by name; the one called "compiled" is ours, those that begin with "eager" differ in SDPA's kernel.
        where: hardware and date.

    Returns:
        The figure.
    """
    ours = runs["compiled"]
    eager = {name: run for name, run in runs.items() if name.startswith("eager")}
    first_name, first = next(iter(eager.items()))
    among = max(largest_difference(a, b) for a in eager.values() for b in eager.values())
    steps = range(1, len(ours["losses"]) + 1)
    figure, (losses, apart, memory) = plt.subplots(
        3, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 4, 3), layout="constrained"
    )
    losses.plot(steps, first["losses"], color=COLORS["eager"], linewidth=4, label=first_name)
    losses.plot(steps, ours["losses"], color=COLORS["compiled"], linewidth=1.2, label="compiled")
    for (name, run), color in zip(list(eager.items())[1:], ("0.45", "0.7"), strict=False):
        apart.semilogy(steps, _gaps(run, first), color=color, linewidth=1.2, label=name)
    apart.semilogy(steps, _gaps(ours, first), color=COLORS["compiled"], linewidth=1.2, label="compiled")
    apart.axhline(2 * among, color="black", linestyle=":", label="limit")
    memory.plot(steps, first["step_peak_gib"], color=COLORS["eager"], linewidth=1.5, label=first_name)
    memory.plot(steps, ours["step_peak_gib"], color=COLORS["compiled"], linewidth=1.5, label="compiled")
    apart.set_ylim(top=20 * among)  # room for the legend
    for axes, label in (
        (losses, "loss,\nnats a token"),
        (apart, f"difference from\n{first_name}, nats"),
        (memory, "peak memory\nof a step, GiB"),
    ):
        axes.set_ylabel(label)
        axes.legend(fontsize=9, loc="upper right", ncols=4)
    memory.set_ylim(0, 1.25 * max(first["step_peak_gib"]))
    memory.set_xlabel("step")
    far = max(largest_difference(ours, run) for run in eager.values())
    message = f"Compiled losses are at most {far:.1e} nats from uncompiled ones, which differ by {among:.1e}"
    tokens = f"{ours['batch']} x up to {max(ours['lengths'])} tokens, {ours['dtype']}"
    figure.suptitle(f"{message}\nLlama 3.2 1B, random weights, {tokens}; {where}", fontsize=10)
    figure.align_ylabels()
    return figure


def _gaps(run: dict, other: dict) -> list[float]:
    """|loss - loss| of each step; 0 is drawn at 1e-6."""
    return [max(1e-6, abs(a - b)) for a, b in zip(run["losses"], other["losses"], strict=True)]
