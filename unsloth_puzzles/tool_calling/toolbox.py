"""Functions that a model may call.

def add(a: int, b: int) -> int:
    '''Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    '''
    return a + b

toolbox = ToolBox([add])
toolbox.call("add", {"a": 3, "b": 4})       # Result(name='add', content='7', failed=False)
toolbox.call("add", {"a": "3"}).content     # 'error: arguments of add must contain b, got a'
"""

import math
import sys
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import NamedTuple

from unsloth_puzzles.tool_calling.arguments import checked_arguments
from unsloth_puzzles.tool_calling.isolation import run_here, run_isolated
from unsloth_puzzles.tool_calling.schemas import function_schema

MAX_SECONDS = 86400  # the system's calls that wait take no more than some weeks


class Result(NamedTuple):
    """The result of a call: a text for the model, which begins with "error: " if the call failed."""

    name: str
    content: str
    failed: bool


class ToolBox:
    """The functions on offer. Nothing else is ever called.

    A call runs in a process of its own (a fork, so Linux only), so a function cannot hang the loop, and what it
    changes in memory is lost: functions that keep a state need another place for it. Files, network, processes and
    generated code are refused there, and so is importing a module for the first time. Functions should be plain
    Python: a library with threads of its own (torch, a BLAS) may hang in a fork, and is then stopped at the limit.
    The fork of a process with gigabytes of memory takes a tenth of a second and more, see `isolated`.

    Args:
        functions: Each with a type hint and a line of its docstring's "Args:" for every parameter.
        seconds: The longest time an isolated call may take, at most a day.
        max_characters: The longest result.
        isolated: False calls the functions in this process, on any system, without a limit of time or memory, and with
            all that this process may do. That is for functions that are harmless with any arguments of their types.

    Attributes:
        schemas: A list of JSON schemas, for a chat template's `tools`.
        names: Of the functions, in the same order.

    Raises:
        TypeError: `functions` is not a list; what is in it is no function, or it is asynchronous; `seconds` is no
            number, or `max_characters` no integer.
        ValueError: Two functions have one name; a function has no schema, see `function_schema`; a limit is not
            positive and finite, or too long; calls are to be isolated and the system is not Linux.
    """

    def __init__(
        self,
        functions: Iterable[Callable],
        *,
        seconds: float = 2.0,
        max_characters: int = 1000,
        isolated: bool = True,
    ):
        if not isinstance(isolated, bool):
            raise TypeError(f"isolated must be True or False, got {isolated!r}")
        if isolated and sys.platform != "linux":
            raise ValueError(f"the system must be Linux, which can fork and bound a process, got {sys.platform}")
        limits = (("seconds", seconds, Real, "a number"), ("max_characters", max_characters, Integral, "an integer"))
        for name, value, kind, described in limits:
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be {described}, got {value!r}")
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if seconds > MAX_SECONDS:
            raise ValueError(f"seconds must be at most {MAX_SECONDS}, a day, got {seconds}")
        if callable(functions):
            name = getattr(functions, "__name__", "...")
            raise TypeError(f"functions must be a list, got a {type(functions).__name__}; write ToolBox([{name}])")
        if not isinstance(functions, Iterable):
            raise TypeError(f"functions must be a list, got {type(functions).__name__}; write ToolBox([...])")
        self.seconds, self.max_characters, self.isolated = seconds, max_characters, isolated
        self._functions: dict[str, Callable] = {}
        self._schemas: dict[str, dict] = {}
        for function in functions:
            schema = function_schema(function)
            name = schema["function"]["name"]
            if name in self._functions:
                raise ValueError(f"functions must have different names, got {name} twice")
            self._functions[name], self._schemas[name] = function, schema

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._functions)

    @property
    def functions(self) -> tuple[Callable, ...]:
        """The functions themselves, which run unchecked and unbounded if called."""
        return tuple(self._functions.values())

    @property
    def schemas(self) -> list[dict]:
        return list(self._schemas.values())

    def subset(self, names: Iterable[str]) -> "ToolBox":
        """A toolbox of some of these functions, in the order of `names`, with the same limits.

        Raises:
            TypeError: `names` is a text.
            ValueError: A name is none of a function here.
        """
        if isinstance(names, str):
            raise TypeError(f"names must be a list of names, got {names!r}; write subset([{names!r}])")
        names = list(names)
        if unknown := [name for name in names if name not in self._functions]:
            raise ValueError(f"names must be among {', '.join(self.names) or 'none'}, got {unknown[0]}")
        limits = {"seconds": self.seconds, "max_characters": self.max_characters, "isolated": self.isolated}
        return ToolBox([self._functions[name] for name in names], **limits)

    def call(self, name: object, arguments: object) -> Result:
        """Call a function by its name. Whatever goes wrong is in the result; nothing is raised.

        Args:
            name: As the model gave it.
            arguments: As the model gave them, parsed.

        Returns:
            The result as text.
        """
        if not isinstance(name, str) or name not in self._functions:
            return failure(name, f"name of a tool must be one of: {', '.join(self.names) or 'none'}; got {name!r:.60}")
        parameters = self._schemas[name]["function"]["parameters"]
        try:
            checked = checked_arguments(name, parameters, arguments)
        except ValueError as refusal:
            return failure(name, str(refusal))
        function = self._functions[name]
        try:
            if self.isolated:
                text = run_isolated(function, checked, self.seconds, self.max_characters)
            else:
                text = run_here(function, checked, self.max_characters)
        except ValueError as refusal:
            return failure(name, f"{name}: {refusal}")
        return Result(name, text, False)

    def __repr__(self) -> str:
        return f"ToolBox({', '.join(self.names) or 'no tools'})"


def check_toolbox(toolbox: object) -> None:
    """Raise TypeError unless `toolbox` is a `ToolBox`."""
    if not isinstance(toolbox, ToolBox):
        functions = "" if toolbox is None else "..."
        raise TypeError(f"toolbox must be a ToolBox, got {type(toolbox).__name__}; write ToolBox([{functions}])")


def failure(name: object, reason: str) -> Result:
    """The result of a call that failed."""
    return Result(name if isinstance(name, str) else "unknown", f"error: {reason}", True)
