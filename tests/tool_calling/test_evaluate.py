"""The metrics count what they say, on conversations written by hand."""

import pytest

from benchmarks.tool_calling.data import Question, for_format
from benchmarks.tool_calling.evaluate import (
    AFTER_AN_ERROR,
    HELD_OUT,
    METRICS,
    Share,
    check_training,
    count,
    judge_calls,
    table,
    wrong,
)
from unsloth_puzzles.tool_calling.conversation import Conversation
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.toolbox import Result, failure

OFFERED = ("add", "subtract", "find_price")
ADD = Question("one call", "3 + 4?", OFFERED, ((("add", {"a": 3, "b": 4}),),))
TWO = Question("two calls", "both", OFFERED, ((("add", {"a": 3, "b": 4}), ("find_price", {"item": "clock"})),))
MENDED = Question(
    "mended", "clocks", OFFERED, ((("find_price", {"item": "clocks"}),), (("find_price", {"item": "clock"}),))
)
CHAT = Question("needs none", "Hi", OFFERED)
TRAIN = Question(
    "untrained error",
    "rome",
    ("travel_time", *OFFERED),
    (
        (("travel_time", {"origin": "rome", "destination": "Oslo"}),),
        (("travel_time", {"origin": "Rome", "destination": "Oslo"}),),
    ),
)
WEATHER = Question("held-out tool", "?", ("weather", *OFFERED), ((("weather", {"city": "Oslo"}),),))


def made(*turns, answer=None):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer or ""}]
    turns = [
        [(Call(n, a) if n else None, Result(n or "unknown", r, r.startswith("error: "))) for n, a, r in turn]
        for turn in turns
    ]
    return Conversation(messages, turns, "answer" if answer else "max_turns")


RIGHT = ("add", {"b": 4, "a": 3}, "7")
PRICE = ("find_price", {"item": "clock"}, "55")
FAILED = ("find_price", {"item": "clocks"}, "error: use clock")
NAMES = ("parse rate", "exact call", "executed result", "final answer")


@pytest.mark.parametrize(
    "question, conversation, expected",
    [
        (ADD, made([RIGHT], answer="It is 7."), (1, 1, 1, 1)),
        (ADD, made([RIGHT], answer="It is 8."), (1, 1, 1, 0)),
        (ADD, made([RIGHT]), (1, 1, 1, 0)),
        (ADD, made([("add", {"a": 4, "b": 3}, "7")], answer="7"), (1, 0, 1, 1)),
        (ADD, made([("add", {"a": 3.0, "b": 4}, "7")], answer="7"), (1, 0, 1, 1)),
        (ADD, made([RIGHT], [RIGHT], answer="7"), (1, 0, 0, 1)),
        (ADD, made([(None, None, "error: ")], [RIGHT], answer="7"), (0, 0, 1, 1)),
        (ADD, made(answer="7"), (0, 0, 0, 1)),
        (TWO, made([RIGHT, PRICE], answer="7 and 55"), (1, 1, 1, 1)),
        (TWO, made([RIGHT, PRICE], answer="7"), (1, 1, 1, 0)),
        (TWO, made([RIGHT], answer="7"), (1, 0, 0, 0)),
        (TWO, made([RIGHT], [PRICE], answer="7 and 55"), (1, 0, 1, 1)),
        (*for_format([TWO], 1), made([RIGHT], [PRICE], answer="7 and 55"), (1, 1, 1, 1)),
        (MENDED, made([FAILED], [PRICE], answer="55"), (1, 1, 1, 1)),
        (MENDED, made([PRICE], answer="55"), (1, 1, 1, 1)),
        (MENDED, made([FAILED], answer="55"), (1, 0, 0, 1)),
        (MENDED, made([FAILED], [FAILED], [PRICE], answer="55"), (1, 0, 1, 1)),
    ],
)
def test_calls_are_judged(question, conversation, expected):
    assert judge_calls(question, conversation) == dict(zip(NAMES, map(bool, expected), strict=True))


def test_wrong_calls_are_listed_with_their_question():
    swapped = made([("add", {"a": 4, "b": 3}, "7")], answer="7")
    unread = Conversation([], [[(None, failure("unknown", "no JSON"))]], "max_turns")
    found = wrong([ADD, ADD, CHAT, CHAT], [made([RIGHT], answer="7"), swapped, made(answer="Hi"), unread])
    assert found == ["one call: '3 + 4?': [[('add', {'a': 4, 'b': 3})]]", "needs none: 'Hi': [[None]]"]


def test_shares_are_counted_by_kind():
    unread = Conversation([], [[(None, failure("unknown", "no JSON"))]], "max_turns")
    weather = made([("weather", {"city": "Oslo"}, "sunny")], answer="sunny")
    report = count(
        [ADD, TWO, CHAT, CHAT, CHAT, WEATHER],
        [made([RIGHT], answer="7"), made(answer="No."), made(answer="Hi."), made([RIGHT]), unread, weather],
    )
    assert report == {
        **dict.fromkeys(("parse rate", "exact call", "executed result", "final answer"), Share(1, 2)),
        "exact call, one call": Share(1, 1),
        "exact call, two calls": Share(0, 1),
        "exact call, held-out tool": Share(1, 1),
        "abstention": Share(1, 3),
        "abstention, needs none": Share(1, 3),
    }
    assert "| exact call | 1 of 2 (0.09 to 0.91) |" in table({"after": report})


