"""The tokenizer of transformers as metadata of a GGUF file; one that the engine would split otherwise is refused.

llama.cpp knows a tokenizer by `tokenizer.ggml.pre`, a name that stands for a regular expression. Its converter finds
the name by a hash over encoded text, so a tokenizer with one more token has none. Here the expression itself decides.
"""

import json

import gguf

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# (split expression or None for ByteLevel's own, digits split one by one, whether whole words skip the merges): the name
PRE = {
    (_WORDS + r"\p{N}{1,3}" + _REST, False, True): "llama-bpe",
    (_WORDS + r"\p{N}{1,3}" + _REST, False, False): "smaug-bpe",
    (_WORDS + r"\p{N}" + _REST, False, False): "qwen2",
    (None, True, False): "smollm",
    (None, False, False): "gpt-2",
}
ENDS = ("eos", "eot", "eom")  # the keys of a GGUF file for tokens that end a generation: of text, turn, message
PRINTABLE = "".join(map(chr, range(33, 127))) + "\u0120"  # as byte-level BPE writes them: a space is \u0120


def add_tokenizer(header: gguf.GGUFWriter, tokenizer, template: str | None, rows: int, stops: list[int]) -> None:
    """Write the vocabulary, the merges, the special tokens and the chat template.

    Args:
        header: gets them.
        tokenizer: a fast tokenizer of transformers: byte-level BPE, split by an expression of `PRE`.
        template: the chat template, or None.
        rows: how many rows the embedding has; those without a token become unused tokens.
        stops: ids that end a generation; the tokenizer's own `eos_token_id` comes first. The file has room for three
            in all.

    Raises:
        ValueError: another kind of tokenizer; more tokens than rows; no token that ends a generation; added tokens that
            the engine finds elsewhere.
    """
    description = json.loads(_backend(tokenizer).to_str())
    model = description["model"]
    header.add_tokenizer_model("gpt2")
    header.add_tokenizer_pre(pre_name(description))
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ValueError(f"processor must have at most {rows} tokens, as the embedding has rows, got {max(by_id) + 1}; "
                         "call model.resize_token_embeddings")  # fmt: skip
    added = {token["id"]: token for token in description["added_tokens"]}
    _check_added(list(added.values()))
    header.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(rows)])
    header.add_token_types([_type(number, by_id, added) for number in range(rows)])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    if not merges:
        raise ValueError("processor must have a BPE tokenizer with merges, got none")
    header.add_token_merges(merges)
    for name in ("bos", "pad", "unk"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(header, f"add_{name}_token_id")(number)
    ends = end_ids(tokenizer, stops)
    if not ends:
        raise ValueError("processor must have an eos_token, got none, and the engine would stop at token 11 instead; "
                         "set it, or eos_token_id of model.generation_config")  # fmt: skip
    for name, number in zip(ENDS, ends, strict=False):  # llama.cpp stops at each of these
        getattr(header, f"add_{name}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]
    header.add_add_bos_token(encoded[0] == tokenizer.bos_token_id)
    header.add_add_eos_token(len(encoded) > 1 and encoded[-1] == tokenizer.eos_token_id)
    if template is not None:
        if not isinstance(template, str):
            raise ValueError(f"processor must have one chat template, got {type(template).__name__}")
        header.add_chat_template(template)


def end_ids(tokenizer, stops: list[int]) -> list[int]:
    """The ids that end a generation, each once: the tokenizer's own `eos_token_id` and `stops`.

    The file has room for the first three (`ENDS`).
    """
    own = tokenizer.eos_token_id
    return list(dict.fromkeys([*([] if own is None else [own]), *stops]))


def _check_added(tokens: list[dict]) -> None:
    """The engine finds an added token wherever its text is, a longer one first, and leaves the text beside it."""
    contents = {token["content"] for token in tokens if not token["normalized"]}
    for what, found in (
        ("strip the text beside them", [one for one in tokens if one["lstrip"] or one["rstrip"]]),
        ("are whole words only (single_word)", [one for one in tokens if one["single_word"]]),
        (
            "contain others and are found after them (normalized)",
            [one for one in tokens if one["normalized"] and any(content in one["content"] for content in contents)],
        ),
    ):
        if found:
            listed = [one["content"] for one in found[:3]]
            raise ValueError(f"processor must have no tokens that {what}, got {listed}; add them without that flag")


def pre_name(description: dict) -> str:
    """The engine's name of how a tokenizer splits text.

    Args:
        description: the parsed JSON of the `tokenizers` library.

    Raises:
        ValueError: it is no byte-level BPE, or splits text in a way that has no name here.
    """
    model, decoder = description["model"], json.dumps(description["decoder"])
    byte_level = '"ByteLevel"' in decoder and '"ByteLevel"' in json.dumps(description["pre_tokenizer"])
    if model["type"] != "BPE" or not byte_level:
        kind = model["type"] + (" with byte fallback" if model.get("byte_fallback") else "")
        raise ValueError(f"processor must have a byte-level BPE tokenizer, got {kind} that is not byte-level")
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("processor must have a BPE tokenizer without dropout, prefix and suffix, got one of them")
    missing = [sign for sign in PRINTABLE if sign not in model["vocab"]]  # released ones lack bytes that are in no text
    if missing:
        raise ValueError(f"processor must have a token for each printable ASCII character, got none for {missing[:5]}")
    normalizers = [one["type"] for one in _flat(description["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):  # NFC: the engine takes text as it comes, which is composed almost always
        raise ValueError(f"processor must have a tokenizer that leaves text as it is, got {normalizers}")
    steps = _flat(description["pre_tokenizer"], "pretokenizers")
    key = (*_splits(steps), bool(model.get("ignore_merges")))
    if key not in PRE:
        raise ValueError(f"processor must split text as {', '.join(PRE.values())} do, got {json.dumps(steps)[:400]}")
    return PRE[key]


def _splits(steps: list[dict]) -> tuple[str | None, bool] | tuple[str]:
    """The expression and whether digits stand alone; something that is in no key of `PRE` where steps are unknown."""
    expression, digits = None, False
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": found}, "behavior": "Isolated", "invert": False} if (
                not expression
            ):
                expression = found
            case {"type": "Digits", "individual_digits": True}:
                digits = True
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": own} if own == (expression is None):
                pass
            case _:
                return ("unknown",)
    return expression, digits


def _flat(part: dict | None, inner: str) -> list[dict]:
    """The steps of a part of the description, sequences opened."""
    if part is None:
        return []
    return [step for one in part[inner] for step in _flat(one, inner)] if part["type"] == "Sequence" else [part]


def _backend(tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"processor must have a fast tokenizer, got {type(tokenizer).__name__}")
    return backend


def _type(number: int, by_id: dict, added: dict) -> gguf.TokenType:
    if number not in by_id:
        return gguf.TokenType.UNUSED
    if number not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED
