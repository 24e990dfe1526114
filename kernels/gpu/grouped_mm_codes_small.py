"""The two products of codes for experts with few rows, with weights as the tall operand.

As in :mod:`xpar.kernels.gpu.grouped_mm_small`, weights come through tensor descriptors and rows of codes are
gathered by their index. Every 128 inputs the partial sums are multiplied by their scales and added in
float32. Activated rows become codes here: a tile has 128 columns, those of one scale.

Tensors are contiguous: the stride of a row is its length. Sorted rows are the active slots in expert order.
Codes and their scales: :mod:`xpar.kernels.gpu.codes`. Letters: :mod:`xpar.kernels.contracts`; I and K are I
and H rounded up to a multiple of 128, with zeros.
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
from xpar.kernels.gpu.grouped_mm_small import swizzle


@triton.jit
def load_terms(source, live, term, TERMS: tl.constexpr):
    """Return a tile of rows' first term, and that of the second one or the first again."""
    first = tl.load(source, mask=live[None, :], other=0.0)
    if TERMS == 2:
        return first, tl.load(source + term, mask=live[None, :], other=0.0)
    else:
        return first, first


@triton.jit
def multiply_rows(w, high, low, zero, TERMS: tl.constexpr, DOT8: tl.constexpr):
    """Return the product of a tile of weights [BN, 128] and a tile of rows [128, BM], all terms."""
    part = multiply(w, high, zero, DOT8)
    if TERMS == 2:
        part = multiply(w, low, part, DOT8)
    return part


