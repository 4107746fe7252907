"""llama.cpp (the package `xllamacpp`) in a process of its own, which a bad file may abort.

    answers = ask(text_path, projector_path, [{"text": "What is this?", "image": image}], tokens=8)

python -m benchmarks.gguf.engine REQUEST ANSWER    what `ask` starts: both are paths of JSON files
"""

import base64
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from unsloth_puzzles.bench import child

TIMEOUT = 300.0
MOST_THREADS = 8


class Answer(NamedTuple):
    """The answer to one request."""

    prompt_tokens: int
    tokens: list[int]
    log_probs: list[float]
    text: str
    likely: dict[int, float] | None = None  # the most likely first tokens with their log-probabilities


def ask(
    text_path: str | os.PathLike,
    projector_path: str | os.PathLike | None,
    requests: Sequence[dict],
    *,
    tokens: int,
    context: int = 512,
    timeout: float = TIMEOUT,
    stop: bool = False,
    threads: int | None = None,
) -> list[Answer]:
    """Let the engine answer greedily, in float32 as far as it can.

    Args:
        text_path: the GGUF file of the text model.
        projector_path: that of the vision tower, or None.
        requests: each has "prompt" (raw text) or "text" (a user's message, put into the file's chat template), and
            perhaps "image" (of PIL) with a text. "likely" with a prompt is the number of tokens that `Answer.likely`
            lists; such prompts reuse what the engine has computed of a common beginning, and get one token.
        tokens: how many to generate.
        context: how many the engine makes room for.
        timeout: seconds.
        stop: whether an end-of-turn token ends an answer.
        threads: of the engine; None is OMP_NUM_THREADS, or one a core. More than `MOST_THREADS` are not used.

    Returns:
        An answer for each.

    Raises:
        unsloth_puzzles.bench.child.ChildError: the engine refused the file or aborted.
        ImportError: the package is missing.
    """
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        raise ImportError(
            "xllamacpp must be installed to run GGUF files; pip install xllamacpp==2026.10.11549"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        bodies = [_body(one, tokens, stop) for one in requests]
        content = {"model": str(text_path), "mmproj": str(projector_path or ""), "context": context, "bodies": bodies}
        content["threads"] = threads or int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        request.write_text(json.dumps(content))
        module = __name__ if __name__ != "__main__" else "benchmarks.gguf.engine"
        child.run(module, str(request), str(answer), timeout=timeout, show=None, gpu_gib=0)
        return [Answer(*one, dict(likely)) for *one, likely in json.loads(answer.read_text())]


def _body(request: dict, tokens: int, stop: bool) -> dict:
    """A request of OpenAI's protocol."""
    common = {"max_tokens": tokens, "temperature": 0, "ignore_eos": not stop, "n_probs": 1, "cache_prompt": False}
    if likely := request.get("likely"):
        common |= {"n_probs": likely, "cache_prompt": True, "max_tokens": 1, "ignore_eos": True}
    if "prompt" in request:
        return {**common, "prompt": request["prompt"], "logprobs": common["n_probs"]}
    content = [{"type": "text", "text": request["text"]}]
    if "image" in request:
        data = io.BytesIO()
        request["image"].save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {**common, "messages": [{"role": "user", "content": content}], "logprobs": True, "top_logprobs": 1}


def main(request: str, answer: str) -> None:
    """Load the file, answer, write. The engine's server listens on the loopback and ends with this process."""
    import xllamacpp

    given = json.loads(Path(request).read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path = given["model"]
    settings.mmproj.path = given["mmproj"]
    settings.n_ctx, settings.n_parallel, settings.warmup = given["context"], 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = min(MOST_THREADS, given["threads"])
    settings.n_gpu_layers = 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    answers = []
    for body in given["bodies"]:
        chat = "messages" in body
        result = (server.handle_chat_completions if chat else server.handle_completions)(body)
        result = json.loads(result) if isinstance(result, str) else result
        if "choices" not in result:
            raise SystemExit(f"the engine must answer, got {result}")
        choice = result["choices"][0]
        found = choice["logprobs"]["content"]
        text = choice["message"]["content"] if chat else choice["text"]
        likely = [(one["id"], one["logprob"]) for one in found[0]["top_logprobs"]]
        answers.append([result["usage"]["prompt_tokens"], [one["id"] for one in found],
                        [one["logprob"] for one in found], text, likely])  # fmt: skip
    Path(answer).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
