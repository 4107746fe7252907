"""How much of the gathers a step hides."""

import pytest

from benchmarks.fsdp2.timeline import hidden, predicted
from benchmarks.fsdp2.training import _lane

EVENTS = [
    ("compute", 0.0, 10.0),
    ("compute", 5.0, 10.0),  # of another stream, at the same time
    ("compute", 30.0, 10.0),
    ("all-gather", 12.0, 6.0),  # 3 of 6 beside a product
    ("all-gather", 32.0, 2.0),  # all
    ("copies", 12.0, 6.0),  # hide nothing
    ("reduce-scatter", 50.0, 5.0),
]


def test_hidden_share():
    assert hidden(EVENTS) == pytest.approx(5 / 8)
    assert hidden(EVENTS, "reduce-scatter") == 0
    assert hidden(EVENTS[:3]) is None


@pytest.mark.parametrize(
    "name, lane",
    [
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "all-gather"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "reduce-scatter"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::CopyFunctor>", "copies"),
        ("void at::native::detail::split_with_sizes_copy_out_contiguous_no_cast_kernel", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "compute"),
    ],
)
def test_lane_of_a_kernel(name, lane):
    assert _lane(name) == lane


@pytest.mark.parametrize("gather, expected", [(1.0, 6 / 8), (3.0, 3 * (2 + 3) / 24), (8.0, 3 * (2 + 4) / 64)])
def test_predicted_share(gather, expected):
    """Four layers whose forward takes 2 and whose backward takes 4."""
    assert predicted(4, gather, 2.0) == pytest.approx(expected)
