"""Questions with the calls that answer them, and whole conversations to train on.

Five kinds: one call; two calls in a turn; a call that fails and is mended; small talk, which needs no tool; and a
question whose tool is not on offer. The test has two more: a held-out tool, and an error that training does not have.
Three or four tools are on offer each time.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import pandas

from benchmarks.tool_calling import vocabulary, wordings
from benchmarks.tool_calling.aliases import aliased, renamed
from benchmarks.tool_calling.lookups import ARGUMENTS, LOOKUPS
from benchmarks.tool_calling.tools import HELD_OUT, TOOLS
from benchmarks.tool_calling.training_tools import TRAINING_TOOLS
from benchmarks.tool_calling.wordings import number_pair, words_apart
from unsloth_puzzles.bench import markdown
from unsloth_puzzles.tool_calling.toolbox import ToolBox, failure

OFFERED = (3, 4)  # how many tools are on offer; up to two more where several questions need them
TRAINED = tuple(tool.__name__ for tool in TOOLS if tool.__name__ != HELD_OUT)  # and tested
_MORE = {tool.function.__name__: tool for tool in TRAINING_TOOLS}
_FUNCTIONS = aliased({tool.__name__: tool for tool in TOOLS} | {name: one.function for name, one in _MORE.items()})
KINDS = {"one call": 0.48, "two calls": 0.12, "mended": 0.08, "needs none": 0.12, "none fits": 0.2}
TEST_COUNTS = {"one call": 100, "two calls": 20, "mended": 20, "needs none": 40, "none fits": 40}
TEST_COUNTS |= {"held-out tool": 40, "untrained error": 20}
MENDED = {"mended": "find_price", "untrained error": "travel_time"}  # which tool refuses the first call
ELSEWHERE = 0.5  # of the calls of training that are mended: of lookups, not of the tool that the test has
TESTED = 0.5  # of the tools that training asks for: tools of the test, or these nine would be a quarter
UNKNOWN = 0.2  # of the training's questions that no tool fits: about something that has no tool at all
MOST_NEEDED = 5  # tools that the questions of a conversation need together
DRAWS = 1000  # of a question whose text another one has
SYSTEM = "You are a helpful assistant. Call a tool only if one on offer fits."


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        kind: One of TEST_COUNTS.
        text: What the user says.
        offered: Names of the tools on offer.
        turns: The calls (name, arguments) of each turn that answer it; none where the model must not call.
        parts: What `text` was made of: a wording and what stands in its slots, for each call or once.
        asks_for: Names of the tools that it asks for, on offer or not; another name may be on offer for each.
    """

    kind: str
    text: str
    offered: tuple[str, ...]
    turns: tuple[tuple[tuple[str, dict], ...], ...] = ()
    parts: tuple[tuple[str, dict], ...] = ()
    asks_for: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict]:
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]


def training_conversations(
    count: int, seed: int = 0, calls_per_turn: int | None = None, length: int = 1
) -> list[tuple[list[dict], tuple[str, ...]]]:
    """Messages and the names of the tools on offer, `count` times.

    Args:
        count: Of conversations.
        seed: Of all that is drawn.
        calls_per_turn: As in `ChatFormat`.
        length: Questions a conversation.
    """
    asked = (for_format(questions, calls_per_turn) for questions in training_dialogues(count, seed, length))
    return [(conversation(*questions), questions[0].offered) for questions in asked]


def for_format(questions: list[Question], calls_per_turn: int | None) -> list[Question]:
    """The same questions, with each call in a turn of its own if a turn can hold but one."""
    if calls_per_turn is None:
        return list(questions)
    return [replace(q, turns=tuple((call,) for turn in q.turns for call in turn)) for q in questions]


