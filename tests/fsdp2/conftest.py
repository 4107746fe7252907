"""The folder that the script's tests start from."""

import pytest

from benchmarks.backprop.grpo import tiny_tokenizer
from benchmarks.models import tiny_llama_config


@pytest.fixture(scope="session")
def architecture(tmp_path_factory):
    """A folder with the configuration and the tokenizer of a tiny Llama."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), tiny_tokenizer()
    tiny_llama_config(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
