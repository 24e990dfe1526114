"""Nibbles as bfloat16 numbers in registers, mostly with their scale.

e2m1 and the scales of MXFP4 and NVFP4 have products that bfloat16 holds exactly. int4 in groups of 128
inputs or more stays an integer: sums over 128 inputs are multiplied by its scale. int4 in smaller groups,
times its bfloat16 scale, is rounded to bfloat16, as by every library that dequantises to it.

Bytes come two at a time (int16), because two neighbouring inputs are what the matrix unit takes as one
register. A pair of e2m1 codes becomes two numbers by four integer operations: the bits, moved to the places
of bfloat16, are 2^-126 times the value. The scale brings 2^94 of that, the sums of the product 2^32, so that
scales of 2^33 are still numbers. int4 codes become 128 plus the code by one byte permutation, from which 128
plus the zero point is taken off exactly.

Scales and offsets come twice in each int32. Every function of pairs returns four tensors of the pairs' shape:
the first and the second number of the low nibbles, then of the high ones.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.nibbles import group_scale


@triton.jit
def twice(bits):
    """Return 16 bits (int32) in both halves of a word."""
    return bits | (bits << 16)


@triton.jit
def bits_of_bfloat(x):
    """Return float32 numbers, rounded to bfloat16, as bits (int32)."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def bfloat_scale(words, GROUP: tl.constexpr, SCALE: tl.constexpr, CODE: tl.constexpr):
    """Return the scales of group GROUP of a block, twice in a word; those of e2m1 are times 2^94.

    ``words``, GROUP, SCALE: as in :func:`xpar.kernels.gpu.nibbles.group_scale`.
    """
    if SCALE == "e8m0" and CODE == "e2m1":
        bits = (words[GROUP // 4] >> (8 * (GROUP % 4))) & 0xFF
        return twice(tl.minimum(bits + 94, 255) << 7)
    else:
        scale = group_scale(words, GROUP, SCALE)
        return twice(bits_of_bfloat(scale * 1.9807040628566084e28 if CODE == "e2m1" else scale))


@triton.jit
def offset_of_zeros(zeros, GROUP: tl.constexpr):
    """Return 128 plus the zero points of group GROUP of a block, twice in a word."""
    return twice((zeros >> (8 * GROUP)) & 0xFF | 0x4300)


@triton.jit
def halves(pair):
    """Return the two bfloat16 numbers of a word."""
    return tl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pair], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
    )


@triton.jit
def float_of_bits(bits):
    """Return the bfloat16 in the low half of a word as float32."""
    return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def nibble_at(pairs, PLACE: tl.constexpr):
    """Return the nibble at bit PLACE of a pair of bytes."""
    return (pairs.to(tl.int32) >> PLACE) & 15


@triton.jit
def number_e2m1(nibble, scale):
    """Return e2m1 codes times ``scale`` and 2^-126 as bfloat16."""
    size = nibble & 7
    twice_it = tl.where(size < 4, size, tl.where(size == 7, 12, 2 * size - 4))  # 0 1 2 3 4 6 8 12
    value = tl.where(nibble < 8, twice_it, -twice_it).to(tl.float32) * 0.5
    return (value * 1.1754943508222875e-38 * float_of_bits(scale)).to(tl.bfloat16)


