"""The profile of a step: launches of a kernel, and lanes."""

from benchmarks.fsdp2.training import KERNEL, of_step
from benchmarks.gpu_work import Work

STEP = [
    Work("ncclDevKernel_AllGather_RING_LL", 12.0, 3.0),
    Work(KERNEL, 14.0, 2.0),
    Work("ncclDevKernel_ReduceScatter_Sum_f32", 20.0, 2.0),
    Work("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 25.0, 1.0),
]


def test_work_of_a_step_is_counted_and_put_into_lanes() -> None:
    lanes = [("all-gather", 0.0, 3.0), ("compute", 2.0, 2.0), ("reduce-scatter", 8.0, 2.0), ("other", 13.0, 1.0)]
    assert of_step(STEP) == {"launches": 1, "timeline": lanes}
