"""Every collective that FSDP2 calls is counted once, whatever the installed torch calls it."""

import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from benchmarks.fsdp2.collectives import GATHER, SCATTER, counted, known


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("names", [GATHER, SCATTER], ids=["gather", "scatter"])
def test_a_call_by_any_name_is_counted_once(names, alone):
    plain = {name: getattr(dist, name) for name in known(names)}
    for name in plain:
        out = torch.zeros(3, dtype=torch.float64)
        with counted(names) as started, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the old names
            getattr(dist, name)(out, torch.arange(3, dtype=torch.float64))
        assert started == ["torch.float64"] and out.tolist() == [0, 1, 2]
        assert getattr(dist, name) is plain[name]


@pytest.mark.parametrize("names", [GATHER, SCATTER], ids=["gather", "scatter"])
def test_fsdp2_calls_a_known_name(names):
    source = inspect.getsource(_fsdp_collectives)
    assert any(f"dist.{name}(" in source for name in known(names))


def test_a_torch_without_known_names_is_refused():
    with pytest.raises(RuntimeError, match=r"^torch\.distributed must have nowhere or nothing, got neither in torch "):
        known(("nowhere", "nothing"))
