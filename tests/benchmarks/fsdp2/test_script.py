"""How the benchmark starts the training script."""

import json

import pytest

from benchmarks.fsdp2 import script


@pytest.mark.parametrize("ranks, gpus", [(1, "3"), (2, "3,5")])
def test_each_rank_has_one_gpu(ranks, gpus, tmp_path, monkeypatch):
    seen = []

    def start_ranks(module, *arguments, **options):
        seen.append(options)
        line = {"loss": 1.0, "seconds": 2.0, "tokens_per_s": 3.0, "peak_gib": [0.5, 0.25]}
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        (tmp_path / given["--log-file"]).write_text(json.dumps(line) + "\n" + json.dumps(line | {"loss": 0.5}) + "\n")
        (tmp_path / given["--summary-file"]).write_text('{"share": 0.5}')

    monkeypatch.setattr(script, "start_ranks", start_ranks)
    found = script.run("m", "--rows", "2", ranks=ranks, gpus="3,5", folder=str(tmp_path))
    assert seen[0]["gpus"] == gpus and seen[0]["ranks"] == ranks
    assert found["losses"] == [1.0, 0.5] and found["peak_gib"] == [0.5, 0.25] and found["share"] == 0.5
