"""Check the arguments of a call against the JSON schema that `transformers.utils.get_json_schema` makes of a function.

That schema uses `nullable`, which is not a keyword of JSON Schema, so a general validator would let it through.
"""

import json
import math

MAX_DIGITS = 30  # of an integer: a longer one is no count or price, and arithmetic on it may never end
MAX_CHARACTERS = 2000  # of all arguments of a call, as JSON


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
    checked = {key: _checked(f"{name}.{key}", properties[key], value) for key, value in arguments.items()}
    if (size := len(json.dumps(arguments))) > MAX_CHARACTERS:
        raise ValueError(f"arguments of {name} must have at most {MAX_CHARACTERS} characters, got {size}")
    return checked


def _checked(where: str, schema: dict, value: object) -> object:
    if value is None and (schema.get("nullable") or schema.get("type") == "null"):
        return None
    if "anyOf" in schema:
        return _any_of(where, schema["anyOf"], value)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    kind = next((one for one in kinds if one is None or _is(one, value)), "")
    if kind == "":
        raise ValueError(f"{where} must be of type {' or '.join(kinds)}, got {_shown(value)}")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**MAX_DIGITS:
        raise ValueError(f"{where} must have at most {MAX_DIGITS} digits, got more")
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        raise ValueError(f"{where} must be one of {_choices(schema)}, got {_shown(value)}")
    if kind == "number":
        return float(value)
    if kind == "array":
        return _array(where, schema, value)
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return {key: _checked(f"{where}.{key}", schema["additionalProperties"], one) for key, one in value.items()}
    return value


def _array(where: str, schema: dict, value: list) -> list | tuple:
    if "prefixItems" in schema:
        items = schema["prefixItems"]
        if len(items) != len(value):
            raise ValueError(f"{where} must have {len(items)} items, got {len(value)}")
        return tuple(_checked(f"{where}[{n}]", *pair) for n, pair in enumerate(zip(items, value, strict=True)))
    return [_checked(f"{where}[{n}]", schema.get("items", {}), one) for n, one in enumerate(value)]


def _any_of(where: str, schemas: list[dict], value: object) -> object:
    refusals = []
    for schema in schemas:
        try:
            return _checked(where, schema, value)
        except ValueError as refusal:
            refusals.append(str(refusal))
    raise ValueError("; or ".join(refusals))


def _is(kind: str, value: object) -> bool:
    if isinstance(value, bool):  # an int to Python
        return kind == "boolean"
    if isinstance(value, float) and not math.isfinite(value):
        return False
    kinds = {"integer": int, "number": (int, float), "string": str, "array": list, "object": dict}
    return kind in kinds and isinstance(value, kinds[kind])


def _choices(schema: dict) -> str:
    return ", ".join(json.dumps(one) for one in schema["enum"])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:60]}..."
