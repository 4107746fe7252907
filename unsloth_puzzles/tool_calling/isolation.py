"""Run a function in a forked process that is killed at its time limit and may use neither files nor network, or here.

This bounds a tool that hangs, computes without end, fills the memory or returns a novel. It is no prison for hostile
code: whoever registers a function trusts its author. What is bounded is what a model may make of it. Modules must have
been imported before: importing one is reading files.

A call in a fork gets random numbers of its own from `random`, NumPy and PyTorch. A generator that the function's module
has made itself starts every call where it was.
"""

import copy
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

MEMORY = 2**30  # bytes that a call may take on top of the process it comes from
_REFUSED = ("open", "socket.", "subprocess.", "os.", "shutil.", "ctypes.", "exec", "compile", "pty.")  # audit events

time.strptime("1", "%d"), "é".encode("idna")  # import what they need, at their first use


def run_isolated(function: Callable, arguments: dict, seconds: float, max_characters: int) -> str:
    """Call `function(**arguments)` in a process of its own and return its result as text.

    The process is a fork, so any function will do, and what the function changes is lost with it.

    Args:
        function: What returns a text or a value that `json` can write.
        arguments: By name.
        seconds: After which the process is killed.
        max_characters: Of the result.

    Returns:
        A text as it is, any other value as JSON.

    Raises:
        ValueError: The function raised, took too long, needed files, network or too much memory, or its result is too
            long or not of JSON's types. The message says which, for the model to read.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, function, arguments, seconds, max_characters), daemon=True)
    with warnings.catch_warnings():  # that threads are not copied: the child runs one function and starts none
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            process.start()
        except (OSError, AssertionError) as error:  # no memory, too many processes, or in a worker that may have none
            receiver.close()
            sender.close()
            raise ValueError(f"must get a process of its own, got {error}") from None
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise ValueError(f"must end within {seconds:g} seconds, got no result")
        good, text = receiver.recv_bytes(1) == b"1", receiver.recv_bytes(8 * max_characters + 4096).decode()
    except (EOFError, OSError):
        raise ValueError("must return a result, got the end of its process (too much memory, or a crash)") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not good:
        raise ValueError(text)
    return text


def run_here(function: Callable, arguments: dict, max_characters: int) -> str:
    """Call `function(**arguments)` in this process, without limits but that of the result.

    Args, Returns, Raises: Those of `run_isolated`.
    """
    try:
        text = _text(function(**copy.deepcopy(arguments)), max_characters)  # the caller keeps what was called with
    except (Exception, SystemExit) as error:
        raise ValueError(_reason(error)[:max_characters]) from None
    return text.encode(errors="replace").decode()


def _child(sender, function: Callable, arguments: dict, seconds: float, max_characters: int) -> None:
    """Call the function in the forked process and send its result.

    The process ends without Python's own clean-up, which belongs to the parent.
    """
    try:
        _reseed()
        text = _text(_bounded(function, arguments, seconds), max_characters)
        good = b"1"
    except MemoryError:
        good, text = b"0", f"must need at most {MEMORY >> 20} MiB of memory, got more"
    except BaseException as error:
        good, text = b"0", _reason(error)[:max_characters]
    sender.send_bytes(good)
    sender.send_bytes(text.encode(errors="replace"))
    os._exit(0)


def _reseed() -> None:
    """Give this fork random numbers of its own. Python does so for `random` alone."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


def _bounded(function: Callable, arguments: dict, seconds: float) -> object:
    import resource  # Linux and macOS only

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what a notebook's kernel has here is not for a fork
    sys.addaudithook(_refuse)
    return function(**arguments)


def _refuse(event: str, arguments: tuple) -> None:
    if event.startswith(_REFUSED):
        why = " (an import reads files, too)" if event == "open" else ""
        raise PermissionError(f"must use no files, network, processes or generated code, got {event}{why}")


def _text(result: object, max_characters: int) -> str:
    text = result if isinstance(result, str) else _as_json(result)
    if len(text) > max_characters:
        raise ValueError(f"must return at most {max_characters} characters, got {len(text)}")
    return text


def _as_json(result: object) -> str:
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must return a text or a value of JSON, got {type(result).__name__} ({error})") from None


def _reason(error: BaseException) -> str:
    message = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, (ValueError, PermissionError)):
        return message
    return f"{type(error).__name__}: {message}"
