"""A confusion matrix as a figure."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.classification.training import Run


def confusion_figure(run: Run, labels: Sequence[str], of_what: str, path: str | Path) -> None:
    """Draw what was predicted for the texts of each class: shares of a row in colour, numbers of texts in the cells.

    Args:
        run: With predicted and expected labels.
        labels: The names, in the order of the logits.
        of_what: The model, its weights and the hardware, for the title.
        path: Of the PNG.
    """
    import matplotlib.pyplot as plt
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(run.expected, run.predicted, labels=range(len(labels)))  # [expected, predicted]
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, axes = plt.subplots(figsize=(7.5, 6.5), layout="constrained")
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted package", ylabel="package of the docstring")
    accuracy, macro_f1, count = run.score.accuracy, run.score.macro_f1, len(run.expected)
    axes.set_title(f"{count} docstrings: accuracy {accuracy:.3f}, macro-F1 {macro_f1:.3f}\n{of_what}", fontsize=10)
    figure.colorbar(image, ax=axes, label="share of the package's docstrings", shrink=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
