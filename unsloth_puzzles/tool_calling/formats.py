"""How tools, calls and results are written for a family of models: TRL's chat templates, by name.

    chat_format("qwen2.5")                   Qwen2.5, and SmolLM2, whose own template ignores tools
    chat_format("qwen3")                     Qwen3, without thinking
    chat_format("llama3.2")                  Llama 3.1 and 3.2: one call a turn

Without a system message Qwen2.5's template writes its own ("You are Qwen ..."): give one to other models.

A template is text with control tokens. A chat format also says where an assistant's turn begins and ends, and how its
calls are read.
"""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path

from unsloth_puzzles.tool_calling.replies import Reply, read_bare, read_tagged

DATE = "26 Jul 2024"  # what Llama's template says where it is not told; today's date would change the prompt every day


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A chat format.

    Attributes:
        name: Of the format.
        template: Jinja, as `apply_chat_template` takes it.
        header: The text that opens an assistant's turn. It ends the prompt.
        stop: The control token that ends a turn.
        read: Reads a reply's text.
        calls_per_turn: Most calls that the template can write in one turn, or None.
        variables: Of the template, always given.
    """

    name: str
    template: str
    header: str
    stop: str
    read: Callable[[str], Reply]
    calls_per_turn: int | None = None
    variables: dict = dataclasses.field(default_factory=dict)


def chat_format(name: str) -> ChatFormat:
    """The chat format called `name`.

    Raises:
        ValueError: There is none of this name.
        ImportError: TRL, whose templates these are, is not installed, or is a release that lacks one.
    """
    if name not in _FORMATS:
        raise ValueError(f"name must be one of {', '.join(map(repr, _FORMATS))}, got {name!r}")
    file, arguments = _FORMATS[name]
    return ChatFormat(name, _template(file), **arguments)


def _template(file: str) -> str:
    """The text of one of TRL's templates. TRL itself is not imported, which would take many seconds."""
    found = importlib.util.find_spec("trl")
    if found is None:
        raise ImportError("trl must be installed for its chat templates, got none; pip install trl==1.16.0")
    path = Path(found.submodule_search_locations[0], "chat_templates", file)
    if not path.exists():
        raise ImportError(
            f"trl must have the chat template {file} as release 1.16 has, got none; pip install trl==1.16.0"
        )
    return path.read_text(encoding="utf-8")


_CHATML = {"stop": "<|im_end|>", "read": read_tagged}
_FORMATS = {
    "qwen2.5": ("qwen2_5.jinja", {"header": "<|im_start|>assistant\n", **_CHATML}),
    # The training variant: the plain one writes the empty thoughts of a turn only while that turn is the last.
    "qwen3": (
        "qwen3_training.jinja",
        {
            "header": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
            "variables": {"enable_thinking": False},
            **_CHATML,
        },
    ),
    "llama3.2": (
        "llama3_2.jinja",
        {
            "header": "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "stop": "<|eot_id|>",
            "read": read_bare,
            "calls_per_turn": 1,
            "variables": {"date_string": DATE},
        },
    ),
}
