"""The KV cache is found under the name that the installed transformers gives it, and refused under none."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from benchmarks.models import random_llama, tiny_llama_config
from unsloth_puzzles.compiled.backbone import _say_unpadded
from unsloth_puzzles.kv_cache import CACHE_NAMES, cache_name, given_cache


def test_forwards_and_outputs_agree_on_the_name():
    name = cache_name(LlamaForCausalLM.forward)
    assert name == cache_name(BaseModelOutputWithPast)
    model, ids = random_llama(tiny_llama_config(64), "cpu"), torch.arange(6)[None]
    with torch.no_grad():
        first = model(input_ids=ids, use_cache=True)
        found = model(input_ids=ids, **{name: first[name]}).logits
        whole = model(input_ids=torch.cat([ids, ids], 1)).logits[:, 6:]
    assert (found - whole).norm() <= 1e-5 * whole.norm()


def test_an_unknown_name_is_refused():
    @dataclass
    class Outputs:
        memory: object = None

    with pytest.raises(
        ValueError, match=r"Outputs of transformers must name its KV cache cache or past_key_values, got "
    ):
        cache_name(Outputs)
    with pytest.raises(ValueError, match=r"got cache and past_key_values$"):
        cache_name(lambda cache, past_key_values: None)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_found_by_either_name(name):
    kept = object()
    assert given_cache({name: kept, "use_cache": True}) is kept
    assert given_cache({name: None}) is None and given_cache({}) is None
    ids = torch.arange(6)[None]
    assert _say_unpadded(None, (ids,), {name: kept}) is None  # the mask would have to cover the cache, too
    assert _say_unpadded(None, (ids,), {name: None}) is not None
