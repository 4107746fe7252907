"""Read a row of a data set: its images, its rendered text, and the spans of the assistant's turns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from unsloth_puzzles.vision.endings import check_marks, check_text, render_endings
from unsloth_puzzles.vision.images import decode
from unsloth_puzzles.vision.template import has_marks, render, template_of


@dataclass
class Conversation:
    """A rendered row. `spans` holds [start, end) in characters of `text`: the assistant's turns, or all text."""

    text: str
    images: list
    spans: list[tuple[int, int]]


def read(row: Mapping, where: str, processor, assistant_only: bool) -> Conversation:
    """Render a row by the processor's chat template.

    Args:
        row: "messages", and optionally "images" (a list), "image" (one) and "tools". Images may also stand in the
            messages, as in {"type": "image", "image": ...}. See `images.decode` for their types. Keys whose value is
            None are left out, for Arrow adds them where other rows have such a key. Arguments of a call that are null
            must be given as JSON text.
        where: Name of the row in error messages.
        processor: The processor of a vision-language model; its chat template renders the messages.
        assistant_only: Whether `spans` holds only the assistant's turns.

    Raises:
        ValueError: The row lacks messages, has a video or options of the template, or its placeholders and images
            differ in number; the template drops text or does not say where the assistant speaks, in any of its turns;
            an image cannot be decoded.
    """
    messages = [_clean(message, where) for message in _messages(row, where)]
    rescales = getattr(processor.image_processor, "do_rescale", True)
    images = [decode(image, where, rescales=rescales) for image in _images(row, messages, where)]
    tools = _without_none(row.get("tools")) or None
    if given := _without_none(row.get("chat_template_kwargs")):
        raise ValueError(f"{where} must have no chat_template_kwargs, which are not rendered, got {given!r:.80}")
    template = template_of(processor)
    text, marked = render(processor, template, messages, tools)
    endings = render_endings(processor, template, messages, tools)
    check_text(endings, text, where)
    if (placeholders := text.count(processor.image_token)) != len(images):
        raise ValueError(
            f"images of {where} must be as many as the placeholders {processor.image_token!r} in its rendered "
            f"messages ({placeholders}), got {len(images)}; add one {{'type': 'image'}} block per image"
        )
    if (video := getattr(processor, "video_token", None)) and video in text:
        raise ValueError(f"{where} must have no video, got its placeholder {video!r} in the rendered messages")
    if not assistant_only:
        spans = [(0, len(text))]
    elif has_marks(template):
        check_marks(endings, where)
        spans = marked
    else:
        spans = _spans_by_prefix(processor, template, messages, tools, text, where)
    return Conversation(text, images, spans)


def has_images(row: Mapping) -> bool:
    """Whether a row has an image, in its columns or in its messages."""
    messages = [_clean(message, "row") for message in _messages(row, "row")]
    return bool(_images(row, messages, "row"))


def _messages(row: Mapping, where: str) -> Sequence[Mapping]:
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        got = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"{where} must have a list of 'messages', got {got}; other formats must be converted to it")
    return messages


def _clean(message: Mapping, where: str) -> dict:
    """Copy a message without the None values that Arrow adds for the keys of other blocks, calls and arguments."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages of {where} must be dicts with 'role' and 'content', got {message!r:.60}")
    message = {
        key: value if key == "content" else _without_none(value) for key, value in message.items() if value is not None
    }
    content = message.get("content", "")
    if not isinstance(content, str):
        if not isinstance(content, (list, tuple)) or not all(isinstance(block, Mapping) for block in content):
            raise ValueError(
                f"content of {where} must be text or a list of blocks such as {{'type': 'text', 'text': ...}}, "
                f"got {content!r:.60}"
            )
        blocks = [{key: value for key, value in block.items() if value is not None} for block in content]
        kinds = {block.get("type") for block in blocks}
        if unknown := kinds - {"text", "image"}:
            raise ValueError(
                f"{where} must have blocks of type 'text' and 'image' only, got {sorted(map(str, unknown))}"
            )
        message["content"] = blocks
    return message


def _without_none(value: object) -> object:
    """Copy JSON without the keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, (list, tuple)) else value


def _images(row: Mapping, messages: list[dict], where: str) -> list:
    """The images of a row, in the order of the placeholders. Those in the messages are taken out of them."""
    inline = []
    for message in messages:
        for block in message["content"] if isinstance(message.get("content"), list) else ():
            if block["type"] == "image":
                inline += [block.pop(key) for key in ("image", "url", "path") if key in block]
    one, several = row.get("image"), row.get("images")
    if several is not None and not isinstance(several, (list, tuple)):
        raise ValueError(f"images of {where} must be a list, got {type(several).__name__}; use 'image' for one")
    columns = [*(several or ()), *(() if one is None else (one,))]
    if (one is not None) + bool(several) + bool(inline) > 1:
        raise ValueError(f"{where} must have its images in one place, got several of 'images', 'image' and messages")
    if any(image is None for image in columns):
        raise ValueError(f"images of {where} must be images, got None among them; leave it out")
    return columns or inline


def _spans_by_prefix(processor, template, messages, tools, text, where) -> list[tuple[int, int]]:
    """Find the assistant's messages without marks: each begins where the rendering of all before it ends."""
    ends = tuple(processor.tokenizer.all_special_tokens)
    spans = []
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        if index:
            before = render(processor, template, messages[:index], tools, prompt=True)[0]
        else:
            before = _before_first(processor, template, message, tools)
        after = render(processor, template, messages[: index + 1], tools)[0]
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"processor must have a chat template that renders the messages of {where} one after the other to find "
                f"the assistant's, got one that renders message {index} otherwise when others follow; put "
                "{% generation %} marks into it, or use assistant_only=False"
            )
        said = after[len(before) :]
        if said.rstrip().endswith(ends):  # nobody generates what follows the end of a turn
            said = said.rstrip()
        spans.append((len(before), len(before) + len(said)))
    return spans


def _before_first(processor, template: str, message: dict, tools) -> str:
    """The text before a first message's content, such as a system prompt: the common prefix of two renderings."""
    blocks = isinstance(message.get("content"), list)
    bare = {"role": message["role"]}  # calls of tools may stand in the place of the content
    one, other = (
        render(processor, template, [{**bare, "content": [{"type": "text", "text": said}] if blocks else said}], tools)[
            0
        ]
        for said in ("0", "1")
    )
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
