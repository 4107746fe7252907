"""The figure of losses: every run, every difference, and the limit are where they belong."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.fsdp2.figure import LEAST, loss_figure


def test_losses_above_and_differences_below():
    losses = {"one": [3.0, 2.0, 1.0], "two": [3.0, 2.5, 1.0]}
    differences = {"one, regrouped": [1e-3, 2e-3, 1e-3], "two": [0.0, 0.5, 0.0]}
    upper, lower = loss_figure(losses, differences, 4e-3, "Three steps").axes
    above = {line.get_label(): line for line in upper.lines}
    below = {line.get_label(): line for line in lower.lines}
    assert {name: list(line.get_ydata()) for name, line in above.items()} == losses
    assert list(above["two"].get_xdata()) == [1, 2, 3] and upper.get_title() == "Three steps"
    assert list(below) == [*differences, "limit, 4.0e-03"]
    assert list(below["two"].get_ydata()) == [LEAST, 0.5, LEAST] and list(below["two"].get_xdata()) == [1, 2, 3]
    assert list(below["one, regrouped"].get_ydata()) == differences["one, regrouped"]
    assert set(below["limit, 4.0e-03"].get_ydata()) == {4e-3} and lower.get_yscale() == "log"
    assert above["two"].get_color() == below["two"].get_color() != above["one"].get_color()
    assert "one" in lower.get_ylabel()
    plt.close("all")


@pytest.mark.parametrize("limit", [0.0, 1e-5])
def test_the_axis_holds_a_limit_of_any_size(limit):
    _, lower = loss_figure({"one": [1.0]}, {"two": [0.0]}, limit, "").axes
    bottom, top = lower.get_ylim()
    assert 0 < bottom < LEAST < top and limit < top
    plt.close("all")
