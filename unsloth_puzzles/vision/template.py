"""The chat template of a processor: rendering messages by it, and whether it drops any text."""

import re
from collections.abc import Mapping

_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")
_SPEAKERS = ("system", "user", "assistant")  # results of tools may be rendered as JSON
_PRIVATE_USE = 0xF0000  # the first of 65534 characters that no text has


def template_of(processor) -> str:
    """The text of a processor's chat template; ValueError without one."""
    template = getattr(processor, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise ValueError("processor must have a chat template, got none; set processor.chat_template")
    return template


def has_marks(template: str) -> bool:
    """Whether a template marks what the assistant says, by {% generation %}."""
    return bool(_MARKER.search(template))


def render(processor, template: str, messages: list[dict], tools, prompt: bool = False) -> tuple[str, list]:
    """Render messages.

    Args:
        processor: Whose tokenizer has the special tokens.
        template: Of `template_of`.
        messages: In the form of the template.
        tools: Their JSON schemas, or None.
        prompt: Whether the beginning of the assistant's turn follows.

    Returns:
        The text, and [start, end) in characters between the template's {% generation %} marks.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=has_marks(template),
        add_generation_prompt=prompt,
        **processor.tokenizer.special_tokens_map,
    )
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def check_text(processor, template: str, text: str, messages: list[dict], tools, where: str) -> None:
    """Refuse a template that drops a text or prints blocks as they are.

    Templates that expect blocks drop a plain string, and templates that expect a string print blocks. The characters of
    a dropped text may occur elsewhere, as "yes" in "Answer yes or no.". A second rendering therefore has a unique
    character after each text. It decides, unless it differs from the first in anything else.
    """
    packed, ended, parts = _packed(text), [], []

    def end(message: dict, said: str) -> str:
        if not said.strip():
            return said
        parts.append((message, said, chr(_PRIVATE_USE + len(parts))))
        return said + parts[-1][-1]

    for message in messages:
        content = message.get("content")
        if content is not None and message.get("role") in _SPEAKERS:
            if isinstance(content, str):
                content = end(message, content)
            else:
                content = [{**b, "text": end(message, b["text"])} if b.get("text") else b for b in content]
        ended.append({**message, "content": content} if content is not None else message)
    rendered = _packed(render(processor, template, ended, tools)[0])
    exact = rendered.translate({ord(last): None for *_, last in parts}) == packed
    for message, said, last in parts:
        string = isinstance(message["content"], str)
        if not string and f"'text':{_packed(repr(said))}" in packed:
            raise ValueError(
                f"processor must have a chat template that renders blocks as text in {where}, got one that prints "
                f"the blocks of {message.get('role')!r} as they are; give this content as a string"
            )
        if (_packed(said) + last not in rendered) if exact else (_packed(said) not in packed):
            raise ValueError(
                f"processor must have a chat template that renders all text of {where}, got one that drops "
                f"{said[:40]!r}; give the content as {'blocks' if string else 'a string'}"
            )


def _packed(text: str) -> str:
    """The text without whitespace, which templates may change."""
    return "".join(text.split())
