"""Training and test share no wording, word, city or number pair, and every wanted call is right."""

import re
from dataclasses import replace

import pytest

from benchmarks.tool_calling import data, vocabulary, wordings
from benchmarks.tool_calling.aliases import ALIASES
from benchmarks.tool_calling.lookups import ARGUMENTS, LOOKUPS
from benchmarks.tool_calling.tools import HELD_OUT
from benchmarks.tool_calling.train import BATCH_SIZE, QUESTIONS, STEPS
from benchmarks.tool_calling.training_tools import TRAINING_TOOLS
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.tool_calling.tokens import tokenize_conversation

TRAIN, TEST = data.training_questions(1000), data.test_questions()
DIALOGUES = data.training_dialogues(STEPS * BATCH_SIZE, length=QUESTIONS)  # that the notebook trains on


def test_enough_tools_and_questions():
    assert len(data.TRAINED) >= 8 and HELD_OUT not in data.TRAINED
    assert len(TEST) >= 200 and sum(not question.turns for question in TEST) >= 60
    assert {len(question.offered) for question in TRAIN + TEST} == {3, 4}
    assert {question.kind for question in TRAIN} == {*data.KINDS}
    assert {question.kind for question in TEST} == {*data.KINDS, "held-out tool", "untrained error"}


@pytest.mark.parametrize("seed", [1, 2])
def test_no_text_of_the_test_repeats(seed):
    test = data.test_questions(seed)
    assert len({question.text for question in test}) == len(test)


def test_a_text_repeats_only_where_there_are_no_more():
    few = len(wordings.CHAT_TEST)
    test = data.test_questions(counts={"needs none": few + 2})
    assert len(test) == few + 2 and {question.text for question in test} == {*wordings.CHAT_TEST}


@pytest.mark.parametrize("kind", [*data.MENDED])
def test_a_call_that_must_be_mended_fails_first_and_names_what_is_right(kind):
    question = next(question for question in TEST if question.kind == kind)
    ((name, wrong),), ((_, right),) = question.turns
    first, second = (data.all_tools().call(name, given) for given in (wrong, right))
    assert first.failed and not second.failed
    (wanted,) = {*right.values()} - {*wrong.values()}
    assert first.content.endswith(f"; use {wanted}")


def test_calls_that_training_mends_fail_first_and_are_of_several_tools():
    mended = [question for question in TRAIN if question.kind == "mended"]
    for question in mended:
        ((name, wrong),), ((again, right),) = question.turns
        first, second = (said["content"] for said in data.conversation(question) if said["role"] == "tool")
        (wanted,) = {*right.values()} - {*wrong.values()}
        assert again == name and not second.startswith("error: ")
        assert first.startswith(f"error: {name}: ") and first.endswith(f"; use {wanted}")
    of_the_test = sum(question.turns[0][0][0] in ("find_price", *ALIASES["find_price"]) for question in mended)
    assert 0.3 < of_the_test / len(mended) < 0.7
    assert len({question.turns[0][0][0] for question in mended}) > 15


@pytest.mark.parametrize("argument", [*ARGUMENTS])
def test_a_lookup_refuses_brackets_and_names_what_to_use(argument):
    name = next(name for name, lookup in LOOKUPS.items() if lookup.of == argument)
    said = data.all_tools().call(name, {argument: "Anna (my aunt)"})
    assert said.content == f"error: {name}: {argument} must have no brackets, got Anna (my aunt); use Anna"


def test_needed_tools_are_on_offer_or_not_as_the_kind_says():
    for question in TRAIN + TEST:
        assert len(set(question.offered)) == len(question.offered)
        wanted = {name for turn in question.turns for name, _ in turn}
        assert wanted <= {*question.offered}
        assert bool(wanted) == (question.kind not in ("needs none", "none fits"))
    fits = {wording: name for name, each in wordings.TEST.items() for wording in each}
    for question in TEST:
        if question.kind == "none fits":
            assert fits[question.parts[0][0]] not in question.offered


def test_the_held_out_tool_is_never_seen_in_training():
    assert all(HELD_OUT not in question.offered for question in TRAIN)
    assert all(HELD_OUT in question.offered for question in TEST if question.kind == "held-out tool")


def test_nothing_of_the_test_is_in_training():
    found = data.shared([question for dialogue in DIALOGUES for question in dialogue], TEST)
    assert {*found} == {
        "question", "wording", "wording within a word", "word", "city", "item", "number pair",
    } and not any(found.values())  # fmt: skip


def test_all_wordings_are_apart():
    """Also those that no question above has."""
    train = [*wordings.CHAT_TRAIN, *wordings.PLURAL_TRAIN]
    train += [one for each in wordings.TRAIN.values() for one in each]
    train += [one for tool in TRAINING_TOOLS for one in tool.wordings]
    test = [*wordings.CHAT_TEST, *wordings.PLURAL_TEST, *(one for each in wordings.TEST.values() for one in each)]
    assert min(wordings.words_apart(one, other) for one in test for other in train) == 2


@pytest.mark.parametrize(
    "wording, given, name, value",
    [
        ("{x} beside {y}", {"x": 10, "y": 5}, "number pair", (10, 5)),
        ("Say {word}.", {"word": "banana"}, "word", "banana"),
        ("Where is {place}?", {"place": "Athens"}, "city", "Athens"),
        ("Some {item}.", {"item": "ladders"}, "item", "ladder"),
        ("Remove {x} from it.", {"x": 1}, "wording within a word", "Remove {subtrahend} from {minuend}."),
        ("Hi there.", {}, "wording", "Hi there."),
    ],
)
def test_shared_wordings_and_values_are_found(wording, given, name, value):
    test = [
        *TEST,
        replace(
            TEST[0],
            parts=(("Sum it up to the end.", {"a": 10, "b": 5}), ("Where do I see it here?", {"item": "ladder"})),
        ),
    ]
    planted = replace(TRAIN[0], text="?", parts=((wording, given),))
    assert data.shared([*TRAIN, planted], test)[name] == {value}


