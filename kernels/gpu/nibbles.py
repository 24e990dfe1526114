"""Nibbles of weights on the device: their layout, and their decoding to e4m3.

Both codes of four bits have e4m3 values that are theirs but for a factor, and few operations reach them for
four codes at a time: the bits of e2m1, moved to the places of e4m3, are 2^-6 times its value; an unsigned
nibble, as an e4m3 pattern, is 2^-9 times itself, because e4m3 has even steps there. So nibbles are multiplied
in the unit for e4m3, by activations of two terms (:mod:`xpar.kernels.gpu.codes`). Decoding to bfloat16 would
take 2.5 operations a weight, decoding to e4m3 takes 0.9 (e2m1) and 0.4 (int4); a multiprocessor of an H200
has 64 a clock and receives 35 weights from memory. int4's offset, or its zero points, are taken off by the
sums of the activations of each group.

A block is 128 inputs. A step is 2 x HALF inputs: byte b of a row's step has input b in its low four bits and
input HALF + b in the high ones. HALF is 32 or 64, and no more than a group of 32 or more, so that a plane of
nibbles has one scale, or two with groups of 16. The bytes of all rows for one step lie together: [E, steps,
rows, HALF]. So do the scales of a block, packed into words: [E, blocks, WORDS, rows] int32, an earlier group
in lower bits; and the zero points, a byte each, one word a block.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.codes import half_from_bits

SCALE_BYTES = {"e8m0": 1, "e4m3": 1, "bf16": 2, "f16": 2, "f32": 4}
"""Bytes of a scale of each type that the kernels read."""


@triton.jit
def plane_e2m1(packed, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return the low or the high nibbles of bytes (uint8), e2m1 codes, as e4m3 bit patterns (uint8)."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 s, m; and.b32 s, $1, 0x80808080; shr.u32 m, $1, 2; "
                "lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }",
                "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 s, m; shl.b32 s, $1, 4; and.b32 s, s, 0x80808080; shl.b32 m, $1, 2; "
                "lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }",
                "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
    else:
        return packed & 0x80 | (packed >> 2) & 0x1C if HIGH else (packed << 4) & 0x80 | (packed << 2) & 0x1C


@triton.jit
def plane_int4(packed, HIGH: tl.constexpr, ASM: tl.constexpr):
    """Return the low or the high nibbles of bytes (uint8) as bytes."""
    if ASM:
        if HIGH:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 m; shr.u32 m, $1, 4; and.b32 $0, m, 0x0F0F0F0F; }",
                "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4
            )
    else:
        return packed >> 4 if HIGH else packed & 15


@triton.jit
def decode_plane(packed, HIGH: tl.constexpr, CODE: tl.constexpr, DOT8: tl.constexpr, ASM: tl.constexpr):
    """Return the low or the high nibbles as codes that ``multiply`` takes: e4m3, or bytes without DOT8."""
    bits = plane_int4(packed, HIGH, ASM) if CODE == "int4" else plane_e2m1(packed, HIGH, ASM)
    return bits.to(tl.float8e4nv, bitcast=True) if DOT8 else bits


@triton.jit
def load_words(words, at, stride, mask, block, WORDS: tl.constexpr):
    """Return the words of a block's scales, four of them; those beyond WORDS repeat the first."""
    at += block * (WORDS * stride)
    first = tl.load(words + at, mask=mask, other=0)
    second = tl.load(words + at + stride, mask=mask, other=0) if WORDS > 1 else first
    third = tl.load(words + at + 2 * stride, mask=mask, other=0) if WORDS > 2 else first
    fourth = tl.load(words + at + 3 * stride, mask=mask, other=0) if WORDS > 2 else first
    return first, second, third, fourth


@triton.jit
def group_scale(words, GROUP: tl.constexpr, SCALE: tl.constexpr):
    """Return the scales of group GROUP of a block as float32.

    ``words``: four of :func:`load_words`. SCALE: the type of the scales, as :data:`SCALE_BYTES` names it.
    """
    if SCALE == "e8m0":
        bits = (words[GROUP // 4] >> (8 * (GROUP % 4))) & 0xFF
        return tl.where(bits == 0, 0x400000, bits << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        bits = (words[GROUP // 4] >> (8 * (GROUP % 4))) & 0xFF
        return half_from_bits(bits.to(tl.uint8)).to(tl.float32) * 256.0
    elif SCALE == "bf16":
        bits = words[GROUP // 2]
        return (bits & -65536 if GROUP % 2 else bits << 16).to(tl.float32, bitcast=True)
    elif SCALE == "f16":
        bits = words[GROUP // 2] >> (16 * (GROUP % 2))
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return words[GROUP].to(tl.float32, bitcast=True)
