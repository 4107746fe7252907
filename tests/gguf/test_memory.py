"""An export's memory does not grow with the model, in 16 bits or in NF4 with adapters."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from benchmarks.gguf.models import tokenizer
from benchmarks.models import random_nf4_llama
from tests.gguf.models import with_adapters
from unsloth_puzzles.gguf.export import export_gguf

def high_water():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20  # GiB

def half_precision():
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128256, intermediate_size=2816, **small))
    torch.set_default_dtype(torch.float32)
    return model

def four_bits():
    config = LlamaConfig(vocab_size=1024, intermediate_size=49152, **small)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return with_adapters(random_nf4_llama(config, "cpu"), r=16, target_modules=targets)

small = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 1024,
         "tie_word_embeddings": True}
folder, quantization, kind = sys.argv[1:]
model = globals()[kind]()
weights = 4 * 3 * 1024 * 49152 if kind == "four_bits" else sum(p.numel() * 4 for p in model.parameters())
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
before = high_water()
export_gguf(model, tokenizer("smollm"), folder, quantization, progress=False)
print(high_water() - before, weights / 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half_precision", "four_bits"])
@pytest.mark.parametrize("quantization", ["q8_0", "q4_k_m"])
def test_peak_is_that_of_chunks(tmp_path, quantization, kind):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), quantization, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, whole = map(float, done.stdout.split())
    # GiB: copies of a chunk of 16 MiB. In float32 the embedding alone takes 0.5, and the 4-bit matrices 0.2 each.
    assert grown < 0.2 < 0.5 < whole
