"""The figures of challenge B: the parts of a byte stream, losses that should agree, and the timeline of a step."""

from collections.abc import Mapping, Sequence

from unsloth_puzzles.fsdp2.stream import Layout

LEAST = 1e-8  # what a difference of 0 is drawn at
REFERENCE = "tab:orange"
STYLES = (("tab:green", 7), ("tab:blue", 3.5))  # colours, and sizes of markers: the first is seen behind the second
LANES = {"all-gather": "tab:orange", "reduce-scatter": "tab:green", "copies": "tab:gray", "compute": "tab:blue"}


def stream_figure(layout: Layout, weight: str):
    """Draw where the parts of a stream lie, whole and, enlarged, its end, with the border between two ranks.

    Args:
        layout: Of a weight over two ranks.
        weight: Its name, for the title.

    Returns:
        The figure, of matplotlib's pyplot.
    """
    import matplotlib.pyplot as plt

    parts = (
        ("packed 4-bit indices", 0, layout.packed_bytes, "tab:blue"),
        ("absmax", layout.absmax_start, layout.blocks, "tab:orange"),
        ("absmax2", layout.absmax2_start, 4 * layout.blocks2, "tab:green"),
    )
    begin = layout.absmax_start - layout.size // 64  # of what is enlarged
    border = layout.size // layout.world_size
    figure, panes = plt.subplots(2, 1, figsize=(9, 3), layout="constrained")
    for axes, start in zip(panes, (0, begin), strict=True):
        for name, left, size, color in parts:
            axes.barh(0, size / 1024, left=left / 1024, color=color)
            shown = max(left, start), left + size
            middle = sum(shown) / 2 if start else border / 2  # whole: clear of the border
            if size / (layout.size - start) > 0.1:
                axes.text(middle / 1024, 0, name, ha="center", va="center", color="white", weight="bold")
            elif start:
                axes.text(layout.size / 1024 - 0.6, 0.55, name, ha="right", color=color, weight="bold")
            elif size / layout.size > 0.01:  # whole: too narrow for a name inside
                axes.text((left + size / 2) / 1024, 0.55, name, ha="right", color=color, weight="bold")
        axes.set(xlim=(start / 1024, layout.size / 1024), ylim=(-0.5, 1), yticks=[])
    panes[0].axvline(border / 1024, color="black", linewidth=2)
    for rank in (0, 1):
        panes[0].text((rank + 0.5) * border / 1024, 0.6, f"rank {rank}", ha="center")
    panes[1].set_xlabel(f"KiB from the start of the stream; below: the last {1 - begin / layout.size:.1%}, enlarged")
    shape = " x ".join(map(str, layout.shape))
    title = "Each rank holds the same number of bytes; part boundaries need not align with ranks"
    figure.suptitle(f"{title}\n{weight}, {shape}: {border:,} bytes per rank", fontsize=10)
    return figure


def loss_figure(
    losses: Mapping[str, Sequence[float]], differences: Mapping[str, Sequence[float]], limit: float, title: str
):
    """Draw the losses over the steps, and below them the differences, logarithmically.

    Args:
        losses: Of each run; the first is the one that the others are compared with.
        differences: Of other runs' losses from that one's, at most two.
        limit: What is allowed of a difference.
        title: The message, what runs, and where, in lines.

    Returns:
        The figure, of matplotlib's pyplot.
    """
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    reference, *_ = losses
    styles = dict(zip(differences, STYLES, strict=False))
    for number, (name, values) in enumerate(losses.items()):
        color, width = (REFERENCE, 6) if name == reference else (styles[name][0], styles[name][1] / 2)
        upper.plot(range(1, len(values) + 1), values, color=color, linewidth=width, label=name)
        upper.text(0.98, 0.9 - 0.1 * number, name, color=color, weight="bold", ha="right", transform=upper.transAxes)
    for number, (name, gaps) in enumerate(differences.items()):
        color, size = styles[name]
        shown = [max(gap, LEAST) for gap in gaps]
        lower.semilogy(range(1, len(gaps) + 1), shown, "o", color=color, markersize=size, label=name)
        lower.text(0.98 - 0.4 * number, 0.05, name, color=color, weight="bold", ha="right", transform=lower.transAxes)
    lower.axhline(limit, color="black", linestyle=":", label="limit")
    lower.text(1, 1.4 * max(limit, LEAST), f"limit {limit:.1e}", fontsize=9)
    lower.set_ylim(LEAST / 30, max(30 * limit, 10 * LEAST))  # room for the names
    upper.set_ylabel("loss (nats per token)")
    lower.set(xlabel=f"step; a difference of 0 is drawn at {LEAST:.0e}", ylabel=f"difference from\n{reference}")
    figure.suptitle(title, fontsize=10)
    return figure


def timeline_figure(events: Sequence[tuple[str, float, float]], title: str):
    """Draw what a GPU did in a step, a row for each of LANES, time to the right.

    Args:
        events: Lane, start and duration in us.
        title: Two lines.

    Returns:
        The figure, of matplotlib's pyplot.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    for row, (lane, color) in enumerate(LANES.items()):
        spans = [(start / 1e3, length / 1e3) for one, start, length in events if one == lane]
        axes.broken_barh(spans, (row - 0.4, 0.8), color=color)
    axes.set(yticks=range(len(LANES)), yticklabels=list(LANES), xlabel="ms from the first kernel of the step")
    axes.set_title(title, fontsize=10)
    return figure
