"""Figures and tables of challenge E, from what the benchmarks beside this file return."""

import itertools
import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas

from benchmarks.backprop.baselines import CCE, FLOOR, LIGER
from benchmarks.backprop.linear_losses import OURS, Measured
from unsloth_puzzles.bench.criterion import (
    LARGEST_FULL_DIFFERENCE,
    LARGEST_GRADIENT_NORM_DIFFERENCE,
    LARGEST_LOSS_DIFFERENCE,
)
from unsloth_puzzles.bench.markdown import table
from unsloth_puzzles.bench.record import Measurements

BLUE, GRAY, GREEN, ORANGE = "tab:blue", "0.45", "tab:green", "tab:orange"
CURVE_LIMITS = {"full": LARGEST_FULL_DIFFERENCE, "qlora": LARGEST_LOSS_DIFFERENCE}  # of a loss
# Relative, of a gradient norm. In float16: half of the planted fault "gradients x 1.01".
NORM_LIMITS = {"full": LARGEST_GRADIENT_NORM_DIFFERENCE, "qlora": 5e-3}
LEAST = 1e-8  # what a difference of 0 is drawn at
Points = list[tuple[int, dict[str, tuple[float, float]]]]  # (size, {candidate: (GiB, ms)})


def head_table(measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """Markdown: extra memory and time of each candidate, a column a head.

    Args:
        measured: By head and candidate.
    """
    names = dict.fromkeys(name for found in measured.values() for name in found)
    rows = []
    for name in names:
        cells = [name]
        for found in measured.values():
            if name in found:
                one, time = found[name], found[name].time
                spread = f"{time.low / 1e3:.1f} to {time.high / 1e3:.1f}"
                cells += [f"{one.extra_peak_gib:.3g}", f"{time.median / 1e3:.1f} ({spread})"]
            else:
                cells += ["", ""]
        rows.append(cells)
    titles = [title for head in measured for title in (f"{head}, GiB", "ms (10 % to 90 %)")]
    return table(pandas.DataFrame(rows, columns=["candidate", *titles])) if rows else "No candidate was measured."


def error_table(wrong: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the errors of each candidate.

    Args:
        wrong: What `errors.gradient_errors` returned for a trained head.
    """
    rows = [(n, f"{e['hidden_states']:.2e}", f"{e['weight']:.2e}", f"{e['loss']:.1e}") for n, e in wrong.items()]
    columns = ["relative error", "dX", "dW", "loss"]
    return table(pandas.DataFrame(rows, columns=columns)) if rows else "No candidate's error was measured."


def swept_points(sweeps: Measurements, metric: str, case: str) -> Points:
    """The records of a sweep as points.

    Args:
        sweeps: What `sweeps.measure` saved.
        metric: "frontier" or "vocabulary".
        case: The beginning of the cases.
    """
    points = []
    for time_of, peak_of in zip(sweeps.find(f"{metric}_ms"), sweeps.find(f"{metric}_peak_gib"), strict=True):
        if time_of["case"].startswith(case):
            times = {OURS: time_of["value"], **time_of["baselines"]}
            peaks = {OURS: peak_of["value"], **peak_of["baselines"]}
            size = next(int(word) for word in time_of["case"].split() if word.isdigit())
            points.append((size, {name: (peaks[name], times[name]) for name in times}))
    return points


def time_at_equal_memory(points: Points) -> float | None:
    """Our time over Liger's at Liger's memory, between our two nearest chunk sizes (logarithmic interpolation).

    None if Liger's memory is outside our range by more than 1 %, or if Liger was not measured.
    """
    mine = sorted(at[OURS] for _, at in points)
    theirs = next((at[LIGER] for _, at in points if LIGER in at), None)
    if theirs is None or not mine or not 0.99 * mine[0][0] <= theirs[0] <= 1.01 * mine[-1][0]:
        return None
    wanted = min(max(theirs[0], mine[0][0]), mine[-1][0])
    for (low, slow), (high, fast) in itertools.pairwise(mine):
        if low <= wanted <= high:
            share = math.log(wanted / low) / math.log(high / low)
            return math.exp(math.log(slow) + share * math.log(fast / slow)) / theirs[1]
    return mine[0][1] / theirs[1]


def frontier_figure(by_head: Mapping[str, Points], where: str):
    """Time over extra memory: ours at several chunk sizes, the bare products in the same chunks, and the baselines.

    Args:
        by_head: The points of each head.
        where: Shape, weights, hardware and date.

    Returns:
        The figure. Its title says who is faster at Liger's memory.
    """
    figure, panes = plt.subplots(1, len(by_head), figsize=(11, 4.4), squeeze=False, layout="constrained")
    for axes, (head, points) in zip(panes[0], by_head.items(), strict=True):
        ours = [at[OURS] for _, at in points]
        top = 1.25 * max(time for _, at in points for name, (_, time) in at.items() if name != CCE)
        axes.plot(*zip(*ours, strict=True), "o-", color=BLUE)
        axes.plot(*zip(*(at[FLOOR] for _, at in points), strict=True), "--", color=GRAY)
        axes.annotate("ours (rows of a chunk)", ours[0], (26, 4), textcoords="offset points", color=BLUE, fontsize=9)
        place = {"textcoords": "offset points", "fontsize": 9, "va": "top"}
        axes.annotate("bare matrix products", points[-1][1][FLOOR], (12, 2), color=GRAY, **place)
        for size, at in points:
            axes.annotate(size, at[OURS], (3, 4), textcoords="offset points", fontsize=8, color=BLUE)
        for name, at in points[0][1].items():  # the baselines have no chunk size of ours: one point each
            if at[1] > top:  # it would press all others together
                axes.plot(at[0], 0.96 * top, "^", color=ORANGE)
                style = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": ORANGE}
                axes.annotate(f"{name}, above: {at[1]:.0f} ms", (at[0], 0.96 * top), (8, 0), **style)
            elif name not in (OURS, FLOOR):
                color, marker = (GREEN, "D") if name == LIGER else (ORANGE, "s")
                axes.plot(*at, marker, color=color, zorder=3)
                if name == LIGER:  # its neighbours leave no room beside it: the label lies below all curves
                    lowest = min(at[FLOOR][1] for _, at in points)
                    line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkB": 4}
                    style = {"ha": "center", "va": "top", "color": color, "arrowprops": line}
                    axes.annotate(name, at, (at[0], 0.9 * lowest), fontsize=9, **style)
                    continue
                style = {"ha": "right", "va": "top"} if at[0] > 10 else {"va": "center"}
                shift = (-5, -4) if at[0] > 10 else (8, 0)
                axes.annotate(name, at, shift, textcoords="offset points", fontsize=9, color=color, **style)
        peaks = [peak for _, at in points for peak, _ in at.values()]
        axes.set_xlim(0.6 * min(peaks), 1.5 * max(peaks))
        axes.set_ylim(0.75 * min(time for _, at in points for _, time in at.values()), top)
        axes.set(xlabel="extra peak memory, GiB", ylabel="forward + backward, ms", title=head)
        _plain_log(axes.xaxis, (1, 2, 5))
        _plain_log(axes.yaxis, (1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8))
    compared = {head: time_at_equal_memory(points) for head, points in by_head.items()}
    said = (f"{head}, {_faster(ratio)}" for head, ratio in compared.items() if ratio is not None)
    figure.suptitle(f"At equal memory (Liger's): {'; '.join(said) or 'not compared'}\n{where}", fontsize=10)
    return figure


def _faster(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "both equally fast"
    return f"{'ours' if ratio < 1 else 'Liger'} is faster by {max(ratio, 1 / ratio) - 1:.0%}"


def _plain_log(axis, steps: Sequence[float]) -> None:
    """A logarithmic axis with ticks at `steps` times the powers of ten, as plain numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_ticks([step * 10.0**k for k in range(-6, 6) for step in steps if low <= step * 10.0**k <= high])
    axis.set_major_formatter("{x:.3g}")
    axis.minorticks_off()


def vocabulary_table(points: Points, names: Sequence[str]) -> str:
    """Markdown: extra memory and time by size of the vocabulary, a column a candidate."""
    rows = []
    for size, at in points:
        cells = (f"{at[name][0]:.2f} GiB, {at[name][1]:.1f} ms" if name in at else "" for name in names)
        rows.append((size, *cells))
    return table(pandas.DataFrame(rows, columns=["vocabulary", *names]))


def curve_figure(
    curves: Mapping[tuple[str, str], dict],
    names: Mapping[str, str],
    apart: Mapping[str, Sequence[float]],
    norms_apart: Mapping[str, Sequence[float]],
    faults: Mapping[str, Sequence[float]],
    where: str,
):
    """Losses, their difference, and the difference of the gradients' norms over the steps, a column a mode.

    Args:
        curves: By (mode, run), what `llama_curve.run` returned.
        names: Of the modes that were compared.
        apart: By mode, the differences of the losses.
        norms_apart: By mode, the relative differences of the gradients' norms. NaN is not drawn.
        faults: The differences of the losses with a planted fault, in mode "full".
        where: Model, weights, hardware and date.

    Returns:
        The figure.
    """
    from benchmarks.backprop.curve_data import OURS as OURS_CURVE  # here: the other figures need no transformers
    from benchmarks.backprop.curve_data import STANDARD

    figure, panes = plt.subplots(
        3, len(apart), figsize=(5.5 * len(apart), 7), squeeze=False, sharex="col", height_ratios=(3, 3, 2),
        layout="constrained",
    )  # fmt: skip
    for (upper, middle, lower), mode in zip(panes.T, apart, strict=True):
        shown, ours = range(1, len(apart[mode]) + 1), curves[mode, OURS_CURVE]
        upper.plot(shown, curves[mode, STANDARD]["losses"], color=ORANGE, linewidth=4, label="standard loss")
        upper.plot(shown, ours["losses"], color=BLUE, linewidth=1.2, label="ours")
        upper.legend(fontsize=9)
        middle.plot(shown, [max(gap, LEAST) for gap in apart[mode]], ".-", color=BLUE)
        for (fault, gaps), style in zip(faults.items() if mode == "full" else (), ("--", ":"), strict=False):
            steps = range(1, len(gaps) + 1)
            middle.plot(steps, [max(gap, LEAST) for gap in gaps], style, color=GRAY)
            place = {"textcoords": "offset points", "fontsize": 8, "color": GRAY, "va": "center"}
            above = gaps[-1] == max(other[-1] for other in faults.values())  # so that the labels lie apart
            middle.annotate(f"planted: {fault}", (steps[-1], max(gaps[-1], LEAST)), (4, 7 if above else -7), **place)
        lower.plot(shown, [max(gap, LEAST) for gap in norms_apart[mode]], ".-", color=BLUE)
        for axes, limit in ((middle, CURVE_LIMITS[mode]), (lower, NORM_LIMITS[mode])):
            axes.axhline(limit, color="black", linestyle=":", linewidth=1)
            place = {"textcoords": "offset points", "fontsize": 8, "ha": "right"}
            axes.annotate(f"limit {limit:.0e}", (shown[-1], limit), (0, 3), **place)
        upper.set_title(f"{names[mode]}, {ours['dtype']}", fontsize=10)
        upper.set_ylabel("loss, nats a token")
        middle.set(ylabel="difference of losses,\nnats (0 drawn at 1e-8)", yscale="log", ylim=(LEAST / 2, 3))
        lower.set(xlabel="step", ylabel="relative difference\nof gradient norms", yscale="log", ylim=(LEAST / 2, 0.2))
    largest = ", ".join(f"{max(apart[mode]):.1e} ({names[mode]})" for mode in apart)
    figure.suptitle(f"Largest difference between standard loss and ours: {largest}\n{where}", fontsize=10)
    figure.align_ylabels()
    return figure


def reward_figure(runs: Mapping[str, dict], same_steps: int | None, where: str):
    """The reward over the steps of GRPO runs.

    Args:
        runs: By trainer, what `grpo.train` returned.
        same_steps: For so many steps the rewards agree; None if that is unknown.
        where: Model, weights, hardware and date.

    Returns:
        The figure.
    """
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for (name, run), (color, width) in zip(runs.items(), ((ORANGE, 4), (BLUE, 1.2)), strict=False):
        axes.plot(range(1, len(run["reward"]) + 1), run["reward"], color=color, linewidth=width, label=name)
    axes.set(xlabel="step", ylabel="reward:\nshare of vowels", ylim=(0, 1))
    axes.legend(fontsize=9, loc="upper left")
    steps = len(next(iter(runs.values()))["reward"])
    message = "Reward of a GRPO run"
    if same_steps is not None:
        message += f": equal under TRL's trainer and ours for the first {same_steps} of {steps} steps"
        if same_steps < steps:
            axes.axvline(same_steps + 0.5, color=GRAY, linestyle=":")
    axes.set_title(f"{message}\n{where}", fontsize=10)
    return figure


def grpo_memory_figure(measured: Mapping[str, Mapping[str, dict]], ours: str, where: str):
    """Extra peak memory of GRPO's forward and backward, a bar a candidate, with its time.

    Args:
        measured: By part ("head only", "whole step") and candidate: "peak_gib" and "time".
        ours: Our candidate.
        where: Model, weights, hardware and date.

    Returns:
        The figure.
    """
    from benchmarks.backprop.grpo_head import FULL, OURS_FLOAT32, OURS_KEPT, TRL  # here: the others need no TRL

    colors = {name: GREEN if name.startswith("Liger") else GRAY for found in measured.values() for name in found}
    colors |= {name: BLUE for name in colors if name.startswith("ours")} | {TRL: ORANGE}
    figure, panes = plt.subplots(1, len(measured), figsize=(11, 3.8), squeeze=False, layout="constrained")
    messages = []
    for axes, (part, found) in zip(panes[0], measured.items(), strict=True):
        order = sorted(found, key=lambda name: found[name]["peak_gib"], reverse=True)
        bars = axes.barh(order, [found[name]["peak_gib"] for name in order], color=[colors[name] for name in order])
        texts = [f"{found[name]['peak_gib']:.3g} GiB, {found[name]['time'].median / 1e3:.3g} ms" for name in order]
        axes.bar_label(bars, texts, fontsize=9, padding=3)
        axes.set(xlabel="extra peak memory, GiB", title=part)
        axes.set_xlim(0, 1.6 * max(one["peak_gib"] for one in found.values()))
        if ours in found and FULL in found:
            full = found[FULL]["peak_gib"]
            named = (ours, OURS_KEPT, OURS_FLOAT32, TRL) if part == "head only" else (ours, TRL)
            shares = (f"{name} {found[name]['peak_gib'] / full:.0%}" for name in named if name in found)
            messages.append(f"{part}: {'; '.join(shares)}")
    message = f"Share of full logits' memory, {'. '.join(messages)}" if messages else "GRPO's memory"
    figure.suptitle(f"{message}\n{where}", fontsize=10)
    return figure
