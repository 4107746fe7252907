"""The figures of challenge B: every run, difference, limit and part is where it belongs."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.fsdp2.figure import LANES, LEAST, loss_figure, stream_figure, timeline_figure
from unsloth_puzzles.fsdp2.stream import Layout


def test_losses_above_and_differences_below():
    losses = {"one": [3.0, 2.0, 1.0], "two": [3.0, 2.5, 1.0]}
    differences = {"one, regrouped": [1e-3, 2e-3, 1e-3], "two": [0.0, 0.5, 0.0]}
    figure = loss_figure(losses, differences, 4e-3, "Three steps")
    upper, lower = figure.axes
    above = {line.get_label(): line for line in upper.lines}
    below = {line.get_label(): line for line in lower.lines}
    assert {name: list(line.get_ydata()) for name, line in above.items()} == losses
    assert list(above["two"].get_xdata()) == [1, 2, 3] and figure.get_suptitle() == "Three steps"
    assert list(below) == [*differences, "limit"]
    assert list(below["two"].get_ydata()) == [LEAST, 0.5, LEAST] and list(below["two"].get_xdata()) == [1, 2, 3]
    assert list(below["one, regrouped"].get_ydata()) == differences["one, regrouped"]
    assert set(below["limit"].get_ydata()) == {4e-3} and lower.get_yscale() == "log"
    assert above["two"].get_color() == below["two"].get_color() != above["one"].get_color()
    assert "one" in lower.get_ylabel()
    assert [one.get_text() for one in upper.texts] == list(losses)
    assert [one.get_text() for one in lower.texts] == [*differences, "limit 4.0e-03"]
    plt.close("all")


@pytest.mark.parametrize("limit", [0.0, 1e-5])
def test_the_axis_holds_a_limit_of_any_size(limit):
    _, lower = loss_figure({"one": [1.0]}, {"two": [0.0]}, limit, "").axes
    bottom, top = lower.get_ylim()
    assert 0 < bottom < LEAST < top and limit < top
    plt.close("all")


def test_parts_of_a_stream_have_names_and_ranks_a_border():
    layout = Layout((1024, 4096), 64, 256, 2)
    whole, end = stream_figure(layout, "k_proj").axes
    assert {one.get_text() for one in (*whole.texts, *end.texts)} == {
        "packed 4-bit indices", "absmax", "absmax2", "rank 0", "rank 1"
    }  # fmt: skip
    assert list(whole.lines[0].get_xdata()) == [layout.size / 2048] * 2 and not end.lines
    assert whole.get_xlim() == (0, layout.size / 1024) and end.get_xlim()[1] == layout.size / 1024
    plt.close("all")


def test_timeline_has_a_row_a_lane():
    (axes,) = timeline_figure([("all-gather", 1e3, 2e3), ("compute", 4e3, 1e3)], "One step").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LANES)
    (gather,) = axes.collections[0].get_paths()
    assert gather.get_extents().intervalx.tolist() == [1, 3]
    assert [len(row.get_paths()) for row in axes.collections] == [1, 0, 0, 1]
    plt.close("all")
