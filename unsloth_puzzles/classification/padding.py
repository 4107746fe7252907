"""A padding token that is not the end-of-text token, for tokenizer and model."""

import re

from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADDED = "<|pad|>"


def set_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str:
    """Give tokenizer and model the same padding token, which does not end texts.

    The tokenizer keeps its padding token unless that begins or ends texts. Otherwise the function chooses a special
    token that texts do not use: one for padding, a reserved one, or the unknown token. If there is none, it adds
    `<|pad|>`, and a row to the embeddings if they have no spare one.

    Args:
        tokenizer: Changed in place.
        model: Changed in place: its config, and its embeddings if they are too small.

    Returns:
        The padding token.

    Raises:
        ValueError: The embeddings must grow for padding, and the tokenizer has other tokens that they have no row for.
    """
    config = model.config.get_text_config()
    taken = _ids(tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id, config.eos_token_id)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        spare = _spare(tokenizer, taken)
        if spare is None:
            tokenizer.add_special_tokens({"pad_token": ADDED})
        else:
            tokenizer.pad_token = spare
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.pad_token_id >= rows:
        _refuse_tokens_without_row(tokenizer, rows)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for one in {id(config): config, id(model.config): model.config}.values():
        one.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token


def _refuse_tokens_without_row(tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse tokens whose rows would be drawn at random here, never saved, and drawn anew for the loaded adapters."""
    without = [one for one, index in tokenizer.get_vocab().items() if index >= rows and one != tokenizer.pad_token]
    if without:
        raise ValueError(
            f"tokenizer must have no tokens beyond the {rows} rows of the model's embeddings, got {without[:3]}; "
            "resize the causal LM by resize_token_embeddings, save it with the tokenizer, and load that"
        )


def _ids(*given: int | list[int] | None) -> set[int]:
    found: set[int] = set()
    for one in given:
        found |= set(one) if isinstance(one, list) else {one} - {None}
    return found


def _spare(tokenizer: PreTrainedTokenizerBase, taken: set[int]) -> str | None:
    special = {
        index: str(token)
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and index not in taken
    }
    for kind in (r"(^|\W|_)pad(\W|_|$)", r"reserved|unused"):
        for token in special.values():
            if re.search(kind, token, re.IGNORECASE):
                return token
    unknown = tokenizer.unk_token_id
    return tokenizer.unk_token if unknown is not None and unknown not in taken else None
