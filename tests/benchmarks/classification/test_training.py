"""Baselines and training on texts that can be learnt, with a tiny model; with the real one in the slow tier."""

import dataclasses
import random
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import smollm2
from benchmarks.classification import losses, training
from benchmarks.classification.baselines import baselines, difference_interval, score
from benchmarks.classification.docstrings import Docstrings, Example, docstrings
from benchmarks.classification.losses import losses_of
from benchmarks.classification.training import encode, predict, train
from tests.classification.models import byte_tokenizer, save_checkpoint
from unsloth_puzzles.bench import child
from unsloth_puzzles.classification.load import load_classifier

LABELS = ["low", "high"]


def _data(number=64):
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc" if index % 2 == 0 else "xyz", k=draw.randint(3, 9))) for index in range(number)]
    examples = [Example(text, index % 2, f"{index}.py") for index, text in enumerate(texts)]
    half = number // 2
    return Docstrings(LABELS, examples[:half], examples[half:])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def test_score():
    found = score([0, 0, 1, 1], [0, 1, 1, 1], 3)
    assert found.accuracy == 0.75
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.8 + 0) / 3)  # the third class is never right


def test_score_is_that_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score

    draw = np.random.default_rng(1)
    expected, predicted = draw.integers(4, size=(2, 400))
    found = score(predicted, expected, 5)  # the fifth class is in neither
    f1 = f1_score(expected, predicted, labels=range(5), average="macro", zero_division=0.0)
    assert found.macro_f1 == pytest.approx(f1) and found.accuracy == accuracy_score(expected, predicted)


def test_interval_of_a_difference():
    draw = np.random.default_rng(1)
    expected = draw.integers(4, size=400)
    half, most = (np.where(draw.random(400) < share, expected, draw.integers(4, size=400)) for share in (0.5, 0.9))
    low, high = difference_interval(most, half, expected, 4)
    assert 0 < low < score(most, expected, 4).macro_f1 - score(half, expected, 4).macro_f1 < high < 0.5
    assert difference_interval(half, half, expected, 4) == (0, 0)
    low, high = difference_interval(half, most, expected, 4)
    assert low < high < 0


def test_baselines_learn_what_words_say():
    words = {0: ["apple", "pear", "plum"], 1: ["iron", "zinc", "lead"]}
    draw = random.Random(0)
    examples = [Example(" ".join(draw.choices(words[index % 2], k=4)), index % 2, f"{index}.py") for index in range(60)]
    found = baselines(Docstrings(LABELS, examples[:40], examples[40:]))
    assert found["majority"].accuracy == 0.5 and found["majority"].macro_f1 == pytest.approx(1 / 3)
    assert found["naive Bayes"].macro_f1 == found["TF-IDF logistic regression"].macro_f1 == 1


@pytest.mark.parametrize("four_bit", [True, False])
def test_a_tiny_model_learns(checkpoint, four_bit):
    run = train(checkpoint, _data(), steps=24, batch_size=8, four_bit=four_bit, weighted=True, learning_rate=1e-2,
                device="cpu")  # fmt: skip
    assert len(run.losses) == 24 and run.reloaded_equal
    assert run.score.macro_f1 > 0.9 and sum(run.losses[-4:]) < 0.6 * sum(run.losses[:4])
    assert len(run.predicted) == len(run.expected) == 32


def test_logits_are_equal_after_a_training_under_autocast(checkpoint, monkeypatch):
    arguments = training._arguments
    monkeypatch.setattr(
        training, "_arguments", lambda *given, **more: dataclasses.replace(arguments(*given, **more), bf16=True)
    )
    run = train(checkpoint, _data(), steps=3, batch_size=8, four_bit=False, device="cpu")
    assert run.reloaded_equal


def test_unpacked_weights_are_those_of_nf4(checkpoint):
    found = [train(checkpoint, _data(), steps=3, unpacked=unpacked, device="cpu").losses for unpacked in (False, True)]
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) <= 1e-5


def test_losses_of_two_ways_differ_by_float32_rounding_alone(tmp_path):
    name, data = save_checkpoint(tmp_path, num_hidden_layers=1), _data(16)
    exact, ours = (
        losses_of(name, data, way, steps=2, batch_size=4, device="cpu") for way in ("transformers", "patched")
    )
    assert exact.shape == (2,) and exact.dtype == torch.float64 and exact[0] != exact[1]
    assert ((ours - exact).abs() / exact).max() <= 1e-5


def test_predictions_are_in_the_order_of_the_examples(checkpoint):
    torch.manual_seed(0)
    model, tokenizer = load_classifier(checkpoint, LABELS, device="cpu")
    examples = _data(10).test
    found = predict(model, tokenizer, examples, batch_size=2)
    for one, logits in zip(examples, found, strict=True):
        alone = predict(model, tokenizer, [one])[0]
        assert (alone - logits).norm() <= 1e-5 * alone.norm()


def test_texts_are_cut_and_end_with_what_is_asked():
    tokenizer = byte_tokenizer()
    rows = encode(tokenizer, [Example("x" * 100, 1, ""), Example("abc", 0, "")])
    texts = ["".join(tokenizer.convert_ids_to_tokens(row["input_ids"])) for row in rows]
    assert texts == ["x" * 64 + "ĊTopic:", "abcĊTopic:"]  # Ċ: a line break
    assert [row["labels"] for row in rows] == [1, 0]


def test_bad_arguments_are_refused(checkpoint):
    with pytest.raises(ValueError, match=r"^way must be one of transformers, patched, compiled, got 'fast'"):
        train(checkpoint, _data(), way="fast")


@pytest.mark.slow
def test_smollm2_learns_texts_by_heart(smollm2_folder):
    folder, source = smollm2.checkpoint(smollm2_folder, hub=False)
    assert source.startswith("real weights") and smollm2.checkpoint(smollm2_folder, hub=False)[0] == folder
    found = docstrings(most=1)  # one of each package, all in each step
    data = dataclasses.replace(found, test=found.train)
    run = train(folder, data, steps=8, batch_size=len(data.train), four_bit=False, learning_rate=2e-3, device="cpu")
    assert run.losses[-1] < 0.7 * run.losses[0] and run.reloaded_equal
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


def test_losses_apart_are_those_of_this_process(tmp_path, monkeypatch):
    def run(module, *arguments, timeout, show):
        assert module == "benchmarks.classification.losses" and timeout == 5
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        losses.main()

    name = save_checkpoint(tmp_path, num_hidden_layers=1)
    monkeypatch.setattr(losses, "docstrings", lambda: _data(16))
    monkeypatch.setattr(child, "run", run)
    found = losses.losses_apart(name, "patched", steps=2, batch_size=4, timeout=5)
    assert torch.equal(found, losses.losses_of(name, _data(16), "patched", steps=2, batch_size=4))
