"""Size and error of the types of GGUF files, as a figure."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gguf.round_trip import Exported  # which needs the packages of the export


def types_figure(found: Mapping[str, "Exported"], where: str):
    """Draw the error of each type over the size of its file.

    Args:
        found: By type, "f32" and "q8_0" among them.
        where: Model, weights, hardware and date.

    Returns:
        The figure, of matplotlib's pyplot. Its title has the errors of q8_0 and of the smallest type.
    """
    import matplotlib.pyplot as plt

    places = {_label(name, one): (one.size / 2**20, one.mean_error) for name, one in found.items()}
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(*zip(*places.values(), strict=True), "o", color="tab:blue")
    largest = max(size for size, _ in places.values())
    for row, (name, place) in enumerate(sorted(places.items(), key=lambda one: one[1])):
        up = 1 if row % 2 == 0 else -1  # neighbours on different sides
        right = 1 if place[0] < largest / 2 else -1  # a label of a large file would leave the figure on the right
        side = {"ha": "left" if right > 0 else "right", "va": "bottom" if up > 0 else "top"}
        axes.annotate(name, place, (6 * right, 4 * up), textcoords="offset points", **side)
    axes.set(xscale="log", yscale="log", xlabel="size of the file (MiB)")
    axes.set_ylabel("mean error of\nlog-probabilities (nats)")
    share, error = found["q8_0"].size / found["f32"].size, found["q8_0"].mean_error
    title = f"The error is {error:.2g} nats with q8_0, at {share:.0%} of f32's size"
    smallest = min(found, key=lambda name: found[name].size)
    figure.suptitle(f"{title}, and {found[smallest].mean_error:.2g} nats with {smallest}\n{where}", fontsize=10)
    axes.set_xticks([100, 200, 500], labels=["100", "200", "500"])
    axes.minorticks_off()
    axes.margins(0.12)
    return figure


def _label(name: str, one: "Exported") -> str:
    """The type. Rows of 576, which the blocks of 256 do not divide, have another one."""
    return name + " (576 columns: mostly blocks of 32)" * ("rows of 576" in " ".join(one.warnings))