def training_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions of the five KINDS; a tool goes by different names."""
    return [question for (question,) in training_dialogues(count, seed)]


def training_dialogues(count: int, seed: int = 0, length: int = 1) -> list[list[Question]]:
    """`length` questions of the five KINDS that the same tools are on offer for, `count` times."""
    rng = random.Random(seed)
    return [renamed(_dialogue(rng, length), rng) for _ in range(count)]


def test_questions(seed: int = 1, counts: dict[str, int] | None = None) -> list[Question]:
    """The held-out questions, by default 280, 80 of them to abstain from.

    A text occurs once, or again where `counts` asks for more than there are.
    """
    rng, found, texts = random.Random(seed), [], set()
    for kind, count in (counts or TEST_COUNTS).items():
        for _ in range(count):
            drawn = (_question(rng, kind, test=True) for _ in range(DRAWS))
            question = next((one for one in drawn if one.text not in texts), None) or _question(rng, kind, test=True)
            found.append(question)
            texts.add(question.text)
    return found


test_questions.__test__ = False  # no test of pytest's


def shared(training: Sequence[Question], test: Sequence[Question]) -> dict[str, set]:
    """Return what both have, by name; nothing if the test is held out.

    "wording within a word": wordings of the test that differ from one of training in a word at most. "number pair":
    the two numbers of a call, in the order of its arguments.
    """
    theirs, ours = _contents(training), _contents(test)
    near = {one for one in ours["wording"] if any(words_apart(one, other) <= 1 for other in theirs["wording"])}
    return {name: found & theirs[name] for name, found in ours.items()} | {"wording within a word": near}


def _contents(questions: Sequence[Question]) -> dict[str, set]:
    found: dict[str, set] = {name: set() for name in ("question", "wording", "word", "city", "item", "number pair")}
    for question in questions:
        found["question"].add(question.text)
        for wording, given in question.parts:
            found["wording"].add(wording)
            for name, value in given.items():
                if name in _KINDS_OF_ARGUMENTS:
                    kind = _KINDS_OF_ARGUMENTS[name]
                    found[kind].add(value.removesuffix("s") if kind == "item" else value)
            numbers = tuple(value for value in given.values() if isinstance(value, int))
            if len(numbers) == 2:
                found["number pair"].add(numbers)
    return found


_KINDS_OF_ARGUMENTS = {"text": "word", "word": "word", "item": "item"} | dict.fromkeys(
    ("city", "place", "town", "origin", "destination", "start", "end"), "city"
)


def summary(questions: Sequence[Question]) -> str:
    """A Markdown table of the kinds: how many questions, texts and wordings."""
    rows = []
    for kind in dict.fromkeys(question.kind for question in questions):
        of = [question for question in questions if question.kind == kind]
        wordings_of = {wording for question in of for wording, _ in question.parts}
        rows.append((kind, len(of), len({question.text for question in of}), len(wordings_of)))
    return markdown.table(pandas.DataFrame(rows, columns=["kind", "questions", "different texts", "wordings"]))


@cache
def all_tools() -> ToolBox:
    # Any arguments are harmless to these functions, and forks of a process of some GB would take longer than the model.
    return ToolBox(list(_FUNCTIONS.values()), isolated=False)


def answer(results: list[str]) -> str:
    """The final answer that is trained and looked for."""
    return "The result is " + " and ".join(results) + "."


def _dialogue(rng: random.Random, length: int) -> list[Question]:
    """Questions with the same tools on offer, more of them where the questions need many."""
    while True:
        kinds = rng.choices([*KINDS], [*KINDS.values()], k=length)
        questions = [_question(rng, kind, test=False) for kind in kinds]
        if length == 1:
            return questions
        needed = [*dict.fromkeys(name for one in questions if one.turns for name in one.asks_for)]
        unwanted = {name for one in questions if not one.turns for name in one.asks_for}
        if len(needed) <= MOST_NEEDED and unwanted.isdisjoint(needed):
            break
    others = [name for name in (*TRAINED, *_MORE) if name not in needed and name not in unwanted]
    count = max(rng.choice(OFFERED), len(needed) + (len(needed) >= max(OFFERED)))
    offered = [*needed, *rng.sample(others, count - len(needed))]
    rng.shuffle(offered)
    return [replace(one, offered=tuple(offered)) for one in questions]


def _question(rng: random.Random, kind: str, test: bool) -> Question:
    asked, known, wanted = wordings.TEST, list(TRAINED), list(TRAINED)
    if not test:
        asked = wordings.TRAIN | {name: tool.wordings for name, tool in _MORE.items()}
        known += _MORE
        wanted = wanted if rng.random() < TESTED else list(_MORE)
    names = [HELD_OUT] if kind == "held-out tool" else rng.sample(wanted, 2 if kind == "two calls" else 1)
    if kind in MENDED:
        names = [MENDED[kind] if test or rng.random() > ELSEWHERE else rng.choice([*LOOKUPS])]
    if kind == "mended":
        asked = asked | {"find_price": wordings.PLURAL_TEST if test else wordings.PLURAL_TRAIN}
    others = [name for name in known if name not in names]
    offered = [*names, *rng.sample(others, rng.choice(OFFERED) - len(names))]
    rng.shuffle(offered)
    if kind == "needs none":
        said = rng.choice(wordings.CHAT_TEST if test else wordings.CHAT_TRAIN)
        return Question(kind, said, tuple(offered), parts=((said, {}),))
    if kind == "none fits":
        offered = rng.sample(others, len(offered))
        if not test and rng.random() < UNKNOWN:
            said = rng.choice(wordings.UNKNOWN)
            return Question(kind, said, tuple(offered), parts=((said, {}),))
    arguments = [_ARGUMENTS[name](rng, test) if name in _ARGUMENTS else _MORE[name].arguments(rng) for name in names]
    turns = [tuple(zip(names, arguments, strict=True))]
    if kind in MENDED:
        (right,) = arguments
        arguments = [right | _refused(rng, names[0], right)]
        turns.insert(0, ((names[0], arguments[0]),))
    parts = tuple((rng.choice(asked[name]), given) for name, given in zip(names, arguments, strict=True))
    text = " And: ".join(wording.format(**given) for wording, given in parts)
    if not test:
        text = rng.choice(wordings.BEFORE) + text + rng.choice(wordings.AFTER)
    return Question(kind, text, tuple(offered), () if kind == "none fits" else tuple(turns), parts, tuple(names))


def _refused(rng: random.Random, name: str, right: dict) -> dict:
    """The argument as the tool refuses it."""
    if name in LOOKUPS:
        argument = LOOKUPS[name].of
        return {argument: f"{right[argument]} ({rng.choice(ARGUMENTS[argument].refused)})"}
    return {"item": right["item"] + "s"} if name == "find_price" else {"origin": right["origin"].lower()}


def conversation(question: Question, *more: Question) -> list[dict]:
    """The messages of questions that are answered as they should be, one after the other."""
    if more:
        return conversation(question) + [said for said in conversation(*more) if said["role"] != "system"]
    messages = question.messages
    for turn in question.turns:
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in turn]
        messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        messages += [{"role": "tool", "content": _called(name, tuple(given.items()))} for name, given in turn]
    said = {"needs none": wordings.NEEDS_NONE, "none fits": wordings.NONE_FITS}
    return [*messages, {"role": "assistant", "content": said.get(question.kind) or answer(expected_results(question))}]


@cache
def _called(name: str, arguments: tuple) -> str:
    """As the toolbox answers, without a process for each of thousands of calls."""
    try:
        result = _FUNCTIONS[name](**dict(arguments))
    except ValueError as error:
        return failure(name, f"{name}: {error}").content
    return result if isinstance(result, str) else json.dumps(result)


def expected_results(question: Question) -> list[str]:
    """Return the results of the wanted calls that do not fail."""
    results = [_called(name, tuple(given.items())) for turn in question.turns for name, given in turn]
    return [result for result in results if not result.startswith("error: ")]


def _word(rng: random.Random, test: bool) -> str:
    return rng.choice(vocabulary.TEST_WORDS) if test else wordings.made_up_or(rng, vocabulary.TRAIN_WORDS)


def _named(*names: str, first: tuple[int, int] = (1, 999), second: tuple[int, int] = (1, 999)) -> Callable:
    return lambda rng, test: dict(zip(names, number_pair(rng, test, first, second), strict=True))


def _length(rng: random.Random, test: bool) -> dict:
    source, target = rng.sample(("m", "km", "mile"), 2)
    return {"value": number_pair(rng, test, (1, 999), (0, 0))[0], "source": source, "target": target}


def _count(rng: random.Random, test: bool) -> dict:
    word = _word(rng, test)
    return {"word": word, "letter": rng.choice(word)}


def _cities(rng: random.Random, test: bool) -> dict:
    origin, destination = rng.sample(vocabulary.TEST_CITIES if test else vocabulary.TRAIN_CITIES, 2)
    if not test:
        origin, destination = wordings.made_up_or(rng, (origin,)), wordings.made_up_or(rng, (destination,))
    return {"origin": origin, "destination": destination}


_ARGUMENTS: dict[str, Callable[[random.Random, bool], dict]] = {
    "add": _named("a", "b"),
    "subtract": _named("minuend", "subtrahend"),
    "divide": _named("dividend", "divisor", second=(1, 40)),
    "power": _named("base", "exponent", first=(2, 50), second=(2, 9)),
    "convert_length": _length,
    "reverse_text": lambda rng, test: {"text": _word(rng, test)},
    "count_letter": _count,
    "find_price": lambda rng, test: {"item": rng.choice(vocabulary.TEST_ITEMS if test else vocabulary.TRAIN_ITEMS)},
    "travel_time": _cities,
    "weather": lambda rng, test: {"city": rng.choice(vocabulary.TEST_CITIES)},
}
