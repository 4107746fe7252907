"""The first turns of a trained model in llama.cpp: its tool calls as the engine reads them, beside transformers'.

turns = first_turns("model-f16.gguf", tokenizer, questions, conversations)
judge(results, "tool calling in llama.cpp", checks(turns))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas

from benchmarks.tool_calling.data import Question, all_tools
from benchmarks.tool_calling.engine import ask, request
from benchmarks.tool_calling.evaluate import MAX_NEW_TOKENS, same_calls
from unsloth_puzzles.bench import markdown
from unsloth_puzzles.tool_calling.conversation import Conversation
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.tokens import ChatEncoder

COUNT = 8


class FirstTurn(NamedTuple):
    """The first turns of transformers and of the engine: calls of the first reply, and tokens of the prompt."""

    question: Question
    theirs: tuple[Call, ...]  # of transformers
    engines: tuple[Call, ...]
    their_tokens: int
    engines_tokens: int


def askable(questions: Sequence[Question], conversations: Sequence[Conversation], count: int = COUNT) -> list[int]:
    """The indices of at most `count` questions that need a call, spread evenly over those whose first calls all ran.

    Calls that failed are left out: the engine's grammar writes none that no schema allows.
    """
    found = [
        n
        for n, (question, done) in enumerate(zip(questions, conversations, strict=True))
        if question.turns and done.turns and not any(result.failed for _, result in done.turns[0])
    ]
    return found[:: max(1, len(found) // count)][:count]


def first_turns(
    path: str | Path,
    tokenizer,
    questions: Sequence[Question],
    conversations: Sequence[Conversation],
    count: int = COUNT,
) -> list[FirstTurn]:
    """Let the engine answer questions that transformers has answered.

    Args:
        path: The model's GGUF file.
        tokenizer: The model's.
        questions: Those that transformers was asked.
        conversations: What `evaluate` returns for them, of the same model in Qwen2.5's format.
        count: How many are asked, see `askable`.

    Raises:
        RuntimeError: See `ask`.
        ValueError: The engine gives arguments that are no JSON object.
    """
    chosen = askable(questions, conversations, count)
    boxes = [all_tools().subset(questions[n].offered) for n in chosen]
    asked = [request(questions[n].messages, box, MAX_NEW_TOKENS) for n, box in zip(chosen, boxes, strict=True)]
    replies = ask(path, asked) if asked else []
    encoder, turns = ChatEncoder(tokenizer), []
    for n, box, reply in zip(chosen, boxes, replies, strict=True):
        theirs = tuple(call for call, _ in conversations[n].turns[0])
        tokens = len(encoder.prompt(questions[n].messages, box))
        turns.append(FirstTurn(questions[n], theirs, reply.calls, tokens, reply.prompt_tokens))
    return turns


def checks(turns: Sequence[FirstTurn], count: int = COUNT) -> dict[str, bool]:
    """Whether there are `count` turns, and whether prompts and calls of each are equal."""
    found = {f"{count} questions that transformers calls a tool for": len(turns) == count}
    found["prompts have equally many tokens"] = all(one.their_tokens == one.engines_tokens for one in turns)
    for number, one in enumerate(turns, 1):
        found[f"equal calls, question {number}"] = same_calls([one.engines], [one.theirs])
    return found


def table(turns: Sequence[FirstTurn]) -> str:
    """A Markdown table: a question a row, with the calls as the engine reads them."""
    rows = [(one.question.kind, one.question.text, _written(one.engines)) for one in turns]
    return markdown.table(pandas.DataFrame(rows, columns=["kind", "question", "`tool_calls` in llama.cpp"]))


def _written(calls: Sequence[Call]) -> str:
    return "; ".join(
        f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls
    )
