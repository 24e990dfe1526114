"""The two products of codes for experts with many rows, from rows of codes in expert order.

As in :mod:`xpar.kernels.gpu.grouped_mm_tiled`, rows are the tall operand, both operands come through tensor
descriptors, and gate and up meet in registers. There are no tall tiles. Every 128 inputs the partial sums are
multiplied by their scales and added in float32. Activated rows become codes here, 128 columns with one scale.

Functions that kernels call have the parameters of the kernels, and these:
``xd``, ``hd``, ``wd`` are descriptors of ``x``, ``hidden`` and ``weight``; first, end, column: a tile's first
sorted row, the row after its expert's last, its first column.
"""

import triton
import triton.language as tl

from xpar.kernels.gpu.activation import activate, activate_without_gate
from xpar.kernels.gpu.codes import (
    add_scaled,
    block_scale,
    encode,
    finish_sum,
    largest,
    multiply,
    scale_of,
    split,
)
from xpar.kernels.gpu.grouped_mm_tiled import locate_tile


@triton.jit
def multiply_terms(xd, w, zero, first, k, num_rows, TERMS: tl.constexpr, DOT8: tl.constexpr):
    """Return the product of a tile of rows, all terms, and a tile of weights ``w`` [128, BN]."""
    part = multiply(xd.load([first, k]), w, zero, DOT8)
    if TERMS == 2:
        part = multiply(xd.load([first + num_rows, k]), w, part, DOT8)
    return part


