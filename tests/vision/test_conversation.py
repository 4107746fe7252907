"""Templates of many styles: the assistant is found, and what a template would drop or print raw is refused."""

import pytest

from benchmarks.vision.checks import ONE, TEXT, TURNS, assistant, row, user
from tests.vision.models import family, fresh
from unsloth_puzzles.vision.conversation import read

STRING = "{{ m.content if m.content is string else m.content[-1].text }}"
BLOCKS = "{% for b in m.content %}{{ '<image>' if b.type == 'image' else b.text }}{% endfor %}"
# As LLaVA 1.5 writes it: words for the roles, blocks only.
WORDS = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for b in m.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for b in m.content | selectattr('type', 'equalto', 'text') %}{{ b.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# As Mistral's: a turn of the user closes itself, and there is no prompt for an answer.
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]" + BLOCKS + "[/INST]"
    "{% else %}" + BLOCKS + "</s>{% endif %}{% endfor %}"
)
SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ 'Be brief. ' if loop.last or loop.revindex == 2 }}"
    + BLOCKS
    + "[/INST]{% elif m.role == 'assistant' %}"
    + BLOCKS
    + "</s>{% endif %}{% endfor %}"
)


def _with(chat_template: str):
    processor, _ = fresh("llava")
    processor.chat_template = chat_template
    return processor


def _spans(processor, given) -> list[str]:
    found = read(given, "row 0", processor, True)
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize(
    "chat_template, said",
    [(WORDS, ["Good day. ", "I see. "]), (BRACKETS, ["Good day.</s>", "I see.</s>"])],
)
def test_assistant_is_found_without_marks(chat_template, said):
    found = _spans(_with(chat_template), TURNS)
    assert [part.lstrip() for part in found] == said


# As Qwen's: a prompt of the system that no message gave, and tools in it.
SYSTEM_FIRST = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s><|im_start|>system\nYou are Hello, an AI."
    "{% for t in tools or [] %} {{ t.function.name }}{% endfor %}<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}" + BLOCKS + "{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "search"}}]}


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "search"}}]])
@pytest.mark.parametrize(
    "first, said",
    [
        (assistant("Hello"), "Hello<|im_end|>\n"),
        ({"role": "assistant", "content": "Hello"}, "Hello<|im_end|>\n"),
        ({"role": "assistant", "content": "0"}, "0<|im_end|>\n"),
        (CALL, "<call>search</call><|im_end|>\n"),
        ({key: value for key, value in CALL.items() if key != "content"}, "<call>search</call><|im_end|>\n"),
    ],
)
def test_nothing_before_a_first_turn_of_the_assistant_is_its_own(first, said, tools):
    rows = {"messages": [first, user("Hello"), assistant("I see.")], "tools": tools}
    found = _spans(_with(SYSTEM_FIRST), rows)
    assert [part.rstrip() for part in found] == [said.rstrip(), "I see.<|im_end|>"]
    alone = _spans(_with(SYSTEM_FIRST), {"messages": [first], "tools": tools})
    assert [part.rstrip() for part in alone] == [said.rstrip()]


def test_a_first_turn_of_the_assistant_in_other_templates():
    rows = {"messages": [assistant("Hello"), user("Good day."), assistant("I see.")]}
    assert _spans(_with(WORDS), rows) == ["Hello ", " I see. "]
    assert _spans(_with(BRACKETS), rows) == ["Hello</s>", "I see.</s>"]
    calls = "<s>{% for m in messages %}{{ '<call>' if m.tool_calls else m.content }}</s>{% endfor %}"
    assert _spans(_with(calls), {"messages": [CALL]}) == ["<call></s>"]


def test_a_first_turn_that_changes_what_stands_before_it_is_refused():
    """A prompt of the system that depends on what follows it, so nothing says where the assistant begins."""
    processor = _with("{{ messages[0].content | length }}: {% for m in messages %}{{ m.content }}\n{% endfor %}")
    rows = {"messages": [{"role": "assistant", "content": "Good day."}]}
    with pytest.raises(ValueError, match=r"processor must have a chat template that renders the messages of row 0 one"):
        _spans(processor, rows)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    processor = _with(SYSTEM_LAST)
    assert _spans(processor, ONE) == ["A function of two arguments.</s>"]
    with pytest.raises(ValueError, match=r"processor must have a chat template that renders the messages of row 0 one"):
        _spans(processor, TURNS)
    assert read(TURNS, "row 0", processor, False).spans == [(0, len(read(TURNS, "row 0", processor, False).text))]


def test_a_template_that_drops_text_is_refused():
    plain = {"messages": [{"role": "user", "content": "What is a class?"}, assistant("A template.")]}
    with pytest.raises(ValueError, match="got one that drops 'What is a class\\?'; give the content as blocks"):
        _spans(_with(WORDS), plain)


def test_a_template_that_prints_blocks_is_refused():
    processor = _with("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    plain = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}
    assert _spans(processor, plain) == ["assistant: Good day.\n"]  # it has no prompt for an answer
    with pytest.raises(ValueError, match="got one that prints the blocks of 'user' as they are; give this content as"):
        _spans(processor, TEXT)


def test_tools_reach_the_template():
    processor = _with("{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + WORDS)
    tool = {"type": "function", "function": {"name": "search", "description": "", "parameters": {}}}
    assert read({**TEXT, "tools": [tool]}, "row 0", processor, True).text.startswith("<search>USER")
    assert read(TEXT, "row 0", processor, True).text.startswith("USER")


def test_keys_that_arrow_fills_with_none_are_left_out():
    """Templates ask whether a block has a key, as those of Qwen do."""
    processor = _with(WORDS.replace("{{ b.text }}", "{{ b.text }}{% if 'image' in b %} AN IMAGE{% endif %}"))
    said = {"type": "text", "text": "Hello", "image": None}
    given = {"messages": [{"role": "user", "content": [said], "tool_calls": None}, assistant("Good day.")]}
    assert read(given, "row 0", processor, True).text == "USER: Hello ASSISTANT: Good day. "


def test_results_of_tools_may_be_rendered_as_json():
    template = "{% for m in messages %}{{ m.content | tojson if m.role == 'tool' else m.content }}\n{% endfor %}"
    result = {"role": "tool", "content": 'a "quoted" word'}
    given = {"messages": [result, {"role": "assistant", "content": "Good."}]}
    assert _spans(_with(template), given) == ["Good.\n"]


def test_default_of_several_templates():
    processor, _ = fresh("llava")
    processor.chat_template = {"default": WORDS, "other": "nothing"}
    assert _spans(processor, TEXT)[0].lstrip() == TEXT["messages"][1]["content"][0]["text"] + " "


def test_spans_are_characters_of_the_text_with_several_turns():
    processor, _ = family("qwen2_vl")
    given = row(user("1"), assistant("one"), user("2"), assistant("two"), user("3"), assistant("three"))
    assert _spans(processor, given) == ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
