"""Conversations of which a template would drop or mis-write a part are refused; forms that mean the same are one."""

import pytest
from datasets import Dataset

from tests.tool_calling.conversations import BOX, call, conversation, trained_text
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.tool_calling.tokens import tokenize_conversation
from unsloth_puzzles.tool_calling.toolbox import ToolBox


def test_two_calls_in_a_turn_and_text_before_them():
    messages = [
        {"role": "user", "content": "3 + 4, 5 + 6?"},
        {"role": "assistant", "content": "Both.", "tool_calls": [call(a=3, b=4), call(a=5, b=6)]},
        {"role": "tool", "content": "7"},
        {"role": "tool", "content": "11"},
        {"role": "assistant", "content": "7 and 11."},
    ]
    text = trained_text("qwen2.5", tokenize_conversation(tokenizer(), messages, BOX))
    assert text.startswith("Both.\n<tool_call>") and text.count("<tool_call>") == 2
    with pytest.raises(
        ValueError, match=r"messages\[1\] must have at most 1 tool call with llama3.2, got 2; write them"
    ):
        tokenize_conversation(tokenizer("llama3.2"), messages, BOX, format="llama3.2")
    messages[1]["tool_calls"].pop()
    del messages[3]
    with pytest.raises(ValueError, match=r"messages\[1\] must have no content beside a tool call with llama3.2"):
        tokenize_conversation(tokenizer("llama3.2"), messages, BOX, format="llama3.2")


def test_arguments_as_json_text_and_content_of_none_are_the_same_conversation():
    other = conversation()
    other[2] = {"role": "assistant", "content": None, "tool_calls": [call()]}
    other[2]["tool_calls"][0]["function"]["arguments"] = '{"a": 3, "b": 4}'
    assert tokenize_conversation(tokenizer(), other, BOX) == tokenize_conversation(tokenizer(), conversation(), BOX)
    assert other[2]["content"] is None  # the given messages stay as they are


def edited(number, **changes):
    messages = conversation()
    messages[number] = {key: value for key, value in {**messages[number], **changes}.items() if value is not ...}
    return messages


@pytest.mark.parametrize(
    "messages, message",
    [
        (edited(2, tool_calls=[call(a=3, b=None)]), r"got one that does not: add.b must be of type integer, got null"),
        (edited(2, tool_calls=[call(a=3, c=4)]), "arguments of add must be among these: a, b; got \"c\""),
        (edited(2, tool_calls=[call("sum", a=3)]), r"must call tools on offer \(add, describe\), got 'sum'"),
        (edited(2, tool_calls=[{"name": 3}]), r"tool calls of messages\[2\] must be"),
        (edited(2, tool_calls=[call(a=1), call(a=2)]), r"messages\[4\] must be a tool's result for add"),
        (edited(2, tool_calls=[call(a=3, b=None)])[:3], "got one that does not: add.b must be of type integer"),
        (edited(2, reasoning_content="Hm."), r"messages\[2\] must have no keys but .*, got reasoning_content"),
        (edited(3, name="describe"), r"messages\[3\] must answer the call 'add', got name 'describe'; put results"),
        (
            [*edited(2, tool_calls=[{**call(a=3), "id": "x"}])[:3], {**conversation()[3], "tool_call_id": "y"}],
            r"messages\[3\] must answer the call 'x', got tool_call_id 'y'",
        ),
        (edited(2, tool_calls=...), r"messages\[3\] must answer a tool call, got none before it"),
        (edited(3, role="function"), r"messages\[3\] must have the role of one of system"),
        (edited(3, role="system"), r"messages\[3\] must have the role of one of system, user"),
        (edited(1, tool_calls=[call(a=1)]), r"messages\[1\] must be an assistant's to hold tool calls"),
        (conversation()[:2], "messages must have an assistant's turn"),
        ([], "messages must contain a user's"),
    ],
)  # fmt: skip
def test_conversations_out_of_form_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        tokenize_conversation(tokenizer(), messages, BOX)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ('{"a": 1e999}', "must be an object or its JSON, got .*: numbers must be finite, got 1e999"),
        ('{"a": NaN}', "must be an object or its JSON, got .*: numbers must be finite, got NaN"),
        ('{"a": 1, "a": 2}', "must be an object or its JSON, got .*: keys must differ"),
        ({"a": [float("inf")]}, "must be values of JSON, got some that are not: Out of range float"),
        ({"a": {1, 2}}, "must be values of JSON, got some that are not: Object of type set"),
    ],
)
def test_arguments_that_json_lacks_are_refused_even_of_a_call_that_failed(arguments, message):
    messages = edited(2, tool_calls=[{"function": {"name": "add", "arguments": arguments}}])
    messages[3]["content"] = "error: no"
    with pytest.raises(ValueError, match=rf"^arguments in messages\[2\] {message}"):
        tokenize_conversation(tokenizer(), messages, BOX)


def test_a_call_that_failed_need_not_fit():
    messages = edited(2, tool_calls=[call("sum", a="3")])
    messages[3]["content"] = "error: name of a tool must be one of: add, describe; got 'sum'"
    assert '"sum"' in trained_text("qwen2.5", tokenize_conversation(tokenizer(), messages, BOX))


@pytest.mark.parametrize("content", [3, ["text"], [{"type": "text", "text": "Hi"}]])
def test_contents_must_be_text(content):
    with pytest.raises(TypeError, match=r"^content of messages\[1\] must be text, got (int|list)$"):
        tokenize_conversation(tokenizer(), edited(1, content=content), BOX)


def search(query: str, limit: int | None = 10, filters: dict | None = None) -> str:
    """Search.

    Args:
        query: What.
        limit: Most results, None for all.
        filters: Columns.
    """


def asked(arguments):
    call = {"type": "function", "function": {"name": "search", "arguments": arguments}}
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def test_nulls_that_datasets_has_filled_in_are_not_learnt():
    given = [{"query": "a"}, {"query": "b", "limit": 3}, {"query": "c", "filters": {"year": 2020}}]
    rows = Dataset.from_list([{"messages": asked(one)} for one in given])
    for row, key in zip(rows, ("limit", "filters", "limit"), strict=True):
        with pytest.raises(ValueError, match=rf"^arguments of search in messages\[1\] must be JSON .* for '{key}', wh"):
            tokenize_conversation(tokenizer(), row["messages"], ToolBox([search]))


@pytest.mark.parametrize("filters", [{"year": None}, {"years": [{"from": None}]}])
def test_nulls_are_found_at_any_depth(filters):
    key = "year" if "year" in filters else "from"
    with pytest.raises(ValueError, match=rf"a dict with None for '{key}'"):
        tokenize_conversation(tokenizer(), asked({"query": "a", "filters": filters}), ToolBox([search]))


def test_nulls_of_json_text_are_learnt():
    example = tokenize_conversation(tokenizer(), asked('{"query": "a", "limit": null}'), ToolBox([search]))
    assert '{"query": "a", "limit": null}' in trained_text("qwen2.5", example)
