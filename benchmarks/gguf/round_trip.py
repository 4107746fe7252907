"""A real model fine-tuned, exported to GGUF files of several types, and answering in the engine and in transformers."""

import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from benchmarks.at_once import all_at_once
from benchmarks.gguf.engine import Answer, ask
from benchmarks.gguf.reference import answer
from unsloth_puzzles.bench.text import paragraphs
from unsloth_puzzles.gguf.export import export_gguf

PROBE = "Why is the sea salty?"  # never taught: a reply that was learnt by heart has no error to show
QUESTION, REPLY = "What do you collect?", "I collect blue buttons from old coats."
PLACES, LIKELY = range(8, 40), 200  # tokens of real text before a compared one; tokens that the engine lists


class Exported(NamedTuple):
    """A file beside transformers' answer of the same model in float32, to a question that was not taught."""

    size: int  # bytes
    equal: bool  # the greedy tokens and the end of the answer
    compared: int  # tokens that both chose before they part
    error: float  # the largest difference of log-probabilities over these tokens
    mean_error: float  # the mean difference at the places of a real text, the same for every file
    text: str  # what it answers to the question that was taught
    ended: bool  # whether that answer has ended with the token that ends a turn
    warnings: tuple[str, ...]  # of `export_gguf`


def add_adapters(model) -> PeftModel:
    """Fresh LoRA on all linear layers."""
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def fit(model: PeftModel, tokenizer, steps: int) -> list[float]:
    """Teach the adapters one reply; returns the losses."""
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    device = model.device
    start = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    ids = tokenizer(prompt + REPLY + tokenizer.eos_token, return_tensors="pt")["input_ids"].to(device)
    labels = ids.clone()
    labels[:, : start.shape[1]] = -100
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def round_trip(
    model: PeftModel,
    tokenizer,
    folder: Path,
    *,
    steps: int,
    quantizations: tuple[str, ...],
    tokens: int = 32,
    places: range = PLACES,
) -> dict:
    """Fine-tune, export in each type, and let engines answer until they stop: all at once where there are cores.

    Args:
        model: From `add_adapters`.
        tokenizer: Its tokenizer.
        folder: For the files.
        steps: Of training.
        quantizations: The types; the first one is also exported without the adapter.
        tokens: The most tokens of an answer.
        places: Tokens of real text before a compared one.

    Returns:
        "losses" of the training, "base" (the engine's text without the adapter), "moved" (how far the adapter moves
        the first log-probability in the engine), and an `Exported` for each of `quantizations`.
    """
    asked, probe, end = {"text": QUESTION}, {"text": PROBE}, tokenizer.eos_token_id
    losses = fit(model, tokenizer, steps)
    expected, compared = answer(model, tokenizer, probe, tokens), next_tokens(model, tokenizer, places)
    requests = [asked, probe, *({"prompt": one.prompt, "likely": LIKELY} for one in compared)]
    exported = {name: _export(model, tokenizer, folder, name) for name in quantizations}
    with model.disable_adapter():
        without, _ = export_gguf(model, tokenizer, folder / "off", quantizations[0], progress=False)
    files = {name: (path, requests) for name, (path, _) in exported.items()} | {"base": (without, [asked])}
    together = (cores := len(os.sched_getaffinity(0))) >= 2 * len(files)
    settings = {"tokens": tokens, "stop": True, "threads": cores // len(files) if together else None}
    jobs = {name: partial(ask, path, None, given, **settings) for name, (path, given) in files.items()}
    answers = all_at_once(jobs, together=together)
    found = {"losses": losses, "base": answers["base"][0].text}
    for name, (path, said) in exported.items():
        taught, other, *nexts = answers[name]
        found[name] = Exported(
            path.stat().st_size, *_compared(other, expected, end), _mean_error(nexts, compared),
            taught.text, taught.tokens[-1] == end, said,
        )  # fmt: skip
    found["moved"] = abs(answers["base"][0].log_probs[0] - answers[quantizations[0]][0].log_probs[0])
    return found


class Next(NamedTuple):
    """A beginning of a real text, and what transformers expects next."""

    prompt: str
    length: int  # tokens of the prompt
    token: int  # the most likely one
    log_prob: float


@torch.no_grad()
def next_tokens(model: torch.nn.Module, tokenizer, places: range = PLACES) -> list[Next]:
    """Return what `model` expects after the first `places` tokens of a paragraph of Python's language reference."""
    ids = next(ids for text in paragraphs() if len(ids := tokenizer(text)["input_ids"]) >= PLACES.stop)
    log_probs = model(input_ids=torch.tensor([ids], device=model.device)).logits[0].double().log_softmax(-1)
    found = []
    for length in places:
        prompt = tokenizer.decode(ids[:length])
        if tokenizer(prompt)["input_ids"] == ids[:length]:  # the engine gets text
            log_prob, token = log_probs[length - 1].max(0)
            found.append(Next(prompt, length, token.item(), log_prob.item()))
    return found


def _mean_error(answers: list[Answer], places: list[Next]) -> float:
    """The mean difference of the engine's answers from the log-probabilities of `places`.

    Raises:
        RuntimeError: The engine splits a prompt into other tokens, or finds an expected token unlikely.
    """
    for one, theirs in zip(places, answers, strict=True):
        if theirs.prompt_tokens != one.length or one.token not in theirs.likely:
            raise RuntimeError(f"the engine must read {one.prompt!r} as {one.length} tokens and list token {one.token}")
    errors = [abs(theirs.likely[one.token] - one.log_prob) for one, theirs in zip(places, answers, strict=True)]
    return sum(errors) / len(errors)


def _export(model: PeftModel, tokenizer, folder: Path, quantization: str) -> tuple[Path, tuple[str, ...]]:
    """Export; returns the file and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path, _ = export_gguf(model, tokenizer, folder, quantization, progress=False)
    return path, tuple(str(one.message) for one in caught)


def _compared(theirs: Answer, ours: Answer, end: int) -> tuple[bool, int, float]:
    """Fields `equal`, `compared` and `error` of `Exported`.

    Without a common first token the difference is that of the first, of two tokens then.

    Args:
        theirs: The engine's answer, which may end with `end`.
        ours: What transformers answers; it goes on behind `end`.
        end: The token that ends an answer.
    """
    expected = ours.tokens[: ours.tokens.index(end) + 1] if end in ours.tokens else ours.tokens
    same = [one == other for one, other in zip(theirs.tokens, expected, strict=False)]
    alike = same.index(False) if False in same else len(same)
    pairs = list(zip(theirs.log_probs, ours.log_probs, strict=False))[: max(1, alike)]
    return theirs.tokens == expected, alike, max(abs(one - other) for one, other in pairs)
