"""The work of one call by the profiler: nothing before its marker, and no profile without one."""

import pytest
import torch

from benchmarks.gpu_work import Work, after_marker, gpu_work

BEFORE = [Work("fill", 5.0, 1.0), Work("ncclDevKernel_AllReduce", 6.0, 4.0)]
MARKER = Work("at::cuda::(anonymous namespace)::spin_kernel(long)", 11.0, 1.0)
STEP = [Work("first", 12.0, 3.0), Work("ncclDevKernel_AllReduce", 14.0, 2.0)]


def test_work_up_to_the_marker_is_not_of_the_call() -> None:
    assert after_marker([*BEFORE, MARKER, *STEP]) == STEP


def test_work_comes_in_the_order_in_which_it_began() -> None:
    assert after_marker([STEP[1], MARKER, STEP[0]]) == STEP


def test_a_later_spin_kernel_is_of_the_call() -> None:
    own = MARKER._replace(start=20.0)
    assert after_marker([MARKER, *STEP, own]) == [*STEP, own]


def test_a_profile_that_misses_its_beginning_is_refused() -> None:
    with pytest.raises(RuntimeError, match="the profile must hold the marker 'spin_kernel', got 2 other kernels"):
        after_marker(STEP)


@pytest.mark.gpu
def test_first_profile_of_a_process_holds_the_first_kernel() -> None:
    x = torch.zeros(1000, device="cuda")
    names = [work.name for work in gpu_work(lambda: x.add_(1.0), before=lambda: x.fill_(0.0))]
    assert len(names) == 1
    assert "add" in names[0].lower() or "elementwise" in names[0].lower()
