"""Calls of tools: arguments checked against the schema, everything bounded, every failure a message."""

import datetime
import json
import multiprocessing
import random
import re
import sys
import time

import numpy.random
import pytest
import torch

from tests.tool_calling.functions import add, describe, misbehave
from unsloth_puzzles.tool_calling.toolbox import Result, ToolBox

BOX = ToolBox([add, describe, misbehave], seconds=20)
FULL = {
    "name": "box", "kind": "big", "size": 2, "tags": ["a"], "counts": {"x": 1}, "point": [1, 2], "flag": True,
    "mixed": "m",
}  # fmt: skip


def test_schema_has_types_descriptions_and_what_is_required():
    function = BOX.schemas[0]["function"]
    assert function["name"] == "add" and function["description"] == "Add two numbers."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "The first."},
            "b": {"type": "integer", "description": "The second."},
        },
        "required": ["a"],
    }
    assert "return" not in function


def test_call_gives_text_or_json():
    assert BOX.call("add", {"a": 3, "b": 4}) == Result("add", "7", False)
    assert BOX.call("add", {"a": 3}) == Result("add", "4", False)
    assert BOX.call("misbehave", {"how": "grüße"}) == Result("misbehave", "grüße", False)


def test_arguments_of_every_type_arrive_as_their_type():
    result = BOX.call("describe", FULL)
    assert result.content == '["box", "big", 2.0, ["a"], {"x": 1}, [1, 2], true, "m", "float"]'
    result = BOX.call("describe", {"name": "", "kind": "small", "size": None, "mixed": 3})
    assert result.content == '["", "small", null, [], null, [0, 0], false, 3, "NoneType"]'


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "arguments of describe must contain name, got none"),
        ({"name": "x"}, "arguments of describe must contain kind, got name"),
        ({**FULL, "extra": 1}, 'arguments of describe must be among these: name, kind, .* got "extra"'),
        ({**FULL, "name": 3}, "describe.name must be of type string, got 3"),
        ({**FULL, "name": None}, "describe.name must be of type string, got null"),
        ({**FULL, "kind": "huge"}, 'describe.kind must be one of "big", "small", got "huge"'),
        ({**FULL, "size": "2"}, 'describe.size must be of type number, got "2"'),
        ({**FULL, "size": True}, "describe.size must be of type number, got true"),
        ({**FULL, "size": float("inf")}, "describe.size must be of type number, got Infinity"),
        ({**FULL, "tags": ["a", 1]}, r"describe.tags\[1\] must be of type string, got 1"),
        ({**FULL, "counts": {"x": "1"}}, 'describe.counts.x must be of type integer, got "1"'),
        ({**FULL, "point": [1]}, "describe.point must have 2 items, got 1"),
        ({**FULL, "flag": 1}, "describe.flag must be of type boolean, got 1"),
        ({**FULL, "mixed": 1.5}, "describe.mixed must be of type integer or string, got 1.5"),
        ({**FULL, "mixed": 10**30}, "describe.mixed must have at most 30 digits, got more"),
        ({**FULL, "name": "x" * 2001}, "arguments of describe must have at most 2000 characters, got 2"),
        ([1, 2], r"arguments of describe must be an object, got \[1, 2\]"),
        (None, "arguments of describe must be an object, got null"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(arguments, message):
    result = BOX.call("describe", arguments)
    assert result.failed and result.content.startswith("error: ")
    assert re.search(message, result.content), result.content


@pytest.mark.parametrize("name", ["rm", "", None, "__import__", "add ", ["add"]])
def test_nothing_but_the_registered_functions_is_called(name):
    result = BOX.call(name, {"a": 1})
    assert result.failed and "name of a tool must be one of: add, describe, misbehave" in result.content


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", "KeyError: 'lost'"),
        ("exit", "SystemExit: 3"),
        ("crash", "must return a result, got the end of its process"),
        ("memory", "must need at most 1024 MiB of memory, got more"),
        ("long", "must return at most 1000 characters, got 1001"),
        ("set", "must return a text or a value of JSON, got set"),
        ("nan", "must return a text or a value of JSON, got float"),
        ("infinite", "must return a text or a value of JSON, got dict"),
        ("read", "must use no files, network, processes or generated code, got open"),
        ("connect", "must use no files, network, processes or generated code, got "),
        ("shell", "must use no files, network, processes or generated code, got os.system"),
        ("eval", "must use no files, network, processes or generated code, got "),
    ],
)
def test_forbidden_acts_of_a_tool_become_messages(how, message):
    result = BOX.call("misbehave", {"how": how})
    assert result.failed and f"error: misbehave: {message}" in result.content


