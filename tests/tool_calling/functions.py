"""Tools for the tests, some of which misbehave, and tokenizers with the control tokens of each format."""

import functools
from typing import Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CONTROLS = {
    "qwen2.5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], []),
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"],
    ),
    "llama3.2": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        [],
    ),
}  # by format: special tokens, and tokens that are added but not special


@functools.cache
def tokenizer(format: str = "qwen2.5") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens and the control tokens of a format."""
    special, added = CONTROLS[format]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["assistant user system tool_call arguments name What is the result of", "You may call a function"]
    made.train_from_iterator(corpus * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.add_special_tokens(special)
    made.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[-1], pad_token=special[0])


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
