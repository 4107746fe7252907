"""The work of vision towers over the share of text rows, as a figure."""

from collections.abc import Mapping, Sequence

STYLES = {"blank images": ("s--", "tab:orange"), "ours": ("o-", "tab:blue"), "floor": (":", "black")}
NAMES = {"blank images": "a blank image per text row", "ours": "VisionCollator", "floor": "each image alone"}


def tower_figure(works: Mapping[str, Mapping[str, Sequence[float]]], where: str):
    """Draw a pane for each model.

    Args:
        works: By model, what `work_by_share` returns.
        where: Models, weights, hardware and date.

    Returns:
        The figure, of matplotlib's pyplot. Its title says how much is saved where half of the rows are text.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(works), figsize=(9, 3.2), sharey=True, layout="constrained", squeeze=False)
    highest = max(max(values) for work in works.values() for values in work.values())
    for pane, (model, work) in zip(axes[0], works.items(), strict=True):
        for kind, values in work.items():
            style, color = STYLES[kind]
            shares = [100 * texts / (len(values) - 1) for texts in range(len(values))]
            pane.plot(shares, values, style, color=color, label=NAMES[kind])
        pane.set(title=model, xlabel="text rows in the batch (%)", ylim=(0, 1.1 * highest))
        pane.text(98, 0.93 * work["blank images"][-1], NAMES["blank images"], color="tab:orange", ha="right", va="top")
        pane.text(3, 0.3 * highest, f"{NAMES['ours']}\n(dotted: {NAMES['floor']})", color="tab:blue")
    axes[0][0].set_ylabel("FLOPs of the tower\n(one image = 1)")
    saved = ", ".join(f"{_saved(work):.0%} ({model})" for model, work in works.items())
    title = f"With half of the rows text, VisionCollator saves {saved} of the tower's FLOPs"
    figure.suptitle(f"{title}\n{where}", fontsize=10)
    return figure


def _saved(work: Mapping[str, Sequence[float]]) -> float:
    half = len(work["ours"]) // 2
    return 1 - work["ours"][half] / work["blank images"][half]
