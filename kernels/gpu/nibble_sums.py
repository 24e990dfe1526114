"""Sums of products of nibbles and activations on scalar units, by integers: exact, and few operations.

A thread has a word of eight nibbles, four inputs of the low plane and four of the high one, and the eight
activations as integers of 16 bits. Two instructions (``dp2a``) multiply and add four of them. int4 nibbles
are integers as they are. e2m1 becomes 12 plus twice its value, through two tables of eight bytes, one for
each sign: ``prmt`` looks up four nibbles at once, and gives zero where the nibble has the other sign. What
both codes are too large is taken off by the sum of the activations. So a weight costs 0.9 (int4) or 1.9
operations (e2m1); by way of float32 it costs five.

Sixteen activations of each plane have one power of two as their scale. They keep what is above 2^-15 of the
largest of them, so that bfloat16 loses nothing down to 2^-7 of it.

Layout of the nibbles: :mod:`xpar.kernels.gpu.nibbles`.
"""

import triton
import triton.language as tl


@triton.jit
def float_of_half(pair, HIGH: tl.constexpr, BF16: tl.constexpr):
    """Return the low or the high one of two numbers of 16 bits (int32) as float32."""
    if BF16:
        return (pair & -65536 if HIGH else pair << 16).to(tl.float32, bitcast=True)
    else:
        return ((pair >> 16) if HIGH else pair).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def magnitude_bits(pair, BF16: tl.constexpr):
    """Return the larger absolute value of two numbers, as the bits of float32; NaN is above all."""
    first = float_of_half(pair, False, BF16).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.maximum(first, float_of_half(pair, True, BF16).to(tl.int32, bitcast=True) & 0x7FFFFFFF)


@triton.jit
def integers_of_pair(pair, scale, BF16: tl.constexpr):
    """Return two numbers times ``scale`` as two integers of 16 bits."""
    # The sum with 1.5 * 2^23 rounds, and its last bits are the integer.
    low = (float_of_half(pair, False, BF16) * scale + 12582912.0).to(tl.int32, bitcast=True)
    high = (float_of_half(pair, True, BF16) * scale + 12582912.0).to(tl.int32, bitcast=True)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def integers_of_words(low, high, BF16: tl.constexpr):
    """Return activations of both planes as pairs of integers.

    Args:
        low: [1, BG, RUNS, 4] int64, each four numbers of 16 bits.
        high: the same of the other plane.
        BF16: True if the numbers are bfloat16, False if float16.

    Returns:
        Four [1, BG, RUNS, 4] int32, two for each plane, and the value of a unit, [1, BG, RUNS] float32.
    """
    a, b = low.to(tl.int32), (low >> 32).to(tl.int32)
    c, d = high.to(tl.int32), (high >> 32).to(tl.int32)
    size = tl.maximum(
        tl.maximum(magnitude_bits(a, BF16), magnitude_bits(b, BF16)),
        tl.maximum(magnitude_bits(c, BF16), magnitude_bits(d, BF16)),
    )
    exponent = tl.maximum(tl.max(size, 3) >> 23, 16)
    scale = ((268 - exponent) << 23).to(tl.float32, bitcast=True)[:, :, :, None]
    # An infinite exponent stands for NaN, which the result must show.
    unit = tl.where(exponent > 254, 0x7FC00000, (exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (
        integers_of_pair(a, scale, BF16), integers_of_pair(b, scale, BF16),
        integers_of_pair(c, scale, BF16), integers_of_pair(d, scale, BF16), unit,
    )  # fmt: skip


@triton.jit
def sum_of_pairs(first, second):
    """Return the sums of four integers of 16 bits, and of the words along the last axis."""
    total = (
        first.to(tl.int16).to(tl.int32) + (first >> 16) + second.to(tl.int16).to(tl.int32) + (second >> 16)
    )
    return tl.sum(total, 3)


@triton.jit
def value_of_nibble(word, PLACE: tl.constexpr, CODE: tl.constexpr):
    """Return the nibble at bit PLACE as the integer that :func:`dot_words` multiplies."""
    nibble = (word >> PLACE) & 15
    if CODE == "int4":
        return nibble
    else:
        size = nibble & 7
        twice = tl.where(size < 4, size, tl.where(size == 7, 12, 2 * size - 4))  # 0 1 2 3 4 6 8 12
        return tl.where(nibble < 8, 12 + twice, 12 - twice)


@triton.jit
def dot_words(words, a, b, c, d, CODE: tl.constexpr, ASM: tl.constexpr):
    """Return the sums of the products of a word's low nibbles with a, b, and of its high ones with c, d.

    ``words``, ``a`` to ``d``: int32. CODE: "int4" or "e2m1". ASM: True for inline PTX.
    """
    if ASM and CODE == "int4":
        return tl.inline_asm_elementwise(
            "{ .reg .b32 l, h; and.b32 l, $2, 0x0F0F0F0F; shr.u32 h, $2, 4; and.b32 h, h, 0x0F0F0F0F; "
            "dp2a.lo.s32.u32 $0, $3, l, 0; dp2a.hi.s32.u32 $0, $4, l, $0; "
            "dp2a.lo.s32.u32 $1, $5, h, 0; dp2a.hi.s32.u32 $1, $6, h, $1; }",
            "=&r,=&r,r,r,r,r,r", [words, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 n, o, p, q, l, h; xor.b32 n, $2, 0x88888888; "
            "prmt.b32 p, 0x0F0E0D0C, 0x18141210, $2; prmt.b32 q, 0x090A0B0C, 0x00040608, n; or.b32 p, p, q; "
            "shr.u32 o, $2, 16; shr.u32 n, n, 16; "
            "prmt.b32 o, 0x0F0E0D0C, 0x18141210, o; prmt.b32 q, 0x090A0B0C, 0x00040608, n; or.b32 q, o, q; "
            "prmt.b32 l, p, q, 0x6420; prmt.b32 h, p, q, 0x7531; "
            "dp2a.lo.s32.u32 $0, $3, l, 0; dp2a.hi.s32.u32 $0, $4, l, $0; "
            "dp2a.lo.s32.u32 $1, $5, h, 0; dp2a.hi.s32.u32 $1, $6, h, $1; }",
            "=&r,=&r,r,r,r,r,r", [words, a, b, c, d], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = value_of_nibble(words, 0, CODE) * a.to(tl.int16).to(tl.int32)
        low += value_of_nibble(words, 8, CODE) * (a >> 16)
        low += value_of_nibble(words, 16, CODE) * b.to(tl.int16).to(tl.int32)
        low += value_of_nibble(words, 24, CODE) * (b >> 16)
        high = value_of_nibble(words, 4, CODE) * c.to(tl.int16).to(tl.int32)
        high += value_of_nibble(words, 12, CODE) * (c >> 16)
        high += value_of_nibble(words, 20, CODE) * d.to(tl.int16).to(tl.int32)
        high += value_of_nibble(words, 28, CODE) * (d >> 16)
        return low, high
