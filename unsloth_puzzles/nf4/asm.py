"""The PTX that turns one 32-bit word of packed NF4 into eight scaled weights.

A word holds eight weights. Byte `k` of it holds weight `2k` in its HIGH nibble and weight `2k + 1` in its low one (the
order of bitsandbytes). For each weight the text looks the 4-bit code up, multiplies it by the block's absmax with
`mul.rn.ftz.f32` (bitsandbytes is built with flush-to-zero, so products below 2^-126 become zero there too; a multiply
that says `.rn` is never contracted with an addition) and rounds once to the output type.

Operands: 4 packed 32-bit results for 16-bit output or 8 float32 results, then the word, the absmax, and the look-up
table's value held by this lane.
"""

import struct
from functools import cache

# bitsandbytes' NF4 code: the 16 quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314).
NF4_CODE = (
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

# A lane reads lane (nibble & 15) of its half warp: segment mask 16, clamp 31. The shuffle ignores the bits above the
# nibble, which saves masking them off.
_HALF_WARP = "0x101f"


def _shuffle(word: str, table: str) -> list[str]:
    """The table lies across the lanes of a half warp, one value in each: a shuffle looks a code up."""
    lines = []
    for weight in range(8):
        shift = 8 * (weight // 2) + (0 if weight % 2 else 4)
        lines += [f"shr.u32 n, {word}, {shift};", f"shfl.sync.idx.b32 f{weight}, {table}, n, {_HALF_WARP}, 0xffffffff;"]
    return lines


def _permute(word: str, table: str) -> list[str]:
    """The table lies in immediates, a plane for each of a float's 4 bytes: `prmt` looks up 4 codes in 8 bytes at once.

    Bits 0-2 of the four nibbles select in the lower and in the upper half of a plane, bit 3 chooses between the two;
    then four planes of four bytes are transposed into four floats.
    """
    bits = [struct.unpack("<I", struct.pack("<f", value))[0] for value in NF4_CODE]
    planes = [[bits[i] >> (8 * plane) & 255 for i in range(16)] for plane in range(4)]
    lines = [".reg .b32 sel, up, lo, hi, pl<4>, t<4>;"]
    for half in range(2):
        lines += [f"shr.u32 n, {word}, {16 * half};", "and.b32 sel, n, 0x7777;"]
        lines += ["shr.u32 n, n, 3;", "and.b32 n, n, 0x1111;", "prmt.b32 up, 0xff00, 0, n;"]  # 0xff where bit 3 is set
        for plane, values in enumerate(planes):
            words = [sum(values[4 * i + byte] << (8 * byte) for byte in range(4)) for i in range(4)]
            lines += [f"prmt.b32 lo, {words[0]:#010x}, {words[1]:#010x}, sel;"]
            lines += [f"prmt.b32 hi, {words[2]:#010x}, {words[3]:#010x}, sel;"]
            lines += [f"lop3.b32 pl{plane}, up, hi, lo, 0xca;"]  # (up & hi) | (~up & lo)
        lines += ["prmt.b32 t0, pl0, pl1, 0x5140;", "prmt.b32 t1, pl0, pl1, 0x7362;"]
        lines += ["prmt.b32 t2, pl2, pl3, 0x5140;", "prmt.b32 t3, pl2, pl3, 0x7362;"]
        for nibble, (low, high, order) in enumerate(
            (("t0", "t2", "0x5410"), ("t0", "t2", "0x7632"), ("t1", "t3", "0x5410"), ("t1", "t3", "0x7632"))
        ):
            weight = 2 * (2 * half + nibble // 2) + (0 if nibble % 2 else 1)
            lines += [f"prmt.b32 n, {low}, {high}, {order};", f"mov.b32 f{weight}, n;"]
    return lines


LOOK_UPS = {"shuffle": _shuffle, "prmt": _permute}


def _round_pair(dtype: str, sm: int, result: str, low: str, high: str) -> list[str]:
    """Round two float32 to 16 bits each and pack them, `low` in the lower half."""
    kind = {"float16": "f16", "bfloat16": "bf16"}[dtype]
    if sm >= 80:
        return [f"cvt.rn.{kind}x2.f32 {result}, {high}, {low};"]
    if dtype == "float16":
        return [f"cvt.rn.f16.f32 h0, {low};", f"cvt.rn.f16.f32 h1, {high};", f"mov.b32 {result}, {{h0, h1}};"]
    lines = []
    for source, bits in ((low, "r0"), (high, "r1")):  # below sm_80: to nearest even, in integers; NaN as the hardware's
        lines += [
            f"mov.b32 {bits}, {source};",
            f"shr.u32 n, {bits}, 16;",
            "and.b32 n, n, 1;",
            f"add.u32 {bits}, {bits}, n;",
            f"add.u32 {bits}, {bits}, 0x7fff;",
            f"setp.nan.f32 p, {source}, {source};",
            f"selp.b32 {bits}, 0x7fffffff, {bits}, p;",
        ]
    return [*lines, f"prmt.b32 {result}, r0, r1, 0x7632;"]


@cache
def decode_word(dtype: str, sm: int, look_up: str = "shuffle") -> str:
    """Inline assembly for one word. `dtype` is "float16", "bfloat16" or "float32"; `sm` is 75, 80, 90, ...

    `look_up` is "shuffle", or "prmt", which holds bitsandbytes' NF4 code in immediates and ignores the table operand.
    """
    results = 8 if dtype == "float32" else 4
    word, absmax, table = (f"${results + i}" for i in range(3))
    lines = [".reg .b32 n, r0, r1;", ".reg .f32 f<8>;", ".reg .b16 h0, h1;", ".reg .pred p;"]
    lines += LOOK_UPS[look_up](word, table)
    for weight in range(8):
        target = f"${weight}" if dtype == "float32" else f"f{weight}"
        lines.append(f"mul.rn.ftz.f32 {target}, f{weight}, {absmax};")
    if dtype != "float32":
        for pair in range(4):
            lines += _round_pair(dtype, sm, f"${pair}", f"f{2 * pair}", f"f{2 * pair + 1}")
    return "{\n" + "\n".join(lines) + "\n}"


def constraints(dtype: str) -> str:
    """LLVM's operand constraints for `decode_word`; `&`: no result shares a register with an input."""
    results = ["=&f"] * 8 if dtype == "float32" else ["=&r"] * 4
    return ",".join([*results, "r", "f", "f"])
