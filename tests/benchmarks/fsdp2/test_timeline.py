"""How much of the gathers a step hides."""

import matplotlib.pyplot as plt
import pytest

from benchmarks.fsdp2.timeline import draw, hidden

EVENTS = [
    ("compute", 0.0, 10.0),
    ("compute", 5.0, 10.0),  # of another stream, at the same time
    ("compute", 30.0, 10.0),
    ("all-gather", 12.0, 6.0),  # 3 of 6 beside a product
    ("all-gather", 32.0, 2.0),  # all
    ("reduce-scatter", 50.0, 5.0),
]


def test_hidden_share():
    assert hidden(EVENTS) == pytest.approx(5 / 8)
    assert hidden(EVENTS, "reduce-scatter") == 0
    assert hidden(EVENTS[:3]) is None


def test_picture_has_a_row_a_lane():
    _, axes = plt.subplots()
    draw(axes, EVENTS)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all-gather", "reduce-scatter", "compute"]
    assert [len(bars.get_paths()) for bars in axes.collections] == [2, 1, 3]
    plt.close()
