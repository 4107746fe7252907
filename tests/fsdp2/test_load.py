"""A checkpoint in 16 bits and the same one pre-quantised by bitsandbytes become the same layers, and train alike."""

import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from transformers import AutoTokenizer

from benchmarks.models import random_llama, tiny_llama_config
from tests.fsdp2.script import run
from unsloth_puzzles.fsdp2.load import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(architecture, tmp_path_factory):
    """Folders by kind; the pre-quantised one names bfloat16 as its compute dtype."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoints"), AutoTokenizer.from_pretrained(architecture)
    found = {kind: folder / kind for kind in ("16 bits", "NF4")}
    random_llama(tiny_llama_config(len(tokenizer)), "cpu").to(torch.bfloat16).save_pretrained(found["16 bits"])
    load(str(found["16 bits"]), CPU, torch.bfloat16).save_pretrained(found["NF4"])
    for path in found.values():
        tokenizer.save_pretrained(path)
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_both_kinds_become_the_same_model(checkpoints, dtype):
    one, other = (load(str(path), CPU, dtype) for path in checkpoints.values())
    layers = [[module for module in model.modules() if isinstance(module, Linear4bit)] for model in (one, other)]
    assert len(layers[0]) == 14 and len(list(one.parameters())) == len(list(other.parameters()))
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )
    for a, b in zip(*layers, strict=True):
        assert a.compute_dtype == b.compute_dtype == dtype
        assert torch.equal(a.weight.quant_state.absmax, b.weight.quant_state.absmax)
        assert torch.equal(a.weight.quant_state.state2.absmax, b.weight.quant_state.state2.absmax)
    ids = torch.arange(20)[None]
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.slow
def test_both_kinds_train_to_the_same_losses_on_one_rank_and_two(checkpoints, tmp_path):
    losses = {}
    for kind, path in checkpoints.items():
        for ranks in (None, 2):
            lines = run(path, tmp_path / f"{kind}{ranks}.jsonl", "--steps", 2, ranks=ranks, layers=None)
            losses[kind, ranks] = [line["loss"] for line in lines]
    assert losses["16 bits", None] == losses["NF4", None] and losses["16 bits", 2] == losses["NF4", 2]
    assert losses["NF4", 2] == pytest.approx(losses["NF4", None], abs=1e-5)
    assert losses["NF4", 2][0] != losses["NF4", 2][1]


def test_other_quantisation_is_refused(checkpoints, tmp_path):
    config = json.loads((checkpoints["NF4"] / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model must be in 16 bits or in bitsandbytes' NF4, got .*fp4"):
        load(str(tmp_path), CPU, torch.float16)
