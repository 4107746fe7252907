"""The folder that the script's tests start from, and the mesh of one rank."""

import pytest
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.models import tiny_llama_config


@pytest.fixture(scope="session")
def architecture(tmp_path_factory):
    """A folder with the configuration and the tokenizer of a tiny Llama."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), tiny_tokenizer()
    tiny_llama_config(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mesh(monkeypatch):
    """One rank over gloo, with Triton's interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()
