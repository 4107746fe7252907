"""QLoRA of a tiny Llama in as many processes as torchrun starts, or in one: what each rank has found.

python -m tests.fsdp2.more_ranks OUT
torchrun --nproc_per_node 8 -m tests.fsdp2.more_ranks OUT
"""

import sys

import torch.distributed as dist

from benchmarks.fsdp2 import features, formula, ranks
from benchmarks.fsdp2.ranks import RANK, WORLD
from unsloth_puzzles.bench.record import write_json
from unsloth_puzzles.fsdp2 import linear

ROWS, LORA_RANK = 8, 6  # 4 ranks hold 2, 2, 2, 0 of the rows of a LoRA A with 6; of 8 ranks two hold none


def main(out: str) -> None:
    ranks.start()
    linear._OPS = formula.OPERATORS  # Triton's interpreter would take minutes in eight processes
    own = features.train(rows=ROWS, rank=LORA_RANK)
    found = [own]
    if WORLD > 1:
        found = [None] * WORLD
        dist.all_gather_object(found, own)
    if RANK == 0:
        write_json(out, found)
    ranks.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
