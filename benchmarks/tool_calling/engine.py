"""The same conversations in llama.cpp, from a GGUF file: `tool_calls` as the engine reads them.

    replies = ask("model.gguf", [request(messages, toolbox)])
    replies[0].calls          # (Call(name='add', arguments={'a': 3, 'b': 4}),)

The engine gets the chat template of this package and renders it itself. It runs in a process of its own, since it ends
its process on a bad file, and listens on a loopback port for as long.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unsloth_puzzles.tool_calling.formats import ChatFormat, chat_format
from unsloth_puzzles.tool_calling.messages import checked_messages
from unsloth_puzzles.tool_calling.replies import Call
from unsloth_puzzles.tool_calling.toolbox import ToolBox


class EngineReply(NamedTuple):
    """The engine's reply: text, calls, and the number of tokens of the prompt."""

    content: str
    calls: tuple[Call, ...]
    prompt_tokens: int


def request(
    messages: list[dict], toolbox: ToolBox, max_tokens: int = 112, format: str | ChatFormat = "qwen2.5"
) -> dict:
    """A request in OpenAI's form, greedy; arguments of earlier calls become JSON text, as that form has them."""
    format = chat_format(format) if isinstance(format, str) else format
    given = checked_messages(messages, toolbox.schemas, format)
    for message in given:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    asked = {"messages": given, "temperature": 0, "max_tokens": max_tokens}
    return {**asked, "tools": toolbox.schemas} if toolbox.names else asked


def ask(
    path: str | Path,
    requests: Sequence[dict],
    *,
    format: str = "qwen2.5",
    context: int = 2048,
    threads: int = 2,
    seconds: float = 600,
) -> list[EngineReply]:
    """Let the engine answer.

    Args:
        path: The GGUF file.
        requests: See `request`.
        format: A chat format's name.
        context: Tokens of prompt and reply.
        threads: Of the CPU.
        seconds: For all of it.

    Raises:
        RuntimeError: The engine is not installed, or ended with an error.
    """
    job = {
        "path": str(path), "requests": list(requests), "template": chat_format(format).template, "context": context,
        "threads": threads,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.tool_calling.engine"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, timeout=seconds, cwd=root, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"the engine must answer, got status {done.returncode}: {lines[-1]}")
    return [read(reply) for reply in json.loads(done.stdout.splitlines()[-1])]


def read(reply: dict) -> EngineReply:
    """A reply in OpenAI's form.

    Raises:
        ValueError: Arguments are no JSON object.
    """
    message = reply["choices"][0]["message"]
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = json.loads(call["function"]["arguments"])
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments must be an object, got {arguments!r:.60}")
        calls.append(Call(call["function"]["name"], arguments))
    return EngineReply(message.get("content") or "", tuple(calls), reply["usage"]["prompt_tokens"])


def _serve(job: dict) -> list[dict]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["path"]
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = job["context"], 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
    parameters.n_gpu_layers = 0
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as transformers
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to F16
    parameters.hostnames = ["127.0.0.1"]
    parameters.use_jinja, parameters.chat_template = True, job["template"]
    server = xllamacpp.Server(parameters)
    replies = [server.handle_chat_completions(each) for each in job["requests"]]
    return [reply if isinstance(reply, dict) else json.loads(reply) for reply in replies]


if __name__ == "__main__":
    print("\n" + json.dumps(_serve(json.load(sys.stdin))))
