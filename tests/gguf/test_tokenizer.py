"""A tokenizer is known by the expression that splits its text, and refused where the engine would split otherwise."""

import json
import re

import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gguf.models import EXPRESSIONS, tokenizer
from unsloth_puzzles.gguf.tokenizer import add_tokenizer, pre_name


def description(pre="qwen2"):
    return json.loads(tokenizer(pre).backend_tokenizer.to_str())


def written(made, rows=None, template=None, stops=()):
    """The metadata, by key."""
    header = GGUFWriter(None, "llama")
    add_tokenizer(header, made, template, len(made) if rows is None else rows, list(stops))
    return {key.removeprefix("tokenizer."): value.value for key, value in header.kv_data[0].items()}


@pytest.mark.parametrize("pre", EXPRESSIONS)
def test_name_by_the_expression(pre):
    assert pre_name(description(pre)) == pre
    assert written(tokenizer(pre))["ggml.pre"] == pre


def test_vocabulary_types_and_unused_rows():
    made = tokenizer("qwen2")
    made.add_tokens([AddedToken("plain")])
    found = written(made, rows=len(made) + 3, template="{{ x }}", stops=[made.eos_token_id, 7])
    tokens, types = found["ggml.tokens"], found["ggml.token_type"]
    assert tokens[: len(made)] == [made.convert_ids_to_tokens(n) for n in range(len(made))]
    assert tokens[len(made) :] == [f"[PAD{n}]" for n in range(len(made), len(made) + 3)]
    assert types[0] == TokenType.NORMAL and types[made.eos_token_id] == TokenType.CONTROL
    assert types[len(made) - 1] == TokenType.USER_DEFINED and types[len(made) :] == [TokenType.UNUSED] * 3
    assert found["ggml.eos_token_id"] == made.eos_token_id and found["ggml.eot_token_id"] == 7
    assert found["ggml.padding_token_id"] == made.pad_token_id and "ggml.bos_token_id" not in found
    assert found["chat_template"] == "{{ x }}" and found["ggml.add_bos_token"] is False
    assert len(found["ggml.merges"]) == len(description()["model"]["merges"])


@pytest.mark.parametrize(
    "own, stops, expected",
    [
        (True, [], [None, None]),
        (True, ["own", 9, 4, 9], [9, 4]),
        (True, [9, 4, "own"], [9, 4]),
        (True, [9, 4, 5, 6], [9, 4]),
        (False, [8, 4], [4, None]),
    ],
)
def test_ids_that_end_a_generation(own, stops, expected):
    made = tokenizer("qwen2")
    eos = made.eos_token_id if own else 8
    if not own:
        made.eos_token = None
    found = written(made, stops=[eos if one == "own" else one for one in stops])
    assert [found.get(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")] == [eos, *expected]


def test_tokenizer_without_an_end_is_refused():
    made = tokenizer("qwen2")
    made.eos_token = None
    with pytest.raises(
        ValueError, match=r"^processor must have an eos_token, got none, .* stop at token 11 instead; set"
    ):
        written(made)


def test_first_token_is_added_where_the_tokenizer_adds_it():
    from tokenizers.processors import TemplateProcessing

    made = tokenizer("llama-bpe")
    made.bos_token = "<|endoftext|>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", made.bos_token_id)]
    )
    assert written(made)["ggml.add_bos_token"] is True and written(made)["ggml.add_eos_token"] is False


def _changed(**parts):
    made = description()
    for name, value in parts.items():
        made["model" if name == "dropout" else name] = (
            {**made["model"], "dropout": value} if name == "dropout" else value
        )
    return made


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: _changed(pre_tokenizer=None), "processor must have a byte-level BPE tokenizer, got BPE that is not"),
        (lambda: _changed(decoder=None), "processor must have a byte-level BPE tokenizer"),
        (
            lambda: {**_changed(), "model": {**description()["model"], "vocab": {"a": 0}}},
            r"a token for each printable ASCII character, got none for \['!', '\"',",
        ),
        (lambda: _changed(dropout=0.1), "processor must have a BPE tokenizer without dropout"),
        (lambda: _changed(normalizer={"type": "NFKC"}), r"leaves text as it is, got \['NFKC'\]"),
        (
            lambda: _changed(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}),
            "processor must split text as llama-bpe, .* do, got .*add_prefix_space",
        ),
        (
            lambda: _changed(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}"}, "behavior": "Isolated", "invert": False},
                        {**BYTE_LEVEL, "use_regex": False},
                    ],
                }
            ),
            r"processor must split text as",
        ),
        (lambda: {**_changed(), "model": {**description()["model"], "ignore_merges": True}}, "must split text as"),
    ],
)
def test_other_tokenizers_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        pre_name(made())


def test_a_vocabulary_that_does_not_fit_is_refused():
    made = tokenizer("qwen2")
    with pytest.raises(ValueError, match=rf"at most {len(made) - 1} tokens, .* got {len(made)}; call model.resize"):
        written(made, rows=len(made) - 1)
    with pytest.raises(ValueError, match="processor must have one chat template, got dict"):
        written(made, template={"default": "x"})


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    "content, flags, message",
    [
        ("<mask>", {"lstrip": True}, "strip the text beside them"),
        ("<mask>", {"rstrip": True}, "strip the text beside them"),
        ("word", {"single_word": True}, r"are whole words only \(single_word\)"),
        ("a<|im_end|>", {"normalized": True}, r"contain others and are found after them \(normalized\)"),
    ],
)
def test_added_tokens_that_the_engine_finds_elsewhere_are_refused(content, flags, message, special):
    made = tokenizer("qwen2")
    made.add_tokens([AddedToken(content, special=special, **flags)], special_tokens=special)
    with pytest.raises(ValueError, match=rf"must have no tokens that {message}, got \['{re.escape(content)}'\]; add"):
        written(made)


@pytest.mark.parametrize("content, normalized", [("word", True), ("word", False), ("a<|im_end|>", False)])
def test_added_tokens_that_the_engine_finds_alike_are_written(content, normalized):
    made = tokenizer("qwen2")
    made.add_tokens([AddedToken(content, special=False, normalized=normalized)])
    assert written(made)["ggml.tokens"][-1] == content


def test_slow_and_unigram_tokenizers_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="byte-level BPE tokenizer, got WordLevel"):
        written(PreTrainedTokenizerFast(tokenizer_object=words))
    with pytest.raises(ValueError, match="processor must have a fast tokenizer, got object"):
        written(object(), rows=1)
