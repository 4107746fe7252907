"""The engine renders the same prompts and reads the same calls."""

import json
from pathlib import Path

import pytest

from benchmarks import smollm2
from benchmarks.tool_calling.engine import EngineReply, ask, read, request
from tests.tool_calling.functions import add
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.tokens import ChatEncoder
from unsloth_puzzles.tool_calling.toolbox import ToolBox

BOX = ToolBox([add])
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 30}}}
TURNS = [
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "42"},
]


def test_request_is_in_openais_form():
    asked = request(TURNS, BOX)
    assert json.loads(asked["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"a": 12, "b": 30}
    assert asked["tools"] == BOX.schemas and asked["temperature"] == 0
    assert "tools" not in request(TURNS[:1], ToolBox([]))
    assert CALL["function"]["arguments"] == {"a": 12, "b": 30}  # the given messages stay as they are


def test_reply_is_read():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 12}'}, "id": "x"}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reply = {"choices": [{"message": message}], "usage": {"prompt_tokens": 5}}
    assert read(reply) == EngineReply("", (Call("add", {"a": 12}),), 5)
    call["function"]["arguments"] = "[1]"
    with pytest.raises(ValueError, match=r"^arguments must be an object, got \[1\]$"):
        read(reply)


@pytest.mark.slow
def test_engine_has_the_same_prompts_and_reads_calls(smollm2_folder):
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=smollm2.FILE))
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 30}}\n</tool_call>'
    copy = [{"role": "user", "content": f"Repeat this text and nothing else:\n{text}"}]  # no training needed for that
    replies = ask(Path(smollm2_folder, smollm2.FILE), [request(copy, BOX, 48), request(TURNS, BOX, 1)], threads=1)
    assert replies[0].calls == (Call("add", {"a": 12, "b": 30}),)
    assert [reply.prompt_tokens for reply in replies] == [len(encoder.prompt(each, BOX)) for each in (copy, TURNS)]


@pytest.mark.slow
def test_an_engine_that_fails_is_an_error(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(RuntimeError, match=r"^the engine must answer, got status "):
        ask(tmp_path / "bad.gguf", [request(TURNS[:1], BOX)])
