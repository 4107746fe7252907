"""One Triton kernel: packed NF4 with a double-quantised absmax -> float16, bfloat16 or float32 weights.

Bytes a weight: 0.5 read (the 4-bit index), 1/64 read (the 8-bit absmax), 4/16384 read (the float32 absmax2), 2
written: 2.516 for 16-bit output. Arithmetic is a table look-up, a multiply and a rounding a weight, so the kernel is
bound by memory; its shape follows from that. A thread loads one 32-bit word (8 weights) and stores their 16 bytes at
once, `UNROLL` times, with all the loads issued before the first store.
"""

import triton
import triton.language as tl

# A product is tiny, and flushed, if it is below 2^-126 when rounded to 24 bits whatever its exponent (as `.ftz` does in
# hardware). The test uses the product times 2^24, which is not subnormal and rounds to the same 24 bits.
_SCALE = tl.constexpr(2.0**24)
_TINY = tl.constexpr(2.0**-126 * 2.0**24)


@triton.jit
def _absmax(
    block,
    absmax_ptr,
    code2_ptr,
    absmax2_ptr,
    offset,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    ASM: tl.constexpr,
    mask=None,
):
    """float32 absmax of each quantisation block: code2[q] * absmax2 + offset, rounded after each operation."""
    if not NESTED:
        return tl.load(absmax_ptr + block, mask=mask)
    q = tl.load(absmax_ptr + block, mask=mask)  # whatever a masked lane holds, it is a valid index of the 256 codes
    absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask)
    code2 = tl.load(code2_ptr + q.to(tl.int32))
    if ASM:
        return tl.inline_asm_elementwise(
            "mul.rn.ftz.f32 $0, $1, $2; add.rn.f32 $0, $0, $3;",
            "=&f,f,f,f",
            [code2, absmax2, offset],
            tl.float32,
            True,
            1,
        )
    # Compiled with enable_fp_fusion=False: a fused multiply-add rounds once where bitsandbytes rounds twice.
    return tl.where(tl.abs(code2 * _SCALE * absmax2) < _TINY, offset, code2 * absmax2 + offset)


@triton.jit
def _look_up(nibble, code_ptr, LOOKUP: tl.constexpr):
    """The table value (float32) of each 4-bit index."""
    if LOOKUP == "load":
        return tl.load(code_ptr + nibble)
    elif LOOKUP == "gather":
        return tl.gather(tl.load(code_ptr + tl.arange(0, 16)), nibble, 0)
    else:
        tl.static_assert(LOOKUP == "select")
        value = tl.load(code_ptr + 15)
        for i in tl.static_range(15):
            value = tl.where(nibble == i, tl.load(code_ptr + i), value)
        return value


@triton.jit
def round_bfloat16(x):
    """Round float32 to the nearest bfloat16, ties to even, in integers: below sm_80 there is no such instruction (and
    Triton's interpreter truncates)."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FFFFFFF, bits + 0x7FFF + ((bits >> 16) & 1))
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _scale(code, absmax, dtype: tl.constexpr, SOFTWARE_BF16: tl.constexpr):
    """code * absmax, below 2^-126 flushed to a zero of the same sign, rounded once to `dtype`."""
    product = code * absmax
    if dtype != tl.float16:  # in float16 such products round to zero anyway
        product = tl.where(tl.abs(code * _SCALE * absmax) < _TINY, product * 0.0, product)
    if dtype == tl.bfloat16 and SOFTWARE_BF16:
        return round_bfloat16(product)
    return product.to(dtype)


@triton.jit
def _interleave8(v):
    """Eight tensors [n] -> one [8 n] tensor, element 8 i + j from v[j][i]; stays within each thread's registers."""
    low = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
    high = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    return tl.reshape(tl.join(low, high), (8 * v[0].shape[0],))


