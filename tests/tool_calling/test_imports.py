"""The package imports no optional library before it is needed, and knows arguments that `datasets` made up."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tool_calling.functions import add, describe, tokenizer
from unsloth_puzzles.tool_calling import formats
from unsloth_puzzles.tool_calling.tokens import tokenize_conversation
from unsloth_puzzles.tool_calling.toolbox import ToolBox


def test_no_optional_library_is_imported():
    files = Path(formats.__file__).parent.glob("*.py")
    modules = ", ".join(f"unsloth_puzzles.tool_calling.{file.stem}" for file in files if file.stem != "__init__")
    optional = "{'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes'}"
    code = f"import sys, {modules}; print(sorted({optional} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_trl_its_templates_are_asked_for(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"^trl must be installed for its chat templates, got none; pip install trl==1"
    ):
        formats.chat_format("qwen2.5")


@pytest.mark.slow
def test_arguments_that_datasets_filled_are_found():
    from datasets import Dataset

    def conversation(tool, **arguments):
        call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "Do it."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
        }

    rows = [conversation("add", a=1, b=2), conversation("describe", name="x", kind="big")]
    box = ToolBox([add, describe])
    for row in rows:
        tokenize_conversation(tokenizer(), row["messages"], box)
    for row in Dataset.from_list(rows):
        with pytest.raises(
            ValueError, match=r"datasets fills absent arguments with None unless on_mixed_types='use_json'$"
        ):
            tokenize_conversation(tokenizer(), row["messages"], box)
    kept = Dataset.from_list(rows, on_mixed_types="use_json")
    for row, given in zip(kept, rows, strict=True):
        expected = tokenize_conversation(tokenizer(), given["messages"], box)
        assert tokenize_conversation(tokenizer(), row["messages"], box) == expected
