"""The checks of attention: right backends pass, wrong ones do not, one that is missing must say so."""

import pytest
import torch

from benchmarks.attention import checks
from benchmarks.attention.checks import REQUESTS, Inputs, check_backends, check_flex, close
from unsloth_puzzles.attention import BACKENDS


def test_backends_of_a_cpu_are_checked_and_the_others_are_not():
    found = check_backends("cpu", torch.float32, (33,))
    for name in ("dense", "sdpa", "flex"):
        assert len(found[name].checks) == len(REQUESTS) and all(found[name].checks.values()), found[name].checks
        assert found[name].missing is None
    assert found["sdpa"].checks["soft cap: refused by name"]
    for name in ("flash", "xformers"):
        assert found[name].checks == {} and found[name].missing


@pytest.mark.parametrize(("says_so", "passed"), [(True, True), (False, False)])
def test_below_sm_80_flash_attention_is_checked_by_its_refusal(monkeypatch, says_so, passed):
    """As on a T4, whose half precision a CPU has, too."""
    flash = BACKENDS["flash"]
    monkeypatch.setattr(checks, "capability", lambda device=None: 75)
    monkeypatch.setattr(type(flash), "refuses", lambda self, pattern, batch: None)
    if not says_so:
        monkeypatch.setattr(checks, "attention", lambda *data, **asked: data[0])
        for name in set(BACKENDS) - {"flash"}:
            monkeypatch.setattr(type(BACKENDS[name]), "missing", lambda self, device: "left out")
    found = check_backends("cpu", torch.float32, (17,))["flash"]
    assert found.checks == {"refused by name below sm_80": passed} and "sm_80" in found.missing


def test_a_wrong_result_does_not_pass(monkeypatch):
    data, _ = Inputs("cpu", torch.float32).draw(40)
    assert close(data, "sdpa", {})
    run = type(BACKENDS["sdpa"]).run
    monkeypatch.setattr(type(BACKENDS["sdpa"]), "run", lambda self, *given: run(self, *given) * (1 + 1e-5))
    assert not close(data, "sdpa", {})
    monkeypatch.setattr(type(BACKENDS["sdpa"]), "run", lambda self, *given: run(self, *given) * float("nan"))
    assert not close(data, "sdpa", {})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_three_roundings_do_not_pass_in_16_bits(dtype, monkeypatch):
    data, _ = Inputs("cpu", dtype).draw(40)
    assert close(data, "sdpa", {}) and close(data, "flex", {})
    run, scale = type(BACKENDS["sdpa"]).run, 1 + 1.5 * torch.finfo(dtype).eps
    monkeypatch.setattr(type(BACKENDS["sdpa"]), "run", lambda self, *given: run(self, *given).float() * scale)
    assert not close(data, "sdpa", {})


def test_flex_attention_over_lengths_is_compiled_once():
    found = check_flex("cpu", torch.float32)
    assert found.counts.graphs == 1 and len(found.lengths) == 5
    assert all(all(checks.values()) and checks for checks in found.checks.values()), found.checks