@triton.jit
def _store_words(
    out_ptr,
    words,
    absmax,
    code_ptr,
    table,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LOOKUP: tl.constexpr,
    EVICT: tl.constexpr,
    SOFTWARE_BF16: tl.constexpr,
):
    """De-quantise words [n] and store their 8 n weights at `out_ptr`, 16 bytes (float32: 32) a thread."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    n: tl.constexpr = words.shape[0]
    if ASM == "":
        v = ()
        for j in tl.static_range(8):
            nibble = (words >> (8 * (j // 2) + 4 * (1 - j % 2))) & 15
            v = v + (_scale(_look_up(nibble, code_ptr, LOOKUP), absmax, dtype, SOFTWARE_BF16),)
        tl.store(out_ptr + tl.arange(0, 8 * n), _interleave8(v), eviction_policy=EVICT)
    elif dtype == tl.float32:
        # Types as a literal: of a tuple held in a constexpr Triton 3.9 no longer takes the single types.
        v = tl.inline_asm_elementwise(
            ASM,
            CONSTRAINTS,
            [words, absmax, table],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            True,
            1,
        )
        tl.store(out_ptr + tl.arange(0, 8 * n), _interleave8(v), eviction_policy=EVICT)
    else:
        p = tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, [words, absmax, table], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
        pairs = tl.reshape(tl.join(tl.join(p[0], p[2]), tl.join(p[1], p[3])), (4 * n,))
        tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, 4 * n), pairs, eviction_policy=EVICT)


# Only packed_ptr and out_ptr are specialised on 16-byte alignment; the other pointers are read one value at a time.
@triton.jit(
    do_not_specialize=["numel"],
    do_not_specialize_on_alignment=["absmax_ptr", "code_ptr", "code2_ptr", "absmax2_ptr", "offset_ptr"],
)
def dequantize_nf4_kernel(
    packed_ptr,  # uint8 [ceil(numel / 2)], high nibble first
    absmax_ptr,  # uint8 (NESTED) or float32 [ceil(numel / BLOCKSIZE)]
    code_ptr,  # float32 [16]
    code2_ptr,  # float32 [256], the second level's code
    absmax2_ptr,  # float32 [ceil(len(absmax) / BLOCKSIZE2)]
    offset_ptr,  # float32 scalar, read here: reading it on the host would synchronise
    out_ptr,  # [numel]
    numel: tl.int64,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    NESTED: tl.constexpr,
    FULL: tl.constexpr,  # every program is whole, and so are the words: no masks anywhere
    ALIGNED: tl.constexpr,  # 16-byte aligned packed_ptr and out_ptr
    WORDS: tl.constexpr,  # words a program handles at a time
    UNROLL: tl.constexpr,
    ASM: tl.constexpr,  # PTX of asm.decode_word, or "" for plain Triton
    CONSTRAINTS: tl.constexpr,
    LOOKUP: tl.constexpr,  # "load", "gather" or "select"; plain Triton only
    EVICT: tl.constexpr,  # "evict_first": packed weights are read once, and the output is larger than the L2; or ""
    SOFTWARE_BF16: tl.constexpr,  # round in integers
):
    # Word indices fit 32 bits (numel < 2^34 is checked at launch); weights and bytes are addressed from 64-bit bases.
    start = tl.program_id(0) * (WORDS * UNROLL)
    base = start.to(tl.int64)
    offset = tl.load(offset_ptr) if NESTED else 0.0
    if FULL or (ALIGNED and (base + WORDS * UNROLL) * 8 <= numel):
        lanes = tl.arange(0, WORDS)
        table = 0.0
        if ASM != "":
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid; // $1", "=r,r", [lanes], tl.int32, True, 1)
            table = tl.load(code_ptr + lane % 16)
        words = ()
        absmax = ()
        for i in tl.static_range(UNROLL):
            word = start + i * WORDS + lanes
            words = words + (tl.load(packed_ptr.to(tl.pointer_type(tl.int32)) + word, eviction_policy=EVICT),)
            block = word // (BLOCKSIZE // 8)
            scale = _absmax(block, absmax_ptr, code2_ptr, absmax2_ptr, offset, BLOCKSIZE2, NESTED, ASM != "")
            absmax = absmax + (scale,)
        for i in tl.static_range(UNROLL):
            out = out_ptr + (base + i * WORDS) * 8
            _store_words(out, words[i], absmax[i], code_ptr, table, ASM, CONSTRAINTS, LOOKUP, EVICT, SOFTWARE_BF16)
    else:  # the ragged end, or pointers that are not 16-byte aligned: a byte a thread, everything masked
        for i in range(4 * UNROLL):
            byte = base * 4 + i * WORDS + tl.arange(0, WORDS)
            mask = byte * 2 < numel
            pair = tl.load(packed_ptr + byte, mask=mask, other=0).to(tl.int32)
            block = (byte // (BLOCKSIZE // 2)).to(tl.int32)
            absmax = _absmax(block, absmax_ptr, code2_ptr, absmax2_ptr, offset, BLOCKSIZE2, NESTED, ASM != "", mask)
            high = _scale(_look_up(pair >> 4, code_ptr, "load"), absmax, out_ptr.dtype.element_ty, SOFTWARE_BF16)
            low = _scale(_look_up(pair & 15, code_ptr, "load"), absmax, out_ptr.dtype.element_ty, SOFTWARE_BF16)
            tl.store(out_ptr + byte * 2, high, mask=mask)
            tl.store(out_ptr + byte * 2 + 1, low, mask=byte * 2 + 1 < numel)
