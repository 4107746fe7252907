"""The KV cache of a call to a model of transformers, under the name that the installed release gives it.

Until transformers 5.17 an argument and a field of outputs are called `past_key_values`, in 5.24 `cache`. A leaf: it
imports nothing.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

CACHE_NAMES = ("cache", "past_key_values")


def cache_name(target: Callable) -> str:
    """The name of the KV cache among the parameters of a forward, or among the fields of a class of outputs.

    Raises:
        ValueError: `target` has none of the known names, or both.
    """
    if dataclasses.is_dataclass(target):
        known = {field.name for field in dataclasses.fields(target)}
    else:
        known = set(inspect.signature(target).parameters)
    found = [name for name in CACHE_NAMES if name in known]
    if len(found) != 1:
        raise ValueError(
            f"{target.__qualname__} of transformers must name its KV cache {' or '.join(CACHE_NAMES)}, got "
            f"{' and '.join(found) or 'neither'}"
        )
    return found[0]


def given_cache(given: Mapping[str, object]) -> object:
    """The KV cache among keyword arguments, by any known name; None without one. Newer releases still take both."""
    return next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
