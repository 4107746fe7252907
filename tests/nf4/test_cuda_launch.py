"""On a GPU: one kernel, one allocation, the current stream, CUDA graphs, several devices."""

import pytest
import torch
from torch.autograd import DeviceType

from tests.nf4.reference import Weight, assert_same_bits, reference
from unsloth_puzzles.nf4 import dequantize_nf4

pytestmark = pytest.mark.gpu
WEIGHT = Weight(shape=(1024, 1024), dtype=torch.bfloat16)


def two_weights(device="cuda"):
    """Packed bytes of zeros, the bytes to come, the state, and what they then de-quantise to."""
    good, state = WEIGHT.make(device)
    dequantize_nf4(good, state)  # compiles and loads the kernel
    torch.cuda.synchronize(device)
    return torch.zeros_like(good), good, state, reference(good, state)


@pytest.mark.parametrize("shape", [(1024, 1024), (1823, 781)])
@pytest.mark.parametrize("nested", [True, False])
def test_one_kernel_and_nothing_else_on_the_device(shape, nested):
    packed, state = Weight(shape=shape, nested=nested).make("cuda")
    dequantize_nf4(packed, state)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        dequantize_nf4(packed, state)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    assert on_device == ["dequantize_nf4_kernel"]


@pytest.mark.parametrize("with_out", [False, True])
def test_one_allocation_the_output(with_out):
    packed, state = WEIGHT.make("cuda")
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda") if with_out else None
    dequantize_nf4(packed, state, out=out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    result = dequantize_nf4(packed, state, out=out)
    after = torch.cuda.memory_stats()
    expected = (0, 0) if with_out else (1, result.numel() * result.element_size())
    counters = ("allocation.all.allocated", "allocated_bytes.all.allocated")
    assert tuple(after[counter] - before[counter] for counter in counters) == expected


def test_kernel_runs_on_the_current_stream():
    """The packed bytes arrive late on a side stream; on any other stream the kernel would read zeros."""
    packed, good, state, expected = two_weights()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        packed.copy_(good)
        weight = dequantize_nf4(packed, state)
    stream.synchronize()
    assert_same_bits(weight, expected)


@pytest.mark.parametrize("with_out", [False, True])
def test_captured_in_a_cuda_graph(with_out):
    packed, good, state, expected = two_weights()
    out = torch.empty(state.shape, dtype=state.dtype, device="cuda") if with_out else None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weight = dequantize_nf4(packed, state, out=out)
    for source, result in ((good, expected), (torch.zeros_like(good), None), (good, expected)):
        packed.copy_(source)
        weight.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(weight, reference(packed, state) if result is None else result)


def test_weight_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    for device in ("cuda:1", "cuda:0"):
        packed, state = WEIGHT.make(device)
        weight = dequantize_nf4(packed, state)
        assert weight.device == torch.device(device)
        assert torch.cuda.current_device() == 0
        assert_same_bits(weight, reference(packed, state))


def test_state_on_another_device_is_refused():
    packed, _ = WEIGHT.make("cuda")
    _, state = WEIGHT.make("cpu")
    with pytest.raises(ValueError, match=r"device.*cpu"):
        dequantize_nf4(packed, state)


def test_packed_weight_on_the_cpu_is_refused():
    packed, state = WEIGHT.make("cpu")
    with pytest.raises(ValueError, match=r"weight must be a CUDA tensor, got cpu"):
        dequantize_nf4(packed, state)
