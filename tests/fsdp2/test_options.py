"""A trainer that does not use FSDP2 is refused, with what to do instead, and so is an accelerate that loses shards."""

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM, Trainer, TrainingArguments

from tests.compiled.models import nf4_model
from tests.fsdp2.models import qlora
from unsloth_puzzles.fsdp2 import options
from unsloth_puzzles.fsdp2.options import fsdp2_arguments, prepare_trainer
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.shard import shard_qlora

REFUSED = (
    "trainer must use FSDP2, got {}; make its arguments with **fsdp2_arguments(model) and start it with torchrun; "
    "accelerate ignores FSDP2 on a CPU"
)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    model = qlora()
    pack_nf4(model)
    with patch.dict(os.environ):
        yield Trainer(model, TrainingArguments(str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to=[]))


def test_trainer_without_fsdp_is_refused(trainer):
    assert not hasattr(trainer.accelerator.state, "fsdp_plugin")
    with pytest.raises(ValueError) as refusal:
        prepare_trainer(trainer)
    assert str(refusal.value) == REFUSED.format("none")


def test_trainer_with_fsdp1_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(ValueError) as refusal:
        prepare_trainer(trainer)
    assert str(refusal.value) == REFUSED.format("FSDP1")


@pytest.mark.parametrize("version", ["1.14.0", "1.9.2", "0.34.0", None])
def test_an_accelerate_whose_checkpoints_lack_shards_is_refused(monkeypatch, version):
    monkeypatch.setattr(options.supported, "installed", lambda package: version)
    with pytest.raises(RuntimeError, match=rf"^accelerate must be 1\.15 or newer, got {version}: checkpoints"):
        fsdp2_arguments(None)


@pytest.mark.parametrize("version", ["1.15.0", "1.16.1", "2.0.0.dev0"])
def test_a_newer_accelerate_is_taken(monkeypatch, version):
    monkeypatch.setattr(options.supported, "installed", lambda package: version)
    options._check_accelerate()


def test_a_backbone_without_layers_is_refused(mesh):
    """Those of OPT are in a decoder inside of it."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64}
    config = OPTConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    model = get_peft_model(nf4_model(OPTForCausalLM, config), LoraConfig(target_modules=["q_proj"]))
    pack_nf4(model, 1)
    for call in (lambda: fsdp2_arguments(model), lambda: shard_qlora(model, mesh)):
        with pytest.raises(ValueError, match=r"^model must have decoder `layers` in its backbone, got OPTForCausalLM"):
            call()
