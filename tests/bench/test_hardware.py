"""The probe of the machine, and its limits in a rehearsal."""

import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from unsloth_puzzles import device
from unsloth_puzzles.bench import hardware
from unsloth_puzzles.bench.ceilings import copy_kernel
from unsloth_puzzles.bench.hardware import Hardware, MeasuringError, probe, versions


def machine(**changes) -> Hardware:
    known = {"name": "test", "device": "cuda", "sm": 90, "count": 1, "memory_gib": 8.0, "multiprocessors": 2}
    return Hardware(**{**known, "l2_bytes": 1, "bf16": True, "interpreter": False, **changes})


@pytest.fixture
def plugged_in(monkeypatch):
    """Pretend that four GPUs of 140 GiB are here; returns what can be changed about them, and the fractions set."""
    properties = SimpleNamespace(
        name="NVIDIA Test", major=9, minor=0, total_memory=140 * 2**30, multi_processor_count=132, L2_cache_size=2**26
    )
    fractions = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.delenv(device.REHEARSAL, raising=False)
    return properties, fractions


def test_probe_reports_the_gpu_that_is_there(plugged_in):
    found = probe(measure=False)
    assert (found.name, found.device, found.sm, found.count) == ("NVIDIA Test", "cuda", 90, 4)
    assert (found.memory_gib, found.multiprocessors, found.l2_bytes) == (140.0, 132, 2**26)
    assert found.bf16 and not found.rehearsal
    assert (found.copy_bandwidth, found.matmul_flops, plugged_in[1]) == (None, {}, [])


@pytest.mark.parametrize(("major", "minor", "native"), [(7, 5, False), (8, 0, True), (12, 0, True)])
def test_bf16_is_native_from_sm_80_on(plugged_in, major, minor, native):
    plugged_in[0].major, plugged_in[0].minor = major, minor
    assert probe(measure=False).bf16 is native


def test_rehearsal_limits_memory_count_and_bf16(plugged_in, monkeypatch):
    monkeypatch.setenv(device.REHEARSAL, "T4")
    found = probe(measure=False)
    assert (found.count, found.memory_gib, found.bf16, found.rehearsal) == (1, 14.5, False, True)
    assert plugged_in[1] == [pytest.approx(13.6 / 140)]
    assert "REHEARSING A T4" in found.describe()


def test_rehearsal_on_a_smaller_gpu_sets_no_memory_limit(plugged_in, monkeypatch):
    monkeypatch.setenv(device.REHEARSAL, "T4")
    plugged_in[0].total_memory = 12 * 2**30
    assert (probe(measure=False).memory_gib, plugged_in[1]) == (12.0, [])


def test_rehearsal_of_another_gpu_is_refused(monkeypatch):
    monkeypatch.setenv(device.REHEARSAL, "H100")
    with pytest.raises(ValueError, match="must be 'T4' or empty, got 'H100'"):
        probe(measure=False)


def test_probe_measures_bf16_only_where_native(plugged_in, monkeypatch):
    monkeypatch.setattr(hardware, "measure_copy_bandwidth", lambda: 4e12)
    monkeypatch.setattr(hardware, "measure_matmul_flops", lambda bf16: {"float16": 8e14, "bf16 asked": bf16})
    assert (probe().copy_bandwidth, probe().matmul_flops) == (4e12, {"float16": 8e14, "bf16 asked": True})


def test_probe_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.triton.knobs.runtime, "interpret", True)
    found = probe()
    assert (found.name, found.device, found.count, found.sm) == ("CPU, Triton interpreter", "cpu", 0, None)
    assert found.interpreter and not found.bf16 and found.memory_gib > 0
    assert (found.copy_bandwidth, found.matmul_flops) == (None, {})


def test_copy_fraction_warns_above_one():
    fast = machine(copy_bandwidth=4e12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fast.copy_fraction(2e6, 1.0) == pytest.approx(0.5)
        assert machine().copy_fraction(2e6, 1.0) is None
    with pytest.warns(MeasuringError, match=r"MEASURING ERROR: 150\.0%"):
        assert fast.copy_fraction(6e6, 1.0) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="microseconds must be a positive time, got 0"):
        fast.copy_fraction(1, 0)


def test_describe_includes_measured_rates():
    text = machine(count=2, copy_bandwidth=4.25e12, matmul_flops={"float16": 7.9e14}).describe()
    assert text == "test x 2, sm_90, 8.0 GiB, bf16, copies 4.25 TB/s, float16 matmul 790 TFLOP/s"


def test_versions_of_missing_packages_are_none(monkeypatch):
    def version(package):
        if package == "peft":
            raise metadata.PackageNotFoundError(package)
        return f"{package} 1.0"

    monkeypatch.setattr(hardware.metadata, "version", version)
    found = versions()
    packages = {"torch", "triton", "bitsandbytes", "transformers", "peft", "trl", "accelerate", "datasets", "xformers"}
    assert set(found) == {"python", "cuda", "driver", "liger-kernel", "cut-cross-entropy"} | packages
    assert (found["triton"], found["peft"], found["torch"]) == ("triton 1.0", None, torch.__version__)


def test_copy_kernel_copies_an_odd_length_exactly():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.arange(1, 385, dtype=torch.int32, device=device)
    target = torch.full_like(source, -1)
    copy_kernel[(3,)](source, target, 299, BLOCK=128)
    assert torch.equal(target[:299], source[:299]) and (target[299:] == -1).all()


@pytest.mark.gpu
def test_probe_measures_bandwidth_and_rates():
    found = probe()
    assert found.copy_bandwidth > 1e10
    assert set(found.matmul_flops) == {"float32", "float16"} | ({"bfloat16"} if found.bf16 else set())
    assert all(rate > 1e11 for rate in found.matmul_flops.values())
