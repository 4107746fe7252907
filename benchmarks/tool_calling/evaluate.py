"""What a model does with the held-out questions: shares with 95 % intervals.

report = evaluate(model, tokenizer, test_questions())
print(table({"before": before, "after": after}))
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas

from benchmarks.progress import at_work
from benchmarks.tool_calling.data import MENDED, Question, all_tools, expected_results, for_format
from unsloth_puzzles.bench import markdown
from unsloth_puzzles.tool_calling.conversation import Conversation, run_conversations
from unsloth_puzzles.tool_calling.formats import ChatFormat, chat_format

MAX_NEW_TOKENS = 112  # two calls of the longest kind take about 100
MAX_TURNS = 3
METRICS = ("parse rate", "exact call", "executed result", "final answer", "abstention")
HELD_OUT = "exact call, held-out tool"
AFTER_AN_ERROR = "mended, after an error"
APART = ("held-out tool", "untrained error")  # kinds that only their own rows and AFTER_AN_ERROR count
FLOORS = {"exact call": 0.7, "abstention": 0.8, HELD_OUT: 0.4}  # shares that a trained model must reach


class Share(NamedTuple):
    """`hits` of `count`, with the Wilson interval that holds the true share in 95 % of samples."""

    hits: int
    count: int

    @property
    def value(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.count, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.hits} of {self.count} ({low:.2f} to {high:.2f})"


def evaluate(
    model,
    tokenizer,
    questions: Sequence[Question],
    *,
    format: str | ChatFormat = "qwen2.5",
    batch_size: int = 32,
) -> tuple[dict[str, Share], list[Conversation]]:
    """Let the model answer all questions, greedily, and count.

    Of the questions that need calls, without those of the kinds APART: "parse rate": the first reply has calls, all
    readable; "exact call": in every turn the calls are those wanted, names and arguments (a call that must fail may be
    left out); "executed result": the calls that do not fail return what is wanted; "final answer": the answer contains
    each result. Of all that need calls: "exact call, KIND" of each kind; "mended, after an error": of the questions in
    which a call failed or could not be read, those whose last call is one that is wanted last.
    Of the others: "abstention": no call, readable or not.

    Returns:
        The shares by name, and the conversations.
    """
    format = chat_format(format) if isinstance(format, str) else format
    questions = for_format(questions, format.calls_per_turn)
    boxes = {offered: all_tools().subset(offered) for offered in {question.offered for question in questions}}
    with at_work("answers"):
        done = run_conversations(
            model,
            tokenizer,
            [question.messages for question in questions],
            [boxes[question.offered] for question in questions],
            MAX_TURNS,
            format=format,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=batch_size,
        )
    return count(questions, done), done


def count(questions: Sequence[Question], done: Sequence[Conversation]) -> dict[str, Share]:
    """The shares, see `evaluate`. A metric without questions is left out."""
    hits: dict[str, list[bool]] = {}
    for question, conversation in zip(questions, done, strict=True):
        if not question.turns:
            for name in ("abstention", f"abstention, {question.kind}"):
                hits.setdefault(name, []).append(not conversation.turns)
            continue
        judged = judge_calls(question, conversation)
        if question.kind not in APART:
            for name, hit in judged.items():
                hits.setdefault(name, []).append(hit)
        hits.setdefault(f"exact call, {question.kind}", []).append(judged["exact call"])
        if any(result.failed for _, result in conversation.calls):
            hits.setdefault(AFTER_AN_ERROR, []).append(_ends_right(question, conversation))
    return {name: Share(sum(each), len(each)) for name, each in hits.items()}


def check_training(before: dict[str, Share], after: dict[str, Share]) -> dict[str, bool]:
    """Whether training improved each metric by more than the intervals, and reached the `FLOORS`.

    Abstention has a floor only: a model that never calls always abstains.
    """
    checks = {
        f"{name}: interval above that before": after[name].interval[0] > before[name].interval[1]
        for name in METRICS
        if name != "abstention"
    }
    return checks | {f"{name}: at least {floor}": after[name].value >= floor for name, floor in FLOORS.items()}


def judge_calls(question: Question, conversation: Conversation) -> dict[str, bool]:
    """The four metrics of a question that needs calls."""
    made = [[call for call in turn if call] for turn in calls_made(conversation)]
    first = conversation.turns[0] if conversation.turns else []
    wanted = expected_results(question)
    answer = conversation.answer or ""
    return {
        "parse rate": bool(first) and all(call is not None for call, _ in first),
        "exact call": same_calls(made, question.turns)
        or (question.kind in MENDED and same_calls(made, question.turns[-1:])),
        "executed result": [result.content for _, result in conversation.calls if not result.failed] == wanted,
        "final answer": all(result in answer for result in wanted),
    }


def calls_made(conversation: Conversation) -> list[list[tuple[str, dict] | None]]:
    """The calls of each turn, as (name, arguments); None stands for a call that could not be read."""
    return [[call and tuple(call) for call, _ in turn] for turn in conversation.turns]


def _ends_right(question: Question, conversation: Conversation) -> bool:
    last, _ = conversation.calls[-1]
    return last is not None and any(same_calls(((last,),), ((wanted,),)) for wanted in question.turns[-1])


def same_calls(made: Sequence[Sequence[tuple]], wanted: Sequence[Sequence[tuple]]) -> bool:
    """Whether turns of calls, each (name, arguments), are equal, and of equal types: 3.0 and True are not 3 and 1.

    The order of calls in a turn does not matter.
    """
    return [sorted(map(repr, _sorted(turn))) for turn in made] == [sorted(map(repr, _sorted(turn))) for turn in wanted]


def _sorted(turn: Sequence[tuple]) -> list[tuple]:
    return [(name, sorted(arguments.items())) for name, arguments in turn]


def wrong(questions: Sequence[Question], done: Sequence[Conversation]) -> list[str]:
    """A line for each question whose calls were not those wanted: kind, text, and the calls made."""
    lines = []
    for question, conversation in zip(questions, done, strict=True):
        right = judge_calls(question, conversation)["exact call"] if question.turns else not conversation.turns
        if not right:
            lines.append(f"{question.kind}: {question.text!r}: {calls_made(conversation)}")
    return lines


def table(reports: dict[str, dict[str, Share]]) -> str:
    """A Markdown table: a metric a row, a report a column."""
    names = dict.fromkeys(name for report in reports.values() for name in report)
    ordered = [*(name for name in METRICS if name in names), *sorted(set(names) - set(METRICS))]
    columns = {when: [str(report.get(name, "")) for name in ordered] for when, report in reports.items()}
    return markdown.table(pandas.DataFrame({"metric": ordered, **columns}))
