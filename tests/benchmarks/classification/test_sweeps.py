"""The sweep on a tiny model: every figure is there and is what it says."""

import json

import pytest

from benchmarks.classification.docstrings import Docstrings, Example
from benchmarks.classification.figure import confusion_figure
from benchmarks.classification.sweeps import measure
from benchmarks.classification.training import Run, Score
from tests.classification.models import save_checkpoint

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
    measure(tmp_path / "sweep.json", model, data={seed: _data(seed) for seed in (1, 2)}, device="cpu", epochs=2,
            parity_steps=2)  # fmt: skip
    records = {
        (one["metric"], one["case"]): one for one in json.loads((tmp_path / "sweep.json").read_text())["records"]
    }
    for way in ("patched", "compiled"):
        assert records["loss_difference", f"{way}, 2 steps, float32"]["value"] <= 1e-5
    for metric in ("macro_f1", "accuracy"):
        one = records[metric, "docstrings, 2 seeds"]
        assert one["low"] <= one["value"] <= one["high"] <= 1
        assert set(one["baselines"]) == {
            "majority", "naive Bayes", "TF-IDF logistic regression", "LoRA, not quantised",
        }  # fmt: skip


def test_confusion_figure(tmp_path):
    run = Run([], Score(0.75, 0.7), [0, 1, 1, 0], [0, 1, 1, 1], True, 1.0)
    confusion_figure(run, LABELS, "a model, a machine", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
