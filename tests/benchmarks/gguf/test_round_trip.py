"""The mean error of an exported file: the same places for every file, and never a place left out."""

import threading
from pathlib import Path

import pytest

from benchmarks.gguf import round_trip
from benchmarks.gguf.engine import Answer
from benchmarks.gguf.models import tiny
from benchmarks.gguf.round_trip import PLACES, Next, next_tokens

PLACE = [Next("one", 1, 5, -1.0), Next("one two", 2, 7, -2.0)]


def test_the_mean_is_over_the_tokens_that_transformers_expects() -> None:
    first, second = Answer(1, [4], [-0.5], "", {4: -0.5, 5: -1.25}), Answer(2, [7], [-1.5], "", {7: -1.5})
    assert round_trip._mean_error([first, second], PLACE) == (0.25 + 0.5) / 2


@pytest.mark.parametrize("wrong", [Answer(3, [7], [-1.5], "", {7: -1.5}), Answer(2, [6], [-1.5], "", {6: -1.5})])
def test_other_tokens_and_unlikely_tokens_are_errors(wrong: Answer) -> None:
    with pytest.raises(RuntimeError, match="the engine must read 'one two' as 2 tokens and list token 7"):
        round_trip._mean_error([Answer(1, [5], [-1.0], "", {5: -1.0}), wrong], PLACE)


OURS = Answer(2, [4, 5, 0, 8], [-1.0, -2.0, -3.0, -4.0], "")  # transformers goes on behind the end, token 0


@pytest.mark.parametrize(
    "tokens, log_probs, expected",
    [
        ([4, 5, 0], [-1.0, -2.25, -3.5], (True, 3, 0.5)),
        ([4, 5], [-1.0, -2.25], (False, 2, 0.25)),  # stopped too early
        ([4, 5, 0, 8], [-1.0, -2.25, -3.5, -9.0], (False, 3, 0.5)),  # the stop token is lost
        ([4, 6, 0], [-1.125, -9.0, -9.0], (False, 1, 0.125)),
        ([6, 5, 0], [-1.5, -9.0, -9.0], (False, 0, 0.5)),
    ],
)
def test_answers_are_compared_up_to_their_end(tokens: list[int], log_probs: list[float], expected: tuple) -> None:
    assert round_trip._compared(Answer(2, tokens, log_probs, ""), OURS, 0) == expected


def test_answers_without_an_end_are_compared_as_a_whole() -> None:
    assert round_trip._compared(OURS, OURS, 7) == (True, 4, 0.0)


@pytest.mark.parametrize("cores, threads", [(2, None), (32, 10)])  # the three files in turn, or side by side
def test_a_round_trip_keeps_warnings_and_whether_the_taught_answer_ends(
    monkeypatch, tmp_path: Path, cores: int, threads: int | None
) -> None:
    model, tokenizer = tiny("llama")
    end, asked, judged = tokenizer.eos_token_id, [], []
    started = threading.Barrier(3 if threads else 1, timeout=20)

    def ask(path, projector, requests, *, tokens, stop, threads):
        started.wait()
        asked.append((len(requests), stop, threads))
        return [Answer(2, [5, end] if path.stem == "model-f32" else [5, 6], [-1.0, -1.0], "text") for _ in requests]

    monkeypatch.setattr(round_trip.os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(round_trip, "ask", ask)
    monkeypatch.setattr(round_trip, "fit", lambda model, tokenizer, steps: [1.0])
    monkeypatch.setattr(round_trip, "next_tokens", lambda model, tokenizer, places: PLACE)
    monkeypatch.setattr(round_trip, "_mean_error", lambda answers, places: judged.append(len(answers)) or 0.25)
    found = round_trip.round_trip(
        round_trip.add_adapters(model), tokenizer, tmp_path, steps=1, quantizations=("f32", "q4_k_m"), tokens=2
    )
    assert sorted(asked) == [(1, True, threads)] + [(2 + len(PLACE), True, threads)] * 2
    assert judged == [len(PLACE)] * 2
    assert found["base"] == "text"
    assert found["f32"].ended and not found["q4_k_m"].ended and found["f32"].mean_error == 0.25
    assert found["f32"].warnings == ()
    assert "export_gguf: tensors that q4_k_m does not fit" in found["q4_k_m"].warnings[0]


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
