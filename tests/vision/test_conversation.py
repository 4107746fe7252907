"""Templates of many styles: the assistant is found, and what a template would drop or print raw is refused."""

import pytest
from datasets import Dataset

from benchmarks.vision.checks import ONE, TEXT, TURNS, assistant, row, user
from tests.vision.models import EVERY, family, fresh
from unsloth_puzzles.vision.collator import IGNORE_INDEX, VisionCollator
from unsloth_puzzles.vision.conversation import read
from unsloth_puzzles.vision.template import render

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


# As Qwen's, for blocks only.
CHAT_BLOCKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for b in m.content %}{% if b.type == 'image' %}IMAGE{% elif b.type == 'text' %}{{ b.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("question, answer", [("Answer yes or no.", "yes"), ("A, B or C?", "B"), ("What is it?", "a")])
def test_a_dropped_text_whose_characters_stand_elsewhere_is_refused(name, question, answer):
    processor, _ = fresh(name)
    image = processor.image_token
    processor.chat_template = CHAT_BLOCKS.replace("IMAGE", image)
    blocks = row(user(None, question), assistant(answer), images=[(56, 56)])
    assert _spans(processor, blocks) == [f"{answer}<|im_end|>"]
    string = {**blocks, "messages": [blocks["messages"][0], {"role": "assistant", "content": answer}]}
    with pytest.raises(ValueError, match=f"renders all text of row 0, got one that drops '{answer}'; give the content"):
        read(string, "row 0", processor, True)


def test_a_dropped_system_message_that_the_user_repeats_is_refused():
    processor = _with(CHAT_BLOCKS)
    turns = [user("Be brief. What is a class?"), assistant("A template.")]
    with pytest.raises(
        ValueError, match=r"renders all text of row 3, got one that drops 'Be brief\.'; give the content"
    ):
        read({"messages": [{"role": "system", "content": "Be brief."}, *turns]}, "row 3", processor, False)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert _spans(processor, {"messages": [system, *turns]}) == ["A template.<|im_end|>"]


def test_a_system_message_may_be_rendered_after_other_messages():
    """As Mistral's templates do, in the last message of the user."""
    chat_template = (
        "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST]"
        "{% if loop.revindex <= 2 %}{{ system }} {% endif %}{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    said = ["Be brief.", "Hello", "Good day.", "Be brief.", "I am."]
    roles = ["system", "user", "assistant", "user", "assistant"]
    given = {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]}
    assert "[INST]Be brief. Be brief.[/INST]" in read(given, "row 0", _with(chat_template), False).text


def test_thoughts_that_a_template_takes_apart_are_no_dropped_text():
    chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if '</think>' in m.content %}<think>\n"
        "{{ m.content.split('</think>')[0].split('<think>')[-1] }}\n</think>\n\n"
        "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    answer = {"role": "assistant", "content": "<think>two</think>\n2"}
    given = {"messages": [{"role": "user", "content": "1 + 1?"}, answer]}
    assert _spans(_with(chat_template), given) == ["assistant: <think>\ntwo\n</think>\n\n2"]


def test_a_template_that_depends_on_the_end_of_a_text():
    """A character after the text changes what else is rendered, so it decides nothing."""
    chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '' if m.content.endswith('?') else ' END' }}\n{% endfor %}"
    )
    given = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "I see."}]}
    assert _spans(_with(chat_template), given) == ["I see. END\n"]
    with pytest.raises(ValueError, match=r"got one that drops 'I see\.'; give the content as blocks"):
        _spans(_with(chat_template.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")), given)


MARKED = "{% generation %}{{ m.content[-1].text }}{% endgeneration %}"
LATE = "{% for m in messages %}{% if loop.index > 2 and m.role == 'assistant' %}" + MARKED + "{% else %}"
LATE += "{{ m.content[-1].text }}{% endif %}\n{% endfor %}"


def test_a_row_without_marks_is_refused_also_beside_others():
    processor = _with(LATE)
    two = row(user("Hello"), user("Are you well?"), assistant("I am."))
    assert _spans(processor, two) == ["I am."]
    with pytest.raises(ValueError, match="marks what the assistant says in row 1, got one that marks nothing there"):
        VisionCollator(processor)([two, TEXT])
    batch = VisionCollator(processor)([two, row(user("Hello"))])  # nobody speaks in the second row
    assert (batch["labels"] != IGNORE_INDEX).any(1).tolist() == [True, False]
    read(TEXT, "row 1", processor, False)


@pytest.mark.parametrize("first, last", [("Good day.", "I see."), ("yes", "yes"), ("yes", "yes, I do")])
@pytest.mark.parametrize("chat_template", [LATE, LATE.replace("\n", "{{ ' END' if m.content[-1].text[-1] == '.' }}\n")])
def test_a_turn_without_marks_is_refused_beside_a_turn_that_has_some(chat_template, first, last):
    turns = row(user("Hello"), assistant(first), user("Why?"), assistant(last))
    with pytest.raises(ValueError, match=f"the assistant says in row 0, got one that leaves out '{first}'; put {{%"):
        read(turns, "row 0", _with(chat_template), True)
    everywhere = _with(chat_template.replace("loop.index > 2 and ", ""))
    assert _spans(everywhere, turns) == [first, last]
    assert len(read(turns, "row 0", _with(chat_template), False).spans) == 1


def test_calls_without_marks_are_refused():
    chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    said = {"role": "user", "content": "Find it."}, {"role": "assistant", "content": "I have it."}
    with pytest.raises(ValueError, match="the assistant says in row 0, got one that leaves out 'search'; put"):
        read({"messages": [said[0], CALL, said[1]]}, "row 0", _with(chat_template), True)
    with pytest.raises(ValueError, match="the assistant says in row 0, got one that marks nothing there; put"):
        read(
            {"messages": [said[0], CALL]},
            "row 0",
            _with(chat_template.replace("{{ m.content }}{% endg", "{% endg")),
            True,
        )
    flat = chat_template.replace("c.function | tojson", "c.name")
    with pytest.raises(ValueError, match="the assistant says in row 0, got one that leaves out 'search'; put"):
        call = {**CALL, "tool_calls": [{"name": "search", "function": None}]}
        read({"messages": [said[0], call, said[1]]}, "row 0", _with(flat), True)
    around = chat_template.replace("{% endgeneration %}", "").replace("{% else %}", "{% endgeneration %}{% else %}")
    assert _spans(_with(around), {"messages": [said[0], CALL, said[1]]}) == ['{"name": "search"}', "I have it."]


def test_marks_cost_no_rendering_of_their_own(monkeypatch):
    """A row is rendered to train on, and once more to see where its texts end, however many turns it has."""
    from unsloth_puzzles.vision import conversation, endings

    rendered = []

    def counted(*arguments, **options):
        rendered.append(arguments)
        return render(*arguments, **options)

    for module in (conversation, endings):
        monkeypatch.setattr(module, "render", counted)
    processor, _ = family("qwen2_vl")
    VisionCollator(processor)([ONE, TEXT, TURNS])
    assert len(rendered) == 2 * 3


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


def test_keys_that_arrow_fills_with_none_in_calls_and_tools_are_left_out():
    """Arrow gives all structs of a column the keys of each: the model would learn arguments that nobody wrote."""
    template = (
        "{{ tools | tojson }}{% for m in messages %}<s>{% for c in m.tool_calls or [] %}{{ c.function | tojson }}"
        "{% endfor %}{{ m.content }}</s>{% endfor %}"
    )

    def a_row(name: str, argument: str) -> dict:
        call = {"type": "function", "function": {"name": name, "arguments": {argument: 1}}}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": {argument: {"type": "x"}}}}}
        messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": messages, "tools": [tool]}

    rows = [a_row("f", "x"), a_row("g", "y")]
    stored = Dataset.from_list(rows)
    assert stored[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "y": None}
    for given, back in zip(rows, stored, strict=True):
        texts = [read(one, "row 0", _with(template), False).text for one in (given, back)]
        assert texts[0] == texts[1] and "null" not in texts[0]


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
