"""Training and test share no wording, word, city or number pair, and every wanted call is right."""

import json
import re

import pytest

from benchmarks.tool_calling import data, wordings
from benchmarks.tool_calling.tools import HELD_OUT, PRICES
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.tool_calling.tokens import tokenize_conversation

TRAIN, TEST = data.training_questions(1000), data.test_questions()


def test_enough_tools_and_questions():
    assert len(data.TRAINED) >= 8 and HELD_OUT not in data.TRAINED
    assert len(TEST) >= 200 and sum(not question.turns for question in TEST) >= 60
    assert {len(question.offered) for question in TRAIN + TEST} == {3, 4}
    assert {question.kind for question in TRAIN} == {*data.KINDS}
    assert {question.kind for question in TEST} == {*data.KINDS, "held-out tool"}


def test_what_a_question_needs_is_on_offer_or_not_as_its_kind_says():
    for question in TRAIN + TEST:
        assert len(set(question.offered)) == len(question.offered)
        wanted = {name for turn in question.turns for name, _ in turn}
        assert wanted <= {*question.offered}
        assert bool(wanted) == (question.kind not in ("needs none", "none fits"))
    for question in TEST:
        if question.kind == "none fits":
            (fits,) = _fitting(question.text)
            assert fits not in question.offered


def _fitting(text):
    """The tools whose wordings the text has."""
    patterns = {
        name: [re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(asked)) for asked in each]
        for name, each in wordings.TEST.items()
    }
    return [name for name, each in patterns.items() if any(re.fullmatch(one, text) for one in each)]


def test_the_held_out_tool_is_never_seen_in_training():
    assert all(HELD_OUT not in question.offered for question in TRAIN)
    assert all(HELD_OUT in question.offered for question in TEST if question.kind == "held-out tool")


def test_wordings_and_arguments_are_apart():
    assert not {question.text for question in TRAIN} & {question.text for question in TEST}
    for name, asked in wordings.TRAIN.items():
        assert not {*asked} & {*wordings.TEST[name]}
    assert not {*wordings.CHAT_TRAIN} & {*wordings.CHAT_TEST}
    train, test = _arguments(TRAIN), _arguments(TEST)
    assert not train & test and len(test) > 100


def _arguments(questions):
    """All arguments; of those in which a letter or a unit repeats, the word or the number."""
    found = set()
    for question in questions:
        for turn in question.turns:
            for name, given in turn:
                kept = {k: v for k, v in given.items() if k not in ("letter", "source", "target")}
                values = kept.values() if name in ("count_letter", "reverse_text") else [json.dumps(kept)]
                found |= {(name if name == "convert_length" else "", value) for value in values}
    return found


@pytest.mark.parametrize(
    "name, arguments, result",
    [
        ("add", {"a": 3, "b": 4}, "7"),
        ("subtract", {"minuend": 3, "subtrahend": 4}, "-1"),
        ("divide", {"dividend": 17, "divisor": 5}, "3 remainder 2"),
        ("divide", {"dividend": 17, "divisor": 0}, "error: divide: divisor must not be 0"),
        ("power", {"base": 2, "exponent": 10}, "1024"),
        ("power", {"base": 2, "exponent": 10**9}, "error: power: exponent must be 0 to 20, got 1000000000"),
        ("convert_length", {"value": 3, "source": "km", "target": "m"}, "3000.0"),
        ("reverse_text", {"text": "abc"}, "cba"),
        ("count_letter", {"word": "banana", "letter": "a"}, "3"),
        ("find_price", {"item": "clock"}, str(PRICES["clock"])),
        ("find_price", {"item": "clocks"}, "error: find_price: item is not in the list, got clocks; use clock"),
        ("travel_time", {"origin": "Rome", "destination": "Oslo"}, "6 hours"),
    ],
)
def test_tools(name, arguments, result):
    assert data.all_tools().call(name, arguments).content == result


def test_wanted_results_are_the_toolboxes():
    for question in TEST[::29]:
        if question.turns:
            results = [data.all_tools().call(*call).content for turn in question.turns for call in turn]
            assert data.expected_results(question) == [r for r in results if not r.startswith("error: ")]


def test_confusable_arguments_matter():
    box = data.all_tools()
    for name, first, second in (("subtract", "minuend", "subtrahend"), ("travel_time", "origin", "destination")):
        given = {first: 3, second: 8} if name == "subtract" else {first: "Rome", second: "Oslo"}
        swapped = dict(zip(given, reversed(given.values()), strict=True))
        assert box.call(name, given).content != box.call(name, swapped).content


def test_conversations_tokenise_and_end_with_the_result():
    kinds = {}
    for question, (messages, offered) in zip(data.training_questions(60), data.training_conversations(60), strict=True):
        tokenize_conversation(tokenizer(), messages, data.all_tools().subset(offered))
        kinds[question.kind] = messages
        for result in data.expected_results(question) if question.turns else ():
            assert result in messages[-1]["content"] and messages[-2]["role"] == "tool"
    for messages, offered in data.training_conversations(60, calls_per_turn=1):
        tokenize_conversation(tokenizer("llama3.2"), messages, data.all_tools().subset(offered), format="llama3.2")
    mended = [message["content"] for message in kinds["mended"] if message["role"] == "tool"]
    assert mended[0].startswith("error: find_price: ") and not mended[1].startswith("error: ")
    assert len(kinds["two calls"][2]["tool_calls"]) == 2
    assert len(kinds["needs none"]) == len(kinds["none fits"]) == 3
