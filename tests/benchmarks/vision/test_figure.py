"""The figure of the towers' work."""

import matplotlib.pyplot as plt

from benchmarks.vision.figure import NAMES, tower_figure


def test_a_pane_a_model_with_every_line():
    work = {"ours": [2.0, 1.0, 0.0], "blank images": [2.0, 2.0, 2.0], "floor": [2.0, 1.0, 0.0]}
    figure = tower_figure({"A": work, "B": work}, "Work")
    one, two = figure.axes
    assert figure.get_suptitle().splitlines()[0].endswith("saves 50% (A), 50% (B) of the tower's FLOPs")
    for pane in (one, two):
        lines = {line.get_label(): line for line in pane.lines}
        assert set(lines) == set(NAMES.values())
        assert list(lines[NAMES["ours"]].get_xdata()) == [0, 50, 100]
        assert list(lines[NAMES["blank images"]].get_ydata()) == [2, 2, 2]
    assert (one.get_title(), two.get_title()) == ("A", "B")
    plt.close("all")
