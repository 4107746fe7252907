"""An export's memory does not grow with the model."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from benchmarks.gguf.models import tokenizer
from unsloth_puzzles.gguf.export import export_gguf

def high_water():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # GiB

small = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4, "intermediate_size": 2816}
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, hidden_size=1024, tie_word_embeddings=True, **small))
torch.set_default_dtype(torch.float32)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = high_water()
export_gguf(model, tokenizer("smollm"), sys.argv[1], sys.argv[2], progress=False)
print(high_water() - before, sum(p.numel() * 4 for p in model.parameters()) / 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_peak_is_that_of_chunks(tmp_path, quantization):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), quantization]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, whole = map(float, done.stdout.split())
    assert grown < 0.2 < 0.5 < whole  # GiB: copies of a chunk of 16 MiB; in float32 the embedding alone takes 0.5
