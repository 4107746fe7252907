"""Conversations for the tests of tokens and messages."""

from tests.tool_calling.functions import add, describe, tokenizer
from unsloth_puzzles.tool_calling.tokens import IGNORED
from unsloth_puzzles.tool_calling.toolbox import ToolBox

BOX = ToolBox([add, describe])


def call(name="add", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def conversation(question="What is 3 plus 4?", result="7", answer="It is 7."):
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call(a=3, b=4)]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]


def trained_text(format, example):
    """The labelled tokens, decoded."""
    assert len({len(each) for each in example.values()}) == 1
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    assert all(label in (IGNORED, token) for token, label in pairs)
    return tokenizer(format).decode([label for label in example["labels"] if label != IGNORED])
