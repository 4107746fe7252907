"""The mean error of an exported file: the same places for every file, and never a place left out."""

from pathlib import Path

import pytest

from benchmarks.gguf import round_trip
from benchmarks.gguf.engine import Answer
from benchmarks.gguf.models import tiny
from benchmarks.gguf.round_trip import PLACES, Next, next_tokens

PLACE = [Next("one", 1, 5, -1.0), Next("one two", 2, 7, -2.0)]


def _answers(monkeypatch: pytest.MonkeyPatch, *answers: Answer) -> None:
    monkeypatch.setattr(round_trip, "ask", lambda path, projector, requests, tokens: list(answers))


def test_the_mean_is_over_the_tokens_that_transformers_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Answer(1, [4], [-0.5], "", {4: -0.5, 5: -1.25}), Answer(2, [7], [-1.5], "", {7: -1.5})
    _answers(monkeypatch, first, second)
    assert round_trip._mean_error(Path("file"), PLACE) == (0.25 + 0.5) / 2


@pytest.mark.parametrize("wrong", [Answer(3, [7], [-1.5], "", {7: -1.5}), Answer(2, [6], [-1.5], "", {6: -1.5})])
def test_other_tokens_and_unlikely_tokens_are_errors(monkeypatch: pytest.MonkeyPatch, wrong: Answer) -> None:
    _answers(monkeypatch, Answer(1, [5], [-1.0], "", {5: -1.0}), wrong)
    with pytest.raises(RuntimeError, match="the engine must read 'one two' as 2 tokens and list token 7"):
        round_trip._mean_error(Path("file"), PLACE)


def test_next_tokens_are_those_of_the_model_after_each_prompt() -> None:
    model, tokenizer = tiny("llama")
    found = next_tokens(model, tokenizer)
    assert found and all(one.length in PLACES for one in found)
    for one in found[::8]:
        ids = tokenizer(one.prompt, return_tensors="pt")["input_ids"]
        assert ids.shape[1] == one.length
        log_probs = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        assert log_probs.argmax().item() == one.token
        assert log_probs.max().item() == pytest.approx(one.log_prob, abs=1e-5)