@triton.jit
def numbers_e2m1(pairs, scale, other, ASM: tl.constexpr):
    """Return pairs of bytes of e2m1 codes as numbers, times 2^-126 and a scale.

    ``scale``, ``other``: of the low and the high nibbles. ASM: True for PTX.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, s, t, w, z; mov.b32 z, 0x80008000; shl.b32 w, $4, 4; "
            "prmt.b32 a, w, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 6; "
            "lop3.b32 a, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $0, a, $5, z; "
            "prmt.b32 b, w, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 6; "
            "lop3.b32 b, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $1, b, $6, z; "
            "prmt.b32 a, $4, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 6; "
            "lop3.b32 a, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $2, a, $7, z; "
            "prmt.b32 b, $4, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 6; "
            "lop3.b32 b, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $3, b, $8, z; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [pairs, scale, other], dtype=(tl.int32, tl.int32), is_pure=True,
            pack=2,
        )  # fmt: skip
        first, second = halves(low)
        third, fourth = halves(high)
        return first, second, third, fourth
    else:
        return (
            number_e2m1(nibble_at(pairs, 0), scale), number_e2m1(nibble_at(pairs, 8), scale),
            number_e2m1(nibble_at(pairs, 4), other), number_e2m1(nibble_at(pairs, 12), other),
        )  # fmt: skip


@triton.jit
def integer_int4(nibble, offset):
    """Return int4 codes plus 128 minus ``offset`` as float32."""
    return nibble.to(tl.float32) + 128.0 - float_of_bits(offset)


@triton.jit
def numbers_int4(pairs, scale, other, offset, above, ASM: tl.constexpr):
    """Return pairs of bytes of int4 codes, plus 128 minus an offset, times a scale.

    ``scale``, ``offset``: of the low nibbles; ``other``, ``above``: of the high ones. ASM: True for PTX.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, w, v, m, z; mov.b32 m, 0xBF80BF80; mov.b32 z, 0x80008000; "
            "and.b32 w, $4, 0x0F0F0F0F; shr.u32 v, $4, 4; and.b32 v, v, 0x0F0F0F0F; "
            "prmt.b32 a, w, 0x43434343, 0x4140; prmt.b32 b, w, 0x43434343, 0x4342; "
            "prmt.b32 c, v, 0x43434343, 0x4140; prmt.b32 d, v, 0x43434343, 0x4342; "
            "fma.rn.bf16x2 a, $9, m, a; fma.rn.bf16x2 b, $10, m, b; "
            "fma.rn.bf16x2 c, $11, m, c; fma.rn.bf16x2 d, $12, m, d; "
            "fma.rn.bf16x2 $0, a, $5, z; fma.rn.bf16x2 $1, b, $6, z; "
            "fma.rn.bf16x2 $2, c, $7, z; fma.rn.bf16x2 $3, d, $8, z; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [pairs, scale, other, offset, above],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=2,
        )  # fmt: skip
        first, second = halves(low)
        third, fourth = halves(high)
        return first, second, third, fourth
    else:
        s, t = float_of_bits(scale), float_of_bits(other)
        return (
            (integer_int4(nibble_at(pairs, 0), offset) * s).to(tl.bfloat16),
            (integer_int4(nibble_at(pairs, 8), offset) * s).to(tl.bfloat16),
            (integer_int4(nibble_at(pairs, 4), above) * t).to(tl.bfloat16),
            (integer_int4(nibble_at(pairs, 12), above) * t).to(tl.bfloat16),
        )


@triton.jit
def integers_int4(pairs, offset, above, ASM: tl.constexpr):
    """Return pairs of bytes of int4 codes, plus 128 minus an offset, as :func:`numbers_int4` takes it."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, w, v, m; mov.b32 m, 0xBF80BF80; "
            "and.b32 w, $4, 0x0F0F0F0F; shr.u32 v, $4, 4; and.b32 v, v, 0x0F0F0F0F; "
            "prmt.b32 a, w, 0x43434343, 0x4140; prmt.b32 b, w, 0x43434343, 0x4342; "
            "fma.rn.bf16x2 $0, $5, m, a; fma.rn.bf16x2 $1, $6, m, b; "
            "prmt.b32 a, v, 0x43434343, 0x4140; prmt.b32 b, v, 0x43434343, 0x4342; "
            "fma.rn.bf16x2 $2, $7, m, a; fma.rn.bf16x2 $3, $8, m, b; }",
            "=&r,=&r,=&r,=&r,r,r,r,r,r", [pairs, offset, above], dtype=(tl.int32, tl.int32), is_pure=True,
            pack=2,
        )  # fmt: skip
        first, second = halves(low)
        third, fourth = halves(high)
        return first, second, third, fourth
    else:
        return (
            integer_int4(nibble_at(pairs, 0), offset).to(tl.bfloat16),
            integer_int4(nibble_at(pairs, 8), offset).to(tl.bfloat16),
            integer_int4(nibble_at(pairs, 4), above).to(tl.bfloat16),
            integer_int4(nibble_at(pairs, 12), above).to(tl.bfloat16),
        )
