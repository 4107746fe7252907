"""Check the arguments of a call against the JSON schema of a function.

That schema uses `nullable`, as that of `transformers.utils.get_json_schema` does. It is no keyword of JSON Schema, so a
general validator would refuse every null.
"""

import json
import math
import reprlib

MAX_DIGITS = 30  # of an integer: a longer one is no count or price, and arithmetic on it may never end
MAX_CHARACTERS = 2000  # of all arguments of a call, as JSON
_KINDS = {
    "null": type(None), "boolean": bool, "integer": int, "number": (int, float), "string": str, "array": list,
    "object": dict,
}  # fmt: skip


def checked_arguments(name: str, parameters: dict, arguments: object) -> dict:
    """The arguments of a call, each of the type that the schema asks for.

    An integer is taken where a number is asked for, and becomes a float. Nothing else is converted: "3" is no integer.

    Args:
        name: Of the function.
        parameters: The schema's "parameters": an object with "properties" and "required".
        arguments: What the model gave.

    Returns:
        A new dict.

    Raises:
        ValueError: An argument is missing, unknown, of another type, not among the choices, or too large. The message
            is for the model: it says what was needed.
    """
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of {name} must be an object, got {_shown(arguments)}")
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    known = ", ".join(properties) or "none"
    for key in arguments:
        if key not in properties:
            raise ValueError(f"arguments of {name} must be among these: {known}; got {_shown(key)}")
    for key in required:
        if key not in arguments:
            raise ValueError(f"arguments of {name} must contain {key}, got {', '.join(arguments) or 'none'}")
    try:
        checked = {key: checked_value(f"{name}.{key}", properties[key], value) for key, value in arguments.items()}
    except RecursionError:
        raise ValueError(f"arguments of {name} must be nested less deeply, got more levels than Python takes") from None
    if (size := len(json.dumps(arguments, ensure_ascii=False))) > MAX_CHARACTERS:
        raise ValueError(f"arguments of {name} must have at most {MAX_CHARACTERS} characters, got {size}")
    return checked


def checked_value(where: str, schema: dict, value: object) -> object:
    """A value of the type that the schema asks for, as `checked_arguments` has it.

    Args:
        where: What the value is, for the message.
        schema: Of the value; {} takes all that JSON can write.
        value: What the model gave.

    Raises:
        ValueError: The value does not fit.
    """
    if value is None and schema.get("nullable"):
        return None
    if "enum" in schema and not any(_equal(value, one) for one in schema["enum"]):
        raise ValueError(f"{where} must be one of {_choices(schema)}, got {_shown(value)}")
    if "anyOf" in schema:
        return _any_of(where, schema["anyOf"], value)
    kinds = schema.get("type", list(_KINDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    kind = next((one for one in kinds if _is(one, value)), None)
    if kind is None:
        raise ValueError(f"{where} must be of type {' or '.join(kinds)}, got {_shown(value)}")
    if isinstance(value, int) and abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"{where} must have at most {MAX_DIGITS} digits, got more")
    if kind == "number":
        return float(value)
    if kind == "array":
        return _array(where, schema, value)
    if kind == "object":
        of_values = schema.get("additionalProperties", {})
        return {key: checked_value(f"{where}.{key}", of_values, one) for key, one in value.items()}
    return value


def _array(where: str, schema: dict, value: list) -> list | tuple:
    if "prefixItems" in schema:
        items = schema["prefixItems"]
        if len(items) != len(value):
            raise ValueError(f"{where} must have {len(items)} items, got {len(value)}")
        return tuple(checked_value(f"{where}[{n}]", *pair) for n, pair in enumerate(zip(items, value, strict=True)))
    return [checked_value(f"{where}[{n}]", schema.get("items", {}), one) for n, one in enumerate(value)]


def _any_of(where: str, schemas: list[dict], value: object) -> object:
    """The value by the first schema that changes nothing, or else by the first that it fits: 3 stays an integer."""
    fitting, refusals = [], []
    for schema in schemas:
        try:
            fitting.append(checked_value(where, schema, value))
        except ValueError as refusal:
            refusals.append(str(refusal))
    if not fitting:
        raise ValueError("; or ".join(refusals))
    return next((one for one in fitting if json.dumps(one) == json.dumps(value)), fitting[0])


def _is(kind: str, value: object) -> bool:
    if isinstance(value, bool):  # an int to Python
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(value, dict) and not all(isinstance(key, str) for key in value):
        return False
    return isinstance(value, _KINDS.get(kind, ()))


def _equal(value: object, choice: object) -> bool:
    return value == choice and isinstance(value, bool) == isinstance(choice, bool)


def _choices(schema: dict) -> str:
    return ", ".join(json.dumps(one) for one in schema["enum"])


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):  # keys that are tuples, a list in itself, too many levels
        text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
