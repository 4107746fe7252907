"""Labels lie on what the assistant writes, and nothing that a user or a tool writes becomes a control token."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tool_calling.conversations import BOX, call, conversation, trained_text
from tests.tool_calling.functions import CONTROLS, tokenizer
from unsloth_puzzles.tool_calling.formats import chat_format
from unsloth_puzzles.tool_calling.show import tokens_html
from unsloth_puzzles.tool_calling.tokens import IGNORED, ChatEncoder, tokenize_conversation
from unsloth_puzzles.tool_calling.toolbox import ToolBox

FORMATS = tuple(CONTROLS)

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


@pytest.mark.parametrize("format", FORMATS)
def test_added_tokens_that_are_words_are_those_of_the_template_itself(format):
    chosen, extended = chat_format(format), copy.deepcopy(tokenizer(format))
    extended.add_tokens(["Zürich", "  ", "<city>"])
    messages = [{"role": "user", "content": "In Zürich  now?"}, {"role": "assistant", "content": "Zürich, yes."}]
    ids = extended.apply_chat_template(messages, chat_template=chosen.template, return_dict=False, **chosen.variables)
    example = tokenize_conversation(extended, messages, format=format)
    word, spaces, city = extended.convert_tokens_to_ids(["Zürich", "  ", "<city>"])
    assert example["input_ids"] == ids and ids.count(word) == 2 and spaces in ids
    assert example["labels"].count(word) == 1
    messages[0]["content"] = "What is <city>?"
    assert city not in tokenize_conversation(extended, messages, format=format)["input_ids"]
