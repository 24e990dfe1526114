"""The two products of nibbles, with weights as the tall operand, decoded in registers.

As :mod:`xpar.kernels.gpu.grouped_mm_codes_small`, but weights are read as packed bytes, in tiles that are
contiguous in memory, and both planes of a tile go into the matrix unit from registers. A block is 128 inputs:
its groups' sums are multiplied by the weights' scales, then together by the activations' scale. Gate and up
rows follow each other: side by side their sums would take twice the registers, and rows are read from cache.

Activations have two terms. With PARTS = 2 there are two pairs of them, of which each has zeros in every other
run of 16 inputs: so the sums of groups of 16 are separate although the unit adds 32 products at least.

Layout and decoding: :mod:`xpar.kernels.gpu.nibbles`.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import largest, multiply, scale_of, split
from xpar.kernels.gpu.grouped_mm_small import swizzle
from xpar.kernels.gpu.nibbles import decode_plane, group_scale, load_words


@triton.jit
def places_of_terms(HALF: tl.constexpr, term):
    """Return the places of HALF inputs of a row's first term, then of its second one, ``term`` further."""
    place = tl.arange(0, 2 * HALF)
    return place % HALF + place // HALF * term


@triton.jit
def load_pairs(source, live, term, PARTS: tl.constexpr):
    """Return the terms of a tile of rows, one pair of them or two; one pair comes twice."""
    a = tl.load(source, mask=live[None, :], other=0.0)
    return a, tl.load(source + 2 * term, mask=live[None, :], other=0.0) if PARTS == 2 else a


@triton.jit
def twice(w):
    """Return a tile [BN, HALF] of weights beside itself, for both terms of the rows in one product."""
    BN: tl.constexpr = w.shape[0]
    WIDTH: tl.constexpr = 2 * w.shape[1]
    return tl.reshape(tl.permute(tl.join(w, w), (0, 2, 1)), (BN, WIDTH))


@triton.jit
def add_plane(
    total, w, a, c, sums, words, zeros,
    FIRST: tl.constexpr, PARTS: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, DOT8: tl.constexpr,
):  # fmt: skip
    """Return ``total`` [BN, BM] plus the products of a plane of weights, times its groups' scales.

    ``total``: float32 sums. ``w``: [BN, 2 HALF] codes, of :func:`twice`. ``a``, ``c``: [2 HALF, BM], the
    rows' terms. ``sums``: [BM], those of the terms; they count with ZERO. ``words``, ``zeros``: those of the
    block's scales and zero points. FIRST: the plane's first group in the block.
    """
    zero = tl.zeros(total.shape, tl.float32)
    part = multiply(w, a, zero, DOT8)
    if ZERO is not None:
        unit: tl.constexpr = 0.001953125 if DOT8 else 0.001953125 / 65536.0  # 2^-9 as in the products
        if zeros is None:
            part -= (sums * (ZERO * unit))[None, :]
        else:
            z = ((zeros >> (8 * FIRST)) & 0xFF).to(tl.float32) * unit
            part -= z[:, None] * sums[None, :]
    total += part * group_scale(words, FIRST, SCALE)[:, None]
    if PARTS == 2:
        part = multiply(w, c, zero, DOT8)
        total += part * group_scale(words, FIRST + 1, SCALE)[:, None]
    return total


