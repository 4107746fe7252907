"""A byte-level tokenizer of English, a chat template and random pictures, for tiny vision-language models."""

from functools import cache

import numpy
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from unsloth_puzzles.bench.text import paragraphs

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = """{%- macro said(content) -%}
{%- if content is string %}{{ content }}{% else %}
{%- for block in content %}{% if block.type == 'image' %}IMAGE{% else %}{{ block.text }}{% endif %}{% endfor %}
{%- endif %}<|im_end|>{% endmacro -%}
{%- for m in messages -%}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ said(m.content) }}{% endgeneration %}
{%- else %}{{ said(m.content) }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = ("<|im_start|>", "<|im_end|>")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels."""
    pixels = numpy.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def template(image: str, bos: str = "", marks: bool = True) -> str:
    """ChatML, with `image` as placeholder, with or without {% generation %} marks."""
    text = bos + CHATML.replace("IMAGE", image)
    return text if marks else text.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def chat_tokenizer(eos: str, pad: str, bos: str | None, *special: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of English, with the tokens of chats and of the family, `special`, in this order at the end."""
    tokenizer = Tokenizer.from_str(_byte_pairs())
    tokenizer.add_special_tokens([token for token in dict.fromkeys((bos, pad, *CHAT, eos, *special)) if token])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@cache
def _byte_pairs() -> str:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(paragraphs()[:200], trainer)
    return tokenizer.to_str()
