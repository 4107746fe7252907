"""Peak memory and allocator requests of a call."""

import pytest
import torch

from unsloth_puzzles.bench import memory
from unsloth_puzzles.bench.memory import allocations, highest_since_restart, peak_memory, reset_peak, restart_highest

MIB = 2**20


def keep_two_of_seven_mib(device):
    first = torch.empty(5 * MIB, dtype=torch.uint8, device=device)
    kept = torch.empty(2 * MIB, dtype=torch.uint8, device=device)
    del first
    return kept, torch.empty(1 * MIB, dtype=torch.uint8, device=device).numel()


def test_peak_memory_on_the_cpu_is_of_what_is_alive_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (kept, numel), extra = peak_memory(lambda: keep_two_of_seven_mib("cpu"))
    assert (kept.numel(), numel, extra) == (2 * MIB, MIB, 7 * MIB)


def test_peak_memory_excludes_what_was_there_before(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.empty(9 * MIB, dtype=torch.uint8)
    assert peak_memory(lambda: before.numel()) == (9 * MIB, 0)


def test_allocations_are_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="must be counted on a CUDA device, got none"):
        allocations(lambda: None)
    assert highest_since_restart() is None


def test_peak_memory_does_not_hide_the_peak_before_it(monkeypatch):
    """The statistics are read before they are reset, here of an allocator that only has statistics."""
    peak, in_use = 700, 100

    def reset():
        nonlocal peak
        peak = in_use

    def call():
        nonlocal peak
        peak = 150

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(memory, "_highest", 0)
    assert peak_memory(call) == (None, 50)
    assert highest_since_restart() == 700
    peak = 900
    reset_peak()
    assert peak == 100 and highest_since_restart() == 900
    restart_highest()
    assert highest_since_restart() == 100


@pytest.mark.gpu
def test_peak_memory_on_the_gpu():
    (kept, _), extra = peak_memory(lambda: keep_two_of_seven_mib("cuda"))
    assert (kept.numel(), extra) == (2 * MIB, 7 * MIB)


@pytest.mark.gpu
def test_allocations_include_requests_for_cached_memory():
    keep_two_of_seven_mib("cuda")
    assert allocations(lambda: keep_two_of_seven_mib("cuda")) == 3
    assert allocations(lambda: None) == 0