LOWER = ("travel_time", {"origin": "rome", "destination": "Oslo"}, "error: use Rome")
UPPER = ("travel_time", {"origin": "Rome", "destination": "Oslo"}, "6 hours")


@pytest.mark.parametrize(
    "question, conversation, expected",
    [
        (MENDED, made([PRICE], answer="55"), None),  # no call failed
        (MENDED, made(answer="55"), None),
        (MENDED, made([FAILED], [PRICE], answer="55"), Share(1, 1)),
        (MENDED, made([FAILED], [PRICE], answer="44"), Share(1, 1)),
        (MENDED, made([FAILED], [FAILED], answer="55"), Share(0, 1)),
        (MENDED, made([FAILED], answer="55"), Share(0, 1)),
        (ADD, made([(None, None, "error: no JSON")], [RIGHT], answer="7"), Share(1, 1)),
        (ADD, made([RIGHT], [(None, None, "error: no JSON")], answer="7"), Share(0, 1)),
        (ADD, made([("add", {"a": 3}, "error: b")], [("add", {"a": 4, "b": 3}, "7")], answer="7"), Share(0, 1)),
        (TWO, made([RIGHT, FAILED], [PRICE], answer="7 and 55"), Share(1, 1)),
        (TRAIN, made([LOWER], [UPPER], answer="6 hours"), Share(1, 1)),
        (WEATHER, made([("weather", {}, "error: city")], [("weather", {"city": "Oslo"}, "sunny")]), Share(1, 1)),
        (CHAT, made([FAILED], [PRICE]), None),
    ],
)
def test_mended_questions_are_counted_after_an_error(question, conversation, expected):
    assert count([question], [conversation]).get(AFTER_AN_ERROR) == expected


def test_an_untrained_error_has_a_row_of_its_own():
    report = count([ADD, TRAIN, TRAIN], [made([RIGHT], answer="7"), made([UPPER], answer="6 hours"), made([LOWER])])
    assert report["exact call"] == Share(1, 1) and report["exact call, untrained error"] == Share(1, 2)
    assert report[AFTER_AN_ERROR] == Share(0, 1)


def test_wilson_interval():
    """Against the closed values for 0, all and half of ten."""
    assert Share(0, 10).interval == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert Share(10, 10).interval == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert Share(5, 10).interval == pytest.approx((0.23659, 0.76341), abs=1e-5)


@pytest.mark.parametrize(
    "metric, share, failing",
    [
        ("abstention", Share(64, 80), []),
        ("abstention", Share(63, 80), ["abstention: at least 0.8"]),
        ("parse rate", Share(21, 140), ["parse rate: interval above that before"]),  # better, but by chance
        ("exact call", Share(97, 140), ["exact call: at least 0.7"]),
        (HELD_OUT, Share(16, 40), []),
        (HELD_OUT, Share(15, 40), ["exact call, held-out tool: at least 0.4"]),
    ],
)
def test_training_must_improve_by_more_than_the_intervals(metric, share, failing):
    before = {name: Share(14, 140) for name in METRICS} | {"abstention": Share(80, 80)}
    after = {name: Share(110, 140) for name in (*METRICS, HELD_OUT)} | {"abstention": Share(67, 80), metric: share}
    assert [name for name, good in check_training(before, after).items() if not good] == failing


def test_figure_draws_each_share_with_its_interval(tmp_path, monkeypatch):
    from matplotlib import pyplot

    from benchmarks.tool_calling.figure import BARS, tool_calling_figure

    monkeypatch.setattr(pyplot, "close", lambda _: None)
    names = [name for name in BARS if name != AFTER_AN_ERROR]  # nothing failed before
    report = {"before": dict.fromkeys(names, Share(0, 9)), "after": dict.fromkeys(BARS, Share(6, 8))}
    tool_calling_figure(report, "a model, a machine", tmp_path / "figure.png")
    axes = pyplot.gca()
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert [bar.get_height() for bar in axes.patches] == [0.0] * len(names) + [0.75] * len(names)
    intervals = [tuple(lines.get_segments()[0][:, 1]) for lines in axes.collections]
    assert intervals == [pytest.approx(Share(*hits).interval) for hits in ((0, 9), (6, 8)) for _ in names]
    said = "Exact calls rise from 0% (of 9) to 75% (of 8) on held-out questions with known tools\n"
    assert axes.get_title().startswith(said)
    assert "a model, a machine" in axes.get_title()
    assert axes.get_xticklabels()[0].get_text() == f"{METRICS[0]}\nn = 9, 8"
    pyplot.close("all")
