"""Run a launch into poisoned memory between guard elements."""

import torch

from tests.nf4.reference import BITS
from unsloth_puzzles.nf4.build import PLAIN
from unsloth_puzzles.nf4.launch import prepare
from unsloth_puzzles.nf4.state import nf4_weight

GUARD = 512  # elements on either side: more than a small program writes, and a multiple of 16 bytes
PATTERN = 0x2B67

SMALL = PLAIN._replace(words=32, unroll=1, num_warps=1)  # 256 weights a program: small tensors reach every path
FULL_PROGRAM = 8 * SMALL.words * SMALL.unroll


def guarded_launch(packed, state, config=SMALL, *, out_shift=0, packed_shift=0) -> torch.Tensor:
    """The kernel's own output. Shifts (elements of `out`, bytes of `packed`) move the tensors off 16-byte alignment.

    `out` is NaN before the run and lies between guard elements; they must come back untouched, and `packed` too.
    """
    numel = torch.Size(state.shape).numel()
    if packed_shift:
        room = torch.empty(packed.numel() * packed.element_size() + 16, dtype=torch.uint8, device=packed.device)
        moved = room[packed_shift : packed_shift + room.numel() - 16]
        packed = moved.copy_(packed.view(-1).view(torch.uint8))
    before = packed.clone()
    bits = torch.full((numel + 2 * GUARD + 16,), PATTERN, dtype=BITS[state.dtype], device=packed.device)
    start = GUARD + out_shift
    out = bits.view(state.dtype)[start : start + numel]
    out.fill_(float("nan"))
    prepare(nf4_weight(packed, state), out, config).run(out)
    assert torch.equal(packed.view(torch.uint8), before.view(torch.uint8)), "the kernel wrote into the packed weight"
    outside = torch.cat((bits[:start], bits[start + numel :]))
    assert (outside == PATTERN).all(), f"the kernel wrote {int((outside != PATTERN).sum())} elements outside of out"
    return out.view(state.shape)
