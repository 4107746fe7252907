"""One sample of device time: work between two events, as a CUDA graph or as eager calls."""

import math
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]

_GRAPH_US = 1000.0  # a graph that lasts this long makes the 2 us of its launch 0.2 %
_MAX_PASSES = 100
_SLEEP_CYCLES = 500_000  # about 0.3 ms: the device is still busy when the work between two events has been enqueued


def device_sampler(batch: Call, calls: int) -> Callable[[], float]:
    """A function that times the second of two batches in a row, so that each candidate pays for itself.

    The first batch writes back what another candidate has left dirty in the L2 (up to 60 MB: 3 % of a sample of 1 ms),
    and brings the clocks to what this candidate's power draw allows. Without it the same matrix products took 45 to
    51 ms in one run (H200), probably by what power the candidate before them had drawn.

    Args:
        batch: Enqueues work on the current stream of the GPU.
        calls: How many calls the batch holds.

    Returns:
        A function that takes a sample and returns microseconds per call.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        torch.cuda._sleep(_SLEEP_CYCLES)  # else gaps between the first kernels are the host's launch cost
        batch()
        start.record()
        batch()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e3 / calls

    return sample


def captured(closures: Sequence[Call], pool: object) -> tuple[Call, int]:
    """The closures, in turn, as a CUDA graph of about a millisecond.

    Args:
        closures: Functions that can be captured.
        pool: What `torch.cuda.graph_pool_handle()` returned. Graphs that share a pool may overwrite each other's
            results, which nobody reads.

    Returns:
        A function that replays the graph, and the number of calls in the graph.
    """
    batch = in_turn(closures)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up belongs on the stream of the capture: workspaces are per stream
        batch()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        batch()
        stop.record()
    stream.synchronize()
    passes = min(_MAX_PASSES, math.ceil(_GRAPH_US / max(1.0, start.elapsed_time(stop) * 1e3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        for _ in range(passes):
            batch()
    torch.cuda.synchronize()
    return graph.replay, passes * len(closures)


def in_turn(closures: Sequence[Call]) -> Call:
    """A function that calls each closure once."""

    def batch() -> None:
        for call in closures:
            call()

    return batch
