"""Processes that train together: how they are started."""

import pytest
import torch

from benchmarks.fsdp2 import ranks
from unsloth_puzzles.bench import child
from unsloth_puzzles.bench.t4 import CONTEXT_GIB


@pytest.fixture
def started(monkeypatch):
    """What `child.run` is given; it runs nothing."""
    calls = []

    def run(*command, show, **options):
        calls.append((command, options))
        for line in ("step 1", "W1129 No CUDA runtime is found, using ...", " "):
            show(line)
        return []

    monkeypatch.setattr(child, "run", run)
    return calls


def test_one_process_needs_no_launcher(started):
    said = []
    ranks.start_ranks("benchmarks.fsdp2.features", "out", ranks=1, timeout=5, gpus="3", show=said.append)
    ((command, options),) = started
    assert command == ("benchmarks.fsdp2.features", "out")
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "3" and options["gpu_gib"] is None
    assert said == ["step 1"]  # without what every run says


def test_ranks_are_started_by_torchrun_each_as_a_child(started):
    ranks.start_ranks("benchmarks.fsdp2.features", "out", ranks=2, timeout=5)
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    assert started[0][0] == (*launcher, "unsloth_puzzles.bench.child", "benchmarks.fsdp2.features", "out")


def test_ranks_that_share_a_limited_gpu_get_equal_parts(started, monkeypatch):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (90 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * gib)
    for gpus, parts in ((None, 2), ("0", 2), ("0,1", 1)):
        ranks.start_ranks("module", ranks=2, timeout=5, gpus=gpus)
        assert started[-1][1]["gpu_gib"] == pytest.approx(12 / parts - CONTEXT_GIB)


def test_an_error_says_what_the_rank_has_said(monkeypatch):
    output = [
        "[rank1]: Traceback (most recent call last):", '[rank1]:   File "a.py", line 1, in <module>',
        "[rank1]: torch.OutOfMemoryError: CUDA out of memory", "ChildFailedError: ", "=====",
    ]  # fmt: skip
    said = []

    def run(*command, show, **options):
        for line in ["step 1", *output]:
            show(line)
        raise child.ChildError("torch.distributed.run ended with status 1: =====", "\n".join(output))

    monkeypatch.setattr(child, "run", run)
    with pytest.raises(child.ChildError, match=r"^rank1: torch\.OutOfMemoryError: CUDA out of memory$"):
        ranks.start_ranks("benchmarks.fsdp2.features", "out", ranks=2, timeout=5, show=said.append)
    assert said == ["step 1"]


@pytest.mark.parametrize("message", ["module took longer than 5 s", "module ended with status -9: it said nothing"])
def test_an_error_without_a_traceback_is_kept(message, monkeypatch):
    def run(*command, **options):
        raise child.ChildError(message, "step 1")

    monkeypatch.setattr(child, "run", run)
    with pytest.raises(child.ChildError, match=message):
        ranks.start_ranks("benchmarks.fsdp2.features", "out", ranks=2, timeout=5)
