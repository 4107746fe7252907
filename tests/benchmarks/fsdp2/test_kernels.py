"""Steps of three kinds train one model: the same number of each, in turn."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

from benchmarks.fsdp2 import kernels


def test_kinds_of_steps_are_timed_in_rounds(tmp_path, monkeypatch):
    seen = []  # Triton's interpreter takes minutes for the real patch
    monkeypatch.setattr(kernels, "patch_linear4bit", lambda model: nullcontext(seen.append("patch")))
    undo = SimpleNamespace(undo=lambda: seen.append("undo"))
    monkeypatch.setattr(kernels, "pack_nf4", lambda model, world_size: (seen.append(f"pack for {world_size}"), undo)[1])
    train = kernels.Run.train
    monkeypatch.setattr(kernels.Run, "train", lambda self, steps: (seen.append("step"), train(self, steps))[1])
    profile = kernels.Run.profile
    monkeypatch.setattr(kernels.Run, "profile", lambda self: (seen.append("profile"), profile(self))[1])
    settings, out = tmp_path / "settings.json", tmp_path / "out.json"
    tiny = {"rows": 1, "length": 8, "shapes": "tiny", "layers": 1, "vocabulary": 32, "dtype": "float32", "rounds": 2}
    settings.write_text(json.dumps(tiny))
    kernels.main(str(out), str(settings))
    found = json.loads(out.read_text())
    assert {kind: len(times) for kind, times in found["step_ms"].items()} == dict.fromkeys(kernels.KINDS, 2)
    assert min(min(times) for times in found["step_ms"].values()) > 0
    assert found["gpu_ms"] == dict.fromkeys(kernels.KINDS)
    ours, packed, theirs = ["patch", "step"], ["pack for 1", "step", "undo"], ["step"]
    assert seen[:18] == [*ours, *theirs, *packed, *theirs, *packed, *ours, *packed, *ours, *theirs]
    assert seen.count("profile") == 3 * 10


def test_ratios_are_of_pairs_and_ranges_without_outer_tenths():
    times = {"ours": [2.0] * 10, "bitsandbytes": [float(number) for number in range(10, 0, -1)]}
    assert kernels.ratios(times) == [number / 2 for number in range(10, 0, -1)]
    assert kernels.ratios(times | {"ours, packed": [1.0] * 10}, kernels.PACKED) == times["bitsandbytes"]
    assert kernels.spread(times["bitsandbytes"]) == (5.5, 2.0, 9.0)
    assert kernels.row("GPU time", times) == (
        "GPU time", "2.00 ms (2.00 to 2.00)", "5.50 ms (2.00 to 9.00)", "2.750 (1.000 to 4.500)"
    )  # fmt: skip
