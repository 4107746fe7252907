"""Heads in a group of FSDP2 that is sharded or trained, as accelerate makes it, are refused; others are right."""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.models import random_llama, tiny_llama_config
from unsloth_puzzles.backprop.probe import logit_transform
from unsloth_puzzles.backprop.trainer import use_memory_efficient_loss


@pytest.fixture
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def make_model(*frozen):
    config = tiny_llama_config()
    config.tie_word_embeddings = False
    model = random_llama(config, "cpu")
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


def gradients(model):
    ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
    with use_memory_efficient_loss(model, chunk_size=8):
        model(input_ids=ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one for name, one in found.items()}


@pytest.mark.parametrize(
    "frozen, ignored, named",
    [
        ((), False, "model.norm.weight"),  # trained
        (("model.norm",), False, "lm_head.weight"),
        (("model.norm", "lm_head"), False, "lm_head.weight"),  # sharded
        (("lm_head",), True, "model.norm.weight"),
    ],
)
def test_a_head_in_a_group_that_is_sharded_or_trained_is_refused(frozen, ignored, named, mesh):
    model = make_model(*frozen)
    options = {"mesh": mesh, "ignored_params": {model.lm_head.weight} if ignored else set()}
    fully_shard([model.model.norm, model.lm_head], **options)
    fully_shard(model, **options)
    with pytest.raises(ValueError, match=f"^model must not have its head in a group of FSDP2 .* got {named} in"):
        gradients(model)


@pytest.mark.parametrize("grouped", [False, True], ids=["with the whole model", "frozen and ignored"])
def test_other_heads_get_the_gradients_of_one_process(grouped, mesh):
    frozen = ("model.norm", "lm_head") if grouped else ()
    expected = gradients(make_model(*frozen))
    model = make_model(*frozen)
    options = {"mesh": mesh, "ignored_params": {model.lm_head.weight} if grouped else set()}
    if grouped:
        fully_shard([model.model.norm, model.lm_head], **options)
    fully_shard(model, **options)
    found = gradients(model)
    assert found.keys() == expected.keys() and ("lm_head.weight" in found) != grouped
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("patch", [use_memory_efficient_loss, logit_transform])
def test_a_model_whose_wrapper_is_sharded_is_to_be_patched_before(patch, mesh):
    """FSDP2 gathers around the forward of the wrapper; the model in it is tried without."""
    wrapper = torch.nn.Sequential(make_model())
    fully_shard(wrapper, mesh=mesh)
    with pytest.raises(ValueError, match=r"^model must be patched before it is sharded, got a .*before shard_qlora"):
        patch(wrapper[0])
