"""Adapters of ranks that share a GPU, or have one each: what is saved is what was sharded, bit for bit.

torchrun --nproc_per_node 2 -m tests.fsdp2.save_on_gpu FOLDER
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from benchmarks.fsdp2 import ranks
from benchmarks.models import random_nf4_llama, tiny_llama_config
from unsloth_puzzles.fsdp2.pack import pack_nf4
from unsloth_puzzles.fsdp2.save import save_adapters
from unsloth_puzzles.fsdp2.shard import shard_qlora


def main(folder: str) -> None:
    ranks.start()
    torch.manual_seed(1)
    model = random_nf4_llama(tiny_llama_config(64, 1), ranks.device(), torch.float32)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    expected = [one.detach().cpu().clone() for one in model.parameters() if one.requires_grad]
    pack_nf4(model)
    shard_qlora(model, ranks.mesh())
    save_adapters(model, folder)
    if ranks.RANK == 0:
        saved = load_file(Path(folder, "adapter_model.safetensors"))
        left = [one for one in expected if not any(torch.equal(one, other) for other in saved.values())]
        assert len(saved) == len(expected) and not left, f"{len(saved)} saved, {len(left)} of {len(expected)} missing"
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
