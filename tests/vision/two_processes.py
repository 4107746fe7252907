"""Two processes on a CPU, started by torchrun: adapters of the tower take part under DDP and under FSDP2.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/vision/two_processes.py FAMILY
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.vision.checks import AFTER, ONE, SHORT, TEXT, TURNS, TWO, relative_difference
from benchmarks.vision.families import FAMILIES
from unsloth_puzzles.vision.collator import VisionCollator
from unsloth_puzzles.vision.mllama import patch_mllama

LARGEST = 2e-6


def adapted(name: str):
    processor, model = FAMILIES[name]()
    if name == "mllama":
        patch_mllama(model)
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    return VisionCollator(processor), get_peft_model(model, config).eval()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, one in model.named_parameters():
        if one.grad is not None:
            grad = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
            found[name.removeprefix("module.")] = grad.clone()
            one.grad = None
    return found


def mean_of_both(model, batches) -> dict[str, torch.Tensor]:
    """What the gradients must be: those of each process's batch in one model, averaged."""
    for batch in batches:
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    return gradients(model)


def compare(what: str, found: dict, expected: dict) -> None:
    off = relative_difference(found, expected)
    towers = sum("vision" in name or "visual" in name for name in found)
    print(f"{what}: {off:.1e}, {towers} gradients of the tower\n", end="", flush=True)  # in one piece
    assert off <= LARGEST, what


def check_ddp(collate, model, rank: int) -> None:
    """One process has images, the other has none."""
    batches = [collate([ONE, TWO]), collate([TEXT, SHORT])]
    expected = mean_of_both(model, batches)
    wrapped = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    wrapped(**batches[rank], use_cache=False).loss.backward()
    compare(f"DDP, rank {rank}", gradients(wrapped), expected)


def check_fsdp2(collate, model, rank: int) -> None:
    """Both processes have images, or neither has: what KindSampler sees to."""
    sharded = copy.deepcopy(model)
    for part in sharded.modules():
        if type(part).__name__ in sharded.base_model.model._no_split_modules:
            fully_shard(part)
    fully_shard(sharded)
    for rows in ([[ONE, TWO], [AFTER, TURNS]], [[TEXT, SHORT], [SHORT, TEXT]], [[TURNS, ONE], [AFTER, TWO]]):
        batches = [collate(one) for one in rows]
        expected = mean_of_both(model, batches)
        sharded(**batches[rank], use_cache=False).loss.backward()
        compare(f"FSDP2, rank {rank}", gradients(sharded), expected)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    collate, model = adapted(sys.argv[1])
    check_ddp(collate, model, dist.get_rank())
    check_fsdp2(collate, model, dist.get_rank())
    dist.destroy_process_group()
