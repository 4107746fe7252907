"""Type hints as schemas: what a schema says is what a call takes, unions and choices included."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from transformers.utils import get_json_schema

from benchmarks.tool_calling.tools import TOOLS
from tests.tool_calling.functions import add, describe
from unsloth_puzzles.tool_calling.arguments import checked_arguments
from unsloth_puzzles.tool_calling.schemas import function_schema

WORDS = {"type": "array", "items": {"type": "string"}}


def parameters(hint, description="One."):
    """The schema of the arguments of a function whose parameter `a` has this hint."""

    def f(a):
        pass

    f.__annotations__, f.__doc__ = {"a": hint}, f"Do.\n\nArgs:\n    a: {description}"
    return function_schema(f)["function"]["parameters"]


@pytest.mark.parametrize("function", [add, describe, *TOOLS])
def test_schemas_without_such_unions_are_those_of_transformers(function):
    theirs = get_json_schema(function)
    theirs["function"].pop("return", None)
    assert str(function_schema(function)) == str(theirs)  # with the order of the keys, which a prompt shows


CASES = [  # hint, its schema, what fits, what does not
    (Literal["x", 1] | None, {"type": ["string", "integer"], "enum": ["x", 1, None], "nullable": True},
     ["x", 1, None], ["y", True, 1.5]),
    (Literal["x", None], {"type": "string", "enum": ["x", None], "nullable": True}, ["x", None], ["y", False]),
    (Literal[None], {"type": "null", "enum": [None]}, [None], [0, "null"]),
    (list[int] | None, {"type": "array", "items": {"type": "integer"}, "nullable": True}, [[1], [], None], [["1"], 1]),
    (dict[str, int] | None, {"type": "object", "additionalProperties": {"type": "integer"}, "nullable": True},
     [{"k": 1}, None], [{"k": "1"}, [], {1: 1}]),
    (int | str, {"type": ["integer", "string"]}, [1, "1"], [1.5, None, True]),
    (int | None | float, {"type": ["integer", "number"], "nullable": True}, [10**17 + 1, 1.5, None], ["1"]),
    (list[str] | str, {"anyOf": [WORDS, {"type": "string"}]}, [["a"], "a"], [[1], 1, None]),
    (list[str] | list[list[int]] | None,
     {"anyOf": [WORDS, {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}], "nullable": True},
     [["a"], [[1], []], None], [["a", [1]], [["a"]]]),
    (Literal["auto"] | int, {"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "integer"}]},
     ["auto", 3], ["car", 1.5]),
    (Literal["auto", None] | int,
     {"anyOf": [{"type": "string", "enum": ["auto", None], "nullable": True}, {"type": "integer"}]},
     ["auto", 3, None], ["car"]),
    (float | int | list[str], {"anyOf": [{"type": "number"}, {"type": "integer"}, WORDS]}, [10**17 + 1, 1.5], [[1]]),
    (dict[str, int] | str,
     {"anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "string"}]},
     [{"k": 1}, "k"], [{"k": "v"}]),
    (list[int | None], {"type": "array", "items": {"type": "integer", "nullable": True}}, [[1, None]], [["1"], None]),
    (Any, {}, [None, 1, [{"k": [True]}]], [float("nan"), [{"k": float("inf")}], [10**30], {1: 1}, {1, 2}]),
    (dict | str, {"type": ["object", "string"]}, [{"k": [1]}, ""], [{"k": float("nan")}, 1]),
]  # fmt: skip


@pytest.mark.parametrize("hint, schema, fitting, others", CASES, ids=[str(case[0]) for case in CASES])
def test_a_call_takes_what_the_schema_says(hint, schema, fitting, others):
    found = parameters(hint)
    assert found["properties"]["a"] == {**schema, "description": "One."}
    for value in fitting:
        taken = checked_arguments("f", found, {"a": value})["a"]
        assert taken == value and type(taken) is type(value)
    for value in others:
        with pytest.raises(ValueError, match=r"^f\.a"):
            checked_arguments("f", found, {"a": value})


def test_choices_of_a_description_fit_the_hint():
    found = parameters(float | None, "One (choices: [1, 2.5])")
    assert found["properties"]["a"]["enum"] == [1, 2.5, None]
    for value, taken in ((1, 1.0), (1.0, 1.0), (2.5, 2.5), (None, None)):
        assert repr(checked_arguments("f", found, {"a": value})["a"]) == repr(taken)
    for value in (2, True, "1"):
        with pytest.raises(ValueError, match=r"^f\.a must be one of 1, 2\.5, null, got "):
            checked_arguments("f", found, {"a": value})
    found = parameters(list[str] | str, 'One (choices: ["x", ["y"]])')
    assert checked_arguments("f", found, {"a": ["y"]}) == {"a": ["y"]}
    with pytest.raises(ValueError, match=r'^f\.a must be one of "x", \["y"\], got "z"$'):
        checked_arguments("f", found, {"a": "z"})


@pytest.mark.parametrize(
    "hint, description, message",
    [
        (list[str], 'One (choices: ["x"])', 'choices of f.a must fit its type hint.*: f.a must be of type array'),
        (Literal["x"], 'One (choices: ["y"])', 'choices of f.a must fit .*: f.a must be one of "x", got "y"'),
        (str, "One (choices: [])", "choices of f.a must be at least one, got none"),
        (str, "One (choices: [x])", "choices of f must be a list in JSON, as .*, got: Expecting value"),
        (int, "One (choices: 3)", "choices of f must be a list in JSON, as .*, got: 'int' object is not iterable"),
        (dict[int, str], "One.", r"type hints of f must be of JSON's types .*, got dict\[int, str\] for a; write "),
        (list[dict[Any, int]] | None, "One.", r"type hints of f must be .*, got dict\[.*Any, int\] for a"),
        (list[Sequence[int]], "One.", r"type hints of f must be .*, got .*Sequence\[int\] for a"),
        (Callable[[int], int], "One.", r"type hints of f must be .*, got .*Callable\[\[int\], int\] for a"),
    ],
)  # fmt: skip
def test_hints_and_choices_that_no_call_could_fit_are_refused(hint, description, message):
    with pytest.raises(ValueError) as refusal:
        parameters(hint, description)
    assert re.match(message, str(refusal.value)), refusal.value


def test_arguments_nested_too_deeply_are_refused():
    value = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ValueError, match=r"^arguments of f must be nested less deeply, got"):
        checked_arguments("f", parameters(Any), {"a": value})
