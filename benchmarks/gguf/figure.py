"""Size and error of the types of GGUF files, as a figure."""

from collections.abc import Mapping


def types_figure(found: Mapping[str, tuple[float, float]], title: str):
    """Draw the error of each type over the size of its file.

    Args:
        found: By type: the size in MiB, and the mean error of log-probabilities in nats.
        title: Two lines.

    Returns:
        The figure, of matplotlib's pyplot.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    axes.plot(*zip(*found.values(), strict=True), "o", color="tab:blue")
    for row, (name, place) in enumerate(sorted(found.items(), key=lambda one: one[1])):
        above = row % 2 == 0  # neighbours on different sides
        offset, side = ((6, 4), ("left", "bottom")) if above else ((-6, -4), ("right", "top"))
        axes.annotate(name, place, offset, textcoords="offset points", ha=side[0], va=side[1])
    axes.set(xscale="log", yscale="log", xlabel="size of the file (MiB)")
    axes.set_ylabel("mean error of\nlog-probabilities (nats)")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([100, 200, 500], labels=["100", "200", "500"])
    axes.minorticks_off()
    axes.margins(0.12)
    return figure
