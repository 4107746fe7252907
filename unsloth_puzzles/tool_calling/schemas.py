"""The JSON schema of a function, from its type hints and its docstring.

`transformers.utils.get_json_schema` reads the docstring. Hints are read here: its schema of `list[int] | str` is "array
or string" of whatever items, and a type that JSON lacks becomes "object".
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from unsloth_puzzles.tool_calling.arguments import checked_value

_PLAIN = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", dict: "object"}


def function_schema(function: Callable) -> dict:
    """The schema of a function, for a chat template's `tools`.

    A description may end with "(choices: [...])", as `get_json_schema` has it.

    Args:
        function: With a type hint and a line of its docstring's "Args:" for every parameter.

    Raises:
        TypeError: It is no function, or an asynchronous one.
        ValueError: A parameter has no type hint of JSON's types, no description, choices that do not fit its type, or
            cannot be given by name.
    """
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(f"functions must be functions, got {type(function).__name__}")
    name = function.__name__
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"functions must not be asynchronous, got {name}")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"parameters of {name} must be given by name, got {parameter}")
    hints = get_type_hints(function)
    _refuse_unknown(name, hints)  # before transformers, whose newer releases refuse some of them in other words
    schema = _from_transformers(name, function)
    properties = schema["function"]["parameters"]["properties"]
    if receiver := set(inspect.signature(function).parameters) - set(properties):  # transformers leaves it out
        raise ValueError(
            f"method {name} must be bound, got {receiver.pop()} among its parameters; give instance.{name}"
        )
    for parameter, described in properties.items():
        properties[parameter] = _described(f"{name}.{parameter}", _hint_schema(hints[parameter]), described)
    schema["function"].pop("return", None)  # no template shows it
    return schema


def _refuse_unknown(name: str, hints: dict[str, object]) -> None:
    for parameter, hint in hints.items():
        if parameter != "return" and (unknown := _unknown(hint)):
            names = ", ".join(sorted(each.__name__ if type(each) is type else str(each) for each in unknown))
            raise ValueError(
                f"type hints of {name} must be of JSON's types (list[int], not list), got {names} for {parameter}; "
                "write list[ITEM], tuple[ITEM, ITEM] or dict[str, VALUE]"
            )


def _from_transformers(name: str, function: Callable) -> dict:
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        return get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as refusal:
        raise ValueError(
            f"function must have type hints and a docstring with Args, got {name}: {refusal.args[0]}"
        ) from None
    except (TypeError, ValueError) as refusal:
        raise ValueError(f'choices of {name} must be a list in JSON, as (choices: ["a"]), got: {refusal}') from None


def _unknown(hint: object) -> set:
    """The parts of a hint that JSON lacks."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal or hint is Any:
        return set()
    if not parts:  # a list without the type of its items, too
        return set() if hint in _PLAIN else {hint}
    if origin not in (list, tuple, dict, Union, types.UnionType) or (origin is dict and parts[0] is not str):
        return {hint}
    return set().union(*map(_unknown, parts))


def _described(where: str, schema: dict, described: dict) -> dict:
    """The schema of a hint with the description, and with the choices that the description may hold."""
    schema = {**schema, "description": described["description"]}
    if (choices := described.get("enum")) is None:
        return schema
    if not choices:
        raise ValueError(f"choices of {where} must be at least one, got none")
    for choice in choices:
        try:
            checked_value(where, schema, choice)
        except ValueError as refusal:
            raise ValueError(f"choices of {where} must fit its type hint, got one that does not: {refusal}") from None
    if schema.get("nullable") and None not in choices:
        choices = [*choices, None]
    return {**schema, "enum": choices}


def _hint_schema(hint: object) -> dict:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal:
        values = [value for value in parts if value is not None]
        kinds = list(dict.fromkeys(_PLAIN[type(value)] for value in values))
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}
        return (_or_null(schema) if None in parts else schema) if values else {"type": "null"}
    if origin in (Union, types.UnionType):
        return _union([_hint_schema(part) for part in parts if part is not type(None)], type(None) in parts)
    if origin is list:
        return {"type": "array", "items": _hint_schema(parts[0])}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_hint_schema(part) for part in parts]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _hint_schema(parts[1])}
    return {"type": _PLAIN[hint]}


def _union(members: list[dict], optional: bool) -> dict:
    if len(members) == 1:
        (schema,) = members
    elif all(member.keys() == {"type"} for member in members):
        schema = {"type": sorted(member["type"] for member in members)}
    else:  # a list of types would lose items and choices
        schema = {"anyOf": members}
    return _or_null(schema) if optional else schema


def _or_null(schema: dict) -> dict:
    if "enum" in schema and None not in schema["enum"]:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return {**schema, "nullable": True}
