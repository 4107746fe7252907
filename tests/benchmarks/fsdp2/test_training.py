"""The profile of a step: what lies before it is left out."""

from benchmarks.fsdp2.training import KERNEL, of_step

BARRIER = [("fill", 5.0, 1.0), ("ncclDevKernel_AllReduce_Sum_i8_RING_LL", 6.0, 4.0)]
STEP = [
    ("ncclDevKernel_AllGather_RING_LL", 12.0, 3.0),
    (KERNEL, 14.0, 2.0),
    ("ncclDevKernel_ReduceScatter_Sum_f32", 20.0, 2.0),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 25.0, 1.0),
]
LANES = [("all-gather", 0.0, 3.0), ("compute", 2.0, 2.0), ("reduce-scatter", 8.0, 2.0), ("other", 13.0, 1.0)]


def test_kernels_up_to_the_barrier_are_not_of_the_step() -> None:
    assert of_step([*BARRIER, *STEP], barrier=True) == {"launches": 1, "timeline": LANES}


def test_a_step_without_a_barrier_keeps_its_all_reduce() -> None:
    assert of_step(STEP, barrier=False) == {"launches": 1, "timeline": LANES}


def test_a_barrier_that_launches_no_kernel_drops_nothing() -> None:
    assert of_step(STEP[:3], barrier=True) == {"launches": 1, "timeline": LANES[:3]}
