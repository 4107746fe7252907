"""Check a conversation before a template renders it: templates drop or mis-write what they do not expect, silently."""

import json

from unsloth_puzzles.tool_calling.arguments import checked_arguments
from unsloth_puzzles.tool_calling.formats import ChatFormat

ROLES = ("system", "user", "assistant", "tool")


def checked_messages(messages: list[dict], schemas: list[dict], format: ChatFormat) -> list[dict]:
    """A copy of a conversation in the one form that every template writes alike.

    A content of None becomes "". Arguments that are JSON text (as OpenAI has them) become objects. Each call must fit
    its schema, unless the result that answers it is an error; so arguments that `datasets` has filled with None are
    found.

    Args:
        messages: Dicts with "role", "content" and, of an assistant, "tool_calls".
        schemas: Of the tools on offer.
        format: The chat format.

    Raises:
        TypeError: `messages` is no list of dicts, or a content is no text.
        ValueError: A role is unknown or out of place, a call does not fit its schema, a result answers no call, or the
            format cannot write what a turn holds.
    """
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"messages must be a list of dicts, got {type(messages).__name__}")
    if not messages or not any(message.get("role") == "user" for message in messages):
        raise ValueError(f"messages must contain a user's, got {[message.get('role') for message in messages]}")
    parameters = {schema["function"]["name"]: schema["function"]["parameters"] for schema in schemas}
    checked, unanswered = [], []
    for number, message in enumerate(messages):
        where, role = f"messages[{number}]", message.get("role")
        if role not in ROLES or (role == "system" and number):
            raise ValueError(f"{where} must have the role of one of {', '.join(ROLES)} (system: first), got {role!r}")
        content = "" if message.get("content") is None else message["content"]
        if not isinstance(content, str):
            raise TypeError(f"content of {where} must be text, got {type(content).__name__}")
        if role == "tool":
            _check_answered(where, unanswered, content, parameters)
        elif unanswered:
            raise ValueError(f"{where} must be a tool's result for {unanswered[0][0]}, got the role {role!r}")
        one = {"role": role, "content": content}
        if calls := message.get("tool_calls"):
            unanswered = [_name_and_arguments(where, call) for call in calls]
            _check_turn(where, role, content, unanswered, format)
            one["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in unanswered
            ]
        checked.append(one)
    return checked


def _check_answered(where: str, unanswered: list[tuple], content: str, parameters: dict[str, dict]) -> None:
    """Take the call that this result answers off the list, and check it, unless the result says that it failed.

    A result that answers no call follows a call that could not be read: then it must be an error, too.
    """
    failed = content.startswith("error: ")
    if not unanswered:
        if not failed:
            raise ValueError(f"{where} must answer a tool call, got none before it")
        return
    name, arguments = unanswered.pop(0)
    if failed:
        return
    if name not in parameters:
        raise ValueError(f"{where} must answer a call of a tool on offer ({', '.join(parameters)}), got {name!r}")
    try:
        checked_arguments(name, parameters[name], arguments)
    except ValueError as refusal:
        raise ValueError(f"{where} must answer a call that fits its schema, got one that does not: {refusal}") from None


def _check_turn(where: str, role: str, content: str, calls: list[tuple], format: ChatFormat) -> None:
    if role != "assistant":
        raise ValueError(f"{where} must be an assistant's to hold tool calls, got the role {role!r}")
    if format.calls_per_turn is not None and len(calls) > format.calls_per_turn:
        raise ValueError(
            f"{where} must have at most {format.calls_per_turn} tool call with {format.name}, got {len(calls)}; "
            "write them in turns of their own"
        )
    if content and format.calls_per_turn is not None:
        raise ValueError(f"{where} must have no content beside a tool call with {format.name}, got {content!r:.60}")


def _name_and_arguments(where: str, call: object) -> tuple[str, dict]:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool calls of {where} must be {{'function': {{'name', 'arguments'}}}}, got {call!r:.80}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise ValueError(f"arguments in {where} must be an object or its JSON, got {arguments!r:.60}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments in {where} must be an object, got {type(arguments).__name__}")
    return function["name"], arguments