@triton.jit
def activated_tile(
    xd, wd, x_scales, weight_scales, bias, first, end, expert, column, num_rows,
    I: tl.constexpr, K: tl.constexpr,
    GATED: tl.constexpr, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    TERMS: tl.constexpr, ROW_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    DOT8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return BM rows by BN columns of the activated product."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    rm = first + tl.arange(0, BM)
    live = rm < end
    at = expert * WIDE + column
    gate_at = expert * (WIDE // BLOCK_ROWS * BLOCKS)
    up_at = gate_at + (WIDE - I) // BLOCK_ROWS * BLOCKS
    zero = tl.zeros((BM, BN), tl.float32)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    row_scale = tl.load(x_scales + rm, mask=live, other=0.0)
    gate_scale = block_scale(weight_scales, gate_at, column, I, 0, BLOCKS, BLOCK_ROWS, BN)
    up_scale = block_scale(weight_scales, up_at, column, I, 0, BLOCKS, BLOCK_ROWS, BN)
    for kb in range(K // 128):
        if ROW_BLOCKS > 1:
            row_scale = tl.load(x_scales + kb * num_rows + rm, mask=live, other=0.0)
        if BLOCKS > 1:
            gate_scale = block_scale(weight_scales, gate_at, column, I, kb, BLOCKS, BLOCK_ROWS, BN)
            if GATED:
                up_scale = block_scale(weight_scales, up_at, column, I, kb, BLOCKS, BLOCK_ROWS, BN)
        part = multiply_terms(xd, wd.load([at, kb * 128]).T, zero, first, kb * 128, num_rows, TERMS, DOT8)
        gate = add_scaled(gate, part, row_scale, gate_scale, ROW_BLOCKS, BLOCKS, False)
        if GATED:
            w = wd.load([at + I, kb * 128]).T
            part = multiply_terms(xd, w, zero, first, kb * 128, num_rows, TERMS, DOT8)
            up = add_scaled(up, part, row_scale, up_scale, ROW_BLOCKS, BLOCKS, False)
    gate = finish_sum(gate, row_scale, gate_scale, ROW_BLOCKS, BLOCKS, False, DOT8)
    rn = column + tl.arange(0, BN)
    if bias is not None:
        gate += tl.load(bias + expert * WIDE + rn, mask=rn < I, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = finish_sum(up, row_scale, up_scale, ROW_BLOCKS, BLOCKS, False, DOT8)
        if bias is not None:
            up += tl.load(bias + expert * WIDE + I + rn, mask=rn < I, other=0.0).to(tl.float32)[None, :]
        return activate(gate, up, NAME, LIMIT, ALPHA, BETA)
    else:
        return activate_without_gate(gate, NAME)


@triton.jit
def store_codes_of_rows(
    y, other, codes, scales, first, end, column, num_rows,
    I: tl.constexpr, TERMS: tl.constexpr, POWER_OF_TWO: tl.constexpr, DOT8: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the rows of ``y``, and of ``other`` if it is not None, as codes with one scale a row."""
    rm = first + tl.arange(0, BM)
    amax = largest(y, 1)
    if other is not None:
        more = largest(other, 1)
        amax = tl.where((amax > more) | (amax != amax), amax, more)  # noqa: PLR0124 - NaN stays
    scale = scale_of(amax, POWER_OF_TWO)
    tl.store(scales + column // 128 * num_rows + rm, scale, mask=rm < end)
    store_terms(y, scale, codes, rm, end, column, num_rows, I, TERMS, DOT8, BN)
    if other is not None:
        store_terms(other, scale, codes, rm, end, column + BN, num_rows, I, TERMS, DOT8, BN)


@triton.jit
def store_terms(
    y, scale, codes, rm, end, column, num_rows,
    I: tl.constexpr, TERMS: tl.constexpr, DOT8: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store ``y / scale`` as codes of one term or two, in rows ``rm`` before ``end``."""
    rn = column + tl.arange(0, BN)
    to = codes + rm.to(tl.int64)[:, None] * I + rn[None, :]
    value = y / scale[:, None]
    if TERMS == 2:
        high, rest = split(value, DOT8)
        low, rest = split(rest, DOT8)
        tl.store(to + num_rows.to(tl.int64) * I, low, mask=(rm < end)[:, None])
    else:
        high = encode(value, DOT8)
    tl.store(to, high, mask=(rm < end)[:, None])


@triton.jit
def store_numbers(y, to, first, end, column, I: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Store the rows of ``y`` before ``end`` as numbers."""
    rm = first + tl.arange(0, BM)
    rn = column + tl.arange(0, BN)
    at = to + rm.to(tl.int64)[:, None] * I + rn[None, :]
    tl.store(at, y.to(to.dtype.element_ty), mask=(rm < end)[:, None])


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def gate_up_codes_tiled(
    x,  # [TERMS, M k, K] codes of the hidden states in sorted order
    x_scales,  # [ROW_BLOCKS, M k]
    weight,  # [E, 2I, K] codes, gate rows, then up rows, or [E, I, K] without a gate
    weight_scales,  # [E, 2I / BLOCK_ROWS, BLOCKS], or [E, I / BLOCK_ROWS, BLOCKS]
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # result in sorted order: [TERMS, M k, I] codes, or [M k, I] numbers without TO_CODES
    hidden_scales,  # [I / 128, M k], result with TO_CODES
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    K: tl.constexpr,  # elements of a row of x and weight
    GATED: tl.constexpr,  # True if the weight has gate and up rows
    NAME: tl.constexpr,  # name of the activation
    LIMIT: tl.constexpr,  # its limit, None for no bound
    ALPHA: tl.constexpr,  # its alpha
    BETA: tl.constexpr,  # its beta
    TERMS: tl.constexpr,  # codes of an activation, 1 or 2
    ROW_BLOCKS: tl.constexpr,  # scales of a row of activations: one for 128 inputs, or 1
    BLOCKS: tl.constexpr,  # scales of a row of weight: one for 128 inputs, or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    TO_CODES: tl.constexpr,  # True if hidden becomes codes
    POWER_OF_TWO: tl.constexpr,  # True if the scales of hidden are powers of two
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile or program
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
):
    """Compute ``hidden[r] = act(weight[expert] @ x[r] + bias)`` for sorted rows r, as codes or numbers.

    A tile has 128 columns, those of one scale. With BN = 64 they are computed one half after the other.
    """
    WIDE: tl.constexpr = 2 * I if GATED else I
    xd = tl.make_tensor_descriptor(x, [TERMS * num_rows, K], [K, 1], [BM, 128])
    wd = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, 128])
    num_n = I // 128
    num_m = tl.load(tile_count)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        expert, first, end, pn = locate_tile(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, 0, GROUP
        )
        column = pn * 128
        y = activated_tile(
            xd, wd, x_scales, weight_scales, bias, first, end, expert, column, num_rows,
            I, K, GATED, NAME, LIMIT, ALPHA, BETA, TERMS, ROW_BLOCKS, BLOCKS, BLOCK_ROWS, DOT8, BM, BN,
        )  # fmt: skip
        if BN == 64:
            other = activated_tile(
                xd, wd, x_scales, weight_scales, bias, first, end, expert, column + 64, num_rows,
                I, K, GATED, NAME, LIMIT, ALPHA, BETA, TERMS, ROW_BLOCKS, BLOCKS, BLOCK_ROWS, DOT8, BM, BN,
            )  # fmt: skip
        else:
            other = None
        if TO_CODES:
            store_codes_of_rows(
                y, other, hidden, hidden_scales, first, end, column, num_rows,
                I, TERMS, POWER_OF_TWO, DOT8, BM, BN,
            )  # fmt: skip
        else:
            store_numbers(y, hidden, first, end, column, I, BM, BN)
            if other is not None:
                store_numbers(other, hidden, first, end, column + BN, I, BM, BN)


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def down_codes_tiled(
    hidden,  # [TERMS, M k, I] codes of the activated rows in sorted order
    hidden_scales,  # [ROW_BLOCKS, M k]
    weight,  # [E, H, I] codes
    weight_scales,  # [E, ceil(H / BLOCK_ROWS), BLOCKS]
    bias,  # [E, H], or None
    out,  # [M k, H], result, in slot order
    slots,  # [M k] int32, slot of each sorted row
    offsets,  # [E + 1] int32, first sorted row of each expert, then the number of active slots
    tile_expert,  # [4, capacity] int32, expert of each tile; only the first list is used
    tile_row,  # [4, capacity] int32, first sorted row of each tile
    tile_count,  # [4] int32, tiles in each list
    num_rows,  # M k
    capacity,  # tiles that fit into a list: stride of tile_expert and tile_row
    E: tl.constexpr,  # experts
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of x or out
    TERMS: tl.constexpr,  # codes of an activation, 1 or 2
    ROW_BLOCKS: tl.constexpr,  # scales of a row of activations: one for 128 inputs, or 1
    BLOCKS: tl.constexpr,  # scales of a row of weight: one for 128 inputs, or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile or program
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    hd = tl.make_tensor_descriptor(hidden, [TERMS * num_rows, I], [I, 1], [BM, 128])
    wd = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, 128])
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        expert, first, end, pn = locate_tile(
            tile, num_m, num_n, offsets, tile_expert, tile_row, capacity, 0, GROUP
        )
        column = pn * BN
        rm = first + tl.arange(0, BM)
        live = rm < end
        at = expert * (tl.cdiv(H, BLOCK_ROWS) * BLOCKS)
        zero = tl.zeros((BM, BN), tl.float32)
        acc = tl.zeros((BM, BN), tl.float32)
        row_scale = tl.load(hidden_scales + rm, mask=live, other=0.0)
        weight_scale = block_scale(weight_scales, at, column, H, 0, BLOCKS, BLOCK_ROWS, BN)
        for kb in range(I // 128):
            if ROW_BLOCKS > 1:
                row_scale = tl.load(hidden_scales + kb * num_rows + rm, mask=live, other=0.0)
            if BLOCKS > 1:
                weight_scale = block_scale(weight_scales, at, column, H, kb, BLOCKS, BLOCK_ROWS, BN)
            w = wd.load([expert * H + column, kb * 128]).T
            part = multiply_terms(hd, w, zero, first, kb * 128, num_rows, TERMS, DOT8)
            acc = add_scaled(acc, part, row_scale, weight_scale, ROW_BLOCKS, BLOCKS, False)
        acc = finish_sum(acc, row_scale, weight_scale, ROW_BLOCKS, BLOCKS, False, DOT8)
        rn = column + tl.arange(0, BN)
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=rn < H, other=0.0).to(tl.float32)[None, :]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[:, None] * H + rn[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[:, None] & (rn < H)[None, :])
