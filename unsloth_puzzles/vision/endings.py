"""What a chat template drops, and what it leaves unmarked, by a rendering that shows where each text ends.

The characters of a text may occur elsewhere in its rendered messages, as "yes" in "Answer yes or no.". The messages are
therefore rendered a second time, with a unique character after each text. The first rendering is the one to train on: a
template may ask how a text ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from unsloth_puzzles.vision.template import render

_SPEAKERS = ("system", "user", "assistant")  # results of tools may be rendered as JSON
_PRIVATE_USE = 0xF0000  # the first of 65534 characters that no text has


@dataclass
class Ending:
    """A text of a message, or the name of a function that it calls, and the character put after it."""

    message: dict
    said: str
    character: str


@dataclass
class Endings:
    """The second rendering, with [start, end) in characters of `text` between the template's marks."""

    text: str
    spans: list[tuple[int, int]]
    texts: list[Ending]
    calls: list[Ending]


def render_endings(processor, template: str, messages: list[dict], tools) -> Endings:
    """Render messages as `render` does, with a unique character after each text and each call of the assistant."""
    texts, calls, ended = [], [], []

    def end(message: dict, said: str, group: list[Ending]) -> str:
        if not said.strip():
            return said
        group.append(Ending(message, said, chr(_PRIVATE_USE + len(texts) + len(calls))))
        return said + group[-1].character

    def end_call(message: dict, call: object) -> object:
        if not isinstance(call, Mapping):
            return call
        if call.get("function"):
            return {**call, "function": end_call(message, call["function"])}
        return {**call, "name": end(message, call["name"], calls)} if call.get("name") else call

    for message in messages:
        changed, content = {}, message.get("content")
        if content is not None and message.get("role") in _SPEAKERS:
            if isinstance(content, str):
                changed["content"] = end(message, content, texts)
            else:
                changed["content"] = [
                    {**block, "text": end(message, block["text"], texts)} if block.get("text") else block
                    for block in content
                ]
        if message.get("role") == "assistant" and message.get("tool_calls"):
            changed["tool_calls"] = [end_call(message, call) for call in message["tool_calls"]]
        ended.append({**message, **changed})
    return Endings(*render(processor, template, ended, tools), texts, calls)


def check_text(endings: Endings, text: str, where: str) -> None:
    """Refuse a template that drops a text or prints blocks as they are.

    Templates that expect blocks drop a plain string, and templates that expect a string print blocks. The second
    rendering decides, unless it differs from the first, `text`, in anything but the characters.
    """
    packed, rendered = _packed(text), _packed(endings.text)
    exact = rendered.translate({ord(one.character): None for one in endings.texts + endings.calls}) == packed
    for one in endings.texts:
        string, said = isinstance(one.message["content"], str), _packed(one.said)
        if not string and f"'text':{_packed(repr(one.said))}" in packed:
            raise ValueError(
                f"processor must have a chat template that renders blocks as text in {where}, got one that prints "
                f"the blocks of {one.message.get('role')!r} as they are; give this content as a string"
            )
        if (said + one.character not in rendered) if exact else (said not in packed):
            raise ValueError(
                f"processor must have a chat template that renders all text of {where}, got one that drops "
                f"{one.said[:40]!r}; give the content as {'blocks' if string else 'a string'}"
            )


def check_marks(endings: Endings, where: str) -> None:
    """Refuse {% generation %} marks that leave out a turn of the assistant: it would have no labels."""
    marked = "".join(endings.text[start:end] for start, end in endings.spans)
    rendered_calls = [one for one in endings.calls if one.character in endings.text]
    for one in endings.texts + rendered_calls:
        if one.message.get("role") == "assistant" and one.character not in marked:
            left_out = f"leaves out {one.said[:40]!r}" if marked else "marks nothing there"
            raise ValueError(
                f"processor must have a chat template that marks what the assistant says in {where}, got one that "
                f"{left_out}; put {{% generation %}} marks around its content, or use assistant_only=False"
            )


def _packed(text: str) -> str:
    """The text without whitespace, which templates may change."""
    return "".join(text.split())
