"""The sweep on a tiny model: every figure is there and is what it says."""

import dataclasses
import json

import pytest
import torch

from benchmarks.classification import sweeps
from benchmarks.classification.docstrings import Docstrings, Example
from benchmarks.classification.figure import confusion_figure
from benchmarks.classification.training import WAYS, Run, Score
from tests.classification.models import save_checkpoint
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements

LABELS = ["low", "high"]


def _data(seed):
    texts = [("aab abc bca", 0), ("xyz zzy yxx", 1)] * 12
    examples = [
        Example(f"{text} {'bx'[label] * (n % 5 + seed)}", label, f"{n}") for n, (text, label) in enumerate(texts)
    ]
    return Docstrings(LABELS, examples[:12], examples[12:])


@pytest.mark.slow
def test_sweep(tmp_path):
    model = save_checkpoint(tmp_path / "checkpoint", num_hidden_layers=1)
    hardware = dataclasses.replace(probe(measure=False), device="cpu")
    data = {seed: _data(seed) for seed in (1, 2)}
    sweeps.measure(tmp_path / "sweep.json", hardware, model=model, data=data, epochs=2, parity_steps=2)
    records = {
        (one["metric"], one["case"]): one for one in json.loads((tmp_path / "sweep.json").read_text())["records"]
    }
    for way in ("patched", "compiled"):
        assert records["loss_difference", f"{way}, 2 steps, float32"]["value"] <= 1e-5
    for metric in ("macro_f1", "accuracy"):
        of_seeds = [records[metric, f"docstrings, seed {seed}"] for seed in (1, 2)]
        one = records[metric, "docstrings, 2 seeds"]
        assert [one["low"], one["high"]] == sorted(of["value"] for of in of_seeds)
        assert one["low"] <= one["value"] <= one["high"] <= 1
        assert set(one["baselines"]) == {
            "majority", "naive Bayes", "TF-IDF logistic regression", "LoRA, not quantised",
        }  # fmt: skip


def _fake(monkeypatch, broken_seed=None):
    """Training that is over at once: each way is 0.001 nats off the one before, each seed 0.1 better."""

    def losses_of(model, data, way, *, steps, device):
        return torch.tensor([1.0, 0.5 + 0.001 * WAYS.index(way)], dtype=torch.float64)

    def train(model, data, *, four_bit, seed, **options):
        score = Score(0.5 + seed / 10, 0.3 + seed / 10 if four_bit else 0.2)
        return Run([], score, [], [], seed != broken_seed, 1.0)

    monkeypatch.setattr(sweeps, "losses_of", losses_of)
    monkeypatch.setattr(sweeps, "train", train)
    monkeypatch.setattr(sweeps, "baselines", lambda data: {"majority": Score(0.1, 0.05)})


def _values(found):
    return {(one["metric"], one["case"]): (one["value"], one["low"], one["high"]) for one in found.records}


def test_scores_of_each_seed_and_their_median(tmp_path, monkeypatch, capsys):
    _fake(monkeypatch)
    path, hardware = tmp_path / "sweep.json", probe(measure=False)
    sweeps.measure(path, hardware, model="any", data={seed: _data(seed) for seed in (1, 3, 2)}, parity_steps=2)
    found = Measurements.load(path)
    assert _values(found) == {
        ("loss_difference", "patched, 2 steps, float32"): (pytest.approx(0.001), None, None),
        ("loss_difference", "compiled, 2 steps, float32"): (pytest.approx(0.002), None, None),
        **{("macro_f1", f"docstrings, seed {seed}"): (0.3 + seed / 10, None, None) for seed in (1, 2, 3)},
        **{("accuracy", f"docstrings, seed {seed}"): (0.5 + seed / 10, None, None) for seed in (1, 2, 3)},
        ("macro_f1", "docstrings, 3 seeds"): (0.5, 0.4, 0.6),
        ("accuracy", "docstrings, 3 seeds"): (0.7, 0.6, 0.8),
    }
    assert found.find("macro_f1", "docstrings, 3 seeds")[0]["baselines"] == {
        "majority": 0.05, "LoRA, not quantised": 0.2,
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "losses differ by 2.0e-03 nats" in said and "seed 3, LoRA, not quantised" in said


def test_measurements_before_an_error_are_kept(tmp_path, monkeypatch):
    _fake(monkeypatch, broken_seed=2)
    path, hardware = tmp_path / "sweep.json", probe(measure=False)
    with pytest.raises(RuntimeError, match=r"^logits must be equal after saving and loading, got others: .*, seed 2"):
        sweeps.measure(path, hardware, model="any", data={seed: _data(seed) for seed in (1, 2)}, parity_steps=2)
    kept = Measurements.load(path)
    assert len(kept.find("loss_difference")) == 2 and kept.find("macro_f1", "docstrings, seed 1")


def test_confusion_figure(tmp_path):
    run = Run([], Score(0.75, 0.7), [0, 1, 1, 0], [0, 1, 1, 1], True, 1.0)
    confusion_figure(run, LABELS, "a model, a machine", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