def test_words_apart():
    assert wordings.words_apart("What is {a} plus {b}?", "what is {x} plus {y}") == 0
    assert wordings.words_apart("Add {a} to {b}.", "Please add {a} {b}.") == 2
    assert wordings.words_apart("Hello", "") == wordings.words_apart("", "Hello") == 1


def test_half_of_the_trained_calls_are_of_tested_tools():
    """And a call is not rarer than none."""
    own = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    train = data.training_questions(3200)
    called = [question.turns[0][0][0] for question in train if question.kind == "one call"]
    names = [own.get(name, name) for name in called]
    assert 0.5 < sum(name in own for name in called) / len(called) < 0.8  # two of three names are aliases
    assert 0.4 < sum(name in data.TRAINED for name in names) / len(names) < 0.6
    assert {*names} == {*data.TRAINED, *(tool.function.__name__ for tool in TRAINING_TOOLS)}
    assert 0.6 < sum(bool(question.turns) for question in train) / len(train) < 0.8


def test_questions_of_a_conversation_have_the_same_tools_on_offer():
    """Those that they need, and none that fits a question without a call.

    Conversations that would need too many tools are drawn again, which makes questions of two calls a tenth rarer.
    """
    of = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    kinds = dict.fromkeys(data.KINDS, 0)
    for questions in DIALOGUES:
        (offered,) = {question.offered for question in questions}
        known = {of.get(name, name) for name in offered}
        assert len(known) == len(offered) and min(data.OFFERED) <= len(offered) <= data.MOST_NEEDED + 1
        for question in questions:
            kinds[question.kind] += 1
            assert {name for turn in question.turns for name, _ in turn} <= {*offered}
            assert known.issuperset(question.asks_for) if question.turns else known.isdisjoint(question.asks_for)
    assert len(DIALOGUES) == STEPS * BATCH_SIZE and {len(questions) for questions in DIALOGUES} == {QUESTIONS}
    assert kinds == pytest.approx({kind: share * 4 * len(DIALOGUES) for kind, share in data.KINDS.items()}, rel=0.15)


def test_a_conversation_asks_its_questions_one_after_the_other():
    ((messages, offered),) = data.training_conversations(1, seed=3, length=3)
    ((first, *_, last),) = data.training_dialogues(1, seed=3, length=3)
    roles = [message["role"] for message in messages]
    assert roles.count("system") == 1 and roles.count("user") == 3 and offered == last.offered
    assert messages[: len(data.conversation(first))] == data.conversation(first)
    assert messages[-len(data.conversation(last)) + 1 :] == data.conversation(last)[1:]
    example = tokenize_conversation(tokenizer(), messages, data.all_tools().subset(offered))
    answers = [message["content"] for message in messages if message["role"] == "assistant" and message["content"]]
    learnt = tokenizer().decode([label for label in example["labels"] if label != -100])
    assert len(answers) == 3 and all(answer in learnt for answer in answers)


def test_words_that_are_copied_are_many_and_apart_from_the_tests():
    for training, test in (
        (vocabulary.TRAIN_WORDS, vocabulary.TEST_WORDS),
        (vocabulary.TRAIN_CITIES, vocabulary.TEST_CITIES),
        (vocabulary.TRAIN_ITEMS, vocabulary.TEST_ITEMS),
    ):
        assert len({*training}) == len(training) > 100 and {*training}.isdisjoint(test)


def test_tools_of_the_test_go_by_their_own_names_and_calls_by_one_on_offer():
    assert {name for question in TEST for name in question.offered} <= {data.HELD_OUT, *data.TRAINED}
    assert all(name in question.offered for question in TRAIN for turn in question.turns for name, _ in turn)
    assert not {alias for aliases in ALIASES.values() for alias in aliases} & {data.HELD_OUT, *ALIASES}
    assert {*ALIASES} == {*data.TRAINED, *(tool.function.__name__ for tool in TRAINING_TOOLS)}
    assert data.all_tools().call("minus", {"minuend": 7, "subtrahend": 2}).content == "5"


def test_summary_counts_each_kind():
    lines = data.summary(TEST).splitlines()
    assert len(lines) == 2 + len({question.kind for question in TEST})
    assert [sum(int(line.split("|")[2]) for line in lines[2:])] == [len(TEST)]
    assert lines[-2:] == ["| held-out tool | 40 | 40 | 8 |", "| untrained error | 20 | 20 | 4 |"]


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
        ("find_price", {"item": "clock"}, str(vocabulary.PRICES["clock"])),
        ("find_price", {"item": "clocks"}, "error: find_price: item is not in the list, got clocks; use clock"),
        ("travel_time", {"origin": "Rome", "destination": "Oslo"}, "6 hours"),
        (
            "travel_time",
            {"origin": "Rome", "destination": "oslo"},
            "error: travel_time: destination must begin with a capital letter, got oslo; use Oslo",
        ),
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
    assert re.match(r"error: \w+: .*; use ", mended[0]) and not mended[1].startswith("error: ")
    assert len(kinds["two calls"][2]["tool_calls"]) == 2
    assert len(kinds["needs none"]) == len(kinds["none fits"]) == 3
