"""The padding token is one that ends no text, and the model knows it."""

from types import SimpleNamespace

import pytest

from tests.classification.models import TEXTS, batch, byte_tokenizer, classifier, save_checkpoint
from unsloth_puzzles.classification.padding import ADDED, set_pad_token


class Model:
    """As much of a model as is looked at."""

    def __init__(self, rows=512, eos=1):
        self.config = SimpleNamespace(bos_token_id=0, eos_token_id=eos, pad_token_id=None)
        self.config.get_text_config = lambda: self.config
        self._rows = rows

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=self._rows)


@pytest.mark.parametrize(
    "special, tokens, expected",
    [
        (("<s>", "</s>", "<pad>"), {}, "<pad>"),  # its own
        (("<s>", "</s>", "<|reserved_0|>", "<|vision_pad|>"), {"pad_token": "</s>"}, "<|vision_pad|>"),
        (("<s>", "</s>", "<|notepad|>", "<|reserved_0|>"), {"pad_token": "</s>"}, "<|reserved_0|>"),
        (("<s>", "</s>", "<unk>"), {"unk_token": "<unk>"}, "<unk>"),
        (("<s>", "</s>"), {"unk_token": "</s>", "pad_token": "<s>"}, ADDED),
        (("<s>", "</s>"), {}, ADDED),
    ],
)
def test_the_token_that_is_taken(special, tokens, expected):
    tokenizer, model = byte_tokenizer(special, **tokens), Model()
    assert set_pad_token(tokenizer, model) == expected == tokenizer.pad_token
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids(expected)
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_no_token_that_ends_texts_for_the_model_is_taken():
    tokenizer = byte_tokenizer(("<s>", "</s>", "<pad>", "<|other_pad|>"))
    assert set_pad_token(tokenizer, Model(eos=[1, 2])) == "<|other_pad|>"


def test_other_tokens_without_a_row_are_refused_where_embeddings_grow():
    tokenizer = byte_tokenizer(("<s>", "</s>"))
    rows = len(tokenizer)
    tokenizer.add_tokens(["[CTX]"])
    with pytest.raises(ValueError, match=rf"^tokenizer must have no tokens beyond the {rows} rows of .*\['\[CTX\]'\]"):
        set_pad_token(tokenizer, Model(rows))


def test_other_tokens_without_a_row_may_be_where_padding_has_one():
    """Gemma 3 of 1B has a token of images, which no text has, behind the rows of its embeddings."""
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"])
    assert set_pad_token(tokenizer, Model(rows)) == "<pad>"


def test_embeddings_grow_where_they_have_no_row_to_spare(tmp_path):
    checkpoint = save_checkpoint(tmp_path, byte_tokenizer(("<s>", "</s>")))
    model, tokenizer = classifier(checkpoint, adapters=False)
    assert tokenizer.pad_token == ADDED
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == len(tokenizer)
    assert model.eval()(**batch(tokenizer, TEXTS)).logits.isfinite().all()