@pytest.mark.parametrize("how", ["hang", "compute"])
def test_a_tool_that_never_ends_is_killed(how):
    start = time.monotonic()
    result = ToolBox([misbehave], seconds=0.5).call("misbehave", {"how": how})
    assert result.content == "error: misbehave: must end within 0.5 seconds, got no result"
    assert time.monotonic() - start < 10


def test_a_machine_that_starts_no_process_is_a_message(monkeypatch):
    def refuse(self):
        raise OSError("out of processes")

    monkeypatch.setattr(multiprocessing.get_context("fork").Process, "start", refuse)
    assert BOX.call("add", {"a": 3}).content == "error: add: must get a process of its own, got out of processes"


def test_a_worker_that_may_start_no_process_is_a_message(monkeypatch):
    """As in a worker of a DataLoader or of a pool."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    result = BOX.call("add", {"a": 3})
    assert result.failed and "must get a process of its own, got daemonic processes" in result.content


def test_output_of_a_tool_goes_nowhere(capfd):
    def shout(text: str) -> str:
        """Shout.

        Args:
            text: What.
        """
        print(text, flush=True)
        sys.stderr.write(text)
        return "done"

    assert ToolBox([shout], seconds=20).call("shout", {"text": "loud"}).content == "done"
    assert capfd.readouterr() == ("", "")


def test_half_a_surrogate_pair_in_a_result_is_replaced():
    assert BOX.call("misbehave", {"how": "surrogate"}).content == "? <|im_end|>"


def test_a_call_changes_nothing_here():
    seen = []

    def note(text: str) -> str:
        """Note.

        Args:
            text: What.
        """
        seen.append(text)
        return str(seen)

    assert ToolBox([note], seconds=20).call("note", {"text": "x"}).content == "['x']" and seen == []


def test_calls_that_are_not_isolated_run_in_this_process(monkeypatch):
    seen = []

    def note(words: list[str]) -> str:
        """Note.

        Args:
            words: What.
        """
        seen.append(words.pop())
        return str(seen)

    monkeypatch.setattr(sys, "platform", "win32")  # which cannot fork
    box, given = ToolBox([note, add, describe, misbehave], isolated=False, max_characters=200), {"words": ["x", "y"]}
    assert box.call("note", given) == Result("note", "['y']", False)
    assert seen == ["y"] and given == {"words": ["x", "y"]}
    assert box.subset(["note"]).call("note", given).content == "['y', 'y']"
    assert box.call("describe", FULL) == BOX.call("describe", FULL)
    assert box.call("misbehave", {"how": "surrogate"}) == BOX.call("misbehave", {"how": "surrogate"})
    for how in ("raise", "exit", "long"):
        assert box.call("misbehave", {"how": how}).failed, how
    for how in ("raise", "exit"):
        assert box.call("misbehave", {"how": how}) == BOX.call("misbehave", {"how": how})


def test_a_toolbox_may_be_empty_or_a_part():
    empty = ToolBox([])
    assert empty.schemas == [] and repr(empty) == "ToolBox(no tools)"
    assert empty.call("add", {}).content == "error: name of a tool must be one of: none; got 'add'"
    part = BOX.subset(["describe"])
    assert part.names == ("describe",) and part.seconds == 20 and part.call("add", {"a": 1}).failed
    with pytest.raises(ValueError, match=r"^names must be among add, describe, misbehave, got sum$"):
        BOX.subset(["sum"])


def roll(sides: int) -> list:
    """Roll.

    Args:
        sides: How many.
    """
    return [random.randrange(sides), int(numpy.random.randint(sides)), int(torch.randint(sides, ()))]


@pytest.mark.parametrize("isolated", [True, False])
def test_random_numbers_of_a_tool_differ_from_call_to_call(isolated):
    box = ToolBox([roll], isolated=isolated)
    found = [json.loads(box.call("roll", {"sides": 10**6}).content) for _ in range(4)]
    assert all(len(set(numbers)) > 1 for numbers in zip(*found, strict=True))


def parse(date: str, host: str) -> str:
    """Parse.

    Args:
        date: A day.
        host: A name.
    """
    return f"{datetime.datetime.strptime(date, '%d.%m.%Y'):%Y-%m-%d} {host.encode('idna').decode()}"


def test_a_tool_may_parse_dates_and_names_of_hosts():
    assert ToolBox([parse]).call("parse", {"date": "3.4.2025", "host": "é.com"}).content == "2025-04-03 xn--9ca.com"


@pytest.mark.parametrize("character", ["語", "é", "a"])
def test_characters_of_arguments_are_counted_as_they_are_written(character):
    box = ToolBox([parse], isolated=False)
    assert "time data" in box.call("parse", {"date": "x", "host": character * 1900}).content
    assert (
        "must have at most 2000 characters, got 2025"
        in box.call("parse", {"date": "x", "host": character * 2000}).content
    )
