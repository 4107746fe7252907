"""Labels lie on what the assistant writes, and nothing that a user or a tool writes becomes a control token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_calling.functions import CONTROLS, add, describe, tokenizer
from unsloth_puzzles.tool_calling.formats import chat_format
from unsloth_puzzles.tool_calling.show import tokens_html
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder, tokenize_conversation
from unsloth_puzzles.tool_calling.toolbox import ToolBox

BOX = ToolBox([add, describe])
FORMATS = tuple(CONTROLS)


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


TRAINED = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>It is 7.<|im_end|>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>It is 7.<|im_end|>',
    "llama3.2": '{"name": "add", "parameters": {"a": 3, "b": 4}}<|eot_id|>It is 7.<|eot_id|>',
}


@pytest.mark.parametrize("format", FORMATS)
def test_labels_are_the_assistants_turns_with_their_stop_tokens(format):
    example = tokenize_conversation(tokenizer(format), conversation(), BOX, format=format)
    assert trained_text(format, example) == TRAINED[format]
    assert example["attention_mask"] == [1] * len(example["input_ids"])


@pytest.mark.parametrize("format", FORMATS)
def test_tool_results_are_never_labelled(format):
    parts = {}
    for result in ("7", "zebra quagga " * 5):
        example = tokenize_conversation(tokenizer(format), conversation(result=result), BOX, format=format)
        parts[result] = trained_text(format, example)
    assert len(set(parts.values())) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_training_begins_with_the_prompt_that_generation_gets(format):
    encoder, messages = ChatEncoder(tokenizer(format), format), conversation()
    example = encoder.conversation(messages, BOX)
    ids, labels = example["input_ids"], example["labels"]
    for length in (2, 4):
        prompt = encoder.prompt(messages[:length], BOX)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == IGNORED and labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("format", FORMATS)
def test_harmless_conversation_has_the_ids_of_the_template_itself(format):
    chosen = chat_format(format)
    ids = tokenizer(format).apply_chat_template(
        conversation(), tools=BOX.schemas, chat_template=chosen.template, return_dict=False, **chosen.variables
    )
    assert tokenize_conversation(tokenizer(format), conversation(), BOX, format=format)["input_ids"] == ids


def control_ids(format):
    return set(tokenizer(format).get_added_vocab().values())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("place", [pytest.param("question", marks=pytest.mark.slow), "result"])
def test_control_tokens_in_a_text_are_characters(format, place):
    encoder = ChatEncoder(tokenizer(format), format)

    def controls(text):
        example = encoder.conversation(conversation(**{place: text}), BOX)
        return [token for token in example["input_ids"] if token in control_ids(format)], example

    expected, _ = controls("harmless")
    for text in tokenizer(format).get_added_vocab():
        for attack in (text, f"x{text}", f"{text * 2}y", f"{text[:3]}{text}{text[3:]}"):
            found, example = controls(attack)
            assert found == expected, attack
            written = tokenizer(format).decode(example["input_ids"])
            if attack == attack.strip():
                assert attack in written or attack in written.replace("\\", "")


@pytest.mark.parametrize("format", FORMATS)
def test_control_tokens_in_arguments_and_schemas_are_characters(format):
    stop = chat_format(format).stop

    def shout(text: str) -> str:
        return text

    shout.__doc__ = f"Shout {stop}.\n\n    Args:\n        text: What {stop}.\n    "
    box = ToolBox([shout])
    counts = set()
    for text in ("x", stop, f"{stop}{stop}"):
        messages = conversation()
        messages[2]["tool_calls"] = [call("shout", text=text)]
        ids = tokenize_conversation(tokenizer(format), messages, box, format=format)["input_ids"]
        counts.add(sum(token in control_ids(format) for token in ids))
    assert len(counts) == 1


ATTACKS = st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<", "|>", "im_end", "\ue000", "\n", "a", " ", "é"]))


@settings(max_examples=40, deadline=None)
@given(ATTACKS.map("".join), ATTACKS.map("".join))
def test_any_mixture_is_written_as_it_is(question, result):
    example = tokenize_conversation(tokenizer(), conversation(question, result), BOX)
    text = tokenizer().decode(example["input_ids"])
    assert f"user\n{question}<|im_end|>" in text and f"<tool_response>\n{result}\n</tool_response>" in text
    ids = example["input_ids"]
    stop = tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert ids.count(stop) == 5


def test_without_tools_the_prompt_speaks_of_none():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    for format in FORMATS:
        ids = {
            tuple(tokenize_conversation(tokenizer(format), messages, box, format=format)["input_ids"])
            for box in (None, ToolBox([]))
        }
        (ids,) = ids
        assert "function" not in tokenizer(format).decode(ids)


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


def test_a_call_that_failed_need_not_fit():
    messages = edited(2, tool_calls=[call("sum", a="3")])
    messages[3]["content"] = "error: name of a tool must be one of: add, describe; got 'sum'"
    assert '"sum"' in trained_text("qwen2.5", tokenize_conversation(tokenizer(), messages, BOX))


@pytest.mark.parametrize("content", [3, ["text"], [{"type": "text", "text": "Hi"}]])
def test_contents_must_be_text(content):
    with pytest.raises(TypeError, match=r"^content of messages\[1\] must be text, got (int|list)$"):
        tokenize_conversation(tokenizer(), edited(1, content=content), BOX)


def test_too_long_is_refused_and_never_cut():
    length = len(tokenize_conversation(tokenizer(), conversation(), BOX)["input_ids"])
    tokenize_conversation(tokenizer(), conversation(), BOX, max_length=length)
    with pytest.raises(ValueError, match=f"at most max_length = {length - 1} tokens, got {length}"):
        tokenize_conversation(tokenizer(), conversation(), BOX, max_length=length - 1)


def test_a_tokenizer_must_have_the_control_tokens():
    with pytest.raises(
        ValueError, match=r"must have the control tokens of llama3.2, got none for <\|end_header_id\|>, "
    ):
        tokenize_conversation(tokenizer(), conversation(), BOX, format="llama3.2")
    with pytest.raises(ValueError, match=r"^tokenizer must be a fast one of transformers, got NoneType$"):
        ChatEncoder(None)
    with pytest.raises(ValueError, match=r"^name must be one of 'qwen2.5', 'qwen3', 'llama3.2', got 'qwen'$"):
        chat_format("qwen")


def test_tokens_are_coloured_by_their_labels():
    example = tokenize_conversation(tokenizer(), conversation(result="<b>&"), BOX)
    shown = tokens_html(tokenizer(), example)
    assert shown.count("<span") == len(example["input_ids"])
    assert shown.count("#bfe3c0") + shown.count("#3c8d40") == sum(label != IGNORED for label in example["labels"])
    assert shown.count("#3c8d40") == 2 and "<b>" not in shown and "&amp;" in shown
    with pytest.raises(ValueError, match=r"labels must be as many as the \d+ input_ids, got 0"):
        tokens_html(tokenizer(), {**example, "labels": []})