@triton.jit
def sum_blocks(
    source, row, live, num_rows, term, row_scales, row_sums, packed, words, zeros, inside,
    ROWS: tl.constexpr, K: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, WORDS: tl.constexpr,
    G: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, ZERO: tl.constexpr, DOT8: tl.constexpr,
    ASM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the products [BN, BM] of BN rows of a matrix of nibbles and BM rows of codes, over all inputs.

    ``source``: [2 HALF, BM] pointers to the rows' first codes of two terms; the next pair is 2 ``term``
    further. ``row``, ``live``: [BM], places of the rows' scales and sums among ``num_rows``, and which rows
    exist. ``packed`` [BN, HALF], ``words`` [BN], ``zeros`` [BN] or None: pointers to the first step and block
    of the matrix's rows, of which it has ROWS. ``inside``: those of the BN rows that exist, all if EVEN.
    """
    PER_BLOCK: tl.constexpr = 64 // HALF  # steps of a block
    acc = tl.zeros((BN, BM), tl.float32)
    # Scales travel as codes do, to shared memory: from there each thread reads those of its sums.
    for kb in tl.range(K // 128, num_stages=STAGES):
        own_words = load_words(words, 0, ROWS, inside, kb, WORDS)
        row_scale = tl.load(row_scales + kb * num_rows + row, mask=live, other=0.0)
        own_zeros = tl.load(zeros + kb * ROWS, mask=inside, other=0) if zeros is not None else None
        block = tl.zeros((BN, BM), tl.float32)
        for s in tl.static_range(PER_BLOCK):
            step = kb * PER_BLOCK + s
            if EVEN:
                bytes = tl.load(packed + step * (ROWS * HALF))
            else:
                bytes = tl.load(packed + step * (ROWS * HALF), mask=inside[:, None], other=0)
            for h in tl.static_range(2):
                half = 2 * step + h
                a, c = load_pairs(source + half * HALF, live, term, PARTS)
                if ZERO is not None:
                    sums = tl.load(row_sums + half * num_rows + row, mask=live, other=0.0)
                else:
                    sums = row_scale
                w = twice(decode_plane(bytes, h == 1, CODE, DOT8, ASM))
                block = add_plane(
                    block, w, a, c, sums, own_words, own_zeros,
                    (2 * s + h) * HALF // G, PARTS, SCALE, ZERO, DOT8,
                )  # fmt: skip
        acc += block * row_scale[None, :]
    return acc if DOT8 else acc * 65536.0


@triton.jit
def store_terms_of_columns(
    y, codes, scales, sums, rm, live, column, num_rows,
    I: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, ZERO: tl.constexpr, DOT8: tl.constexpr,
):  # fmt: skip
    """Store the columns of ``y`` [128, BM] as the terms of rows ``rm``, with their scales and sums."""
    n = tl.arange(0, 128)
    scale = scale_of(largest(y, 0), True)
    tl.store(scales + column // 128 * num_rows + rm, scale, mask=live)
    to = codes + rm.to(tl.int64)[None, :] * I + (column + n)[:, None]
    term = num_rows.to(tl.int64) * I
    value = y / scale[None, :]
    for p in tl.static_range(PARTS):
        kept = value if PARTS == 1 else tl.where(((n // 16) % 2 == p)[:, None], value, 0.0)
        high, rest = split(kept, DOT8)
        low, left = split(rest, DOT8)
        tl.store(to + 2 * p * term, high, mask=live[None, :])
        tl.store(to + (2 * p + 1) * term, low, mask=live[None, :])
        if ZERO is not None:
            kept_sums = tl.sum(tl.reshape(kept - left, (128 // HALF, HALF, y.shape[1])), 1)
            half = column // HALF + tl.arange(0, 128 // HALF)
            tl.store(sums + half[:, None] * num_rows + rm[None, :], kept_sums, mask=live[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "capacity"])
def gate_up_nibbles(
    x,  # [2 PARTS, M, K] codes of the entries' hidden states
    x_scales,  # [K / 128, M]
    x_sums,  # [K / HALF, M], sums of the codes; read with ZERO
    weight,  # [E, K / (2 HALF), WIDE, HALF] uint8; WIDE is 2I, gate rows, then up rows, or I without a gate
    weight_scales,  # [E, K / 128, WORDS, WIDE] int32
    zeros,  # [E, K / 128, WIDE] int32, or None
    factors,  # [E, 2] float32: on the gate and the up rows
    bias,  # [E, rows of the weight], or None
    hidden,  # [2 PARTS, M k, I] codes, result, in sorted order
    hidden_scales,  # [I / 128, M k], result
    hidden_sums,  # [I / HALF, M k], result with ZERO
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_tokens,  # M
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    K: tl.constexpr,  # elements of a row of x and weight
    E: tl.constexpr,  # experts
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
    PARTS: tl.constexpr,  # 2 for groups of 16, else 1
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile or program
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for sorted rows r, as codes."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    STEPS: tl.constexpr = K // (2 * HALF)
    num_n = I // BN
    num_m = tl.load(tile_count)
    rh = tl.arange(0, HALF)
    every = tl.full((BN,), True, tl.int1)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        row = tl.load(slots + rm, mask=live, other=0) // TOP_K
        column = pn * BN
        rn = column + tl.arange(0, BN)
        term = num_tokens.to(tl.int64) * K
        source = x + row.to(tl.int64)[None, :] * K + places_of_terms(HALF, term)[:, None]
        packed = weight + expert.to(tl.int64) * (STEPS * WIDE * HALF) + rn[:, None] * HALF + rh[None, :]
        words = weight_scales + expert * (K // 128 * WORDS * WIDE) + rn
        points = zeros + expert * (K // 128 * WIDE) + rn if zeros is not None else None
        gate = sum_blocks(
            source, row, live, num_tokens, term, x_scales, x_sums, packed, words, points, every,
            WIDE, K, CODE, SCALE, WORDS, G, HALF, PARTS, ZERO, DOT8, ASM, BM, BN, True, STAGES,
        ) * tl.load(factors + 2 * expert)  # fmt: skip
        if bias is not None:
            gate += tl.load(bias + expert * WIDE + rn).to(tl.float32)[:, None]
        if GATED:
            points = points + I if zeros is not None else None
            up = sum_blocks(
                source, row, live, num_tokens, term, x_scales, x_sums, packed + I * HALF, words + I, points,
                every, WIDE, K, CODE, SCALE, WORDS, G, HALF, PARTS, ZERO, DOT8, ASM, BM, BN, True, STAGES,
            ) * tl.load(factors + 2 * expert + 1)  # fmt: skip
            if bias is not None:
                up += tl.load(bias + expert * WIDE + I + rn).to(tl.float32)[:, None]
            y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
        else:
            y = activate_without_gate(gate, NAME)
        store_terms_of_columns(
            y, hidden, hidden_scales, hidden_sums, rm, live, column, num_rows, I, HALF, PARTS, ZERO, DOT8
        )


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def down_nibbles(
    hidden,  # [2 PARTS, M k, I] codes of the activated rows in sorted order
    hidden_scales,  # [I / 128, M k]
    hidden_sums,  # [I / HALF, M k]; read with ZERO
    weight,  # [E, I / (2 HALF), H, HALF] uint8
    weight_scales,  # [E, I / 128, WORDS, H] int32
    zeros,  # [E, I / 128, H] int32, or None
    factors,  # [E] float32
    bias,  # [E, rows of the weight], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x or out
    E: tl.constexpr,  # experts
    CODE: tl.constexpr,  # "int4" or "e2m1"
    SCALE: tl.constexpr,  # type of the scales, as in group_scale
    WORDS: tl.constexpr,  # words of a block's scales
    G: tl.constexpr,  # inputs of a group
    HALF: tl.constexpr,  # inputs of a plane
    PARTS: tl.constexpr,  # 2 for groups of 16, else 1
    ZERO: tl.constexpr,  # the zero point of all int4 nibbles if there is no tensor of them; None for e2m1
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    ASM: tl.constexpr,  # True for inline PTX
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile or program
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
    STAGES: tl.constexpr,  # copies in flight
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    STEPS: tl.constexpr = I // (2 * HALF)
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count)
    rh = tl.arange(0, HALF)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        rn = pn * BN + tl.arange(0, BN)
        inside = rn < H
        term = num_rows.to(tl.int64) * I
        source = hidden + rm.to(tl.int64)[None, :] * I + places_of_terms(HALF, term)[:, None]
        packed = weight + expert.to(tl.int64) * (STEPS * H * HALF) + rn[:, None] * HALF + rh[None, :]
        words = weight_scales + expert * (I // 128 * WORDS * H) + rn
        points = zeros + expert * (I // 128 * H) + rn if zeros is not None else None
        acc = sum_blocks(
            source, rm, live, num_rows, term, hidden_scales, hidden_sums, packed, words, points, inside,
            H, I, CODE, SCALE, WORDS, G, HALF, PARTS, ZERO, DOT8, ASM, BM, BN, H % BN == 0, STAGES,
        ) * tl.load(factors + expert)  # fmt: skip
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=inside, other=0.0).to(tl.float32)[:, None]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[None, :] * H + rn[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[None, :] & inside[:, None])
