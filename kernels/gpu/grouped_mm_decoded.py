"""The two products of nibbles that become bfloat16 in registers, with weights as the tall operand.

Rows stay bfloat16 and are gathered by their index. Weights have their scales when they are multiplied, so
that the matrix unit adds over all inputs without a pause, which products of two terms of codes have in every
group of inputs. Decoding takes more operations (:mod:`xpar.kernels.gpu.decoded_nibbles`), which many rows of
a tile share. Gate and up rows go side by side, so that both use each tile of rows.

Groups of 16 inputs: a plane of a step is two groups, whose scales alternate along it.

Layout of the nibbles: :mod:`xpar.kernels.gpu.nibbles`. Other tensors are contiguous. Letters:
:mod:`xpar.kernels.contracts`; I and K are I and H rounded up to a multiple of 128, with zeros.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.decoded_nibbles import (
    bfloat_scale,
    integers_int4,
    numbers_e2m1,
    numbers_int4,
    offset_of_zeros,
)
from xpar.kernels.gpu.grouped_mm_small import source_rows, swizzle
from xpar.kernels.gpu.nibbles import group_scale, load_words


@triton.jit
def load_step(packed, inside, kb, s, ROWS: tl.constexpr, HALF: tl.constexpr, EVEN: tl.constexpr):
    """Return the bytes of step ``s`` of block ``kb`` of a matrix of ROWS rows, in pairs: [BN, HALF / 2]."""
    at = packed + (kb * (64 // HALF) + s) * (ROWS * HALF // 2)
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[:, None], other=0)


@triton.jit
def plane_scale(
    words, FIRST: tl.constexpr, SCALE: tl.constexpr, CODE: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr
):
    """Return the scales of a plane, whose first group is FIRST: [BN, 1], or [BN, HALF / 2] if G is 16."""
    scale = bfloat_scale(words, FIRST, SCALE, CODE)[:, None]
    if G == 16:
        other = bfloat_scale(words, FIRST + 1, SCALE, CODE)[:, None]
        scale = tl.where((tl.arange(0, HALF // 2) < 8)[None, :], scale, other)
    return scale


@triton.jit
def decode_step(
    pairs, words, zeros, s: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, ZERO: tl.constexpr,
    ASM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return step ``s`` of a block, ``pairs`` of :func:`load_step`, as bfloat16 [BN, 2 HALF].

    ``words``, ``zeros``: those of the block's scales and zero points.
    """
    LOW: tl.constexpr = 2 * s * HALF // G
    HIGH: tl.constexpr = (2 * s + 1) * HALF // G
    if CODE == "e2m1":
        scale = tl.broadcast_to(plane_scale(words, LOW, SCALE, CODE, G, HALF), pairs.shape)
        other = tl.broadcast_to(plane_scale(words, HIGH, SCALE, CODE, G, HALF), pairs.shape)
        a, b, c, d = numbers_e2m1(pairs, scale, other, ASM)
    else:
        offset = offset_of(zeros, pairs, LOW, ZERO)
        above = offset_of(zeros, pairs, HIGH, ZERO)
        if G == 128:
            a, b, c, d = integers_int4(pairs, offset, above, ASM)
        else:
            scale = tl.broadcast_to(plane_scale(words, LOW, SCALE, CODE, G, HALF), pairs.shape)
            other = tl.broadcast_to(plane_scale(words, HIGH, SCALE, CODE, G, HALF), pairs.shape)
            a, b, c, d = numbers_int4(pairs, scale, other, offset, above, ASM)
    low = tl.reshape(tl.join(a, b), (BN, HALF))
    high = tl.reshape(tl.join(c, d), (BN, HALF))
    return join_planes(low, high, BN, HALF)


@triton.jit
def offset_of(zeros, pairs, GROUP: tl.constexpr, ZERO: tl.constexpr):
    """Return 128 plus the zero points of group GROUP, as :func:`decode_step` needs them."""
    if zeros is None:
        return tl.full(pairs.shape, 0x43004300 + ZERO * 65537, tl.int32)
    else:
        return tl.broadcast_to(offset_of_zeros(zeros, GROUP)[:, None], pairs.shape)


