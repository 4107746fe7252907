"""The sweep's records on a tiny model: complete, and padding counted as it is."""

import pytest

from benchmarks.vision import sweeps
from benchmarks.vision.checks import LARGE, SHORT
from benchmarks.vision.families import FAMILIES
from benchmarks.vision.work import padding, work_by_share
from unsloth_puzzles.bench.hardware import probe
from unsloth_puzzles.bench.record import Measurements
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama


@pytest.mark.slow
def test_steps_and_padding_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "SIZE", (56, 56))
    monkeypatch.setattr(sweeps, "ANSWER", "Yes. " * 40)
    found = sweeps.measure(tmp_path / "d.json", probe(measure=False), quick=True)
    assert len(found.find("vision_step_ms")) == 5 and len(Measurements.load(found.path).records) == 6
    (padded,) = found.find("vision_padding")
    assert 0 < padded["value"] < padded["baselines"]["random order"] < 1


def test_share_of_padding():
    processor, _ = FAMILIES["qwen2_vl"]()
    collate = VisionCollator(processor)
    long, short = (collate([one])["input_ids"].numel() for one in (LARGE, SHORT))
    assert padding(processor, [LARGE, SHORT], [0, 1, 1, 0], 2) == (long - short) / (2 * long) > 0
    assert padding(processor, [LARGE, SHORT], [0, 0, 1, 1], 2) == 0


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama", "gemma3"])
def test_work_of_the_tower(name):
    processor, model = FAMILIES[name]()
    if name == "mllama":
        patch_mllama(model)
    work = work_by_share(processor, model, rows=4)
    assert work == {"ours": [4, 2, 0], "blank images": [4, 4, 4], "floor": [4, 2, 0]}
