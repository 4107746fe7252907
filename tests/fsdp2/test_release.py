"""A sharded model that is deleted takes its weights with it, although FSDP2 keeps its classes."""

import gc
import weakref

import pytest
import torch

from tests.fsdp2.models import qlora
from unsloth_puzzles.compiled.qlora import compile_qlora
from unsloth_puzzles.fsdp2.linear import StreamLinear4bit
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora


def _trained(mesh, compiled: bool) -> list[weakref.ref]:
    """References to the packed layers of a model that has made a step and that no caller holds."""
    model = qlora().train()
    pack_nf4(model)
    undo = compile_qlora(model) if compiled else None
    shard_qlora(model, mesh)
    ids = torch.arange(20).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    if undo is not None:
        undo.undo()
    return [weakref.ref(module) for module in model.modules() if isinstance(module, StreamLinear4bit)]


@pytest.mark.parametrize("compiled", [False, True])
def test_no_packed_layer_outlives_its_model(mesh, monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda function=None, **options: function)  # the code as it is
    layers = _trained(mesh, compiled)
    gc.collect()
    assert len(layers) == 14 and not any(reference() for reference in layers)
