"""Read the tool calls of a reply. A call that cannot be read is an error for the model, not an answer."""

import json
import math
import re
from typing import NamedTuple

MAX_CALLS = 8  # in one reply
MAX_LEVELS = 50  # of lists and objects in each other: a template writes them by recursion


class Call(NamedTuple):
    """A call as the model wrote it: not yet checked against any schema."""

    name: str
    arguments: dict


class Reply(NamedTuple):
    """A reply of the model.

    Attributes:
        content: What it says beside its calls; all of the text where a call could not be read.
        calls: In the order written. Empty where there is an error.
        error: Why a call could not be read, or an empty text.
    """

    content: str
    calls: tuple[Call, ...] = ()
    error: str = ""


def read_tagged(text: str) -> Reply:
    """Read a reply in the format of Qwen: each call is JSON between `<tool_call>` and `</tool_call>`."""
    if "<tool_call>" not in text and "</tool_call>" not in text:
        return Reply(text.strip())
    content, *rest = text.split("<tool_call>")
    calls = []
    for body in rest:
        inside, closed, after = body.partition("</tool_call>")
        if not closed:
            return Reply(text, error="a tool call must end with </tool_call>, got none")
        if after.strip():
            return Reply(text, error=f"nothing must follow a tool call but another, got {after.strip()!r:.60}")
        try:
            calls.append(_call(inside, "arguments"))
        except ValueError as refusal:
            return Reply(text, error=str(refusal))
    if "</tool_call>" in content:
        return Reply(text, error="a tool call must begin with <tool_call>, got </tool_call> alone")
    return _bounded(text, content.strip(), calls)


def read_bare(text: str) -> Reply:
    """Read a reply in the format of Llama 3.1 and 3.2: a call is all of the reply, JSON with name and parameters."""
    stripped = text.strip()
    if not re.match(r"(<\|python_tag\|>)?\s*\{", stripped):
        return Reply(stripped)
    try:
        return Reply("", (_call(stripped.removeprefix("<|python_tag|>"), "parameters"),))
    except ValueError as refusal:
        return Reply(text, error=str(refusal))


def _bounded(text: str, content: str, calls: list[Call]) -> Reply:
    if len(calls) > MAX_CALLS:
        return Reply(text, error=f"a reply must have at most {MAX_CALLS} tool calls, got {len(calls)}")
    return Reply(content, tuple(calls))


def _call(text: str, key: str) -> Call:
    form = f'a tool call must be one JSON object {{"name": ..., "{key}": {{...}}}}'
    try:
        found = parsed_json(text)
    except ValueError as error:
        raise ValueError(f"{form}, got invalid JSON: {error}") from None
    if not isinstance(found, dict) or set(found) != {"name", key}:
        raise ValueError(f"{form}, got {sorted(found) if isinstance(found, dict) else type(found).__name__}")
    if not isinstance(found["name"], str) or not isinstance(found[key], dict):
        raise ValueError(f"{form}, got name {found['name']!r:.40} and {key} {found[key]!r:.40}")
    return Call(found["name"], found[key])


def parsed_json(text: str) -> object:
    """The value of a JSON text, which can be written again as it is.

    Args:
        text: What `json.loads` takes.

    Raises:
        ValueError: It is no JSON, a number is not finite, keys repeat, or it is nested too deeply.
    """
    try:
        found = json.loads(text, object_pairs_hook=_no_repeated_keys, parse_constant=_no_constant, parse_float=_finite)
        deep = _levels(found) > MAX_LEVELS
    except RecursionError:
        deep = True
    if deep:
        raise ValueError(f"values must be nested at most {MAX_LEVELS} levels deep, got more")
    json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is a text that nothing can write
    return found


def _levels(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inside), default=0)


def _no_repeated_keys(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    if len(keys) != len(set(keys)):
        raise ValueError(f"keys must differ, got {keys}")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"numbers must be finite, got {name}")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):  # 1e999
        raise ValueError(f"numbers must be finite, got {text:.40}")
    return value
