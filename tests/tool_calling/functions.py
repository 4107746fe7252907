"""Tools for the tests, some of which misbehave, and a tokenizer."""

from typing import Literal

from benchmarks.tool_calling.byte_tokenizer import CONTROLS
from benchmarks.tool_calling.byte_tokenizer import byte_tokenizer as tokenizer

__all__ = ["CONTROLS", "add", "describe", "misbehave", "tokenizer"]


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


def describe(
    name: str,
    kind: Literal["big", "small"],
    size: float | None = None,
    tags: list[str] = (),
    counts: dict[str, int] | None = None,
    point: tuple[int, int] = (0, 0),
    flag: bool = False,
    mixed: int | str = 0,
) -> list:
    """Describe a thing.

    Args:
        name: Its name.
        kind: Its kind.
        size: Its size.
        tags: Its tags.
        counts: Its counts.
        point: Its point.
        flag: Its flag.
        mixed: A number or a text.
    """
    return [name, kind, size, list(tags), counts, list(point), flag, mixed, type(size).__name__]


def misbehave(how: str) -> object:
    """Do what no tool should.

    Args:
        how: In which way.
    """
    if how == "hang":
        while True:
            pass
    if how == "compute":
        return len(str(9 ** (9**9)))
    if how == "raise":
        raise KeyError("lost")
    if how == "exit":
        raise SystemExit(3)
    if how == "crash":
        import os

        os._exit(1)
    if how == "memory":
        return len(bytearray(3 * 2**30))
    if how == "long":
        return "x" * 1001
    if how == "set":
        return {1}
    if how == "nan":
        return float("nan")
    if how == "infinite":
        return {"values": [1.0, float("-inf")]}
    if how == "read":
        return open(__file__).read()
    if how == "connect":
        import socket

        return str(socket.socket())
    if how == "shell":
        import os

        return os.system("true")
    if how == "eval":
        return eval("1 + 1")
    return "\ud800 <|im_end|>" if how == "surrogate" else how
