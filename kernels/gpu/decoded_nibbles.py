"""Nibbles as bfloat16 numbers in registers, their scale included.

e2m1 and the scales of MXFP4 and NVFP4 have products that bfloat16 holds exactly. int4 in groups of 128
inputs or more stays an integer: sums over 128 inputs are multiplied by its scale. int4 in smaller groups,
times its bfloat16 scale, is rounded to bfloat16, as by every library that dequantises to it.

A pair of e2m1 codes becomes two numbers by four integer operations: the bits, moved to the places of
bfloat16, are 2^-126 times the value. The scale brings 2^94 of that, the sums of the product 2^32, so that
scales of 2^33 are still numbers. int4 codes become 128 plus the code by one byte permutation, from which 128
plus the zero point is taken off exactly.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.nibbles import group_scale


@triton.jit
def bfloat_scale(words, GROUP: tl.constexpr, SCALE: tl.constexpr, CODE: tl.constexpr):
    """Return the scales of group GROUP of a block as bfloat16; those of e2m1 are times 2^94.

    ``words``, GROUP, SCALE: as in :func:`xpar.kernels.gpu.nibbles.group_scale`.
    """
    if CODE == "int4":
        return group_scale(words, GROUP, SCALE).to(tl.bfloat16)
    elif SCALE == "e8m0":
        bits = (words[GROUP // 4] >> (8 * (GROUP % 4))) & 0xFF
        return (tl.minimum(bits + 94, 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (group_scale(words, GROUP, SCALE) * 1.9807040628566084e28).to(tl.bfloat16)


@triton.jit
def offset_of_zeros(zeros, GROUP: tl.constexpr):
    """Return 128 plus the zero points of group GROUP of a block as bfloat16."""
    return (((zeros >> (8 * GROUP)) & 0xFF) + 128).to(tl.float32).to(tl.bfloat16)


@triton.jit
def numbers_e2m1(packed, scale, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return the low or the high nibbles of bytes as bfloat16 numbers, times ``scale`` and 2^-126."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, s, t, z; mov.b32 z, 0x80008000; "
                "prmt.b32 a, $2, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 6; "
                "lop3.b32 a, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $0, a, $3, z; "
                "prmt.b32 b, $2, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 6; "
                "lop3.b32 b, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $1, b, $4, z; }",
                "=&r,=&r,r,r,r", [packed, scale], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, s, t, w, z; mov.b32 z, 0x80008000; shl.b32 w, $2, 4; "
                "prmt.b32 a, w, 0, 0x1404; and.b32 s, a, 0x80008000; shr.u32 t, a, 6; "
                "lop3.b32 a, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $0, a, $3, z; "
                "prmt.b32 b, w, 0, 0x3424; and.b32 s, b, 0x80008000; shr.u32 t, b, 6; "
                "lop3.b32 b, t, 0x01C001C0, s, 0xEA; fma.rn.bf16x2 $1, b, $4, z; }",
                "=&r,=&r,r,r,r", [packed, scale], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        nibble = (packed >> 4 if HIGH else packed & 15).to(tl.int32)
        size = nibble & 7
        twice = tl.where(size < 4, size, tl.where(size == 7, 12, 2 * size - 4))  # 0 1 2 3 4 6 8 12
        value = tl.where(nibble < 8, twice, -twice).to(tl.float32) * 0.5
        return (value * 1.1754943508222875e-38 * scale.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def integers_int4(packed, offset, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return the low or the high nibbles of bytes, plus 128 minus ``offset``: bfloat16."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, w, m; mov.b32 m, 0xBF80BF80; shr.u32 w, $2, 4; and.b32 w, w, 0x0F0F0F0F; "
                "prmt.b32 a, w, 0x43434343, 0x4140; prmt.b32 b, w, 0x43434343, 0x4342; "
                "fma.rn.bf16x2 $0, $3, m, a; fma.rn.bf16x2 $1, $4, m, b; }",
                "=&r,=&r,r,r,r", [packed, offset], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 a, b, w, m; mov.b32 m, 0xBF80BF80; and.b32 w, $2, 0x0F0F0F0F; "
                "prmt.b32 a, w, 0x43434343, 0x4140; prmt.b32 b, w, 0x43434343, 0x4342; "
                "fma.rn.bf16x2 $0, $3, m, a; fma.rn.bf16x2 $1, $4, m, b; }",
                "=&r,=&r,r,r,r", [packed, offset], dtype=tl.bfloat16, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        nibble = (packed >> 4 if HIGH else packed & 15).to(tl.float32)
        return (nibble + 128.0 - offset.to(tl.float32)).to(tl.bfloat16)
