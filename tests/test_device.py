"""What the package is told about the GPU, and what a rehearsal makes of it."""

import pytest
import torch

from unsloth_puzzles.device import REHEARSAL, capability, rehearsing


@pytest.fixture
def an_h200(monkeypatch):
    monkeypatch.delenv(REHEARSAL, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def test_a_cpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert capability() == capability("cpu") == capability("cuda") == capability(0) == 0


def test_capability_is_the_one_that_pytorch_reports(an_h200):
    assert capability() == capability("cuda") == capability(0) == capability(torch.device("cuda", 1)) == 90
    assert capability("cpu") == 0


def test_a_rehearsal_says_t4_to_the_package_and_the_truth_to_libraries(an_h200, monkeypatch):
    monkeypatch.setenv(REHEARSAL, "T4")
    assert rehearsing() and capability() == capability("cuda") == 75
    assert capability("cpu") == 0
    assert torch.cuda.get_device_capability() == (9, 0)


def test_another_rehearsal_is_refused(an_h200, monkeypatch):
    monkeypatch.setenv(REHEARSAL, "V100")
    with pytest.raises(ValueError, match="UNSLOTH_PUZZLES_REHEARSAL must be 'T4' or empty, got 'V100'"):
        capability()
