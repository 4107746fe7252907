"""A byte-level tokenizer that needs no download, with the control tokens of each chat format."""

import functools

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
def byte_tokenizer(format: str = "qwen2.5") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens and the control tokens of a format."""
    special, added = CONTROLS[format]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["assistant user system tool_call arguments name What is the result of", "You may call a function"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(corpus * 9, trainer)
    made.add_special_tokens(special)
    made.add_tokens(added)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[-1], pad_token=special[0])
