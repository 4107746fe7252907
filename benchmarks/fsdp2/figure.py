"""Losses of runs that should agree, and by how much they differ."""

from collections.abc import Mapping, Sequence

LEAST = 1e-8  # what a difference of 0 is drawn at
STYLES = (("tab:green", 3), ("tab:blue", 1), ("tab:gray", 1))  # the first is seen behind the second


def loss_figure(
    losses: Mapping[str, Sequence[float]], differences: Mapping[str, Sequence[float]], limit: float, title: str
):
    """Draw the losses over the steps, and below them the differences, logarithmically.

    Args:
        losses: Of each run; the first is the one that the others are compared with.
        differences: Of other runs' losses from that one's, at most three.
        limit: What is allowed of a difference.
        title: What runs, and where.

    Returns:
        The figure, of matplotlib's pyplot.
    """
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 2), layout="constrained")
    reference, *_ = losses
    styles = {reference: ("tab:orange", 5), **dict(zip(differences, STYLES, strict=False))}
    for name, values in losses.items():
        color, width = styles[name]
        upper.plot(range(1, len(values) + 1), values, color=color, linewidth=width, label=name)
    for name, gaps in differences.items():
        color, width = styles[name]
        shown = [max(gap, LEAST) for gap in gaps]
        style = {"color": color, "linewidth": width, "markersize": 2 * width}
        lower.semilogy(range(1, len(gaps) + 1), shown, "o-", label=name, **style)
    lower.axhline(limit, color="tab:red", linestyle=":", label=f"limit, {limit:.1e}")
    lower.set_ylim(LEAST / 2, max(30 * limit, 10 * LEAST))  # room for the legend
    upper.set_ylabel("loss, nats a token")
    lower.set(xlabel="step", ylabel=f"difference from\n{reference},\nnats a token\n(0 drawn at {LEAST:.0e})")
    upper.set_title(title, fontsize=9)
    upper.legend(fontsize=8)
    lower.legend(fontsize=8, loc="upper right", ncols=4)
    return figure
