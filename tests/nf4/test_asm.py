"""The inline assembly, executed on the CPU instruction by instruction, against the float32 formula."""

import re

import numpy as np
import pytest
import torch
from bitsandbytes.functional import QuantState, get_4bit_type

from tests.nf4.ptx import WARP, run_warp
from tests.nf4.reference import CODE, assert_same_bits, reference
from unsloth_puzzles.nf4.asm import LOOK_UPS, NF4_CODE, constraints, decode_word

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
TABLE = np.array(CODE, np.float32)[np.arange(WARP) % 16]
ABSMAX = {
    "usual": lambda random: random.uniform(0, 0.1, WARP),
    "negative": lambda random: -random.uniform(0, 0.1, WARP),
    "near 2^-126": lambda random: 2.0**-126 * random.uniform(0.5, 12, WARP),
    "subnormal": lambda random: 2.0**-130 * random.uniform(0, 1, WARP),
    "of float16's subnormals": lambda random: 2.0**-20 * random.uniform(0, 1, WARP),
    "huge": lambda random: random.uniform(1e4, 3e38, WARP),
    "infinite and NaN": lambda random: np.where(np.arange(WARP) % 2, np.inf, np.nan),
}


def decode(dtype: str, sm: int, words: np.ndarray, absmax: np.ndarray, look_up: str = "shuffle") -> torch.Tensor:
    """[32, 8] weights of a warp's words."""
    results = 8 if dtype == "float32" else 4
    registers = run_warp(decode_word(dtype, sm, look_up), results, words, absmax, TABLE)
    return torch.from_numpy(np.stack(registers, 1).view(np.int32)).view(DTYPES[dtype])


def expected(dtype: str, words: np.ndarray, absmax: np.ndarray) -> torch.Tensor:
    blocks = torch.from_numpy(absmax)
    state = QuantState(blocks, shape=(WARP, 8), code=None, blocksize=8, quant_type="nf4", dtype=DTYPES[dtype])
    return reference(torch.from_numpy(words.view(np.uint8)).view(-1, 1), state)


@pytest.mark.parametrize("sm", [75, 80, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_assembly_gives_the_bits_of_the_formula(look_up, dtype, sm):
    random = np.random.default_rng(0)
    for kind in ABSMAX:
        words = random.integers(0, 2**32, WARP, dtype=np.uint32)
        absmax = ABSMAX[kind](random).astype(np.float32)
        assert_same_bits(decode(dtype, sm, words, absmax, look_up), expected(dtype, words, absmax))


def test_software_bfloat16_rounds_ties_to_even():
    """Halfway cases only: products code[15] * absmax = absmax that lie exactly between two bfloat16."""
    upper = np.arange(0x3F80, 0x3F80 + WARP, dtype=np.uint32)
    absmax = ((upper << np.uint32(16)) | np.uint32(0x8000)).view(np.float32)
    words = np.full(WARP, 0xFFFFFFFF, np.uint32)
    assert_same_bits(decode("bfloat16", 75, words, absmax), decode("bfloat16", 80, words, absmax))
    even = decode("bfloat16", 75, words, absmax).view(torch.int16)
    assert not (even & 1).any()


def test_nf4_table_equals_that_of_bitsandbytes():
    assert tuple(CODE) == NF4_CODE
    assert torch.equal(get_4bit_type("nf4", device="cpu"), torch.tensor(NF4_CODE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("look_up", LOOK_UPS)
def test_sm_75_rounds_without_later_instructions(look_up, dtype):
    text = decode_word(dtype, 75, look_up)
    assert not re.search(r"cvt\.\S*(x2|bf16)", text)
    assert (decode_word(dtype, 80, look_up) == text) == (dtype == "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sm", [75, 90])
def test_constraints_fit_the_operands(dtype, sm):
    """Results are written before the last input is read: without early clobber they might share a register."""
    operands = constraints(dtype).split(",")
    used = {int(number) for number in re.findall(r"\$(\d+)", decode_word(dtype, sm))}
    assert used == set(range(len(operands)))
    assert {int(number) for number in re.findall(r"\$(\d+)", decode_word(dtype, sm, "prmt"))} <= used
    results = operands[:-3]
    assert len(results) == (8 if dtype == "float32" else 4)
    assert all(result.startswith("=&") for result in results)
