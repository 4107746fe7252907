"""The chat template of a processor, and rendering messages by it."""

import re
from collections.abc import Mapping

_MARKER = re.compile(r"{%-?\s*generation\s*-?%}")


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
