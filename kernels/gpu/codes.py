"""Codes of weights and activations on the device: decoding, products of codes, and scales.

Where the matrix unit multiplies e4m3 (DOT8, from compute capability 8.9 on) codes go into it as they are.
Partial sums over 128 inputs are added in float32, because Hopper keeps only 14 bits of a sum of e4m3
products. Elsewhere codes become float16, exactly but for a factor of 2^-8.

A row of activations is one term of codes, if the layer quantises activations, or two. Two terms are the
nearest e4m3 value and that of what is left: eight significant bits, as many as bfloat16 has. So a layer that
does not quantise activations multiplies in the same unit, without decoding its weights.

Scales of activations are [blocks, rows], those of weights [E, blocks of rows, blocks of columns], float32. A
block of columns is 128 inputs, or the whole row where there is one block.
"""

import triton
import triton.language as tl


@triton.jit
def half_from_bits(codes):
    """Return e4m3 bit patterns (uint8) as float16 values, times 2^-8."""
    wide = codes.to(tl.uint16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def decode(codes, DOT8: tl.constexpr):
    """Return e4m3 codes as float32; without DOT8 they come as uint8."""
    if DOT8:
        return codes.to(tl.float32)
    else:
        return half_from_bits(codes).to(tl.float32) * 256.0


@triton.jit
def multiply(a, b, part, DOT8: tl.constexpr):
    """Return ``part`` plus the product of two tiles of codes; without DOT8 the product is times 2^-16."""
    if DOT8:
        return tl.dot(a, b, part)
    else:
        return tl.dot(half_from_bits(a), half_from_bits(b), part)


@triton.jit
def add_scaled(
    total,
    part,
    row_scale,
    weight_scale,
    ROW_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    """Return ``total`` plus ``part`` times its scales, as far as they belong to this block of columns.

    ``total``, ``part``: float32 [rows, weight rows], or transposed if SWAPPED. ``row_scale``: [rows]; it
    counts if there are several ROW_BLOCKS. ``weight_scale``: [1] or [weight rows]; it counts if there are
    several BLOCKS.
    """
    if BLOCKS > 1 and weight_scale.shape[0] == 1 and ROW_BLOCKS > 1:
        row_scale = row_scale * weight_scale  # one product a row, not one a sum
    if ROW_BLOCKS > 1:
        part = part * (row_scale[None, :] if SWAPPED else row_scale[:, None])
    if BLOCKS > 1 and not (weight_scale.shape[0] == 1 and ROW_BLOCKS > 1):
        part = part * (weight_scale[:, None] if SWAPPED else weight_scale[None, :])
    return total + part


@triton.jit
def finish_sum(
    total, row_scale, weight_scale,
    ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, SWAPPED: tl.constexpr, DOT8: tl.constexpr,
):  # fmt: skip
    """Return sums of all blocks times the scales that :func:`add_scaled` has left out."""
    if ROW_BLOCKS == 1:
        total = total * (row_scale[None, :] if SWAPPED else row_scale[:, None])
    if BLOCKS == 1:
        total = total * (weight_scale[:, None] if SWAPPED else weight_scale[None, :])
    return total if DOT8 else total * 65536.0


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr):
    """Return the scale of groups whose largest absolute values are ``amax``; NaN stays."""
    amax = tl.where(amax < 7.888609052210118e-31, 7.888609052210118e-31, amax)  # at least 2^-100
    # `/` may miss the last bit, which moves values from the middle of two codes to the other one.
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(scale < float("inf"), up, scale)  # not NaN
    return scale


@triton.jit
def bits_from_float(x):
    """Return the bit pattern (uint8) of the e4m3 value nearest to ``x``; ties to even, NaN above 464."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 the steps are 2^-9, those of float32 at 2^14: the sum rounds, its last bits are the code.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > 0x43E80000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode(x, DOT8: tl.constexpr):
    """Return the e4m3 codes of values of at most 448; they are uint8 without DOT8."""
    return x.to(tl.float8e4nv) if DOT8 else bits_from_float(x)


@triton.jit
def split(x, DOT8: tl.constexpr):
    """Return the codes as :func:`encode` does, and what they leave.

    Without conversions to e4m3: ptxas joins two of them into one word, and whatever else reads the first one
    then reads a register without a value (CUDA 12.8, 12.9 and 13.4, for compute capabilities 8.9 to 12.0).
    """
    bits = bits_from_float(x)
    return bits.to(tl.float8e4nv, bitcast=True) if DOT8 else bits, x - decode(bits, False)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Return the largest absolute value along an axis; NaN if there is one."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered like the values, NaN above all
    return tl.max(size, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def block_scale(
    scales, at, first, rows, kb,
    BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return the scales of weight rows ``first`` to ``first + BN`` of ``rows`` for block ``kb`` of columns.

    ``at``: place of the matrix's first scale. [1] where all rows have one scale, else [BN].
    """
    if BLOCK_ROWS % BN == 0:
        return tl.load(scales + at + first // BLOCK_ROWS * BLOCKS + kb + tl.arange(0, 1))
    else:
        rn = first + tl.arange(0, BN)
        return tl.load(scales + at + rn // BLOCK_ROWS * BLOCKS + kb, mask=rn < rows, other=0.0)
