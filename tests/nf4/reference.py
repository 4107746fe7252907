"""The float32 formula of NF4 de-quantisation, from scratch, and the weights on which kernels are tested with it.

weight = code[nibble] * absmax, rounded to float32, to zero below 2^-126 (bitsandbytes is built with flush-to-zero),
then rounded to the output dtype. A double-quantised absmax is code2[q] * absmax2, rounded and flushed alike, + offset,
rounded. Each operation is done in float64 and rounded to float32, which for a single one is the float32 result.
"""

from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map

SMALLEST_NORMAL = 2.0**-126
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
STORAGE = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# The quantiles of QLoRA (arXiv:2305.14314, appendix E).
CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def reference(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight, `state.shape` in `state.dtype`, on the CPU; transposed if `packed` is a row."""
    numel = torch.Size(state.shape).numel()
    pairs = packed.cpu().contiguous().view(-1).view(torch.uint8).int()
    nibbles = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[:numel]
    scales = state.absmax.cpu()
    if state.state2 is not None:
        scales = _absmax(scales.long(), state.state2, state.offset.cpu())
    scales = scales.repeat_interleave(state.blocksize)[:numel]
    weight = _multiply(torch.tensor(CODE)[nibbles], scales).to(state.dtype).view(state.shape)
    return weight.t() if packed.shape[0] == 1 else weight


def _absmax(q: torch.Tensor, state2: QuantState, offset: torch.Tensor) -> torch.Tensor:
    absmax2 = state2.absmax.cpu().repeat_interleave(state2.blocksize)[: len(q)]
    return (_multiply(state2.code.cpu()[q], absmax2).double() + offset.double()).float()


def _multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Hardware flushes what is below 2^-126 when rounded to 24 bits whatever its exponent: asked of 2^24 times it."""
    product = a.double() * b.double()
    tiny = (product * 2.0**24).float().abs() < SMALLEST_NORMAL * 2.0**24
    return torch.where(tiny, torch.copysign(torch.zeros(()), product.float()), product.float())


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shape, dtype and bits (so +0 is not -0); a NaN equals any NaN."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    same = actual.contiguous().view(BITS[actual.dtype]) == expected.contiguous().view(BITS[actual.dtype])
    wrong = ~(same | (actual.isnan() & expected.isnan()))
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        message = (
            f"{int(wrong.sum())} of {wrong.numel()} differ; at {first} {actual[first]}, expected {expected[first]}"
        )
        raise AssertionError(message)


@dataclass
class Weight:
    """Random packed bytes with a random state, so that every code, every 8-bit absmax and every sign occurs."""

    shape: tuple[int, ...] = (300,)
    dtype: torch.dtype = torch.float16
    blocksize: int = 64
    blocksize2: int = 256
    nested: bool = True
    storage: torch.dtype = torch.uint8
    scale: float = 0.02  # of the absmax
    offset: float = 0.0137
    seed: int = 0

    def make(self, device: str = "cpu") -> tuple[torch.Tensor, QuantState]:
        generator = torch.Generator().manual_seed(self.seed)
        numel = torch.Size(self.shape).numel()
        size = self.storage.itemsize
        bytes_stored = -(-numel // (2 * size)) * size
        packed = torch.randint(0, 256, (bytes_stored,), dtype=torch.uint8, generator=generator)
        blocks = -(-numel // self.blocksize)
        offset = state2 = None
        if self.nested:
            absmax = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
            absmax2 = torch.rand(-(-blocks // self.blocksize2), generator=generator) * self.scale
            code2 = create_dynamic_map().to(device)
            state2 = QuantState(absmax2.to(device), code=code2, blocksize=self.blocksize2, dtype=torch.float32)
            offset = torch.tensor(self.offset, device=device)
        else:
            absmax = torch.rand(blocks, generator=generator) * self.scale
        state = QuantState(
            absmax.to(device),
            shape=torch.Size(self.shape),
            code=torch.tensor(CODE, device=device),
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            offset=offset,
            state2=state2,
        )
        return packed.view(self.storage).view(-1, 1).to(device), state


def around_smallest_normal(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, QuantState]:
    """A weight whose products |code| * absmax lie within a few units of 2^-126, where rounding and flushing meet."""
    codes = torch.tensor([abs(code) for code in CODE if code], dtype=torch.float64)
    centres = (SMALLEST_NORMAL / codes).float().view(torch.int32)
    absmax = (centres[:, None] + torch.arange(-24, 25, dtype=torch.int32)).view(torch.float32).reshape(-1)
    packed = torch.arange(16, dtype=torch.uint8).mul(17).repeat(len(absmax)).view(-1, 1)  # every code twice a block
    shape, code = torch.Size((len(absmax), 32)), torch.tensor(CODE, device=device)
    return packed.to(device), QuantState(absmax.to(device), shape, code, 32, "nf4", dtype)