@triton.jit
def store_codes_of_columns(
    y, codes, scales, rm, live, column, num_rows,
    I: tl.constexpr, TERMS: tl.constexpr, POWER_OF_TWO: tl.constexpr, DOT8: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the columns of ``y`` [BN, BM] as rows ``rm`` of codes with one scale each."""
    scale = scale_of(largest(y, 0), POWER_OF_TWO)
    tl.store(scales + column // 128 * num_rows + rm, scale, mask=live)
    to = codes + rm.to(tl.int64)[None, :] * I + (column + tl.arange(0, BN))[:, None]
    value = y / scale[None, :]
    if TERMS == 2:
        high, rest = split(value, DOT8)
        low, rest = split(rest, DOT8)
        tl.store(to + num_rows.to(tl.int64) * I, low, mask=live[None, :])
    else:
        high = encode(value, DOT8)
    tl.store(to, high, mask=live[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "capacity"])
def gate_up_codes_small(
    x,  # [TERMS, M, K] codes of the entries' hidden states
    x_scales,  # [ROW_BLOCKS, M]
    weight,  # [E, 2I, K] codes, gate rows, then up rows, or [E, I, K] without a gate
    weight_scales,  # [E, 2I / BLOCK_ROWS, BLOCKS], or [E, I / BLOCK_ROWS, BLOCKS]
    bias,  # [E, 2I] or [E, I], or None
    hidden,  # result in sorted order: [TERMS, M k, I] codes, or [M k, I] numbers without TO_CODES
    hidden_scales,  # [I / 128, M k], result with TO_CODES
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
    TERMS: tl.constexpr,  # codes of an activation, 1 or 2
    ROW_BLOCKS: tl.constexpr,  # scales of a row of x: K / 128 or 1
    BLOCKS: tl.constexpr,  # scales of a row of weight: K / 128 or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    TO_CODES: tl.constexpr,  # True if hidden becomes codes
    POWER_OF_TWO: tl.constexpr,  # True if the scales of hidden are powers of two
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile, 128
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
):
    """Compute ``hidden[r] = act(weight[expert] @ x[row of r] + bias)`` for sorted rows r."""
    WIDE: tl.constexpr = 2 * I if GATED else I
    w = tl.make_tensor_descriptor(weight, [E * WIDE, K], [K, 1], [BN, 128])
    num_n = I // BN
    num_m = tl.load(tile_count)
    rk = tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        row = tl.load(slots + rm, mask=live, other=0) // TOP_K
        column = pn * BN
        source = x + row.to(tl.int64)[None, :] * K + rk[:, None]
        at = expert * WIDE + column
        gate_at = expert * (WIDE // BLOCK_ROWS * BLOCKS)
        up_at = gate_at + (WIDE - I) // BLOCK_ROWS * BLOCKS
        zero = tl.zeros((BN, BM), tl.float32)
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        row_scale = tl.load(x_scales + row, mask=live, other=0.0)
        gate_scale = block_scale(weight_scales, gate_at, column, I, 0, BLOCKS, BLOCK_ROWS, BN)
        up_scale = block_scale(weight_scales, up_at, column, I, 0, BLOCKS, BLOCK_ROWS, BN)
        for kb in range(K // 128):
            high, low = load_terms(source, live, num_tokens.to(tl.int64) * K, TERMS)
            if ROW_BLOCKS > 1:
                row_scale = tl.load(x_scales + kb * num_tokens + row, mask=live, other=0.0)
            if BLOCKS > 1:
                gate_scale = block_scale(weight_scales, gate_at, column, I, kb, BLOCKS, BLOCK_ROWS, BN)
                if GATED:
                    up_scale = block_scale(weight_scales, up_at, column, I, kb, BLOCKS, BLOCK_ROWS, BN)
            part = multiply_rows(w.load([at, kb * 128]), high, low, zero, TERMS, DOT8)
            gate = add_scaled(gate, part, row_scale, gate_scale, ROW_BLOCKS, BLOCKS, True)
            if GATED:
                part = multiply_rows(w.load([at + I, kb * 128]), high, low, zero, TERMS, DOT8)
                up = add_scaled(up, part, row_scale, up_scale, ROW_BLOCKS, BLOCKS, True)
            source += 128
        gate = finish_sum(gate, row_scale, gate_scale, ROW_BLOCKS, BLOCKS, True, DOT8)
        rn = column + tl.arange(0, BN)
        if bias is not None:
            gate += tl.load(bias + expert * WIDE + rn).to(tl.float32)[:, None]
        if GATED:
            up = finish_sum(up, row_scale, up_scale, ROW_BLOCKS, BLOCKS, True, DOT8)
            if bias is not None:
                up += tl.load(bias + expert * WIDE + I + rn).to(tl.float32)[:, None]
            y = activate(gate, up, NAME, LIMIT, ALPHA, BETA)
        else:
            y = activate_without_gate(gate, NAME)
        if TO_CODES:
            store_codes_of_columns(
                y, hidden, hidden_scales, rm, live, column, num_rows, I, TERMS, POWER_OF_TWO, DOT8, BN
            )
        else:
            to = hidden + rm.to(tl.int64)[None, :] * I + rn[:, None]
            tl.store(to, y.to(hidden.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def down_codes_small(
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
    I: tl.constexpr,  # width of an expert
    H: tl.constexpr,  # elements of a row of out
    E: tl.constexpr,  # experts
    TERMS: tl.constexpr,  # codes of an activation, 1 or 2
    ROW_BLOCKS: tl.constexpr,  # scales of a row of hidden: I / 128 or 1
    BLOCKS: tl.constexpr,  # scales of a row of weight: I / 128 or 1
    BLOCK_ROWS: tl.constexpr,  # weight rows that share their scales
    DOT8: tl.constexpr,  # True if the matrix unit multiplies e4m3
    BM: tl.constexpr,  # token rows of a tile
    BN: tl.constexpr,  # weight rows of a tile
    GROUP: tl.constexpr,  # tiles of token rows that go together through the blocks of columns
    PROGRAMS: tl.constexpr,  # programs of the launch, which share the tiles
):
    """Compute ``out[slot of r] = weight[expert] @ hidden[r] + bias``; each slot is written once."""
    w = tl.make_tensor_descriptor(weight, [E * H, I], [I, 1], [BN, 128])
    num_n = tl.cdiv(H, BN)
    num_m = tl.load(tile_count)
    rk = tl.arange(0, 128)
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS):
        pm, pn = swizzle(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_expert + pm)
        rm = tl.load(tile_row + pm) + tl.arange(0, BM)
        live = rm < tl.load(offsets + expert + 1)
        column = pn * BN
        source = hidden + rm.to(tl.int64)[None, :] * I + rk[:, None]
        at = expert * (tl.cdiv(H, BLOCK_ROWS) * BLOCKS)
        zero = tl.zeros((BN, BM), tl.float32)
        acc = tl.zeros((BN, BM), tl.float32)
        row_scale = tl.load(hidden_scales + rm, mask=live, other=0.0)
        weight_scale = block_scale(weight_scales, at, column, H, 0, BLOCKS, BLOCK_ROWS, BN)
        for kb in range(I // 128):
            high, low = load_terms(source, live, num_rows.to(tl.int64) * I, TERMS)
            if ROW_BLOCKS > 1:
                row_scale = tl.load(hidden_scales + kb * num_rows + rm, mask=live, other=0.0)
            if BLOCKS > 1:
                weight_scale = block_scale(weight_scales, at, column, H, kb, BLOCKS, BLOCK_ROWS, BN)
            part = multiply_rows(w.load([expert * H + column, kb * 128]), high, low, zero, TERMS, DOT8)
            acc = add_scaled(acc, part, row_scale, weight_scale, ROW_BLOCKS, BLOCKS, True)
            source += 128
        acc = finish_sum(acc, row_scale, weight_scale, ROW_BLOCKS, BLOCKS, True, DOT8)
        rn = column + tl.arange(0, BN)
        if bias is not None:
            acc += tl.load(bias + expert * H + rn, mask=rn < H, other=0.0).to(tl.float32)[:, None]
        slot = tl.load(slots + rm, mask=live, other=0).to(tl.int64)
        to = out + slot[None, :] * H + rn[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=live[None, :] & (rn < H)[:, None])
