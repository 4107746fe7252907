"""Challenge A's figures, each drawn from the records of a run: one message, labels at the lines, date and hardware."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from benchmarks.nf4.ablation import DEFAULT, VARIANTS
from benchmarks.nf4.baselines import THREE_LAUNCHES
from benchmarks.nf4.workload import bytes_per_weight
from unsloth_puzzles.bench.record import Measurements

OURS, OTHERS, GRAY = "tab:blue", "tab:orange", "gray"
FOLDER = Path("resources")


def bandwidth(results: Measurements, copy_bandwidth: float, where: str) -> plt.Figure:
    """Share of the copy bandwidth over the number of weights, from "sweep_device_us".

    Baselines within 2 % of the three launches at every size share a line with them.

    Args:
        results: The run's records.
        copy_bandwidth: Bytes a second.
        where: Hardware and date.
    """
    found = results.find("sweep_device_us")
    weights = [_numel(one["case"]) for one in found]
    lines = {"ours": [one["value"] for one in found]}
    lines |= {name: [one["baselines"][name] for one in found] for name in found[0]["baselines"]}
    three = lines[THREE_LAUNCHES]
    merged = [name for name, us in lines.items() if max(abs(a / b - 1) for a, b in zip(us, three, strict=True)) <= 0.02]
    shown = {"ours": lines["ours"], ", ".join(["three launches", *merged[1:]]): three}
    shown |= {name: us for name, us in lines.items() if name not in ("ours", *merged)}
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
    share = {}
    for (name, us), color in zip(shown.items(), (OURS, OTHERS, "tab:green", "tab:red"), strict=False):
        moved = [bytes_per_weight(torch.float16) * n for n in weights]
        share[name] = [100 * b / (1e-6 * t * copy_bandwidth) for b, t in zip(moved, us, strict=True)]
        axes.plot(weights, share[name], "o-", color=color)
        middle = len(weights) // 2
        axes.annotate(name, (weights[middle], share[name][middle] - 9), color=color, va="top", fontsize=10)
    axes.axhline(100, color=GRAY, linewidth=1)
    axes.annotate(f"copy bandwidth, {copy_bandwidth / 1e12:.2f} TB/s", (weights[0], 101), color=GRAY, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="weights in the matrix", ylabel="% of the copy bandwidth\n(2.516 bytes a weight)", ylim=(0, 112))
    best, other = (values[-1] for values in list(share.values())[:2])
    said = f"At $2^{{{weights[-1].bit_length() - 1}}}$ weights ours reaches {best:.0f} % of the copy bandwidth"
    axes.set_title(f"{said}, the three launches {other:.0f} %\nNF4 to fp16, random weights, {where}", fontsize=11)
    return _saved(figure, "a_nf4_bandwidth")


def speedup(results: Measurements, where: str) -> plt.Figure:
    """Speed-up over the three launches: device time by matrix, and the wall clock of the harness."""
    bars = {one["case"].replace(" ", "\n"): one for one in results.find("speedup_vs_unsloth_device")}
    of_device = len(bars)
    for one in results.find("official_harness_speedup", "all"):
        bars["harness\n(wall clock)"] = one
    heights = [one["value"] for one in bars.values()]
    below = [one["value"] - one["low"] for one in bars.values()]
    above = [one["high"] - one["value"] for one in bars.values()]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    colors = [OURS] * of_device + [OTHERS] * (len(bars) - of_device)
    drawn = axes.bar(list(bars), heights, 0.7, color=colors, yerr=[below, above], error_kw={"linewidth": 1})
    axes.bar_label(drawn, fmt="%.2fx")
    axes.axhline(1.15, color="black", linestyle="--", linewidth=1)
    axes.text(1.01, 1.15, "full marks:\n1.15x", transform=axes.get_yaxis_transform(), va="center")
    axes.set(ylabel="time of three launches / ours", ylim=(0, 1.2 * max(one["high"] for one in bars.values())))
    said = f"Speed-up over an imitation of Unsloth's three launches: {min(heights):.2f}x to {max(heights):.2f}x"
    axes.set_title(f"{said}\nGPU time of one call, and the puzzle's harness; random weights, {where}", fontsize=11)
    return _saved(figure, "a_nf4_speedup")


def contraction(exact: torch.Tensor, contracted: torch.Tensor, where: str) -> plt.Figure:
    """By how many float32 ulps, and where, weights change if the multiply-add is contracted."""
    ulps = (contracted.view(torch.int32) - exact.view(torch.int32)).flatten().cpu()
    blocks = (ulps.view(-1, 64) != 0).any(1).float()  # quantisation blocks
    slices = 100 * blocks[: len(blocks) // 8 * 8].view(8, -1).mean(1)
    values, counts = ulps[ulps != 0].unique(return_counts=True)
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    drawn = axes.bar(values.numpy(), 100 * counts.numpy() / len(ulps), color=OURS)
    axes.bar_label(drawn, fmt="%.2f %%")
    axes.set(xlabel="difference in float32 ulps", ylabel="% of the weights", xticks=values.tolist())
    axes.margins(y=0.2)
    share, most = 100 * counts.sum().item() / len(ulps), ulps.abs().max()
    spread = f"{slices.min():.1f} % to {slices.max():.1f} %\nof the blocks change\nin each eighth of\nthe matrix"
    axes.text(0, axes.get_ylim()[1] / 2, spread, ha="center", va="center")
    said = f"Contraction changes {share:.1f} % of the weights, by at most {most} ulps"
    axes.set_title(f"{said}\nfloat32, random weights, {where}", fontsize=11)
    return _saved(figure, "a_nf4_contraction")


def ablation(timings: Mapping[str, Mapping], where: str) -> plt.Figure:
    """Time of each variant over the default's.

    Args:
        timings: By shape what `ablation.measure` timed.
        where: Hardware and date.
    """
    names = list(next(iter(timings.values())))
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for (shape, found), color in zip(timings.items(), (OURS, OTHERS), strict=False):
        base = found[DEFAULT].median
        middles = [found[name].median / base for name in names]
        errors = [
            [(found[name].median - found[name].low) / base for name in names],
            [(found[name].high - found[name].median) / base for name in names],
        ]
        axes.errorbar(middles, range(len(names)), xerr=errors, fmt="o", color=color, label=f"{shape}, {base:.1f} us")
    axes.axvline(1, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(names)), [f"{group}, {name}" for group, name in names], fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="time / time of the default", xscale="log")
    ticks = [tick for tick in (1, 1.2, 1.5, 2, 3, 4, 6, 8) if tick <= 1.1 * axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    medians = [[found[name].median / found[DEFAULT].median for found in timings.values()] for name in names]
    values = axes.secondary_yaxis("right")
    values.set_yticks(range(len(names)), ["  ".join(f"{one:.2f}x" for one in each) for each in medians], fontsize=9)
    values.tick_params(length=0)
    columns = "   ".join(shape.split()[-1] for shape in timings)  # dtypes
    axes.annotate(columns, (1, 1), (6, 2), xycoords="axes fraction", textcoords="offset points", fontsize=9)
    axes.minorticks_off()
    axes.legend(loc="best", fontsize=9)
    exact = [name for name in names if name not in VARIANTS or not VARIANTS[name].fp_fusion]
    faster = [name for name in exact if any(found[name].high < found[DEFAULT].low for found in timings.values())]
    said = (
        "No exact variant is" if not faster else f"{len(faster)} exact variant{'s are' if len(faster) > 1 else ' is'}"
    )
    figure.suptitle(f"{said} faster than the default beyond the spread\nGPU time, random weights, {where}", fontsize=11)
    return _saved(figure, "a_nf4_ablation")


def linear(sweeps: Measurements, where: str) -> plt.Figure:
    """Device time of the linear layers of a block over the rows, ours and bitsandbytes, from the file of a sweep."""
    block = [one for one in sweeps.find("linear_us") if "block" in one["case"]]
    rows = [int(one["case"].split(", ")[-1].split()[0]) for one in block]
    lines = {"nf4_linear": [one["value"] for one in block]}
    lines["bitsandbytes"] = [one["baselines"]["bitsandbytes"] for one in block]
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for (name, us), color, above in zip(lines.items(), (OURS, OTHERS), (False, True), strict=True):
        axes.plot(rows, us, "o-", color=color)
        at = len(rows) // 2
        place = {"xytext": (0, 8 if above else -8), "textcoords": "offset points", "va": "bottom" if above else "top"}
        axes.annotate(name, (rows[at], us[at]), color=color, ha="center", **place)
    axes.set(xlabel="rows (tokens)", ylabel="GPU time, us", xscale="log", yscale="log")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.set_xticks([1, 4, 16, 64, 256, 1024, 4096], ["1", "4", "16", "64", "256", "1024", "4096"])
    axes.minorticks_off()
    first = next((found["value"] for found in sweeps.find("linear_crossover_rows") if "block" in found["case"]), None)
    said = "bitsandbytes is never slower" if first is None else f"From {first:.0f} rows on ours is not slower"
    dtype = block[0]["case"].split(", ")[0].split()[-1]
    conditions = f"{dtype}, no gradients, random weights, {where}"
    axes.set_title(f"{said}: linear layers of a Llama 3.2 1B block\n{conditions}", fontsize=11)
    return _saved(figure, "a_nf4_linear")


def _numel(case: str) -> int:
    rows, columns = case.split()[0].split("x")
    return int(rows) * int(columns)


def _saved(figure: plt.Figure, name: str) -> plt.Figure:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
    return figure