@triton.jit
def decode_block(
    packed, words, zeros, inside, kb,
    ROWS: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr,
    HALF: tl.constexpr, ZERO: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return block ``kb`` of BN rows of a matrix of ROWS rows as bfloat16 [BN, 128].

    int4 in groups of 128 comes without its scale, see :func:`add_block`.
    """
    own_words = load_words(words, 0, ROWS, inside, kb, WORDS) if G < 128 or CODE == "e2m1" else None
    own_zeros = tl.load(zeros + kb * ROWS, mask=inside, other=0) if zeros is not None else None
    pairs = load_step(packed, inside, kb, 0, ROWS, HALF, EVEN)
    block = decode_step(pairs, own_words, own_zeros, 0, CODE, SCALE, G, HALF, ZERO, ASM, BN)
    if HALF == 32:
        pairs = load_step(packed, inside, kb, 1, ROWS, HALF, EVEN)
        second = decode_step(pairs, own_words, own_zeros, 1, CODE, SCALE, G, HALF, ZERO, ASM, BN)
        block = join_planes(block, second, BN, 64)
    return block


@triton.jit
def add_block(
    total, w, a, words, inside, kb,
    ROWS: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Return ``total`` [BN, BM] plus ``w`` [BN, 128], of :func:`decode_block`, times ``a`` [128, BM]."""
    if G == 128 and CODE == "int4":
        scale = group_scale(load_words(words, 0, ROWS, inside, kb, WORDS), 0, SCALE)
        return total + tl.dot(w, a, tl.zeros(total.shape, tl.float32)) * scale[:, None]
    else:
        return tl.dot(w, a, total)


@triton.jit
def join_planes(first, second, BN: tl.constexpr, WIDTH: tl.constexpr):
    """Return two tiles [BN, WIDTH] side by side."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (BN, 2 * WIDTH))


@triton.jit(do_not_specialize=["capacity"])
def gate_up_decoded(
    x,  # [N, H], hidden states, bfloat16
    weight,  # as in gate_up_nibbles, as int16
    weight_scales,  # as in gate_up_nibbles
    zeros,  # zero points, [E, blocks, rows] int32, or None
    factors,  # [E, 2] float32, factors of gate and up rows, as gate_up_nibbles takes them
    bias,  # [E, rows of the weight], or None
    hidden,  # [M k, I], result, in sorted order
    rows,  # [M] int64, row of x that each entry reads; None if entry m reads row m
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x
    K: tl.constexpr,  # inputs of a row of weight
    TOP_K: tl.constexpr,  # slots of an entry
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    CODE: tl.constexpr,  # "int4" or "e2m1"
    SCALE: tl.constexpr,  # type of the scales, as in group_scale
    WORDS: tl.constexpr,  # words of a block's scales
    G: tl.constexpr,  # inputs of a group
    HALF: tl.constexpr,  # inputs of a plane
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile, of gate and of up rows each
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for sorted rows r."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    num_n = I // BN
    num_m = tl.load(tile_count)
    rh, rk = tl.arange(0, HALF // 2), tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        row = source_rows(tl.load(slots + rm, mask=live, other=0), rows, TOP_K, live)
        rn = pn * BN + tl.arange(0, BN)
        every = rn >= 0
        source = x + row[None, :] * H + rk[:, None]
        packed = weight + expert.to(tl.int64) * (K // 4 * WIDE) + rn[:, None] * (HALF // 2) + rh[None, :]
        words = weight_scales + expert * (K // 128 * WORDS * WIDE) + rn
        points = zeros + expert * (K // 128 * WIDE) + rn if zeros is not None else None
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(K // 128, num_stages=STAGES):
            k = kb * 128
            if H % 128 == 0:
                a = tl.load(source + k, mask=live[None, :], other=0.0)
            else:
                a = tl.load(source + k, mask=live[None, :] & (k + rk < H)[:, None], other=0.0)
            w = decode_block(
                packed, words, points, every, kb, WIDE, CODE, SCALE, WORDS, G, HALF, ZERO, ASM, BN, True
            )
            gate = add_block(gate, w, a, words, every, kb, WIDE, CODE, SCALE, WORDS, G)
            if GATED:
                v = decode_block(
                    packed + I * HALF // 2, words + I, points + I if zeros is not None else None, every, kb,
                    WIDE, CODE, SCALE, WORDS, G, HALF, ZERO, ASM, BN, True,
                )  # fmt: skip
                up = add_block(up, v, a, words + I, every, kb, WIDE, CODE, SCALE, WORDS, G)
        # Factors are those of e4m3 patterns: 2^6 times the value for e2m1, 2^9 for int4.
        UNIT: tl.constexpr = 67108864.0 if CODE == "e2m1" else 0.001953125
        gate *= tl.load(factors + 2 * expert) * UNIT
        if bias is not None:
            gate += tl.load(bias + expert * WIDE + rn).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(factors + 2 * expert + 1) * UNIT
            if bias is not None:
                up += tl.load(bias + expert * WIDE + I + rn).to(tl.float32)[:, None]
            y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
        else:
            y = activate_without_gate(gate, NAME)
        to = hidden + rm.to(tl.int64)[None, :] * I + rn[:, None]
        tl.store(to, y.to(hidden.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["capacity"])
def down_decoded(
    hidden,  # [M k, I], activated rows in sorted order, bfloat16
    weight,  # as in down_nibbles, as int16
    weight_scales,  # as in down_nibbles
    zeros,  # zero points, [E, blocks, rows] int32, or None
    factors,  # [E] float32, as down_nibbles takes them
    bias,  # [E, H], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    CODE: tl.constexpr,  # "int4" or "e2m1"
    SCALE: tl.constexpr,  # type of the scales, as in group_scale
    WORDS: tl.constexpr,  # words of a block's scales
    G: tl.constexpr,  # inputs of a group
    HALF: tl.constexpr,  # inputs of a plane
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count)
    rh, rk = tl.arange(0, HALF // 2), tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        rn = pn * BN + tl.arange(0, BN)
        inside = rn < H
        source = hidden + rm.to(tl.int64)[None, :] * I + rk[:, None]
        packed = weight + expert.to(tl.int64) * (I // 4 * H) + rn[:, None] * (HALF // 2) + rh[None, :]
        words = weight_scales + expert * (I // 128 * WORDS * H) + rn
        points = zeros + expert * (I // 128 * H) + rn if zeros is not None else None
        acc = tl.zeros((BN, BM), tl.float32)
        for kb in tl.range(I // 128, num_stages=STAGES):
            a = tl.load(source + kb * 128, mask=live[None, :], other=0.0)
            w = decode_block(
                packed, words, points, inside, kb,
                H, CODE, SCALE, WORDS, G, HALF, ZERO, ASM, BN, H % BN == 0,
            )  # fmt: skip
            acc = add_block(acc, w, a, words, inside, kb, H, CODE, SCALE, WORDS, G)
        UNIT: tl.constexpr = 67108864.0 if CODE == "e2m1" else 0.001953125  # as in gate_up_decoded
        acc *= tl.load(factors + expert) * UNIT
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[None, :] * H + rn[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[None, :] & inside[:, None])
