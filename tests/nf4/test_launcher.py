"""The direct launch hands Triton's C launcher what Triton itself does; an unknown launcher is left to Triton."""

from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher

from unsloth_puzzles.nf4 import launch, ordinary_launch
from unsloth_puzzles.nf4.build import PLAIN, POINTERS
from unsloth_puzzles.nf4.launch import direct_launch
from unsloth_puzzles.nf4.ordinary_launch import OrdinaryLaunch

STREAM, FUNCTION, METADATA, ARGUMENTS = 11, 12, (4, 1, 0), (*range(100, 107), 512, None, None)


class Launcher(CudaLauncher):
    """Triton's launcher of a kernel without scratch memory, whose C function notes what it is given."""

    def __init__(self, scratch: int = 0):
        self.given = []
        self.launch = lambda *given: self.given.append(given)
        self.num_ctas, self.gsan_enabled = 1, False
        self.launch_cooperative_grid = self.launch_pdl = False
        self.global_scratch_size, self.global_scratch_align = scratch, 1
        self.profile_scratch_size, self.profile_scratch_align = 0, 1
        self.arg_annotations = self.kernel_signature = None


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """Newer launchers ask for the driver, which needs a GPU."""
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(), raising=False)


@pytest.mark.parametrize("scratch", [0, 8])
def test_the_c_launcher_is_given_what_triton_gives_it(scratch, monkeypatch):
    monkeypatch.setattr(triton.runtime._allocation, "_allocator", _Allocator())
    theirs, ours = Launcher(scratch), Launcher(scratch)
    theirs(5, 1, 1, STREAM, FUNCTION, METADATA, None, None, None, *ARGUMENTS)
    enqueue, before = direct_launch(ours, FUNCTION, METADATA)
    enqueue(5, 1, 1, STREAM, *before, *ARGUMENTS)
    assert ours.given == theirs.given and len(ours.given) == 1


class _Allocator:
    """Memory at address 1000 for every size, as `set_allocator` would have it."""

    def get(self):
        return lambda size, alignment, stream: 1000

    __call__ = get


def test_a_launcher_with_other_parameters_is_not_called_directly():
    class Other(Launcher):
        def __call__(self, grid, stream, function, *args):
            raise AssertionError("called")

    assert direct_launch(Other(), FUNCTION, METADATA) is None


@pytest.mark.parametrize("aligned", [True, False])
def test_an_ordinary_launch_gives_triton_pointers_with_their_types(aligned, monkeypatch):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: calls.append((grid, given, options))

    chosen = []
    monkeypatch.setattr(ordinary_launch, "chosen_kernel", lambda aligned: chosen.append(aligned) or Kernel())
    where = {"NESTED": True, "FULL": False, "ALIGNED": aligned}
    enqueue = OrdinaryLaunch(PLAIN, torch.float16, 64, 256, 0, where)
    enqueue(3, 1, 1, STREAM, *range(100, 107), 4096)
    ((grid, (*pointers, numel), options),) = calls
    assert (grid, numel, chosen) == ((3,), 4096, [aligned]) and len(pointers) == len(POINTERS)
    assert [pointer.data_ptr() for pointer in pointers] == [*range(100, 107)]
    assert [pointers[i].dtype for i in (0, 1, 2, 6)] == [torch.uint8, torch.uint8, torch.float32, torch.float16]
    assert options["NESTED"] is True and options["num_warps"] == PLAIN.num_warps
    assert {*options} == {*launch.dequantize_nf4_kernel.arg_names[8:], "num_warps", "enable_fp_fusion"}
