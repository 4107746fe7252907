"""Executes the few PTX instructions of `unsloth_puzzles.nf4.asm` for one warp, in NumPy: registers are arrays of 32."""

import re

import numpy as np
import torch

WARP = 32
_TO_NEAREST = {"f16": torch.float16, "bf16": torch.bfloat16}


def run_warp(text: str, results: int, *inputs: np.ndarray) -> list[np.ndarray]:
    """The uint32 registers $0 to $(results - 1) of each lane, given the inputs (uint32 or float32) after them."""
    registers = {f"${results + i}": value.view(np.uint32) for i, value in enumerate(inputs)}
    for statement in re.sub(r"^\{|\}$", "", text.strip()).replace("\n", " ").split(";"):
        if statement.strip() and not statement.strip().startswith(".reg"):
            opcode, _, operands = statement.strip().partition(" ")
            target, *sources = (operand.strip() for operand in re.split(r",(?![^{]*\})", operands))
            values = [_value(registers, source) for source in sources]
            registers[target] = _execute(opcode, values)
    return [registers[f"${i}"] for i in range(results)]


def _value(registers: dict, operand: str):
    if operand.startswith("{"):
        return tuple(registers[name.strip()] for name in operand[1:-1].split(","))
    return registers[operand] if operand in registers else np.full(WARP, int(operand, 0), np.uint32)


def _execute(opcode: str, v: list) -> np.ndarray:
    match opcode.split("."):
        case ["mov", "b32"]:
            return v[0][0] | (v[0][1] << np.uint32(16)) if isinstance(v[0], tuple) else v[0]
        case ["shr", "u32"]:
            return v[0] >> v[1]
        case ["and", "b32"]:
            return v[0] & v[1]
        case ["add", "u32"]:
            return v[0] + v[1]
        case ["setp", "nan", "f32"]:
            return np.isnan(v[0].view(np.float32)) | np.isnan(v[1].view(np.float32))
        case ["selp", "b32"]:
            return np.where(v[2], v[0], v[1])
        case ["lop3", "b32"]:
            return _logic(*v)
        case ["prmt", "b32"]:
            return _permute(*v)
        case ["shfl", "sync", "idx", "b32"]:
            return _shuffle(*v)
        case ["mul", "rn", "ftz", "f32"]:
            return _multiply(v[0].view(np.float32), v[1].view(np.float32))
        case ["cvt", "rn", "f16", "f32"]:
            return _round(v[0], "f16")
        case ["cvt", "rn", ("f16x2" | "bf16x2") as kind, "f32"]:  # the first source goes to the upper half
            return (_round(v[0], kind[:-2]) << np.uint32(16)) | _round(v[1], kind[:-2])
    raise AssertionError(f"{opcode}: not an instruction that these texts use")


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mul.rn.ftz.f32: a zero of the same sign for what is below 2^-126 when rounded to 24 bits with any exponent."""
    with np.errstate(all="ignore"):
        exact = a.astype(np.float64) * b.astype(np.float64)
        tiny = np.abs((exact * 2.0**24).astype(np.float32)) < np.float32(2.0**-102)
        return np.where(tiny, np.copysign(np.float32(0), exact), exact).astype(np.float32).view(np.uint32)


def _round(bits: np.ndarray, kind: str) -> np.ndarray:
    rounded = torch.from_numpy(bits.view(np.float32).copy()).to(_TO_NEAREST[kind])
    return rounded.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros(WARP, np.uint32)
    for index in np.flatnonzero([(int(table[0]) >> bit) & 1 for bit in range(8)]):
        result |= (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
    return result


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = (b.astype(np.uint64) << np.uint64(32)) | a
    result = np.zeros(WARP, np.uint64)
    for byte in range(4):
        choice = (selector.astype(np.uint64) >> np.uint64(4 * byte)) & np.uint64(15)
        value = (source >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        signs = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))  # bit 3 asks for the byte's sign
        result |= np.where(choice & np.uint64(8), signs, value) << np.uint64(8 * byte)
    return result.astype(np.uint32)


def _shuffle(value: np.ndarray, index: np.ndarray, control: np.ndarray, members: np.ndarray) -> np.ndarray:
    """PTX ISA, shfl.sync.idx: segments of lanes by the mask in bits 8 to 12, the index clamped to bits 0 to 4."""
    assert (members == 0xFFFFFFFF).all()
    lane, index = np.arange(WARP), index & 31
    mask, clamp = (control >> 8) & 31, control & 31
    source = (lane & mask) | (index & ~mask & 31)
    last = (lane & mask) | (clamp & ~mask & 31)
    return value[np.where(source <= last, source, lane)]
