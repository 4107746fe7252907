"""Reading replies: calls, answers, and calls that cannot be read, which are errors and never answers."""

import pytest

from unsloth_puzzles.tool_calling.replies import Call, Reply, read_bare, read_tagged

ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'


def test_answer():
    assert read_tagged(" It is 7.\n") == Reply("It is 7.")
    assert read_bare(" It is {7}. ") == Reply("It is {7}.")
    assert read_tagged("") == Reply("")


def test_calls_and_what_is_said_before_them():
    assert read_tagged(ADD) == Reply("", (Call("add", {"a": 3}),))
    other = ADD.replace("3", '"<b> \\u00e9 }"')
    assert read_tagged(f"Let me see.\n{ADD}\n{other}\n") == Reply(
        "Let me see.", (Call("add", {"a": 3}), Call("add", {"a": "<b> é }"}))
    )


def test_numbers_that_are_finite_are_read():
    text = ADD.replace("3", "[1e308, -0.5, 1e-999, " + "[" * 40 + "]" * 40 + "]")
    assert read_tagged(text).calls[0].arguments["a"][:3] == [1e308, -0.5, 0.0]


def test_call_of_llama():
    text = '{"name": "add", "parameters": {"a": 3}}'
    assert read_bare(text) == read_bare(f"<|python_tag|>{text}") == Reply("", (Call("add", {"a": 3}),))


@pytest.mark.parametrize(
    "body, message",
    [
        ('{"name": "add", "arguments": {"a": 3}', "got invalid JSON"),
        ('{"name": "add", "arguments": {"a": 3}}}', "got invalid JSON"),
        ("", "got invalid JSON"),
        ("[1]", "got list"),
        ('{"name": "add"}', r"got \['name'\]"),
        ('{"name": "add", "arguments": {}, "id": 1}', r"got \['arguments', 'id', 'name'\]"),
        ('{"name": 3, "arguments": {}}', "got name 3"),
        ('{"name": "add", "arguments": "{}"}', "and arguments '{}'"),
        ('{"name": "add", "arguments": null}', "and arguments None"),
        ('{"name": "add", "arguments": {"a": NaN}}', "numbers must be finite, got NaN"),
        ('{"name": "add", "arguments": {"a": [Infinity]}}', "numbers must be finite, got Infinity"),
        ('{"name": "add", "arguments": {"a": -Infinity}}', "numbers must be finite, got -Infinity"),
        ('{"name": "add", "arguments": {"a": 1e999}}', "numbers must be finite, got 1e999"),
        ('{"name": "add", "arguments": {"a": {"b": -1.5e400}}}', "numbers must be finite, got -1.5e400"),
        ('{"name": "add", "arguments": {"a": 1, "a": 2}}', "keys must differ"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "surrogates not allowed"),
        ('{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}", "got invalid JSON"),
        ('{"name": "add", "arguments": ' + '{"a":' * 50000, "nested at most 50 levels deep, got more"),
        ('{"name": "add", "arguments": {"a": ' + "[" * 600 + "]" * 600 + "}}", "nested at most 50 levels deep"),
    ],
)
def test_a_call_that_cannot_be_read_is_an_error(body, message):
    text = f"<tool_call>{body}</tool_call>"
    reply = read_tagged(text)
    assert reply.calls == () and reply.content == text
    with pytest.raises(ValueError, match=message):
        raise ValueError(reply.error)


@pytest.mark.parametrize(
    "text, message",
    [
        (ADD.removesuffix("</tool_call>"), "a tool call must end with </tool_call>, got none"),
        ("<tool_call>", "a tool call must end with </tool_call>, got none"),
        ("7</tool_call>", "a tool call must begin with <tool_call>, got </tool_call> alone"),
        (f"{ADD}\nDone.", "nothing must follow a tool call but another, got 'Done.'"),
        (f"{ADD} {ADD[:30]}</tool_call>", 'a tool call must be one JSON object {"name": ..., "arguments": {...}}'),
        (ADD * 9, "a reply must have at most 8 tool calls, got 9"),
    ],
)
def test_calls_out_of_form_are_errors(text, message):
    reply = read_tagged(text)
    assert reply.calls == () and reply.content == text and reply.error.startswith(message)


@pytest.mark.parametrize("text", ['{"name": "add", "parameters": {"a": 3}', '{"name": "add"}', "{7}", '{"a": 1}; {}'])
def test_a_reply_of_llama_that_begins_like_a_call_is_one(text):
    reply = read_bare(text)
    assert reply.calls == () and "a tool call must be one JSON object" in reply.error and reply.content == text


def test_a_call_of_llama_with_infinity_is_an_error():
    assert "numbers must be finite, got 1e999" in read_bare('{"name": "add", "parameters": {"a": 1e999}}').error
