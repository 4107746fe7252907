"""Functions without a schema, and limits that are none, are refused when the toolbox is made."""

import math
from typing import Any

import pytest

from tests.tool_calling.functions import add
from unsloth_puzzles.tool_calling.toolbox import ToolBox


def _no_hint(a):
    """Do.

    Args:
        a: One.
    """


def _no_description(a: int):
    """Do."""


def _no_docstring(a: int):
    return a


def _star(*a: int):
    """Do.

    Args:
        a: Some.
    """


async def _later(a: int):
    """Do.

    Args:
        a: One.
    """


def _bytes(a: Any, b: list[bytes | set]):
    """Do.

    Args:
        a: One.
        b: Two.
    """


def _list(a: list):
    """Do.

    Args:
        a: Some.
    """


def _lists(a: dict[str, list] | tuple | None):
    """Do.

    Args:
        a: Some.
    """


@pytest.mark.parametrize(
    "functions, error, message",
    [
        (add, TypeError, r"functions must be a list, got a function; write ToolBox\(\[add\]\)$"),
        (3, TypeError, r"functions must be a list, got int; write ToolBox\(\[\.\.\.\]\)$"),
        ([3], TypeError, "functions must be functions, got int"),
        ([_later], TypeError, "functions must not be asynchronous, got _later"),
        ([add, add], ValueError, "functions must have different names, got add twice"),
        ([_no_hint], ValueError, "function must have type hints and a docstring with Args, got _no_hint"),
        ([_no_description], ValueError, "function must have type hints and a docstring with Args, got _no_description"),
        ([_no_docstring], ValueError, "function must have type hints and a docstring with Args, got _no_docstring"),
        ([_star], ValueError, r"parameters of _star must be given by name, got \*a: int"),
        ([_bytes], ValueError, r"type hints of _bytes must be of JSON's types \(.*\), got bytes, set for b"),
        ([_list], ValueError, r"type hints of _list must be of JSON's types \(list\[int\], not list\), got list for a"),
        ([_lists], ValueError, r"type hints of _lists must be of JSON's types \(.*\), got list, tuple for a"),
    ],
)
def test_functions_without_a_schema_are_refused(functions, error, message):
    with pytest.raises(error, match=f"^{message}"):
        ToolBox(functions)


@pytest.mark.parametrize(
    "limits", [{"seconds": 0}, {"max_characters": -1}, {"seconds": math.inf}, {"seconds": math.nan}]
)
def test_limits_must_be_positive_and_finite(limits):
    ((name, value),) = limits.items()
    with pytest.raises(ValueError, match=rf"^{name} must be positive and finite, got {value}$"):
        ToolBox([add], **limits)


@pytest.mark.parametrize(
    "limits", [{"seconds": "2"}, {"seconds": None}, {"max_characters": "9"}, {"max_characters": 9.5}]
)
def test_limits_must_be_numbers(limits):
    ((name, value),) = limits.items()
    need = "a number" if name == "seconds" else "an integer"
    with pytest.raises(TypeError, match=rf"^{name} must be {need}, got {value!r}$"):
        ToolBox([add], **limits)


def test_seconds_are_at_most_what_the_system_can_wait():
    assert ToolBox([add], seconds=86400).call("add", {"a": 3, "b": 4}).content == "7"
    with pytest.raises(ValueError, match=r"^seconds must be at most 86400, a day, got 3000000$"):
        ToolBox([add], seconds=3_000_000)


def _in_itself():
    made = []
    made.append(made)
    return made


def _deep(levels):
    made = []
    for _ in range(levels):
        made = [made]
    return made


@pytest.mark.parametrize("value", [{(1,): 2}, _in_itself(), _deep(100_000)], ids=["tuple key", "cycle", "deep"])
@pytest.mark.parametrize("arguments", [lambda value: value, lambda value: {"a": value, "b": 4}], ids=["whole", "one"])
def test_arguments_that_json_cannot_write_are_a_failure(arguments, value):
    result = ToolBox([add]).call("add", arguments(value))
    assert result.failed and len(result.content) < 200


def test_a_method_must_be_bound():
    class Shop:
        def price(self, item: str) -> int:
            """Find a price.

            Args:
                item: Of what.
            """
            return len(item)

    with pytest.raises(
        ValueError, match=r"^method price must be bound, got self among its parameters; give instance\."
    ):
        ToolBox([Shop.price])
    assert ToolBox([Shop().price], seconds=20).call("price", {"item": "pen"}).content == "3"


def test_subset_takes_a_list_of_names():
    with pytest.raises(TypeError, match=r"^names must be a list of names, got 'add'; write subset\(\['add'\]\)$"):
        ToolBox([add]).subset("add")
    assert ToolBox([add]).subset(["add"]).names == ("add",)
