"""Check a conversation before a template renders it: templates drop or mis-write what they do not expect, silently."""

import json
from typing import NamedTuple

from unsloth_puzzles.tool_calling.arguments import checked_arguments
from unsloth_puzzles.tool_calling.formats import ChatFormat
from unsloth_puzzles.tool_calling.replies import parsed_json

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("role", "content", "tool_calls", "name", "tool_call_id")


class _Call(NamedTuple):
    name: str
    arguments: dict
    id: object


def checked_messages(messages: list[dict], schemas: list[dict], format: ChatFormat) -> list[dict]:
    """A copy of a conversation in the one form that every template writes alike.

    A content of None becomes "". Arguments that are JSON text (as OpenAI has them) become objects. Each call must fit
    its schema, unless the result that answers it is an error ("error: ..."). Results answer the calls of the turn
    before in their order.

    Args:
        messages: Dicts with "role", "content" and, of an assistant, "tool_calls".
        schemas: Of the tools on offer.
        format: The chat format.

    Raises:
        TypeError: `messages` is no list of dicts, or a content is no text.
        ValueError: A role or a key is unknown or out of place, a call does not fit its schema, a result answers no call
            or another one, or the format cannot write what a turn holds.
    """
    check_dicts(messages)
    if not messages or not any(message.get("role") == "user" for message in messages):
        raise ValueError(f"messages must contain a user's, got {[message.get('role') for message in messages]}")
    parameters = {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}
    checked, unanswered = [], []
    for number, message in enumerate(messages):
        where, role = f"messages[{number}]", message.get("role")
        content = _checked_content(where, number, message)
        if role == "tool":
            _check_answered(where, unanswered, message, content, parameters)
        elif unanswered:
            raise ValueError(f"{where} must be a tool's result for {unanswered[0].name}, got the role {role!r}")
        one = {"role": role, "content": content}
        if message.get("tool_calls"):
            unanswered = [_call(where, call) for call in message["tool_calls"]]
            _check_turn(where, role, content, unanswered, format)
            one["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in unanswered
            ]
        checked.append(one)
    for call in unanswered:
        _check_fits("messages", call, parameters)
    return checked


def check_nulls(messages: list[dict]) -> None:
    """Refuse a None in the arguments of calls, unless they are JSON text.

    `datasets` fills arguments that a row lacks with None, where other rows have them. The null of a model is not told
    from it, and would be learnt.

    Raises:
        ValueError: Arguments that are a dict hold a None, at whatever depth.
    """
    for number, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            if (key := _null_in(function.get("arguments"))) is not None:
                raise ValueError(
                    f"arguments of {function.get('name')} in messages[{number}] must be JSON text to hold null, got a "
                    f"dict with None for {key!r}, which datasets may have filled in; leave it out, or give "
                    "json.dumps(arguments)"
                )


def _null_in(value: object) -> str | None:
    """The key of a None in dicts and lists in each other; None where there is none."""
    for key, one in value.items() if isinstance(value, dict) else ():
        if one is None:
            return str(key)
        if (found := _null_in(one)) is not None:
            return found
    for one in value if isinstance(value, list) else ():
        if (found := _null_in(one)) is not None:
            return found
    return None


def check_dicts(messages: object) -> None:
    """Raise TypeError unless `messages` is a list of dicts."""
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, dict):
            raise TypeError(f"messages must be a list of dicts, got {type(message).__name__} in the list")


def _checked_content(where: str, number: int, message: dict) -> str:
    role = message.get("role")
    if role not in ROLES or (role == "system" and number):
        raise ValueError(f"{where} must have the role of one of {', '.join(ROLES)} (system: first), got {role!r}")
    if unknown := [key for key, value in message.items() if key not in KEYS and value is not None]:
        raise ValueError(f"{where} must have no keys but {', '.join(KEYS)}, got {unknown[0]}, which would be dropped")
    content = "" if message.get("content") is None else message["content"]
    if not isinstance(content, str):
        raise TypeError(f"content of {where} must be text, got {type(content).__name__}")
    return content


def _check_answered(where: str, unanswered: list[_Call], message: dict, content: str, parameters: dict) -> None:
    """Take the call that this result answers off the list, and check it, unless the result says that it failed.

    A result that answers no call follows a call that could not be read: then it must be an error, too.
    """
    failed = content.startswith("error: ")
    if not unanswered:
        if not failed:
            raise ValueError(f"{where} must answer a tool call, got none before it")
        return
    call = unanswered.pop(0)
    for key, expected in (("name", call.name), ("tool_call_id", call.id)):
        if None not in (found := message.get(key), expected) and found != expected:
            raise ValueError(
                f"{where} must answer the call {expected!r}, got {key} {found!r}; put results in the order of the calls"
            )
    if not failed:
        _check_fits(where, call, parameters)


def _check_fits(where: str, call: _Call, parameters: dict[str, dict]) -> None:
    if call.name not in parameters:
        raise ValueError(f"{where} must call tools on offer ({', '.join(parameters) or 'none'}), got {call.name!r}")
    try:
        checked_arguments(call.name, parameters[call.name], call.arguments)
    except ValueError as refusal:
        hint = "; datasets fills absent arguments with None unless on_mixed_types='use_json'"
        raise ValueError(
            f"{where} must have calls that fit their schemas, got one that does not: {refusal}"
            f"{hint if None in call.arguments.values() else ''}"
        ) from None


def _check_turn(where: str, role: str, content: str, calls: list[_Call], format: ChatFormat) -> None:
    if role != "assistant":
        raise ValueError(f"{where} must be an assistant's to hold tool calls, got the role {role!r}")
    if format.calls_per_turn is not None and len(calls) > format.calls_per_turn:
        raise ValueError(
            f"{where} must have at most {format.calls_per_turn} tool call with {format.name}, got {len(calls)}; "
            "write them in turns of their own"
        )
    if content and format.calls_per_turn is not None:
        raise ValueError(f"{where} must have no content beside a tool call with {format.name}, got {content!r:.60}")


def _call(where: str, call: object) -> _Call:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool calls of {where} must be {{'function': {{'name', 'arguments'}}}}, got {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parsed_json(arguments)
        except ValueError as error:
            raise ValueError(
                f"arguments in {where} must be an object or its JSON, got {arguments!r:.60}: {error}"
            ) from None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments in {where} must be an object, got {type(arguments).__name__}")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"arguments in {where} must be values of JSON, got some that are not: {error}") from None
    return _Call(function["name"], arguments, call.get("id"))
