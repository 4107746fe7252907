"""Shares before and after a training run as a figure."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.tool_calling.evaluate import AFTER_AN_ERROR, HELD_OUT, Share

BARS = {  # by the name of a share
    "parse rate": "parse rate",
    "exact call": "exact call",
    "final answer": "final answer",
    "abstention": "abstention",
    HELD_OUT: "exact call,\nheld-out tool",
    "exact call, untrained error": "exact call,\nuntrained error",
    AFTER_AN_ERROR: "mended,\nafter an error",
}


def tool_calling_figure(report: Mapping[str, Mapping[str, Share]], of_what: str, path: str | Path) -> None:
    """Draw the shares of "before" and "after" with their intervals. The numbers of questions may differ.

    Args:
        report: From each of both names to what `evaluate` counts.
        of_what: The model, its weights, the batch and the hardware, for the title.
        path: Of the PNG.
    """
    import matplotlib.pyplot as plt

    shown = [name for name in BARS if all(name in report[when] for when in ("before", "after"))]
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for row, (when, colour) in enumerate({"before": "tab:grey", "after": "tab:green"}.items()):
        shares = [report[when][name] for name in shown]
        places = [n + 0.38 * (row - 0.5) for n in range(len(shown))]
        axes.bar(places, [share.value for share in shares], 0.36, color=colour, label=when)
        for place, share in zip(places, shares, strict=True):
            low, high = share.interval
            axes.vlines(place, low, high, color="black")
    counts = [[report[when][name].count for when in ("before", "after")] for name in shown]
    labels = [f"{BARS[name]}\nn = {old}, {new}" for name, (old, new) in zip(shown, counts, strict=True)]
    axes.set_xticks(range(len(shown)), labels)
    axes.set_xlabel("n: questions before, after")
    axes.set(
        ylim=(0, 1.2),
        yticks=[0, 0.2, 0.4, 0.6, 0.8, 1],
        ylabel="share of held-out questions\n(lines: Wilson's 95 % intervals)",
    )
    before, after = (report[when]["exact call"] for when in ("before", "after"))
    change = "rise" if after.value > before.value else "change"
    shares = f"from {before.value:.0%} (of {before.count}) to {after.value:.0%} (of {after.count})"
    title = f"Exact calls {change} {shares} on held-out questions with known tools"
    axes.set_title(f"{title}\n{of_what}", fontsize=10)
    axes.legend(loc="upper left", ncol=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
