"""A function with a code object of its own, for `torch.compile`.

Dynamo keeps and counts compilations by code object, eight for each; and by a code's name it remembers which sizes and
numbers have changed, to make variables of them, for which Inductor's code is slower or cannot be made.
"""

from collections.abc import Callable
from types import FunctionType


def with_own_code(function: Callable, name: str) -> FunctionType:
    """Wrap `function` in a function called `name` with a code object of its own.

    Dynamo keeps compiled code by code object, so nothing else uses or evicts what is compiled for this one.
    """

    def run(*args, **kwargs):
        return function(*args, **kwargs)

    return FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
