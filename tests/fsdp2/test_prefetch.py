"""In the forward a layer's gather begins before the layer in front of it computes."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from tests.fsdp2.models import qlora
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora


@pytest.fixture
def events(monkeypatch):
    """ "gather N" where the gather of layer N begins, and "compute N" where layer N does."""
    found, unshard = [], FSDPParamGroup.unshard

    def watched(group, async_op=False):
        (module,) = group.modules
        if hasattr(module, "self_attn") and not group.is_unsharded and group._all_gather_result is None:
            found.append(f"gather {module.self_attn.layer_idx}")
        unshard(group, async_op)

    monkeypatch.setattr(FSDPParamGroup, "unshard", watched)
    return found


@pytest.mark.parametrize("forwards", [1, 2])
def test_the_next_layer_is_gathered_before_a_layer_computes(events, mesh, forwards):
    model, ids = qlora(), torch.arange(8).view(1, 8)
    pack_nf4(model)
    shard_qlora(model, mesh)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_pre_hook(lambda one, _: events.append(f"compute {one.layer_idx}"))
    for _ in range(forwards):
        events.clear()
        model(input_ids=ids)
    assert events == ["gather 0", "gather 1", "compute 0", "compute 1"]
