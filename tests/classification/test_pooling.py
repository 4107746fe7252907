"""A row's logits do not depend on its padding: which token, which side, how many. Wrong training is refused."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, pipeline

from tests.classification.models import LABELS, TEXTS, alone, batch, byte_tokenizer, classifier
from unsloth_puzzles.classification.adapters import save_classifier
from unsloth_puzzles.classification.losses import (
    MULTI,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE,
    class_weights,
    weigh_classes,
)
from unsloth_puzzles.classification.pooling import _CACHE as CACHE
from unsloth_puzzles.classification.pooling import is_pooled, last_positions, pool_by_mask
from unsloth_puzzles.compiled.classifier import compile_loss

ENDED = [text + "</s>" for text in TEXTS]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    model, tokenizer = classifier(checkpoint)
    return model.eval(), tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
@pytest.mark.parametrize("texts", [TEXTS, ENDED], ids=["bare", "ended"])
def test_padded_rows_have_the_logits_of_rows_alone(loaded, side, pad, texts):
    model, _ = loaded
    tokenizer = byte_tokenizer(pad_token=pad, padding_side=side)
    with torch.no_grad():
        expected = alone(model, tokenizer, texts)
        found = model(**batch(tokenizer, texts)).logits
    assert (found - expected).norm() <= 2e-6 * expected.norm()


def test_transformers_alone_reads_another_position_if_padding_ends_texts(checkpoint):
    """If this fails, transformers pools by the mask itself, and `pool_by_mask` is not needed for that any more."""
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3, pad_token_id=1).eval()
    tokenizer = byte_tokenizer(pad_token="</s>")
    with torch.no_grad():
        expected, found = alone(plain, tokenizer, TEXTS), plain(**batch(tokenizer, ENDED)).logits
        right = torch.cat([plain(**batch(tokenizer, [text])).logits for text in ENDED])
    assert (found - right).norm() <= 2e-6 * right.norm()  # alone they are wrong as well: the end is taken for padding
    plain.config.pad_token_id = 2
    with torch.no_grad():
        assert (alone(plain, tokenizer, ENDED) - found).norm() > 0.1 * found.norm()
    assert expected.shape == found.shape


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_padding_is_masked(loaded, side):
    model, _ = loaded
    given = batch(byte_tokenizer(padding_side=side))
    with torch.no_grad():
        assert torch.equal(model(given["input_ids"]).logits, model(**given).logits)


def test_rows_without_a_mask_and_a_padding_token_are_refused(checkpoint):
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    model.config.problem_type, model.config.pad_token_id = "single_label_classification", None
    pool_by_mask(model)
    ids = torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^attention_mask must be given for 2 rows where"):
        model(ids)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        assert torch.equal(model(ids[:1]).logits, model(ids[:1], attention_mask=mask[:1]).logits)
        assert model(ids, attention_mask=mask).logits.isfinite().all()


def test_embeddings_instead_of_ids(loaded):
    model, tokenizer = loaded
    given = batch(tokenizer)
    embedded = model.get_input_embeddings()(given["input_ids"])
    with torch.no_grad():
        expected = model(**given).logits
        found = model(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits
        last = model(inputs_embeds=embedded[1:2]).logits  # the longest
    assert torch.equal(found, expected)
    assert (last - expected[1:2]).norm() <= 2e-6 * last.norm()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("texts, rows", [(["", "text"], [0]), (["text", "", "x", ""], [1, 3])])
def test_rows_without_a_token_are_refused(loaded, side, texts, rows):
    model, _ = loaded
    given = batch(byte_tokenizer(padding_side=side), texts)
    embedded = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}
    message = rf"^attention_mask must keep a token of each row, got none in rows {re.escape(str(rows))} of the batch; "
    for inputs in (given, {"input_ids": given["input_ids"]}, {**embedded, "attention_mask": given["attention_mask"]}):
        for labels in ({}, {"labels": torch.zeros(len(texts)).long()}):
            with pytest.raises(ValueError, match=message):
                model(**inputs, **labels)
    with torch.no_grad():
        assert model(**batch(byte_tokenizer(padding_side=side), ["</s>", "text"])).logits.isfinite().all()


def test_a_row_that_ends_in_the_cache_is_refused(loaded):
    """The mask has tokens of the second row, but none of those that are new."""
    model, tokenizer = loaded
    given = batch(tokenizer, ["a text of two parts", "a te"])
    with torch.no_grad():
        cache = model(**{name: one[:, :4] for name, one in given.items()}, use_cache=True)[CACHE]
        with pytest.raises(ValueError, match=r"^attention_mask must keep a token .*, got none in rows \[1\] of"):
            model(given["input_ids"][:, 4:], attention_mask=given["attention_mask"], **{CACHE: cache})


def test_a_mask_that_is_too_short_is_refused(loaded):
    model, tokenizer = loaded
    given = batch(tokenizer)
    with pytest.raises(ValueError, match=r"^attention_mask must have 18 positions, got 17"):
        model(given["input_ids"], attention_mask=given["attention_mask"][:, 1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_without_a_token_is_no_number_in_compiled_code(loaded, side, monkeypatch):
    model, _ = loaded
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        logits = model(**batch(byte_tokenizer(padding_side=side), ["", "text"])).logits
    assert logits[0].isnan().all() and logits[1].isfinite().all()


def test_last_positions():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0]])
    assert last_positions(mask).tolist() == [1, 3, 2, 3, 2] == last_positions(mask.bool()).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_and_loss_are_float32_also_under_autocast(checkpoint, dtype):
    model, tokenizer = classifier(checkpoint, dtype=dtype)
    given = {**batch(tokenizer), "labels": torch.tensor([0, 1, 2])}
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            output = model(**given)
        assert output.logits.dtype == output.loss.dtype == torch.float32
    output.loss.backward()
    assert model.base_model.model.score.modules_to_save.default.weight.grad.dtype == torch.float32


def test_outputs_are_those_that_were_asked_for(loaded):
    model, tokenizer = loaded
    given = batch(tokenizer)
    with torch.no_grad():
        output = model(**given, output_hidden_states=True, labels=torch.tensor([0, 1, 2]))
        loss, logits, *_ = model(**given, labels=torch.tensor([0, 1, 2]), return_dict=False)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (3, 18, 64)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)


def test_undo_copy_and_pickle(checkpoint):
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    cls, loss = type(plain), plain.loss_function
    plain.config.problem_type = "single_label_classification"
    undo = pool_by_mask(plain)
    assert is_pooled(plain) and is_pooled(copy.deepcopy(plain)) and type(plain).__name__ == cls.__name__
    loaded, given = pickle.loads(pickle.dumps(plain)), batch(byte_tokenizer(padding_side="right"))
    assert is_pooled(loaded) and isinstance(loaded, cls)
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, plain(**given).logits)
    with pytest.raises(TypeError, match=r"model must be a decoder for sequence classification"):
        pool_by_mask(plain)
    undo()
    assert type(plain) is cls and plain.loss_function is loss


@pytest.mark.parametrize("changed", PROBLEM_TYPES)
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_config_of_another_kind_of_problem_is_refused(checkpoint, tmp_path, problem_type, changed):
    """Labels would be checked for one kind, the loss computed for another, and a third one saved."""
    model, tokenizer = classifier(checkpoint, LABELS, problem_type, four_bit=False)
    given = batch(tokenizer)
    labels = torch.tensor([0, 2, 1]) if changed == SINGLE else torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    base = model.get_base_model()
    base.config.problem_type = changed
    if changed == problem_type:
        output = model(**given, labels=labels)
        expected = {
            SINGLE: F.cross_entropy,
            MULTI: F.binary_cross_entropy_with_logits,
            REGRESSION: F.mse_loss,
        }[problem_type](output.logits, labels)
        assert (output.loss - expected).abs() <= 1e-6 * expected
        return
    message = rf"^model\.config\.problem_type must be '{problem_type}', .*, got '{changed}'; pass problem_type to load_"
    with pytest.raises(ValueError, match=message):
        model(**given, labels=labels)
    with pytest.raises(ValueError, match=message):
        weigh_classes(model, None)
    with pytest.raises(ValueError, match=message):
        save_classifier(model, tokenizer, tmp_path)
    undo = compile_loss(base, {})
    with pytest.raises(ValueError, match=message):
        model(**given, labels=labels)
    undo()
    assert model.eval()(**given).logits.isfinite().all()


def test_a_config_that_changes_after_a_model_was_compiled_is_refused(checkpoint):
    model, tokenizer = classifier(checkpoint, LABELS, MULTI, adapters=False, four_bit=False)
    given = {**batch(tokenizer), "labels": torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 1]])}
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(compiled(**given).loss, model(**given).loss)
    model.config.problem_type = REGRESSION
    with pytest.raises(
        ValueError, match=r"^model\.config\.problem_type must be 'multi_label_classification', .*, got 'reg"
    ):
        compiled(**given)


def test_a_config_without_a_kind_of_problem_is_refused(checkpoint):
    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    with pytest.raises(ValueError, match=r"^model\.config\.problem_type must be one of single_label_.*, got None$"):
        pool_by_mask(plain)
    assert not is_pooled(plain)


def test_a_frozen_head_is_not_trained_in_silence(checkpoint):
    """LoRA without a task type leaves the head as it was drawn, and does not save it."""
    model, tokenizer = classifier(checkpoint, adapters=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).train()
    given = {**batch(tokenizer), "labels": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=r"^model\.score must be trained, got a frozen head.*use add_adapters"):
        adapted(**given)
    with torch.no_grad():
        adapted(**given)
    assert adapted.eval()(**given).loss.isfinite()


def test_weights_of_classes_are_not_ignored_in_silence(checkpoint):
    """With label smoothing a Trainer computes the loss itself, from logits."""
    model, tokenizer = classifier(checkpoint)
    given = batch(tokenizer)
    model(**given)
    weigh_classes(model, class_weights([0, 0, 1, 2], 3))
    with pytest.raises(
        ValueError, match=r"^labels must be given where classes have weights, got none: label_smoothing"
    ):
        model(**given)
    model.eval()(**given)


@pytest.mark.parametrize("name", sorted({"past_key_values", CACHE}))
def test_a_kv_cache_before_the_text(loaded, name):
    """As prefix tuning calls a model: the mask covers the cache, too. Newer transformers know two names for it."""
    model, tokenizer = loaded
    given = batch(tokenizer, ["a text of two parts", "a text"])
    with torch.no_grad():
        expected = model(**given).logits
        first = {name: one[:, :4] for name, one in given.items()}
        cache = {name: model(**first, use_cache=True)[CACHE]}
        found = model(given["input_ids"][:, 4:], attention_mask=given["attention_mask"], **cache).logits
        row = {name: one[:1] for name, one in first.items()}
        cache = {name: model(**row, use_cache=True)[CACHE]}
        whole = model(given["input_ids"][:1, 4:], **cache).logits  # without a mask all is text
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    assert (whole - expected[:1]).norm() <= 2e-6 * expected[:1].norm()


def test_pipeline_of_transformers_names_the_labels(loaded):
    model, tokenizer = loaded
    classify = pipeline("text-classification", model=model.get_base_model(), tokenizer=tokenizer, device="cpu")
    with torch.no_grad():
        expected = alone(model, tokenizer).argmax(-1)
    assert [one["label"] for one in classify(TEXTS, batch_size=3)] == [LABELS[index] for index in expected]


def test_a_mask_of_four_dimensions_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match=r"^attention_mask must be \[batch, length\], got shape \(3, 1, 18, 18\)"):
        model(batch(tokenizer)["input_ids"], attention_mask=torch.ones(3, 1, 18, 18))
