"""The sweep keeps each case as soon as it is measured, and runs on a tiny model."""

import functools
import os

import pytest

from benchmarks.models import random_llama, random_nf4_llama, tiny_llama_config
from benchmarks.tool_calling import evaluate, grpo, sweeps
from benchmarks.tool_calling.data import test_questions
from benchmarks.tool_calling.evaluate import AFTER_AN_ERROR, HELD_OUT, METRICS, Share
from tests.tool_calling.functions import tokenizer
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

BEFORE = dict.fromkeys((*METRICS, HELD_OUT), Share(0, 4))
AFTER = dict.fromkeys((*METRICS, HELD_OUT, "exact call, mended"), Share(2, 4)) | {AFTER_AN_ERROR: Share(1, 4)}
AGAIN = dict.fromkeys((*METRICS, HELD_OUT), Share(3, 4))


@pytest.fixture
def stubbed(monkeypatch):
    """No model: `load` says what it was asked for, and shares and rewards are given. Returns what was called."""
    calls = []
    reports = [BEFORE, AFTER] * len(sweeps.RUNS) + [AGAIN]
    monkeypatch.setattr(sweeps, "load", lambda folder, **given: (given["four_bit"], "tokenizer", "a model"))
    monkeypatch.setattr(sweeps, "merged", lambda model: model)
    monkeypatch.setattr(sweeps, "test_questions", list)
    monkeypatch.setattr(sweeps, "evaluate", lambda *_, **__: (reports.pop(0), []))
    monkeypatch.setattr(sweeps, "fine_tune", lambda model, _, seed: calls.append((model, seed)) or (model, []))
    rewards = [{"reward": n / 20} for n in range(20)]
    monkeypatch.setattr(sweeps.grpo, "train", lambda model, _, **given: calls.append((model, given)) or rewards)
    return calls


def test_all_cases_are_kept(stubbed, tmp_path):
    path = tmp_path / "sweep.json"
    sweeps.measure(path, probe(measure=False), at_once=1)
    assert stubbed[:4] == [(True, 0), (True, 1), (True, 2), (False, 0)]
    assert stubbed[4][0] is False and stubbed[4][1]["steps"] == 20
    found = Measurements.load(path)
    (one,) = found.find("tool_calling", "exact call, NF4, seed 2")
    assert (one["value"], one["baselines"]) == (0.5, {"before": 0.0}) and one["low"] < 0.5 < one["high"]
    (one,) = found.find("tool_calling", f"{AFTER_AN_ERROR}, 16 bits, seed 0")
    assert (one["value"], one["baselines"]) == (0.25, {})
    (one,) = found.find("tool_calling", "abstention, 16 bits, seed 0, then 20 steps of GRPO")
    assert (one["value"], one["baselines"]) == (0.75, {"before": 0.5})
    (one,) = found.find("tool_calling_reward")
    assert (one["value"], one["baselines"]) == (pytest.approx(0.85), {"first 5 steps": pytest.approx(0.1)})
    assert len(found.records) == 4 * len(sweeps.SHOWN) + len(sweeps.SHOWN) - 1 + 1


def test_measurements_are_kept_if_a_later_case_fails(stubbed, tmp_path, monkeypatch):
    def fail(model, _, seed):
        if seed == 1:
            raise RuntimeError("no memory")
        return model, []

    monkeypatch.setattr(sweeps, "fine_tune", fail)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        sweeps.measure(tmp_path / "sweep.json", probe(measure=False), at_once=1)
    records = Measurements.load(tmp_path / "sweep.json").records
    assert len(records) == len(sweeps.SHOWN) and all("seed 0" in record["case"] for record in records)


def given(run, hardware, folder, with_grpo):
    """Stands for `sweeps.trained`, in a process of its own."""
    again, rewards = (AGAIN, [n / 20 for n in range(20)]) if with_grpo else (None, [])
    return sweeps.Trained(f"{run} in {os.getpid()}", BEFORE, AFTER, again, rewards)


@pytest.mark.slow
def test_runs_side_by_side_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "trained", given)
    monkeypatch.setattr(sweeps, "checkpoint", lambda folder: None)
    found = sweeps.measure(tmp_path / "sweep.json", probe(measure=False), at_once=2)
    runs = {record["case"].removeprefix("parse rate, ") for record in found.records if "parse rate" in record["case"]}
    runs, (grpo_run,) = {run for run in runs if "GRPO" not in run}, [run for run in runs if "GRPO" in run]
    names, processes = zip(*(run.split(" in ") for run in runs), strict=True)
    assert {*names} == {*sweeps.RUNS} and str(os.getpid()) not in processes
    assert grpo_run.startswith("16 bits, seed 0 in ")
    (reward,) = found.find("tool_calling_reward")
    assert reward["value"] == pytest.approx(0.85)
    assert Measurements.load(found.path).records == found.records


def fails_once(run, hardware, folder, with_grpo):
    """As `given`, but the second run fails."""
    if run == "NF4, seed 1":
        raise RuntimeError("no memory")
    return given(run, hardware, folder, with_grpo)


@pytest.mark.slow
def test_a_run_that_fails_beside_others_loses_none_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "trained", fails_once)
    monkeypatch.setattr(sweeps, "checkpoint", lambda folder: None)
    with pytest.raises(RuntimeError, match=r"^no memory$"):
        sweeps.measure(tmp_path / "sweep.json", probe(measure=False), at_once=2)
    cases = {record["case"] for record in Measurements.load(tmp_path / "sweep.json").records}
    for run in sweeps.RUNS:
        assert any(f", {run} in " in case for case in cases) == (run != "NF4, seed 1")


@pytest.mark.slow
def test_sweep_of_a_tiny_model(tmp_path, monkeypatch):
    config = tiny_llama_config(len(tokenizer()))
    config.max_position_embeddings = 8192
    questions = test_questions(counts={"one call": 1, "needs none": 1, "held-out tool": 1})

    def load(folder, *, device, dtype, four_bit):
        model = random_nf4_llama(config, device, dtype) if four_bit else random_llama(config, device)
        return model, tokenizer(), "random weights"

    monkeypatch.setattr(sweeps, "load", load)
    monkeypatch.setattr(sweeps, "RUNS", {name: sweeps.RUNS[name] for name in ("NF4, seed 1", "16 bits, seed 0")})
    monkeypatch.setattr(sweeps, "test_questions", lambda: questions)
    monkeypatch.setattr(evaluate, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(sweeps, "fine_tune", functools.partial(sweeps.fine_tune, steps=1, batch_size=1))
    monkeypatch.setattr(sweeps, "GRPO_STEPS", 2)
    monkeypatch.setattr(sweeps, "COMPARED", 1)
    short = functools.partial(grpo.train, prompts=1, samples=2, max_completion_length=8)
    monkeypatch.setattr(grpo, "train", short)
    found = sweeps.measure(tmp_path / "sweep.json", probe(measure=False), at_once=1)
    assert Measurements.load(found.path).records == found.records
    assert len(found.find("tool_calling")) == 3 * len((*METRICS, HELD_OUT)) and len(found.records) == 19
